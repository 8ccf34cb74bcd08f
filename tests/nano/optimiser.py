"""Muon for most weight matrices of the blocks, AdamW for everything else."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import nn


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon): each update has all its
    singular values near 1, times a factor that gives it the root mean square of AdamW's (Liu et al. 2025,
    arXiv:2502.16982), so one learning rate serves both.

    Matrices of one shape are stepped together as one stack, which keeps the number of kernels small.
    """

    def __init__(
        self, params: list[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            stacks: dict[torch.Size, list[nn.Parameter]] = defaultdict(list)
            for p in group["params"]:
                stacks[p.shape].append(p)
            for shape, matrices in stacks.items():
                state = self.state[matrices[0]]
                gradient = torch.stack([p.grad for p in matrices])
                if not state:
                    state["average"] = torch.zeros_like(gradient)
                average = state["average"]
                average.lerp_(gradient, 1 - group["momentum"])
                update = orthogonalise(gradient.lerp(average, group["momentum"]))
                scale = 0.2 * max(shape) ** 0.5
                torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(matrices, list((update * (-group["lr"] * scale)).unbind(0)))


def orthogonalise(stack: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Brings the singular values of matrices [n, rows, cols] near 1: quintic Newton-Schulz iteration in bfloat16."""
    a, b, c = 3.4445, -4.7750, 2.0315
    wide = stack.shape[1] <= stack.shape[2]
    x = (stack if wide else stack.mT).bfloat16()
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x if wide else x.mT).to(stack.dtype)


def optimisers(model: nn.Module, matrix_lr: float, other_lr: float, weight_decay: float) -> list[torch.optim.Optimizer]:
    """Muon on the blocks' and mergers' matrices, AdamW on embeddings, convolution, norms, biases and heads, and on the
    text model's q_proj and k_proj: with Muon on those, recall never learned which fact is asked for."""
    matrices, others = [], []
    for name, p in model.named_parameters():
        inside = "blocks." in name or "layers." in name or "merger" in name
        asks = "q_proj" in name or "k_proj" in name
        (matrices if inside and p.ndim == 2 and not asks else others).append(p)
    fused = others[0].device.type == "cuda"
    return [
        Muon(matrices, matrix_lr, weight_decay=weight_decay),
        torch.optim.AdamW(others, other_lr, betas=(0.9, 0.95), weight_decay=0.0, fused=fused),
    ]

"""The torch face of QuantLinear: the op `pascalvl::quant_linear`, and the module that calls it."""

from __future__ import annotations

import torch
from torch import nn

from pascalvl.plugins.errors import UserError
from pascalvl.plugins.kernels import torch_calls
from pascalvl.plugins.ops.quant_linear.op import GATED_BLOCK, Activation
from pascalvl.plugins.weight_format import WeightFormat
from pascalvl.plugins.weight_rows import QuantisedWeight


@torch.library.custom_op("pascalvl::quant_linear", mutates_args=())
def quant_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    zero: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    bits: int,
    group: int,
    activation: int,
) -> torch.Tensor:
    """A linear layer as `pascalvl.plugins.ops.quant_linear.op` defines it.

    Tensors on CUDA go to the kernels; others are computed by PyTorch, the weight unpacked for the time of the call.

    Args:
        x: float32 ``[..., in_features]``.
        weight: int32 `WeightFormat.weight_shape`, words of codes or halves.
        scale, zero: int32 `WeightFormat.scale_shape`, words of halves; zero None: zeros.
        bias: float32 ``[out_features]``, or None.
        residual: float32, of the result's shape, or None.
        bits: 8, 4, or 16, of halves.
        group: inputs that share a scale; of codes.
        activation: number of an `Activation`.

    Returns:
        float32 ``[..., out_features]``, half as many where gated.

    Raises:
        ValueError: the kernels do not support the arguments; says which they do.
    """
    if torch_calls.serves(x.device):
        try:
            kernels = torch_calls.library(x.device)
            return torch_calls.linear(kernels, x, weight, scale, zero, bias, residual, bits, group, activation)
        except UserError as error:
            raise ValueError(str(error)) from None
    form = WeightFormat(bits, group)
    return compute(x, dense(weight, scale, zero, x.shape[-1], form), bias, residual, form, Activation(activation))


@quant_linear.register_fake
def _(x, weight, scale, zero, bias, residual, bits, group, activation):
    outputs = weight.shape[0] // (2 if activation == Activation.SILU_GATED else 1)
    return x.new_empty(*x.shape[:-1], outputs)


def dense(
    weight: torch.Tensor, scale: torch.Tensor | None, zero: torch.Tensor | None, in_features: int, form: WeightFormat
) -> torch.Tensor:
    """A weight as the op has it in float32, ``[out_features, in_features]``."""
    if not form.is_quantised:
        return weight.view(torch.float16)[:, :in_features].float()
    named = (("weight", weight), ("scale", scale), ("zero", zero))
    arrays = {name: tensor.numpy() for name, tensor in named if tensor is not None}
    return torch.from_numpy(QuantisedWeight.unpacked(arrays, in_features, form).dense())


def compute(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    form: WeightFormat,
    activation: Activation,
) -> torch.Tensor:
    """The op by PyTorch, its weight in float32."""
    sums = (rounded(x, form.group) if form.is_quantised else x) @ weight.T
    if bias is not None:
        sums = sums + bias
    if activation is Activation.GELU_TANH:
        sums = nn.functional.gelu(sums, approximate="tanh")
    elif activation is Activation.SILU_GATED:
        gate, value = sums.unflatten(-1, (-1, 2, GATED_BLOCK)).unbind(-2)
        sums = (nn.functional.silu(gate) * value).flatten(-2)
    return sums if residual is None else sums + residual


def rounded(x: torch.Tensor, group: int) -> torch.Tensor:
    """Inputs ``[..., in_features]`` as codes meet them: to int8 and back, by group."""
    in_features = x.shape[-1]
    padded = nn.functional.pad(x, (0, -in_features % group)).unflatten(-1, (-1, group))
    most = padded.abs().amax(-1, keepdim=True)
    codes = (padded * torch.where(most > 0, 127 / most, 0)).round()
    return (codes * (most / 127)).flatten(-2)[..., :in_features]


class QuantLinear(nn.Module):
    """A linear layer whose weight is in codes or halves; its parameters are as the op takes them.

    Args:
        in_features, out_features: its size; where gated, ``out_features`` counts gates and values.
        form: of the weight, not float32.
        has_bias: whether there is one.
        activation: what becomes of the sums.
        device: of the parameters, which have no values yet.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        form: WeightFormat,
        has_bias: bool = False,
        activation: Activation = Activation.NONE,
        device: torch.device | str = "meta",
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.form, self.activation = in_features, out_features, form, activation
        self._device = torch.device(device)
        self.weight = self._parameter(form.weight_shape(out_features, in_features), torch.int32)
        self.scale = self.zero = None
        if form.is_quantised:
            self.scale = self._parameter(form.scale_shape(out_features, in_features), torch.int32)
        self.bias = self._parameter((out_features,), torch.float32) if has_bias else None

    def add_zero(self) -> None:
        """Give the codes zeros of their own."""
        self.zero = self._parameter(self.scale.shape, torch.int32)

    def _parameter(self, shape: tuple[int, ...], dtype: torch.dtype) -> nn.Parameter:
        return nn.Parameter(torch.empty(shape, dtype=dtype, device=self._device), requires_grad=False)

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        form = self.form.bits, self.form.group, int(self.activation)
        return quant_linear(x, self.weight, self.scale, self.zero, self.bias, residual, *form)

"""Conversations, and how far a changed model's next tokens are from the model's own, position by position."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from transformers import Qwen3VLConfig

from pascalvl.plugins.prompt import Prompt

_LOGITS_AT_ONCE = 256
Logits = Callable[[torch.Tensor], torch.Tensor]
"""Logits ``[n, vocab_size]`` at positions of a conversation, int64 ``[n]``."""


@dataclasses.dataclass(frozen=True, eq=False)
class EvaluationPrompt:
    """A conversation: its prompt, and the answer's tokens, int64 ``[n]``, the one that ends it included.

    Attributes:
        is_right: whether the answer is known to be right; otherwise it is what the model itself said.
        name: what a result calls it.
    """

    prompt: Prompt
    answer: np.ndarray
    is_right: bool
    name: str = ""

    @property
    def tokens(self) -> np.ndarray:
        """Prompt and answer."""
        return np.concatenate([self.prompt.token_ids, self.answer])

    @property
    def whole(self) -> Prompt:
        """The same as a prompt."""
        return dataclasses.replace(self.prompt, token_ids=self.tokens)

    @property
    def first_answer(self) -> int:
        """Position that predicts the answer's first token."""
        return len(self.prompt.token_ids) - 1

    def positions(self, config: Qwen3VLConfig) -> np.ndarray:
        """Those that predict a token of text."""
        return np.flatnonzero(~np.isin(self.tokens, (config.image_token_id, config.video_token_id))[1:])


@dataclasses.dataclass(frozen=True, eq=False)
class Figures:
    """Of positions, ``[n]`` each.

    Attributes:
        kl: divergence of the next token's distribution from the model's own, nats.
        same: whether the likeliest token is the same.
        loss: -log of the true token's probability, nats.
        hit: whether the true token is the likeliest.
    """

    kl: np.ndarray
    same: np.ndarray
    loss: np.ndarray
    hit: np.ndarray


def compare(prompt: EvaluationPrompt, positions: np.ndarray, exact: Logits, found: Logits) -> Figures:
    """Figures of a changed model, ``found``, against the model itself."""
    parts = []
    for start in range(0, len(positions), _LOGITS_AT_ONCE):
        at = torch.from_numpy(positions[start : start + _LOGITS_AT_ONCE])
        target = torch.from_numpy(prompt.tokens)[at + 1]
        with torch.no_grad():
            p, q = (logits(at).double().log_softmax(-1) for logits in (exact, found))
        likeliest = q.argmax(-1)
        kl = (p.exp() * (p - q)).sum(-1).clamp(min=0)
        loss = -q.gather(1, target[:, None])[:, 0]
        parts.append((kl, likeliest == p.argmax(-1), loss, likeliest == target))
    return Figures(*(torch.cat(columns).numpy() for columns in zip(*parts, strict=True)))


@dataclasses.dataclass(frozen=True)
class Summary:
    """Of a changed model over all positions of text. KL divergences are in nats, from float32's distribution."""

    kl: float
    kl_999: float
    """The 99.9th percentile."""
    top_1: float
    """Share of positions whose likeliest token is float32's."""
    perplexity: float
    """Of the text itself."""
    answer_kl: float
    """Mean over answers' positions."""
    answer_top_1: float
    right: float | None
    """Share of answers that come out exactly; None where none is known."""
    positions: int
    answer_positions: int
    wrong: tuple[str, ...]
    """Names of the prompts whose answers do not come out."""


def summary(prompts: Sequence[EvaluationPrompt], figures: Sequence[Figures], config: Qwen3VLConfig) -> dict[str, Any]:
    """The fields of a `Summary`, of each prompt's figures at its `EvaluationPrompt.positions`."""
    answers = [prompt.positions(config) >= prompt.first_answer for prompt in prompts]
    kl, same, loss = (np.concatenate([getattr(f, field) for f in figures]) for field in ("kl", "same", "loss"))
    is_answer = np.concatenate(answers)
    known = [(p.name, f.hit[a].all()) for p, f, a in zip(prompts, figures, answers, strict=True) if p.is_right]
    return {
        "kl": float(kl.mean()),
        "kl_999": float(np.quantile(kl, 0.999)),
        "top_1": float(same.mean()),
        "perplexity": float(np.exp(loss.mean())),
        "answer_kl": float(kl[is_answer].mean()),
        "answer_top_1": float(same[is_answer].mean()),
        "right": float(np.mean([hit for _, hit in known])) if known else None,
        "positions": len(kl),
        "answer_positions": int(is_answer.sum()),
        "wrong": tuple(name for name, hit in known if not hit),
    }

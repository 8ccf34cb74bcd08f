"""Weight-space transforms: the same model, with keys and values that quantise well, or shorter values.

Each is exact or, with a rank below head_dim, the best of that rank. None costs anything when the model runs:

- *Balance*. q_norm's weights times lambda, k_norm's divided by it, equal within each RoPE pair: every q.k stays, and
  the outliers that k_norm gives fixed channels of the keys are shared with the queries (SmoothQuant, Xiao et al.,
  arXiv:2211.10438, between two activations).
- *Rotation* of values, folded into v_proj's rows and o_proj's columns: spreads outliers over the row, whose one scale
  they would set (QuaRot, Ashkboos et al., arXiv:2404.00456). Keys are rotated by the kernels, as RoPE lies between
  them and their weights.
- *Low rank* of values: what o_proj reads most of, folded into the same weights.

The mathematics is in float64 NumPy; `TransformedWeights` stands before the checkpoint when weights are written.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Sequence
from typing import Protocol

import numpy as np
import torch

from pascalvl.plugins.errors import UserError
from pascalvl.plugins.kv_format import RANKS, CacheConfig, Rank
from pascalvl.plugins.kv_rows import hadamard
from pascalvl.plugins.model_config import TextConfig

DECODER_LAYERS = "model.language_model.layers."
"""What the checkpoint's names of their tensors begin with, before a layer's number."""
_FLOOR = 1e-8
"""Least eigenvalue or variance, as a share of the largest, that is divided by."""
_RIDGE = 1e-2
"""Share of the mean eigenvalue that is added to each where one is divided by: what the statistics have not seen must
not be scaled up without bound."""


class WeightSource(Protocol):
    """Weights by their name: a checkpoint."""

    def tensor(self, name: str) -> torch.Tensor: ...

    def __contains__(self, name: str) -> bool: ...


@dataclasses.dataclass(frozen=True, eq=False)
class LayerStatistics:
    """Second moments (E x x^T, about zero) of one layer, each ``[num_kv_heads, head_dim, head_dim]``, float64.

    Attributes:
        query: after RoPE, summed over the query heads that read the kv head.
        key: after RoPE.
        value: as v_proj returns it.
    """

    query: np.ndarray
    key: np.ndarray
    value: np.ndarray

    @classmethod
    def from_weights(cls, weights: WeightSource, text: TextConfig, layer: int) -> LayerStatistics:
        """What the weights alone let expect: every hidden channel, and every head's channel before its norm's weight,
        independent and of the same size.
        """
        heads, dim = text.num_key_value_heads, text.head_dim
        query, key = (
            np.tile(np.diag(_float64(weights, layer, f"self_attn.{name}.weight") ** 2), (heads, 1, 1))
            for name in ("q_norm", "k_norm")
        )
        scaled = _float64(weights, layer, "self_attn.v_proj.weight") * _float64(
            weights, layer, "input_layernorm.weight"
        )
        rows = scaled.reshape(heads, dim, -1)
        value = rows @ _t(rows)
        if _name(layer, "self_attn.v_proj.bias") in weights:
            bias = _float64(weights, layer, "self_attn.v_proj.bias").reshape(heads, dim)
            value += bias[:, :, None] * bias[:, None, :]
        return cls(query * (text.num_attention_heads // heads), key, value)


@dataclasses.dataclass(frozen=True, eq=False)
class LayerTransform:
    """What becomes of one decoder layer's weights; float64.

    Attributes:
        balance: ``[head_dim]``: multiplies q_norm's weight, divides k_norm's; equal in the RoPE pair i, i + head_dim/2.
        value_down: ``[num_kv_heads, value_dim, head_dim]``: cached value = value_down @ value. None: as it is.
        value_up: ``[num_kv_heads, head_dim, value_dim]``: o_proj reads value_up @ cached value.
    """

    balance: np.ndarray
    value_down: np.ndarray | None
    value_up: np.ndarray | None

    @property
    def value_dim(self) -> int:
        return self.balance.size if self.value_down is None else self.value_down.shape[1]


def check_rank(cache: CacheConfig, text: TextConfig, kept_values: Collection[int] = frozenset()) -> None:
    """Raise `UserError` for a rank of values that the model cannot have; see `plan_transforms`."""
    if isinstance(cache.value_rank, int) and cache.value_rank > text.head_dim:
        raise UserError(
            f"the KV cache option rv={cache.value_rank} is more than this model's head size, {text.head_dim}: leave it "
            "out, or give a lower rank."
        )
    if cache.value_rank not in (None, text.head_dim) and kept_values:
        raise UserError(
            "a rank of values (the KV cache option rv) changes weights that the checkpoint has in codes of 4 bits: "
            "leave rv out, or give --weights w8."
        )


def plan_transforms(
    weights: WeightSource,
    text: TextConfig,
    cache: CacheConfig,
    statistics: Sequence[LayerStatistics] | None = None,
    kept_values: Collection[int] = frozenset(),
) -> list[LayerTransform]:
    """The transform of each layer.

    Args:
        weights: the model's.
        text: the model, as the checkpoint has it.
        cache: its `value_rank` counts.
        statistics: of each layer, from calibration; None: what the weights let expect.
        kept_values: layers whose values stay as they are.

    Raises:
        UserError: see `check_rank`.
    """
    check_rank(cache, text, kept_values)
    return [
        plan_layer(weights, text, cache, layer, statistics[layer] if statistics else None, layer in kept_values)
        for layer in range(text.num_hidden_layers)
    ]


def plan_layer(
    weights: WeightSource,
    text: TextConfig,
    cache: CacheConfig,
    layer: int,
    statistics: LayerStatistics | None,
    keep_values: bool = False,
) -> LayerTransform:
    """The transform of one layer; arguments as those of `plan_transforms`."""
    calibrated = statistics is not None
    statistics = statistics or LayerStatistics.from_weights(weights, text, layer)
    dim = text.head_dim
    value_down = value_up = None
    if not keep_values:
        output = output_moment(weights, text, layer)
        rank = _rank(cache.value_rank, statistics.value, output)
        if rank == dim and not calibrated:
            # The weights' statistics are too rough to balance by: on the nano checkpoint, values in 4 bits then diverge
            # by 0.0082 to 0.0089 nats (ridge 0.01, 0.1), rotated alone by 0.0083, and balanced by a calibration's by
            # 0.0074.
            value_down = np.tile(spread(dim), (text.num_key_value_heads, 1, 1))
            value_up = _t(value_down)
        else:
            value_down, value_up = projection(statistics.value, output, rank)
    return LayerTransform(key_balance(statistics), value_down, value_up)


def output_moment(weights: WeightSource, text: TextConfig, layer: int) -> np.ndarray:
    """How o_proj weighs a kv head's values: the sum of W^T W over its query heads ``[num_kv_heads, dim, dim]``."""
    projected = _float64(weights, layer, "self_attn.o_proj.weight")
    heads, dim = text.num_key_value_heads, text.head_dim
    by_head = projected.reshape(-1, heads, text.num_attention_heads // heads, dim)
    columns = np.moveaxis(by_head, 1, 0).reshape(heads, -1, dim)
    return _t(columns) @ columns


def key_balance(statistics: LayerStatistics) -> np.ndarray:
    """Lambda ``[head_dim]``, lambda_i^2 = sigma(k_i) / sigma(q_i).

    With one scale for a rotated row, the noise of q.k is in proportion to E|q|^2 E|k|^2, which this makes least
    (Cauchy-Schwarz).

    Sigma is that of a RoPE pair, which no position changes, over all heads: they share the norms' weights.
    """
    query, key = (_pair_moments(moment) for moment in (statistics.query, statistics.key))
    return np.tile((key / query) ** 0.25, 2)


def _pair_moments(moment: np.ndarray) -> np.ndarray:
    pairs = np.diagonal(moment, axis1=1, axis2=2).reshape(len(moment), 2, -1).sum((0, 1))
    return _above_zero(np.maximum(pairs, _FLOOR * pairs.max()))


def projection(moment: np.ndarray, weight: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """The pair down, up of a rank for which the error E (x - up down x)^T weight (x - up down x) is least.

    With weight^1/2 moment weight^1/2 = U L U^T, whose first r eigenvectors span what is kept, down = R L^-1/4 U_r^T
    weight^1/2 and up = weight^-1/2 U_r L^1/4 R^T. The error is the sum of the eigenvalues left out. The factors L^1/4
    share the spread between the two sides such that the noise of one scale a row, in proportion to
    tr(down moment down^T) tr(up^T weight up), is least too (Cauchy-Schwarz); R, which `spread` gives, spreads a row's
    energy over all its elements.

    Args:
        moment: of x, ``[heads, dim, dim]``.
        weight: of errors, ``[heads, dim, dim]``.

    Returns:
        ``[heads, rank, dim]`` and ``[heads, dim, rank]``.
    """
    root, inverse_root = _roots(weight)
    eigenvalues, eigenvectors = _eigh(root @ moment @ root)
    balance = _above_zero(eigenvalues + _RIDGE * eigenvalues.mean(1, keepdims=True))[:, :rank] ** 0.25
    kept, rotation = eigenvectors[:, :, :rank], spread(rank)
    down = rotation @ (_t(kept / balance[:, None]) @ root)
    up = inverse_root @ (kept * balance[:, None]) @ rotation.T
    return down, up


def rank_errors(moment: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Error of `projection` by rank, 0 to dim: as a share of E x^T weight x, mean of the heads; ``[dim + 1]``."""
    root, _ = _roots(weight)
    eigenvalues, _ = _eigh(root @ moment @ root)
    kept = np.cumsum(eigenvalues, 1) / np.maximum(eigenvalues.sum(1, keepdims=True), np.finfo(float).tiny)
    return np.concatenate([[1.0], np.maximum(1 - kept, 0).mean(0)])


def spread(dim: int) -> np.ndarray:
    """An orthogonal matrix that spreads each coordinate over all: Hadamard's for powers of two, else the DCT-II's."""
    if dim & (dim - 1) == 0:
        return hadamard(np.eye(dim))
    rows, columns = np.mgrid[:dim, :dim]
    cosines = np.cos(np.pi * rows * (2 * columns + 1) / (2 * dim)) * (2 / dim) ** 0.5
    cosines[0] *= 0.5**0.5
    return cosines


def _rank(asked: Rank | None, moment: np.ndarray, weight: np.ndarray) -> int:
    """The rank of a layer: as asked, or the lowest with no more than that error (see `rank_errors`)."""
    dim = moment.shape[-1]
    if not isinstance(asked, float):
        return asked or dim
    errors = rank_errors(moment, weight)
    return next((rank for rank in RANKS if rank < dim and errors[rank] <= asked), dim)


def _eigh(symmetric: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues, the largest first and none below 0, ``[heads, dim]``, and eigenvectors, in columns."""
    eigenvalues, eigenvectors = np.linalg.eigh((symmetric + _t(symmetric)) / 2)
    return np.maximum(eigenvalues[:, ::-1], 0), eigenvectors[:, :, ::-1]


def _roots(symmetric: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Square root and its inverse."""
    eigenvalues, eigenvectors = _eigh(symmetric)
    roots = np.sqrt(_above_zero(np.maximum(eigenvalues, _FLOOR * eigenvalues[:, :1])))[:, None]
    return (eigenvectors * roots) @ _t(eigenvectors), (eigenvectors / roots) @ _t(eigenvectors)


def _above_zero(floored: np.ndarray) -> np.ndarray:
    """The same, but 1 for what is 0 in spite of its floor: all of a head that does nothing."""
    return np.where(floored > 0, floored, 1.0)


def _t(matrices: np.ndarray) -> np.ndarray:
    """Each of several matrices transposed."""
    return matrices.swapaxes(-1, -2)


class TransformedWeights:
    """A model's weights as its layers' transforms leave them, each computed in float64 when it is asked for."""

    def __init__(self, weights: WeightSource, transforms: Sequence[LayerTransform]) -> None:
        self._weights = weights
        self._change = {}
        for layer, transform in enumerate(transforms):
            for name, change in _changes(transform).items():
                self._change[_name(layer, f"self_attn.{name}")] = change

    def tensor(self, name: str) -> torch.Tensor:
        """One weight; as the checkpoint has it, or float32."""
        tensor = self._weights.tensor(name)
        if name not in self._change:
            return tensor
        return torch.from_numpy(self._change[name](tensor.double().numpy())).float()

    def __contains__(self, name: str) -> bool:
        return name in self._weights


def _changes(transform: LayerTransform) -> dict[str, Callable[[np.ndarray], np.ndarray]]:
    """By the name of an attention module's weight: what becomes of it."""
    of_keys = {
        "q_norm.weight": lambda weight: weight * transform.balance,
        "k_norm.weight": lambda weight: weight / transform.balance,
    }
    down, up = transform.value_down, transform.value_up
    if down is None or up is None:
        return of_keys

    def rows(weight: np.ndarray) -> np.ndarray:
        heads, _, dim = down.shape
        projected = down @ weight.reshape(heads, dim, -1)
        return projected.reshape(-1, *weight.shape[1:])

    def columns(weight: np.ndarray) -> np.ndarray:
        heads, dim, _ = up.shape
        projected = weight.reshape(len(weight), heads, -1, dim) @ up
        return projected.reshape(len(weight), -1)

    return {**of_keys, "v_proj.weight": rows, "v_proj.bias": rows, "o_proj.weight": columns}


def _name(layer: int, name: str) -> str:
    """The checkpoint's name of a decoder layer's tensor."""
    return f"{DECODER_LAYERS}{layer}.{name}"


def _float64(weights: WeightSource, layer: int, name: str) -> np.ndarray:
    return weights.tensor(_name(layer, name)).double().numpy()

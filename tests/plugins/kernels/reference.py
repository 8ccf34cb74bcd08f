"""What attention must compute, in float64 over a cache's rows; and calls of the kernels' library."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from pascalvl.plugins.kernels.build import Target, cached
from pascalvl.plugins.kernels.library import AppendArgs, AttentionArgs, Cache, KernelLibrary, LinearArgs
from pascalvl.plugins.kv_format import RowFormat
from pascalvl.plugins.kv_rows import expand, hadamard
from pascalvl.plugins.ops.quant_linear.op import Activation
from pascalvl.plugins.weight_rows import QuantisedWeight

PAIRS = [
    (RowFormat.FLOAT32, RowFormat.FLOAT32),
    (RowFormat.FLOAT16, RowFormat.FLOAT16),
    (RowFormat.INT8, RowFormat.INT8),
    (RowFormat.INT8, RowFormat.INT4),
    (RowFormat.INT4, RowFormat.INT8),
    (RowFormat.INT4, RowFormat.INT4),
]
"""The formats of keys and values that a cache may have."""


def attention(q, k, v, visible, softmax_scale: float) -> np.ndarray:
    """Float64 attention of q [heads, rows, dim] over k, v [kv_heads, keys, dim]; visible [rows, keys].

    Returns [rows, heads, value_dim].
    """
    group = len(q) // len(k)
    k, v = (np.repeat(x.astype(np.float64), group, 0) for x in (k, v))
    scores = np.where(visible, q.astype(np.float64) @ k.transpose(0, 2, 1) * softmax_scale, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return (weights / weights.sum(-1, keepdims=True) @ v).transpose(1, 0, 2)


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


class Memory:
    """Where the arrays live that kernels read and write: plain memory, which the emulator's do at once."""

    def allocate(self, size: int) -> np.ndarray:
        """Zeros, uint8."""
        return np.zeros(size, np.uint8)

    def wait(self) -> None:
        """Return when the kernels started so far are done."""


class PinnedMemory(Memory):
    """Memory of the host that a GPU reads and writes by the same addresses."""

    def allocate(self, size: int) -> np.ndarray:
        import torch

        return torch.zeros(size, dtype=torch.uint8, pin_memory=True).numpy()

    def wait(self) -> None:
        import torch

        torch.cuda.synchronize()


memory = Memory()
"""Of the library under test."""


def aligned(shape: tuple[int, ...], dtype: type = np.float32) -> np.ndarray:
    """Zeros whose first element lies on a 16-byte boundary."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    raw = memory.allocate(size + 16)
    start = -raw.ctypes.data % 16
    return raw[start : start + size].view(dtype).reshape(shape)


def copy(array: np.ndarray | None) -> np.ndarray | None:
    """The same in the kernels' memory."""
    if array is None:
        return None
    copied = aligned(array.shape, array.dtype)
    copied[...] = array
    return copied


def pointer(array: np.ndarray | None) -> int | None:
    return None if array is None else array.ctypes.data


def targets() -> list[Target]:
    """What can run the kernels here."""
    import torch

    return list(Target) if torch.cuda.is_available() else [Target.EMULATOR]


def open_library(target: Target, path: Path | None = None) -> KernelLibrary:
    """The kernels, which from now on find their arrays in memory of that kind; None: in the cached library."""
    global memory
    memory = Memory()
    if target is Target.CUDA:
        import torch

        torch.zeros(1, device="cuda")
        memory = PinnedMemory()
    return KernelLibrary(path or cached(target))


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of a causal attention."""

    batch: int = 1
    num_heads: int = 4
    num_kv_heads: int = 1
    key_dim: int = 128
    value_dim: int = 128
    capacity: int = 256


class HostCache:
    """A cache of one layer or several in plain memory, and the library's view of it."""

    def __init__(
        self, library: KernelLibrary, shape: Shape, formats: tuple[RowFormat, RowFormat], rotated: bool, layers: int = 1
    ) -> None:
        self.shape, self.formats, self.rotated = shape, formats, rotated
        lead = (layers, shape.batch, shape.num_kv_heads, shape.capacity)
        self.dims = (shape.key_dim, shape.value_dim)
        self.rows = [
            aligned((*lead, library.row_bytes(f, dim)), np.uint8) for f, dim in zip(formats, self.dims, strict=True)
        ]
        self.scales = [aligned(lead, np.float16) for _ in formats]

    def view(self) -> Cache:
        """As the library takes it: of the first layer."""
        key, value = map(pointer, self.rows)
        key_scale, value_scale = map(pointer, self.scales)
        return Cache(
            key=key,
            value=value,
            key_scale=key_scale,
            value_scale=value_scale,
            key_format=self.formats[0],
            value_format=self.formats[1],
            capacity=self.shape.capacity,
            rotated=self.rotated,
        )

    def contents(self, which: int, layer: int = 0) -> np.ndarray:
        """Keys (0, still rotated) or values (1) as float64 [batch, num_kv_heads, capacity, dim]."""
        row_format = self.formats[which]
        rows, scales = self.rows[which][layer].view(row_format.dtype), self.scales[which][layer]
        return expand(rows, scales.astype(np.float64), row_format, self.dims[which]).astype(np.float64)


def append(
    library: KernelLibrary,
    cache: HostCache,
    key: np.ndarray,
    value: np.ndarray,
    past_length: np.ndarray,
    slots: np.ndarray | None = None,
) -> None:
    """kv_append of key and value [layers, batch, num_kv_heads, seq, dim]."""
    past_length, slots = copy(past_length), copy(slots)
    layers, batch, num_kv_heads, seq, _ = key.shape
    library.kv_append(
        AppendArgs(
            key=pointer(key),
            value=pointer(value),
            layers=layers,
            batch=batch,
            num_kv_heads=num_kv_heads,
            seq=seq,
            key_dim=key.shape[-1],
            value_dim=value.shape[-1],
            past_length=pointer(past_length),
            slots=pointer(slots),
            cache=cache.view(),
            key_stride=cache.rows[0].strides[0],
            value_stride=cache.rows[1].strides[0],
            key_scale_stride=cache.scales[0].strides[0],
            value_scale_stride=cache.scales[1].strides[0],
        )
    )
    memory.wait()


Recent = tuple[HostCache, np.ndarray]
"""A cache of recent tokens, and how many of them each sequence has."""


def causal_attention(
    library: KernelLibrary,
    cache: HostCache,
    q,
    k,
    v,
    past_length: np.ndarray,
    softmax_scale: float,
    visible: np.ndarray | None = None,
    recent: Recent | None = None,
) -> np.ndarray:
    """The library's attention of q [batch, num_heads, seq, dim] and new k, v over a cache.

    ``visible`` [batch, capacity]: how many queries see a slot; ``recent``: a cache of recent tokens, and lengths.
    """
    past_length, visible = copy(past_length), copy(visible)
    batch, num_heads, seq, key_dim = q.shape
    out = aligned((batch, seq, num_heads, v.shape[-1]))
    out[:] = np.nan
    options = {}
    if recent:
        recent_length = copy(recent[1])
        options = {"recent": recent[0].view(), "recent_length": pointer(recent_length)}
    args = AttentionArgs(
        q=pointer(q),
        k=pointer(k),
        v=pointer(v),
        out=pointer(out),
        batch=batch,
        num_heads=num_heads,
        num_kv_heads=k.shape[1],
        seq=seq,
        key_dim=key_dim,
        value_dim=v.shape[-1],
        softmax_scale=softmax_scale,
        causal=1,
        past_length=pointer(past_length),
        past_visible=pointer(visible),
        cache=cache.view(),
        **options,
    )
    workspace = aligned((library.attention_workspace(args),), np.uint8)
    library.attention(args, pointer(workspace), workspace.nbytes)
    memory.wait()
    return out


def expected_attention(cache: HostCache, q, k, v, past_length, softmax_scale, visible=None, recent=None) -> np.ndarray:
    """The same in float64, over the cache's very codes. Quantised keys meet queries quantised to int8."""
    outs = []
    for b, past in enumerate(past_length):
        number = np.arange(q.shape[2])[:, None]
        sees = [np.ones((q.shape[2], past), bool) if visible is None else number < visible[b, :past]]
        old_q = q[b].astype(np.float64)
        if cache.formats[0].is_quantised:
            turned = hadamard(q[b]) if cache.rotated else q[b]
            most = np.abs(turned).max(-1, keepdims=True)
            codes = np.rint(turned * (np.float32(127) / most))
            old_q = codes.astype(np.float64) * (most / np.float32(127))
        # Old and other keys meet different forms of q: stack both, zeros where the other form is due.
        both = np.concatenate([old_q, q[b].astype(np.float64)], -1)
        old_k = cache.contents(0)[b][:, :past]
        keys = [np.concatenate([old_k, np.zeros_like(old_k)], -1)]
        values = [cache.contents(1)[b][:, :past]]
        others = [(k[b], v[b], number >= number.T)]
        if recent:
            length = recent[1][b]
            others.append((*(recent[0].contents(i)[b][:, :length] for i in range(2)), np.ones((1, length), bool)))
        for other_k, other_v, seen in others:
            keys.append(np.concatenate([np.zeros_like(other_k), other_k], -1))
            values.append(other_v)
            sees.append(seen)
        keys, values, sees = np.concatenate(keys, 1), np.concatenate(values, 1), np.concatenate(sees, 1)
        outs.append(attention(both, keys, values, sees, softmax_scale))
    return np.stack(outs)


def quantised_linear(
    library: KernelLibrary,
    x,
    weight: QuantisedWeight | np.ndarray,
    bias=None,
    residual=None,
    activation=Activation.NONE,
) -> np.ndarray:
    """`KernelLibrary.linear`: what `pascalvl.plugins.weight_rows.linear` is the reference of."""
    rows, in_features = x.shape
    if isinstance(weight, QuantisedWeight):
        packed, bits, group, out_features = weight.packed(), weight.form.bits, weight.form.group, len(weight.codes)
    else:
        packed, bits, group, out_features = {"weight": weight}, 16, 0, len(weight)
    out = aligned((rows, out_features // 2 if activation is Activation.SILU_GATED else out_features))
    out[:] = np.nan
    arrays = {name: copy(array) for name, array in {"x": x, **packed, "bias": bias, "residual": residual}.items()}
    args = LinearArgs(
        **{name: pointer(array) for name, array in arrays.items()},
        out=pointer(out),
        rows=rows,
        in_features=in_features,
        out_features=out_features,
        bits=bits,
        group=group,
        activation=activation,
    )
    size = library.linear_workspace(args)
    workspace = aligned((size,), np.uint8)
    workspace[:] = 0xFF  # NaN wherever it is read before it is written
    library.linear(args, pointer(workspace), size)
    memory.wait()
    return out

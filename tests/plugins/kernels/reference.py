"""What attention must compute, in float64 over a cache's rows; and calls of the kernels' library."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from pascalvl.plugins.kernels.build import Target, cached
from pascalvl.plugins.kernels.library import AppendArgs, AppendLayer, AttentionArgs, KernelLibrary, LinearArgs, Rows
from pascalvl.plugins.kv_format import RowFormat
from pascalvl.plugins.kv_rows import compress, expand, hadamard
from pascalvl.plugins.ops.quant_linear.op import Activation, Norm
from pascalvl.plugins.weight_format import WeightFormat
from pascalvl.plugins.weight_rows import InputNorm, QuantisedWeight

PAIRS = [
    (RowFormat.FLOAT32, RowFormat.FLOAT32),
    (RowFormat.FLOAT16, RowFormat.FLOAT16),
    (RowFormat.INT8, RowFormat.INT8),
    (RowFormat.INT8, RowFormat.INT4),
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
    head_dim: int = 128
    value_dim: int = 128
    capacity: int = 256


class HostRows:
    """Keys and values in plain memory, of one layer or several, and the library's view of them."""

    def __init__(
        self,
        library: KernelLibrary,
        shape: Shape,
        formats: tuple[RowFormat, RowFormat],
        rotated: bool = False,
        layers: int = 1,
    ) -> None:
        self.shape, self.formats, self.rotated = shape, formats, rotated
        lead = (layers, shape.batch, shape.num_kv_heads, shape.capacity)
        self.dims = (shape.head_dim, shape.value_dim)
        self.rows = [
            aligned((*lead, library.row_bytes(f, dim)), np.uint8) for f, dim in zip(formats, self.dims, strict=True)
        ]
        self.words = aligned(lead, np.int32)
        """Of scales."""

    @property
    def scales(self) -> list[np.ndarray]:
        """Of keys and of values, float16 ``[layers, batch, num_kv_heads, capacity]``: views."""
        halves = self.words.view(np.float16).reshape(*self.words.shape, 2)
        return [halves[..., 0], halves[..., 1]]

    @property
    def arrays(self) -> list[np.ndarray]:
        """Those that there are: rows, and of codes words of scales."""
        return [*self.rows, *[self.words] * self.formats[0].is_quantised]

    def view(self, layer: int = 0) -> Rows:
        """A layer's as the library takes them."""
        scale = pointer(self.words[layer]) if self.formats[0].is_quantised else None
        return Rows(key=pointer(self.rows[0][layer]), value=pointer(self.rows[1][layer]), scale=scale)

    def fill(self, key: np.ndarray, value: np.ndarray) -> None:
        """Store keys and values ``[layers, batch, num_kv_heads, capacity, dim]`` by NumPy."""
        for which, (x, form) in enumerate(zip((key, value), self.formats, strict=True)):
            rows, scale = compress(x, form, self.rotated and which == 0)
            self.rows[which][...] = rows.view(np.uint8)
            if form.is_quantised:
                self.scales[which][...] = scale

    def contents(self, which: int, layer: int = 0) -> np.ndarray:
        """Keys (0, still rotated) or values (1) as float64 [batch, num_kv_heads, capacity, dim]."""
        row_format = self.formats[which]
        rows, scales = self.rows[which][layer].view(row_format.dtype), self.scales[which][layer]
        return expand(rows, scales.astype(np.float64), row_format, self.dims[which]).astype(np.float64)


def append(library: KernelLibrary, cache: HostRows, new: HostRows, slots: np.ndarray) -> None:
    """kv_append of new rows to slots ``[batch, seq]``, in all layers."""
    slots = copy(slots.astype(np.int32))
    layers = [
        AppendLayer(
            new_rows=new.view(layer),
            cache=cache.view(layer),
            key_row=cache.rows[0].shape[-1],
            value_row=cache.rows[1].shape[-1],
        )
        for layer in range(len(cache.rows[0]))
    ]
    sizes = {"batch": cache.shape.batch, "num_kv_heads": cache.shape.num_kv_heads}
    sizes |= {"seq": new.shape.capacity, "capacity": cache.shape.capacity}
    library.kv_append(AppendArgs.of(layers, slots=pointer(slots), **sizes))
    memory.wait()


@dataclasses.dataclass(frozen=True)
class Prologue:
    """Weights of norms ``[head_dim]``, where there are some, and tables of RoPE ``[batch, seq, head_dim]``."""

    q_norm: np.ndarray | None
    k_norm: np.ndarray | None
    rope_cos: np.ndarray
    rope_sin: np.ndarray
    epsilon: float = 1e-6

    def of(self, x: np.ndarray, norm: np.ndarray) -> np.ndarray:
        """Queries or keys ``[batch, heads, seq, head_dim]`` in float64."""
        x = x.astype(np.float64)
        return self.roped(x / np.sqrt((x**2).mean(-1, keepdims=True) + self.epsilon) * norm)

    def roped(self, x: np.ndarray) -> np.ndarray:
        """The same without a norm."""
        x = x.astype(np.float64)
        first, second = np.split(x, 2, -1)
        cos, sin = (table[:, None].astype(np.float64) for table in (self.rope_cos, self.rope_sin))
        return x * cos + np.concatenate([-second, first], -1) * sin


def packed(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """``[batch, heads, seq, dim]`` each as the projection gives them, ``[batch, seq, width]``."""
    return copy(np.concatenate([x.swapaxes(1, 2).reshape(*x.shape[::2], -1) for x in (q, k, v)], -1))


def causal_attention(
    library: KernelLibrary,
    cache: HostRows,
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    past_length: np.ndarray | None,
    softmax_scale: float,
    visible: np.ndarray | None = None,
    prologue: Prologue | None = None,
) -> tuple[np.ndarray, HostRows]:
    """The library's attention of q [batch, num_heads, seq, dim] and new k, v over a cache, and their rows.

    ``visible`` [batch, capacity]: how many queries see a slot; ``prologue`` None: q and k are met as they are.
    """
    past_length, visible = copy(past_length), copy(visible)
    batch, num_heads, seq, head_dim = q.shape
    qkv, out = packed(q, k, v), aligned((batch, seq, num_heads, v.shape[-1]))
    out[:] = np.nan
    new = HostRows(library, dataclasses.replace(cache.shape, capacity=seq), cache.formats, cache.rotated)
    arrays = {}
    if prologue:
        arrays = {name: copy(getattr(prologue, name)) for name in ("q_norm", "k_norm", "rope_cos", "rope_sin")}
    args = AttentionArgs(
        **{name: pointer(array) for name, array in arrays.items()},
        qkv=pointer(qkv),
        out=pointer(out),
        new_rows=new.view(),
        past=cache.view(),
        past_length=pointer(past_length),
        past_visible=pointer(visible),
        batch=batch,
        num_heads=num_heads,
        num_kv_heads=k.shape[1],
        seq=seq,
        head_dim=head_dim,
        value_dim=v.shape[-1],
        key_format=cache.formats[0],
        value_format=cache.formats[1],
        capacity=cache.shape.capacity,
        rotated=cache.rotated,
        causal=1,
        softmax_scale=softmax_scale,
        epsilon=prologue.epsilon if prologue else 0,
    )
    workspace = aligned((library.attention_workspace(args),), np.uint8)
    workspace[:] = 0xFF  # NaN wherever it is read before it is written
    library.attention(args, pointer(workspace), workspace.nbytes)
    memory.wait()
    return out, new


def packed_attention(
    library: KernelLibrary,
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    cu_seqlens: np.ndarray,
    softmax_scale: float,
    prologue: Prologue | None = None,
) -> np.ndarray:
    """The library's attention within sequences of q, k, v [heads, tokens, dim]; returns [tokens, heads, dim]."""
    heads, tokens, dim = q.shape
    qkv, out, cu_seqlens = packed(q[None], k[None], v[None]), aligned((tokens, heads, dim)), copy(cu_seqlens)
    out[:] = np.nan
    tables = {name: copy(getattr(prologue, name)) for name in ("rope_cos", "rope_sin")} if prologue else {}
    args = AttentionArgs(
        **{name: pointer(table) for name, table in tables.items()},
        qkv=pointer(qkv),
        out=pointer(out),
        cu_seqlens=pointer(cu_seqlens),
        batch=1,
        num_heads=heads,
        num_kv_heads=heads,
        seq=tokens,
        head_dim=dim,
        value_dim=dim,
        num_sequences=len(cu_seqlens) - 1,
        softmax_scale=softmax_scale,
    )
    workspace = aligned((library.attention_workspace(args),), np.uint8)
    workspace[:] = 0xFF
    library.attention(args, pointer(workspace), workspace.nbytes)
    memory.wait()
    return out


def quantised_queries(q: np.ndarray, rotated: bool) -> np.ndarray:
    """Float32 queries as they meet codes, in float64: int8, one scale a row."""
    turned = hadamard(q) if rotated else q
    most = np.abs(turned).max(-1, keepdims=True)
    with np.errstate(divide="ignore"):
        inverse = np.where(most > 0, np.float32(127) / most, 0)
    return np.rint(turned * inverse).astype(np.float64) * (most / np.float32(127))


def expected_attention(
    cache: HostRows, new: HostRows, q: np.ndarray, past_length, softmax_scale: float, visible: np.ndarray | None = None
) -> np.ndarray:
    """The same in float64, over the very codes of the cache and of the new rows."""
    outs = []
    for b, past in enumerate(past_length):
        number = np.arange(q.shape[2])[:, None]
        of_past = np.ones((q.shape[2], past), bool) if visible is None else number < visible[b, :past]
        sees = np.concatenate([of_past, number >= number.T], 1)
        met = quantised_queries(q[b], cache.rotated) if cache.formats[0].is_quantised else q[b]
        keys, values = (np.concatenate([cache.contents(i)[b][:, :past], new.contents(i)[b]], 1) for i in range(2))
        outs.append(attention(met, keys, values, sees, softmax_scale))
    return np.stack(outs)


def quantised_linear(
    library: KernelLibrary,
    x,
    weight: QuantisedWeight | np.ndarray,
    bias=None,
    residual=None,
    activation=Activation.NONE,
    norm: InputNorm | None = None,
) -> np.ndarray:
    """`KernelLibrary.linear`: what `pascalvl.plugins.weight_rows.linear` is the reference of."""
    rows, in_features = x.shape
    if isinstance(weight, QuantisedWeight):
        packed, bits, group, out_features = weight.packed(), weight.form.bits, weight.form.group, len(weight.codes)
    else:
        packed, bits, group, out_features = {"weight": weight}, 8 * weight.itemsize, 0, len(weight)
    out = aligned((rows, out_features // 2 if activation is Activation.SILU_GATED else out_features))
    out[:] = np.nan
    named = {"x": x, **packed, "bias": bias, "residual": residual}
    options = {}
    if norm is not None:
        named |= {"norm_weight": norm.weight, "norm_bias": norm.bias}
        options = {"norm": norm.kind, "norm_size": len(norm.weight), "epsilon": norm.epsilon}
    arrays = {name: copy(array) for name, array in named.items()}
    args = LinearArgs(
        **{name: pointer(array) for name, array in arrays.items()},
        out=pointer(out),
        rows=rows,
        in_features=in_features,
        out_features=out_features,
        bits=bits,
        group=group,
        activation=activation,
        **options,
    )
    size = library.linear_workspace(args)
    workspace = aligned((size,), np.uint8)
    workspace[:] = 0xFF  # NaN wherever it is read before it is written
    library.linear(args, pointer(workspace), size)
    memory.wait()
    return out


def random_norm(rng: np.random.Generator, kind: Norm, size: int) -> InputNorm:
    """One whose epsilon counts."""
    weight, bias = (rng.standard_normal(size).astype(np.float32) for _ in range(2))
    return InputNorm(kind, 1 + weight / 4, 0.05, bias / 4 if kind is Norm.LAYER else None)


def away_from_ties(x: np.ndarray, norm: InputNorm, form: WeightFormat) -> np.ndarray:
    """``x`` with those elements moved a little whose codes, once normed, a float32 norm might round to the other side.

    A code is up to 127 and a norm in float32 right to some 1e-7 of it: codes are the same as of a norm in float64, and
    results can be compared to the accuracy of the sums.
    """
    x = x.copy()
    while True:
        groups = np.zeros((len(x), form.padded(x.shape[1])))
        groups[:, : x.shape[1]] = norm.normed(x)
        groups = groups.reshape(len(x), -1, form.group)
        most = np.abs(groups).max(-1, keepdims=True)
        codes = 127 * groups / np.where(most > 0, most, 1)
        close = (np.abs(codes - np.floor(codes) - 0.5) < 3e-4).reshape(len(x), -1)[:, : x.shape[1]]
        if not close.any():
            return x
        step = np.sqrt(np.square(x.astype(np.float64)).mean(1, keepdims=True)) / 64
        x = np.where(close, x + step, x).astype(np.float32)

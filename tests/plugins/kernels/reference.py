"""What attention must compute, in float64 over a cache's rows; and calls of the kernels' library."""

from __future__ import annotations

import dataclasses
import itertools
from copy import copy as copy_shallow
from pathlib import Path

import numpy as np

from pascalvl.plugins.kernels.build import Target, cached
from pascalvl.plugins.kernels.library import AppendArgs, AppendLayer, AttentionArgs, KernelLibrary, LinearArgs, Rows
from pascalvl.plugins.kv_format import PAGE_SLOTS, RowFormat, pages_of
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
        self.library, self.shape, self.formats, self.rotated = library, shape, formats, rotated
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


class Pool:
    """The layers of a cache in pools of pages, in an order of chance, between pages that are nobody's."""

    def __init__(self, cache: HostRows, spare: int = 3) -> None:
        shape = cache.shape
        self.cache, self.pages = cache, pages_of(shape.capacity)
        self.num_pages = shape.batch * self.pages + spare
        order = np.random.default_rng(shape.capacity).permutation(self.num_pages)[: shape.batch * self.pages]
        self.table = copy(order.astype(np.int32).reshape(shape.batch, self.pages))
        self.arrays = []
        for logical in cache.arrays:
            layers, rest = len(logical), logical.shape[4:]
            pool = aligned((layers, self.num_pages, shape.num_kv_heads, PAGE_SLOTS, *rest), logical.dtype)
            pool.view(np.uint8)[:] = 0x7F
            self.arrays.append(pool)
            for layer, b, page in np.ndindex(layers, shape.batch, self.pages):
                slots = logical[layer, b, :, page * PAGE_SLOTS :][:, :PAGE_SLOTS]
                pool[layer, self.table[b, page], :, : slots.shape[1]] = slots

    def of_sequence(self, number: int) -> Pool:
        """The same with the table of one sequence."""
        one = copy_shallow(self)
        one.table = copy(self.table[number : number + 1])
        return one

    def view(self, layer: int = 0) -> Rows:
        """A layer's as the library takes it."""
        scale = pointer(self.arrays[2][layer]) if self.cache.formats[0].is_quantised else None
        return Rows(key=pointer(self.arrays[0][layer]), value=pointer(self.arrays[1][layer]), scale=scale)

    def places(self, slots: np.ndarray) -> np.ndarray:
        """Where slots ``[batch, n]`` are; those that the cache has not are nowhere."""
        inside = (slots >= 0) & (slots < self.cache.shape.capacity)
        held = np.where(inside, slots, 0)
        place = np.take_along_axis(self.table, held // PAGE_SLOTS, 1) * PAGE_SLOTS + held % PAGE_SLOTS
        return np.where(inside, place, np.where(slots < 0, -1, self.num_pages * PAGE_SLOTS)).astype(np.int32)

    def read_back(self) -> None:
        """Put what is in the pages into the cache."""
        for logical, pool in zip(self.cache.arrays, self.arrays, strict=True):
            for layer, b, page in np.ndindex(len(logical), *self.table.shape):
                slots = logical[layer, b, :, page * PAGE_SLOTS :][:, :PAGE_SLOTS]
                slots[...] = pool[layer, self.table[b, page], :, : slots.shape[1]]


def tokens_of(new: HostRows, batch: int) -> HostRows:
    """Rows ``[layers, 1, num_kv_heads, batch * seq]`` as those of sequences, ``[layers, batch, num_kv_heads, seq]``."""
    shape = dataclasses.replace(new.shape, batch=batch, capacity=new.shape.capacity // batch)
    split = HostRows(new.library, shape, new.formats, new.rotated, len(new.words))
    for to, array in zip(split.arrays, new.arrays, strict=True):
        lead = len(array), shape.num_kv_heads, batch, shape.capacity
        to[...] = array.reshape(*lead, *array.shape[4:]).swapaxes(1, 2)
    return split


def packed_rows(new: HostRows) -> HostRows:
    """The opposite of `tokens_of`."""
    shape = dataclasses.replace(new.shape, batch=1, capacity=new.shape.batch * new.shape.capacity)
    joined = HostRows(new.library, shape, new.formats, new.rotated, len(new.words))
    for to, array in zip(joined.arrays, new.arrays, strict=True):
        to[...] = array.swapaxes(1, 2).reshape(to.shape)
    return joined


def append(library: KernelLibrary, cache: HostRows, new: HostRows, slots: np.ndarray) -> None:
    """kv_append of new rows to slots ``[batch, seq]``, in all layers."""
    pool, rows = Pool(cache), packed_rows(new)
    places = copy(pool.places(slots).reshape(-1))
    layers = [
        AppendLayer(
            new_rows=rows.view(layer),
            pool=pool.view(layer),
            key_row=cache.rows[0].shape[-1],
            value_row=cache.rows[1].shape[-1],
        )
        for layer in range(len(cache.rows[0]))
    ]
    sizes = {"num_kv_heads": cache.shape.num_kv_heads, "tokens": len(places), "num_pages": pool.num_pages}
    library.kv_append(AppendArgs.of(layers, slots=pointer(places), **sizes))
    memory.wait()
    pool.read_back()


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
    """``[heads, tokens, dim]`` each as the projection gives them, ``[tokens, width]``."""
    return copy(np.concatenate([x.swapaxes(0, 1).reshape(x.shape[1], -1) for x in (q, k, v)], -1))


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
    batch, num_heads, seq, _ = q.shape
    q, k, v = (x.swapaxes(0, 1).reshape(x.shape[1], batch * seq, -1) for x in (q, k, v))
    cu_seqlens = np.arange(batch + 1) * seq
    out, new = attend(library, cache, (q, k, v), cu_seqlens, past_length, softmax_scale, visible, prologue)
    return out.reshape(batch, seq, num_heads, -1), tokens_of(new, batch)


def attend(
    library: KernelLibrary,
    cache: HostRows,
    qkv: tuple[np.ndarray, np.ndarray, np.ndarray],
    cu_seqlens: np.ndarray,
    past_length: np.ndarray | None,
    softmax_scale: float,
    visible: np.ndarray | None = None,
    prologue: Prologue | None = None,
    pool: Pool | None = None,
) -> tuple[np.ndarray, HostRows]:
    """The library's attention of new tokens [heads, tokens, dim] of several sequences over a cache, and their rows.

    ``pool`` None: a new one of the cache. Returns [tokens, heads, value_dim], and rows of one sequence of them all.
    """
    pool = pool or Pool(cache)
    num_heads, tokens, head_dim = qkv[0].shape
    if visible is not None:
        beyond = pool.pages * PAGE_SLOTS - visible.shape[1]
        visible = copy(np.pad(visible, ((0, 0), (0, beyond)), constant_values=-1))
    arrays = {"cu_seqlens": cu_seqlens.astype(np.int32), "past_length": past_length, "page_table": pool.table}
    if prologue:
        arrays |= {name: getattr(prologue, name) for name in ("q_norm", "k_norm", "rope_cos", "rope_sin")}
    arrays = {name: copy(array) for name, array in arrays.items()}
    projected, out = packed(*qkv), aligned((tokens, num_heads, qkv[2].shape[-1]))
    out[:] = np.nan
    new = HostRows(library, dataclasses.replace(cache.shape, batch=1, capacity=tokens), cache.formats, cache.rotated)
    args = AttentionArgs(
        **{name: pointer(array) for name, array in arrays.items()},
        qkv=pointer(projected),
        out=pointer(out),
        new_rows=new.view(),
        pool=pool.view(),
        past_visible=pointer(visible),
        tokens=tokens,
        batch=len(cu_seqlens) - 1,
        num_heads=num_heads,
        num_kv_heads=len(qkv[1]),
        head_dim=head_dim,
        value_dim=qkv[2].shape[-1],
        key_format=cache.formats[0],
        value_format=cache.formats[1],
        num_pages=pool.num_pages,
        sequence_pages=pool.pages,
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
    qkv, out, cu_seqlens = packed(q, k, v), aligned((tokens, heads, dim)), copy(cu_seqlens)
    out[:] = np.nan
    tables = {name: copy(getattr(prologue, name)) for name in ("rope_cos", "rope_sin")} if prologue else {}
    args = AttentionArgs(
        **{name: pointer(table) for name, table in tables.items()},
        qkv=pointer(qkv),
        out=pointer(out),
        cu_seqlens=pointer(cu_seqlens),
        batch=len(cu_seqlens) - 1,
        num_heads=heads,
        num_kv_heads=heads,
        tokens=tokens,
        head_dim=dim,
        value_dim=dim,
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
    """The same as `causal_attention` in float64, over the very codes of the cache and of the new rows."""
    parts = zip(q, new.contents(0), new.contents(1), strict=True)
    return np.stack(
        [
            of_sequence(cache, b, *part, past, softmax_scale, None if visible is None else visible[b])
            for b, (part, past) in enumerate(zip(parts, past_length, strict=True))
        ]
    )


def expected_packed(
    cache: HostRows, new: HostRows, q: np.ndarray, cu_seqlens, past_length, softmax_scale: float, visible=None
) -> np.ndarray:
    """The same as `attend` in float64; padding becomes zeros."""
    out = np.zeros((q.shape[1], len(q), cache.dims[1]))
    for b, (begin, end) in enumerate(itertools.pairwise(cu_seqlens)):
        own = (x[:, begin:end] for x in (q, new.contents(0)[0], new.contents(1)[0]))
        of_slots = None if visible is None else visible[b]
        if end > begin:
            out[begin:end] = of_sequence(cache, b, *own, past_length[b], softmax_scale, of_slots)
    return out


def of_sequence(cache: HostRows, b: int, q, keys, values, past: int, softmax_scale: float, visible) -> np.ndarray:
    """Float64 attention of a sequence's queries and rows [heads, seq, dim]."""
    number = np.arange(q.shape[1])[:, None]
    of_past = np.ones((q.shape[1], past), bool) if visible is None else number < visible[:past]
    sees = np.concatenate([of_past, number >= number.T], 1)
    met = quantised_queries(q, cache.rotated) if cache.formats[0].is_quantised else q
    rows = (np.concatenate([cache.contents(i)[b][:, :past], own], 1) for i, own in enumerate((keys, values)))
    return attention(met, *rows, sees, softmax_scale)


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

"""Torch tensors through the kernels' library: those of CUDA, or of the emulator for tensors on the CPU."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
from collections.abc import Collection, Iterator, Sequence

import torch

from pascalvl.plugins.kernels.build import Target, cached
from pascalvl.plugins.kernels.library import (
    CHOICE,
    AppendArgs,
    AppendLayer,
    AttentionArgs,
    KernelLibrary,
    LinearArgs,
    Rows,
)
from pascalvl.plugins.kv_format import PAGE_SLOTS, LayerLayout
from pascalvl.plugins.ops.flash_attention.op import AttentionOptions
from pascalvl.plugins.ops.quant_linear.op import Activation, Norm
from pascalvl.plugins.weight_format import WeightFormat

_TARGETS = {"cuda": Target.CUDA, "cpu": Target.EMULATOR}
_emulated = contextvars.ContextVar("emulated", default=False)


@contextlib.contextmanager
def emulated() -> Iterator[None]:
    """Inside, the ops send tensors on the CPU to the emulator's kernels."""
    token = _emulated.set(True)
    try:
        yield
    finally:
        _emulated.reset(token)


def serves(device: torch.device) -> bool:
    """Whether the ops send a device's tensors to the kernels."""
    return device.type == "cuda" or (device.type == "cpu" and _emulated.get())


def library(device: torch.device) -> KernelLibrary:
    """The kernels for a device, compiled when first asked for (`pascalvl.plugins.kernels.build.cached`).

    Before a CUDA graph is captured, call `KernelLibrary.load` or launch once: loading cannot be captured.
    """
    if device.type not in _TARGETS:
        raise ValueError(f"the kernels run on {' and '.join(_TARGETS)} tensors; found {device.type}")
    return _library(_TARGETS[device.type])


@functools.cache
def _library(target: Target) -> KernelLibrary:
    return KernelLibrary(cached(target))


@dataclasses.dataclass(frozen=True)
class Past:
    """One layer's pool of pages, and what of it is seen.

    Args:
        key, value: ``[pages, num_kv_heads, PAGE_SLOTS, row]`` in the cache's format.
        scale: int32 ``[pages, num_kv_heads, PAGE_SLOTS]``; where quantised.
        page_table: int32 ``[batch, sequence_pages]``: the pages of each sequence.
        length: int32 ``[batch]``: slots that are filled, each at most those of the pages.
        visible: int32 ``[batch, sequence_pages * PAGE_SLOTS]``: how many new tokens see a slot; None or ``[batch, 1]``:
            all do.
    """

    key: torch.Tensor
    value: torch.Tensor
    scale: torch.Tensor | None
    page_table: torch.Tensor
    length: torch.Tensor
    visible: torch.Tensor | None = None


def attention(
    kernels: KernelLibrary,
    options: AttentionOptions,
    qkv: torch.Tensor,
    cu_seqlens: torch.Tensor,
    q_norm: torch.Tensor | None = None,
    k_norm: torch.Tensor | None = None,
    rope_cos: torch.Tensor | None = None,
    rope_sin: torch.Tensor | None = None,
    past: Past | None = None,
) -> list[torch.Tensor]:
    """Launch attention on torch's current stream: `pascalvl.plugins.ops.flash_attention.op` tells inputs and outputs.

    Args:
        kernels: of the tensors' device, see `library`.
        options: the op's attributes.
        qkv: float32; norms None: queries and keys are not normed; cos and sin None: they are not rotated.
        cu_seqlens: int32 ``[batch + 1]``.
        past: where causal; None: there is none.

    Raises:
        ValueError: a tensor's type, shape or device is not as there.
        UserError: the kernels do not support the arguments, for example the head size; or CUDA fails.
    """
    device, floats, layout = qkv.device, [torch.float32], options.layout
    tokens, batch = len(qkv), len(cu_seqlens) - 1
    tensors = {
        "qkv": _checked("qkv", qkv, floats, (tokens, sum(options.widths)), device),
        "out": torch.empty(tokens, options.num_heads * options.value_dim, device=device),
        "cu_seqlens": _checked("cu_seqlens", cu_seqlens, [torch.int32], (None,), device),
    }
    for name, norm in (("q_norm", q_norm), ("k_norm", k_norm)):
        if norm is not None:
            tensors[name] = _checked(name, norm, floats, (options.head_dim,), device)
    for name, table in (("rope_cos", rope_cos), ("rope_sin", rope_sin)):
        if table is not None:
            tensors[name] = _checked(name, table, floats, (tokens, options.head_dim), device)
    outputs, more = [tensors["out"]], {}
    if options.causal:
        new = new_rows(layout, tokens, device)
        outputs += [rows for rows in new if rows is not None]
        more = {"new_rows": rows_view(*new), "rotated": layout.is_rotated}
        more["key_format"], more["value_format"] = layout.kv_format.rows
        if past is not None:
            tensors |= _past_tensors(past, batch, device)
            more |= {"pool": pool_view(layout, past.key, past.value, past.scale), "num_pages": len(past.key)}
            more["sequence_pages"] = past.page_table.shape[1]
    if not qkv.numel():
        return outputs
    args = AttentionArgs(
        **{name: tensor.data_ptr() for name, tensor in tensors.items()},
        **more,
        tokens=tokens,
        batch=batch,
        num_heads=options.num_heads,
        num_kv_heads=options.num_kv_heads,
        head_dim=options.head_dim,
        value_dim=options.value_dim,
        softmax_scale=options.softmax_scale,
        epsilon=options.epsilon,
        causal=options.causal,
    )
    with _current(device) as stream:
        workspace = torch.empty(kernels.attention_workspace(args), dtype=torch.uint8, device=device)
        kernels.attention(args, workspace.data_ptr(), workspace.numel(), stream)
    return outputs


def _past_tensors(past: Past, batch: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Integers that tell of the past, by the names of `AttentionArgs`."""
    integers = [torch.int32]
    pages = past.page_table.shape[1]
    tensors = {
        "past_length": _checked("past_length", past.length, integers, (batch,), device),
        "page_table": _checked("page_table", past.page_table, integers, (batch, pages), device),
    }
    if past.visible is not None and past.visible.shape[1] != 1:
        shape = batch, pages * PAGE_SLOTS
        tensors["past_visible"] = _checked("past_visible", past.visible, integers, shape, device)
    return tensors


def new_rows(
    layout: LayerLayout, tokens: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Room for the keys, values and scales of new tokens, in the cache's format, ``[num_kv_heads, tokens, row]``."""
    lead = layout.num_kv_heads, tokens
    key, value = (
        torch.empty(*lead, elements, dtype=getattr(torch, row.dtype.name), device=device)
        for row, elements in zip(layout.kv_format.rows, layout.row_elements, strict=True)
    )
    return key, value, torch.empty(lead, dtype=torch.int32, device=device) if layout.kv_format.is_quantised else None


def linear(
    kernels: KernelLibrary,
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    zero: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    bits: int,
    group: int,
    activation: int,
    norm: int,
    epsilon: float,
) -> torch.Tensor:
    """Launch a linear layer on torch's current stream; arguments as the op's torch face has them.

    Raises:
        ValueError: a tensor's type, shape or device is not as there.
        UserError: the kernels do not support the arguments; or CUDA fails.
    """
    form, device = WeightFormat(bits, group), x.device
    dtype = getattr(torch, form.dtype.name)
    in_features, outputs = x.shape[-1], weight.shape[0]
    is_gated = activation == Activation.SILU_GATED
    out = torch.empty(*x.shape[:-1], outputs // (1 + is_gated), device=device)
    if not out.numel():
        return out
    tensors = {
        "x": _checked("x", x, [torch.float32], x.shape, device),
        "weight": _checked("the weight", weight, [dtype], form.weight_shape(outputs, in_features), device),
        "out": out,
    }
    if form.is_quantised:
        shape = form.scale_shape(outputs, in_features)
        tensors["scale"] = _checked("scales", scale, [torch.int32], shape, device)
        if zero is not None:
            tensors["zero"] = _checked("zeros", zero, [torch.int32], shape, device)
    if bias is not None:
        tensors["bias"] = _checked("the bias", bias, [torch.float32], (outputs,), device)
    if residual is not None:
        tensors["residual"] = _checked("the residual", residual, [torch.float32], out.shape, device)
    norm_size = 0
    if norm != Norm.NONE:
        tensors["norm_weight"] = _checked("the norm's weight", norm_weight, [torch.float32], (None,), device)
        norm_size = len(tensors["norm_weight"])
    if norm == Norm.LAYER:
        tensors["norm_bias"] = _checked("the norm's bias", norm_bias, [torch.float32], (norm_size,), device)
    args = LinearArgs(
        **{name: tensor.data_ptr() for name, tensor in tensors.items()},
        rows=x.numel() // in_features,
        in_features=in_features,
        out_features=outputs,
        bits=bits,
        group=group,
        activation=activation,
        norm=norm,
        norm_size=norm_size,
        epsilon=epsilon,
    )
    with _current(device) as stream:
        workspace = torch.empty(kernels.linear_workspace(args), dtype=torch.uint8, device=device)
        kernels.linear(args, workspace.data_ptr(), workspace.numel(), stream)
    return out


Cached = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]
"""Keys, values and scales of a layer, as `Past` has them."""


def kv_append(
    kernels: KernelLibrary,
    layouts: Sequence[LayerLayout],
    new: Sequence[Cached],
    pools: Sequence[Cached],
    slots: torch.Tensor,
) -> None:
    """Copy new keys and values of all layers into their pools, on torch's current stream.

    Args:
        kernels: of the tensors' device, see `library`.
        layouts: of each layer.
        new: of each layer what `attention` gave, ``[num_kv_heads, tokens, row]``.
        pools: of each layer.
        slots: int32 ``[tokens]``, where each goes, page * `PAGE_SLOTS` + slot; negative, or beyond the pool: nowhere.

    Raises:
        ValueError: a tensor's type, shape or device is not as above.
        UserError: CUDA fails.
    """
    tokens, num_pages = len(slots), len(pools[0][0])
    slots = _checked("slots", slots, [torch.int32], (tokens,), new[0][0].device)
    layers = []
    for layout, rows, pool in zip(layouts, new, pools, strict=True):
        if len(pool[0]) != num_pages:
            raise ValueError(f"expected {num_pages} pages in each layer's pool; found {len(pool[0])}")
        key_row, value_row = layout.row_bytes
        _check_rows("new", layout, (layout.num_kv_heads, tokens), *rows)
        views = rows_view(*rows), pool_view(layout, *pool)
        layers.append(AppendLayer(new_rows=views[0], pool=views[1], key_row=key_row, value_row=value_row))
    args = AppendArgs.of(
        layers, slots=slots.data_ptr(), num_kv_heads=layouts[0].num_kv_heads, tokens=tokens, num_pages=num_pages
    )
    with _current(slots.device) as stream:
        kernels.kv_append(args, stream)


def pool_view(layout: LayerLayout, key: torch.Tensor, value: torch.Tensor, scale: torch.Tensor | None = None) -> Rows:
    """One layer's pool as the kernels take it; raises `ValueError` for tensors of another layout."""
    _check_rows("the pool's", layout, (len(key), layout.num_kv_heads, PAGE_SLOTS), key, value, scale)
    return rows_view(key, value, scale)


def _check_rows(
    whose: str,
    layout: LayerLayout,
    lead: tuple[int, ...],
    key: torch.Tensor,
    value: torch.Tensor,
    scale: torch.Tensor | None,
) -> None:
    rows = zip(("keys", "values"), (key, value), layout.kv_format.rows, layout.row_elements, strict=True)
    for name, tensor, row, elements in rows:
        _check(f"{whose} {name}", tensor, [getattr(torch, row.dtype.name)], (*lead, elements), key.device)
    if layout.kv_format.is_quantised:
        _check(f"{whose} scales", scale, [torch.int32], lead, key.device)
    for part in (key, value, scale):
        if part is not None and not part.is_contiguous():
            raise ValueError(f"{whose} rows must be contiguous; found strides {part.stride()}")


def rows_view(key: torch.Tensor, value: torch.Tensor, scale: torch.Tensor | None) -> Rows:
    """Keys and values as the kernels take them."""
    return Rows(key=key.data_ptr(), value=value.data_ptr(), scale=None if scale is None else scale.data_ptr())


def choose(
    kernels: KernelLibrary, logits: torch.Tensor, choices: torch.Tensor, token: torch.Tensor, logit: torch.Tensor
) -> None:
    """Launch the choice of each row's token on torch's current stream.

    Args:
        kernels: of the tensors' device, see `library`.
        logits: float32 ``[rows, vocab_size]``.
        choices: int32 ``[rows, 16]``: records of `pascalvl.plugins.kernels.library.CHOICE`.
        token: int32 ``[rows]``: filled with the tokens.
        logit: float32 ``[rows]``: filled with the highest logits.

    Raises:
        ValueError: a tensor's type, shape or device is not as there.
    """
    rows, device = len(logits), logits.device
    logits = _checked("logits", logits, [torch.float32], (rows, None), device)
    _check("choices", choices, [torch.int32], (rows, CHOICE.itemsize // 4), device)
    _check("tokens", token, [torch.int32], (rows,), device)
    _check("highest logits", logit, [torch.float32], (rows,), device)
    with _current(device) as stream:
        results = choices.data_ptr(), token.data_ptr(), logit.data_ptr()
        kernels.choose(logits.data_ptr(), rows, logits.shape[1], *results, stream)


@contextlib.contextmanager
def _current(device: torch.device) -> Iterator[int]:
    """Make a device the current one; gives its current stream."""
    if device.type == "cpu":
        yield 0
        return
    with torch.cuda.device(device):
        yield torch.cuda.current_stream().cuda_stream


def _checked(
    name: str,
    tensor: torch.Tensor | None,
    dtypes: Collection[torch.dtype],
    shape: Sequence[int | None],
    device: torch.device,
) -> torch.Tensor:
    """The tensor, contiguous."""
    return _check(name, tensor, dtypes, shape, device).contiguous()


def _check(
    name: str,
    tensor: torch.Tensor | None,
    dtypes: Collection[torch.dtype],
    shape: Sequence[int | None],
    device: torch.device,
) -> torch.Tensor:
    """The tensor; a ValueError where it is not of one of the types, of the shape (None: any size) and on the device."""
    dims = f"[{', '.join('any' if size is None else str(size) for size in shape)}]"
    expected = f"the kernels take {name} as {' or '.join(map(str, dtypes))} {dims} on {device}"
    if tensor is None:
        raise ValueError(f"{expected}; found none")
    fits = len(tensor.shape) == len(shape) and all(
        size is None or size == found for size, found in zip(shape, tensor.shape, strict=True)
    )
    if not fits or tensor.dtype not in dtypes or tensor.device != device:
        raise ValueError(f"{expected}; found {tensor.dtype} {list(tensor.shape)} on {tensor.device}")
    return tensor

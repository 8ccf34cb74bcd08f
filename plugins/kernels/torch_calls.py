"""Torch tensors through the kernels' library: those of CUDA, or of the emulator for tensors on the CPU."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import itertools
from collections.abc import Collection, Iterator, Sequence

import torch

from pascalvl.plugins.kernels.build import Target, cached
from pascalvl.plugins.kernels.library import AppendArgs, AttentionArgs, Cache, KernelLibrary, LinearArgs
from pascalvl.plugins.kv_format import HALVES_PER_WORD, KVFormat, LayerLayout
from pascalvl.plugins.ops.quant_linear.op import Activation
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


def attention(
    kernels: KernelLibrary,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool,
    softmax_scale: float,
    cu_seqlens: torch.Tensor | None = None,
    past_key: torch.Tensor | None = None,
    past_value: torch.Tensor | None = None,
    past_length: torch.Tensor | None = None,
    past_visible: torch.Tensor | None = None,
    past_scale: torch.Tensor | None = None,
    recent_key: torch.Tensor | None = None,
    recent_value: torch.Tensor | None = None,
    recent_length: torch.Tensor | None = None,
    kv_format: KVFormat = KVFormat.F32,
) -> torch.Tensor:
    """Launch attention on torch's current stream, see `pascalvl_attention` in ``pascalvl.h``.

    Args:
        kernels: of the tensors' device, see `library`.
        q: float32 ``[batch, num_heads, seq, key_dim]``.
        k: float32 ``[batch, num_kv_heads, seq, key_dim]``.
        v: float32 ``[batch, num_kv_heads, seq, value_dim]``.
        causal: which of the two modes.
        softmax_scale: factor on q k^T.
        cu_seqlens: int32 ``[segments + 1]``; where not causal.
        past_key, past_value: ``[batch, num_kv_heads, capacity, row]`` in ``kv_format``, float16 also in tensors of that
            type; None or capacity 0: no past.
        past_length: int32 ``[batch]``, each at most the capacity; where there is a past.
        past_visible: int32 ``[batch, capacity]``: how many new tokens see a slot; None or ``[batch, 1]``: all do.
        past_scale: int32 ``[2, batch, num_kv_heads, capacity / 2]``, words of halves; of a quantised past.
        recent_key, recent_value: int32 ``[batch, num_kv_heads, recent, dim / 2]``, likewise; None: none are kept.
        recent_length: int32 ``[batch]``; with them.
        kv_format: of the past.

    Returns:
        float32 ``[batch, seq, num_heads, value_dim]``.

    Raises:
        ValueError: a tensor's type, shape or device is not as above.
        UserError: the kernels do not support the arguments, for example the head size; or CUDA fails.
    """
    batch, num_heads, seq, key_dim = q.shape
    num_kv_heads, value_dim = v.shape[1], v.shape[3]
    floats = [torch.float32]
    tensors = {
        "q": _checked("q", q, floats, q.shape, q.device),
        "k": _checked("k", k, floats, (batch, num_kv_heads, seq, key_dim), q.device),
        "v": _checked("v", v, floats, (batch, num_kv_heads, seq, value_dim), q.device),
        "out": torch.empty(batch, seq, num_heads, value_dim, device=q.device),
    }
    options = {}
    if not causal:
        tensors["cu_seqlens"] = _checked("cu_seqlens", cu_seqlens, [torch.int32], (None,), q.device)
        options["num_sequences"] = len(cu_seqlens) - 1
    elif past_key is not None and past_key.shape[2]:
        layout = LayerLayout(kv_format, num_kv_heads, key_dim, value_dim)
        tensors["past_length"] = _checked("past_length", past_length, [torch.int32], (batch,), q.device)
        if past_visible is not None and past_visible.shape[1] == past_key.shape[2]:
            shape = batch, past_key.shape[2]
            tensors["past_visible"] = _checked("past_visible", past_visible, [torch.int32], shape, q.device)
        tensors_of_past = past_key.contiguous(), past_value.contiguous(), past_scale
        options["cache"] = cache_view(layout, batch, *tensors_of_past)
        if recent_key is not None:
            tensors["recent_length"] = _checked("recent_length", recent_length, [torch.int32], (batch,), q.device)
            options["recent"] = cache_view(
                dataclasses.replace(layout, kv_format=KVFormat.F16), batch, recent_key, recent_value
            )
    args = AttentionArgs(
        **{name: tensor.data_ptr() for name, tensor in tensors.items()},
        batch=batch,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        seq=seq,
        key_dim=key_dim,
        value_dim=value_dim,
        softmax_scale=softmax_scale,
        causal=causal,
        **options,
    )
    with _current(q.device) as stream:
        workspace = torch.empty(kernels.attention_workspace(args), dtype=torch.uint8, device=q.device)
        kernels.attention(args, workspace.data_ptr(), workspace.numel(), stream)
    return tensors["out"]


def linear(
    kernels: KernelLibrary,
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
    """Launch a linear layer on torch's current stream; arguments as the op's torch face has them.

    Raises:
        ValueError: a tensor's type, shape or device is not as there.
        UserError: the kernels do not support the arguments; or CUDA fails.
    """
    form, device = WeightFormat(bits, group), x.device
    in_features, outputs = x.shape[-1], weight.shape[0]
    is_gated = activation == Activation.SILU_GATED
    out = torch.empty(*x.shape[:-1], outputs // (1 + is_gated), device=device)
    if not out.numel():
        return out
    tensors = {
        "x": _checked("x", x, [torch.float32], x.shape, device),
        "weight": _checked("the weight", weight, [torch.int32], form.weight_shape(outputs, in_features), device),
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
    args = LinearArgs(
        **{name: tensor.data_ptr() for name, tensor in tensors.items()},
        rows=x.numel() // in_features,
        in_features=in_features,
        out_features=outputs,
        bits=bits,
        group=group,
        activation=activation,
    )
    with _current(device) as stream:
        workspace = torch.empty(kernels.linear_workspace(args), dtype=torch.uint8, device=device)
        kernels.linear(args, workspace.data_ptr(), workspace.numel(), stream)
    return out


def kv_append(
    kernels: KernelLibrary,
    layouts: Sequence[LayerLayout],
    new: Sequence[tuple[torch.Tensor, torch.Tensor]],
    caches: Sequence[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]],
    slots: torch.Tensor,
) -> None:
    """Write new keys and values of all layers into their caches, on torch's current stream, a launch for each run of
    layers that have the same layout.

    Args:
        kernels: of the tensors' device, see `library`.
        layouts: of each layer.
        new: of each layer keys and values, float32 ``[batch, num_kv_heads, seq, dim]``.
        caches: of each layer keys, values and scales, as `cache_view` takes them; the tensors of layers with the same
            layout lie at equal distances.
        slots: int32 ``[batch, seq]``, where each token goes; negative, or beyond the capacity: nowhere.

    Raises:
        ValueError: a tensor's type, shape or device is not as above.
        UserError: the kernels do not support the arguments, for example the head size; or CUDA fails.
    """
    for layout, run in itertools.groupby(range(len(layouts)), lambda layer: layouts[layer]):
        layers = list(run)
        key, value = (torch.stack([new[layer][which] for layer in layers]) for which in range(2))
        append_run(kernels, layout, key, value, [caches[layer] for layer in layers[:2]], slots)


def append_run(
    kernels: KernelLibrary,
    layout: LayerLayout,
    key: torch.Tensor,
    value: torch.Tensor,
    caches: Sequence[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]],
    slots: torch.Tensor,
) -> None:
    """`kv_append` of layers with the same layout: keys and values of all, ``[layers, batch, num_kv_heads, seq, dim]``,
    and the caches of at least the first two."""
    count, batch, _, seq, _ = key.shape
    lead = count, batch, layout.num_kv_heads, seq
    key = _checked("new keys", key, [torch.float32], (*lead, layout.key_dim), key.device)
    value = _checked("new values", value, [torch.float32], (*lead, layout.value_dim), key.device)
    slots = _checked("slots", slots, [torch.int32], (batch, seq), key.device)
    first, second = caches[0], caches[min(1, count - 1)]
    strides = [0 if a is None else b.data_ptr() - a.data_ptr() for a, b in zip(first, second, strict=True)]
    args = AppendArgs(
        key=key.data_ptr(),
        value=value.data_ptr(),
        layers=count,
        batch=batch,
        num_kv_heads=layout.num_kv_heads,
        seq=seq,
        key_dim=layout.key_dim,
        value_dim=layout.value_dim,
        slots=slots.data_ptr(),
        cache=cache_view(layout, batch, *first),
        key_stride=strides[0],
        value_stride=strides[1],
        key_scale_stride=strides[2],
        value_scale_stride=strides[2],
    )
    with _current(key.device) as stream:
        kernels.kv_append(args, stream)


def cache_view(
    layout: LayerLayout, batch: int, key: torch.Tensor, value: torch.Tensor, scale: torch.Tensor | None = None
) -> Cache:
    """One layer's cache of ``batch`` sequences as the kernels take it, halves in words or as they are; raises
    `ValueError` for tensors of another layout."""
    key, value = _words(key), _words(value)
    capacity = key.shape[2]
    shape = batch, layout.num_kv_heads, capacity
    rows = zip(("keys", "values"), (key, value), layout.kv_format.rows, layout.row_elements, strict=True)
    for name, tensor, row, elements in rows:
        dtype = getattr(torch, row.dtype.name)
        _check(f"the cache of {name}", tensor, [dtype], (*shape, elements), key.device)
    if layout.kv_format.is_quantised:
        if capacity % HALVES_PER_WORD:
            raise ValueError(f"a quantised cache has an even capacity; found {capacity}")
        of_scales = 2, *shape[:2], capacity // HALVES_PER_WORD
        _check("the cache's scales", scale, [torch.int32], of_scales, key.device)
    for tensor in (key, value, scale):
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError(f"the cache must be contiguous; found strides {tensor.stride()}")
    scales = (None, None) if scale is None else (scale[0].data_ptr(), scale[1].data_ptr())
    return Cache(
        key=key.data_ptr(),
        value=value.data_ptr(),
        key_scale=scales[0],
        value_scale=scales[1],
        key_format=layout.kv_format.rows[0],
        value_format=layout.kv_format.rows[1],
        capacity=capacity,
        rotated=layout.is_rotated,
    )


def _words(tensor: torch.Tensor) -> torch.Tensor:
    """Halves as words, and other tensors as they are."""
    return tensor.view(torch.int32) if tensor.dtype == torch.float16 else tensor


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
    _check(name, tensor, dtypes, shape, device)
    return tensor.contiguous()


def _check(
    name: str,
    tensor: torch.Tensor | None,
    dtypes: Collection[torch.dtype],
    shape: Sequence[int | None],
    device: torch.device,
) -> None:
    """Raise a ValueError where a tensor is not of one of the types, of the shape (None: any size) and on the device."""
    dims = f"[{', '.join('any' if size is None else str(size) for size in shape)}]"
    expected = f"the kernels take {name} as {' or '.join(map(str, dtypes))} {dims} on {device}"
    if tensor is None:
        raise ValueError(f"{expected}; found none")
    fits = len(tensor.shape) == len(shape) and all(
        size is None or size == found for size, found in zip(shape, tensor.shape, strict=True)
    )
    if not fits or tensor.dtype not in dtypes or tensor.device != device:
        raise ValueError(f"{expected}; found {tensor.dtype} {list(tensor.shape)} on {tensor.device}")

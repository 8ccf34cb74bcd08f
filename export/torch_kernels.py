"""Torch tensors through the kernels' library: those of CUDA, or of the emulator for tensors on the CPU."""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Collection, Iterator, Sequence

import torch

from pascalvl.plugins.kernels.build import Target, cached
from pascalvl.plugins.kernels.library import AppendArgs, AttentionArgs, Cache, KernelLibrary
from pascalvl.plugins.kv_format import RowFormat

_FORMATS = {torch.float32: RowFormat.FLOAT32, torch.float16: RowFormat.FLOAT16}
_TARGETS = {"cuda": Target.CUDA, "cpu": Target.EMULATOR}
_emulated = contextvars.ContextVar("emulated", default=False)


@contextlib.contextmanager
def emulated() -> Iterator[None]:
    """Inside, `pascalvl::flash_attention_2` sends tensors on the CPU to the emulator's kernels."""
    token = _emulated.set(True)
    try:
        yield
    finally:
        _emulated.reset(token)


def serves(device: torch.device) -> bool:
    """Whether `pascalvl::flash_attention_2` sends a device's tensors to the kernels."""
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
    window: int = 0,
    sinks: int = 0,
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
        past_key: ``[batch, num_kv_heads, capacity, key_dim]``, float32 or float16; None or capacity 0: no past.
        past_value: ``[batch, num_kv_heads, capacity, value_dim]``, of the same type.
        past_length: int32 ``[batch]``, each at most the capacity; where there is a past.
        window: positions that a token sees, its own included; 0: all.
        sinks: first positions that it sees besides.

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
        capacity = past_key.shape[2]
        shape = batch, num_kv_heads, capacity
        past_key = _checked("past_key", past_key, _FORMATS, (*shape, key_dim), q.device)
        past_value = _checked("past_value", past_value, [past_key.dtype], (*shape, value_dim), q.device)
        tensors["past_length"] = _checked("past_length", past_length, [torch.int32], (batch,), q.device)
        options["cache"] = _cache(past_key, past_value)
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
        window=window,
        sinks=sinks,
        **options,
    )
    with _current(q.device) as stream:
        workspace = torch.empty(kernels.attention_workspace(args), dtype=torch.uint8, device=q.device)
        kernels.attention(args, workspace.data_ptr(), workspace.numel(), stream)
    return tensors["out"]


def kv_append(
    kernels: KernelLibrary,
    new_key: torch.Tensor,
    new_value: torch.Tensor,
    cache_key: torch.Tensor,
    cache_value: torch.Tensor,
    past_length: torch.Tensor,
) -> None:
    """Launch the writing of new keys and values into the caches of all layers, on torch's current stream.

    Args:
        kernels: of the tensors' device, see `library`.
        new_key: float32 ``[layers, batch, num_kv_heads, seq, key_dim]``.
        new_value: float32 ``[layers, batch, num_kv_heads, seq, value_dim]``.
        cache_key: ``[layers, batch, num_kv_heads, capacity, key_dim]``, float32 or float16, each layer contiguous.
        cache_value: ``[layers, batch, num_kv_heads, capacity, value_dim]``, as `cache_key`.
        past_length: int32 ``[batch]``; token ``i`` goes to slot ``past_length + i``, beyond the capacity nowhere.

    Raises:
        ValueError: a tensor's type, shape or device is not as above.
        UserError: the kernels do not support the arguments, for example the head size; or CUDA fails.
    """
    layers, batch, num_kv_heads, seq, key_dim = new_key.shape
    value_dim, device = new_value.shape[4], new_key.device
    shape = layers, batch, num_kv_heads
    new_key = _checked("new_key", new_key, [torch.float32], new_key.shape, device)
    new_value = _checked("new_value", new_value, [torch.float32], (*shape, seq, value_dim), device)
    past_length = _checked("past_length", past_length, [torch.int32], (batch,), device)
    capacity = cache_key.shape[3]
    _check("cache_key", cache_key, _FORMATS, (*shape, capacity, key_dim), device)
    _check("cache_value", cache_value, [cache_key.dtype], (*shape, capacity, value_dim), device)
    for name, cache in (("cache_key", cache_key), ("cache_value", cache_value)):
        if not cache[0].is_contiguous():
            raise ValueError(f"each layer of {name} must be contiguous; found strides {cache.stride()}")
    args = AppendArgs(
        key=new_key.data_ptr(),
        value=new_value.data_ptr(),
        layers=layers,
        batch=batch,
        num_kv_heads=num_kv_heads,
        seq=seq,
        key_dim=key_dim,
        value_dim=value_dim,
        past_length=past_length.data_ptr(),
        cache=_cache(cache_key[0], cache_value[0]),
        key_stride=cache_key.stride(0) * cache_key.element_size(),
        value_stride=cache_value.stride(0) * cache_value.element_size(),
    )
    with _current(device) as stream:
        kernels.kv_append(args, stream)


def _cache(key: torch.Tensor, value: torch.Tensor) -> Cache:
    """One layer's cache ``[batch, num_kv_heads, capacity, dim]``."""
    return Cache(
        key=key.data_ptr(),
        value=value.data_ptr(),
        key_format=_FORMATS[key.dtype],
        value_format=_FORMATS[value.dtype],
        capacity=key.shape[2],
    )


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

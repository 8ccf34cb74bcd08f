"""Calls the kernels' library: `pascalvl.h` in ctypes. Pointers are integers; `pascalvl.h` tells shapes and meanings."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pascalvl.plugins.errors import UserError
from pascalvl.plugins.kv_format import RowFormat


class _Struct(ctypes.Structure):
    def __init__(self, **fields: Any) -> None:
        kinds = {name: kind for name, kind, *_ in self._fields_}
        unknown = fields.keys() - kinds
        if unknown:
            raise TypeError(f"{type(self).__name__} has no {', '.join(sorted(unknown))}")
        super().__init__(**fields)
        for name, value in fields.items():
            if kinds[name] in (ctypes.c_int32, ctypes.c_int64):
                _check_fits(name, value, kinds[name])


def _check_fits(name: str, value: int, kind: type = ctypes.c_int32) -> None:
    """ctypes drops the bits that a number has too many."""
    if kind(value).value != value:
        raise UserError(f"{name} is {value}: the kernels take numbers of {8 * ctypes.sizeof(kind)} bits.")


def _fields(kind: type, names: str) -> list[tuple[str, type]]:
    return [(name, kind) for name in names.split()]


class Rows(_Struct):
    """``pascalvl_rows``: one layer's keys and values."""

    _fields_ = tuple(_fields(ctypes.c_void_p, "key value scale"))


class AttentionArgs(_Struct):
    """``pascalvl_attention_args``."""

    _fields_ = (
        *_fields(ctypes.c_void_p, "qkv q_norm k_norm rope_cos rope_sin out"),
        ("new_rows", Rows),
        ("pool", Rows),
        *_fields(ctypes.c_void_p, "cu_seqlens past_length page_table past_visible"),
        *_fields(ctypes.c_int32, "tokens batch num_heads num_kv_heads head_dim value_dim"),
        *_fields(ctypes.c_int32, "key_format value_format num_pages sequence_pages rotated causal"),
        *_fields(ctypes.c_float, "softmax_scale epsilon"),
    )


class AppendLayer(_Struct):
    """``pascalvl_append_layer``."""

    _fields_ = (("new_rows", Rows), ("pool", Rows), *_fields(ctypes.c_int32, "key_row value_row"))


class AppendArgs(_Struct):
    """``pascalvl_append_args``; `of` keeps the layers that it points to."""

    _fields_ = (
        *_fields(ctypes.c_void_p, "layers slots"),
        *_fields(ctypes.c_int32, "num_layers num_kv_heads tokens num_pages"),
    )

    @classmethod
    def of(cls, layers: Sequence[AppendLayer], **fields: int) -> AppendArgs:
        array = (AppendLayer * len(layers))(*layers)
        args = cls(layers=ctypes.addressof(array), num_layers=len(layers), **fields)
        args._layers = array
        return args


class LinearArgs(_Struct):
    """``pascalvl_linear_args``."""

    _fields_ = (
        *_fields(ctypes.c_void_p, "x weight scale zero bias residual out norm_weight norm_bias"),
        *_fields(ctypes.c_int32, "rows in_features out_features bits group activation norm norm_size"),
        ("epsilon", ctypes.c_float),
    )


CHOICE = np.dtype(
    [
        *((f"{name}_penalty", np.float32) for name in ("repetition", "presence", "frequency")),
        *((name, np.float32) for name in ("temperature", "top_p", "min_p")),
        ("top_k", np.int32),
        ("unused", np.int32),
        *((name, np.uint64) for name in ("random", "counts", "bias", "mask")),
    ]
)
"""``pascalvl_choice``."""


class KernelLibrary:
    """The library at a path: for CUDA or for the emulator, see `pascalvl.plugins.kernels.build`.

    Every method raises `UserError` with the library's own sentence where arguments are bad or CUDA fails.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._library = ctypes.CDLL(str(path))
        except OSError as error:
            raise UserError(f"the kernels' library {path} cannot be loaded: {error}.") from None
        self._library.pascalvl_last_error.restype = ctypes.c_char_p
        self._library.pascalvl_row_bytes.restype = ctypes.c_size_t

    def _call(self, name: str, *arguments: object) -> None:
        if getattr(self._library, name)(*arguments):
            raise UserError(self._library.pascalvl_last_error().decode())

    def load(self) -> None:
        """Make the kernels ready in the current CUDA context."""
        self._call("pascalvl_load")

    def unload(self) -> None:
        """Take the kernels out of the current CUDA context, before that is destroyed."""
        self._call("pascalvl_unload")

    def row_bytes(self, row_format: RowFormat, dim: int) -> int:
        """Bytes of a cache row of ``dim`` elements."""
        _check_fits("dim", dim)
        return self._library.pascalvl_row_bytes(int(row_format), dim)

    def attention_workspace(self, args: AttentionArgs) -> int:
        """Bytes of workspace that `attention` needs."""
        size = ctypes.c_size_t()
        self._call("pascalvl_attention_workspace", ctypes.byref(args), ctypes.byref(size))
        return size.value

    def attention(self, args: AttentionArgs, workspace: int = 0, workspace_bytes: int = 0, stream: int = 0) -> None:
        """Launch attention on a stream."""
        self._call(
            "pascalvl_attention",
            ctypes.byref(args),
            ctypes.c_void_p(workspace),
            ctypes.c_size_t(workspace_bytes),
            ctypes.c_void_p(stream),
        )

    def linear_workspace(self, args: LinearArgs) -> int:
        """Bytes of workspace that `linear` needs."""
        size = ctypes.c_size_t()
        self._call("pascalvl_linear_workspace", ctypes.byref(args), ctypes.byref(size))
        return size.value

    def linear(self, args: LinearArgs, workspace: int, workspace_bytes: int, stream: int = 0) -> None:
        """Launch a linear layer on a stream."""
        self._call(
            "pascalvl_linear",
            ctypes.byref(args),
            ctypes.c_void_p(workspace),
            ctypes.c_size_t(workspace_bytes),
            ctypes.c_void_p(stream),
        )

    def choose(
        self, logits: int, rows: int, vocab_size: int, choices: int, token: int, logit: int, stream: int = 0
    ) -> None:
        """Launch the choice of each row's token; ``choices``, of `CHOICE`, may be 0: the likeliest."""
        _check_fits("rows", rows)
        _check_fits("vocab_size", vocab_size)
        pointers = [ctypes.c_void_p(pointer) for pointer in (logits, choices, token, logit, stream)]
        self._call("pascalvl_choose", pointers[0], rows, vocab_size, *pointers[1:])

    def gather_rows(
        self, matrix: int, num_rows: int, width: int, rows: int, count: int, out: int, stream: int = 0
    ) -> None:
        """Launch the copying of rows, by their numbers, of a matrix of floats."""
        sizes = {"num_rows": num_rows, "width": width, "count": count}
        for name, size in sizes.items():
            _check_fits(name, size)
        pointers = [ctypes.c_void_p(pointer) for pointer in (matrix, rows, out, stream)]
        self._call("pascalvl_gather_rows", pointers[0], num_rows, width, pointers[1], count, *pointers[2:])

    def add_to(self, x: int, y: int, rows: int, width: int, stream: int = 0) -> None:
        """Launch the addition of a matrix of floats to another."""
        _check_fits("rows", rows)
        _check_fits("width", width)
        pointers = [ctypes.c_void_p(pointer) for pointer in (x, y, stream)]
        self._call("pascalvl_add_to", *pointers[:2], rows, width, pointers[2])

    def kv_append(self, args: AppendArgs, stream: int = 0) -> None:
        """Launch the writing of new keys and values into the pools of all layers."""
        self._call("pascalvl_kv_append", ctypes.byref(args), ctypes.c_void_p(stream))

"""Runs the plugin's library through TensorRT's plugin interface, without TensorRT (`host.cpp`)."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pascalvl.plugins.errors import UserError
from pascalvl.plugins.kernels.build import Target, cached_file, compile_library
from pascalvl.plugins.ops.flash_attention.op import OP_NAME, OP_VERSION
from pascalvl.plugins.tensorrt.build import FOLDER, cached

_TYPES: dict[np.dtype[Any], int] = {
    np.dtype(np.float32): 0,
    np.dtype(np.float16): 1,
    np.dtype(np.int8): 2,
    np.dtype(np.int32): 3,
}
"""TensorRT's numbers of types, as in `interface.h`; so are those of the fields below."""
_FIELD_TYPES = {float: (1, np.float32), int: (5, np.int32)}
_CHARACTERS = 6

Shaped = tuple[np.dtype[Any], Sequence[int]]
"""Type and shape of a tensor."""


class _Tensor(ctypes.Structure):
    _fields_ = (("type", ctypes.c_int32), ("num_dims", ctypes.c_int32), ("dims", ctypes.c_int64 * 8))


def _tensors(tensors: Sequence[Shaped]) -> ctypes.Array[_Tensor]:
    return (_Tensor * len(tensors))(
        *(_Tensor(_TYPES[np.dtype(dtype)], len(shape), (ctypes.c_int64 * 8)(*shape)) for dtype, shape in tensors)
    )


class PluginHost:
    """A plugin's library, found in a registry as TensorRT finds it.

    A process can have one: a library finds the registry that was there first.

    Args:
        target: what runs the kernels.
        major: whose interface is spoken: TensorRT 8's (9.x shares it) or 10's.
    """

    def __init__(self, target: Target, major: int = 8) -> None:
        sources = [FOLDER / "host.cpp", FOLDER / "interface.h", Path(__file__)]
        flags = [f"-DPASCALVL_TENSORRT_MAJOR={major}"]
        name = f"libpascalvl_host{major}.so"
        host = cached_file(name, sources, lambda path: compile_library(path, sources[:1], flags))
        self._library = ctypes.CDLL(str(host), mode=ctypes.RTLD_GLOBAL)
        self._library.pascalvl_host_messages.restype = ctypes.c_char_p
        self.plugin = cached(major, target)
        """The library that is driven."""
        ctypes.CDLL(str(self.plugin))

    def call(self, name: str, *arguments: object) -> None:
        """Call a function of the host; `UserError` if it fails, with what the plugin reported."""
        if getattr(self._library, name)(*arguments):
            raise UserError(f"the plugin {self.plugin.name} failed: {self._library.pascalvl_host_messages().decode()}.")

    def create(
        self, attributes: Mapping[str, int | float | str], name: str = OP_NAME, version: str = OP_VERSION
    ) -> HostedPlugin:
        """The plugin of a node with these attributes, ready to run."""
        fields = []
        for value in attributes.values():
            if isinstance(value, str):
                fields.append((_CHARACTERS, np.frombuffer(value.encode(), np.int8)))
            else:
                kind, dtype = _FIELD_TYPES[type(value)]
                fields.append((kind, np.array([value], dtype)))
        count = len(fields)
        node, num_outputs = ctypes.c_void_p(), ctypes.c_int32()
        self.call(
            "pascalvl_host_create",
            name.encode(),
            version.encode(),
            (ctypes.c_char_p * count)(*(name.encode() for name in attributes)),
            (ctypes.c_void_p * count)(*(array.ctypes.data for _, array in fields)),
            (ctypes.c_int32 * count)(*(kind for kind, _ in fields)),
            (ctypes.c_int32 * count)(*(array.size for _, array in fields)),
            count,
            ctypes.byref(node),
            ctypes.byref(num_outputs),
        )
        return HostedPlugin(self, node, num_outputs.value)

    def destroy(self, node: ctypes.c_void_p) -> None:
        self._library.pascalvl_host_destroy(node)


@functools.cache
def plugin_host(target: Target) -> PluginHost:
    """The process's host."""
    return PluginHost(target)


class HostedPlugin:
    """One node's plugin."""

    def __init__(self, host: PluginHost, node: ctypes.c_void_p, num_outputs: int) -> None:
        self._host = host
        self._node = node
        self._num_outputs = num_outputs

    def __del__(self) -> None:
        self._host.destroy(self._node)

    def prepare(self, inputs: Sequence[Shaped]) -> tuple[list[Shaped], int]:
        """Configure the plugin for inputs; returns its outputs' types and shapes, and bytes of workspace."""
        outputs, workspace = (_Tensor * self._num_outputs)(), ctypes.c_size_t()
        self._host.call(
            "pascalvl_host_prepare", self._node, _tensors(inputs), len(inputs), outputs, ctypes.byref(workspace)
        )
        dtypes = {number: dtype for dtype, number in _TYPES.items()}
        return [(dtypes[output.type], tuple(output.dims[: output.num_dims])) for output in outputs], workspace.value

    def enqueue(
        self,
        inputs: Sequence[Shaped],
        pointers: Sequence[int],
        outputs: Sequence[Shaped],
        to: Sequence[int],
        workspace: int,
        stream: int,
    ) -> None:
        """Run the plugin on a stream, on inputs at ``pointers``, to outputs at ``to``, those that `prepare` told."""
        self._host.call(
            "pascalvl_host_enqueue",
            self._node,
            _tensors(inputs),
            len(inputs),
            _tensors(outputs),
            (ctypes.c_void_p * len(pointers))(*pointers),
            (ctypes.c_void_p * len(to))(*to),
            ctypes.c_void_p(workspace),
            ctypes.c_void_p(stream),
        )

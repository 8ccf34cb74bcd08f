"""The CUDA driver, libcuda.so.1, which every NVIDIA card comes with: its functions as its manual declares them."""

from __future__ import annotations

import ctypes
import functools
import os
import threading
from typing import Any

from pascalvl.plugins.errors import UserError

# Kernels are loaded when they are first run: less memory of a small card. Read when CUDA is initialised.
os.environ.setdefault("CUDA_MODULE_LOADING", "LAZY")

OUT_OF_MEMORY = 2
"""Of enum CUresult."""
CAPABILITY_MAJOR, CAPABILITY_MINOR = 75, 76
"""Of enum CUdevice_attribute."""
NON_BLOCKING_STREAM = 1
"""Of enum CUstream_flags."""
CAPTURE_RELAXED, CAPTURE_NONE = 2, 0
"""Of enums CUstreamCaptureMode and CUstreamCaptureStatus."""
KERNEL_NODE = 0
"""Of enum CUgraphNodeType."""

_HANDLE, _SIZE, _ADDRESS = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint64
_OUT = ctypes.c_void_p  # where a result is written
_FUNCTIONS: dict[str, tuple[Any, ...]] = {
    "cuGetErrorName": (ctypes.c_int, _OUT),
    "cuGetErrorString": (ctypes.c_int, _OUT),
    "cuInit": (ctypes.c_uint,),
    "cuDriverGetVersion": (_OUT,),
    "cuDeviceGet": (_OUT, ctypes.c_int),
    "cuDeviceGetCount": (_OUT,),
    "cuDeviceGetName": (_OUT, ctypes.c_int, ctypes.c_int),
    "cuDeviceGetAttribute": (_OUT, ctypes.c_int, ctypes.c_int),
    "cuDevicePrimaryCtxRetain": (_OUT, ctypes.c_int),
    "cuDevicePrimaryCtxReset_v2": (ctypes.c_int,),
    "cuCtxGetCurrent": (_OUT,),
    "cuCtxGetDevice": (_OUT,),
    "cuCtxSetCurrent": (_HANDLE,),
    "cuMemGetInfo_v2": (_OUT, _OUT),
    "cuMemAlloc_v2": (_OUT, _SIZE),
    "cuMemFree_v2": (_ADDRESS,),
    "cuMemHostAlloc": (_OUT, _SIZE, ctypes.c_uint),
    "cuMemFreeHost": (_HANDLE,),
    "cuMemcpyHtoDAsync_v2": (_ADDRESS, _HANDLE, _SIZE, _HANDLE),
    "cuMemcpyDtoHAsync_v2": (_HANDLE, _ADDRESS, _SIZE, _HANDLE),
    "cuMemcpyDtoDAsync_v2": (_ADDRESS, _ADDRESS, _SIZE, _HANDLE),
    "cuMemsetD8Async": (_ADDRESS, ctypes.c_ubyte, _SIZE, _HANDLE),
    "cuStreamCreate": (_OUT, ctypes.c_uint),
    "cuStreamSynchronize": (_HANDLE,),
    "cuStreamIsCapturing": (_HANDLE, _OUT),
    "cuStreamBeginCapture_v2": (_HANDLE, ctypes.c_int),
    "cuStreamEndCapture": (_HANDLE, _OUT),
    "cuGraphInstantiateWithFlags": (_OUT, _HANDLE, ctypes.c_uint64),
    "cuGraphGetNodes": (_HANDLE, _OUT, _OUT),
    "cuGraphNodeGetType": (_HANDLE, _OUT),
    "cuGraphLaunch": (_HANDLE, _HANDLE),
    "cuGraphDestroy": (_HANDLE,),
    "cuGraphExecDestroy": (_HANDLE,),
}


class Driver:
    """The driver, initialised.

    Raises:
        UserError: there is none, or it finds no GPU.
    """

    def __init__(self) -> None:
        try:
            library = ctypes.CDLL("libcuda.so.1")
        except OSError:
            raise UserError(
                "no NVIDIA driver was found (libcuda.so.1): install one; the last that serves Pascal cards is branch "
                "580."
            ) from None
        self._functions: dict[str, Any] = {}
        for name, arguments in _FUNCTIONS.items():
            try:
                function = getattr(library, name)
            except AttributeError:
                raise UserError(f"the NVIDIA driver has no {name}: it is too old, install branch 525 to 580.") from None
            function.argtypes = arguments
            self._functions[name] = function
        if error := self._functions["cuInit"](0):
            raise UserError(
                f"no NVIDIA GPU can be used ({self._reason(error)}): check nvidia-smi, and CUDA_VISIBLE_DEVICES if it "
                "is set."
            )

    def call(self, name: str, *arguments: Any) -> None:
        """Call a function; out of memory is `MemoryError`, every other error `UserError`."""
        if error := self._functions[name](*arguments):
            if error == OUT_OF_MEMORY:
                raise MemoryError("the GPU's memory")
            raise UserError(
                f"CUDA failed: {self._reason(error)} ({name}); check nvidia-smi, and that no other program has the "
                "card."
            )

    def get(self, name: str, kind: Any, *arguments: Any) -> Any:
        """What a function writes to its first argument, of a type of ctypes; None for a null pointer."""
        result = kind()
        self.call(name, ctypes.byref(result), *arguments)
        return result.value

    def _reason(self, error: int) -> str:
        texts = []
        for name in ("cuGetErrorString", "cuGetErrorName"):
            text = ctypes.c_char_p()
            self._functions[name](error, ctypes.byref(text))
            texts.append((text.value or b"unknown").decode())
        return ", ".join(texts)


class Context:
    """A device's primary context, which all of a process shares; what there is in it ends with it."""

    def __init__(self) -> None:
        self.driver = driver = load()
        if driver.get("cuCtxGetCurrent", _HANDLE):
            self.device = driver.get("cuCtxGetDevice", ctypes.c_int)
        else:
            self.device = driver.get("cuDeviceGet", ctypes.c_int, 0)
        self._handle = driver.get("cuDevicePrimaryCtxRetain", _HANDLE, self.device)
        self.is_open = True

    def call(self, name: str, *arguments: Any) -> None:
        """`Driver.call` with this context, which stays the thread's."""
        self.driver.call("cuCtxSetCurrent", self._handle)
        self.driver.call(name, *arguments)

    def get(self, name: str, kind: Any, *arguments: Any) -> Any:
        """`Driver.get` with this context, which stays the thread's."""
        self.driver.call("cuCtxSetCurrent", self._handle)
        return self.driver.get(name, kind, *arguments)

    def release(self, name: str, handle: int) -> None:
        """Call what frees something in this context, if that is still there."""
        if self.is_open:
            self.call(name, handle)

    def close(self) -> None:
        """End the context, for all of the process."""
        self.is_open = False
        self.driver.call("cuCtxSetCurrent", None)
        self.driver.call("cuDevicePrimaryCtxReset_v2", self.device)


_lock = threading.Lock()
_context: Context | None = None


@functools.cache
def load() -> Driver:
    """The driver; for errors see `Driver`."""
    return Driver()


def context() -> Context:
    """The current device's context, made if there is none or it was closed; for errors see `Driver`."""
    global _context
    with _lock:
        if _context is None or not _context.is_open:
            _context = Context()
        return _context

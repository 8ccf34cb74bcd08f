"""Times of GPU work, and the limits of the GPU it ran on. Needs torch with CUDA."""

from __future__ import annotations

import ctypes
import hashlib
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from pascalvl.plugins.kernels.build import Target, cached, compile_cuda
from pascalvl.plugins.kernels.library import KernelLibrary

COLD_BYTES = 256 << 20
"""More than any L2 holds: calls that take turns over so many bytes find none of them there."""
FEW_CALLS = 64
"""So many short ones in a graph are enough."""
THREADS = 128
_STEPS, _VALUES = 8, 64  # of a round of the rate kernels, in yardstick.cu
_PRODUCT = 8192, 8448, 2048
_TILE = 64, 128

Calls = Sequence[Callable[[], object]]


def open_libraries(baseline: Path | None) -> list[KernelLibrary]:
    """The kernels, and those of another build of the library to compare with, loaded."""
    libraries = [KernelLibrary(path) for path in (cached(Target.CUDA), baseline) if path]
    for library in libraries:
        library.load()
    return libraries


def seconds(calls: Calls, least: int = 1) -> float:
    """Median time of one of the calls, which run one after the other in a CUDA graph.

    They do so again until there are `least` of them: starting a graph takes some microseconds, too.
    """
    return seconds_in_turn([calls], least)[0]


def seconds_in_turn(variants: Sequence[Calls], least: int = 1, replays: int = 7) -> list[float]:
    """`seconds` of several variants of the same calls, whose graphs are replayed in turn: under the same clocks."""
    graphs, kept = [], []
    for calls in variants:
        calls = [*calls] * -(-least // len(calls))
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            calls[0]()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            kept.append([call() for call in calls])
        graphs.append(graph)
    times: list[list[float]] = [[] for _ in graphs]
    for _ in range(replays):
        for graph, results, own in zip(graphs, kept, times, strict=True):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            own.append(start.elapsed_time(end) / 1e3 / len(results))
    return [statistics.median(own[1:]) for own in times]


def plain_read_rate() -> float | None:
    """Bytes a second of a plain read of the current GPU's memory; None: PyTorch can use none, or it is full.

    Raises:
        UserError: the kernel cannot be compiled here.
    """
    if not torch.cuda.is_available():
        return None
    try:
        torch.zeros(1, device="cuda")  # makes the context in which the kernel is loaded
        return Yardstick().read_rate(COLD_BYTES)
    except torch.OutOfMemoryError:
        return None
    finally:
        torch.cuda.empty_cache()


class Yardstick:
    """The kernels of `yardstick.cu`, as PTX for compute_61 that lies beside the cached library."""

    def __init__(self) -> None:
        self._driver = ctypes.CDLL("libcuda.so.1")
        self._module = ctypes.c_void_p()
        self._check(self._driver.cuModuleLoadData(ctypes.byref(self._module), self.ptx().read_bytes()))

    @staticmethod
    def ptx() -> Path:
        """The file, compiled when first asked for."""
        source = Path(__file__).with_name("yardstick.cu")
        digest = hashlib.sha256(source.read_bytes()).hexdigest()[:16]
        path = cached(Target.CUDA).with_name(f"yardstick-{digest}.ptx")
        if not path.exists():
            path.write_bytes(compile_cuda(source).ptx)
        return path

    def ffma_rate(self) -> float:
        """FP32 multiply-adds a second, from registers alone."""
        return self._rate("ffma_rate", torch.float32)

    def dp4a_rate(self) -> float:
        """DP4A instructions a second, four multiply-adds each, from registers alone."""
        return self._rate("dp4a_rate", torch.int32)

    def read_rate(self, size: int) -> float:
        """Bytes a second of a plain read of ``size`` bytes that no cache holds."""
        buffers = [
            torch.randint(-(2**31), 2**31, (size // 16, 4), dtype=torch.int32, device="cuda")
            for _ in range(max(2, COLD_BYTES // size + 1))
        ]
        blocks = 16 * torch.cuda.get_device_properties(0).multi_processor_count
        out = torch.empty(1, dtype=torch.int32, device="cuda")
        calls = [lambda b=b: self._launch("plain_read", (blocks, 1), b, len(b), out) for b in buffers]
        return size / seconds(calls, least=FEW_CALLS)

    def sgemm_rate(self) -> float:
        """Multiply-adds a second of an FP32 matrix product by the machinery of prefill; checked against float64."""
        m, n, k = _PRODUCT
        a, b = torch.randn(m, k, device="cuda"), torch.randn(n, k, device="cuda")
        c = torch.empty(m, n, device="cuda")
        grid = (n // _TILE[1], m // _TILE[0])
        time = seconds([lambda: self._launch("sgemm", grid, a, b, c, n, k)] * 2)
        expected = a[:512].double() @ b.double().T
        error = ((c[:512].double() - expected).norm() / expected.norm()).item()
        if error > 1e-6:  # sums of 2,048 products in FP32
            raise RuntimeError(f"the matrix product is off by {error:.1e} of its norm")
        return m * n * k / time

    def _rate(self, kernel: str, dtype: torch.dtype) -> float:
        blocks, rounds = 4 * torch.cuda.get_device_properties(0).multi_processor_count, 2000
        out = torch.empty(blocks * THREADS, dtype=dtype, device="cuda")
        time = seconds([lambda: self._launch(kernel, (blocks, 1), out, rounds)])
        return blocks * THREADS * rounds * _STEPS * _VALUES / time

    def _launch(self, kernel: str, grid: tuple[int, int], *arguments: torch.Tensor | int) -> None:
        function = ctypes.c_void_p()
        self._check(self._driver.cuModuleGetFunction(ctypes.byref(function), self._module, kernel.encode()))
        values = [ctypes.c_void_p(a.data_ptr()) if isinstance(a, torch.Tensor) else ctypes.c_int(a) for a in arguments]
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        self._check(self._driver.cuLaunchKernel(function, *grid, 1, THREADS, 1, 1, 0, stream, pointers, None))

    @staticmethod
    def _check(status: int) -> None:
        if status:
            raise RuntimeError(f"the CUDA driver returned error {status}")

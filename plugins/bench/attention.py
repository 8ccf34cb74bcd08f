"""Checks and times the attention kernels on a GPU: ``python -m pascalvl.plugins.bench.attention LIBRARY``.

Every kernel is compared with float64 attention before it is timed. Times are medians over replays of a CUDA graph;
caches are cold in decode: the graph walks over so many that the L2 holds none by the time it comes back. Beside each
time stand the two floors: the multiply-adds at the GPU's nominal FP32 rate, and the bytes at the bandwidth of a plain
read that this run measures. Needs torch with CUDA; the project's other parts do not.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
from collections.abc import Callable
from pathlib import Path

import torch

from pascalvl.plugins.kernels.library import AppendArgs, AttentionArgs, Cache, KernelLibrary, RowFormat

HEADS, KV_HEADS, DIM = 32, 8, 128
SCALE = DIM**-0.5
F32, F16, I8, I4 = RowFormat
NAMES = {(F32, F32): "f32", (F16, F16): "f16", (I8, I8): "k8v8", (I8, I4): "k8v4", (I4, I8): "k4v8", (I4, I4): "k4v4"}
LLAMA_CPP = {  # microseconds of llama.cpp's Pascal kernels (commit 0c1e5709) on one H100 80GB HBM3, compute_61 code
    ("decode", 1024): 9.5,
    ("decode", 4096): 18.2,
    ("decode", 16384): 42,
    (512, 1024): 334,
    (512, 4096): 1227,
    (512, 16384): 4802,
    (2048, 2048): 1514,
    (2048, 4096): 3828,
    (2048, 16384): 17908,
}
PREFILLS = {  # new queries, and keys they see in all
    (F16, F16): [(512, 1024), (512, 4096), (512, 16384), (2048, 2048), (2048, 4096), (2048, 16384)],
    (F32, F32): [(512, 4096), (512, 16384), (2048, 2048), (2048, 16384)],
    (I8, I8): [(512, 16384), (2048, 16384)],
    (I8, I4): [(512, 4096), (512, 16384), (2048, 16384)],
    (I4, I4): [(512, 16384), (2048, 16384)],
}
COLD_BYTES = 256 << 20
PARTS = ("decode", "prefill", "vision", "torch")


class Layer:
    """One layer's cache on the GPU, and calls of the library over it."""

    def __init__(
        self, library: KernelLibrary, formats: tuple[RowFormat, RowFormat], capacity: int, rotated: bool
    ) -> None:
        self.library, self.formats, self.capacity, self.rotated = library, formats, capacity, rotated
        lead = (KV_HEADS, capacity)
        self.rows = [
            torch.randint(0, 60, (*lead, library.row_bytes(f, DIM)), dtype=torch.uint8, device="cuda") for f in formats
        ]
        self.scales = [torch.full(lead, 0.01, dtype=torch.float16, device="cuda") for _ in formats]

    def bytes_read(self, length: int) -> int:
        per_token = sum(rows.shape[-1] + 2 * f.is_quantised for rows, f in zip(self.rows, self.formats, strict=True))
        return KV_HEADS * length * per_token

    def view(self) -> Cache:
        return Cache(
            key=self.rows[0].data_ptr(),
            value=self.rows[1].data_ptr(),
            key_scale=self.scales[0].data_ptr(),
            value_scale=self.scales[1].data_ptr(),
            key_format=self.formats[0],
            value_format=self.formats[1],
            capacity=self.capacity,
            rotated=self.rotated,
        )

    def append(self, key: torch.Tensor, value: torch.Tensor, past_length: torch.Tensor) -> None:
        self.library.kv_append(
            AppendArgs(
                key=key.data_ptr(),
                value=value.data_ptr(),
                layers=1,
                batch=1,
                num_kv_heads=KV_HEADS,
                seq=key.shape[-2],
                key_dim=DIM,
                value_dim=DIM,
                past_length=past_length.data_ptr(),
                cache=self.view(),
            ),
            torch.cuda.current_stream().cuda_stream,
        )

    def contents(self, which: int, length: int) -> torch.Tensor:
        """Keys or values as the kernels understand them, float64 [KV_HEADS, length, DIM]."""
        rows, form = self.rows[which][:, :length], self.formats[which]
        if form is F32:
            return rows.view(torch.float32).double()
        if form is F16:
            return rows.view(torch.float16).double()
        if form is I8:
            codes = rows.view(torch.int8).double()
        else:
            words = rows.unflatten(-1, (-1, 4))
            codes = torch.cat([words & 15, words >> 4], -1).flatten(-2).double() - 8
        return codes * self.scales[which][:, :length, None].double()


def attend(library, q, k, v, layer: Layer | None, past_length, workspace, cu_seqlens=None) -> torch.Tensor:
    """The library's attention of q, k, v [heads, seq, dim] on the current stream: [seq, heads, dim]."""
    out = torch.empty(q.shape[1], q.shape[0], v.shape[-1], device="cuda")
    args = AttentionArgs(
        q=q.data_ptr(),
        k=k.data_ptr(),
        v=v.data_ptr(),
        out=out.data_ptr(),
        batch=1,
        num_heads=q.shape[0],
        num_kv_heads=k.shape[0],
        seq=q.shape[1],
        key_dim=q.shape[2],
        value_dim=v.shape[2],
        softmax_scale=q.shape[2] ** -0.5,
        causal=cu_seqlens is None,
        past_length=past_length.data_ptr() if layer else None,
        cu_seqlens=None if cu_seqlens is None else cu_seqlens.data_ptr(),
        num_sequences=0 if cu_seqlens is None else len(cu_seqlens) - 1,
        cache=layer.view() if layer else Cache(),
    )
    library.attention(args, workspace.data_ptr(), workspace.numel(), torch.cuda.current_stream().cuda_stream)
    return out


def reference(q, k, v, first_position: int | None, old_q=None, old_k=None) -> torch.Tensor:
    """Float64 attention in parts that fit: [seq, heads, dim]. Causal from `first_position` on, where given."""
    group = q.shape[0] // k.shape[0]
    outs = []
    for head in range(q.shape[0]):
        key, value = k[head // group].double(), v[head // group].double()
        scores = q[head].double() @ key.T
        if old_q is not None:
            scores = torch.cat([old_q[head].double() @ old_k[head // group].T, scores], 1)
        scores *= q.shape[2] ** -0.5
        if first_position is not None:
            own = first_position + torch.arange(q.shape[1], device="cuda")
            position = torch.arange(scores.shape[1], device="cuda")
            scores.masked_fill_(position[None] > own[:, None], -math.inf)
        outs.append(scores.softmax(-1) @ value)
    return torch.stack(outs, 1)


def hadamard(x: torch.Tensor) -> torch.Tensor:
    """Rows of 128 times the orthonormal Hadamard matrix, in butterflies: of float32, the kernels' very bits."""
    for step in (1, 2, 4, 8, 16, 32, 64):
        pairs = x.unflatten(-1, (-1, 2, step))
        low, high = pairs.unbind(-2)
        x = torch.stack([low + high, low - high], -2).flatten(-3)
    return x * torch.tensor(DIM**-0.5, dtype=x.dtype)


def queries_over_cache(q: torch.Tensor, layer: Layer) -> torch.Tensor:
    """What meets a cache's keys, in float64: where those are rotated and quantised, so are queries."""
    if not layer.rotated:
        return q.double()
    rotated = hadamard(q)
    most = rotated.abs().amax(-1, keepdim=True)
    return (rotated * (127 / most)).round().double() * (most / 127).double()


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.double() - expected).norm() / expected.norm()).item()


def seconds(calls: list[Callable[[], object]], replays: int = 7) -> float:
    """Median time of one of the calls, which are captured in one CUDA graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        calls[0]()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [call() for call in calls]
    times = []
    for _ in range(replays):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / len(calls))
    del kept
    return statistics.median(times[1:])


def nominal_rate() -> float:
    """FP32 multiply-adds a second at the highest clock."""
    query = ["nvidia-smi", "--query-gpu=clocks.max.sm", "--format=csv,noheader,nounits"]
    clock = float(subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0])
    return torch.cuda.get_device_properties(0).multi_processor_count * 128 * clock * 1e6


def read_bandwidth(size: int) -> float:
    """Bytes a second of a plain read of `size` bytes, cold."""
    copies = max(2, COLD_BYTES // size + 1)
    buffers = [torch.zeros(size // 4, device="cuda") for _ in range(copies)]
    return size / seconds([lambda b=b: b.max() for b in buffers])


def check_and_time_prefill(library, workspace, rate: float, rows: list[dict], quick: bool) -> None:
    for formats, lengths in PREFILLS.items():
        for queries, total in lengths[:1] if quick else lengths:
            torch.manual_seed(0)
            past = total - queries
            q = torch.randn(HEADS, queries, DIM, device="cuda")
            k, v = (torch.randn(KV_HEADS, total, DIM, device="cuda") for _ in range(2))
            layer = Layer(library, formats, max(total, 64), formats[0].is_quantised)
            length = torch.tensor([past], dtype=torch.int32, device="cuda")
            layer.append(k, v, torch.zeros(1, dtype=torch.int32, device="cuda"))
            new_k, new_v = k[:, past:].contiguous(), v[:, past:].contiguous()
            old_q = queries_over_cache(q, layer)
            values = torch.cat([layer.contents(1, past), new_v.double()], 1)
            expected = reference(q, new_k, values, past, old_q, layer.contents(0, past))
            call = lambda q=q, k=new_k, v=new_v, y=layer, n=length: attend(library, q, k, v, y, n, workspace)  # noqa: E731
            row = {
                "kernel": f"prefill {NAMES[formats]}",
                "queries": queries,
                "kv": total,
                "error": error(call(), expected),
            }
            row["us"] = seconds([call] * 3) * 1e6
            multiply_adds = HEADS * DIM * 2 * (queries * past + queries * (queries + 1) / 2)
            row["floor_us"] = multiply_adds / rate * 1e6
            row["tflops"] = 2 * multiply_adds / row["us"] / 1e6
            row["llama_cpp_us"] = LLAMA_CPP.get((queries, total))
            rows.append(row)
            print(json.dumps(row), flush=True)


def time_torch(rows: list[dict]) -> None:
    """PyTorch's FP32 attention of a whole prompt, K and V repeated for the query heads."""
    q, k, v = (torch.randn(1, HEADS, 2048, DIM, device="cuda") for _ in range(3))
    for name in ("MATH", "EFFICIENT_ATTENTION"):
        with torch.nn.attention.sdpa_kernel(getattr(torch.nn.attention.SDPBackend, name)):
            time = seconds([lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)] * 3)
        rows.append({"kernel": f"torch {name.lower()}", "queries": 2048, "kv": 2048, "us": time * 1e6})
        print(json.dumps(rows[-1]), flush=True)


def check_and_time_decode(library, workspace, rows: list[dict], quick: bool) -> None:
    for total in (1024,) if quick else (1024, 4096, 16384, 131072):
        for formats, name in NAMES.items():
            torch.manual_seed(1)
            past = total - 1
            rotated = formats[0].is_quantised
            first = Layer(library, formats, total, rotated)
            k, v = (torch.randn(KV_HEADS, total, DIM, device="cuda") for _ in range(2))
            first.append(k, v, torch.zeros(1, dtype=torch.int32, device="cuda"))
            q = torch.randn(HEADS, 1, DIM, device="cuda")
            length = torch.tensor([past], dtype=torch.int32, device="cuda")
            new_k, new_v = k[:, past:].contiguous(), v[:, past:].contiguous()
            old_q = queries_over_cache(q, first)
            values = torch.cat([first.contents(1, past), new_v.double()], 1)
            expected = reference(q, new_k, values, past, old_q, first.contents(0, past))
            found = attend(library, q, new_k, new_v, first, length, workspace)
            row = {"kernel": f"decode {name}", "queries": 1, "kv": total, "error": error(found, expected)}
            size = first.bytes_read(past)
            layers = [first] + [Layer(library, formats, total, rotated) for _ in range(min(63, COLD_BYTES // size))]
            calls = [lambda y=y: attend(library, q, new_k, new_v, y, length, workspace) for y in layers]  # noqa: B023
            row["us"] = seconds(calls) * 1e6
            row["read_us"] = size / read_bandwidth(size) * 1e6
            row["gb_per_s"] = size / row["us"] / 1e3
            row["llama_cpp_us"] = LLAMA_CPP.get(("decode", total)) if name == "f16" else None
            rows.append(row)
            print(json.dumps(row), flush=True)


def check_and_time_vision(library, workspace, rate: float, rows: list[dict]) -> None:
    for dim in (64, 72):
        torch.manual_seed(2)
        q, k, v = (torch.randn(16, 4096, dim, device="cuda") for _ in range(3))
        ends = torch.tensor([0, 4096], dtype=torch.int32, device="cuda")
        call = lambda q=q, k=k, v=v: attend(library, q, k, v, None, None, workspace, ends)  # noqa: E731,B023
        row = {"kernel": f"vision {dim}", "queries": 4096, "kv": 4096, "error": error(call(), reference(q, k, v, None))}
        row["us"] = seconds([call] * 3) * 1e6
        row["floor_us"] = 16 * dim * 2 * 4096 * 4096 / rate * 1e6
        row["tflops"] = 2 * 16 * dim * 2 * 4096 * 4096 / row["us"] / 1e6
        rows.append(row)
        print(json.dumps(row), flush=True)


def table(rows: list[dict]) -> str:
    """The results as a Markdown table."""
    columns = ("kernel", "queries", "kv", "error", "us", "floor_us", "read_us", "tflops", "gb_per_s", "llama_cpp_us")

    def cell(value: object) -> str:
        if value is None:
            return ""
        if isinstance(value, float):
            return f"{value:.1e}" if value < 1e-2 else f"{value:,.1f}"
        return str(value)

    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(cell(row.get(column)) for column in columns) + " |" for row in rows]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("library", type=Path, help="the kernels' library, as pascalvl.plugins.kernels.build makes it")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--quick", action="store_true", help="the shortest lengths alone, for compute-sanitizer")
    options = parser.parse_args()
    torch.cuda.init()
    torch.zeros(1, device="cuda")
    library = KernelLibrary(options.library)
    library.load()
    rate = nominal_rate()
    workspace = torch.zeros(256 << 20, dtype=torch.uint8, device="cuda")
    rows: list[dict] = []
    print(f"{torch.cuda.get_device_name()}, nominal FP32 {2 * rate / 1e12:.1f} TFLOP/s", flush=True)
    if "decode" in options.parts:
        check_and_time_decode(library, workspace, rows, options.quick)
    if "prefill" in options.parts:
        check_and_time_prefill(library, workspace, rate, rows, options.quick)
    if "vision" in options.parts:
        check_and_time_vision(library, workspace, rate, rows)
    if "torch" in options.parts:
        time_torch(rows)
    print(table(rows))


if __name__ == "__main__":
    main()

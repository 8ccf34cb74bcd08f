"""Checks and times the attention kernels on a GPU: ``python -m pascalvl.plugins.bench.attention``.

Every kernel is compared with float64 attention before it is timed; one that is off ends the run. Times are of the whole
op, its prologue and the merge of splits with it, without norms and RoPE. Caches are cold in decode. Beside each time
stand what it is measured against: the time its multiply-adds would take at the rate of a loop in registers, that of a
plain read of the same bytes, and llama.cpp's. Needs torch with CUDA, and matplotlib for --plot.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from pascalvl.plugins.bench.timing import COLD_BYTES, Yardstick, open_libraries, seconds_in_turn
from pascalvl.plugins.errors import UserError
from pascalvl.plugins.kernels.library import AttentionArgs, KernelLibrary
from pascalvl.plugins.kernels.library import Rows as LibraryRows
from pascalvl.plugins.kv_format import PAGE_SLOTS, RowFormat, pages_of
from pascalvl.plugins.terminal import shows_notices

HEADS, KV_HEADS, DIM = 32, 8, 128
F32, F16, I8, I4 = RowFormat
FORMATS = {"f32": (F32, F32), "f16": (F16, F16), "k8v8": (I8, I8), "k8v4": (I8, I4), "k4v4": (I4, I4)}
LLAMA_CPP = {  # microseconds of llama.cpp's Pascal kernels (commit 0c1e5709) on one H100 80GB HBM3, compute_61 code
    ("decode f16", 1, 1024): 9.5,
    ("decode f16", 1, 4096): 18.2,
    ("decode f16", 1, 16384): 42,
    ("decode k8v8", 1, 1024): 10.8,  # its q8_0
    ("decode k8v8", 1, 4096): 21.4,
    ("decode k8v8", 1, 16384): 64,
    ("decode k4v4", 1, 1024): 10.3,  # its q4_0
    ("decode k4v4", 1, 4096): 22.9,
    ("decode k4v4", 1, 16384): 71,
    **{
        (f"prefill {name}", queries, kv): time * factor
        for name, factor in (("f32", 1), ("f16", 1), ("k8v8", 1.02), ("k8v4", 1.02), ("k4v4", 1.02))
        for queries, kv, time in (
            (512, 1024, 334),
            (512, 4096, 1227),
            (512, 16384, 4802),
            (2048, 2048, 1514),
            (2048, 4096, 3828),
            (2048, 16384, 17908),
        )
    },
}
LONG, SHORT = 32768, 512
DECODES = (*((keys,) for keys in (1024, 4096, 16384, 32768, 131072)), (4096,) * 8, (LONG, *[SHORT] * 7))
"""Keys of each sequence."""
PREFILLS = ((512, 1024), (512, 4096), (512, 16384), (2048, 2048), (2048, 4096), (2048, 16384))
PREFILL_FORMATS = ("f32", "f16", "k8v8", "k8v4", "k4v4")
PACKED = 16, 4096  # heads and patches
CURVE = tuple(2**i for i in range(9, 16))
PARTS = ("decode", "prefill", "vision", "curve")


@dataclasses.dataclass
class Row:
    """One measurement."""

    kernel: str
    queries: int
    kv: int
    """Of the longest sequence."""
    error: float
    """Relative, against float64."""
    us: float
    floor_us: float | None = None
    """Its multiply-adds at the rate of a loop in registers."""
    read_us: float | None = None
    """A plain read of the same bytes."""
    tflops: float | None = None
    of_sgemm: float | None = None
    """Share of the yardstick's rate."""
    gb_per_s: float | None = None
    times_f16: float | None = None
    """How many times as fast as over a cache in f16."""
    batch: int | None = None
    """Sequences; None: one."""
    all_kv: int | None = None
    """Of all sequences together; None: of one."""
    times_baseline: float | None = None
    """How many times as fast as the other library's kernel."""

    @property
    def llama_cpp_us(self) -> float | None:
        return LLAMA_CPP.get((self.kernel, self.queries, self.kv)) if self.batch in (None, 1) else None


class Bench:
    """The library on this GPU, another build of it to compare with, and the GPU's limits."""

    def __init__(self, quick: bool, baseline: Path | None = None) -> None:
        torch.zeros(1, device="cuda")
        self._libraries = open_libraries(baseline)
        self.library = self._libraries[0]
        self.quick = quick
        self.yardstick = Yardstick()
        if not quick:
            self.ffma, self.dp4a = self.yardstick.ffma_rate(), self.yardstick.dp4a_rate()
            self.sgemm = self.yardstick.sgemm_rate()
            print(
                f"{torch.cuda.get_device_name()}: FFMA {2 * self.ffma / 1e12:.1f} TFLOP/s in registers, "
                f"{2 * self.sgemm / 1e12:.1f} in a matrix product; DP4A {8 * self.dp4a / 1e12:.1f} TOP/s",
                flush=True,
            )

    def attend(self, call: Call) -> torch.Tensor:
        """What a call gives, on the current stream: ``[batch * seq, heads, dim]``."""
        out = torch.empty(len(call.qkv), call.heads, call.dim, device="cuda")
        pool, new = call.pool, call.new
        of_cache = {}
        if new:
            of_cache = {"new_rows": new.view(), "rotated": new.rotated}
            of_cache |= {"key_format": new.formats[0], "value_format": new.formats[1]}
        if pool:
            of_cache |= {"pool": pool.view(), "num_pages": pool.table.numel(), "sequence_pages": pool.table.shape[1]}
            of_cache |= {"page_table": pool.table.data_ptr(), "past_length": pool.lengths.data_ptr()}
        args = AttentionArgs(
            qkv=call.qkv.data_ptr(),
            out=out.data_ptr(),
            cu_seqlens=call.cu_seqlens.data_ptr(),
            tokens=len(call.qkv),
            batch=len(call.cu_seqlens) - 1,
            num_heads=call.heads,
            num_kv_heads=call.kv_heads,
            head_dim=call.dim,
            value_dim=call.dim,
            softmax_scale=call.dim**-0.5,
            causal=bool(new),
            **of_cache,
        )
        size = self.library.attention_workspace(args)
        workspace = torch.empty(size, dtype=torch.uint8, device="cuda")
        self.library.attention(args, workspace.data_ptr(), size, torch.cuda.current_stream().cuda_stream)
        return out

    def time(self, calls: list[Callable[[], object]]) -> tuple[float, float | None]:
        """Microseconds of one of the calls, 0 where only results are checked; and how many times as long the other
        library takes, if there is one."""
        if self.quick:
            return 0.0, None
        variants = [[partial(self._with, library, call) for call in calls] for library in self._libraries]
        us, *others = (1e6 * time for time in seconds_in_turn(variants))
        return us, others[0] / us if others else None

    def _with(self, library: KernelLibrary, call: Callable[[], object]) -> object:
        kept, self.library = self.library, library
        try:
            return call()
        finally:
            self.library = kept

    def rates(self, multiply_adds: float, us: float, in_codes: float = 0) -> dict[str, Any]:
        """Fields of a row that is bound by arithmetic; of the multiply-adds, ``in_codes`` are done by DP4A."""
        if self.quick:
            return {}
        floor = (multiply_adds - in_codes) / self.ffma + in_codes / 4 / self.dp4a
        rate = multiply_adds / us * 1e6
        return {"floor_us": 1e6 * floor, "tflops": 2 * rate / 1e12, "of_sgemm": rate / self.sgemm}


class Rows:
    """Keys and values of one layer on the GPU, at random, ``[*lead, row]``."""

    def __init__(self, library: KernelLibrary, name: str, *lead: int) -> None:
        self.formats = FORMATS[name]
        self.rotated = self.formats[0].is_quantised
        self.rows = [
            torch.empty(*lead, library.row_bytes(f, DIM), dtype=torch.uint8, device="cuda") for f in self.formats
        ]
        for rows, form in zip(self.rows, self.formats, strict=True):
            if form is I8:
                rows.view(torch.int8).random_(-127, 128)
            elif form is I4:
                rows.random_(0, 256)
            else:
                rows.view(torch.float32 if form is F32 else torch.float16).normal_()
        unit = {I8: 0.015, I4: -0.25}
        self.scales = torch.empty(*lead, 2, dtype=torch.float16, device="cuda")
        for which, form in enumerate(self.formats):
            self.scales[..., which] = unit.get(form, 0)

    @property
    def bytes_per_token(self) -> int:
        parts = zip(self.rows, self.formats, strict=True)
        return KV_HEADS * sum(rows.shape[-1] + 2 * f.is_quantised for rows, f in parts)

    def view(self) -> LibraryRows:
        return LibraryRows(key=self.rows[0].data_ptr(), value=self.rows[1].data_ptr(), scale=self.scales.data_ptr())

    def contents(self, which: int, *place: slice | torch.Tensor) -> torch.Tensor:
        """Keys (0) or values (1) as the kernels understand them, float64 ``[..., DIM]``, of an index of the lead."""
        rows, form = self.rows[which][place], self.formats[which]
        if form is F32:
            return rows.view(torch.float32).double()
        if form is F16:
            return rows.view(torch.float16).double()
        if form is I8:
            codes = rows.view(torch.int8).double()
        else:
            words = rows.unflatten(-1, (-1, 4))
            codes = torch.cat([words & 15, words >> 4], -1).flatten(-2).double() - 8
        return codes * self.scales[place][..., which, None].double()

    def queries(self, q: torch.Tensor) -> torch.Tensor:
        """What meets the keys, in float64: where those are rotated and quantised, so are queries."""
        return rounded_to_int8(hadamard(q)) if self.rotated else q.double()


class Pool(Rows):
    """The pasts of sequences, each in pages of an order of chance."""

    def __init__(self, library: KernelLibrary, name: str, pasts: Sequence[int]) -> None:
        pages = pages_of(max(pasts))
        super().__init__(library, name, len(pasts) * pages, KV_HEADS, PAGE_SLOTS)
        self.pasts = pasts
        self.lengths = torch.tensor(pasts, dtype=torch.int32, device="cuda")
        self.table = torch.randperm(len(pasts) * pages, device="cuda").int().view(len(pasts), pages)

    @property
    def bytes_read(self) -> int:
        return sum(self.pasts) * self.bytes_per_token

    def past(self, which: int, sequence: int) -> torch.Tensor:
        """Of a sequence, as `contents`: ``[KV_HEADS, past, DIM]``."""
        pages = self.contents(which, self.table[sequence].long())  # [pages, KV_HEADS, slots, DIM]
        return pages.transpose(0, 1).flatten(1, 2)[:, : self.pasts[sequence]]


@dataclasses.dataclass(frozen=True)
class Call:
    """Arguments of a call of the op."""

    qkv: torch.Tensor
    """``[tokens, (heads + 2 * kv_heads) * dim]``."""
    cu_seqlens: torch.Tensor
    heads: int
    kv_heads: int
    dim: int
    new: Rows | None = None
    """Where new rows go; None: it is not causal."""
    pool: Pool | None = None
    """The past; None: there is none."""


def packed(*parts: torch.Tensor) -> torch.Tensor:
    """q, k and v ``[heads, tokens, dim]`` as the projection gives them, ``[tokens, width]``."""
    return torch.cat([x.transpose(0, 1).flatten(1) for x in parts], -1)


def bounds(*lengths: int) -> torch.Tensor:
    """cu_seqlens of sequences with so many tokens."""
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device="cuda")


def rounded_to_int8(x: torch.Tensor) -> torch.Tensor:
    """What the kernels' int8 codes of x stand for, one scale for the last dimension: float64."""
    most = x.abs().amax(-1, keepdim=True)
    codes = torch.full_like(most, 127)  # dividing by or of a number, torch multiplies by a reciprocal
    return (x * (codes / most)).round().double() * (most / codes).double()


def hadamard(x: torch.Tensor) -> torch.Tensor:
    """Rows of 128 times the orthonormal Hadamard matrix, in butterflies: of float32, the kernels' very bits."""
    for step in (1, 2, 4, 8, 16, 32, 64):
        low, high = x.unflatten(-1, (-1, 2, step)).unbind(-2)
        x = torch.stack([low + high, low - high], -2).flatten(-3)
    return x * torch.tensor(DIM**-0.5, dtype=x.dtype)


def reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, first_position: int | None) -> torch.Tensor:
    """Float64 attention of q, k, v ``[heads, n, dim]``: ``[seq, heads, dim]``; causal given a first position."""
    group = q.shape[0] // k.shape[0]
    outs = []
    for head in range(q.shape[0]):
        key, value = k[head // group].double(), v[head // group].double()
        scores = q[head].double() @ key.T * q.shape[2] ** -0.5
        if first_position is not None:
            own = first_position + torch.arange(q.shape[1], device="cuda")
            position = torch.arange(scores.shape[1], device="cuda")
            scores.masked_fill_(position[None] > own[:, None], -math.inf)
        outs.append(scores.softmax(-1) @ value)
    return torch.stack(outs, 1)


def checked(what: str, found: torch.Tensor, expected: torch.Tensor, length: int) -> float:
    """The relative error; raises `UserError` if it is more than FP32 sums over so many keys explain."""
    error = ((found.double() - expected).norm() / expected.norm()).item()
    tolerance = 2e-6 * math.sqrt(length / 1024) + 1e-6
    if not error <= tolerance:
        raise UserError(f"{what} is off by {error:.1e} of its norm; expected at most {tolerance:.1e}.")
    return error


def past_and_new(bench: Bench, name: str, queries: int, totals: Sequence[int]) -> tuple[Call, float]:
    """A call over a pool that holds all tokens of sequences but the last ``queries`` of each, and its error."""
    pasts, batch = [total - queries for total in totals], len(totals)
    q = torch.randn(HEADS, batch * queries, DIM, device="cuda")
    k, v = (torch.randn(KV_HEADS, batch * queries, DIM, device="cuda") for _ in range(2))
    pool = Pool(bench.library, name, pasts) if max(pasts) else None
    new = Rows(bench.library, name, KV_HEADS, batch * queries)
    call = Call(packed(q, k, v), bounds(*[queries] * batch), HEADS, KV_HEADS, DIM, new, pool)
    found, met, expected = bench.attend(call), new.queries(q), []
    for number, past in enumerate(pasts):
        own = slice(number * queries, (number + 1) * queries)
        keys, values = (
            torch.cat([*([pool.past(i, number)] if pool else []), new.contents(i)[:, own]], 1) for i in range(2)
        )
        expected.append(reference(met[:, own], keys, values, past))
    what = f"{'decode' if queries == 1 else 'prefill'} {name}"
    return call, checked(what, found, torch.cat(expected), max(totals))


def decode(bench: Bench) -> Iterator[Row]:
    for totals in ((300, 40),) if bench.quick else DECODES:
        f16_us = None
        for name in FORMATS:
            call, error = past_and_new(bench, name, 1, totals)
            first = cast(Pool, call.pool)
            size = first.bytes_read
            more = 0 if bench.quick else min(63, COLD_BYTES // size)
            pools = [first, *(Pool(bench.library, name, first.pasts) for _ in range(more))]
            us, times = bench.time([partial(bench.attend, dataclasses.replace(call, pool=pool)) for pool in pools])
            several = {"batch": len(totals), "all_kv": sum(totals)} if len(totals) > 1 else {}
            row = Row(f"decode {name}", 1, max(totals), error, us, **several, times_baseline=times)
            if not bench.quick:
                row.read_us, row.gb_per_s = 1e6 * size / bench.yardstick.read_rate(size), size / us / 1e3
                f16_us = us if name == "f16" else f16_us
                row.times_f16 = f16_us and f16_us / us
            yield row


def prefill(bench: Bench) -> Iterator[Row]:
    for name in PREFILL_FORMATS:
        for queries, total in ((20, 150),) if bench.quick else PREFILLS:
            call, error = past_and_new(bench, name, queries, [total])
            us, times = bench.time([partial(bench.attend, call)] * 3)
            pairs = queries * (queries + 1) / 2 + queries * (total - queries)
            in_codes = HEADS * DIM * pairs if FORMATS[name][0].is_quantised else 0
            rates = bench.rates(HEADS * DIM * 2 * pairs, us, in_codes)
            yield Row(f"prefill {name}", queries, total, error, us, **rates, times_baseline=times)


def vision(bench: Bench) -> Iterator[Row]:
    heads, seq = (2, 300) if bench.quick else PACKED
    for dim in (64, 72):
        q, k, v = (torch.randn(heads, seq, dim, device="cuda") for _ in range(3))
        call = Call(packed(q, k, v), bounds(seq), heads, heads, dim)
        kernel = f"vision {dim}"
        error = checked(kernel, bench.attend(call), reference(q, k, v, None), seq)
        us, times = bench.time([partial(bench.attend, call)] * 3)
        rates = bench.rates(heads * seq * seq * dim * 2, us)
        yield Row(kernel, seq, seq, error, us, **rates, times_baseline=times)


def curve(bench: Bench) -> Iterator[dict[str, Any]]:
    """Time and peak memory of causal attention of a whole prompt, in FP32, ours and PyTorch's, by length."""

    def ours(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        new = Rows(bench.library, "f32", KV_HEADS, q.shape[1])
        return bench.attend(Call(packed(q, k, v), bounds(q.shape[1]), HEADS, KV_HEADS, DIM, new))

    def torch_with(backend: SDPBackend) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]:
        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            with sdpa_kernel(backend):
                k, v = (x.repeat_interleave(HEADS // KV_HEADS, 0) for x in (k, v))
                return scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True)

        return attend

    kinds = {
        "PascalVL": ours,
        "PyTorch, memory-efficient": torch_with(SDPBackend.EFFICIENT_ATTENTION),
        "PyTorch, math": torch_with(SDPBackend.MATH),
    }
    for kind, attend in kinds.items():
        for length in CURVE:
            torch.cuda.empty_cache()
            before = torch.cuda.memory_allocated()
            q = torch.randn(HEADS, length, DIM, device="cuda")
            k, v = (torch.randn(KV_HEADS, length, DIM, device="cuda") for _ in range(2))
            torch.cuda.reset_peak_memory_stats()
            try:
                attend(q, k, v)
                peak = torch.cuda.max_memory_allocated() - before
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                attend(q, k, v)
                end.record()
                end.synchronize()
            except torch.OutOfMemoryError:
                yield {"kind": kind, "length": length, "us": None, "peak_bytes": None}
                break
            finally:
                del q, k, v
            yield {"kind": kind, "length": length, "us": 1e3 * start.elapsed_time(end), "peak_bytes": peak}


def slope(points: list[dict[str, Any]], kind: str) -> float:
    """Of peak memory over length on log-log, between the first length from 4,096 on and the last."""
    line = [p for p in points if p["kind"] == kind and p["length"] >= 4096 and p["peak_bytes"]]
    first, last = line[0], line[-1]
    return math.log(last["peak_bytes"] / first["peak_bytes"]) / math.log(last["length"] / first["length"])


def plot(points: list[dict[str, Any]], path: Path) -> None:
    """Draw what `curve` measured."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, key, scale, title in zip(
        figure.subplots(1, 2),
        ("us", "peak_bytes"),
        (1e-3, 2**-20),
        ("time, ms", "peak memory, inputs included, MiB"),
        strict=True,
    ):
        for kind in dict.fromkeys(p["kind"] for p in points):
            if not (line := [p for p in points if p["kind"] == kind and p[key]]):
                continue
            axes.plot([p["length"] for p in line], [p[key] * scale for p in line], marker="o", label=kind)
        axes.set(xscale="log", yscale="log", xlabel="tokens", title=title)
        axes.set_xticks(CURVE, [f"{length:,}" for length in CURVE], rotation=45)
        axes.grid(which="major", alpha=0.3)
        axes.legend()
    figure.suptitle(f"Causal attention of a whole prompt, {HEADS} heads of {DIM}, {KV_HEADS} kv heads, FP32")
    figure.savefig(path, dpi=120)


def markdown(rows: list[dict[str, Any]]) -> str:
    """Rows of the same keys as a Markdown table; columns that are empty everywhere are left out."""

    def cell(value: object) -> str:
        if isinstance(value, float):
            return f"{value:.1e}" if abs(value) < 1e-3 else f"{value:,.2f}" if abs(value) < 10 else f"{value:,.1f}"
        return "" if value is None else f"{value:,}" if isinstance(value, int) else str(value)

    columns = [key for key in rows[0] if any(row[key] is not None for row in rows)]
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(cell(row[column]) for column in columns) + " |" for row in rows]
    return "\n".join(lines)


def run(options: argparse.Namespace) -> None:
    if options.plot:
        import matplotlib  # noqa: F401  (missing: say so before the work)
    torch.manual_seed(0)
    bench = Bench(options.quick, options.baseline)
    results: dict[str, list[dict[str, Any]]] = {}
    for part in options.parts:
        if part == "curve":
            results[part] = points = [] if options.quick else list(curve(bench))
            if points:
                print(
                    markdown(points), f"\nslope of PascalVL's peak memory from 4,096: {slope(points, 'PascalVL'):.3f}\n"
                )
            continue
        results[part] = []
        for row in {"decode": decode, "prefill": prefill, "vision": vision}[part](bench):
            results[part].append(dataclasses.asdict(row) | {"llama_cpp_us": row.llama_cpp_us})
            if shows_notices():
                print(f"{row.kernel} {row.queries}@{row.kv}: error {row.error:.1e}, {row.us:.1f} us", file=sys.stderr)
        print(markdown(results[part]), "\n", flush=True)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1), encoding="utf-8")
    if options.plot:
        plot(results["curve"], options.plot)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--quick", action="store_true", help="only check small shapes, for compute-sanitizer")
    parser.add_argument("--json", type=Path, help="write the measurements to this file")
    parser.add_argument("--plot", type=Path, help="draw time and memory over length to this PNG file")
    parser.add_argument("--baseline", type=Path, help="compare with this other build of the kernels' library")
    options = parser.parse_args(arguments)
    if options.plot and ("curve" not in options.parts or options.quick):
        parser.error("--plot needs the part curve, measured")
    if not torch.cuda.is_available():
        parser.error("there is no CUDA GPU that torch can use here")
    try:
        run(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

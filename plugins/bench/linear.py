"""Checks and times the kernels of linear layers on a GPU: ``python -m pascalvl.plugins.bench.linear``.

Each is compared with a float64 product of the same codes, halves or floats before it is timed; the inputs' norm and
quantisation are within the time. Weights are cold where few rows meet them. Beside each time stand its floors, which
are its multiply-adds at the rate of DP4A (of halves and floats: FFMA) in registers and a plain read of its bytes, and
llama.cpp's time. The gated projection stands beside the same product without its activation; layers whose inputs are
normed beside themselves without the norm, in turn. Needs torch with CUDA.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import torch

from pascalvl.plugins.bench.attention import markdown, rounded_to_int8
from pascalvl.plugins.bench.timing import COLD_BYTES, FEW_CALLS, Yardstick, open_libraries, seconds_in_turn
from pascalvl.plugins.errors import UserError
from pascalvl.plugins.kernels.library import KernelLibrary, LinearArgs
from pascalvl.plugins.ops.quant_linear.op import GATED_BLOCK, Activation, Norm
from pascalvl.plugins.terminal import shows_notices
from pascalvl.plugins.weight_format import WeightFormat

GROUP = 128
WIDTHS = (2560, 2560), (2560, 9728), (9728, 2560), (9728, 9728)
GATED_WIDTHS = 2560, 2 * 9728
EPSILON = 1e-6
"""Of the norms."""
ROWS = 1, 8, 16, 512, 4096
LLAMA_CPP = {  # microseconds of llama.cpp's Pascal kernels (commit 0c1e5709) on one H100 80GB HBM3: its q8_0, q4_0
    (512, 2560, 2560): (111, 112),
    (512, 2560, 9728): (355, 353),
    (512, 9728, 2560): (430, 429),
    (512, 9728, 9728): (1332, 1347),
    (1, 2560, 2560): (10.1, 7.1),
    (1, 2560, 9728): (20.4, 12.5),
    (1, 9728, 2560): (15.7, 10.2),
    (1, 9728, 9728): (40.5, 25.0),
}
TOLERANCE, FLOATS_TOLERANCE, NORM_TOLERANCE = 1e-6, 2e-6, 1e-3
"""FP32 sums over groups, whose own are exact; and of every product, up to 9,728 in turn. With a norm some inputs lie so
near to the middle of two codes that float32 rounds them to the other one: one in ten thousand, by a code of some 40."""


@dataclasses.dataclass
class Row:
    """One measurement."""

    weights: str
    rows: int
    in_features: int
    out_features: int
    error: float
    """Relative, against float64."""
    us: float
    arithmetic_us: float
    """Its multiply-adds at the rate of a loop of DP4A or FFMA in registers."""
    read_us: float
    """A plain read of the weights."""
    of_floor: float
    """The larger of the two, of the time."""
    tops: float
    gb_per_s: float
    llama_cpp_us: float | None
    times_baseline: float | None
    """How many times as fast as the other library's kernel."""
    without_norm_us: float | None
    """The same layer's time without its norm, in turn with it."""


_FLOATS = {32: torch.float32, 16: torch.float16}


class Layer:
    """A linear layer with random codes, halves or floats; ``norm``: RMS or none."""

    def __init__(
        self, bits: int, in_features: int, out_features: int, activation: Activation, norm: Norm = Norm.NONE
    ) -> None:
        self.norm_weight = 0.5 + torch.rand(in_features, device="cuda") if norm is Norm.RMS else None
        self.bits, self.in_features, self.out_features, self.activation = bits, in_features, out_features, activation
        self.scale: torch.Tensor | None = None
        if bits >= 16:
            self.weight = torch.randn(out_features, in_features, device="cuda", dtype=_FLOATS[bits])
            return
        self.weight = torch.randint(
            0, 256, (out_features, in_features * bits // 8), dtype=torch.uint8, device="cuda"
        ).clamp_(1 if bits == 8 else 0)
        self.scale = torch.rand(in_features // GROUP, -(-out_features // 8) * 8, device="cuda").half()

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes + (0 if self.scale is None else self.scale.nbytes)

    def dense(self) -> torch.Tensor:
        """Float64 ``[out_features, in_features]``."""
        if self.scale is None:
            return self.weight.double()
        if self.bits == 8:
            codes = self.weight.view(torch.int8).double()
        else:
            words = self.weight.unflatten(-1, (-1, 4))
            nibbles = torch.cat([words & 15, words >> 4], -1).flatten(-2).double()
            codes = nibbles - 16 * (nibbles > 7)
        return codes * self.scale[:, : self.out_features].double().T.repeat_interleave(GROUP, 1)

    def expected(self, x: torch.Tensor, dense: torch.Tensor) -> torch.Tensor:
        """The result in float64, given `dense`."""
        if self.norm_weight is not None:
            x = (
                x.double() * torch.rsqrt(x.double().square().mean(-1, keepdim=True) + EPSILON) * self.norm_weight
            ).float()
        if self.bits < 16:
            x = rounded_to_int8(x.unflatten(-1, (-1, GROUP))).flatten(-2)
        sums = x.double() @ dense.T
        if self.activation is not Activation.SILU_GATED:
            return sums
        gate, value = sums.unflatten(-1, (-1, 2, GATED_BLOCK)).unbind(-2)
        return (torch.nn.functional.silu(gate) * value).flatten(-2)

    @property
    def tolerance(self) -> float:
        """Of the relative error."""
        if self.bits >= 16:
            return FLOATS_TOLERANCE
        return TOLERANCE if self.norm_weight is None else NORM_TOLERANCE

    def __call__(self, library: KernelLibrary, x: torch.Tensor, has_norm: bool = True) -> torch.Tensor:
        """The result, or that without the layer's norm."""
        gated = self.activation is Activation.SILU_GATED
        out = torch.empty(len(x), self.out_features // 2 if gated else self.out_features, device="cuda")
        options = {}
        if has_norm and self.norm_weight is not None:
            options = {"norm": Norm.RMS, "norm_size": self.in_features, "epsilon": EPSILON}
            options["norm_weight"] = self.norm_weight.data_ptr()
        args = LinearArgs(
            x=x.data_ptr(),
            weight=self.weight.data_ptr(),
            scale=None if self.scale is None else self.scale.data_ptr(),
            out=out.data_ptr(),
            rows=len(x),
            in_features=self.in_features,
            out_features=self.out_features,
            bits=self.bits,
            group=GROUP,
            activation=self.activation,
            **options,
        )
        size = library.linear_workspace(args)
        workspace = torch.empty(size, dtype=torch.uint8, device="cuda")
        library.linear(args, workspace.data_ptr(), size, torch.cuda.current_stream().cuda_stream)
        return out


def measure(rows_at_once: tuple[int, ...], quick: bool, baseline: Path | None) -> Iterator[Row]:
    torch.zeros(1, device="cuda")
    libraries = open_libraries(baseline)
    library = libraries[0]
    rates = {}
    if not quick:
        yardstick = Yardstick()
        rates = dict.fromkeys((8, 4), 4 * yardstick.dp4a_rate()) | dict.fromkeys((32, 16), yardstick.ffma_rate())
    bits_of = {name: WeightFormat.parse(name).bits for name in ("f32", "f16", "w8", "w4")}
    plain = ((256, 132),) if quick else WIDTHS
    gated = (256, 256) if quick else GATED_WIDTHS
    cases = [(weights, *widths, Activation.NONE, Norm.NONE) for widths in plain for weights in bits_of]
    cases += [("w4", *gated, activation, Norm.NONE) for activation in (Activation.NONE, Activation.SILU_GATED)]
    cases += [("w4", *plain[0], Activation.NONE, Norm.RMS), ("w4", *gated, Activation.SILU_GATED, Norm.RMS)]
    cases += [("f16", *plain[0], Activation.NONE, Norm.RMS)]
    for weights, in_features, out_features, activation, norm in cases:
        layer = bits_of[weights], in_features, out_features, activation, norm
        first = Layer(*layer)
        dense = first.dense()
        layers = [first]
        if not quick:
            layers += [Layer(*layer) for _ in range(min(255, COLD_BYTES // first.nbytes + 1))]
        for rows in rows_at_once:
            x = torch.randn(rows, in_features, device="cuda")
            expected = first.expected(x, dense)
            error = ((first(library, x).double() - expected).norm() / expected.norm()).item()
            kind = f"{weights} gated" if activation is Activation.SILU_GATED else weights
            kind = f"norm, {kind}" if norm is Norm.RMS else kind
            name = f"{kind} {rows}x{in_features}->{out_features}"
            if not error <= first.tolerance:
                raise UserError(f"{name} is off by {error:.1e} of its norm; expected at most {first.tolerance:.1e}.")
            if quick:
                continue
            del expected
            timed = layers if rows < 64 else layers[:3]
            variants = [[partial(layer, z, x) for layer in timed] for z in libraries]
            if norm is Norm.RMS:
                variants.append([partial(layer, library, x, has_norm=False) for layer in timed])
            times = [1e6 * time for time in seconds_in_turn(variants, FEW_CALLS if rows < 64 else 1)]
            without = times.pop() if norm is Norm.RMS else None
            us, *others = times
            multiply_adds = rows * in_features * out_features
            arithmetic_us = 1e6 * multiply_adds / rates[first.bits]
            read_us = 1e6 * first.nbytes / yardstick.read_rate(first.nbytes)
            q8_0, q4_0 = LLAMA_CPP.get((rows, in_features, out_features), (None, None))
            yield Row(
                kind,
                rows,
                in_features,
                out_features,
                error,
                us,
                arithmetic_us,
                read_us,
                max(arithmetic_us, read_us) / us,
                2 * multiply_adds / us / 1e6,
                first.nbytes / us / 1e3,
                {8: q8_0, 4: q4_0}.get(first.bits),
                others[0] / us if others else None,
                without,
            )
            if shows_notices():
                print(f"{name}: error {error:.1e}, {us:.1f} us", file=sys.stderr)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--quick", action="store_true", help="only check small shapes, for compute-sanitizer")
    parser.add_argument("--json", type=Path, help="write the measurements to this file")
    parser.add_argument("--baseline", type=Path, help="compare with this other build of the kernels' library")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("there is no CUDA GPU that torch can use here")
    try:
        rows = [dataclasses.asdict(row) for row in measure(tuple(options.rows), options.quick, options.baseline)]
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if rows:
        print(f"{torch.cuda.get_device_name()}\n\n{markdown(rows)}")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

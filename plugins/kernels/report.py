"""Writes `sm61.md`, what the kernels take of an SM61: ``python -m pascalvl.plugins.kernels.report``."""

from __future__ import annotations

from pathlib import Path

from pascalvl.plugins.kernels.build import Resources, resources

TABLE = Path(__file__).parent / "sm61.md"
REGISTERS, REGISTER_UNIT = 65536, 256  # of an SM; a warp's registers are allocated in such units
SHARED_BYTES, SHARED_UNIT = 96 << 10, 256
WARPS, BLOCKS, WARP = 64, 32, 32


def resident_warps(use: Resources) -> int:
    """Warps of a kernel that an SM holds at once, by CUDA's occupancy rules for compute capability 6.1."""
    warps_of_block = use.threads // WARP
    registers_of_warp = -(-use.registers * WARP // REGISTER_UNIT) * REGISTER_UNIT
    by_registers = REGISTERS // registers_of_warp // warps_of_block
    by_shared = SHARED_BYTES // (-(-use.shared // SHARED_UNIT) * SHARED_UNIT) if use.shared else BLOCKS
    return min(by_registers, by_shared, BLOCKS, WARPS // warps_of_block) * warps_of_block


def table(kernels: dict[str, Resources]) -> str:
    """What `resources` found, as Markdown, kernels by name."""
    lines = [
        "# What the kernels take of an SM61",
        "",
        "By ptxas for sm_61; the inner loops' FFMA and DP4A a load from shared memory by the PTX. Written by",
        "`python -m pascalvl.plugins.kernels.report`, checked by the tests.",
        "",
        "| kernel | registers | bytes spilled | shared memory, bytes | resident warps of 64 | FFMA and DP4A a load |",
        "|---|---|---|---|---|---|",
    ]
    for kernel, use in sorted(kernels.items()):
        ratio = f"{use.multiply_adds_per_load:.1f}" if use.multiply_adds_per_load else ""
        lines.append(
            f"| {kernel} | {use.registers} | {use.spills} | {use.shared:,} | {resident_warps(use)} | {ratio} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    TABLE.write_text(table(resources()), encoding="utf-8")

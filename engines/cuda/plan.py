"""A graph as kernel launches over a fixed layout of memory: what a build writes and the runtime reads."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

ALIGNMENT = 256
"""Of what a tensor takes for each unit of its plan's dimension."""


@dataclasses.dataclass(frozen=True)
class Matrix:
    """A tensor of floats, ``[rows, width]``."""

    dimension: str
    """The one, of `pascalvl.plugins.bindings`, that says how many rows there are ..."""
    per_row: int
    """... one for each so many of it."""
    width: int
    part_of: tuple[str, int] | None = None
    """The tensor ``[n, rows, width]`` that this is number so and so of."""
    offset: int | None = None
    """Where it lies among intermediate results, in bytes for each unit of the plan's dimension; None: it is given, or a
    part of what is."""

    def rows(self, sizes: Mapping[str, int]) -> int:
        return sizes[self.dimension] // self.per_row

    def nbytes(self, sizes: Mapping[str, int]) -> int:
        return 4 * self.rows(sizes) * self.width

    @property
    def unit(self) -> int:
        """Bytes for each unit of the plan's dimension."""
        return -(-4 * self.width // (self.per_row * ALIGNMENT)) * ALIGNMENT


@dataclasses.dataclass(frozen=True)
class Node:
    """A launch of one of the library's calls: ``linear``, ``attention``, ``gather_rows`` or ``add_to``."""

    call: str
    tensors: dict[str, str]
    """By the names of the call's arguments."""
    attributes: dict[str, int | float | str] = dataclasses.field(default_factory=dict)
    """Of the op."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """One graph."""

    dimension: str
    """What intermediate results grow with."""
    unit: int
    """Bytes that they take for each unit of it."""
    nodes: list[Node]
    """In the order in which they run."""
    matrices: dict[str, Matrix]
    """Floats that nodes read or write, but the weights."""
    weights: dict[str, int]
    """By name: where they start in the graph's file of weights."""

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Plan:
        matrices = {
            name: Matrix(**{**fields, "part_of": tuple(fields["part_of"]) if fields["part_of"] else None})
            for name, fields in data["matrices"].items()
        }
        return cls(**{**data, "nodes": [Node(**node) for node in data["nodes"]], "matrices": matrices})


def laid_out(units: Sequence[int], lifetimes: Sequence[tuple[int, int]]) -> tuple[list[int], int]:
    """Offsets of tensors in one block, so that none overlaps another that lives at the same time; and the block's size.

    The largest first, each at the lowest place that is free for as long as it lives.

    Args:
        units: sizes.
        lifetimes: numbers of the first and last nodes that touch each.
    """
    offsets = [0] * len(units)
    placed: list[int] = []
    for number in sorted(range(len(units)), key=lambda number: -units[number]):
        first, last = lifetimes[number]
        offset = 0
        for other in sorted(placed, key=lambda other: offsets[other]):
            meets = lifetimes[other][0] <= last and first <= lifetimes[other][1]
            if meets and offsets[other] < offset + units[number] and offset < offsets[other] + units[other]:
                offset = offsets[other] + units[other]
        offsets[number] = offset
        placed.append(number)
    return offsets, max((offset + unit for offset, unit in zip(offsets, units, strict=True)), default=0)

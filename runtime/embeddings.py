"""Tables of embeddings, mapped from their files."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

_AT_ONCE = 16
"""Rows of which a copy is made on the way: little enough that it stays in the CPU's caches, and in memory it has."""


@dataclasses.dataclass(frozen=True, eq=False)
class EmbeddingRows:
    """Rows of a table, which are read where they are needed, see `pascalvl.engines.engine.Embeds`."""

    table: EmbeddingTable
    rows: Sequence[int] | np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, to: np.ndarray) -> None:
        self.table.read(self.rows, to)


class EmbeddingTable:
    """A table ``[n, hidden_size]``: indexing with numbers of rows, or a slice of them, gives float32."""

    def __init__(self, path: Path, dtype: str, shape: Sequence[int]) -> None:
        self._is_bfloat16 = dtype == "bfloat16"
        self._rows = np.asarray(np.memmap(path, np.uint16 if self._is_bfloat16 else dtype, "r", shape=tuple(shape)))

    def __getitem__(self, rows: Sequence[int] | np.ndarray | slice) -> np.ndarray:
        count = len(range(*rows.indices(len(self._rows)))) if isinstance(rows, slice) else len(rows)
        return self.read(rows, np.empty((count, self._rows.shape[1]), np.float32))

    def read(self, rows: Sequence[int] | np.ndarray | slice, to: np.ndarray) -> np.ndarray:
        """Write rows to an array of float32, as many as there are of them, and return it."""
        numbers = np.arange(len(self._rows))[rows] if isinstance(rows, slice) else rows
        for start in range(0, len(numbers), _AT_ONCE):
            part = slice(start, start + _AT_ONCE)
            found = self._rows[numbers[part]]
            if self._is_bfloat16:  # the upper half of a float32
                np.left_shift(found, 16, out=to[part].view(np.uint32), dtype=np.uint32)
            else:
                to[part] = found
        return to

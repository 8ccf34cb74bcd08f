"""Tables of embeddings, mapped from their files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np


class EmbeddingTable:
    """A table ``[n, hidden_size]``: indexing with numbers of rows, or a slice of them, gives float32."""

    def __init__(self, path: Path, dtype: str, shape: Sequence[int]) -> None:
        self._is_bfloat16 = dtype == "bfloat16"
        self._rows = np.asarray(np.memmap(path, np.uint16 if self._is_bfloat16 else dtype, "r", shape=tuple(shape)))

    def __getitem__(self, rows: Sequence[int] | np.ndarray | slice) -> np.ndarray:
        found = self._rows[rows]
        if self._is_bfloat16:  # the upper half of a float32
            return (found.astype(np.uint32) << 16).view(np.float32)
        return found.astype(np.float32)

"""A second loss for the vision encoder, in training only: tell what stands behind each patch.

Answers alone teach the encoder slowly, a few words a picture. Every patch, though, lies in a cell whose content and
place the renderer knows. Two linear heads read them from the last block's patches and from the merged tokens that the
text model sees; they are thrown away after training.
"""

from __future__ import annotations

import functools
import itertools

import numpy as np
import torch
from torch import nn

from tests.nano.checkpoint import MERGE_SIZE
from tests.nano.scenes import COLOURS, EMPTY, GLYPHS, MAX_COLS, MAX_ROWS, Drawing

CLASSES = (len(GLYPHS) + 1, len(COLOURS) + 1, MAX_ROWS, MAX_COLS, MAX_ROWS, MAX_COLS)
"""Glyph or empty, colour or none, row, column, number of rows, number of columns."""


def merged_order(table: np.ndarray) -> np.ndarray:
    """[n, rows, cols] to [n, patches], the four patches of a visual token together, as the encoder has them."""
    n, rows, cols = table.shape
    blocks = table.reshape(n, rows // MERGE_SIZE, MERGE_SIZE, cols // MERGE_SIZE, MERGE_SIZE)
    return blocks.transpose(0, 1, 3, 2, 4).reshape(n, -1)


def patch_labels(drawing: Drawing, rows: int, cols: int) -> np.ndarray:
    """What stands behind each patch of pictures of rows x cols patches, in CLASSES: uint8 [n, patches, 6]."""
    grid_rows, grid_cols = drawing.grid[:, 0, None, None], drawing.grid[:, 1, None, None]
    row = ((np.arange(rows) + 0.5) / rows)[None, :, None] * grid_rows
    col = ((np.arange(cols) + 0.5) / cols)[None, None, :] * grid_cols
    row, col = np.broadcast_arrays(row.astype(np.int64), col.astype(np.int64))
    row, col = merged_order(row), merged_order(col)
    cell = row * drawing.grid[:, 1:] + col
    glyph = np.take_along_axis(drawing.glyph, cell, 1)
    colour = np.where(glyph == EMPTY, len(COLOURS), np.take_along_axis(drawing.colour, cell, 1))
    glyph = np.where(glyph == EMPTY, len(GLYPHS), glyph)
    number = np.broadcast_to(drawing.grid[:, None, :] - 1, (*cell.shape, 2))
    return np.concatenate([np.stack([glyph, colour, row, col], -1), number], -1).astype(np.uint8)


class PatchHeads(nn.Module):
    """Linear readers of CLASSES from the last block's patches and from the merged tokens, four patches a token."""

    def __init__(self, vision_hidden: int, text_hidden: int) -> None:
        super().__init__()
        self.patches = nn.Linear(vision_hidden, sum(CLASSES))
        self.tokens = nn.Linear(text_hidden, MERGE_SIZE**2 * sum(CLASSES))

    def forward(self, patches: torch.Tensor, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy of both heads. patches [all patches, hidden], tokens [all tokens, hidden], labels int64
        [all patches, 6]."""
        logits = torch.cat([self.patches(patches), self.tokens(tokens).view(-1, sum(CLASSES))])
        twice = labels.repeat(2, 1).unbind(1)
        parts = zip(logits.float().split(CLASSES, -1), twice, strict=True)
        return functools.reduce(torch.add, itertools.starmap(nn.functional.cross_entropy, parts)) / len(CLASSES)

"""Weights that a checkpoint holds in 8 bits, float8 or int8, with scales beside them; read as what they stand for.

An element of a weight ``[outputs, inputs]`` is its code times the scale of its block: one for the whole weight, for
each output, for each output and group of inputs, or for each tile of outputs and inputs (128 x 128 in the format of
DeepSeek-V3, arXiv:2412.19437, section 3.3, and of Qwen's own FP8 checkpoints). The last blocks may be smaller.
"""

from __future__ import annotations

import dataclasses
from typing import Protocol

import torch

from pascalvl.export.stored_codes import TensorSource
from pascalvl.plugins.errors import UserError

FLOAT8, INT8 = "F8_E4M3", "I8"
"""Codes, by what safetensors calls their types."""
_SCALE_TYPES = ("F32", "F16", "BF16")


class TypedSource(TensorSource, Protocol):
    """A checkpoint's tensors, of which it tells the types too."""

    def stored_type(self, name: str) -> str: ...


@dataclasses.dataclass(frozen=True)
class Block:
    """Elements of a weight that share a scale; None: all outputs, or inputs, that there are."""

    outputs: int | None
    inputs: int | None

    def grid(self, shape: list[int]) -> list[int]:
        """Shape of the scales of a weight of this shape."""
        return [
            1 if size is None else -(-n // size) for n, size in zip(shape, (self.outputs, self.inputs), strict=True)
        ]


@dataclasses.dataclass(frozen=True)
class ScaledWeights:
    """The weights of a checkpoint that are in 8 bits.

    Attributes:
        codes: the types that they may have; a weight of another type is no code.
        scale: last part of the scales' names.
        blocks: those that a weight may have.
    """

    codes: tuple[str, ...]
    scale: str
    blocks: tuple[Block, ...]
    source: TypedSource

    def has(self, name: str) -> bool:
        """Whether a stored tensor of this name is a weight in codes."""
        return name.endswith(".weight") and self.source.stored_type(name) in self.codes

    def has_whole_blocks(self, shape: list[int]) -> bool:
        """Whether a weight of this shape has no smaller block at its end, whichever of the kinds of blocks it has."""
        return all(
            size is None or n % size == 0
            for block in self.blocks
            for n, size in zip(shape, (block.outputs, block.inputs), strict=True)
        )

    def scale_name(self, name: str) -> str:
        """Of the tensor with a weight's scales."""
        return f"{name.removesuffix('weight')}{self.scale}"

    def check(self, name: str) -> None:
        """Raise `UserError` for a weight whose scales are missing, do not fit it, or are not finite."""
        self._scales(name)

    def read(self, name: str, codes: torch.Tensor) -> torch.Tensor:
        """A weight in float32, each element rounded once, of its stored tensor ``codes``; raises like `check`."""
        block, scales = self._scales(name)
        weight = codes.float()
        if block.inputs is not None:
            scales = scales.repeat_interleave(block.inputs, 1)[:, : weight.shape[1]]
        if block.outputs in (None, 1):
            return weight.mul_(scales)
        for rows, row in zip(weight.split(block.outputs), scales, strict=True):
            rows.mul_(row)
        return weight

    def _scales(self, name: str) -> tuple[Block, torch.Tensor]:
        """The kind of a weight's blocks, and its scales in float32, one a block."""
        scale_name, shape = self.scale_name(name), self.source.shape(name)
        if scale_name not in self.source:
            raise UserError(f"the checkpoint lacks the tensor {scale_name}: download the model again.")
        if len(shape) != 2:
            raise UserError(f"tensor {name} of 8 bits has shape {shape}: expected outputs and inputs.")
        if (kind := self.source.stored_type(scale_name)) not in _SCALE_TYPES:
            raise UserError(
                f"tensor {scale_name} has type {kind}, expected {', '.join(_SCALE_TYPES)}: give the checkpoint with "
                "the original weights."
            )
        found = self.source.shape(scale_name)
        grids = [block.grid(shape) for block in self.blocks]
        grid = [1, 1] if found in ([], [1]) else found  # the one of a whole weight
        if grid not in grids:
            raise UserError(
                f"tensor {scale_name} has shape {found}, expected {' or '.join(map(str, grids))} for a weight of "
                f"shape {shape}: the files belong to different models."
            )
        scales = self.source.tensor(scale_name).float().reshape(grid)
        if not scales.isfinite().all():
            raise UserError(f"tensor {scale_name} has scales that are not finite: download the model again.")
        return self.blocks[grids.index(grid)], scales

"""What can be chosen when TensorRT's engines are built. Apart from the backend, which needs TensorRT to be imported."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from pascalvl.plugins.errors import UserError


@dataclasses.dataclass(frozen=True)
class BuildOptions:
    """Options of backend ``tensorrt``; raises `UserError` for values out of range."""

    prefill_chunk: int = 512
    """Tokens of a prompt that one call of the decoder takes at most; longer prompts take several calls. TensorRT tunes
    its kernels for this number, and the memory for intermediate results grows with it."""
    max_pixels: int = 1_048_576
    """Area of the largest picture, or video frames together, that one call of the vision encoder takes. The memory for
    intermediate results grows with it; a quarter of it is what TensorRT tunes for."""
    max_context: int = 32_768
    """Tokens of prompt and answer together at most; no more than the model was made for."""
    timing_cache: Path | None = None
    """File that keeps the times of kernels for later builds; None: one in the user's cache folder, a file for each
    version of TensorRT and model of card."""
    tactic_sources: tuple[str, ...] | None = None
    """Names of `tensorrt.TacticSource`, the libraries whose kernels are tried; None: TensorRT's choice."""
    preview_features: tuple[str, ...] | None = None
    """Names of `tensorrt.PreviewFeature` to enable, all others being disabled; None: `default_preview_features`."""

    def __post_init__(self) -> None:
        for name in ("prefill_chunk", "max_pixels", "max_context"):
            if (value := getattr(self, name)) < 1:
                raise UserError(f"{name} is out of range: expected at least 1, found {value}.")

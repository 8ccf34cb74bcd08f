"""Engine bundle to text: preprocessing, the external KV cache, generation, the command line."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__all__ = ["FinishReason", "Generation", "Grammar", "Request", "SamplingParams", "VisionLanguageModel"]

_MODULES = {
    "FinishReason": "generation",
    "Generation": "generation",
    "Grammar": "grammar",
    "Request": "model",
    "SamplingParams": "sampling",
    "VisionLanguageModel": "model",
}


if TYPE_CHECKING:
    from pascalvl.runtime.generation import FinishReason, Generation
    from pascalvl.runtime.grammar import Grammar
    from pascalvl.runtime.model import Request, VisionLanguageModel
    from pascalvl.runtime.sampling import SamplingParams
else:

    def __getattr__(name: str) -> Any:
        # Not before it is used: the command line starts at once, and commands other than run need less.
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)

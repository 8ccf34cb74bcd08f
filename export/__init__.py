"""Qwen3-VL checkpoint to ONNX model bundle."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

__all__ = ["export_checkpoint"]

# huggingface_hub tells how it is used in the headers of its requests, and fetches a list for that, unless this is set
# before its first import. Whatever imports it here is a module below this package, or transformers, which these import.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")


if TYPE_CHECKING:
    from pascalvl.export.exporter import export_checkpoint
else:

    def __getattr__(name: str) -> Any:
        # Not before it is used: the op and the modules need less than an export.
        if name != "export_checkpoint":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from pascalvl.export.exporter import export_checkpoint

        return export_checkpoint

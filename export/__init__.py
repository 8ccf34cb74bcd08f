"""Qwen3-VL checkpoint to ONNX model bundle."""

from pascalvl.export.exporter import export_checkpoint

__all__ = ["export_checkpoint"]

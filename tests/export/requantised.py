"""The nano checkpoint with its decoder's linear layers stored in another way, and models of what they stand for."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3VLForConditionalGeneration

Stored = Callable[[str, np.ndarray], tuple[dict[str, torch.Tensor], np.ndarray]]
"""Of a weight's name and values in float64: the tensors that take its place, by name, and what they stand for."""


def write(nano: Path, directory: Path, quantization: Mapping[str, Any], stored: Stored) -> dict[str, np.ndarray]:
    """Write it; returns, by the weights' names, what they stand for, in float64."""
    shutil.copytree(nano, directory)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
    dense, weight_map = {}, {}
    for shard in sorted(directory.glob("*.safetensors")):
        tensors = {}
        for name, tensor in load_file(shard).items():
            parts = {name: tensor}
            if "layers." in name and name.endswith("proj.weight"):
                parts, dense[name] = stored(name, tensor.double().numpy())
            tensors |= parts
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, shard)
        weight_map |= dict.fromkeys(tensors, shard.name)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return dense


def reference(nano: Path, dense: Mapping[str, np.ndarray]) -> Qwen3VLForConditionalGeneration:
    """Hugging Face's model with the weights that codes stand for."""
    model = Qwen3VLForConditionalGeneration.from_pretrained(nano, dtype=torch.float32).eval()
    model.load_state_dict({name: torch.from_numpy(x).float() for name, x in dense.items()}, strict=False)
    return model

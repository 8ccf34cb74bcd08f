"""The nano checkpoint with its decoder's linear layers in 8 bits, stored as others' quantisers do.

Codes are read back bit by bit, by the format's definition, and scaled block by block: nothing is shared with what reads
them.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from tests.export import requantised


def compressed(form: str, kind: str, **scheme: object) -> dict:
    inputs = {"num_bits": 8, "type": kind, "symmetric": True, "strategy": "token", "dynamic": True, "observer": None}
    weights = {"num_bits": 8, "type": kind, "symmetric": True, "dynamic": False, "group_size": None, **scheme}
    group = {"targets": ["Linear"], "input_activations": inputs, "output_activations": None, "weights": weights}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head", "re:.*visual.*"],
        "kv_cache_scheme": None,
        "sparsity_config": {"format": "dense"},
        "transform_config": {},
        "quantization_status": "compressed",
    }


FP8 = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
    "modules_to_not_convert": ["lm_head", "model.visual"],
}
CONFIGS = {
    "fp8": FP8,
    "fp8 in partial blocks": {**FP8, "weight_block_size": [100, 48]},
    "float8 by output": compressed("float-quantized", "float", strategy="channel"),
    "float8 by weight": compressed("float-quantized", "float", strategy="tensor"),
    "float8 by tile": compressed("float-quantized", "float", strategy="block", block_structure=[128, 128]),
    "int8 by output": compressed("int-quantized", "int", strategy="channel"),
    "int8 by group": compressed("naive-quantized", "int", strategy="group", group_size=96),
}
BLOCKS = dict(
    zip(CONFIGS, [(128, 128), (100, 48), (1, None), (None, None), (128, 128), (1, None), (1, 96)], strict=True)
)
SCALE_TYPES = {"fp8 in partial blocks": torch.bfloat16, "float8 by output": torch.bfloat16, "int8 by group": torch.half}


def write(nano: Path, directory: Path, kind: str) -> dict[str, np.ndarray]:
    """Write it; returns, by the names of the weights that are in 8 bits, what they stand for, in float64."""

    def stored(name: str, weight: np.ndarray) -> tuple[dict[str, torch.Tensor], np.ndarray]:
        codes, scale, values = quantise(weight, kind)
        return {name: codes, name + "_scale" + "_inv" * kind.startswith("fp8"): scale}, values

    return requantised.write(nano, directory, CONFIGS[kind], stored)


def quantise(weight: np.ndarray, kind: str) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
    """Codes, scales, and what they stand for in float64."""
    rows, columns = (size or whole for size, whole in zip(BLOCKS[kind], weight.shape, strict=True))
    starts = [(i, j) for i in range(0, len(weight), rows) for j in range(0, weight.shape[1], columns)]
    tiles = [np.abs(weight[i : i + rows, j : j + columns]).max() for i, j in starts]
    grid = -(-len(weight) // rows), -(-weight.shape[1] // columns)
    most = 127 if kind.startswith("int8") else 448
    scale = (torch.tensor(tiles).double() / most).reshape(grid).to(SCALE_TYPES.get(kind, torch.float32))
    steps = np.empty_like(weight)
    for (i, j), step in zip(starts, scale.double().numpy().ravel(), strict=True):
        steps[i : i + rows, j : j + columns] = step
    exact = torch.from_numpy(weight / steps).clamp(-most, most)
    codes = exact.round().to(torch.int8) if most == 127 else exact.to(torch.float8_e4m3fn)
    values = codes.numpy().astype(np.float64) if most == 127 else e4m3(codes.view(torch.uint8).numpy())
    return codes, scale.reshape(1) if grid == (1, 1) else scale, values * steps


def e4m3(codes: np.ndarray) -> np.ndarray:
    """Bytes as numbers: a sign, 4 bits of exponent, 3 of mantissa (arXiv:2209.05433)."""
    sign, exponent, mantissa = np.where(codes >> 7, -1.0, 1.0), codes >> 3 & 15, codes & 7
    return sign * np.where(exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (exponent - 7.0))

"""The nano checkpoint with its decoder's linear layers in codes of 4 bits, stored as others' quantisers do.

The packing is written from the formats' descriptions, nibble by nibble; none of it is shared with what reads it.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from tests.export import requantised

AWQ_ORDER = 0, 2, 4, 6, 1, 3, 5, 7
"""Which of eight outputs a word's nibbles are, from the lowest on."""
CONFIGS = {
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm", "zero_point": True},
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": False},
    "gptq symmetric": {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True},
    "gptq v2": {"quant_method": "gptq", "bits": 4, "group_size": 32, "checkpoint_format": "gptq_v2", "sym": False},
    "packed": {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {
            "group_0": {
                "input_activations": None,
                "targets": ["Linear"],
                "weights": {"num_bits": 4, "group_size": 32, "symmetric": True, "strategy": "group", "type": "int"},
            }
        },
    },
}
CONFIGS["packed with zeros"] = CONFIGS["packed"]
SYMMETRIC = "gptq symmetric", "packed"


def group_of(kind: str) -> int:
    return 32 if kind in ("gptq v2", "packed", "packed with zeros") else 128


def write(nano: Path, directory: Path, kind: str) -> dict[str, np.ndarray]:
    """Write it; returns, by the names of the weights that are in codes, what they stand for, in float64."""
    group = group_of(kind)

    def stored(name: str, weight: np.ndarray) -> tuple[dict[str, torch.Tensor], np.ndarray]:
        code, zero, scale = quantise(weight, group, kind)
        layer = name.removesuffix(".weight")
        tensors = {f"{layer}.{part}": tensor for part, tensor in stored_tensors(kind, code, zero, scale).items()}
        return tensors, (code - zero.repeat(group, 1)) * scale.double().numpy().repeat(group, 1)

    return requantised.write(nano, directory, CONFIGS[kind], stored)


def quantise(weight: np.ndarray, group: int, kind: str) -> tuple[np.ndarray, np.ndarray, torch.Tensor]:
    """Codes and zeros of 0 to 15, and scales: ``[outputs, inputs]``, and ``[outputs, groups]``."""
    groups = weight.reshape(len(weight), -1, group)
    most, least = groups.max(-1), groups.min(-1)
    exact = np.maximum(most, -least) / 7 if kind in SYMMETRIC else (most - least) / 15
    scale = torch.from_numpy(exact).to(torch.bfloat16 if kind.startswith("packed") else torch.float16)
    step = scale.double().numpy()
    zero = np.full(step.shape, 8) if kind in SYMMETRIC else np.clip(np.rint(-least / step), 0, 15).astype(np.int64)
    code = np.clip(np.rint(groups / step[..., None]) + zero[..., None], 0, 15)
    return code.astype(np.int64).reshape(weight.shape), zero, scale


def stored_tensors(kind: str, code: np.ndarray, zero: np.ndarray, scale: torch.Tensor) -> dict[str, torch.Tensor]:
    """A layer's tensors, by the last parts of their names."""
    outputs, inputs = code.shape
    if kind.startswith("packed"):
        tensors = {
            "weight_packed": words(code, tuple(range(8))),
            "weight_scale": scale,
            "weight_shape": torch.tensor([outputs, inputs]),
        }
        return tensors if kind in SYMMETRIC else {**tensors, "weight_zero_point": words(zero.T, tuple(range(8))).T}
    order = AWQ_ORDER if kind == "awq" else tuple(range(8))
    tensors = {"qzeros": words(zero.T, order), "scales": scale.T}
    if kind in ("gptq", "gptq symmetric"):  # less one each, and borrowed from the next where one is 0
        tensors["qzeros"] = (tensors["qzeros"].long() - 0x11111111).int()
    if kind == "awq":
        return {**tensors, "qweight": words(code.T, order)}
    group = torch.arange(inputs, dtype=torch.int32) // (inputs // zero.shape[1])
    return {**tensors, "qweight": words(code, order).T, "g_idx": group}


def words(rows: np.ndarray, order: tuple[int, ...]) -> torch.Tensor:
    """Rows of numbers of 0 to 15, eight to an int32."""
    packed = np.zeros((len(rows), rows.shape[1] // 8), np.int64)
    for nibble, element in enumerate(order):
        packed |= rows[:, element::8] << 4 * nibble
    return torch.from_numpy(packed.astype(np.uint32).view(np.int32))

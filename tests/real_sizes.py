"""The published Qwen3-VL sizes, and checkpoints of them with random weights: `python -m tests.real_sizes 2B DIR`."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

MROPE = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20], "mrope_interleaved": True}
_SMALL_VISION = {"hidden_size": 1024, "intermediate_size": 4096, "depth": 24, "deepstack_visual_indexes": [5, 11, 17]}
_LARGE_VISION = {"hidden_size": 1152, "intermediate_size": 4304, "depth": 27, "deepstack_visual_indexes": [8, 16, 24]}
SIZES = {
    "2B": ({"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16},
           _SMALL_VISION, True),
    "4B": ({"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32},
           _SMALL_VISION, True),
    "8B": ({"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32},
           _LARGE_VISION, False),
    "32B": ({"hidden_size": 5120, "intermediate_size": 25600, "num_hidden_layers": 64, "num_attention_heads": 64},
            _LARGE_VISION, False),
}  # fmt: skip
HOST_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "generation_config.json",
)


def config(size: str, text: dict | None = None, vision: dict | None = None) -> Qwen3VLConfig:
    """The config of a published size, with fields of its text and vision parts replaced."""
    text_size, vision_size, tied = SIZES[size]
    shared = {"num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 262144, "rope_parameters": MROPE}
    return Qwen3VLConfig(
        text_config={**text_size, **shared, **(text or {})},
        vision_config={**vision_size, "num_heads": 16, "out_hidden_size": text_size["hidden_size"], **(vision or {})},
        tie_word_embeddings=tied,
    )


def write_random_checkpoint(model_config: Qwen3VLConfig, directory: Path, host_files: Path) -> None:
    """Write a bfloat16 checkpoint with random weights and the tokenizer and processor files of ``host_files``."""
    of_tokenizer = Qwen3VLConfig.from_pretrained(host_files)
    for name in ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"):
        setattr(model_config, name, getattr(of_tokenizer, name))
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        Qwen3VLForConditionalGeneration(model_config).save_pretrained(directory)
    finally:
        torch.set_default_dtype(torch.float32)
    for name in HOST_FILES:
        shutil.copyfile(host_files / name, directory / name)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("size", choices=SIZES)
    parser.add_argument("directory", type=Path)
    arguments = parser.parse_args()
    nano = Path(__file__).parent / "nano" / "checkpoint"
    write_random_checkpoint(config(arguments.size), arguments.directory, nano)

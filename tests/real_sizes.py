"""Checkpoints of the published sizes with random weights: `python -m tests.real_sizes 2B DIR`."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from pascalvl.export.published_sizes import SIZES, config

HOST_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "generation_config.json",
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

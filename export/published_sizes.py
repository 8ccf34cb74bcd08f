"""The published Qwen3-VL sizes: shapes of the dense models, their authors' choice of tokens and sizes of pictures."""

from __future__ import annotations

from typing import Any

from transformers import Qwen3VLConfig

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
"""By name: what the text config and the vision config set, and whether the lm_head is the embeddings."""
SAMPLING = {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.8}
"""Of the Instruct models' generation configs."""
PICTURES = {"size": {"shortest_edge": 256**2, "longest_edge": 4096**2}}
"""Of their processors' files: least and most pixels."""


def config(size: str, text: dict[str, Any] | None = None, vision: dict[str, Any] | None = None) -> Qwen3VLConfig:
    """The config of a published size, with fields of its text and vision parts replaced."""
    text_size, vision_size, tied = SIZES[size]
    shared = {"num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 262144, "rope_parameters": MROPE}
    return Qwen3VLConfig(
        text_config={**text_size, **shared, **(text or {})},
        vision_config={**vision_size, "num_heads": 16, "out_hidden_size": text_size["hidden_size"], **(vision or {})},
        tie_word_embeddings=tied,
    )

"""The nano tokenizer: byte-level BPE with Qwen's splitting rules and special tokens, trained on the tasks' own text."""

from __future__ import annotations

import random

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from tests.nano import tasks

VOCAB_SIZE = 2048
"""Rows of the embedding table. The tokenizer fills fewer, as the real Qwen's does."""
BPE_SIZE = 2000
SPLIT = "|".join(
    (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",  # English contractions
        r"[^\r\n\p{L}\p{N}]?\p{L}+",  # a word, with the one character before it unless that ends a line
        r"\p{N}",  # digits one at a time
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",  # a run of marks, with a space before it and line ends after it
        r"\s*[\r\n]+",  # line ends with the space before them
        r"\s+(?!\S)",  # space, all but the last of it where a word follows
        r"\s+",
    )
)
"""How Qwen2's tokenizer splits text before the merges (documented in its Hugging Face tokenizer class)."""
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
PLAIN_TOKENS = ("<think>", "</think>")
"""Added tokens that decoding keeps."""


def corpus(seed: int = 0) -> list[str]:
    """Text to learn merges from: every task's messages, word lists and English sentences. Copied scripts stay bytes."""
    rng = random.Random(seed)
    lines = list(tasks.english()) * 4
    words = tasks.KEYS + tasks.WORD_VALUES + tasks.ADJECTIVES + tasks.PEOPLE + tasks.VERBS
    lines += [f"{word} {word}" for word in words] * 40
    options = {
        "picture": {"sizes": [(256, 256)], "tokens": 100},
        "pictures": {"sizes": [(128, 128)] * 3, "tokens": 100},
        "dialogue": {"sizes": [(128, 128)] * 2},
        "video": {"sizes": [(128, 128)], "tokens": 100},
        "recall": {"sizes": [], "turns": 2},
    }
    for name, option in options.items():
        for _ in range(1500):
            talk = tasks.TASKS[name].make(rng, held_out=False, **option)
            for message in talk.messages:
                content = message["content"]
                text = content if isinstance(content, str) else " ".join(part.get("text", "") for part in content)
                lines += [f"{message['role']}\n", text]
    lines += [f"<{i / 10:.1f} seconds>" for i in range(100)]
    lines += [text for questions, answer in tasks.CHAT for text in (*questions, answer)] * 20
    return lines


def train() -> Tokenizer:
    """Trains the tokenizer. The same seed and library version give the same file."""
    tokenizer = Tokenizer(BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=BPE_SIZE,
        min_frequency=2,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in PLAIN_TOKENS])
    return tokenizer

"""Log probabilities in the two forms that OpenAI has for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pascalvl.runtime.generation import TokenLogprobs
from pascalvl.runtime.tokenizer import Tokenizer

_LEAST = -9999.0
"""In the place of minus infinity, which JSON does not have."""


def of_chat(tokens: Sequence[TokenLogprobs], tokenizer: Tokenizer) -> dict[str, Any]:
    """A choice's ``logprobs`` of chat completions."""
    return {
        "content": [
            {
                **_entry(token.token_id, token.logprob, tokenizer),
                "top_logprobs": [_entry(*likely, tokenizer) for likely in token.top],
            }
            for token in tokens
        ],
        "refusal": None,
    }


def of_completion(tokens: Sequence[TokenLogprobs], tokenizer: Tokenizer, offset: int) -> dict[str, Any]:
    """A choice's ``logprobs`` of completions, of which the text is so long already."""
    texts = [_text(token.token_id, tokenizer) for token in tokens]
    offsets = []
    for text in texts:
        offsets.append(offset)
        offset += len(text)
    return {
        "tokens": texts,
        "token_logprobs": [max(token.logprob, _LEAST) for token in tokens],
        "top_logprobs": [
            {_text(number, tokenizer): max(logprob, _LEAST) for number, logprob in token.top} for token in tokens
        ],
        "text_offset": offsets,
    }


def _entry(token_id: int, logprob: float, tokenizer: Tokenizer) -> dict[str, Any]:
    content = tokenizer.token_bytes(token_id)
    return {
        "token": content.decode(errors="replace"),
        "logprob": max(logprob, _LEAST),
        "bytes": list(content),
    }


def _text(token_id: int, tokenizer: Tokenizer) -> str:
    return tokenizer.token_bytes(token_id).decode(errors="replace")

"""Text to token ids and back."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers.decoders import DecodeStream

from pascalvl.plugins.errors import UserError


class Tokenizer:
    """A checkpoint's ``tokenizer.json``.

    Raises:
        UserError: the file is missing or is no tokenizer.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise UserError(f"no tokenizer at {path}: download the model again and export it.")
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise UserError(
                f"{path} is not a tokenizer that can be read ({error}): download the model again and export it."
            ) from error

    def encode(self, text: str) -> np.ndarray:
        """Token ids ``[n]``; special tokens in the text are recognised, none are added.

        Raises:
            UserError: halves of surrogate pairs, which are no text.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"expected text in Unicode, found {text[error.start : error.end]!r}: correct it.") from None
        return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, np.int64)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of tokens, special ones left out."""
        return self._tokenizer.decode(list(token_ids), skip_special_tokens=True)

    def token(self, token_id: int) -> str:
        """The text that stands for one token, special ones included."""
        token = self._tokenizer.id_to_token(token_id)
        if token is None:
            raise UserError(f"the tokenizer has no token {token_id}, which the model's config names: files do not fit.")
        return token

    def stream(self) -> TextStream:
        """A decoder that takes tokens one at a time."""
        return TextStream(self._tokenizer)


class TextStream:
    """Decodes tokens as they come, and lets text out only in whole characters."""

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)

    def push(self, token_id: int) -> str:
        """Text that this token completes; empty while a character is incomplete."""
        return self._stream.step(self._tokenizer, token_id) or ""

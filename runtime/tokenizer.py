"""Text to token ids and back."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np
import tokenizers
from tokenizers import AddedToken
from tokenizers.decoders import DecodeStream
from tokenizers.models import BPE

from pascalvl.plugins.errors import UserError, library_reason, panics, shown


def _byte_characters() -> dict[str, bytes]:
    """What each character of a byte-level token stands for: bytes that are printable Latin-1, themselves; the others,
    in order, the characters from U+0100 on (GPT-2's `bytes_to_unicode`)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    characters = {chr(byte): bytes([byte]) for byte in printable}
    return characters | {chr(256 + number): bytes([byte]) for number, byte in enumerate(others)}


_BYTES = _byte_characters()


class Tokenizer:
    """A checkpoint's ``tokenizer.json``.

    Raises:
        UserError: the file is missing or is no tokenizer.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise UserError(f"no tokenizer at {path}: download the model again and export it.")
        try:
            with panics():
                self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise UserError(
                f"{path} is not a tokenizer that can be read ({library_reason(error)}): download the model again and "
                "export it."
            ) from error
        # As training left them in the file; Hugging Face ignores them, too.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        added = list(self._tokenizer.get_added_tokens_decoder().values())
        self.added_tokens = tuple(token.content for token in added)
        """Texts of the tokens that were added to the vocabulary, special or not."""
        self.special_tokens = tuple(token.content for token in added if token.special)
        self._without_added = tokenizers.Tokenizer(self._tokenizer.model)
        self._without_added.pre_tokenizer = self._tokenizer.pre_tokenizer
        self._without_added.normalizer = self._tokenizer.normalizer
        self._only_added = self._finder(added)
        # Their texts wherever they stand, as they are and in normal form.
        self._texts_of = {
            texts: [
                self._finder([AddedToken(text, normalized=normalized) for text in texts])
                for normalized in (False, True)
            ]
            for texts in (self.added_tokens, self.special_tokens)
        }

    @functools.cached_property
    def longest_token(self) -> int:
        """Characters that a token stands for, at most."""
        return max(map(len, self._tokenizer.get_vocab()), default=1)

    def encode(self, text: str) -> np.ndarray:
        """Token ids ``[n]``; added tokens in the text are recognised, none besides.

        Raises:
            UserError: halves of surrogate pairs, which are no text.
        """
        return np.array(_encoded(self._tokenizer, text).ids, np.int64)

    def encode_without_added(self, text: str) -> list[int]:
        """Token ids of a text in which nothing is an added token; raises `UserError` as `encode` does."""
        return _encoded(self._without_added, text).ids

    def find_added(self, text: str) -> list[tuple[int, int, int]]:
        """The added tokens that `encode` recognises: first character, the one after the last, and token id of each.

        Raises:
            UserError: as `encode` does.
        """
        found = _encoded(self._only_added, text)
        tokens = (cast(str, self._only_added.id_to_token(number)) for number in found.ids)
        ids = (cast(int, self._tokenizer.token_to_id(token)) for token in tokens)
        return [(*span, token_id) for span, token_id in zip(found.offsets, ids, strict=True)]

    def starts_of(self, tokens: tuple[str, ...], text: str) -> set[int]:
        """Characters at which the texts of `added_tokens` or `special_tokens` begin, even within words; of two that
        overlap, the first.

        Raises:
            UserError: as `encode` does.
        """
        return {start for finder in self._texts_of[tokens] for start, _ in _encoded(finder, text).offsets}

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of tokens, special ones left out."""
        return self._tokenizer.decode(list(token_ids), skip_special_tokens=True)

    def token_bytes(self, token_id: int) -> bytes:
        """What a token stands for in an answer, special ones included; characters may be in several tokens, and there
        are none in those that only the model has."""
        token = self._tokenizer.id_to_token(token_id)
        if token is None:
            return b""
        if token in self.added_tokens:
            return token.encode()
        return b"".join(_BYTES.get(character) or character.encode() for character in token)

    def token(self, token_id: int) -> str:
        """The text that stands for one token, special ones included."""
        token = self._tokenizer.id_to_token(token_id)
        if token is None:
            raise UserError(f"the tokenizer has no token {token_id}, which the model's config names: files do not fit.")
        return token

    def _finder(self, added: list[AddedToken]) -> tokenizers.Tokenizer:
        """Encodes added tokens alone, and leaves out all else."""
        finder = tokenizers.Tokenizer(BPE())
        finder.normalizer = self._tokenizer.normalizer
        finder.add_tokens(added)
        return finder

    def to_json(self) -> str:
        """What `tokenizer.json` says, for other libraries that read it."""
        return self._tokenizer.to_str()

    def stream(self) -> TextStream:
        """A decoder that takes tokens one at a time."""
        return TextStream(self._tokenizer)


def _encoded(tokenizer: tokenizers.Tokenizer, text: str) -> tokenizers.Encoding:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        found = shown(text[error.start : error.end])
        raise UserError(f"expected text in Unicode, found {found}: correct it.") from None
    return tokenizer.encode(text, add_special_tokens=False)


class TextStream:
    """Decodes tokens as they come, and lets text out only in whole characters."""

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)

    def push(self, token_id: int) -> str:
        """Text that this token completes; empty while a character is incomplete."""
        return self._stream.step(self._tokenizer, token_id) or ""

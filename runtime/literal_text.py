"""The text of users and tools as nothing but text: what reads as a control token in it becomes none."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from pascalvl.plugins.errors import UserError
from pascalvl.runtime.messages import PART_TYPES, ROLES
from pascalvl.runtime.tokenizer import Tokenizer

LITERAL_ROLES = ("user", "tool")
"""Whose messages are text alone, as tools' descriptions are. A system prompt is its operator's: in it, and in further
variables of templates, control tokens are what they say. So are those of an answer that are not special, as <think>;
the special ones are in no answer but as text, which somebody may have asked for."""
_NAMES = frozenset((*ROLES, *PART_TYPES))
"""What the format of messages itself says in them."""
_PRIVATE_USE = range(0xE000, 0xF900)


class LiteralText:
    """Hides control tokens in messages from a template and from the tokenizer; encodes the prompt with their text.

    Control tokens are all that were added to the tokenizer's vocabulary, special or not. While a prompt is rendered,
    the first character of one in a message is exchanged for a private-use character that occurs nowhere else, and so is
    that of the beginning of one at the end of a text, which a template may join to the rest. A prompt without any is
    encoded as it would be without this.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._stand_ins: dict[str, str] = {}
        self._unused: Iterator[str] = iter(())

    def hide(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, everything: str
    ) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None]:
        """Messages and tools, of JSON types, for a template; ``everything`` is what stands in all, as ASCII JSON."""
        everything = everything.lower()
        taken = {character for token in self._tokenizer.added_tokens for character in token}
        self._unused = (
            character
            for character in map(chr, _PRIVATE_USE)
            if _escape(character) not in everything and character not in taken
        )
        every = self._tokenizer.added_tokens
        tokens_of = dict.fromkeys(LITERAL_ROLES, every) | {"assistant": self._tokenizer.special_tokens}
        hidden = [self._hidden(message, tokens_of.get(message["role"], ())) for message in messages]
        return hidden, self._hidden(tools, every)

    def encode(self, text: str) -> np.ndarray:
        """Token ids ``[n]`` of a prompt that was rendered from what `hide` returned."""
        if not self._stand_ins:
            return self._tokenizer.encode(text)
        ids: list[int] = []
        done = 0
        for start, end, token_id in self._tokenizer.find_added(text):
            ids += [*self._tokenizer.encode_without_added(self._restored(text[done:start])), token_id]
            done = end
        return np.array([*ids, *self._tokenizer.encode_without_added(self._restored(text[done:]))], np.int64)

    def _hidden(self, value: Any, tokens: tuple[str, ...]) -> Any:
        if not tokens:
            return value
        if isinstance(value, str):
            return value if value in _NAMES else self._hidden_text(value, tokens)
        if isinstance(value, list):
            return [self._hidden(item, tokens) for item in value]
        if isinstance(value, dict):  # with the names of fields as they are
            return {
                key if key.isidentifier() else self._hidden_text(key, tokens): self._hidden(value[key], tokens)
                for key in value
            }
        return value

    def _hidden_text(self, text: str, tokens: tuple[str, ...]) -> str:
        while starts := self._tokenizer.starts_of(tokens, text):  # again, for one that begins within another
            text = self._exchange(text, starts)
        written = text.rstrip()
        tail = range(max(0, len(written) - max(map(len, tokens), default=0)), len(written))
        return self._exchange(text, [i for i in tail if any(token.startswith(written[i:]) for token in tokens)])

    def _exchange(self, text: str, places: Iterable[int]) -> str:
        characters = list(text)
        for place in places:
            character = text[place]
            if character not in self._stand_ins:
                stand_in = next(self._unused, None)
                if stand_in is None:
                    raise UserError(
                        "the messages hold control tokens, and every private-use character from U+E000 to U+F8FF: "
                        "expected one of these to be left."
                    )
                self._stand_ins[character] = stand_in
            characters[place] = self._stand_ins[character]
        return "".join(characters)

    def _restored(self, text: str) -> str:
        for character, stand_in in self._stand_ins.items():
            text = text.replace(stand_in, character).replace(_escape(stand_in), character)
        return text


def _escape(character: str) -> str:
    """As JSON writes a character in ASCII, which a template may do."""
    return f"\\u{ord(character):04x}"

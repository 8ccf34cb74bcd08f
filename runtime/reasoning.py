"""The reasoning of Thinking models: told apart from the answer, and ended when its budget of tokens is spent."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence

import numpy as np

from pascalvl.plugins.errors import UserError, shown
from pascalvl.runtime.sampling import TokenMatcher, one_token
from pascalvl.runtime.tokenizer import Tokenizer

OPEN, CLOSE = "<think>", "</think>"
END_OF_BUDGET = (
    "\n\nConsidering the limited time by the user, I have to give the solution based on the thinking directly now.\n"
    f"{CLOSE}\n\n"
)
"""What Qwen3's authors end thinking with (Qwen3 Technical Report, arXiv:2505.09388, section 4.3)."""
_BREAKS = "\n\n"
"""What follows the tag, as templates have it."""
_NO_THINKING = f"\n{CLOSE}{_BREAKS}"
"""After the tag and a line break, as Qwen3's templates have it."""
_LONGEST_OPENING = 8
"""Tokens of the tag and white space after it."""


def opens_thinking(token_ids: np.ndarray, tokenizer: Tokenizer) -> bool:
    """Whether a prompt, int64 ``[n]``, ends with the tag that begins thinking, as those of Thinking models do.

    White space may follow the tag. What users say cannot bring it: their text has no control tokens.
    """
    tag = tag_id(OPEN, tokenizer)
    tail = token_ids[-_LONGEST_OPENING:].tolist()
    if tag not in tail:
        return False
    after = tail[len(tail) - tail[::-1].index(tag) :]
    return not tokenizer.decode(after).strip()


class ReasoningParser:
    """Tells reasoning from what follows it, ``<think>...</think>`` at the beginning of streamed text.

    However the text is cut into pieces, what is given joins to the same. Line breaks beside the tags are the format's
    and left out. Thinking that is not ended is reasoning to the end; tags anywhere else are text.

    Args:
        is_open: the prompt has the first tag; the answer may repeat it.
    """

    def __init__(self, is_open: bool) -> None:
        self._is_open = is_open
        self._is_at_start = True
        self._held = ""
        """Text that may be a tag, or line breaks before or after one."""
        self._skips_breaks = False

    def push(self, piece: str) -> tuple[str, str]:
        """Take the next piece; returns the reasoning and the content that it completes."""
        self._held += piece
        if self._is_at_start:
            text = self._held.lstrip()
            if OPEN.startswith(text) and text != OPEN:
                return "", ""  # until there is more
            if text.startswith(OPEN):
                self._is_open, self._held = True, text.removeprefix(OPEN)
            self._is_at_start, self._skips_breaks = False, self._is_open
        reasoning = self._reasoning() if self._is_open else ""
        return reasoning, "" if self._is_open else self._content()

    def finish(self) -> tuple[str, str]:
        """The text is complete; returns what was held back."""
        held, self._held = self._held, ""
        return (held, "") if self._is_open else ("", held)

    def _reasoning(self) -> str:
        """What of the held text is reasoning for sure; ends it where it does."""
        self._skip_breaks()
        text, tag, rest = self._held.partition(CLOSE)
        if tag:
            self._is_open, self._skips_breaks, self._held = False, True, rest
            return text.rstrip("\n")
        start = text.rfind(CLOSE[0])
        end = start if start >= 0 and CLOSE.startswith(text[start:]) else len(text)
        given = text[:end].rstrip("\n")
        self._held = text[len(given) :]
        return given

    def _content(self) -> str:
        self._skip_breaks()
        given, self._held = self._held, ""
        return given

    def _skip_breaks(self) -> None:
        if self._skips_breaks:
            self._held = self._held.lstrip("\n")
            self._skips_breaks = not self._held


class ReasoningBudget:
    """Ends an answer's thinking after so many tokens, by tokens that come next whatever the model would choose.

    Args:
        most: tokens of thinking, from 0; those that end it come on top.
        is_open: see `opens_thinking`; else an answer that thinks opens it.
        tokenizer: the model's.

    Raises:
        UserError: the number is none, or the tokenizer has no tags of thinking.
    """

    def __init__(self, most: int, is_open: bool, tokenizer: Tokenizer) -> None:
        if type(most) is not int or most < 0:
            raise UserError(f"expected a budget of tokens for reasoning, a whole number from 0, found {shown(most)}.")
        self._open_id, self._close_id = tag_id(OPEN, tokenizer), tag_id(CLOSE, tokenizer)
        if self._open_id is None or self._close_id is None:
            raise UserError(f"the model does not think: its tokenizer has no {OPEN} and {CLOSE}; ask without a budget.")
        self._most, self._is_open, self._is_at_start = most, is_open, True
        self._tokenizer = tokenizer
        self._ending: list[int] = tokenizer.encode(END_OF_BUDGET if most else _NO_THINKING).tolist()
        self._count = 0

    def forced(self, token: int | None = None) -> Sequence[int]:
        """Tokens that must come next, none mostly.

        Args:
            token: the last that came, whether chosen or forced; None before the first.
        """
        if token is not None:
            self._see(token)
        if not self._is_open or self._count < self._most:
            return ()
        self._is_open = False
        return self._ending

    def _see(self, token: int) -> None:
        if token == self._open_id and self._is_at_start:
            self._is_open = True
        elif token == self._close_id:
            self._is_open = False
        elif self._is_open:
            self._count += 1
        self._is_at_start = self._is_at_start and not self._tokenizer.decode([token]).strip()


class ReasoningMatcher:
    """Lets an answer think first, within its budget; what a grammar says counts from the end of that on.

    Args:
        is_open: see `opens_thinking`.
        tokenizer: the model's.
        vocab_size: length of its logits.
        end_tokens: tokens that end an answer; none does before what a grammar is of.
        budget: tokens of thinking; None: any number.
        grammar: of what follows it; None: anything may.

    Raises:
        UserError: as `ReasoningBudget`.
    """

    def __init__(
        self,
        is_open: bool,
        tokenizer: Tokenizer,
        vocab_size: int,
        end_tokens: Collection[int],
        budget: int | None,
        grammar: TokenMatcher | None,
    ) -> None:
        self._thinks, self._close_id, self._grammar = is_open, tag_id(CLOSE, tokenizer), grammar
        self._words = (vocab_size + 31) // 32
        goes_on = np.ones(self._words * 32, bool)
        goes_on[list(end_tokens)] = False
        self._goes_on = np.packbits(goes_on, bitorder="little").view(np.uint32) if grammar else None
        self._breaks: list[int] = tokenizer.encode(_BREAKS).tolist() if grammar else []
        self._budget = None if budget is None else ReasoningBudget(budget, is_open, tokenizer)
        self._forced: deque[int] = deque(self._budget.forced() if self._budget else ())

    @property
    def _is_in_grammar(self) -> bool:
        return self._grammar is not None and not self._thinks and not self._forced

    @property
    def forced(self) -> Sequence[int]:
        """Tokens that have to follow, whatever the logits are."""
        return self._grammar.forced if self._grammar and self._is_in_grammar else self._forced

    @property
    def is_complete(self) -> bool:
        """Whether nothing may follow."""
        return self._grammar is not None and self._is_in_grammar and self._grammar.is_complete

    def mask(self) -> np.ndarray | None:
        """Which tokens may come next, as `pascalvl.engines.choice.Choice` has it; None: all."""
        if self._grammar and self._is_in_grammar:
            return self._grammar.mask()
        return one_token(self._forced[0], self._words) if self._forced else self._goes_on

    def accept(self, token: int) -> None:
        """Take the next token, one that the mask allows; raises `UserError` as the grammar does."""
        if self._grammar and self._is_in_grammar:
            self._grammar.accept(token)
            return
        is_forced = bool(self._forced)
        if is_forced:
            self._forced.popleft()
        if self._thinks and token == self._close_id:
            self._thinks = False
            if not is_forced:
                self._forced.extend(self._breaks)
        if self._budget:
            self._forced.extend(self._budget.forced(token))


def tag_id(tag: str, tokenizer: Tokenizer) -> int | None:
    """The token that a tag is; None: it is none."""
    found = tokenizer.find_added(tag)
    return found[0][2] if [(start, end) for start, end, _ in found] == [(0, len(tag))] else None

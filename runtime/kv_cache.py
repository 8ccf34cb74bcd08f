"""What the external KV cache of a conversation holds: the session stores it, here is decided what is kept, where."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import cast

import numpy as np

from pascalvl.engines import Session
from pascalvl.engines.engine import ALWAYS_VISIBLE, Placement
from pascalvl.plugins.errors import UserError
from pascalvl.plugins.kv_format import PAGE_SLOTS, CacheConfig, Window, pages_of

_EMPTY = -1


class KVCache:
    """Knows which tokens of a conversation a session's pages hold, and gives new ones their places.

    Tokens are numbered as they come. Without a window, number ``i`` lies in slot ``i``. With one, a token that no later
    one can see leaves its slot to a new one, so that the slots are a ring between those of the sinks and of pinned
    tokens, which stay. Keys carry the positions that their tokens had: nothing is rotated again.

    Args:
        session: where keys and values are; may be set to another one that has them in the same pages.
        config: what is kept.
        longest: tokens of a conversation at most, those that were dropped included.
        pages: int32 ``[n]``, the conversation's; None: the session's first, as many as a sequence may have.
    """

    def __init__(self, session: Session, config: CacheConfig, longest: int, pages: np.ndarray | None = None) -> None:
        self.session = session
        self._config = config
        self._pages = np.arange(session.sequence_pages, dtype=np.int32) if pages is None else pages
        self._identities = np.zeros(longest, np.int64)
        slots = session.sequence_pages * PAGE_SLOTS
        self._token = np.full(slots, _EMPTY, np.int64)  # in each slot
        self._stays = np.zeros(slots, bool)
        self._length = self._used = 0
        self._placed: tuple[slice | np.ndarray, np.ndarray, np.ndarray | None, int, int]
        """Of tokens that are run now: their slots, their numbers, which of them stay, and slots and tokens then."""

    @property
    def pages(self) -> list[int]:
        """The conversation's."""
        return self._pages.tolist()

    def grow(self, pages: Sequence[int]) -> None:
        """Take more pages."""
        self._pages = np.append(self._pages, np.asarray(pages, np.int32))

    def shrink(self) -> None:
        """Have no pages but those in which tokens are."""
        self._pages = self._pages[: pages_of(self._length)]

    @property
    def capacity(self) -> int:
        """Slots of its pages."""
        return len(self._pages) * PAGE_SLOTS

    @property
    def length(self) -> int:
        """Tokens of the conversation so far, those that were dropped included."""
        return self._length

    @property
    def identities(self) -> np.ndarray:
        """Of those tokens, see `place`."""
        return self._identities[: self._length]

    @property
    def pinned(self) -> np.ndarray:
        """Which of the tokens are never dropped, bool ``[length]``, as long as none was."""
        return self._stays[: self._length].copy()

    @contextlib.contextmanager
    def appending(self, identities: np.ndarray, pinned: np.ndarray | None = None) -> Iterator[Placement]:
        """`place` new tokens; inside, run them, and `append` them then. What an exception ends, or an interrupt,
        appends nothing."""
        yield self.place(identities, pinned)
        self.append()

    def place(self, identities: np.ndarray, pinned: np.ndarray | None = None) -> Placement:
        """Give new tokens their places, for them to be run; until `append`, they are not there.

        Args:
            identities: int64 ``[seq]``; equal numbers are tokens whose embeddings are equal. With a window, at most as
                many as that is long: new tokens see each other.
            pinned: bool ``[seq]``: tokens that are never dropped; None: none.

        Raises:
            UserError: there are no slots left: too many tokens are pinned.
        """
        first, last = self._length, self._length + len(identities)
        if self._config.window is None:
            self._check_room(last)
            own, slots = slice(first, last), np.arange(first, last, dtype=np.int32)
            self._identities[own] = identities
            self._token[own] = _EMPTY
            self._placed = own, slots, None, last, last
            return Placement(self._pages, first, slots)
        tokens = np.arange(first, last)
        slots, visible, stays = self._in_window(tokens, pinned)
        stored = slots >= 0
        places = slots[stored]
        used = max(self._used, int(places.max(initial=-1)) + 1)
        self._check_room(used)
        self._identities[first:last] = identities
        # What is there now may be overwritten before an interrupt.
        self._token[places] = _EMPTY
        self._placed = places, tokens[stored], stays[stored], used, last
        return Placement(self._pages, self._used, slots, visible)

    def append(self) -> None:
        """The tokens that were placed last have been run."""
        places, tokens, stays, self._used, self._length = self._placed
        self._token[places] = tokens
        if stays is not None:
            self._stays[places] = stays

    def _check_room(self, slots: int) -> None:
        """Raise `UserError` unless there are so many."""
        if slots > self.capacity:
            raise UserError(
                f"the KV cache has {self.capacity} slots, too few for what is pinned: give fewer pictures, or "
                "limit their pixels."
            )

    def _in_window(
        self, tokens: np.ndarray, pinned: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
        """As `Placement` has them, slots of new tokens and who sees those there are; and which tokens stay."""
        window, first = cast(Window, self._config.window), int(tokens[0])
        stays, seen_later = self._kept(tokens, pinned)
        stored = np.flatnonzero(stays | seen_later)
        used, in_window = self._token[: self._used], ~self._stays[: self._used]
        free = np.flatnonzero(in_window & (used < self._oldest_seen_after(tokens)))
        fresh = np.arange(self._used, self._used + len(stored))
        slots = np.full(len(tokens), -1, np.int32)
        slots[stored] = np.concatenate([free, fresh])[: len(stored)]
        visible = np.full(self.capacity, ALWAYS_VISIBLE, np.int32)
        # Token t is seen by those up to number t + length - 1.
        visible[: self._used][in_window] = (used + window.length - first)[in_window]
        if visible[: self._used].min(initial=ALWAYS_VISIBLE) >= len(tokens):
            return slots, None, stays
        return slots, visible, stays

    def _kept(self, tokens: np.ndarray, pinned: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """Which of new tokens stay, and which the token after these sees, bool ``[n]``."""
        window = self._config.window
        if window is None:
            return np.zeros(len(tokens), bool), np.ones(len(tokens), bool)
        stays = tokens < window.sinks
        if pinned is not None:
            stays = stays | pinned
        return stays, tokens >= self._oldest_seen_after(tokens)

    def _oldest_seen_after(self, tokens: np.ndarray) -> int:
        """The first token of the window of the one after these."""
        return int(tokens[-1]) + 2 - cast(Window, self._config.window).length

    def truncate(self, length: int) -> int:
        """Forget all tokens after the first ``length``; returns how many are left.

        That is all or none of those where tokens were dropped which the next one would see.
        """
        has_hole = (self._token[: self._used] == _EMPTY).any()  # after an interrupt
        if length >= self._length and not has_hole:
            return self._length
        if not self._has_first(length):
            length = 0
        self._token[length:] = _EMPTY
        self._stays[length:] = False
        self._length = self._used = length
        return length

    def _has_first(self, length: int) -> bool:
        """Whether the first tokens are all there: then number i is in slot i."""
        return length <= self._used and np.array_equal(self._token[:length], np.arange(length))

    def common_prefix(self, identities: np.ndarray) -> int:
        """How many of the first ``identities`` are the tokens that the conversation begins with."""
        return common_length(self._identities[: self._length], identities)

    def rows(self, length: int) -> dict[str, np.ndarray] | None:
        """Copies of the first ``length`` tokens' pages, zeros behind these; None where some of them were dropped."""
        if not self._has_first(length):
            return None
        rows = self.session.read(self._pages[: pages_of(length)])
        if rest := length % PAGE_SLOTS:
            for array in rows.values():
                array[-1, :, rest:] = 0
        return rows

    def keeps(self, pinned: np.ndarray) -> bool:
        """Whether a conversation's first tokens, of which some are ``pinned``, bool ``[n]``, fit in and none of them is
        dropped."""
        stays, seen_later = self._kept(np.arange(len(pinned)), pinned)
        return len(pinned) <= self.capacity and bool((stays | seen_later).all())

    def begin(self, identities: np.ndarray, pinned: np.ndarray) -> None:
        """Begin anew with tokens whose keys and values are in the pages already, and which a window keeps all."""
        length = len(identities)
        tokens = np.arange(length)
        self._identities[:length] = identities
        self._token[:length] = tokens
        self._stays[:length], _ = self._kept(tokens, pinned) if length else (False, None)
        self._length = self._used = length


def common_length(ours: np.ndarray, theirs: np.ndarray) -> int:
    """How many of the first elements of two arrays are the same."""
    shared = min(len(ours), len(theirs))
    differs = ours[:shared] != theirs[:shared]
    return int(differs.argmax()) if differs.any() else shared

"""What the external KV cache of a conversation holds: the session stores it, here is decided what is kept, where."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from pascalvl.engines import Session
from pascalvl.engines.session import ALWAYS_VISIBLE, Placement
from pascalvl.plugins.errors import UserError
from pascalvl.plugins.kv_format import CacheConfig

_EMPTY = -1
_ENGINE, _IDENTITIES = "engine", "identities"


@dataclasses.dataclass(frozen=True, eq=False)
class Prefix:
    """The first tokens of a conversation with their keys and values, for later ones that begin the same."""

    identities: np.ndarray
    """int64 ``[n]``, see `KVCache.appending`."""
    rows: Mapping[str, np.ndarray]
    """As `Session.read` gives them, slot ``i`` being token ``i``."""

    def common(self, identities: np.ndarray) -> int:
        """How many of the first ``identities`` are these tokens."""
        return _common(self.identities, identities)

    def save(self, path: Path, engine: str) -> None:
        """Write a file for `load`, in one go; ``engine`` is the digest of what computed the rows."""
        arrays = {_IDENTITIES: self.identities, **self.rows}
        try:
            with tempfile.NamedTemporaryFile(prefix=f".{path.name}.", dir=path.parent, delete=False) as file:
                try:
                    np.savez(file, **{_ENGINE: np.array(engine)}, **arrays)
                    file.close()
                    Path(file.name).replace(path)
                except BaseException:
                    Path(file.name).unlink(missing_ok=True)
                    raise
        except OSError as error:
            raise UserError(f"the KV cache cannot be saved to {path} ({error.strerror or error}).") from error

    @classmethod
    def load(cls, path: Path, engine: str) -> Prefix:
        """Read what `save` wrote; raises `UserError` for other files, and for rows of another engine."""
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = dict(file)
            found, identities = str(arrays.pop(_ENGINE)), arrays.pop(_IDENTITIES)
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise UserError(
                f"{path} is no saved KV cache ({error}): choose another file, or remove it to have it written anew."
            ) from error
        if found != engine:
            raise UserError(
                f"the KV cache in {path} was computed by another engine than this one: choose another file, or remove "
                "it to have it written anew."
            )
        return cls(identities, arrays)


class KVCache:
    """Knows which tokens a session's cache holds, and gives new ones their places.

    Tokens are numbered as they come. Without a window, number ``i`` lies in slot ``i``. With one, a token that no later
    one can see leaves its slot to a new one, so that the slots are a ring between those of the sinks and of pinned
    tokens, which stay. Keys carry the positions that their tokens had: nothing is rotated again.

    Args:
        session: where keys and values are.
        config: what is kept.
        longest: tokens of a conversation at most, those that were dropped included.
    """

    def __init__(self, session: Session, config: CacheConfig, longest: int) -> None:
        self._session = session
        self._config = config
        self._identities = np.zeros(longest, np.int64)
        self._token = np.full(session.capacity, _EMPTY, np.int64)  # in each slot
        self._stays = np.zeros(session.capacity, bool)
        self._length = self._used = self._recent = self._next_recent = 0

    @property
    def length(self) -> int:
        """Tokens of the conversation so far, those that were dropped included."""
        return self._length

    @contextlib.contextmanager
    def appending(self, identities: np.ndarray, pinned: np.ndarray | None = None) -> Iterator[Placement]:
        """Give new tokens their places; inside, run them. What an exception ends, or an interrupt, appends nothing.

        Args:
            identities: int64 ``[seq]``; equal numbers are tokens whose embeddings are equal. With a window, at most as
                many as that is long: new tokens see each other.
            pinned: bool ``[seq]``: tokens that are never dropped; None: none.

        Raises:
            UserError: there are no slots left: too many tokens are pinned.
        """
        first, last = self._length, self._length + len(identities)
        tokens = np.arange(first, last)
        stays, seen_later, free, visible = self._policy(tokens, pinned)
        stored = np.flatnonzero(stays | seen_later)
        fresh = np.arange(self._used, min(self._used + len(stored), self._session.capacity))
        places = np.concatenate([free, fresh])[: len(stored)]
        if len(places) < len(stored):
            raise UserError(
                f"the KV cache has {self._session.capacity} slots, too few for what is pinned: give fewer pictures, or "
                "limit their pixels."
            )
        slots = np.full(len(identities), -1, np.int32)
        slots[stored] = places
        recent_slots = None
        if self._config.recent:
            recent_slots = (self._next_recent + np.arange(len(identities))) % self._config.recent
            recent_slots[: -self._config.recent] = -1  # of more than are kept, the last
            recent_slots = recent_slots.astype(np.int32)
        # One token alone sees recent ones where they are kept apart, several see all in the cache proper.
        recent = self._recent if len(identities) == 1 else 0
        past_length = self._used - recent
        if visible is not None and visible[:past_length].min(initial=ALWAYS_VISIBLE) >= len(identities):
            visible = None
        self._identities[first:last] = identities
        # What is there now may be overwritten before an interrupt.
        self._token[places] = _EMPTY
        kept, next_recent, self._recent, self._next_recent = self._recent, self._next_recent, 0, 0
        yield Placement(past_length, slots, visible, recent, recent_slots)
        self._token[places] = tokens[stored]
        self._stays[places] = stays[stored]
        self._used = max(self._used, int(places.max(initial=-1)) + 1)
        self._length = last
        if self._config.recent:
            self._recent = min(kept + len(identities), self._config.recent)
            self._next_recent = (next_recent + len(identities)) % self._config.recent

    def _policy(
        self, tokens: np.ndarray, pinned: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]:
        """Of new tokens: which stay, and which others later ones see. Of slots: free ones, and who sees them."""
        if self._config.window is None:
            return np.zeros(len(tokens), bool), np.ones(len(tokens), bool), np.zeros(0, np.int64), None
        window, first, last = self._config.window, int(tokens[0]), int(tokens[-1]) + 1
        stays = tokens < window.sinks
        if pinned is not None:
            stays = stays | pinned
        oldest = last - window.length + 1  # that the token after these sees
        used = self._token[: self._used]
        free = np.flatnonzero(~self._stays[: self._used] & (used < oldest))
        visible = np.full(self._session.capacity, ALWAYS_VISIBLE, np.int32)
        # Token t is seen by those up to number t + length - 1.
        in_window = ~self._stays[: self._used]
        visible[: self._used][in_window] = (used + window.length - first)[in_window]
        return stays, tokens >= oldest, free, visible

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
        self._recent = self._next_recent = 0
        return length

    def _has_first(self, length: int) -> bool:
        """Whether the first tokens are all there: then number i is in slot i."""
        return length <= self._used and np.array_equal(self._token[:length], np.arange(length))

    def common_prefix(self, identities: np.ndarray) -> int:
        """How many of the first ``identities`` are the tokens that the conversation begins with."""
        return _common(self._identities[: self._length], identities)

    def prefix(self, length: int) -> Prefix | None:
        """Copies of the first ``length`` tokens' keys and values; None where some of them were dropped."""
        if not self._has_first(length):
            return None
        return Prefix(self._identities[:length].copy(), self._session.read(np.arange(length)))

    def restore(self, prefix: Prefix, length: int, pinned: np.ndarray) -> bool:
        """Begin anew with the first ``length`` tokens of a prefix, of which some are ``pinned``, bool ``[length]``.

        Returns whether that is possible: a window must keep all of them.
        """
        tokens = np.arange(length)
        stays, seen_later, _, _ = self._policy(tokens, pinned)
        if length > self._session.capacity or not (stays | seen_later).all():
            return False
        self.truncate(0)
        self._session.write(tokens, prefix.rows)
        self._identities[:length] = prefix.identities[:length]
        self._token[:length] = tokens
        self._stays[:length] = stays
        self._length = self._used = length
        return True


def _common(ours: np.ndarray, theirs: np.ndarray) -> int:
    shared = min(len(ours), len(theirs))
    differs = ours[:shared] != theirs[:shared]
    return int(differs.argmax()) if differs.any() else shared

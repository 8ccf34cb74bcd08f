"""What the external KV cache of a conversation holds: the session stores it, here is decided what is kept."""

from __future__ import annotations

import numpy as np

from pascalvl.engines import Session


class KVCache:
    """Knows which tokens a session's cache holds."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._identities = np.zeros(session.capacity, np.int64)

    @property
    def length(self) -> int:
        """Tokens in the cache."""
        return self._session.length

    def expect(self, identities: np.ndarray) -> None:
        """Note the tokens that the session appends next.

        Before it runs: tokens after `length` are not in the cache, whatever is noted of them, so that an interrupt at
        any time leaves the cache as it was.

        Args:
            identities: int64 ``[seq]``; equal numbers are tokens whose embeddings are equal.
        """
        self._identities[self.length : self.length + len(identities)] = identities

    def truncate(self, length: int) -> None:
        """Forget all tokens after the first ``length``."""
        self._session.truncate(length)

    def common_prefix(self, identities: np.ndarray) -> int:
        """How many of the first ``identities`` are the tokens that the cache begins with."""
        shared = min(self.length, len(identities))
        differs = self._identities[:shared] != identities[:shared]
        return int(differs.argmax()) if differs.any() else shared

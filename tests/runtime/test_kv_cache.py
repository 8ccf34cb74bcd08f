"""The prefix that the cache shares with the next prompt."""

import numpy as np

from pascalvl.engines import Session
from pascalvl.runtime.kv_cache import KVCache


class EmptySession(Session):
    """Appends nothing but the number of tokens."""

    nbytes = 0

    def prefill(self, feeds):
        raise NotImplementedError

    decode = prefill

    def append(self, tokens):
        self.length += tokens


def test_common_prefix():
    session = EmptySession(20)
    cache = KVCache(session)
    assert cache.common_prefix(np.array([7, 8])) == 0
    cache.expect(np.array([7, -5, -6, 9]))
    session.append(4)
    assert cache.common_prefix(np.array([7, -5, -6, 9, 1, 2])) == 4
    assert cache.common_prefix(np.array([7, -5, 3, 9])) == 2
    assert cache.common_prefix(np.array([1])) == 0
    assert cache.common_prefix(np.array([7, -5])) == 2
    cache.truncate(1)
    assert cache.length == session.length == 1
    assert cache.common_prefix(np.array([7, -5, -6, 9])) == 1


def test_tokens_that_were_expected_but_never_came():
    session = EmptySession(20)
    cache = KVCache(session)
    cache.expect(np.array([7, 8]))
    session.append(2)
    cache.expect(np.array([9, 10]))  # and an interrupt
    assert cache.common_prefix(np.array([7, 8, 9, 10])) == 2
    cache.expect(np.array([11, 12]))
    session.append(2)
    assert cache.common_prefix(np.array([7, 8, 9, 10])) == 2
    assert cache.common_prefix(np.array([7, 8, 11, 12])) == 4

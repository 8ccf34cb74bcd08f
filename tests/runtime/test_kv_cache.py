"""What the cache keeps and where: against the definition of each policy, token by token."""

import dataclasses
import random
from types import SimpleNamespace

import numpy as np
import pytest

from pascalvl.engines import Session
from pascalvl.plugins import bindings
from pascalvl.plugins.errors import UserError
from pascalvl.plugins.kv_format import CacheConfig
from pascalvl.plugins.model_config import TextConfig
from pascalvl.runtime.kv_cache import KVCache, Prefix

TEXT = TextConfig(16, 8, 2, 1, 1, 128, 1000, (24, 20, 20), (0.5,) * 64, 1.0, (128,) * 2, (128,) * 2)
LONGEST = 400


class TokenSession(Session):
    """Stores token numbers where a real one stores keys and values; ``seen`` collects what each token is shown."""

    def __init__(self, config, capacity):
        model = SimpleNamespace(text=TEXT, num_deepstack=1)
        super().__init__(SimpleNamespace(manifest=SimpleNamespace(model=model, kv_cache=config)), capacity)
        self.slots = np.full(capacity, -1)
        self.recent = np.full(max(config.recent, 1), -1)
        self.seen = {}

    nbytes = 0

    def prefill(self, tokens, placement):
        visible = self.visible(placement)[0]
        assert placement.visible is None or len(visible) == self.capacity
        past = np.arange(placement.past_length)
        for i, token in enumerate(tokens):
            shown = [self.slots[s] for s in past if i < visible[min(s, len(visible) - 1)]]
            recent = list(self.recent[: placement.recent_length])
            self.seen[int(token)] = [*shown, *recent, *tokens[: i + 1]]
            assert placement.recent_length == 0 or len(tokens) == 1
        stored = placement.slots >= 0
        self.slots[placement.slots[stored]] = tokens[stored]
        if placement.recent_slots is not None:
            kept = placement.recent_slots >= 0
            self.recent[placement.recent_slots[kept]] = tokens[kept]

    decode = prefill

    def read(self, slots):
        return {"tokens": self.slots[slots]}

    def write(self, slots, rows):
        self.slots[slots] = rows["tokens"][: len(slots)]

    _fetch = _put = None


class Conversation:
    """A cache at work; ``pinned`` are the numbers of tokens that were."""

    def __init__(self, kv, pinned=0):
        self.config = CacheConfig.parse(kv)
        self.session = TokenSession(self.config, self.config.slots(LONGEST, pinned))
        self.cache = KVCache(self.session, self.config, LONGEST)
        self.pinned = set()

    def append(self, count, pinned=None, interrupted=False):
        first = self.cache.length
        tokens = np.arange(first, first + count)
        pinned = np.zeros(count, bool) if pinned is None else pinned
        self.pinned = {token for token in self.pinned if token < first} | set(tokens[pinned].tolist())
        try:
            with self.cache.appending(tokens, pinned) as placement:
                if count == 1:
                    assert placement.visible is None  # decode sees all of its past
                self.session.prefill(tokens, placement)
                if interrupted:
                    raise KeyboardInterrupt
        except KeyboardInterrupt:
            return
        for token in tokens.tolist():
            assert sorted(self.session.seen[token]) == self.expected(token), token

    def expected(self, token):
        window = self.config.window
        if window is None:
            return list(range(token + 1))
        return [j for j in range(token + 1) if token - j < window.length or j < window.sinks or j in self.pinned]


@pytest.mark.parametrize(
    "kv", ["f32", "k8v4,recent=5", "k8v4,window=0+16", "k8v4,window=4+20", "k4v4,window=3+17,pin=image"]
)
@pytest.mark.parametrize("seed", range(6))
def test_tokens_see_what_the_policy_says(kv, seed):
    """Chunks and single tokens at random, truncations and interrupts between them."""
    draw = random.Random(seed)
    conversation = Conversation(kv, pinned=60)
    config = conversation.config
    most = min(config.window.length if config.window else 30, 30)
    for _ in range(60):
        event, count = draw.random(), draw.choice([1, 1, 1, draw.randint(2, most)])
        if event < 0.06:
            length = draw.randint(0, conversation.cache.length)
            left = conversation.cache.truncate(length)
            assert left in (0, length)
            assert conversation.cache.length == left
        elif event < 0.1:
            before = conversation.cache.length
            conversation.append(count, interrupted=True)
            assert conversation.cache.length == before
            assert conversation.cache.truncate(before) in (0, before)
        elif conversation.cache.length + count <= LONGEST:
            pinned = None
            if config.pin_images and count > 1 and len(conversation.pinned) < 30:
                pinned = np.array([draw.random() < 0.3 for _ in range(count)])
            conversation.append(count, pinned)
    assert conversation.cache.length > 0


def test_a_window_takes_no_more_slots_however_long_the_conversation():
    conversation = Conversation("k8v4,window=4+16")
    assert conversation.session.capacity == 4 + 15
    for _ in range(LONGEST // 8):
        conversation.append(7)
        conversation.append(1)
    assert conversation.cache.length == LONGEST


def test_truncation_keeps_all_or_nothing_of_a_window():
    conversation = Conversation("k8v4,window=4+16")
    conversation.append(12)
    assert conversation.cache.truncate(9) == 9
    for _ in range(3):
        conversation.append(10)
    assert conversation.cache.truncate(39) == 39
    assert conversation.cache.truncate(38) == 0  # would see tokens that are gone
    conversation.append(16)


def test_too_many_pinned_tokens():
    conversation = Conversation("k8v4,window=0+16,pin=image", pinned=8)
    for _ in range(4):
        conversation.append(2, np.ones(2, bool))
    for _ in range(7):
        conversation.append(2, np.ones(2, bool))
    with pytest.raises(UserError, match="has 23 slots, too few for what is pinned: give fewer pictures"):
        conversation.append(2, np.ones(2, bool))


def test_common_prefix():
    conversation = Conversation("f32")
    cache = conversation.cache
    assert cache.common_prefix(np.array([7, 8])) == 0
    with cache.appending(np.array([7, -5, -6, 9])):
        pass
    assert cache.common_prefix(np.array([7, -5, -6, 9, 1, 2])) == 4
    assert cache.common_prefix(np.array([7, -5, 3, 9])) == 2
    assert cache.common_prefix(np.array([1])) == 0
    cache.truncate(1)
    assert cache.common_prefix(np.array([7, -5, -6, 9])) == 1


def test_tokens_that_never_came():
    conversation = Conversation("f32")
    cache = conversation.cache
    with cache.appending(np.array([7, 8])):
        pass
    with pytest.raises(KeyboardInterrupt), cache.appending(np.array([9, 10])):
        raise KeyboardInterrupt
    assert cache.common_prefix(np.array([7, 8, 9, 10])) == 2
    with cache.appending(np.array([11, 12])):
        pass
    assert cache.common_prefix(np.array([7, 8, 9, 10])) == 2
    assert cache.common_prefix(np.array([7, 8, 11, 12])) == 4


@pytest.mark.parametrize("kv", ["k8v4", "k8v4,window=4+16", "k8v4,recent=4"])
def test_a_prefix_comes_back(kv):
    conversation = Conversation(kv)
    conversation.append(14)
    prefix = conversation.cache.prefix(14)
    for _ in range(4):
        conversation.append(9)
    assert conversation.cache.restore(prefix, 12, np.zeros(12, bool))
    assert conversation.cache.length == 12
    conversation.append(1)
    conversation.append(7)


def test_a_prefix_that_a_window_would_have_dropped_is_not_taken():
    long, short = Conversation("k8v4"), Conversation("k8v4,window=4+16")
    long.append(30)
    prefix = long.cache.prefix(30)
    short.append(3)
    assert not short.cache.restore(prefix, 30, np.zeros(30, bool))
    assert short.cache.length == 3
    assert short.cache.restore(prefix, 19, np.zeros(19, bool))
    short.append(8)
    for _ in range(2):
        short.append(9)
    assert short.cache.prefix(37) is None


def test_saved_prefixes(tmp_path):
    rows = {bindings.past_key(0): np.arange(6, dtype=np.int32).reshape(1, 1, 3, 2)}
    path = tmp_path / "cache"
    Prefix(np.array([5, -6, 7]), rows).save(path, "abc")
    assert [file.name for file in tmp_path.iterdir()] == ["cache"]
    found = Prefix.load(path, "abc")
    np.testing.assert_array_equal(found.identities, [5, -6, 7])
    np.testing.assert_array_equal(found.rows[bindings.past_key(0)], rows[bindings.past_key(0)])
    assert found.common(np.array([5, -6, 8])) == 2
    with pytest.raises(UserError, match="was computed by another engine than this one: choose another file"):
        Prefix.load(path, "abd")
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(UserError, match="is no saved KV cache"):
        Prefix.load(path, "abc")
    with pytest.raises(UserError, match="is no saved KV cache"):
        Prefix.load(tmp_path / "none", "abc")
    with pytest.raises(UserError, match=r"cannot be saved to .* \(No such file or directory\)"):
        dataclasses.replace(found).save(tmp_path / "none" / "cache", "abc")

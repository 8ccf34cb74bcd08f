"""What the cache keeps and where: against the definition of each policy, token by token."""

import contextlib
import itertools
import random
from types import SimpleNamespace

import numpy as np
import pytest

from pascalvl.engines.engine import NewTokens, Session
from pascalvl.plugins import bindings
from pascalvl.plugins.bindings import Binding
from pascalvl.plugins.errors import UserError
from pascalvl.plugins.kv_format import PAGE_SLOTS, CacheConfig, pages_of
from pascalvl.plugins.model_config import TextConfig
from pascalvl.runtime.kv_cache import KVCache
from tests.engines.decoder import Given

TEXT = TextConfig(16, 8, 2, 1, 1, 128, 1000, (24, 20, 20), (0.5,) * 64, 1.0, (128,) * 2)
LONGEST = 700
"""Tokens of a conversation: of several pages, the last of which is not full."""
_NOTHING = -1


def engine_of(kv):
    model = SimpleNamespace(text=TEXT, num_deepstack=1)
    return SimpleNamespace(manifest=SimpleNamespace(model=model, kv_cache=CacheConfig.parse(kv)))


class TokenSession(Session):
    """Stores token numbers where a real one stores keys and values, ``pool`` ``[pages, 1, PAGE_SLOTS]``; what it shows
    a token is found in the decoder's inputs alone. ``seen`` collects that by token."""

    nbytes = 0
    stored = (Binding("tokens", np.dtype(np.int64), (bindings.PAGES, 1, PAGE_SLOTS)),)

    def __init__(self, sequence_pages, pages):
        super().__init__(engine_of("f32"), sequence_pages, pages)
        self.pool = np.full((pages, 1, PAGE_SLOTS), _NOTHING)
        self.seen = {}

    def step(self, sequences):
        inputs = self.inputs(sequences)
        tokens = inputs[bindings.INPUTS_EMBEDS][:, 0].astype(np.int64)
        visible = inputs[bindings.PAST_VISIBLE]
        assert visible.shape[1] in (1, self.sequence_pages * PAGE_SLOTS)
        for row, (begin, end) in enumerate(itertools.pairwise(inputs[bindings.CU_SEQLENS])):
            past = self.pool[inputs[bindings.PAGE_TABLE][row], 0].ravel()[: inputs[bindings.PAST_LENGTH][row]]
            shown_to = np.broadcast_to(visible[row, : len(past)], len(past))
            for i, token in enumerate(tokens[begin:end].tolist()):
                self.seen[token] = sorted([*past[i < shown_to].tolist(), *tokens[begin : begin + i + 1].tolist()])
        places = inputs["slots"]
        self.pool.reshape(-1)[places[places >= 0]] = tokens[places >= 0]
        return {}

    def _read(self, binding, pages):
        return self.pool[pages]

    def _write(self, binding, pages, array):
        self.pool[pages] = array


class Conversation:
    """A cache at work, in pages of its own of a session, in any order.

    Its tokens are numbered from ``first_number`` on; ``pinned`` are the places in the conversation of those that were.
    """

    def __init__(self, kv, pinned=0, session=None, pages=None, first_number=0):
        self.config = CacheConfig.parse(kv)
        needed = pages_of(self.config.slots(LONGEST, pinned))
        self.session = session or TokenSession(needed, needed)
        self.cache = KVCache(self.session, self.config, LONGEST, pages)
        self.first_number = first_number
        self.pinned = set()

    @contextlib.contextmanager
    def appending(self, count, pinned=None):
        """Inside, run the tokens that it gives, without any exception; checks then what they were shown."""
        first = self.cache.length
        places = np.arange(first, first + count)
        pinned = np.zeros(count, bool) if pinned is None else pinned
        tokens = self.first_number + places
        with self.cache.appending(tokens, pinned) as placement:
            if count == 1:
                assert placement.visible is None  # decode sees all of its past
            rope = np.zeros((count, TEXT.head_dim), np.float32)
            self.pinned = {place for place in self.pinned if place < first} | set(places[pinned].tolist())
            yield NewTokens(Given(np.repeat(tokens[:, None], TEXT.hidden_size, 1)), rope, rope, placement)
        for place in places.tolist():
            seen = self.session.seen[self.first_number + place]
            assert [token - self.first_number for token in seen] == self.expected(place), place

    def append(self, count, pinned=None, interrupted=False):
        with contextlib.suppress(KeyboardInterrupt), self.appending(count, pinned) as tokens:
            self.session.step([tokens])
            if interrupted:
                raise KeyboardInterrupt

    def draw_chunk(self, draw):
        """How many tokens a random step has, and which of them are pinned, if any."""
        window = self.config.window
        most = min(window.length if window else 90, 90)
        count = draw.choice([1, 1, 1, draw.randint(2, most)])
        pinned = None
        if self.config.pin_images and count > 1 and len(self.pinned) < 30:
            pinned = np.array([draw.random() < 0.3 for _ in range(count)])
        return count, pinned

    def truncate(self, length):
        left = self.cache.truncate(length)
        assert left in (0, length)
        assert self.cache.length == left

    def expected(self, place):
        window = self.config.window
        if window is None:
            return list(range(place + 1))
        return [j for j in range(place + 1) if place - j < window.length or j < window.sinks or j in self.pinned]


def copied(cache, tokens):
    """Identities and rows of the first tokens; None: some were dropped."""
    rows = cache.rows(tokens)
    return rows and (cache.identities[:tokens].copy(), rows)


def restored(cache, prefix, pinned):
    """Begin anew with the first tokens of what was `copied`, of which some are pinned, unless a window drops some."""
    (identities, rows), tokens = prefix, len(pinned)
    if not cache.keeps(pinned):
        return False
    cache.truncate(0)
    cache.session.write(np.array(cache.pages[: pages_of(tokens)]), rows)
    cache.begin(identities[:tokens], pinned)
    return True


POLICIES = [
    "f32", "k8v4,window=0+16", "k8v4,window=4+20", "k4v4,window=3+17,pin=image", "f32,window=5+180",
    "k8v8,window=30+150,pin=image",
]  # fmt: skip
PINNED = 120
"""Room for pinned tokens: 30, and a chunk of 90 that begins before there are as many."""


@pytest.mark.parametrize("kv", POLICIES)
@pytest.mark.parametrize("seed", range(6))
def test_tokens_see_what_the_policy_says(kv, seed):
    """Chunks and single tokens at random, truncations and interrupts between them."""
    draw = random.Random(seed)
    conversation = Conversation(kv, PINNED)
    longest = 0
    for _ in range(60):
        event = draw.random()
        count, pinned = conversation.draw_chunk(draw)
        if event < 0.06:
            conversation.truncate(draw.randint(0, conversation.cache.length))
        elif event < 0.1:
            before = conversation.cache.length
            conversation.append(count, interrupted=True)
            assert conversation.cache.length == before
            assert conversation.cache.truncate(before) in (0, before)
        elif conversation.cache.length + count <= LONGEST:
            conversation.append(count, pinned)
        longest = max(longest, conversation.cache.length)
    # Tokens were dropped, or there was more than a page of them.
    assert longest > (conversation.config.slots(LONGEST) if conversation.config.window else PAGE_SLOTS)


@pytest.mark.parametrize("seed", range(12))
def test_conversations_in_one_pool_do_not_disturb_each_other(seed):
    """Each sees its own past alone, whatever the order of its pages, and what others append, forget or restore.

    Some of them run in one step, windows among them; a page of nobody's stays as it was.
    """
    draw = random.Random(seed)
    policies = draw.sample(POLICIES, 3)
    needed = [pages_of(CacheConfig.parse(kv).slots(LONGEST, PINNED)) for kv in policies]
    session = TokenSession(max(needed), sum(needed) + 1)
    order = np.array(draw.sample(range(session.pages), session.pages), np.int32)
    *tables, (nobodys,) = np.split(order, np.cumsum(needed))
    conversations = [
        Conversation(kv, PINNED, session, pages, first_number=1000 * number)
        for number, (kv, pages) in enumerate(zip(policies, tables, strict=True))
    ]
    prefixes = {}
    together = 0
    for _ in range(80):
        event, one = draw.random(), draw.choice(conversations)
        length = draw.randint(0, one.cache.length)
        others = [pages for other, pages in zip(conversations, tables, strict=True) if other is not one]
        before = [session.pool[pages].copy() for pages in others]
        if event < 0.06:
            one.truncate(length)
        elif event < 0.12:
            if one.cache.length + 90 <= LONGEST:
                one.append(one.draw_chunk(draw)[0], interrupted=True)
                one.truncate(one.cache.length)
        elif event < 0.18:
            if length and (prefix := copied(one.cache, length)):
                prefixes[one] = prefix, one.pinned
        elif event < 0.26 and one in prefixes:
            prefix, pinned = prefixes[one]
            length = draw.randint(1, len(prefix[0]))
            if restored(one.cache, prefix, np.isin(np.arange(length), list(pinned))):
                one.pinned = {place for place in pinned if place < length}
        else:
            running = draw.sample(conversations, draw.randint(1, 3))
            running = [conversation for conversation in running if conversation.cache.length + 90 <= LONGEST]
            with contextlib.ExitStack() as stack:
                tokens = [stack.enter_context(other.appending(*other.draw_chunk(draw))) for other in running]
                if tokens:
                    session.step(tokens)
            together += len(running) > 1
            continue
        for pages, content in zip(others, before, strict=True):
            np.testing.assert_array_equal(session.pool[pages], content)
    assert together > 10
    assert (session.pool[nobodys] == _NOTHING).all()
    for conversation in conversations:  # all that it has, once more
        if conversation.cache.length < LONGEST:
            conversation.append(1)


def test_a_window_takes_no_more_slots_however_long_the_conversation():
    """Also of the page that it has to have as a whole: what lies in more slots takes longer to read."""
    conversation = Conversation("k8v4,window=4+16")
    assert conversation.cache.capacity == PAGE_SLOTS
    for _ in range(LONGEST // 10):
        conversation.append(7)
        conversation.append(1)
        conversation.append(2)
    assert conversation.cache.length == LONGEST
    assert (conversation.session.pool >= 0).sum() == 4 + 15


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
    for _ in range(PAGE_SLOTS // 2):
        conversation.append(2, np.ones(2, bool))
    with pytest.raises(UserError, match=f"has {PAGE_SLOTS} slots, too few for what is pinned: give fewer pictures"):
        conversation.append(2, np.ones(2, bool))


def test_more_tokens_than_slots():
    """Of a cache without a window: none is appended, and the slots can be filled after that."""
    conversation = Conversation("f32", pages=np.array([1], np.int32))
    conversation.append(PAGE_SLOTS - 1)
    with pytest.raises(UserError, match=f"has {PAGE_SLOTS} slots"), conversation.cache.appending(np.zeros(2, np.int64)):
        pass
    assert conversation.cache.length == PAGE_SLOTS - 1
    conversation.append(1)


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


@pytest.mark.parametrize(
    ("kv", "tokens", "kept"),
    [
        ("k8v4", 14, 12),
        ("k8v4,window=4+16", 14, 12),
        ("k8v4", 300, 256),
        ("k8v4", 256, 129),
        ("k8v4", 257, 128),
        ("k8v4,window=4+400", 300, 257),
    ],
)
def test_a_prefix_comes_back(kv, tokens, kept):
    conversation = Conversation(kv)
    conversation.append(tokens)
    prefix = copied(conversation.cache, tokens)
    assert prefix[1]["tokens"].shape == (pages_of(tokens), 1, PAGE_SLOTS)
    for _ in range(4):
        conversation.append(9)
    conversation.cache.truncate(0)
    for _ in range(30):
        conversation.append(10)  # over all of it
    assert restored(conversation.cache, prefix, np.zeros(kept, bool))
    assert conversation.cache.length == kept
    conversation.append(1)
    conversation.append(7)


def test_a_prefix_comes_back_in_other_pages():
    """What one conversation began with, another one of the same session goes on from; the first as well."""
    session = TokenSession(3, 6)
    first = Conversation("f32", session=session, pages=np.array([4, 1, 3], np.int32))
    other = Conversation("f32", session=session, pages=np.array([5, 0, 2], np.int32))
    for _ in range(3):
        first.append(70)
    prefix = copied(first.cache, 200)
    other.append(60)
    assert restored(other.cache, prefix, np.zeros(190, bool))
    assert other.cache.common_prefix(np.arange(210)) == 190
    for conversation in (other, first, other):
        conversation.append(1)
        conversation.append(50)
    np.testing.assert_array_equal(session.pool[[5, 0, 2]].ravel()[:292], np.arange(292))


def test_a_prefix_has_nothing_behind_its_last_token():
    """Neither what came after it, nor what was there before: saved files tell no more than the tokens kept."""
    conversation = Conversation("f32")
    conversation.append(300)
    prefix = copied(conversation.cache, 200)
    np.testing.assert_array_equal(prefix[1]["tokens"].ravel(), [*range(200), *[0] * 56])
    np.testing.assert_array_equal(conversation.session.pool.ravel()[:300], np.arange(300))


def test_a_prefix_that_a_window_would_have_dropped_is_not_taken():
    long, short = Conversation("k8v4"), Conversation("k8v4,window=4+16")
    long.append(30)
    prefix = copied(long.cache, 30)
    short.append(3)
    assert not restored(short.cache, prefix, np.zeros(30, bool))
    assert short.cache.length == 3
    assert restored(short.cache, prefix, np.zeros(19, bool))
    short.append(8)
    for _ in range(2):
        short.append(9)
    assert copied(short.cache, 37) is None

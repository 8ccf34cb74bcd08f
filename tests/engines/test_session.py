"""The pool of a host session: what is appended is what the decoder reads, of several sequences at once."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from pascalvl.engines import Engine
from pascalvl.engines.choice import NO_TOKEN
from pascalvl.engines.engine import ALWAYS_VISIBLE, SLOTS, Features, Placement, Session, VisualRows
from pascalvl.plugins import bindings
from pascalvl.plugins.errors import UserError
from pascalvl.plugins.kv_format import PAGE_SLOTS, CacheConfig
from pascalvl.plugins.model_config import TextConfig
from tests.engines.decoder import CACHES, random_pool, random_tokens

CONFIG = TextConfig(
    vocab_size=16,
    hidden_size=8,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=128,
    max_position_embeddings=64,
    mrope_section=(24, 20, 20),
    rope_inv_freq=(0.5,) * 64,
    rope_attention_scaling=1.0,
    value_dims=(128, 96, 128, 64),
)
MODEL = SimpleNamespace(text=CONFIG, num_deepstack=1)
CAPACITY, PAGES = 2 * PAGE_SLOTS - 5, 6
"""Two pages a sequence."""
DIRTY = 77
"""What arrays hold before they are filled."""


class RandomEngine(Engine):
    """Returns random outputs; ``feeds`` and ``outputs`` are those of its last run."""

    def __init__(self, kv):
        super().__init__(Path(), SimpleNamespace(model=MODEL, kv_cache=CacheConfig.parse(kv)))
        self.rng = np.random.default_rng(0)

    def run(self, graph, feeds):
        assert graph == bindings.DECODER
        sizes = {"tokens": len(feeds[bindings.INPUTS_EMBEDS]), "rows": len(feeds[bindings.LOGIT_ROWS])}
        outputs = {
            b.name: self.rng.integers(-(1 << 31), 1 << 31, [sizes.get(d, d) for d in b.shape]).astype(b.dtype)
            for b in bindings.decoder_outputs(MODEL, self.manifest.kv_cache)
        }
        self.feeds, self.outputs = feeds, dict(outputs)
        return outputs


def _new(pages, past_length, slots, visible=None, seed=0, **options):
    """Random tokens of one sequence."""
    pages, slots, visible = (None if a is None else np.array(a, np.int32) for a in (pages, slots, visible))
    placement = Placement(pages, past_length, slots, visible)
    return random_tokens(CONFIG, placement, np.random.default_rng(seed), **options)


@pytest.fixture
def session():
    return RandomEngine("f32").open_session(CAPACITY, PAGES)


@pytest.fixture
def sequences():
    """A chunk of a prompt whose first slots not all tokens see, a decode step, and a chunk that is kept in part."""
    visible = np.full(2 * PAGE_SLOTS, ALWAYS_VISIBLE)
    visible[:3] = 2, 1, 0
    return [
        _new([5, 2], 130, [130, 131, 132], visible, seed=1, rows=(0, 2)),
        _new([3], 40, [40], seed=2),
        _new([0, 4], 0, [-1, 127, 128, 2], seed=3),
    ]


# Pages ----------------------------------------------------------------------------------------------------------------


def test_places_are_slots_of_the_sequences_pages():
    placement = Placement(np.array([5, 0, 2]), 0, np.array([0, 127, -1, 128, 300, 383]))
    assert placement.places.dtype == np.int32
    assert placement.places.tolist() == [5 * 128, 5 * 128 + 127, -1, 0, 2 * 128 + 44, 2 * 128 + 127]


@pytest.mark.parametrize("kv", CACHES)
def test_rows_are_where_the_decoder_reads_them(kv):
    """Two steps of two sequences; nothing else of the pool is touched."""
    engine = RandomEngine(kv)
    session = engine.open_session(CAPACITY, PAGES)
    expected = {b.name: np.zeros(session.shape_of(b), b.dtype) for b in session.stored}
    for sequences, stored in (
        (
            [_new([3, 1], 0, [4, 130, -1, 2]), _new([4], 0, [127])],
            {0: (3, 4), 1: (1, 2), 3: (3, 2), 4: (4, 127)},  # by token: page and its slot
        ),
        ([_new([3, 1], 7, [0]), _new([4, 0], 128, [128, 129])], {0: (3, 0), 1: (0, 0), 2: (0, 1)}),
    ):
        outputs = session.step(sequences)
        assert outputs.keys() == {bindings.LOGITS}
        np.testing.assert_array_equal(outputs[bindings.LOGITS], engine.outputs[bindings.LOGITS])
        for layer, layout in enumerate(session.layouts):
            inputs = bindings.cache_inputs(MODEL, session.cache, layer)
            assert len(inputs) == 2 + layout.kv_format.is_quantised
            for pool, rows in zip(inputs, bindings.new_rows(MODEL, session.cache, layer), strict=True):
                for token, (page, slot) in stored.items():
                    expected[pool.name][page, :, slot] = engine.outputs[rows.name][:, token]
        session.step([_new([2], 0, [-1])])
        for name, array in expected.items():
            found = engine.feeds[name]
            assert found.flags.c_contiguous
            assert found.dtype == array.dtype
            np.testing.assert_array_equal(found, array)


@pytest.mark.parametrize("kv", CACHES)
def test_pages_can_be_copied_elsewhere(kv):
    engine = RandomEngine(kv)
    session, other = engine.open_session(CAPACITY, PAGES), engine.open_session(CAPACITY, 4)
    pool = random_pool(MODEL, session.cache, PAGES, np.random.default_rng(0))
    session.write(np.arange(PAGES), pool)
    rows = session.read(np.array([4, 0, 5]))
    assert rows.keys() == pool.keys()
    session.step([_new([4], 0, [0])])  # which copies know nothing of
    other.write(np.array([3, 1]), rows)  # the first of them
    found = other.read(np.arange(4))
    for name, array in pool.items():
        np.testing.assert_array_equal(rows[name], array[[4, 0, 5]])
        np.testing.assert_array_equal(found[name][[3, 1]], array[[4, 0]])
        assert not found[name][[0, 2]].any()


@pytest.mark.parametrize("kv", CACHES)
def test_bytes_are_those_foretold(kv):
    engine = RandomEngine(kv)
    for given, pages in ((None, 2), (PAGES, PAGES)):
        session = engine.open_session(CAPACITY, given)
        assert (session.sequence_pages, session.pages) == (2, pages)
        assert session.nbytes == session.cache.nbytes(CONFIG, pages * PAGE_SLOTS)


@pytest.mark.parametrize(
    ("given", "told"),
    [((1 << 45,), r"a context of \d+ tokens"), ((300, 1 << 38), r"a context of 300 tokens in a pool of \d+ pages")],
)
def test_more_context_than_memory(given, told):
    with pytest.raises(UserError, match=rf"{told} needs [\d.]+ GB for its KV cache"):
        RandomEngine("f32").open_session(*given)


# Inputs ---------------------------------------------------------------------------------------------------------------


def test_inputs_of_several_sequences(session, sequences):
    inputs = session.inputs(sequences)
    assert inputs[bindings.CU_SEQLENS].tolist() == [0, 3, 4, 8]
    assert inputs[bindings.PAST_LENGTH].tolist() == [130, 40, 0]
    table = inputs[bindings.PAGE_TABLE]
    assert table.shape == (3, 2)
    assert [table[0].tolist(), table[1, :1].tolist(), table[2].tolist()] == [[5, 2], [3], [0, 4]]
    assert inputs[bindings.LOGIT_ROWS].tolist() == [0, 2, 3, 7]
    assert inputs[SLOTS.name].tolist() == [258, 259, 260, 3 * 128 + 40, -1, 127, 4 * 128, 2]
    visible = np.full((3, 2 * PAGE_SLOTS), ALWAYS_VISIBLE)
    visible[0, :3] = 2, 1, 0
    np.testing.assert_array_equal(inputs[bindings.PAST_VISIBLE], visible)
    given = [(new.embeds.array, new.rope_cos, new.rope_sin) for new in sequences]
    for name, arrays in zip(
        (bindings.INPUTS_EMBEDS, bindings.ROPE_COS, bindings.ROPE_SIN), zip(*given, strict=True), strict=True
    ):
        np.testing.assert_array_equal(inputs[name], np.concatenate(arrays))


def test_where_all_is_seen_one_column_says_so(session, sequences):
    visible = session.inputs(sequences[1:])[bindings.PAST_VISIBLE]
    assert visible.tolist() == [[ALWAYS_VISIBLE]] * 2


def test_fill_leaves_room_empty(session, sequences):
    """In arrays for ten tokens, four sequences and six rows, which a step of more has used before."""
    sizes = {"tokens": 10, "batch": 4, "batch_plus_1": 5, "rows": 6, "visible_slots": 2 * PAGE_SLOTS, **session.sizes}
    listed = [*bindings.decoder_inputs(MODEL, session.cache), SLOTS]
    expected = session.inputs(sequences)
    inputs = {
        b.name: np.full([sizes.get(size, size) for size in b.shape], DIRTY, b.dtype)
        for b in listed
        if b.name in expected
    }
    inputs[bindings.PAST_VISIBLE][:] = ALWAYS_VISIBLE
    Session.fill(inputs, sequences)
    assert inputs[bindings.CU_SEQLENS].tolist() == [0, 3, 4, 8, 8]
    assert inputs[bindings.PAST_LENGTH].tolist() == [130, 40, 0, 0]
    assert inputs[bindings.LOGIT_ROWS].tolist() == [0, 2, 3, 7, 0, 0]
    assert inputs[SLOTS.name][8:].tolist() == [-1, -1]
    for name in (bindings.INPUTS_EMBEDS, bindings.ROPE_COS, bindings.ROPE_SIN, SLOTS.name):
        np.testing.assert_array_equal(inputs[name][:8], expected[name])
    for number, new in enumerate(sequences):
        pages = new.placement.pages
        np.testing.assert_array_equal(inputs[bindings.PAGE_TABLE][number, : len(pages)], pages)
    np.testing.assert_array_equal(inputs[bindings.PAST_VISIBLE][:3], expected[bindings.PAST_VISIBLE])
    assert (inputs[bindings.PAST_VISIBLE][3] == ALWAYS_VISIBLE).all()


@pytest.mark.parametrize("kv", CACHES)
def test_feeds_are_the_decoders_inputs(kv, sequences):
    engine = RandomEngine(kv)
    session = engine.open_session(CAPACITY, PAGES)
    listed = bindings.decoder_inputs(MODEL, session.cache)
    sizes = {"tokens": 8, "batch": 3, "batch_plus_1": 4, "rows": 4, "visible_slots": 2 * PAGE_SLOTS, **session.sizes}
    plain = {"tokens": 1, "batch": 1, "batch_plus_1": 2, "rows": 1, "visible_slots": 1}
    for given, of_step in ((sequences, sizes), (sequences[1:2], sizes | plain)):
        session.step(given)
        assert engine.feeds.keys() == {b.name for b in listed}
        for b in listed:
            assert engine.feeds[b.name].dtype == b.dtype
            assert engine.feeds[b.name].shape == tuple(of_step.get(size, size) for size in b.shape)


def test_what_no_step_takes(session, sequences):
    for wrong in ([], [sequences[1], _new([0], 4, [])]):
        with pytest.raises(ValueError, match="at least one sequence, and each of them at least one token"):
            session.inputs(wrong)
    with pytest.raises(ValueError, match=r"shape \(3,\) into shape \(2,\)"):
        session.inputs([_new([0, 1, 2], 0, [0])])


def test_visuals_take_the_place_of_embeddings():
    """Each where its own sequence is."""
    engine = RandomEngine("f32")
    session = engine.open_session(CAPACITY, PAGES)
    rng = np.random.default_rng(0)
    features = [Features(rng.standard_normal((n, 8)), rng.standard_normal((1, n, 8))) for n in (4, 3)]
    first = VisualRows(features[0], slice(2, 4), np.array([1, 2]))
    second = VisualRows(features[1], slice(0, 3), np.array([0, 1, 3]))
    session.step(
        [
            _new([0], 0, range(3), seed=1, visuals=[first]),
            _new([1], 9, [9], seed=2),
            _new([2], 0, range(4), seed=3, visuals=[second, first]),
        ]
    )
    embeds = np.concatenate([_new([0], 0, range(n), seed=s).embeds.array for n, s in ((3, 1), (1, 2), (4, 3))])
    levels = np.zeros((1, 8, 8), np.float32)
    for tokens, (source, rows) in {
        (1, 2): (features[0], slice(2, 4)),
        (4, 5, 7): (features[1], slice(0, 3)),
        (5, 6): (features[0], slice(2, 4)),  # the later one counts
    }.items():
        embeds[list(tokens)] = source.embeds[rows]
        levels[:, list(tokens)] = source.levels[:, rows]
    np.testing.assert_array_equal(engine.feeds[bindings.INPUTS_EMBEDS], embeds)
    np.testing.assert_array_equal(engine.feeds[bindings.DEEPSTACK_EMBEDS], levels)
    assert first.tokens.tolist() == [1, 2]
    session.step([_new([1], 8, [8])])
    assert not engine.feeds[bindings.DEEPSTACK_EMBEDS].any()


def test_kinds_of_new_tokens(sequences):
    visual = VisualRows(Features(None, None), slice(0, 1), np.array([0]))
    kinds = [
        (sequences[0], False, False),
        (sequences[1], True, True),
        (sequences[2], True, False),
        (_new([0], 4, [4], visuals=[visual]), True, False),
        (_new([0], 4, [4], [1, 1, 0, 1]), False, False),
        (_new([0], 4, [4], rows=()), False, False),
    ]
    assert [(new.is_plain, new.is_decode) for new, *_ in kinds] == [tuple(kind) for _, *kind in kinds]
    assert [tuple(new.logit_rows) for new, *_ in kinds] == [(0, 2), (0,), (3,), (0,), (0,), ()]


def test_greedy_takes_the_first_of_equal_logits(session, monkeypatch):
    logits = np.array([[0.5, 2, 1, 2], [1, np.nan, 3, 0], [-1, -2, -3, -1]], np.float32)
    monkeypatch.setattr(session, "step", lambda _: {bindings.LOGITS: logits})
    np.testing.assert_equal(session.choose([]), [(1, 2.0), (NO_TOKEN, np.nan), (0, -1.0)])

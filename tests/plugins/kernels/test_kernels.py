"""The kernels against NumPy: on the emulator, and on a GPU where there is one."""

import dataclasses

import numpy as np
import pytest

from pascalvl.plugins.errors import UserError
from pascalvl.plugins.kernels.library import AppendArgs, AppendLayer, AttentionArgs, KernelLibrary
from pascalvl.plugins.kv_format import RowFormat
from pascalvl.plugins.kv_rows import compress, expand, hadamard
from tests.plugins.kernels import reference
from tests.plugins.kernels.reference import (
    PAIRS,
    HostRows,
    Pool,
    Prologue,
    Shape,
    aligned,
    append,
    attention,
    causal_attention,
    copy,
    expected_attention,
    packed,
    packed_attention,
    packed_rows,
    pointer,
    relative_error,
)

F32 = PAIRS[0]
TOLERANCE = 3e-6
"""FP32 sums of some hundred terms against float64: measured up to 6e-7. A cache's rounding is in the reference too."""


@pytest.fixture(scope="module", params=reference.targets())
def library(request) -> KernelLibrary:
    return reference.open_library(request.param)


def normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    array = aligned(shape)
    array[:] = rng.standard_normal(shape)
    return array


def make_case(library, shape: Shape, formats, rotated: bool, seq: int, past, seed: int, outliers: bool = False):
    """A cache that holds `past` tokens of each sequence, and new q, k, v."""
    rng = np.random.default_rng(seed)
    cache = HostRows(library, shape, formats, rotated)
    old = (1, shape.batch, shape.num_kv_heads, shape.capacity)
    old_k, old_v = normal(rng, *old, shape.head_dim), normal(rng, *old, shape.value_dim)
    q = normal(rng, shape.batch, shape.num_heads, seq, shape.head_dim)
    k = normal(rng, shape.batch, shape.num_kv_heads, seq, shape.head_dim)
    v = normal(rng, shape.batch, shape.num_kv_heads, seq, shape.value_dim)
    if outliers:
        spread = np.geomspace(0.1, 10, shape.head_dim).astype(np.float32)
        old_k *= spread
        k *= spread
        q /= spread
    cache.fill(old_k, old_v)
    # What lies beyond the past must not be seen.
    for rows, scales in zip(cache.rows, cache.scales, strict=True):
        for b, length in enumerate(past):
            rows[:, b, :, length:] = 0x7F
            scales[:, b, :, length:] = np.nan
    return cache, q, k, v, np.array(past, np.int32)


def error_of(library: KernelLibrary, case: tuple, softmax_scale: float, visible: np.ndarray | None = None) -> float:
    """Of the library's attention, relative to float64's over the same rows."""
    cache, q, _, _, past = case
    found, new = causal_attention(library, *case, softmax_scale, visible)
    return relative_error(found, expected_attention(cache, new, q, past, softmax_scale, visible))


# kv_append ------------------------------------------------------------------------------------------------------------


def extremes(rows: np.ndarray) -> None:
    """Make the first of seven tokens or more [..., token, dim] hard to store, the others stay."""
    rows[..., 0, :] = 0
    rows[..., 1, :] *= 1e-9  # its scale rounds to zero
    rows[..., 2, :] *= 1e-5  # below float16's normal numbers
    rows[..., 3, :] *= 1e8
    rows[..., 4, 5] = -np.inf


DIMS = [(128, 128, True), (128, 96, False), (112, 64, False), (96, 112, False), (64, 128, False)]
"""Of keys and values, and whether keys are rotated where they are quantised."""


@pytest.mark.parametrize("formats", PAIRS)
@pytest.mark.parametrize(("head_dim", "value_dim", "rotated"), DIMS)
@pytest.mark.parametrize("seq", [1, 8])
def test_new_rows_are_what_compress_gives(library, formats, head_dim, value_dim, rotated, seq):
    rotated = rotated and formats[0].is_quantised
    rng = np.random.default_rng(0)
    shape = Shape(batch=2, num_heads=6, num_kv_heads=3, head_dim=head_dim, value_dim=value_dim, capacity=seq)
    q, key, value = (normal(rng, 2, heads, seq, dim) for heads, dim in ((6, head_dim), (3, head_dim), (3, value_dim)))
    if seq > 1:
        extremes(key)
        extremes(value)
    cache = HostRows(library, shape, formats, rotated)
    _, new = causal_attention(library, cache, q, key, value, np.zeros(2, np.int32), 0.1)
    with np.errstate(invalid="ignore"):
        cache.fill(key[None], value[None])
    for found, expected in zip(new.arrays, cache.arrays, strict=True):
        np.testing.assert_array_equal(found, expected)


def make_prologue(rng: np.random.Generator, batch: int, seq: int, head_dim: int) -> Prologue:
    angle = np.tile(rng.uniform(0, 6.3, (batch, seq, head_dim // 2)), 2)
    tables = (f(angle).astype(np.float32) for f in (np.cos, np.sin))
    return Prologue(*(normal(rng, head_dim) for _ in range(2)), *tables, epsilon=0.1)


@pytest.mark.parametrize("head_dim", [64, 96, 112, 128])
@pytest.mark.parametrize(("seq", "past"), [(1, 70), (9, 3), (9, 0)])
def test_queries_and_keys_are_normed_and_rotated(library, head_dim, seq, past):
    rng = np.random.default_rng(head_dim + seq)
    shape = Shape(batch=2, num_heads=4, num_kv_heads=2, head_dim=head_dim, value_dim=64, capacity=70)
    case = cache, q, k, v, lengths = make_case(library, shape, F32, False, seq, [past, past // 2], 50)
    prologue = make_prologue(rng, 2, seq, head_dim)
    found, new = causal_attention(library, *case, 0.1, None, prologue)
    keys = prologue.of(k, prologue.k_norm)
    assert relative_error(new.contents(0), keys) < TOLERANCE
    np.testing.assert_array_equal(new.contents(1), v)
    expected = expected_attention(cache, new, prologue.of(q, prologue.q_norm), lengths, 0.1)
    assert relative_error(found, expected) < TOLERANCE


@pytest.mark.parametrize("formats", PAIRS[1:])
@pytest.mark.parametrize("seq", [1, 9])
def test_what_is_normed_and_rotated_is_quantised(library, formats, seq):
    """Within a step and a bit: a code may be another where float32's rounding meets a border."""
    rng = np.random.default_rng(51)
    shape = Shape(batch=2, num_heads=4, num_kv_heads=2, capacity=70)
    case = cache, q, k, _, lengths = make_case(library, shape, formats, formats[0].is_quantised, seq, [70, 3], 52)
    prologue = make_prologue(rng, 2, seq, 128)
    found, new = causal_attention(library, *case, 0.1, None, prologue)
    keys = prologue.of(k, prologue.k_norm).astype(np.float32)
    turned = hadamard(keys) if cache.rotated else keys
    rows, scale = compress(keys, formats[0], cache.rotated)
    step = np.abs(scale.astype(np.float64)[..., None]) if formats[0].is_quantised else np.abs(turned) * 2**-10
    assert (np.abs(new.contents(0) - expand(rows, scale, formats[0], 128)) <= 1.01 * step + 1e-6).all()
    queries = prologue.of(q, prologue.q_norm).astype(np.float32)
    # Another code for one of 128 elements in a few rows.
    assert relative_error(found, expected_attention(cache, new, queries, lengths, 0.1)) < 2e-4


@pytest.mark.parametrize("formats", PAIRS)
def test_rows_do_not_depend_on_the_chunks_that_tokens_come_in(library, formats):
    """To the bit; and what attention gives, but for the order of its sums."""
    rng = np.random.default_rng(53)
    shape = Shape(num_heads=4, num_kv_heads=2, capacity=24)
    rotated = formats[0].is_quantised
    cache, q, k, v, _ = make_case(library, shape, formats, rotated, 24, [0], 54)
    prologue = make_prologue(rng, 1, 24, 128)
    whole, new = causal_attention(library, cache, q, k, v, np.array([0], np.int32), 0.1, None, prologue)
    for start, stop in ((0, 5), (5, 6), (6, 7), (7, 24)):
        part = np.s_[:, :, start:stop]
        tables = (table[:, start:stop] for table in (prologue.rope_cos, prologue.rope_sin))
        own = Prologue(prologue.q_norm, prologue.k_norm, *tables, prologue.epsilon)
        past = np.array([start], np.int32)
        found, rows = causal_attention(library, cache, q[part], k[part], v[part], past, 0.1, None, own)
        append(library, cache, rows, np.arange(start, stop)[None])
        assert relative_error(found, whole[:, start:stop]) < TOLERANCE
    for found, expected in zip(cache.arrays, new.arrays, strict=True):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("formats", PAIRS)
def test_append_copies_rows_to_their_slots(library, formats):
    """Negative slots, and those beyond the pool, are nowhere; layers of other formats go in the same launch."""
    rng = np.random.default_rng(0)
    shape = Shape(batch=2, num_kv_heads=3, capacity=131)
    slots = np.array([[5, -1, 0, 131, 3, 130, 4, 8], [7, 127, 128, -9, 999, 3, 2, 1]], np.int32)
    of_formats = [formats, PAIRS[2]] * 35  # more layers than a launch takes
    caches = [HostRows(library, shape, pair) for pair in of_formats]
    news = [HostRows(library, dataclasses.replace(shape, capacity=8), pair) for pair in of_formats]
    for new in news:
        for array in new.arrays:
            array.view(np.uint8)[...] = rng.integers(0, 256, array.view(np.uint8).shape)
    pools, rows = [Pool(cache) for cache in caches], [packed_rows(new) for new in news]
    layers = [
        AppendLayer(new_rows=new.view(), pool=pool.view(), key_row=c.rows[0].shape[-1], value_row=c.rows[1].shape[-1])
        for new, pool, c in zip(rows, pools, caches, strict=True)
    ]
    places = copy(pools[0].places(slots).reshape(-1))
    args = AppendArgs.of(
        layers, slots=pointer(places), num_kv_heads=3, tokens=len(places), num_pages=pools[0].num_pages
    )
    library.kv_append(args)
    reference.memory.wait()
    for pool in pools:
        pool.read_back()
    for new, cache in zip(news, caches, strict=True):
        for source, found in zip(new.arrays, cache.arrays, strict=True):
            expected = np.zeros_like(found)
            for b, token in np.ndindex(slots.shape):
                if 0 <= (slot := slots[b, token]) < shape.capacity:
                    expected[:, b, :, slot] = source[:, b, :, token]
            np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("row_format", list(RowFormat))
@pytest.mark.parametrize("dim", [64, 96, 112, 128])
@pytest.mark.parametrize("rotated", [False, True])
def test_rows_read_back(row_format, dim, rotated):
    """Within half a step, a whole one above the seventh; or the format's own rounding."""
    x = np.random.default_rng(dim).standard_normal((200, dim)).astype(np.float32)
    x[0] = np.abs(x[0])
    x[1] = -np.abs(x[1])
    if rotated and not (dim == 128 and row_format.is_quantised):
        pytest.skip("is not rotated")
    rows, scale = compress(x, row_format, rotated)
    found = expand(rows, scale, row_format, dim)
    x = hadamard(x) if rotated else x
    error = np.abs(found - x)
    if not row_format.is_quantised:
        exact = row_format is RowFormat.FLOAT32
        assert (error <= (0 if exact else np.abs(x) * 2**-11 + 2**-25)).all()
        return
    step = scale.astype(np.float32)[:, None]
    largest = np.abs(x).max(-1) / np.abs(step[:, 0])
    np.testing.assert_allclose(largest, 127 if row_format is RowFormat.INT8 else 8, rtol=2**-11)
    clipped = (row_format is RowFormat.INT4) & (x / step > 7)
    assert (error <= np.abs(step) * np.where(clipped, 1.01, 0.51)).all()
    assert clipped.mean() < 0.01


# Prefill --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("formats", PAIRS)
@pytest.mark.parametrize("outliers", [False, True])
def test_prefill_over_every_format(library, formats, outliers):
    shape = Shape(batch=2, num_heads=4, num_kv_heads=2)
    case = make_case(library, shape, formats, False, 37, [130, 64], 2, outliers)
    assert error_of(library, case, 0.1) < TOLERANCE


@pytest.mark.parametrize("formats", PAIRS[2:])
@pytest.mark.parametrize("seq", [1, 37])
def test_rotated_keys_that_have_outliers(library, formats, seq):
    shape = Shape(batch=2, num_heads=8, num_kv_heads=2)
    case = make_case(library, shape, formats, True, seq, [201, 64], 8, outliers=True)
    assert error_of(library, case, 0.1) < TOLERANCE


@pytest.mark.parametrize("seq", [1, 2, 15, 16, 17, 64, 65, 100])
@pytest.mark.parametrize("past", [0, 1, 63, 64, 65])
def test_prefill_of_any_length(library, seq, past):
    shape = Shape(batch=1, num_heads=8, num_kv_heads=1)
    case = make_case(library, shape, F32, False, seq, [past], 3)
    assert error_of(library, case, 0.2) < TOLERANCE


@pytest.mark.parametrize(("head_dim", "value_dim"), [(64, 64), (96, 64), (112, 96), (64, 128), (128, 112)])
@pytest.mark.parametrize("formats", [F32, PAIRS[-1]])
def test_prefill_of_reduced_ranks(library, formats, head_dim, value_dim):
    shape = Shape(num_heads=3, num_kv_heads=1, head_dim=head_dim, value_dim=value_dim)
    case = make_case(library, shape, formats, False, 20, [70], 4)
    assert error_of(library, case, 0.1) < TOLERANCE


@pytest.mark.parametrize("formats", PAIRS)
@pytest.mark.parametrize(("seq", "past"), [(2, 1), (8, 128), (3, 700), (20, 1200)])
def test_short_chunks_over_a_long_past(library, formats, seq, past):
    """Whose splits are blocks of their own, some of them empty, merged in the end."""
    shape = Shape(num_heads=4, num_kv_heads=1, capacity=1200)
    case = make_case(library, shape, formats, formats[0].is_quantised, seq, [past], 40)
    assert error_of(library, case, 0.07) < TOLERANCE


@pytest.mark.parametrize(("head_dim", "value_dim"), [(64, 64), (112, 96), (128, 128)])
def test_masks_over_a_split_past(library, head_dim, value_dim):
    """Splits of which no token sees a slot, too."""
    shape = Shape(num_heads=2, num_kv_heads=1, head_dim=head_dim, value_dim=value_dim, capacity=1100)
    case = make_case(library, shape, PAIRS[2], False, 5, [1050], 41)
    visible = masks(np.random.default_rng(42), 1, 1100, 5)
    visible[:, 200:900] = 0
    assert error_of(library, case, 0.1, visible) < TOLERANCE


def test_prefill_without_a_past(library):
    cache, q, k, v, _ = make_case(library, Shape(), F32, False, 30, [0], 6)
    found, new = causal_attention(library, cache, q, k, v, None, 0.1)
    assert relative_error(found, expected_attention(cache, new, q, [0], 0.1)) < TOLERANCE


# Decode ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("formats", PAIRS)
@pytest.mark.parametrize("group", [1, 2, 4, 8])
@pytest.mark.parametrize("past", [[0, 1], [200, 63], [256, 129]])
def test_decode(library, formats, group, past):
    shape = Shape(batch=2, num_heads=2 * group, num_kv_heads=2)
    case = make_case(library, shape, formats, False, 1, past, 7)
    assert error_of(library, case, 0.1) < TOLERANCE


@pytest.mark.parametrize("formats", PAIRS)
@pytest.mark.parametrize(("head_dim", "value_dim"), [(64, 64), (96, 112), (112, 96)])
def test_decode_of_reduced_ranks(library, formats, head_dim, value_dim):
    shape = Shape(num_heads=4, num_kv_heads=1, head_dim=head_dim, value_dim=value_dim)
    case = make_case(library, shape, formats, False, 1, [150], 9)
    assert error_of(library, case, 0.1) < TOLERANCE


# Masks of the past ----------------------------------------------------------------------------------------------------


def masks(rng: np.random.Generator, batch: int, capacity: int, seq: int) -> np.ndarray:
    """How many of the new tokens see each slot: some all, some none."""
    visible = rng.integers(0, seq + 1, (batch, capacity))
    visible[rng.random((batch, capacity)) < 0.3] = np.iinfo(np.int32).max
    return visible.astype(np.int32)


@pytest.mark.parametrize("formats", PAIRS)
@pytest.mark.parametrize("seq", [1, 3, 90])
def test_slots_that_some_tokens_do_not_see(library, formats, seq):
    case = make_case(library, Shape(batch=2), formats, False, seq, [200, 130], 5)
    visible = masks(np.random.default_rng(seq), 2, 256, seq)
    visible[0, :140] = 0  # a whole tile that none sees
    assert error_of(library, case, 0.1, visible) < TOLERANCE


@pytest.mark.parametrize(("head_dim", "value_dim"), [(64, 64), (96, 112), (112, 96), (128, 64)])
def test_masks_and_reduced_ranks(library, head_dim, value_dim):
    rng = np.random.default_rng(head_dim)
    shape = Shape(num_heads=2, num_kv_heads=1, head_dim=head_dim, value_dim=value_dim)
    case = make_case(library, shape, PAIRS[3], head_dim == 128, 75, [200], 21)
    visible = rng.integers(0, 80, (1, shape.capacity)).astype(np.int32)
    assert error_of(library, case, 0.1, visible) < TOLERANCE


@pytest.mark.parametrize(("start", "seq"), [(3, 9), (30, 20), (150, 33), (301, 64), (301, 1)])
@pytest.mark.parametrize("sinks", [0, 5])
def test_a_ring_gives_a_sliding_window(library, start, seq, sinks):
    """A cache of the first tokens and a ring of the last 64, against attention over all there were."""
    window = 64
    rng = np.random.default_rng(start)
    k, v, q = normal(rng, 1, 1, start + seq, 128), normal(rng, 1, 1, start + seq, 128), normal(rng, 1, 4, seq, 128)
    cache = HostRows(library, Shape(capacity=sinks + window), F32)
    position = np.arange(start)
    slots = np.where(position < sinks, position, sinks + (position - sinks) % window).astype(np.int32)
    for token in range(start):  # as time goes: later ones overwrite
        one = HostRows(library, Shape(capacity=1), F32)
        one.fill(*(x[None, :, :, token : token + 1] for x in (k, v)))
        append(library, cache, one, slots[None, token : token + 1])
    held = np.zeros(sinks + window, np.int64)
    held[slots] = position
    # Token start + i sees position p where start + i - p < window.
    visible = np.where(held < sinks, seq, held + window - start).astype(np.int32)[None]
    past = np.array([min(start, sinks + window)], np.int32)
    new = np.s_[:, :, start:]
    found, _ = causal_attention(library, cache, q, k[new], v[new], past, 0.1, visible)
    distance = start + np.arange(seq)[:, None] - np.arange(start + seq)
    sees = (distance >= 0) & ((distance < window) | (np.arange(start + seq) < sinks))
    assert relative_error(found[0], attention(q[0], k[0], v[0], sees, 0.1)) < TOLERANCE


def test_keys_that_no_query_of_a_block_sees_are_not_read(library):
    """Of a window's past: a block that saw them would find no numbers."""
    cache, q, k, v, past = make_case(library, Shape(capacity=512), F32, False, 40, [512], 22)
    visible = np.full((1, 512), 40, np.int32)
    visible[:, 128:384] = 0
    expected, _ = causal_attention(library, cache, q, k, v, past, 0.1, visible)
    for rows in cache.rows:
        rows[..., 128:384, :].view(np.float32)[:] = np.nan
    np.testing.assert_array_equal(causal_attention(library, cache, q, k, v, past, 0.1, visible)[0], expected)


# Sizes ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seq", [1 << 31, -(1 << 31) - 1, (1 << 32) + 5])
def test_numbers_that_the_abi_has_no_room_for_are_refused(library, seq):
    """ctypes would cut them off."""
    with pytest.raises(UserError, match=f"tokens is {seq}: the kernels take numbers of 32 bits"):
        AttentionArgs(tokens=seq)
    with pytest.raises(UserError, match=f"key_row is {seq}: the kernels take numbers of 32 bits"):
        AppendLayer(key_row=seq)
    with pytest.raises(UserError, match=f"vocab_size is {seq}: the kernels take numbers of 32 bits"):
        library.choose(0, 1, seq, 0, 0, 0)
    with pytest.raises(UserError, match=f"dim is {seq}: the kernels take numbers of 32 bits"):
        library.row_bytes(RowFormat.INT8, seq)


# Combinations ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(60))
def test_any_combination(library, seed):
    """Formats, ranks, groups, lengths, masks and outliers as they come."""
    rng = np.random.default_rng([14, seed])
    formats = PAIRS[seed % len(PAIRS)]
    group, num_kv_heads = int(rng.choice([1, 2, 4, 8])), int(rng.integers(1, 4))
    head_dim, value_dim = rng.choice([64, 96, 112, 128], 2)
    shape = Shape(
        batch=int(rng.integers(1, 3)),
        num_heads=group * num_kv_heads,
        num_kv_heads=num_kv_heads,
        head_dim=int(head_dim),
        value_dim=int(value_dim),
        capacity=int(rng.integers(1, 300)),
    )
    past = [int(rng.integers(shape.capacity + 1)) for _ in range(shape.batch)]
    seq = 1 if rng.random() < 0.5 else int(rng.integers(2, 80))
    with_masks = rng.random() < 0.5
    rotated = formats[0].is_quantised and shape.head_dim == 128 and rng.random() < 0.5
    case = make_case(library, shape, formats, rotated, seq, past, seed, outliers=rng.random() < 0.5)
    visible = masks(rng, shape.batch, shape.capacity, seq) if with_masks else None
    assert error_of(library, case, 0.1, visible) < TOLERANCE


# Extremes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seq", [1, 40])
def test_equal_keys_give_the_mean(library, seq):
    cache, q, k, v, past = make_case(library, Shape(), F32, False, seq, [100], 10)
    cache.rows[0][:] = 0
    k[:] = 0
    assert error_of(library, (cache, q, k, v, past), 0.1) < TOLERANCE


@pytest.mark.parametrize("seq", [1, 40])
def test_huge_scores(library, seq):
    """Scores of 1e4 and more: their FP32 rounding, about 1e-3, is what the weights inherit."""
    cache, q, k, v, past = make_case(library, Shape(), F32, False, seq, [100], 11)
    q *= 1000
    assert error_of(library, (cache, q, k, v, past), 1.0) < 1e-2  # which no NaN is


# Vision ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [64, 72, 128])
@pytest.mark.parametrize("lengths", [(1,), (64,), (100,), (4, 64, 65, 16), (128, 1, 130)])
@pytest.mark.parametrize("with_rope", [False, True])
def test_packed_sequences_see_themselves_alone(library, dim, lengths, with_rope):
    rng = np.random.default_rng(12)
    q, k, v = (normal(rng, 3, sum(lengths), dim) for _ in range(3))
    prologue = make_prologue(rng, 1, sum(lengths), dim) if with_rope else None
    found = packed_attention(library, q, k, v, np.cumsum((0, *lengths)).astype(np.int32), 0.15, prologue)
    if prologue:
        prologue = dataclasses.replace(prologue, epsilon=0)
        sizes = [
            np.sqrt((x.astype(np.float64) ** 2).mean(-1, keepdims=True)) for x in (q, k)
        ]  # no norm takes them away
        q, k = (size * prologue.of(x[None], np.ones(dim))[0] for x, size in zip((q, k), sizes, strict=True))
    owner = np.repeat(np.arange(len(lengths)), lengths)
    assert relative_error(found, attention(q, k, v, owner[:, None] == owner, 0.15)) < TOLERANCE


# Greedy choice --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocab_size", [1, 31, 513, 151936])
def test_greedy_takes_the_first_of_the_largest(library, vocab_size):
    rng = np.random.default_rng(vocab_size)
    logits = normal(rng, 4, vocab_size)
    largest = np.sort(rng.integers(0, vocab_size, 2))
    logits[0, largest] = 9
    logits[1] = -np.inf
    logits[2, largest[1]] = np.nan
    logits[3] = 0
    token, logit = aligned((4,), np.int32), aligned((4,))
    library.choose(pointer(logits), 4, vocab_size, 0, pointer(token), pointer(logit))
    reference.memory.wait()
    # Of nothing but negative infinity none; where there is a NaN it means nothing.
    assert token[[0, 1, 3]].tolist() == [largest[0], -1, 0]
    assert -1 <= token[2] < vocab_size
    np.testing.assert_array_equal(logit, [9, -np.inf, np.nan, 0])


# Rows -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [4, 300, 2560, 12288])
def test_rows_are_picked_by_number(library, width):
    rng = np.random.default_rng(width)
    matrix, rows, out = normal(rng, 9, width), aligned((5,), np.int32), aligned((5, width))
    rows[:] = 8, 0, 8, -3, 100  # the last two are clamped
    library.gather_rows(pointer(matrix), 9, width, pointer(rows), 5, pointer(out))
    reference.memory.wait()
    np.testing.assert_array_equal(out, matrix[[8, 0, 8, 0, 8]])


@pytest.mark.parametrize(("rows", "width"), [(1, 4), (3, 300), (7, 2560)])
def test_a_matrix_is_added(library, rows, width):
    rng = np.random.default_rng(width)
    x, y = normal(rng, rows, width), normal(rng, rows, width)
    expected = x + y
    library.add_to(pointer(x), pointer(y), rows, width)
    reference.memory.wait()
    np.testing.assert_array_equal(x, expected)


# Bad input ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"qkv": None}, "qkv is a null pointer."),
        ({"qkv": 8}, "qkv is not aligned to 16 bytes."),
        ({"k_norm": 8}, "k_norm is not aligned to 16 bytes."),
        ({"rope_sin": None}, "One of rope_cos and rope_sin is a null pointer; expected both, or none."),
        ({"tokens": 0}, "tokens is 0; it must be at least 1."),
        ({"batch": 0}, "batch is 0; it must be at least 1."),
        ({"num_heads": 3}, "num_heads 3 is not a multiple of num_kv_heads 2."),
        ({"head_dim": 80}, "head_dim is 80; expected 64, 96, 112 or 128."),
        ({"softmax_scale": float("nan")}, "softmax_scale is nan; expected a number between -1e+06 and 1e+06."),
        ({"epsilon": -1.0}, "epsilon is -1; expected a number from 0 to 1."),
        ({"key_format": 9}, "The cache's formats are 9 and 1; expected 0 (float32)"),
        ({"rotated": 1}, "Only quantised keys are rotated; found float16."),
        ({"key_format": 2}, "A cache of int8 keys and float16 values is not supported"),
        ({"key_format": 3, "value_format": 2}, "A cache of int4 keys and int8 values is not supported"),
        ({"key_format": 2, "value_format": 2}, "The new rows' array of scales is at"),
        ({"num_pages": 0}, "num_pages is 0; it must be at least 1."),
        ({"num_pages": 1 << 24}, "2 heads and 2147483648 slots make 4294967296 rows; expected at most 1073741824."),
        ({"sequence_pages": 0}, "sequence_pages is 0; it must be at least 1."),
        ({"sequence_pages": 1 << 24}, "batch 1 of 16777216 pages makes 2147483648 slots; expected at most 1073741824."),
        ({"page_table": None}, "page_table is a null pointer."),
        ({"cu_seqlens": None}, "cu_seqlens is a null pointer."),
        ({"pool.value": None}, "The pool's array of values is a null pointer."),
        ({"new_rows.key": 8}, "The new rows' array of keys is not aligned to 16 bytes."),
        ({"causal": 0}, "Packed attention has as many kv heads as heads; found 2 and 4."),
        ({"workspace": -1}, "bytes; expected at least"),
    ],
)
def test_bad_input_is_refused_in_words(library, change, told):
    cache, q, k, v, past = make_case(library, Shape(num_heads=4, num_kv_heads=2), PAIRS[1], False, 1, [5], 13)
    out, qkv, norm, pool = aligned((1, 4, 128)), packed(q[0], k[0], v[0]), aligned((128,)), Pool(cache)
    new = HostRows(library, dataclasses.replace(cache.shape, capacity=1), PAIRS[1])
    arrays = {"qkv": qkv, "out": out, "past_length": past, "page_table": pool.table}
    arrays["cu_seqlens"] = copy(np.array([0, 1], np.int32))
    arrays |= dict.fromkeys(("q_norm", "k_norm", "rope_cos", "rope_sin"), norm)
    args = AttentionArgs(
        **{name: pointer(array) for name, array in arrays.items()},
        **{"tokens": 1, "batch": 1, "num_heads": 4, "num_kv_heads": 2, "head_dim": 128, "value_dim": 128},
        **{"key_format": 1, "value_format": 1, "num_pages": pool.num_pages, "sequence_pages": pool.pages},
        **{"softmax_scale": 0.1, "causal": 1},
        new_rows=new.view(),
        pool=pool.view(),
    )
    workspace = aligned((library.attention_workspace(args),), np.uint8)
    for name, value in change.items():
        *owners, field = name.split(".")
        owner = getattr(args, owners[0]) if owners else args
        if name != "workspace":
            is_moved = value and (owners or name in arrays)
            setattr(owner, field, getattr(owner, field) + value if is_moved else value)
    with pytest.raises(UserError) as error:
        library.attention(args, pointer(workspace), workspace.nbytes + change.get("workspace", 0))
    assert told in str(error.value)
    assert not out.any()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"layers": None}, "layers is a null pointer."),
        ({"slots": None}, "slots is a null pointer."),
        ({"num_layers": 0}, "num_layers is 0; it must be at least 1."),
        ({"num_pages": 0}, "num_pages is 0; it must be at least 1."),
        ({"key_row": 24}, "A row of the cache has 24 bytes; expected a multiple of 16 from 16 to 512."),
        ({"value_row": 528}, "A row of the cache has 528 bytes; expected a multiple of 16 from 16 to 512."),
        ({"pool.scale": None}, "Of the new rows' scales and the pool's, one is a null pointer."),
        ({"pool.key": None}, "The pool's array of keys is a null pointer."),
        ({"new_rows.value": 8}, "The new rows' array of values is not aligned to 16 bytes."),
    ],
)
def test_bad_appends_are_refused_in_words(library, change, told):
    cache, new = (HostRows(library, Shape(capacity=capacity), PAIRS[2]) for capacity in (8, 2))
    pool = Pool(cache)
    layer = AppendLayer(new_rows=new.view(), pool=pool.view(), key_row=128, value_row=128)
    slots = copy(np.array([3, 4], np.int32))
    ((name, value),) = change.items()
    *owners, field = name.split(".")
    owner = getattr(layer, owners[0]) if owners else layer
    if field in dict(owner._fields_):
        setattr(owner, field, getattr(owner, field) + value if owners and value else value)
    args = AppendArgs.of([layer], slots=pointer(slots), num_kv_heads=1, tokens=2, num_pages=pool.num_pages)
    if field in dict(args._fields_):
        setattr(args, field, value)
    with pytest.raises(UserError) as error:
        library.kv_append(args)
    assert told in str(error.value)

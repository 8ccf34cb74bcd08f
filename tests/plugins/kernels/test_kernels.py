"""The kernels against NumPy: on the emulator, and on a GPU where there is one."""

import dataclasses
import functools

import numpy as np
import pytest

from pascalvl.plugins.errors import UserError
from pascalvl.plugins.kernels.library import AppendArgs, AttentionArgs, KernelLibrary
from pascalvl.plugins.kv_format import RowFormat
from pascalvl.plugins.kv_rows import compress, expand, hadamard
from tests.plugins.kernels import reference
from tests.plugins.kernels.reference import (
    PAIRS,
    HostCache,
    Recent,
    Shape,
    aligned,
    append,
    attention,
    causal_attention,
    copy,
    expected_attention,
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
    cache = HostCache(library, shape, formats, rotated)
    old = (1, shape.batch, shape.num_kv_heads, shape.capacity)
    old_k, old_v = normal(rng, *old, shape.key_dim), normal(rng, *old, shape.value_dim)
    q = normal(rng, shape.batch, shape.num_heads, seq, shape.key_dim)
    k = normal(rng, shape.batch, shape.num_kv_heads, seq, shape.key_dim)
    v = normal(rng, shape.batch, shape.num_kv_heads, seq, shape.value_dim)
    if outliers:
        spread = np.geomspace(0.1, 10, shape.key_dim).astype(np.float32)
        old_k *= spread
        k *= spread
        q /= spread
    append(library, cache, old_k, old_v, np.zeros(shape.batch, np.int32))
    # What lies beyond the past must not be seen.
    for rows, scales in zip(cache.rows, cache.scales, strict=True):
        for b, length in enumerate(past):
            rows[:, b, :, length:] = 0x7F
            scales[:, b, :, length:] = np.nan
    return cache, q, k, v, np.array(past, np.int32)


def run_on(library: KernelLibrary):
    """The library's attention, as `expected_attention` is called."""
    return functools.partial(causal_attention, library)


# kv_append ------------------------------------------------------------------------------------------------------------


def extremes(rows: np.ndarray) -> None:
    """Make the first of seven tokens or more [..., token, dim] hard to store, the others stay."""
    rows[..., 0, :] = 0
    rows[..., 1, :] *= 1e-9  # its scale rounds to zero
    rows[..., 2, :] *= 1e-5  # below float16's normal numbers
    rows[..., 3, :] *= 1e8
    rows[..., 4, 5] = -np.inf


@pytest.mark.parametrize("formats", PAIRS)
@pytest.mark.parametrize(
    ("key_dim", "value_dim", "rotated"),
    [(128, 128, True), (128, 96, False), (112, 64, False), (96, 112, False), (64, 128, False)],
)
@pytest.mark.parametrize(
    "slots", [None, [[5, -1, 0, 11, 3, 10, 4, 8], [7, 6, 5, -9, 99, 3, 2, 1]]], ids=["past_length", "slots"]
)
def test_append_writes_what_compress_gives(library, formats, key_dim, value_dim, rotated, slots):
    rotated = rotated and formats[0].is_quantised
    rng = np.random.default_rng(0)
    shape = Shape(batch=2, num_kv_heads=3, key_dim=key_dim, value_dim=value_dim, capacity=11)
    cache = HostCache(library, shape, formats, rotated, layers=2)
    key, value = normal(rng, 2, 2, 3, 8, key_dim), normal(rng, 2, 2, 3, 8, value_dim)
    extremes(key)
    extremes(value)
    past = None if slots else np.array([2, 5], np.int32)
    append(library, cache, key, value, past, np.array(slots, np.int32) if slots else None)
    taken = np.array(slots) if slots else past[:, None] + np.arange(8)
    for which, (new, form) in enumerate(zip((key, value), formats, strict=True)):
        turned = which == 0 and rotated
        with np.errstate(invalid="ignore"):
            rows, scale = compress(new, form, turned)
        expected = np.zeros_like(cache.rows[which]).view(form.dtype)
        expected_scale = np.zeros_like(cache.scales[which])
        for b, token in np.ndindex(taken.shape):
            if not 0 <= (slot := taken[b, token]) < shape.capacity:
                continue
            expected[:, b, :, slot] = rows[:, b, :, token]
            if form.is_quantised:
                expected_scale[:, b, :, slot] = scale[:, b, :, token]
        np.testing.assert_array_equal(cache.rows[which], expected.view(np.uint8))
        np.testing.assert_array_equal(cache.scales[which].view(np.uint16), expected_scale.view(np.uint16))


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


def test_append_takes_slots_and_skips_negative_ones(library):
    rng = np.random.default_rng(1)
    cache = HostCache(library, Shape(capacity=6), F32, False)
    key, value = normal(rng, 1, 1, 1, 4, 128), normal(rng, 1, 1, 1, 4, 128)
    append(library, cache, key, value, None, np.array([[5, -1, 0, 6]], np.int32))
    expected = np.zeros((6, 128))
    expected[5], expected[0] = key[0, 0, 0, 0], key[0, 0, 0, 2]
    np.testing.assert_array_equal(cache.contents(0)[0, 0], expected)


# Prefill --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("formats", PAIRS)
@pytest.mark.parametrize("outliers", [False, True])
def test_prefill_over_every_format(library, formats, outliers):
    shape = Shape(batch=2, num_heads=4, num_kv_heads=2)
    case = make_case(library, shape, formats, False, 37, [130, 64], 2, outliers)
    found, expected = causal_attention(library, *case, 0.1), expected_attention(*case, 0.1)
    assert relative_error(found, expected) < TOLERANCE


@pytest.mark.parametrize("formats", PAIRS[2:])
@pytest.mark.parametrize("seq", [1, 37])
def test_rotated_keys_that_have_outliers(library, formats, seq):
    shape = Shape(batch=2, num_heads=8, num_kv_heads=2)
    case = make_case(library, shape, formats, True, seq, [201, 64], 8, outliers=True)
    found, expected = causal_attention(library, *case, 0.1), expected_attention(*case, 0.1)
    assert relative_error(found, expected) < TOLERANCE


@pytest.mark.parametrize("seq", [1, 2, 15, 16, 17, 64, 65, 100])
@pytest.mark.parametrize("past", [0, 1, 63, 64, 65])
def test_prefill_of_any_length(library, seq, past):
    shape = Shape(batch=1, num_heads=8, num_kv_heads=1)
    case = make_case(library, shape, F32, False, seq, [past], 3)
    assert relative_error(causal_attention(library, *case, 0.2), expected_attention(*case, 0.2)) < TOLERANCE


@pytest.mark.parametrize(("key_dim", "value_dim"), [(64, 64), (96, 64), (112, 96), (64, 128), (128, 112)])
@pytest.mark.parametrize("formats", [F32, PAIRS[-1]])
def test_prefill_of_reduced_ranks(library, formats, key_dim, value_dim):
    shape = Shape(num_heads=3, num_kv_heads=1, key_dim=key_dim, value_dim=value_dim)
    case = make_case(library, shape, formats, False, 20, [70], 4)
    assert relative_error(causal_attention(library, *case, 0.1), expected_attention(*case, 0.1)) < TOLERANCE


@pytest.mark.parametrize("formats", PAIRS)
@pytest.mark.parametrize(("seq", "past"), [(2, 1), (8, 128), (3, 700), (20, 1200)])
def test_short_chunks_over_a_long_past(library, formats, seq, past):
    """Whose splits are blocks of their own, some of them empty, merged in the end."""
    shape = Shape(num_heads=4, num_kv_heads=1, capacity=1200)
    case = make_case(library, shape, formats, formats[0].is_quantised, seq, [past], 40)
    assert relative_error(run_on(library)(*case, 0.07), expected_attention(*case, 0.07)) < TOLERANCE


@pytest.mark.parametrize(("key_dim", "value_dim"), [(64, 64), (112, 96), (128, 128)])
def test_masks_over_a_split_past(library, key_dim, value_dim):
    """Splits of which no token sees a slot, too."""
    shape = Shape(num_heads=2, num_kv_heads=1, key_dim=key_dim, value_dim=value_dim, capacity=1100)
    case = make_case(library, shape, PAIRS[2], False, 5, [1050], 41)
    visible = masks(np.random.default_rng(42), 1, 1100, 5)
    visible[:, 200:900] = 0
    found, expected = run_on(library)(*case, 0.1, visible), expected_attention(*case, 0.1, visible)
    assert relative_error(found, expected) < TOLERANCE


def test_prefill_without_a_past(library):
    cache, q, k, v, _ = make_case(library, Shape(), F32, False, 30, [0], 6)
    found = causal_attention(library, cache, q, k, v, None, 0.1)
    assert relative_error(found, expected_attention(cache, q, k, v, [0], 0.1)) < TOLERANCE


# Decode ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("formats", PAIRS)
@pytest.mark.parametrize("group", [1, 2, 4, 8])
@pytest.mark.parametrize("past", [[0, 1], [200, 63], [256, 129]])
def test_decode(library, formats, group, past):
    shape = Shape(batch=2, num_heads=2 * group, num_kv_heads=2)
    case = make_case(library, shape, formats, False, 1, past, 7)
    assert relative_error(causal_attention(library, *case, 0.1), expected_attention(*case, 0.1)) < TOLERANCE


@pytest.mark.parametrize("formats", PAIRS)
@pytest.mark.parametrize(("key_dim", "value_dim"), [(64, 64), (96, 112), (112, 96)])
def test_decode_of_reduced_ranks(library, formats, key_dim, value_dim):
    shape = Shape(num_heads=4, num_kv_heads=1, key_dim=key_dim, value_dim=value_dim)
    case = make_case(library, shape, formats, False, 1, [150], 9)
    assert relative_error(causal_attention(library, *case, 0.1), expected_attention(*case, 0.1)) < TOLERANCE


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
    found = causal_attention(library, *case, 0.1, visible)
    assert relative_error(found, expected_attention(*case, 0.1, visible)) < TOLERANCE


@pytest.mark.parametrize(("key_dim", "value_dim"), [(64, 64), (96, 112), (112, 96), (128, 64)])
def test_masks_and_reduced_ranks(library, key_dim, value_dim):
    rng = np.random.default_rng(key_dim)
    shape = Shape(num_heads=2, num_kv_heads=1, key_dim=key_dim, value_dim=value_dim)
    case = make_case(library, shape, PAIRS[3], key_dim == 128, 75, [200], 21)
    visible = rng.integers(0, 80, (1, shape.capacity)).astype(np.int32)
    found, expected = (f(*case, 0.1, visible) for f in (run_on(library), expected_attention))
    assert relative_error(found, expected) < TOLERANCE


@pytest.mark.parametrize(("start", "seq"), [(3, 9), (30, 20), (150, 33), (301, 64), (301, 1)])
@pytest.mark.parametrize("sinks", [0, 5])
def test_a_ring_gives_a_sliding_window(library, start, seq, sinks):
    """A cache of the first tokens and a ring of the last 64, against attention over all there were."""
    window = 64
    rng = np.random.default_rng(start)
    k, v, q = normal(rng, 1, 1, start + seq, 128), normal(rng, 1, 1, start + seq, 128), normal(rng, 1, 4, seq, 128)
    cache = HostCache(library, Shape(capacity=sinks + window), F32, False)
    position = np.arange(start)
    slots = np.where(position < sinks, position, sinks + (position - sinks) % window).astype(np.int32)
    for token in range(start):  # as time goes: later ones overwrite
        one = np.s_[:, :, token : token + 1]
        append(library, cache, copy(k[one])[None], copy(v[one])[None], None, slots[None, token : token + 1])
    held = np.zeros(sinks + window, np.int64)
    held[slots] = position
    # Token start + i sees position p where start + i - p < window.
    visible = np.where(held < sinks, seq, held + window - start).astype(np.int32)[None]
    past = np.array([min(start, sinks + window)], np.int32)
    new = np.s_[:, :, start:]
    found = causal_attention(library, cache, q, copy(k[new]), copy(v[new]), past, 0.1, visible)
    distance = start + np.arange(seq)[:, None] - np.arange(start + seq)
    sees = (distance >= 0) & ((distance < window) | (np.arange(start + seq) < sinks))
    assert relative_error(found[0], attention(q[0], k[0], v[0], sees, 0.1)) < TOLERANCE


def test_keys_that_no_query_of_a_block_sees_are_not_read(library):
    """Of a window's past: a block that saw them would find no numbers."""
    cache, q, k, v, past = make_case(library, Shape(capacity=512), F32, False, 40, [512], 22)
    visible = np.full((1, 512), 40, np.int32)
    visible[:, 128:384] = 0
    expected = expected_attention(cache, q, k, v, past, 0.1, visible)
    for rows in cache.rows:
        rows[..., 128:384, :].view(np.float32)[:] = np.nan
    assert relative_error(causal_attention(library, cache, q, k, v, past, 0.1, visible), expected) < TOLERANCE


# Recent tokens --------------------------------------------------------------------------------------------------------


def make_recent(library, shape: Shape, capacity: int, lengths, seed: int) -> Recent:
    """Recent tokens beside a cache of such a shape."""
    recent = dataclasses.replace(shape, capacity=capacity)
    cache, *_, length = make_case(library, recent, PAIRS[1], False, 1, lengths, seed)
    return cache, length


@pytest.mark.parametrize("formats", PAIRS[2:])
@pytest.mark.parametrize("group", [1, 2, 4, 8])
@pytest.mark.parametrize(("past", "recent"), [([0, 70], [1, 0]), ([200, 63], [31, 150]), ([256, 0], [150, 0])])
def test_decode_over_recent_tokens_too(library, formats, group, past, recent):
    shape = Shape(batch=2, num_heads=group, num_kv_heads=1)
    case = make_case(library, shape, formats, True, 1, past, 30, outliers=True)
    more = make_recent(library, shape, 150, recent, 31)
    found, expected = (f(*case, 0.1, recent=more) for f in (run_on(library), expected_attention))
    assert relative_error(found, expected) < TOLERANCE


@pytest.mark.parametrize(("key_dim", "value_dim"), [(64, 64), (96, 112), (112, 96), (128, 64)])
@pytest.mark.parametrize("formats", PAIRS[2:])
def test_recent_tokens_of_reduced_ranks(library, formats, key_dim, value_dim):
    shape = Shape(num_heads=2, num_kv_heads=1, key_dim=key_dim, value_dim=value_dim)
    case = make_case(library, shape, formats, key_dim == 128, 1, [100], 32)
    more = make_recent(library, shape, 200, [180], 33)
    found, expected = (f(*case, 0.1, recent=more) for f in (run_on(library), expected_attention))
    assert relative_error(found, expected) < TOLERANCE


def test_several_tokens_come_without_recent_ones(library):
    case = make_case(library, Shape(), PAIRS[2], True, 7, [100], 34)
    none = make_recent(library, Shape(), 32, [0], 35)
    np.testing.assert_array_equal(
        causal_attention(library, *case, 0.1, recent=none), causal_attention(library, *case, 0.1)
    )


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"past_length": None}, "Recent tokens lie beside a quantised cache; found none."),
        ({"key_format": 1, "value_format": 1}, "Recent tokens lie beside a quantised cache; found float16."),
        ({"past_visible": 16}, "Recent tokens cannot be had together with past_visible"),
        ({"recent.key_format": 2}, "Recent keys and values are int8 and float16; expected float16."),
        ({"recent.rotated": 1}, "Recent keys and values are rotated float16 and float16; expected float16."),
        ({"recent.capacity": 0}, "The recent rows' capacity is 0; it must be at least 1."),
        ({"recent.value": None}, "The cache of recent values is a null pointer."),
    ],
)
def test_bad_recent_tokens_are_refused_in_words(library, change, told):
    shape = Shape()
    cache, q, k, v, past = make_case(library, shape, PAIRS[2], False, 1, [5], 36)
    recent, length = make_recent(library, shape, 16, [3], 37)
    out = aligned((1, 1, 4, 128))
    sizes = {"batch": 1, "num_heads": 4, "num_kv_heads": 1, "seq": 1, "key_dim": 128, "value_dim": 128}
    pointers = dict(zip(("q", "k", "v", "out", "past_length"), map(pointer, (q, k, v, out, past)), strict=True))
    views = {"cache": cache.view(), "recent": recent.view()}
    args = AttentionArgs(**pointers, **sizes, **views, softmax_scale=0.1, causal=1, recent_length=pointer(length))
    workspace = aligned((library.attention_workspace(args),), np.uint8)
    for name, value in change.items():
        owner = args.recent if name.startswith("recent.") else args.cache if name.endswith("format") else args
        setattr(owner, name.removeprefix("recent."), value)
    with pytest.raises(UserError) as error:
        library.attention(args, pointer(workspace), workspace.nbytes)
    assert told in str(error.value)
    assert not out.any()


@pytest.mark.parametrize("seq", [1 << 31, -(1 << 31) - 1, (1 << 32) + 5])
def test_numbers_that_the_abi_has_no_room_for_are_refused(library, seq):
    """ctypes would cut them off."""
    with pytest.raises(UserError, match=f"seq is {seq}: the kernels take numbers of 32 bits"):
        AttentionArgs(seq=seq)
    with pytest.raises(UserError, match=f"key_stride is {seq << 32}: the kernels take numbers of 64 bits"):
        AppendArgs(key_stride=seq << 32)
    with pytest.raises(UserError, match=f"vocab_size is {seq}: the kernels take numbers of 32 bits"):
        library.greedy(0, 1, seq, 0, 0)
    with pytest.raises(UserError, match=f"dim is {seq}: the kernels take numbers of 32 bits"):
        library.row_bytes(RowFormat.INT8, seq)


# Combinations ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(60))
def test_any_combination(library, seed):
    """Formats, ranks, groups, lengths, masks, recent tokens and outliers as they come."""
    rng = np.random.default_rng([14, seed])
    formats = PAIRS[seed % len(PAIRS)]
    group, num_kv_heads = int(rng.choice([1, 2, 4, 8])), int(rng.integers(1, 4))
    key_dim, value_dim = rng.choice([64, 96, 112, 128], 2)
    shape = Shape(
        batch=int(rng.integers(1, 3)),
        num_heads=group * num_kv_heads,
        num_kv_heads=num_kv_heads,
        key_dim=int(key_dim),
        value_dim=int(value_dim),
        capacity=int(rng.integers(1, 300)),
    )
    past = [int(rng.integers(shape.capacity + 1)) for _ in range(shape.batch)]
    seq = 1 if rng.random() < 0.5 else int(rng.integers(2, 80))
    with_masks = rng.random() < 0.5
    rotated = formats[0].is_quantised and shape.key_dim == 128 and rng.random() < 0.5
    case = make_case(library, shape, formats, rotated, seq, past, seed, outliers=rng.random() < 0.5)
    visible = masks(rng, shape.batch, shape.capacity, seq) if with_masks else None
    recent = None
    if formats[0].is_quantised and seq == 1 and not with_masks:
        capacity = int(rng.integers(1, 200))
        recent = make_recent(library, shape, capacity, list(rng.integers(0, capacity + 1, shape.batch)), seed)
    found, expected = (f(*case, 0.1, visible, recent) for f in (run_on(library), expected_attention))
    assert relative_error(found, expected) < TOLERANCE


# Extremes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seq", [1, 40])
def test_equal_keys_give_the_mean(library, seq):
    cache, q, k, v, past = make_case(library, Shape(), F32, False, seq, [100], 10)
    cache.rows[0][:] = 0
    k[:] = 0
    found = causal_attention(library, cache, q, k, v, past, 0.1)
    assert relative_error(found, expected_attention(cache, q, k, v, past, 0.1)) < TOLERANCE


@pytest.mark.parametrize("seq", [1, 40])
def test_huge_scores(library, seq):
    """Scores of 1e4 and more: their FP32 rounding, about 1e-3, is what the weights inherit."""
    cache, q, k, v, past = make_case(library, Shape(), F32, False, seq, [100], 11)
    q *= 1000
    found = causal_attention(library, cache, q, k, v, past, 1.0)
    expected = expected_attention(cache, q, k, v, past, 1.0)
    assert np.isfinite(found).all()
    assert relative_error(found, expected) < 1e-2


# Vision ---------------------------------------------------------------------------------------------------------------


def packed_args(q, k, v, out, cu_seqlens, softmax_scale) -> AttentionArgs:
    heads, seq, dim = q.shape
    return AttentionArgs(
        q=pointer(q),
        k=pointer(k),
        v=pointer(v),
        out=pointer(out),
        batch=1,
        num_heads=heads,
        num_kv_heads=heads,
        seq=seq,
        key_dim=dim,
        value_dim=dim,
        softmax_scale=softmax_scale,
        cu_seqlens=pointer(cu_seqlens),
        num_sequences=len(cu_seqlens) - 1,
    )


@pytest.mark.parametrize("dim", [64, 72, 128])
@pytest.mark.parametrize("lengths", [(1,), (64,), (100,), (4, 64, 65, 16), (128, 1, 130)])
def test_packed_sequences_see_themselves_alone(library, dim, lengths):
    rng = np.random.default_rng(12)
    cu_seqlens = copy(np.cumsum((0, *lengths)).astype(np.int32))
    q, k, v = (normal(rng, 3, sum(lengths), dim) for _ in range(3))
    out = aligned((sum(lengths), 3, dim))
    out[:] = np.nan
    library.attention(packed_args(q, k, v, out, cu_seqlens, 0.15))
    reference.memory.wait()
    owner = np.repeat(np.arange(len(lengths)), lengths)
    assert relative_error(out, attention(q, k, v, owner[:, None] == owner, 0.15)) < TOLERANCE


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
    library.greedy(pointer(logits), 4, vocab_size, pointer(token), pointer(logit))
    reference.memory.wait()
    assert token.tolist() == [largest[0], 0, largest[1], 0]
    np.testing.assert_array_equal(logit, [9, -np.inf, np.nan, 0])


# Bad input ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"q": None}, "q is a null pointer."),
        ({"k": 8}, "k is not aligned to 16 bytes."),
        ({"seq": 0}, "seq is 0; it must be at least 1."),
        ({"num_heads": 3}, "num_heads 3 is not a multiple of num_kv_heads 2."),
        ({"num_heads": 6}, "Decode has 1, 2, 4 or 8 query heads a kv head; found 3."),
        ({"key_dim": 80}, "key_dim is 80; expected 64, 96, 112 or 128."),
        ({"softmax_scale": float("nan")}, "softmax_scale is nan; expected a number between -1e+06 and 1e+06."),
        ({"key_format": 9}, "The cache's formats are 9 and 1; expected 0 (float32)"),
        ({"rotated": 1}, "Only quantised keys are rotated; found float16."),
        ({"key_format": 2}, "A cache of int8 keys and float16 values is not supported"),
        ({"capacity": 0}, "The cache's capacity is 0; it must be at least 1."),
        ({"value": None}, "The cache of values is a null pointer."),
        ({"causal": 0}, "Packed attention has as many kv heads as heads; found 2 and 4."),
        ({"causal": 0, "num_kv_heads": 4, "num_sequences": 1}, "cu_seqlens is a null pointer."),
        ({"workspace": -1}, "bytes; expected at least"),
    ],
)
def test_bad_input_is_refused_in_words(library, change, told):
    cache, q, k, v, past = make_case(library, Shape(num_heads=4, num_kv_heads=2), PAIRS[1], False, 1, [5], 13)
    out = aligned((1, 1, 4, 128))
    view = cache.view()
    sizes = {"batch": 1, "num_heads": 4, "num_kv_heads": 2, "seq": 1, "key_dim": 128, "value_dim": 128}
    pointers = dict(zip(("q", "k", "v", "out", "past_length"), map(pointer, (q, k, v, out, past)), strict=True))
    args = AttentionArgs(**pointers, **sizes, softmax_scale=0.1, causal=1, cache=view)
    workspace = aligned((library.attention_workspace(args),), np.uint8)
    for name, value in change.items():
        if name in dict(view._fields_):
            setattr(args.cache, name, value)
        elif name != "workspace":
            setattr(args, name, pointers[name] + value if name in pointers and value else value)
    with pytest.raises(UserError) as error:
        library.attention(args, pointer(workspace), workspace.nbytes + change.get("workspace", 0))
    assert told in str(error.value)
    assert not out.any()

"""Tokens of several sequences in one call, over pages: on the emulator, and on a GPU where there is one."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from pascalvl.plugins.kernels.library import KernelLibrary
from pascalvl.plugins.kv_format import PAGE_SLOTS
from tests.plugins.kernels import reference
from tests.plugins.kernels.reference import PAIRS, relative_error
from tests.plugins.kernels.sequences import Case, make_case

TOLERANCE = 3e-6
"""As in test_kernels.py."""


@pytest.fixture(scope="module", params=reference.targets())
def library(request) -> KernelLibrary:
    return reference.open_library(request.param)


def check(library: KernelLibrary, case: Case) -> None:
    found, new = case.run(library)
    expected = case.expected(new)
    ends = case.cu_seqlens[-1]
    if ends:
        assert relative_error(found[:ends], expected[:ends]) < TOLERANCE
    np.testing.assert_array_equal(found[ends:], 0)  # padding


BORDERS = [0, 1, 127, 128, 129, 255, 256, 257]


@pytest.mark.parametrize("formats", PAIRS)
@pytest.mark.parametrize(("new", "padding"), [((1,) * 8, 0), ((1, 0, 1, 1, 1, 0, 1, 1), 2), ((0,) * 8, 8)])
def test_steps_of_decode_over_pasts_at_the_borders_of_pages(library, formats, new, padding):
    check(library, make_case(library, formats, list(new), BORDERS, padding))


@pytest.mark.parametrize("formats", PAIRS)
@pytest.mark.parametrize("masked", [False, True])
def test_chunks_and_decodes_in_one_call(library, formats, masked):
    case = make_case(library, formats, [1, 40, 1, 0, 3, 1, 17, 1], BORDERS, 5, masked=masked)
    check(library, case)


@pytest.mark.parametrize("formats", PAIRS[::2])
@pytest.mark.parametrize("group", [1, 2, 3, 8])
@pytest.mark.parametrize(("head_dim", "value_dim"), [(128, 128), (64, 64), (112, 96)])
def test_groups_and_ranks(library, formats, group, head_dim, value_dim):
    """Groups that decode has no kernel for, too: prefill's serves them."""
    sizes = {"num_heads": 2 * group, "num_kv_heads": 2, "head_dim": head_dim, "value_dim": value_dim}
    for new in ([1, 1, 1], [1, 9, 1]):
        check(library, make_case(library, formats, new, [200, 64, 1], seed=group, **sizes))


@pytest.mark.parametrize("formats", PAIRS)
def test_pages_that_sequences_share(library, formats):
    for new in ([1, 1, 1], [4, 1, 30]):
        case = make_case(library, formats, new, [256, 300, 390], shared_pages=2)
        assert len(np.unique(case.pool.table[:, 1])) == 1
        check(library, case)


@pytest.mark.parametrize("formats", PAIRS)
def test_a_step_gives_a_sequence_the_same_bits_alone_and_in_any_batch(library, formats):
    """The order of its sums depends on its own past alone."""
    case = make_case(library, formats, [1] * 8, [1, 900, 64, 65, 1000, 0, 129, 513], seed=3)
    found, new = case.run(library)
    for number in range(8):
        alone, row = case.alone(number).run(library)
        np.testing.assert_array_equal(found[number : number + 1], alone)
        for ours, theirs in zip(new.arrays, row.arrays, strict=True):
            np.testing.assert_array_equal(ours[:, :, :, number : number + 1], theirs)
    some = dataclasses.replace(case, new=np.array([1, 1, 0, 1, 0, 0, 1, 0]))
    again, _ = some.run(library)
    places = np.cumsum(some.new) - 1
    for number in np.flatnonzero(some.new):  # other tokens stand there now, but where they are the same ...
        if places[number] == number:
            np.testing.assert_array_equal(again[places[number]], found[number])  # ... so is what comes out


@pytest.mark.parametrize("formats", PAIRS)
def test_a_sequence_gives_the_same_among_others(library, formats):
    case = make_case(library, formats, [1, 12, 1, 70], [300, 5, 0, 128], 3, seed=4)
    found, new = case.run(library)
    for number, begin in enumerate(case.cu_seqlens[:-1]):
        part = np.s_[begin : begin + case.new[number]]
        alone, rows = case.alone(number).run(library)
        assert relative_error(found[part], alone) < TOLERANCE
        for ours, theirs in zip(new.arrays, rows.arrays, strict=True):
            np.testing.assert_array_equal(ours[:, :, :, part], theirs)


@pytest.mark.parametrize("seed", range(40))
def test_any_mix(library, seed):
    """Formats, lengths, shared pages, windows, padding and groups as they come."""
    rng = np.random.default_rng([17, seed])
    batch = int(rng.integers(1, 6))
    shared = int(rng.integers(0, 3)) if rng.random() < 0.5 else 0
    past = [int(rng.integers(shared * PAGE_SLOTS, 420)) for _ in range(batch)]
    if rng.random() < 0.5:
        past[0] = max(int(rng.choice(BORDERS)), shared * PAGE_SLOTS)
    new = [int(rng.choice([0, 1, 1, 2, 9, 40])) for _ in range(batch)]
    if not sum(new):
        new[0] = 1
    num_kv_heads = int(rng.integers(1, 3))
    sizes = {"num_heads": num_kv_heads * int(rng.choice([1, 2, 4, 5])), "num_kv_heads": num_kv_heads}
    sizes |= dict(zip(("head_dim", "value_dim"), map(int, rng.choice([64, 96, 112, 128], 2)), strict=True))
    masked = bool(rng.random() < 0.4)
    padding = int(rng.choice([0, 0, 1, 20]))
    if sum(new) + padding <= batch and max(new) > 1:
        padding = batch  # a call of as many tokens as sequences is a decode step
    case = make_case(library, PAIRS[seed % len(PAIRS)], new, past, padding, shared, masked, seed, **sizes)
    check(library, case)

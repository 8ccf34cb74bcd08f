"""Rows in NumPy: by the definitions. That the kernels write the same bits: `tests/plugins/kernels/test_kernels.py`."""

import numpy as np
import pytest

from pascalvl.plugins.kv_format import RANKS, RowFormat
from pascalvl.plugins.kv_rows import compress, expand, hadamard


def test_hadamard_is_sylvesters_matrix():
    matrix = np.ones((1, 1))
    while len(matrix) < 128:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    rows = np.random.default_rng(0).standard_normal((3, 5, 128))
    np.testing.assert_allclose(hadamard(rows), rows @ matrix / 128**0.5, atol=1e-14)
    np.testing.assert_allclose(hadamard(hadamard(rows)), rows, atol=1e-14)


def test_eight_codes_of_four_bits_in_a_word():
    row = np.zeros((1, 64), np.float32)
    row[0, :8] = [-7, -6, -5, 0, 1, 2, 6, 7]  # scale 1: elements are codes
    words, scale = compress(row, RowFormat.INT4)
    assert scale.tolist() == [1]
    assert words.view(np.uint8)[0, :4].tolist() == [1 | 9 << 4, 2 | 10 << 4, 3 | 14 << 4, 8 | 15 << 4]
    assert (words.view(np.uint8)[0, 4:32] == 0x88).all()


@pytest.mark.parametrize("dim", RANKS)
@pytest.mark.parametrize("row_format", list(RowFormat))
def test_rows_are_read_to_within_half_a_step(row_format, dim):
    x = np.random.default_rng(dim).standard_normal((2, 9, dim)).astype(np.float32)
    rows, scale = compress(x, row_format)
    assert (rows.shape[:-1], rows.dtype, rows[0, 0].nbytes) == (x.shape[:-1], row_format.dtype, row_format.row_bytes(dim))
    assert (scale is not None) == row_format.is_quantised
    step = {RowFormat.FLOAT32: 0, RowFormat.FLOAT16: 2**-10, RowFormat.INT8: 1 / 127, RowFormat.INT4: 1 / 7}[row_format]
    # A scale is rounded to float16: the largest element may be off by half a code and that.
    most = np.abs(x).max(-1, keepdims=True)
    assert (np.abs(expand(rows, scale, row_format, dim) - x) <= (0.5 * step + (step > 0) * 2**-11) * most).all()


@pytest.mark.parametrize("row_format", [RowFormat.INT8, RowFormat.INT4])
def test_rows_that_have_no_scale(row_format):
    x = np.ones((4, 64), np.float32) * np.array([0, 1e-9, 1e9, np.inf], np.float32)[:, None]
    rows, scale = compress(x, row_format)
    assert scale.tolist() == [0, 0, np.inf, np.inf]
    assert len({row.tobytes() for row in rows}) == 1  # zeros all of them
    found = expand(rows, scale, row_format, 64)
    assert (found[:2] == 0).all()
    assert np.isnan(found[2:]).all()

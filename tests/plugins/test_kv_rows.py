"""Rows in NumPy: by the definitions. That the kernels write the same bits: `tests/plugins/kernels/test_kernels.py`."""

import numpy as np
import pytest

from pascalvl.plugins.kv_format import RowFormat
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
    row[0, :8] = [-8, -6, -5, 0, 1, 2, 6, 7]
    for sign in (1, -1):  # of the scale: the elements are the codes, or their negatives
        words, scale = compress(sign * row, RowFormat.INT4)
        assert scale.tolist() == [sign]
        assert words.view(np.uint8)[0, :4].tolist() == [0 | 9 << 4, 2 | 10 << 4, 3 | 14 << 4, 8 | 15 << 4]
        assert (words.view(np.uint8)[0, 4:32] == 0x88).all()


@pytest.mark.parametrize("row_format", [RowFormat.INT8, RowFormat.INT4])
def test_rows_that_have_no_scale(row_format):
    x = np.ones((4, 64), np.float32) * np.array([0, 1e-9, 1e9, np.inf], np.float32)[:, None]
    rows, scale = compress(x, row_format)
    assert np.abs(scale).tolist() == [0, 0, np.inf, np.inf]
    assert len({row.tobytes() for row in rows}) == 1  # zeros all of them
    found = expand(rows, scale, row_format, 64)
    assert (found[:2] == 0).all()
    assert np.isnan(found[2:]).all()

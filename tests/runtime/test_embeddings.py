"""Tables of embeddings: their rows in float32, whatever type they are stored in."""

import numpy as np
import pytest

from pascalvl.runtime.embeddings import EmbeddingTable


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_embedding_table(tmp_path, dtype):
    rows = np.random.default_rng(0).standard_normal((10, 6)).astype(np.float32)
    path = tmp_path / "embeddings.bin"
    if dtype == "bfloat16":
        bits = (rows.view(np.uint32) >> 16).astype(np.uint16)
        rows = (bits.astype(np.uint32) << 16).view(np.float32)
        bits.tofile(path)
    else:
        rows = rows.astype(dtype)
        rows.tofile(path)
    table = EmbeddingTable(path, dtype, [10, 6])
    for wanted in (np.array([7, 0, 7]), [7], slice(2, 5)):
        assert table[wanted].dtype == np.float32
        np.testing.assert_array_equal(table[wanted], rows[wanted])

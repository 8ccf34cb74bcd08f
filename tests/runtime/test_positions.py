"""Positions and tables equal to Hugging Face's."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRotaryEmbedding
from transformers.vision_utils import (
    get_vision_cu_seqlens,
    get_vision_interpolation_indices_and_weights,
    get_vision_position_ids,
)

from pascalvl.export.checkpoint import Checkpoint
from pascalvl.runtime import positions

GRIDS = [(1, 2, 2), (1, 8, 4), (1, 6, 14), (3, 4, 6), (1, 32, 2)]
# Both sides compute float32 angles alike; the cos and sin of NumPy and torch differ in the last place.
LAST_PLACE = 1.2e-7


@pytest.fixture(scope="module")
def config(nano_checkpoint):
    with Checkpoint(nano_checkpoint) as checkpoint:
        return checkpoint.model_config()


def reference_positions(model, config, layout):
    """Hugging Face's positions for a layout: ints are text, grids with t == 1 pictures, with t > 1 videos."""
    ids, kinds, images, videos = [], [], [], []
    for span in layout:
        if isinstance(span, int):
            ids += [7] * span
            kinds += [0] * span
            continue
        t, h, w = span
        (videos if t > 1 else images).append(span)
        for frame in range(t):
            if frame:  # a timestamp stands between the frames of a video
                ids += [7, 7]
                kinds += [0, 0]
            ids += [config.video_token_id if t > 1 else config.image_token_id] * (h * w // 4)
            kinds += [2 if t > 1 else 1] * (h * w // 4)
    position_ids, deltas = model.model.get_rope_index(
        torch.tensor([ids]),
        torch.tensor([kinds], dtype=torch.int32),
        image_grid_thw=torch.tensor(images) if images else None,
        video_grid_thw=torch.tensor(videos) if videos else None,
    )
    return position_ids[:, 0].numpy(), int(deltas[0]) + len(ids)


def spans(layout):
    for span in layout:
        if isinstance(span, int):
            yield span
        else:
            for frame in range(span[0]):
                if frame:
                    yield 2
                yield (1, *span[1:])


@pytest.mark.parametrize(
    "layout",
    [
        [13],
        [3, (1, 4, 6), 5],
        [2, (1, 8, 4), 2, (1, 2, 14), 2, (1, 6, 6), 9],
        [4, (3, 4, 6), 6],
        [1, (2, 6, 2), 3, (1, 4, 4), 3, (4, 2, 2), 5],
    ],
    ids=["text", "picture", "pictures", "video", "videos and picture"],
)
def test_mrope_positions(nano_reference, config, layout):
    expected, next_position = reference_positions(nano_reference, config, layout)
    found = positions.mrope_position_ids(list(spans(layout)), config.vision.spatial_merge_size)
    np.testing.assert_array_equal(found, expected)
    assert found.max() + 1 == next_position


def test_rope_tables(nano_reference, config):
    position_ids = np.random.default_rng(0).integers(0, 8000, (3, 40))
    cos, sin = positions.rope_tables(position_ids, config.text)
    hidden = torch.zeros(1, 40, config.text.hidden_size)
    expected = nano_reference.model.language_model.rotary_emb(hidden, torch.from_numpy(position_ids)[:, None])
    for found, table in zip((cos, sin), expected, strict=True):
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, table[0].numpy(), atol=LAST_PLACE, rtol=0)
    assert np.abs(cos - positions.rope_tables(position_ids[[0, 0, 0]], config.text)[0]).max() > 1  # all axes matter


def test_rope_tables_of_a_stretched_context(nano_reference, config):
    """YaRN scales cos and sin, which the default, of factor 1, does not show."""
    stretched = copy.deepcopy(nano_reference.config.text_config)
    stretched.rope_parameters |= {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}
    reference = Qwen3VLTextRotaryEmbedding(stretched)
    assert reference.attention_scaling > 1.1
    text = dataclasses.replace(
        config.text,
        rope_inv_freq=tuple(reference.inv_freq.tolist()),
        rope_attention_scaling=reference.attention_scaling,
    )
    position_ids = np.random.default_rng(1).integers(0, 8000, (3, 40))
    expected = reference(torch.zeros(1), torch.from_numpy(position_ids)[:, None])
    for found, table in zip(positions.rope_tables(position_ids, text), expected, strict=True):
        # LAST_PLACE again, of values above one
        np.testing.assert_allclose(found, table[0].numpy(), atol=2 * LAST_PLACE, rtol=0)


@pytest.mark.parametrize("grid", GRIDS)
def test_vision_tables(nano_reference, config, grid):
    visual, vision = nano_reference.model.visual, config.vision
    place = get_vision_position_ids(torch.tensor([grid]), vision.spatial_merge_size)
    for found, table in zip(
        positions.vision_rope_tables(grid, vision), visual.rotary_pos_emb(torch.zeros(1), place), strict=True
    ):
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, table.numpy(), atol=LAST_PLACE, rtol=0)


@pytest.mark.parametrize("grid", GRIDS)
def test_position_grid_taps(nano_reference, config, grid):
    vision = config.vision
    indices, weights = positions.position_grid_taps(grid, vision)
    expected_indices, expected_weights = get_vision_interpolation_indices_and_weights(
        torch.tensor([grid]), vision.num_grid_per_side, "bilinear", True, vision.spatial_merge_size
    )
    assert (indices.dtype, weights.dtype) == (np.int32, np.float32)
    np.testing.assert_array_equal(indices, expected_indices.numpy())
    np.testing.assert_array_equal(weights, expected_weights.numpy())


@pytest.mark.parametrize("grid", GRIDS)
def test_cu_seqlens(grid):
    found = positions.vision_cu_seqlens(grid)
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found, get_vision_cu_seqlens(torch.tensor([grid])).numpy())

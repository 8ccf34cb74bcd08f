"""Positions and tables equal to Hugging Face's."""

import copy
import dataclasses
import tracemalloc

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
from pascalvl.plugins.prompt import Patches, Prompt
from pascalvl.runtime import positions
from pascalvl.runtime.embeddings import EmbeddingTable

GRIDS = [(1, 2, 2), (1, 8, 4), (1, 6, 14), (3, 4, 6), (1, 32, 2)]
# Both sides compute float32 angles alike; the cos and sin of NumPy and torch differ in the last place.
LAST_PLACE = 1.2e-7


@pytest.fixture(scope="module")
def config(nano_checkpoint):
    with Checkpoint(nano_checkpoint) as checkpoint:
        return checkpoint.model_config()


def prompt_of(config, layout):
    """Ints are text, grids with t == 1 pictures, with t > 1 videos."""
    ids, visuals = [], []
    for span in layout:
        if isinstance(span, int):
            ids += [7] * span
            continue
        t, h, w = span
        timestamps = tuple(range(t)) if t > 1 else ()
        visuals.append(Patches.of(np.zeros((t * h * w, 1), np.float32), span, 2, timestamps))
        for frame in range(t):
            ids += [7, 7] if frame else []  # a timestamp stands between the frames of a video
            ids += [config.video_token_id if t > 1 else config.image_token_id] * (h * w // 4)
    return Prompt.of(np.array(ids), visuals, (config.image_token_id, config.video_token_id))


def reference_positions(model, prompt):
    """Hugging Face's, and the position that comes next."""
    ids = torch.from_numpy(prompt.token_ids)[None]
    grids = {"image_grid_thw": [], "video_grid_thw": []}
    for visual in prompt.visuals:
        grids["video_grid_thw" if visual.patches.is_video else "image_grid_thw"].append(visual.patches.grid)
    position_ids, deltas = model.model.get_rope_index(
        ids,
        (ids == model.config.image_token_id).int() + 2 * (ids == model.config.video_token_id).int(),
        **{name: torch.tensor(found) if found else None for name, found in grids.items()},
    )
    return position_ids[:, 0].numpy(), int(deltas[0]) + ids.shape[1]


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
    prompt = prompt_of(config, layout)
    answered = dataclasses.replace(prompt, token_ids=np.append(prompt.token_ids, [5, 9, 5]))
    for given in (prompt, answered):
        expected, next_position = reference_positions(nano_reference, given)
        np.testing.assert_array_equal(given.position_ids, expected)
        assert given.next_position == next_position


@pytest.mark.parametrize("placeholders", [5, 7])
def test_visuals_have_as_many_tokens_as_placeholders(config, placeholders):
    visual = Patches.of(np.zeros((24, 1), np.float32), (1, 4, 6), 2)
    with pytest.raises(ValueError, match=f"expected placeholders for 6 tokens of visuals, found {placeholders}"):
        Prompt.of(np.array([7] + [config.image_token_id] * placeholders), [visual], (config.image_token_id,))


def test_rope_tables(nano_reference, config):
    position_ids = np.random.default_rng(0).integers(0, 8000, (3, 40))
    cos, sin = positions.rope_tables(position_ids, config.text)
    hidden = torch.zeros(1, 40, config.text.hidden_size)
    expected = nano_reference.model.language_model.rotary_emb(hidden, torch.from_numpy(position_ids)[:, None])
    for found, table in zip((cos, sin), expected, strict=True):
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, table[0].numpy(), atol=LAST_PLACE, rtol=0)
    assert np.abs(cos - positions.rope_tables(position_ids[[0, 0, 0]], config.text)[0]).max() > 1  # all axes matter


def test_rope_of_single_tokens_of_text(config):
    """Of what was kept before, too, and forgotten."""
    rope = positions.TextRope(config.text)
    for position in (0, 63, 64, 130, 1, *range(70, 70 + 64 * 70, 64), 2):
        expected = positions.rope_tables(np.full((3, 1), position), config.text)
        for found, table in zip(rope.at(position), expected, strict=True):
            np.testing.assert_array_equal(found, table)


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


@pytest.fixture(scope="module")
def learned(tmp_path_factory, nano_reference):
    """Nano's learned positions in a type: the table as the runtime maps it, and as torch has it."""

    def make(dtype):
        tensor = nano_reference.model.visual.pos_embed.weight.detach().to(dtype)
        path = tmp_path_factory.mktemp("positions") / "positions.bin"
        path.write_bytes(tensor.view(torch.uint8).numpy())
        return EmbeddingTable(path, str(dtype).removeprefix("torch."), tensor.shape), tensor

    return make


def reference_embeds(tensor, vision, grid):
    """What Hugging Face's vision model adds to the patches: the forward method's own two lines."""
    indices, weights = get_vision_interpolation_indices_and_weights(
        torch.tensor([grid]), vision.num_grid_per_side, "bilinear", True, vision.spatial_merge_size
    )
    return (tensor.float()[indices] * weights[:, :, None]).sum(1).numpy()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("grid", [*GRIDS, (1, 22, 34), (2, 6, 10), (1, 48, 2), (4, 2, 2)])
def test_vision_positions(learned, config, grid, dtype):
    table, tensor = learned(dtype)
    expected = reference_embeds(tensor, config.vision, grid)
    found = positions.VisionPositions(table, config.vision)(grid)
    assert found.dtype == np.float32
    # Rows are mixed before columns, where the reference multiplies their weights: four roundings in the last place.
    np.testing.assert_allclose(found, expected, rtol=0, atol=4 * LAST_PLACE * np.abs(expected).max())


def test_the_learned_grid_itself(learned, config):
    """A picture of as many patches has the very entries of the table, block by block."""
    table, tensor = learned(torch.bfloat16)
    side, merge = config.vision.num_grid_per_side, config.vision.spatial_merge_size
    blocks = tensor.float().unflatten(0, (side // merge, merge, side // merge, merge)).transpose(1, 2)
    found = positions.VisionPositions(table, config.vision)((1, side, side))
    np.testing.assert_array_equal(found, blocks.flatten(0, 3).numpy())


def test_latest_vision_positions_are_kept(learned, config):
    """As many as have room, the longest unused first to go; a video's are its frames'."""
    table, _ = learned(torch.float32)
    of_patches = 4 * config.vision.hidden_size
    embeds = positions.VisionPositions(table, config.vision, kept_bytes=(24 + 32) * of_patches)
    first, second = embeds((1, 4, 6)), embeds((1, 8, 4))
    assert embeds((1, 4, 6)) is first
    np.testing.assert_array_equal(embeds((2, 4, 6)), np.concatenate([first, first]))
    third = embeds((1, 2, 2))  # no room for the second
    assert embeds((1, 4, 6)) is first
    assert embeds((1, 2, 2)) is third
    again = embeds((1, 8, 4))
    assert again is not second
    np.testing.assert_array_equal(again, second)
    large = embeds((1, 32, 32))
    assert embeds((1, 32, 32)) is not large


def test_interpolation_needs_little_more_than_its_result(learned, config):
    """A reference that gathers takes four times as much, and their products besides."""
    table, _ = learned(torch.bfloat16)
    embeds = positions.VisionPositions(table, config.vision)
    tracemalloc.start()
    try:
        found = embeds((1, 128, 128))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1.2 * found.nbytes


@pytest.mark.parametrize("grid", GRIDS)
def test_cu_seqlens(grid):
    found = positions.vision_cu_seqlens(grid)
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found, get_vision_cu_seqlens(torch.tensor([grid])).numpy())

"""Whole prompts equal to Hugging Face's processor and model: token ids with placeholders expanded, positions."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor
from transformers.video_utils import VideoMetadata

from pascalvl.export.checkpoint import Checkpoint
from pascalvl.plugins.errors import UserError
from pascalvl.runtime.prompt import PromptBuilder
from pascalvl.runtime.video import Video
from tests.real_sizes import HOST_FILES


@pytest.fixture(scope="module")
def config(nano_checkpoint):
    with Checkpoint(nano_checkpoint) as checkpoint:
        return checkpoint.model_config()


@pytest.fixture(scope="module")
def builder(nano_checkpoint, config):
    return PromptBuilder(nano_checkpoint, config)


@pytest.fixture
def host_files(nano_checkpoint, tmp_path):
    """A copy of the files that prompts are built with, to be changed."""
    for name in HOST_FILES:
        shutil.copyfile(nano_checkpoint / name, tmp_path / name)
    return tmp_path


@pytest.fixture(scope="module")
def processor(nano_checkpoint):
    return AutoProcessor.from_pretrained(nano_checkpoint)


def picture(width, height):
    pixels = np.random.default_rng(width).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


def user(*content):
    return {
        "role": "user",
        "content": [part if isinstance(part, dict) else {"type": "text", "text": part} for part in content],
    }


def image(width, height):
    return {"type": "image", "image": picture(width, height)}


def video(count, fps):
    return {"type": "video", "video": Video([picture(64 + i, 64).resize((64, 64)) for i in range(count)], fps)}


CONVERSATIONS = {
    "text": [{"role": "user", "content": "What's up? 12 + 34 = 46, naïve façade 你好 🙂"}],
    "system": [{"role": "system", "content": "Answer briefly."}, user("Hi")],
    "picture": [user(image(200, 100), "Describe the picture.")],
    "pictures": [user(image(200, 100), "and", image(64, 256), image(77, 77), "Compare.")],
    "video": [user(video(8, 2.0), "What moves?")],
    "odd video": [user(video(7, 3.0), "What moves?")],
    "video and picture": [user(video(24, 12.0), image(90, 60), video(4, 2.0), "Which?")],
    "multi-turn": [
        user(image(100, 100), "Where?"),
        {"role": "assistant", "content": "Row 1."},
        user("And", image(64, 90), "?"),
        {"role": "assistant", "content": [{"type": "text", "text": "Row 2."}]},
        user("Sure?"),
    ],
}


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_tokens_and_positions_equal_the_reference(builder, processor, nano_reference, name):
    messages = CONVERSATIONS[name]
    content = [part for m in messages if isinstance(m["content"], list) for part in m["content"]]
    images = [part["image"] for part in content if part["type"] == "image"]
    videos = [part["video"] for part in content if part["type"] == "video"]
    metadata = [
        VideoMetadata(len(v.frames), fps=v.fps, width=64, height=64, duration=len(v.frames) / v.fps) for v in videos
    ]
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    media = {"images": images} if images else {}
    if videos:
        frames = [np.stack([np.asarray(frame) for frame in v.frames]) for v in videos]
        media |= {"videos": frames, "video_metadata": metadata, "do_sample_frames": True}
    expected = processor(text=[text], return_tensors="pt", **media)
    prompt = builder.build(messages)
    np.testing.assert_array_equal(prompt.token_ids, expected["input_ids"][0])
    grids = {kind: expected.get(f"{kind}_grid_thw") for kind in ("image", "video")}
    for kind, grid in grids.items():
        found = [list(v.patches.grid) for v in prompt.visuals if v.patches.is_video == (kind == "video")]
        assert found == ([] if grid is None else grid.tolist())
    position_ids, deltas = nano_reference.model.get_rope_index(
        expected["input_ids"], expected["mm_token_type_ids"], grids["image"], grids["video"]
    )
    np.testing.assert_array_equal(prompt.position_ids, position_ids[:, 0])
    assert prompt.next_position == len(prompt.token_ids) + int(deltas[0])
    visual = torch.from_numpy(np.concatenate([[], *(v.token_indices for v in prompt.visuals)]))
    assert sorted(visual.tolist()) == torch.nonzero(expected["mm_token_type_ids"][0])[:, 0].tolist()


def test_visual_tokens_are_where_their_placeholders_are(builder, config):
    prompt = builder.build(CONVERSATIONS["video and picture"])
    kinds = [config.video_token_id, config.image_token_id, config.video_token_id]
    for visual, token_id in zip(prompt.visuals, kinds, strict=True):
        assert (prompt.token_ids[visual.token_indices] == token_id).all()
        assert len(visual.token_indices) == np.prod(visual.patches.grid) // 4
    everywhere = np.concatenate([visual.token_indices for visual in prompt.visuals])
    assert len(set(everywhere.tolist())) == len(everywhere)


def test_max_pixels_limits_pictures_and_videos(nano_checkpoint, config, builder):
    limit = 64 * 64
    prompt = PromptBuilder(nano_checkpoint, config, limit).build(CONVERSATIONS["video and picture"])
    whole = builder.build(CONVERSATIONS["video and picture"])
    for limited, visual in zip(prompt.visuals, whole.visuals, strict=True):
        frames = 2 * limited.patches.grid[0] if limited.patches.is_video else 1
        assert limited.patches.grid[1] * limited.patches.grid[2] * 256 * frames <= max(limit, 1024 * frames)
        assert len(limited.token_indices) < len(visual.token_indices)


@pytest.mark.parametrize(
    ("messages", "phrase"),
    [
        ([], "at least one message"),
        ([{"role": "user", "content": [{"type": "audio", "audio": "x"}]}], "found {'type': 'audio'"),
        ([user("x"), {"role": "assistant", "content": "<|image_pad|>"}], "no such picture or video is given"),
        ([user({"type": "image", "image": None})], "expected a picture as a path"),
        ([user({"type": "video", "video": 3})], "expected a video as a path"),
        ([user("\ud83d")], "expected text in Unicode"),
    ],
)
def test_bad_messages(builder, messages, phrase):
    with pytest.raises(UserError) as error:
        builder.build(messages)
    assert phrase in str(error.value)


def test_placeholders_in_text(nano_checkpoint, config, builder):
    """They are text, and no place for a picture, unless they are asked to be."""
    templates_way = PromptBuilder(nano_checkpoint, config, control_tokens_in_text=True)
    messages = [user(video(4, 2.0), "<|image_pad|>", image(64, 64)), {"role": "tool", "content": "<|video_pad|>"}]
    prompt = builder.build(messages)
    of_visuals = sum(visual.token_indices.size for visual in prompt.visuals)
    assert np.isin(prompt.token_ids, (config.image_token_id, config.video_token_id)).sum() == of_visuals
    text = builder.tokenizer.decode(prompt.token_ids)
    assert "<|image_pad|>" in text
    assert "<|video_pad|>" in text
    for bad in ([user("text with <|image_pad|> in it")], messages):
        with pytest.raises(UserError, match=r"holds the placeholder .* where no such picture or video is given"):
            templates_way.build(bad)


def test_template_that_drops_a_picture(host_files, config):
    (host_files / "chat_template.jinja").write_text("no pictures here")
    with pytest.raises(UserError, match="no place for one of the pictures"):
        PromptBuilder(host_files, config).build(CONVERSATIONS["picture"])


def test_template_that_takes_a_video_for_a_picture(host_files, config):
    (host_files / "chat_template.jinja").write_text("<|image_pad|>")
    with pytest.raises(UserError, match="no such picture or video is given"):
        PromptBuilder(host_files, config).build(CONVERSATIONS["video"])


@pytest.mark.parametrize("name", ["preprocessor_config.json", "video_preprocessor_config.json"])
def test_processor_of_another_model(host_files, config, name):
    settings = json.loads((host_files / name).read_text())
    (host_files / name).write_text(json.dumps(settings | {"patch_size": 14}))
    with pytest.raises(UserError, match=rf"{name} makes patches .* of \(14, 2, 2\), the model takes \(16, 2, 2\)"):
        PromptBuilder(host_files, config)


def test_tokens_that_the_model_has_not(host_files, config):
    small = dataclasses.replace(config, text=dataclasses.replace(config.text, vocab_size=2014))
    with pytest.raises(UserError, match="tokens of a prompt, up to number 2014: expected some below 2014"):
        PromptBuilder(host_files, small).build([{"role": "system", "content": "<think>"}, user("Hi")])
    (host_files / "chat_template.jinja").write_text("")
    with pytest.raises(UserError, match="make 0 tokens of a prompt"):
        PromptBuilder(host_files, config).build([user("Hello!")])

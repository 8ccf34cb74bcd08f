"""Tokenizer, chat template and placeholders: whole prompts equal to Hugging Face's processor."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image
from transformers import AutoProcessor
from transformers.video_utils import VideoMetadata

from pascalvl.plugins.bundle import Manifest
from pascalvl.plugins.errors import UserError
from pascalvl.runtime.chat_template import ChatTemplate
from pascalvl.runtime.prompt import PromptBuilder
from pascalvl.runtime.tokenizer import Tokenizer
from pascalvl.runtime.video import Video


@pytest.fixture(scope="module")
def builder(nano_model_bundle):
    return PromptBuilder(nano_model_bundle, Manifest.read(nano_model_bundle, "model").model)


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
def test_token_ids_equal_the_reference(builder, processor, name):
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
    expected = processor(text=[text], return_tensors="np", **media)
    prompt = builder.build(messages)
    np.testing.assert_array_equal(prompt.token_ids, expected["input_ids"][0])
    assert (
        sum(len(visual.token_indices) for visual in prompt.visuals)
        == expected["mm_token_type_ids"][0].astype(bool).sum()
    )
    grids = (
        [tuple(g) for g in expected.get("image_grid_thw", [])],
        [tuple(g) for g in expected.get("video_grid_thw", [])],
    )
    assert [v.patches.grid for v in prompt.visuals if not v.patches.is_video] == grids[0]
    assert [v.patches.grid for v in prompt.visuals if v.patches.is_video] == grids[1]


def test_visual_tokens_are_where_their_placeholders_are(builder, nano_model_bundle):
    config = Manifest.read(nano_model_bundle, "model").model
    prompt = builder.build(CONVERSATIONS["video and picture"])
    kinds = [config.video_token_id, config.image_token_id, config.video_token_id]
    for visual, token_id in zip(prompt.visuals, kinds, strict=True):
        assert (prompt.token_ids[visual.token_indices] == token_id).all()
        assert len(visual.token_indices) == np.prod(visual.patches.grid) // 4
    everywhere = np.concatenate([visual.token_indices for visual in prompt.visuals])
    assert len(set(everywhere.tolist())) == len(everywhere)


def test_decoding_inverts_encoding_and_streams_whole_characters(builder):
    text = "naïve façade 你好 🙂🚀 — 12.5 %"
    token_ids = builder.tokenizer.encode(text)
    assert builder.tokenizer.decode(token_ids.tolist()) == text
    stream = builder.tokenizer.stream()
    pieces = [stream.push(int(token_id)) for token_id in token_ids]
    assert "".join(pieces) == text
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
    assert len(token_ids) > len(text.split())


@pytest.mark.parametrize(
    ("messages", "phrase"),
    [
        ([{"role": "robot", "content": "hi"}], "role of system, user"),
        (["hi"], "expected a message with a role"),
        ([{"role": "user"}], "found None"),
        ([user({"type": "audio", "audio": "x"})], "found {'type': 'audio'"),
        ([user({"type": "image"})], "with a field of that name"),
        ([user("text with <|image_pad|> in it")], "no such picture or video is given"),
        ([user(video(4, 2.0), "<|image_pad|>", image(64, 64))], "no such picture or video is given"),
    ],
)
def test_bad_messages(builder, messages, phrase):
    with pytest.raises(UserError) as error:
        builder.build(messages)
    assert phrase in str(error.value)


def test_template_that_drops_a_picture(builder, nano_model_bundle, tmp_path):
    bundle = shutil.copytree(nano_model_bundle, tmp_path / "bundle")
    (bundle / "chat_template.jinja").write_text("no pictures here")
    builder = PromptBuilder(bundle, Manifest.read(bundle, "model").model)
    with pytest.raises(UserError, match="no place for one of the pictures"):
        builder.build(CONVERSATIONS["picture"])


def test_bad_templates(tmp_path):
    path = tmp_path / "chat_template.jinja"
    path.write_text("{% for %}")
    with pytest.raises(UserError, match="cannot be used"):
        ChatTemplate(path)
    path.write_text("{{ raise_exception('only one system message') }}")
    with pytest.raises(UserError, match="refuses the messages: only one system message"):
        ChatTemplate(path).render([user("hi")])
    path.write_text("{{ messages.__class__.__mro__ }}{{ missing.field }}")
    with pytest.raises(UserError, match="refuses the messages"):
        ChatTemplate(path).render([user("hi")])
    with pytest.raises(UserError, match="cannot be used"):
        ChatTemplate(tmp_path / "nowhere")


def test_templates_have_hugging_faces_names(tmp_path):
    path = tmp_path / "chat_template.jinja"
    path.write_text(
        "{% for m in messages %}\n  {% if m.role == 'system' %}{% continue %}{% endif %}\n{{ m | tojson }}{% endfor %}"
    )
    message = {"role": "user", "content": "<é>"}
    assert ChatTemplate(path).render([{"role": "system", "content": "s"}, message]) == json.dumps(
        message, ensure_ascii=False
    )


def test_bad_tokenizer(tmp_path):
    with pytest.raises(UserError, match="no tokenizer at"):
        Tokenizer(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(UserError, match="is not a tokenizer"):
        Tokenizer(tmp_path / "tokenizer.json")

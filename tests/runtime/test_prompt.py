"""Whole prompts equal to Hugging Face's processor and model: token ids with placeholders expanded, positions."""

import base64
import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, AutoTokenizer
from transformers.image_utils import load_image
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


TOOLS_TEMPLATE = """{%- if tools %}<|im_start|>system
{%- if messages[0].role == 'system' %}
{{ messages[0].content }}{% endif %}

Functions:{% for tool in tools %}
{{ tool | tojson }}{% endfor %}<|im_end|>
{% elif messages[0].role == 'system' %}<|im_start|>system
{{ messages[0].content }}<|im_end|>
{% endif %}
{%- set ns = namespace(asked=-1) %}
{%- for m in messages %}
    {%- if m.role == 'user' and not (m.content is string and m.content.startswith('<tool_response>')) %}
        {%- set ns.asked = loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- macro shown(content) %}
    {%- if content is string %}{{ content }}{% else %}
        {%- for part in content %}
            {%- if 'image' in part or 'image_url' in part or part.type == 'image' -%}
                <|vision_start|><|image_pad|><|vision_end|>
            {%- else %}{{ part.text }}{% endif %}
        {%- endfor %}
    {%- endif %}
{%- endmacro %}
{%- for m in messages %}
    {%- if m.role == 'user' -%}
        <|im_start|>user{{ '\\n' + shown(m.content) }}<|im_end|>
{% elif m.role == 'tool' %}
        {%- if not loop.previtem or loop.previtem.role != 'tool' %}<|im_start|>user{% endif %}
<tool_response>
{{ shown(m.content) }}
</tool_response>
        {%- if loop.last or loop.nextitem.role != 'tool' %}<|im_end|>
{% endif %}
    {%- elif m.role == 'assistant' %}
        {%- set text = shown(m.content) | trim %}
        {%- set thought = m.reasoning_content if m.reasoning_content is string else '' %}
        {%- if not thought and '</think>' in text %}
            {%- set thought = text.split('</think>')[0].split('<think>')[-1].strip() %}
            {%- set text = text.split('</think>')[-1].strip() %}
        {%- endif -%}
        <|im_start|>assistant
{% if thought and loop.index0 > ns.asked %}<think>
{{ thought }}
</think>

{% endif %}{{ text }}
        {%- for call in m.tool_calls %}{% set f = call.function or call %}
<tool_call>
{"name": "{{ f.name }}", "arguments": {{ f.arguments if f.arguments is string else f.arguments | tojson }}}
</tool_call>
        {%- endfor %}<|im_end|>
{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and not enable_thinking %}<think>

</think>

{% endif %}{% endif %}"""
"""Looks at messages, tools and a variable in every way that templates of models with tools do."""
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "What's the weather like at a <place>?",
            "parameters": {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]},
        },
    },
    {"type": "function", "function": {"name": "now", "parameters": {}}},
]


def calls(*arguments):
    return [
        {"id": str(i), "type": "function", "function": {"name": "weather", "arguments": given}}
        for i, given in enumerate(arguments)
    ]


TOOL_CONVERSATIONS = {
    "asked": [{"role": "user", "content": "How is the weather in Łódź?"}],
    "system": [{"role": "system", "content": "Be brief."}, user("Weather?")],
    "called": [
        user("Weather?"),
        {"role": "assistant", "content": None, "tool_calls": calls({"place": "Łódź"}, '{"place": "here"}')},
        {"role": "tool", "content": "18 °C", "tool_call_id": "0", "name": None},
        {"role": "tool", "content": [{"type": "text", "text": '{"C": 3}'}], "tool_call_id": "1"},
    ],
    "no content": [
        user("Weather?"),
        {"role": "assistant", "tool_calls": [{"name": "now", "arguments": {}}], "reasoning": "Let me see."},
        {"role": "tool", "content": "12:00"},
        {"role": "assistant", "content": "<think>\nWell.\n</think>\n\nNoon.", "tool_calls": None},
    ],
    "both": [
        user("Now?"),
        {"role": "assistant", "content": "<think>Hm.</think> I look.", "tool_calls": calls({})},
        {"role": "tool", "content": "1"},
        {"role": "assistant", "content": "One.", "reasoning_content": "Easy."},
        user("Sure?"),
    ],
    "a user's response": [user("Now?"), {"role": "user", "content": "<tool_response>12</tool_response>"}],
}


@pytest.mark.parametrize("variables", [{}, {"enable_thinking": False}, {"add_generation_prompt": False}], ids=str)
@pytest.mark.parametrize("tools", [None, TOOLS], ids=["", "tools"])
@pytest.mark.parametrize("name", TOOL_CONVERSATIONS)
def test_tools_equal_the_reference(host_files, config, name, tools, variables):
    (host_files / "chat_template.jinja").write_text(TOOLS_TEMPLATE, encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(host_files)
    expected = tokenizer.apply_chat_template(
        TOOL_CONVERSATIONS[name], tools=tools, return_dict=True, **{"add_generation_prompt": True, **variables}
    )
    found = PromptBuilder(host_files, config).build(TOOL_CONVERSATIONS[name], tools, variables)
    assert found.token_ids.tolist() == expected["input_ids"]


def test_pictures_in_every_form_equal_the_reference(builder, processor, tmp_path):
    path = tmp_path / "a b.png"
    picture(90, 60).save(path)
    url = f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
    expected = builder.build([user({"type": "image", "image": picture(90, 60)}, "What is it?")])
    for part, source in (
        ({"type": "image", "image": str(path)}, str(path)),
        ({"type": "image", "path": str(path)}, str(path)),
        ({"type": "image", "url": url}, url),
        ({"type": "image", "image": url}, url),
        ({"type": "image_url", "image_url": {"url": url, "detail": "low"}}, url),
        ({"type": "image_url", "image_url": path.as_uri()}, str(path)),  # of which Hugging Face reads no file: URLs
        ({"type": "image", "image": path}, str(path)),
    ):
        messages = [user(part, "What is it?")]
        text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        reference = processor(text=[text], images=[load_image(source)])
        found = builder.build(messages)
        assert found.token_ids.tolist() == reference["input_ids"][0] == expected.token_ids.tolist()
        assert found.visuals[0].patches.digest == expected.visuals[0].patches.digest


def test_videos_in_every_form(builder, tmp_path):
    path = tmp_path / "a b.gif"
    frames = [picture(64 + i, 64).resize((64, 64)) for i in range(4)]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=250)
    expected = builder.build([user({"type": "video", "video": path})])
    for part in (
        {"type": "video", "path": str(path)},
        {"type": "video", "url": path.as_uri()},
        {"type": "video_url", "video_url": {"url": path.as_uri()}},
    ):
        found = builder.build([user(part)])
        assert found.token_ids.tolist() == expected.token_ids.tolist()
        assert found.visuals[0].patches.digest == expected.visuals[0].patches.digest
    for url in ("https://example.org/a.mp4", "data:video/mp4;base64," + "A" * 10**6):
        with pytest.raises(UserError, match="is no file here: download or save it first") as error:
            builder.build([user({"type": "video_url", "video_url": {"url": url}})])
        assert len(str(error.value)) < 300


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
        ([{"role": "system", "content": "<|image_pad|>"}, user("x")], "no such picture or video is given"),
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

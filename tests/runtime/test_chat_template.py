"""Chat templates render as in Hugging Face, and do nothing else."""

from pathlib import Path

import pytest
from PIL import Image
from transformers import AutoProcessor, AutoTokenizer

from pascalvl.plugins.errors import UserError
from pascalvl.runtime.chat_template import ChatTemplate


def text(content):
    return {"type": "text", "text": content}


PICTURE = {"type": "image", "image": Image.new("RGB", (32, 32))}
VIDEO = {"type": "video", "video": Path("clip.gif")}
HI = [{"role": "user", "content": "hi"}]
CONVERSATIONS = {
    "text": HI,
    "system": [{"role": "system", "content": "Answer <briefly> & 'well'."}, *HI],
    "parts": [{"role": "user", "content": [text("naïve\n"), text(" 你好")]}],
    "picture": [{"role": "user", "content": [PICTURE, text("What is it?")]}],
    "pictures": [{"role": "user", "content": [PICTURE, text("and"), PICTURE, text("differ?")]}],
    "video": [{"role": "user", "content": [VIDEO, text("What moves?"), PICTURE]}],
    "multi-turn": [
        {"role": "user", "content": [PICTURE, text("Where?")]},
        {"role": "assistant", "content": "Row 1."},
        {"role": "user", "content": [text("And"), VIDEO]},
        {"role": "assistant", "content": [text("Row 2.")]},
        {"role": "user", "content": "Sure?"},
    ],
}
FEATURES = {
    "line ends and indentation of blocks go": "a\n  {% if messages %}\n  b\n  {% endif %}\nc\n",
    "break and continue": "{% for c in 'abcd' %}{% if c == 'b' %}{% continue %}{% endif %}{% if c == 'd' %}{% break %}"
    "{% endif %}{{ c }}{% endfor %}",
    "tojson": "{{ messages | tojson }} {{ {'b': 1, 'a': '<é&>'} | tojson(indent=2, sort_keys=true) }}",
    "tojson with separators": "{{ [1, {'a': 2}] | tojson(separators=(',', ':'), ensure_ascii=true) }}",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    "date": "{{ strftime_now('%Y') }}",
    "absent arguments are none": "{{ tools is none }} {{ documents is none }} {{ add_generation_prompt }}",
    "undefined names are empty": "[{{ nothing }}]{% if nothing %}x{% endif %}{{ nothing is defined }}",
    "generation": "a{% generation %}{% set b = 'b' %}{{ b }}{% endgeneration %}{{ b }}",
    "message fields": "{{ messages[0].note }} {{ messages[0]['role'] }} {{ messages[-1].content[::-1] }}",
}


@pytest.fixture
def template(tmp_path):
    def make(source):
        (tmp_path / "chat_template.jinja").write_text(source, encoding="utf-8")
        return ChatTemplate(tmp_path / "chat_template.jinja")

    return make


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_conversations_equal_the_reference(nano_checkpoint, name):
    processor = AutoProcessor.from_pretrained(nano_checkpoint)
    expected = processor.apply_chat_template(CONVERSATIONS[name], tokenize=False, add_generation_prompt=True)
    assert ChatTemplate(nano_checkpoint / "chat_template.jinja").render(CONVERSATIONS[name]) == expected


@pytest.mark.parametrize("name", FEATURES)
def test_features_equal_the_reference(nano_checkpoint, template, name):
    tokenizer = AutoTokenizer.from_pretrained(nano_checkpoint)
    messages = [{"role": "user", "content": "hi <é>", "note": {"n": [1, None, 2.5, True]}}]
    expected = tokenizer.apply_chat_template(
        messages, chat_template=FEATURES[name], tokenize=False, add_generation_prompt=True
    )
    assert template(FEATURES[name]).render(messages) == expected


@pytest.mark.parametrize(
    "attack",
    [
        "{{ messages[0].content[0].image.save(target) }}",
        "{{ messages[0].content[1].video.with_name('written').write_text('x') }}",
    ],
)
def test_a_template_cannot_write_files(template, tmp_path, attack):
    target = tmp_path / "written"
    content = [PICTURE, {"type": "video", "video": tmp_path / "clip.gif"}]
    with pytest.raises(UserError, match="refuses the messages"):
        template(attack.replace("target", f"'{target}', 'PNG'")).render([{"role": "user", "content": content}])
    assert not target.exists()


@pytest.mark.parametrize(
    ("source", "phrase"),
    [
        ("{% for %}", "cannot be used"),
        ("{{ messages | no_such_filter }}", "cannot be used .*no_such_filter"),
        ("{% no_such_tag %}", "cannot be used .*no_such_tag"),
    ],
)
def test_templates_that_cannot_be_used(template, source, phrase):
    with pytest.raises(UserError, match=phrase):
        template(source)


@pytest.mark.parametrize(
    ("source", "phrase"),
    [
        ("{{ raise_exception('only one system message') }}", r"refuses the messages: only one system message\."),
        ("{{ no_such_function() }}", "'no_such_function' is undefined"),
        ("{{ missing.field }}", "'missing' is undefined"),
        ("{{ messages.__class__.__mro__ }}", "refuses the messages: access to attribute '__class__'"),
        ("{{ messages[0].content + 1 }}", "refuses the messages: can only concatenate"),
        ("{{ 1 / 0 }}", "refuses the messages: division by zero"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "refuses the messages: maximum recursion"),
    ],
)
def test_templates_that_refuse_the_messages(template, source, phrase):
    with pytest.raises(UserError, match=phrase):
        template(source).render(HI)


def test_missing_and_unreadable_templates(tmp_path):
    with pytest.raises(UserError, match="cannot be used"):
        ChatTemplate(tmp_path / "nowhere")
    (tmp_path / "binary").write_bytes(b"\xff")
    with pytest.raises(UserError, match="cannot be used"):
        ChatTemplate(tmp_path / "binary")


@pytest.mark.parametrize(
    ("messages", "phrase"),
    [
        ([], "at least one message, found []"),
        (None, "at least one message, found None"),
        (["hi"], "expected a message with a role"),
        ([{"role": "robot", "content": "hi"}], "role of system, user, assistant, tool, found 'robot'"),
        ([{"role": "user"}], "a text or a list of parts, found None"),
        ([{"role": "user", "content": ["hi"]}], "found 'hi'"),
        ([{"role": "user", "content": [{"type": "audio", "audio": "x"}]}], "found {'type': 'audio'"),
        ([{"role": "user", "content": [{"type": "image"}]}], "with a field of that name"),
        ([{"role": "user", "content": [text(None)]}], "found {'type': 'text', 'text': None}"),
    ],
)
def test_bad_messages(template, messages, phrase):
    with pytest.raises(UserError) as error:
        template("{{ messages }}").render(messages)
    assert phrase in str(error.value)

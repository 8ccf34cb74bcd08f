"""What people write: formats of the cache and weights, chat templates, messages."""

import copy

import pytest

from pascalvl.plugins.bundle import CHAT_TEMPLATE, Manifest
from pascalvl.plugins.kv_format import CacheConfig
from pascalvl.plugins.weight_format import WeightConfig
from pascalvl.runtime.chat_template import ChatTemplate
from pascalvl.runtime.prompt import PromptBuilder
from tests.fuzz.mutators import damaged_json, damaged_text

DIGITS = ["0", "1", "-", "+", ".", "9" * 30, "9" * 5000, "٣", "²", " ", "\n", "\ud800"]


@pytest.mark.parametrize(
    ("config", "valid", "parts"),
    [
        (
            CacheConfig,
            ["k8v4", "k4v4,rv=96", "k8v4,window=64+8192,pin=image", "f16,layer.0-1=f32", "k8v8,rv=112"],
            [
                "k8v4",
                "k4v4",
                "f16",
                "f32",
                ",",
                "=",
                "rv=",
                "auto:0.01",
                "window=",
                "pin=image",
                "layer.",
            ],
        ),
        (
            WeightConfig,
            ["w4", "w8,group=64", "w4,group=64,layer.0=w8", "f16,vision=w8,lm_head=f32", "w4,layer.1-3=f16"],
            ["w4", "w8", "f16", "f32", ",", "=", "group=", "32", "layer.", "vision=", "lm_head=", "auto"],
        ),
    ],
)
def test_formats(fuzz, config, valid, parts):
    """What is taken means the same when it is written."""

    def case(draw):
        text = damaged_text(draw, draw.choice(valid), parts + DIGITS)
        if found := fuzz.attempt(lambda: config.parse(text)):
            assert config.parse(str(found)) == found

    fuzz(case)
    assert fuzz.refused
    assert fuzz.used


TEMPLATE_PARTS = [
    *("{{ ", " }}", "{% ", " %}", "{# ", " #}", "{%- if messages %}", "{% endif %}", "{% for i in range(10**9) %}"),
    *(
        "{% for m in messages %}",
        "{% endfor %}",
        "{{ 9**9**9 }}",
        "{{ 'x' * 10**10 }}",
        "{{ messages }}",
        "{% break %}",
    ),
    *("{{ lipsum(n=1000000) }}", "{% set x = namespace(y=[]) %}", "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}"),
    *("{{ messages[0].content | list | tojson }}", "{{ ''.__class__ }}", "{{ cycler }}", "{% include 'x' %}", "\0"),
    *("{{ raise_exception('no') }}", "{{ strftime_now('%Y' * 1000) }}", "{{ 1/0 }}", "{{ x.y.z }}", "\ud800", "é", "'"),
]
PICTURE = {"type": "image", "image": None}
CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [PICTURE, {"type": "text", "text": "What is it?"}]},
    {"role": "assistant", "content": "A cup."},
    {"role": "user", "content": "Of which colour?"},
]


def test_templates(fuzz, nano_checkpoint, tmp_path):
    source = (nano_checkpoint / CHAT_TEMPLATE).read_text()
    path = tmp_path / CHAT_TEMPLATE

    def case(draw):
        path.write_bytes(damaged_text(draw, source, TEMPLATE_PARTS).encode(errors="surrogatepass"))
        if template := fuzz.attempt(lambda: ChatTemplate(path)):
            fuzz.attempt(lambda: template.render(CONVERSATION))

    fuzz(case)
    assert fuzz.refused
    assert fuzz.used


def test_messages(fuzz, nano_engine_bundle, picture):
    """What is taken has tokens of the vocabulary, and places for all its pictures."""
    config = Manifest.read(nano_engine_bundle, "engine").model
    builder = PromptBuilder(nano_engine_bundle, config)
    conversation = copy.deepcopy(CONVERSATION)
    conversation[1]["content"][0]["image"] = str(picture)

    def case(draw):
        prompt = fuzz.attempt(lambda: builder.build(damaged_json(draw, conversation)))
        if prompt:
            assert 0 <= prompt.token_ids.min() <= prompt.token_ids.max() < config.text.vocab_size
            of_pictures = sum(len(visual.token_indices) for visual in prompt.visuals)
            assert of_pictures == (prompt.token_ids == config.image_token_id).sum()

    fuzz(case)
    assert fuzz.refused
    assert fuzz.used

"""Validation passes what is right, fails what is not, and names where it went wrong."""

import random
import shutil

import numpy as np
import onnx
import pytest

from pascalvl.engines import validation
from pascalvl.engines.tolerance import TOLERANCE, tolerance
from pascalvl.plugins.bundle import Manifest
from pascalvl.plugins.errors import UserError
from pascalvl.plugins.kv_format import KVFormat
from pascalvl.runtime import VisionLanguageModel
from pascalvl.runtime.validation import trace
from tests.engines.decoder import CACHES
from tests.nano.scenes import render, sample_scene

MESSAGES = [
    {
        "role": "user",
        "content": [
            {"type": "image", "image": render(sample_scene(random.Random(5), 2, 3), 150, 100)},
            {"type": "text", "text": "Describe the picture."},
        ],
    }
]
NEW_TOKENS = 4


def compare(bundle, checkpoint, alter=lambda outputs: outputs):
    model = VisionLanguageModel.open(bundle, marked_layers=True)
    return validation.validate(
        checkpoint,
        lambda _, forced: alter(trace(model, MESSAGES, forced)),
        {"picture": model.prompt(MESSAGES)},
        tolerance(model.cache_config, model.config),
        NEW_TOKENS,
    )


@pytest.mark.parametrize("kv", CACHES)
def test_engines_agree_with_the_reference(kv, nano_engine, nano_checkpoint):
    bundle = nano_engine(kv)
    rows = compare(bundle, nano_checkpoint)
    config = Manifest.read(bundle, "engine").model
    assert all(row.passed for row in rows)
    assert validation.first_deviation(rows) is None
    vision = {validation.VISION_EMBEDS, *(validation.vision_deepstack(i) for i in range(config.num_deepstack))}
    layers = {validation.prefill_hidden_states(i) for i in range(config.text.num_hidden_layers)}
    steps = {validation.decode_logits(i) for i in range(NEW_TOKENS)}
    assert {row.output for row in rows} == vision | layers | steps | {validation.PREFILL_LOGITS}


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("vision.deepstack.1", lambda x: x + 0.01 * np.abs(x).max()),
        ("decode.logits.2", lambda x: np.roll(x, 1)),
        ("prefill.logits", lambda x: np.where(np.arange(x.size) == 7, np.nan, x)),
    ],
)
def test_a_wrong_output_fails_alone(name, change, nano_engine_bundle, nano_checkpoint):
    rows = compare(nano_engine_bundle, nano_checkpoint, lambda outputs: {**outputs, name: change(outputs[name])})
    assert [row.output for row in rows if not row.passed] == [name]
    assert validation.first_deviation(rows).output == name
    assert [row.passed for row in validation.summarise(rows)].count(False) == 1


def test_a_large_value_hides_no_error():
    expected = np.random.default_rng(0).standard_normal((100, 64)).astype(np.float32)
    expected[0, 0] = 1000  # as trained models have at their first token
    for error, passed in ((1e-4, True), (0.02, False)):
        found = expected.copy()
        found[50, 7] += error
        outputs = ({validation.VISION_EMBEDS: values} for values in (expected, found))
        assert [row.passed for row in validation._compare("x", *outputs, *[TOLERANCE[KVFormat.F32]] * 2)] == [passed]


def test_bisection_names_the_layer_whose_weights_differ(nano_engine_bundle, nano_checkpoint, tmp_path):
    altered = shutil.copytree(nano_engine_bundle, tmp_path / "altered")
    graph = onnx.load(altered / "decoder.onnx", load_external_data=False).graph
    weight = next(t for t in graph.initializer if t.name == "language_model.layers.2.post_attention_layernorm.weight")
    place = {entry.key: entry.value for entry in weight.external_data}
    data = np.memmap(altered / "decoder.onnx.data", np.float32, "r+", int(place["offset"]), tuple(weight.dims))
    data *= 1.05
    data.flush()
    Manifest.read(altered, "engine").write(altered)
    rows = compare(altered, nano_checkpoint)
    assert validation.first_deviation(rows).output == validation.prefill_hidden_states(2)


def test_missing_outputs_are_named(nano_engine_bundle, nano_checkpoint):
    def without_vision(outputs):
        return {name: value for name, value in outputs.items() if name != validation.VISION_EMBEDS}

    with pytest.raises(UserError, match=r"returned no vision\.embeds for prompt 'picture'"):
        compare(nano_engine_bundle, nano_checkpoint, without_vision)

"""The torch backend on the CPU: the exported modules with the emulated kernels and the external cache."""

import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from pascalvl.engines import build, open_engine, validation
from pascalvl.engines.engine import Placement
from pascalvl.engines.torch import backend as torch_backend
from pascalvl.plugins import bindings
from pascalvl.plugins.bundle import CHECKPOINT_CONFIG, Manifest
from pascalvl.plugins.errors import UserError
from pascalvl.plugins.kernels import torch_calls
from pascalvl.plugins.kernels.library import KernelLibrary
from pascalvl.runtime import SamplingParams, VisionLanguageModel
from pascalvl.runtime.cli import main
from pascalvl.runtime.validation import trace, validate
from tests.engines.batches import CAPACITY, POOL, alone, changed, decodes, fresh_pool, places
from tests.engines.decoder import CACHES, Conversation, decoder_feeds, floats_of, random_tokens
from tests.engines.torch_reference import answer, assistant, kept_tokens, reference_answer, scene, user

PICTURE = [user(scene(1, 64, 64), "Describe the picture.")]
TURNS = [*PICTURE, assistant("A grid."), user("Which shapes are red?")]
NEW_TOKENS = 5
CONTEXT = 96


@pytest.fixture(autouse=True)
def no_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture(scope="module")
def bundle(nano_engine):
    return nano_engine("f32", "torch")


def fresh(bundle, **options):
    return VisionLanguageModel.open(bundle, context_length=CONTEXT, **options)


@pytest.fixture
def launches(monkeypatch):
    """Counts the emulator's launches by kernel."""
    counts = {"attention": 0, "kv_append": 0}
    for name in counts:
        launch = getattr(KernelLibrary, name)

        def counting(self, *arguments, name=name, launch=launch):
            counts[name] += 1
            launch(self, *arguments)

        monkeypatch.setattr(KernelLibrary, name, counting)
    return counts


@pytest.mark.parametrize("kv", CACHES)
def test_tokens_equal_the_reference_and_come_from_the_kernels(kv, nano_engine, nano_reference, launches):
    model = fresh(nano_engine(kv, "torch"))
    generation = answer(model, PICTURE, NEW_TOKENS)
    assert generation.token_ids == reference_answer(nano_reference, model.prompt(PICTURE), NEW_TOKENS)[0]
    assert len(generation.token_ids) == NEW_TOKENS  # one of them from the prefill
    layers, depth = model.config.text.num_hidden_layers, model.config.vision.depth
    assert launches == {"attention": depth + NEW_TOKENS * layers, "kv_append": NEW_TOKENS}


@pytest.mark.parametrize("kv", CACHES)
def test_validation_against_the_reference(kv, nano_engine, nano_checkpoint):
    model = fresh(nano_engine(kv, "torch"), marked_layers=True)
    rows = validate(model, nano_checkpoint, {"picture": PICTURE}, new_tokens=2)
    assert [row.output for row in rows if not row.passed] == []
    outputs = {row.output for row in rows}
    assert {validation.VISION_EMBEDS, validation.PREFILL_LOGITS, validation.decode_logits(1)} < outputs
    assert {validation.prefill_hidden_states(i) for i in range(model.config.text.num_hidden_layers)} < outputs


def test_chunked_prefill_equals_one_shot(bundle):
    one_shot, chunked = fresh(bundle), fresh(bundle, prefill_chunk=5)
    tokens = answer(one_shot, PICTURE, NEW_TOKENS).token_ids
    assert answer(chunked, PICTURE, NEW_TOKENS).token_ids == tokens
    expected, found = (trace(model, PICTURE, tokens[:2]) for model in (one_shot, chunked))
    for name in expected:
        # Attention summed in another order.
        np.testing.assert_allclose(found[name], expected[name], rtol=0, atol=1e-4 * np.abs(expected[name]).max())


def test_a_shared_prefix_is_not_run_again(bundle, nano_reference):
    model = fresh(bundle)
    answer(model, PICTURE, 2)
    generation = answer(model, TURNS, NEW_TOKENS)
    assert generation.reused_tokens >= len(model.prompt(PICTURE).token_ids) - 1
    assert generation.token_ids == reference_answer(nano_reference, model.prompt(TURNS), NEW_TOKENS)[0]


def test_repetition_penalty(bundle, nano_reference):
    """It needs the logits on the host."""
    model = fresh(bundle)
    found = answer(model, PICTURE, NEW_TOKENS, SamplingParams(repetition_penalty=10.0)).token_ids
    prompt = model.prompt(PICTURE)
    assert found == reference_answer(nano_reference, prompt, NEW_TOKENS, repetition_penalty=10.0)[0]
    assert found != reference_answer(nano_reference, prompt, NEW_TOKENS)[0]


@pytest.mark.parametrize("seq", [1, 3])
@pytest.mark.parametrize("kv", CACHES)
def test_outputs_equal_the_exported_graphs(kv, seq, nano_engine):
    """The emulated kernels and the op's ONNX body, over the very same bytes. An element half way between two codes, or
    two halves, may get either, where it was summed in another order, and then others after it: hence the RMS. A code of
    four bits is an eighth of the largest."""
    found, expected = (open_engine(nano_engine(kv, backend)) for backend in ("torch", "onnxruntime"))
    feeds = decoder_feeds(found.manifest, seq=seq, capacity=10, past=4)
    outputs = found.run(bindings.DECODER, feeds)
    assert outputs.keys() == {
        binding.name for binding in bindings.decoder_outputs(found.manifest.model, found.manifest.kv_cache)
    }
    tolerance = 1e-3 if kv == "f16" else 6e-2
    other = expected.run(bindings.DECODER, feeds)
    outputs, other = (floats_of(found.manifest.model, found.manifest.kv_cache, x) for x in (outputs, other))
    for name, value in other.items():
        if kv != "f32":
            assert np.sqrt(np.square(outputs[name] - value).mean()) < tolerance * np.sqrt(np.square(value).mean()), name
        else:
            np.testing.assert_allclose(outputs[name], value, rtol=0, atol=2e-5 * np.abs(value).max(), err_msg=name)


def test_a_decode_step_is_the_same_greedy_or_not(bundle):
    engine = open_engine(bundle)
    session, other = (Conversation(engine.open_session(8)) for _ in range(2))
    for seed in range(3):
        (logits,) = session.step(1, seed)[bindings.LOGITS]
        assert other.choose(1, seed) == (logits.argmax(), logits.max())
    assert session.session.nbytes == engine.manifest.kv_cache.nbytes(engine.manifest.model.text, 8)


def test_padded_steps_of_several_sequences(bundle, monkeypatch):
    """As CUDA graphs run them: three decode steps in that of four, to the bit, then a chunk in one of eight tokens."""
    session = open_engine(bundle).open_session(CAPACITY, POOL)
    placement = Placement(np.array([16, 13], np.int32), 126, np.arange(126, 130, dtype=np.int32))
    chunk = random_tokens(session.model.text, placement, np.random.default_rng(99))
    sequences = [*decodes(session)[:3], chunk]
    pool = fresh_pool(session)
    expected = alone(session, sequences)[bindings.LOGITS]
    monkeypatch.setattr(session.decode_step, "graph", "there is one")  # of other steps, which are not recorded here
    for numbers, atol in (((2, 0, 1), 0), ((3, 1), 1e-5)):
        fresh_pool(session)
        given = [sequences[number] for number in numbers]
        found = session.step(given)[bindings.LOGITS]
        of_these = expected[list(numbers)]
        np.testing.assert_allclose(found, of_these, rtol=0, atol=atol * np.abs(of_these).max())
        assert changed(session, pool) == places(given)
    assert [*session._steps] == [(1, 1, 0), (4, 4, 0), (8, 2, 0)]
    assert session._steps[8, 2, 0].chosen == [(row.argmax(), row.max()) for row in found]


@pytest.mark.parametrize("appends", [0, 1, 3])
def test_an_interrupt_leaves_the_cache_as_it_was(bundle, nano_reference, monkeypatch, appends):
    model = fresh(bundle, prefill_chunk=16)
    expected = reference_answer(nano_reference, model.prompt(PICTURE), NEW_TOKENS)[0]
    append, left = torch_calls.kv_append, appends

    def interrupted(*arguments):
        nonlocal left
        if not left:
            raise KeyboardInterrupt
        left -= 1
        append(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(torch_calls, "kv_append", interrupted)
        with pytest.raises(KeyboardInterrupt):
            answer(model, PICTURE, NEW_TOKENS)
    prompt_tokens = len(model.prompt(PICTURE).token_ids)
    assert 16 < prompt_tokens <= 32
    assert kept_tokens(model) == [0, 16, prompt_tokens, prompt_tokens + 1][appends]
    assert answer(model, PICTURE, NEW_TOKENS).token_ids == expected


def test_weights_are_mapped(bundle):
    engine = open_engine(bundle)
    mapped = Path("/proc/self/maps").read_text()
    assert engine.device.type == "cpu"
    assert all(str(bundle / f"{graph}.onnx.data") in mapped for graph in (bindings.VISION, bindings.DECODER))


# What is refused ------------------------------------------------------------------------------------------------------


def test_auto_never_takes_the_reference(nano_model_bundle, tmp_path, monkeypatch):
    assert build(nano_model_bundle, tmp_path / "engine").backend["name"] == "onnxruntime"
    monkeypatch.setitem(sys.modules, "pascalvl.engines.onnxruntime.backend", None)
    with pytest.raises(UserError, match=r"no backend can be used: .*onnxruntime .*; install"):
        build(nano_model_bundle, tmp_path / "engine")


def test_altered_weights(bundle, tmp_path):
    other = shutil.copytree(bundle, tmp_path / "altered")
    with (other / "decoder.onnx.data").open("r+b") as file:
        file.write(b"\x01")
    with pytest.raises(UserError, match=r"decoder\.onnx\.data was altered: expected SHA-256"):
        open_engine(other)


def test_config_of_another_model(bundle, tmp_path):
    other = shutil.copytree(bundle, tmp_path / "mixed")
    config = json.loads((other / CHECKPOINT_CONFIG).read_text())
    config["text_config"]["num_key_value_heads"] *= 2
    (other / CHECKPOINT_CONFIG).write_text(json.dumps(config))
    Manifest.read(other, "engine").write(other)
    match = "is for another model: expected num_key_value_heads 2, found 4; write the bundle again with"
    with pytest.raises(UserError, match=match):
        open_engine(other)


def test_bundle_without_a_weight(bundle, tmp_path):
    other = shutil.copytree(bundle, tmp_path / "lacking")
    weights = json.loads((other / "weights.json").read_text())
    del weights["vision"]["model.visual.merger.norm.weight"]
    (other / "weights.json").write_text(json.dumps(weights))
    Manifest.read(other, "engine").write(other)
    with pytest.raises(
        UserError, match=r"lacks the weight model\.visual\.merger\.norm\.weight: write the bundle again with"
    ):
        open_engine(other)


@pytest.mark.parametrize("place", [{"offset": -1}, {"offset": 10**30}, {"dtype": "x"}, {"shape": [3]}, {"shape": None}])
def test_weights_elsewhere(bundle, tmp_path, place):
    other = shutil.copytree(bundle, tmp_path / "elsewhere")
    weights = json.loads((other / "weights.json").read_text())
    weights["vision"]["model.visual.merger.norm.weight"] |= place
    (other / "weights.json").write_text(json.dumps(weights))
    Manifest.read(other, "engine").write(other)
    with pytest.raises(
        UserError, match=r"weights\.json cannot be used \(.*write the bundle again with 'pascalvl build'"
    ):
        open_engine(other)


def test_memory_that_runs_out(bundle):
    engine = open_engine(bundle)
    with pytest.raises(UserError, match=r"a context of \d+ tokens needs [\d.]+ GB for its KV cache"):
        engine.open_session(1 << 40)
    with pytest.raises(MemoryError, match="the decoder engine"), torch_backend.evaluation("the decoder engine"):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")


def test_command_line(bundle, nano_engine_bundle, capsys):
    options = ["--backend", "torch", "--prompt", "Hello!", "--max-new-tokens", "2", "--context", str(CONTEXT)]
    assert main(["run", str(bundle), *options]) == 0
    assert "2 new in" in capsys.readouterr().err
    assert main(["run", str(nano_engine_bundle), *options]) == 2
    assert "was built for backend 'onnxruntime', not 'torch': build it with --backend torch" in capsys.readouterr().err
    assert main(["inspect", str(bundle)]) == 0
    out = capsys.readouterr().out
    assert f"torch, version {torch.__version__}" in out
    assert re.search(r"\n *position embeddings +float16 \[256, 128\]", out)

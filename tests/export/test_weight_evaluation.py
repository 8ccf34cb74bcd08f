"""Figures of quantised weights: of the exported modules, against Hugging Face's own logits."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from pascalvl.export import weight_evaluation
from pascalvl.export.checkpoint import Checkpoint, model_inputs
from pascalvl.export.evaluation import EvaluationPrompt, compare
from pascalvl.export.kv_evaluation import q4_0
from pascalvl.plugins.bundle import Manifest
from pascalvl.plugins.errors import UserError
from pascalvl.plugins.prompt import Prompt
from pascalvl.plugins.weight_format import WeightConfig
from pascalvl.runtime.cli import main
from tests.conftest import ALL_WEIGHT_FORMATS

WORDS = np.random.default_rng(1).integers(0, 1900, 40)
PROMPT = EvaluationPrompt(Prompt(WORDS), np.array([90, 91, 2002]), True, "words")


def test_figures_by_hand():
    rng = np.random.default_rng(0)
    exact, found = (torch.from_numpy(rng.standard_normal((43, 50)) * 3) for _ in range(2))
    prompt = EvaluationPrompt(Prompt(rng.integers(0, 50, 40)), rng.integers(0, 50, 3), True)
    positions = np.array([0, 5, 41])
    figures = compare(prompt, positions, exact.__getitem__, found.__getitem__)
    for i, at in enumerate(positions):
        p, q = (np.exp(x[at].numpy()) / np.exp(x[at].numpy()).sum() for x in (exact, found))
        target = prompt.tokens[at + 1]
        assert figures.kl[i] == pytest.approx((p * np.log(p / q)).sum())
        assert figures.loss[i] == pytest.approx(-np.log(q[target]))
        assert figures.same[i] == (p.argmax() == q.argmax())
        assert figures.hit[i] == (q.argmax() == target)


@pytest.fixture(scope="module")
def model_of(nano_checkpoint):
    def make(text: str):
        with Checkpoint(nano_checkpoint) as checkpoint:
            weights = WeightConfig.parse(text)
            return weight_evaluation.quantised_model(checkpoint, checkpoint.model_config(), weights, None)

    return make


def test_unquantised_modules_are_the_model(model_of, nano_reference):
    model, _ = model_of("f32")
    found = weight_evaluation._run(model, PROMPT)
    with torch.no_grad():
        expected = nano_reference.model(**model_inputs(nano_reference, PROMPT.whole)).last_hidden_state[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * expected.abs().max().item())


def test_bytes_are_those_of_a_bundle(model_of, nano_quantised_bundle):
    """Of its weights' data, but for what rounds their places up to pages."""
    _, nbytes = model_of(ALL_WEIGHT_FORMATS)
    manifest = Manifest.read(nano_quantised_bundle, "model")
    stored = sum(manifest.files[f"{graph}.onnx.data"]["bytes"] for graph in manifest.graphs)
    assert nbytes <= stored <= nbytes + 4096 * 500


def test_evaluation(nano_checkpoint):
    prompts = [PROMPT, dataclasses.replace(PROMPT, is_right=False, name="other")]
    formats = [WeightConfig.parse(text) for text in ("w8", "w4")]
    passed = []
    evaluation = weight_evaluation.evaluate(nano_checkpoint, prompts, formats, None, True, lambda: passed.append(None))
    results = list(evaluation)
    names = ["float32", "w8", "w4", "llama.cpp q8_0", "llama.cpp q4_0"]
    assert [result.name for result in results] == names
    assert len(passed) == len(prompts) * weight_evaluation.count_schemes(formats, False, True)
    float32, w8, w4, q8, q4 = results
    assert (float32.kl, float32.top_1, float32.positions) == (0, 1, 2 * 42)
    assert 0 < w8.kl < 0.1 * w4.kl
    assert 0 < q8.kl < 0.1 * q4.kl
    assert w4.nbytes < w8.nbytes < float32.nbytes / 3
    assert w4.wrong == ("words",)


def test_llama_cpps_weights(nano_checkpoint, nano_reference):
    model, nbytes = weight_evaluation._llama_cpp(nano_checkpoint, 4)
    own = nano_reference.model.language_model.layers[3].mlp.down_proj.weight.detach().numpy()
    np.testing.assert_array_equal(model.model.language_model.layers[3].mlp.down_proj.weight.detach(), q4_0(own))
    decoder = sum(p.numel() for n, p in nano_reference.named_parameters() if "layers" in n and "proj" in n)
    vision = sum(p.numel() for p in nano_reference.model.visual.parameters())
    assert nbytes == decoder * 18 // 32 + 2048 * 256 * 34 // 32 + 2 * vision


def test_nothing_to_evaluate(nano_checkpoint):
    with pytest.raises(UserError, match="nothing to evaluate"):
        next(weight_evaluation.evaluate(nano_checkpoint, [], []))


def test_command_line(nano_checkpoint, tmp_path, capsys):
    data = tmp_path / "data"
    data.mkdir()
    (data / "prompts.jsonl").write_text(json.dumps({"prompt": "Hello!", "answer": "Hello."}) + "\n", encoding="utf-8")
    arguments = ["eval", "weights", str(nano_checkpoint), "--data", str(data), "--no-baselines"]
    assert main([*arguments, "--weights", "w8", "--json", str(tmp_path / "out.json")]) == 0
    assert "w8" in capsys.readouterr().out
    rows = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))["results"]
    assert [row["name"] for row in rows] == ["float32", "w8"]
    assert main([*arguments, "--kv", "k8v4"]) == 2
    assert "--kv is not for 'eval weights': leave it out" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert main(["bench", "linear"]) == 2
        assert "PyTorch finds none here" in capsys.readouterr().err

"""The simulated caches, against attention computed token by token, and llama.cpp's formats against blocks by hand."""

import dataclasses
import json
import re
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from matplotlib.text import Text

from pascalvl.export import kv_evaluation
from pascalvl.export.checkpoint import Checkpoint
from pascalvl.export.kv_evaluation import EvaluationPrompt, Seen
from pascalvl.export.kv_times import measure
from pascalvl.export.transforms import plan_transforms
from pascalvl.plugins.errors import UserError
from pascalvl.plugins.kv_format import CacheConfig
from pascalvl.plugins.kv_rows import compress, expand, hadamard
from pascalvl.plugins.prompt import Prompt
from pascalvl.runtime.cli import main
from tests.nano import questions

HEADS, KV_HEADS, TOKENS, DIM = 8, 2, 9, 128
PROMPT = EvaluationPrompt(Prompt(np.arange(40, 70)), np.array([90, 91, 2002]), True)


def states(seed):
    rng = np.random.default_rng(seed)
    spread = np.exp(rng.standard_normal(DIM))  # as k_norm leaves keys
    q, k, v = (rng.standard_normal((heads, TOKENS, DIM)) for heads in (HEADS, KV_HEADS, KV_HEADS))
    return (q / spread / 10).astype(np.float32), (k * spread).astype(np.float32), v.astype(np.float32)


def decoded(q, k, v, layout, transform):
    """What a decoder with the cache gives, token by token in float64."""
    key_row, value_row = layout.kv_format.rows
    q, k = q * transform.balance, k / transform.balance
    group = HEADS // KV_HEADS
    out = np.zeros((TOKENS, HEADS, DIM))
    for h in range(HEADS):
        kv = h // group
        up, values = transform.value_up[kv], v[kv] @ transform.value_down[kv].T
        keys = k[kv]
        for i in range(TOKENS):
            scores, rows = [], []
            for j in range(i + 1):
                met = q[h, i]
                if key_row.is_quantised:
                    met = hadamard(met.astype(np.float32))
                    step = np.abs(met).max() / 127
                    met = np.rint(met / step) * step
                key = expand(*compress(keys[j].astype(np.float32), key_row, key_row.is_quantised), key_row, DIM)
                value = compress(values[j].astype(np.float32), value_row)
                scores.append(met @ key)
                rows.append(up @ expand(*value, value_row, layout.value_dim))
            weights = np.exp(np.array(scores) - max(scores))
            out[i, h] = weights / weights.sum() @ np.array(rows)
    return out


@pytest.mark.parametrize("kv", ["f32", "f16", "k8v8", "k8v4", "k4v4", "k4v4,rv=96"])
def test_the_simulation_equals_decoding_token_by_token(kv, nano_checkpoint):
    cache = CacheConfig.parse(kv)
    with Checkpoint(nano_checkpoint) as checkpoint:
        text = checkpoint.model_config().text
        transforms = plan_transforms(checkpoint, text, cache)
    scheme = kv_evaluation._scheme(kv, cache, text, transforms)
    layout = cache.layers(dataclasses.replace(text, value_dims=(transforms[1].value_dim,) * 6))[1]
    q, k, v = states(3)
    module = torch.nn.Module()
    module.layer_idx, module.kv_evaluation = 1, scheme.compression
    arguments = (torch.from_numpy(x)[None] for x in (q, k, v))
    found, _ = kv_evaluation._attention(module, *arguments, None, 1.0)
    # Scores are sums of 128 terms of up to some tens, in float32 on one side.
    np.testing.assert_allclose(found[0], decoded(q, k, v, layout, transforms[1]), atol=1e-4)


def test_tiles_of_queries_change_nothing(monkeypatch):
    module = torch.nn.Module()
    module.layer_idx, module.kv_evaluation = 0, None
    arguments = [torch.from_numpy(x)[None] for x in states(5)]
    whole, _ = kv_evaluation._attention(module, *arguments, None, 1.0)
    monkeypatch.setattr(kv_evaluation, "_QUERY_TILE", 2)
    tiled, _ = kv_evaluation._attention(module, *arguments, None, 1.0)
    np.testing.assert_allclose(tiled, whole, atol=1e-6)


def test_llama_cpps_formats():
    """Two blocks by hand: scales in float16, 8 bits away from zero at halves, 4 bits from the signed largest."""
    x = np.zeros((1, 64), np.float32)
    x[0, :4] = [127, -0.5, 0.5, 2.5]
    x[0, 32:36] = [-8, 1, 0.49, 7.6]
    eight = kv_evaluation.q8_0(x)
    np.testing.assert_array_equal(eight[0, :4], [127, -1, 1, 3])
    four = kv_evaluation.q4_0(x)
    np.testing.assert_array_equal(four[0, 32:36], [-8, 1, 0, 7])
    scale = np.float32(np.float16(127 / -8))
    np.testing.assert_array_equal(four[0, :4], [-8 * scale, 0, 0, 0])
    np.testing.assert_array_equal(kv_evaluation.q4_0(np.zeros((1, 32))), np.zeros((1, 32)))


def test_rotation_is_undone():
    q, k, v = (torch.from_numpy(x) for x in states(7))
    seen = kv_evaluation._llama_cpp(lambda x: x, rotated=True)(0, Seen(q, k, v))
    np.testing.assert_allclose(seen.v, v, atol=1e-5)
    np.testing.assert_allclose(seen.q[0] @ seen.k[0].T, q[0] @ k[0].T, atol=1e-3)


@pytest.fixture(scope="module")
def results(nano_checkpoint):
    formats = [CacheConfig.parse(kv) for kv in ("k8v8", "k8v4", "k4v4")]
    return {row.name: row for row in kv_evaluation.evaluate(nano_checkpoint, [PROMPT], formats)}


def test_figures_of_the_model_itself(results, nano_reference):
    assert results["exact"].kl == results["exact"].answer_kl == 0
    assert results["exact"].top_1 == results["exact"].answer_top_1 == 1
    assert (results["exact"].positions, results["exact"].answer_positions) == (32, 3)
    tokens = torch.from_numpy(np.concatenate([PROMPT.prompt.token_ids, PROMPT.answer]))[None]
    with torch.no_grad():
        loss = nano_reference(input_ids=tokens, labels=tokens).loss
    np.testing.assert_allclose(results["exact"].perplexity, float(loss.exp()), rtol=1e-4)


def test_order_of_formats(results):
    """Fewer bits diverge more; balance and rotation save 8 bits of outlier-heavy keys, and 4 bits more so."""
    assert results["k8v8"].kl < results["k8v4"].kl < results["k4v4"].kl
    for bits in (8, 4):
        both, plain = (results[f"int{bits} {means}"].kl for means in ("balance + Hadamard", "plain"))
        assert both < 0.1 * plain
    assert results["k4v4"].kl < results["llama.cpp q4_0, rotated"].kl / 3
    sizes = {name: row.bytes_per_token for name, row in results.items()}
    assert (sizes["k8v8"], sizes["k8v4"], sizes["k4v4"]) == (260, 196, 132)
    assert (sizes["llama.cpp q8_0"], sizes["llama.cpp q4_0"]) == (272, 144)


def test_right_and_wrong_answers(nano_checkpoint, nano_reference):
    """Against the model's own greedy continuation, and that with its last token changed."""
    tokens = torch.from_numpy(PROMPT.prompt.token_ids)[None]
    with torch.no_grad():
        own = [int(nano_reference(input_ids=tokens).logits[0, -1].argmax())]
        longer = torch.cat([tokens, torch.tensor([own])], 1)
        own.append(int(nano_reference(input_ids=longer).logits[0, -1].argmax()))
    prompts = [
        dataclasses.replace(PROMPT, answer=np.array(answer), name=name)
        for name, answer in (("own", own), ("other", [own[0], own[1] ^ 1]))
    ]
    (exact,) = kv_evaluation.evaluate(nano_checkpoint, prompts, [], baselines=False)
    assert exact.right == 0.5
    assert exact.wrong == ("other",)
    assert exact.model_bytes_per_token == 6 * KV_HEADS * 8 * DIM


def test_a_window_is_not_simulated(nano_checkpoint):
    cache = CacheConfig.parse("k8v4,window=64+512")
    with pytest.raises(UserError, match="cannot be evaluated"):
        next(kv_evaluation.evaluate(nano_checkpoint, [PROMPT], [cache]))


def test_nothing_to_evaluate(nano_checkpoint):
    with pytest.raises(UserError, match="nothing to evaluate"):
        next(kv_evaluation.evaluate(nano_checkpoint, [], []))


def test_command_line(nano_checkpoint, tmp_path, capsys):
    """With the nano's own questions, and one without an answer."""
    data = tmp_path / "data"
    questions.write(data, calibration=True, share=0.02)
    (data / "own.txt").write_text("Hello!", encoding="utf-8")
    figures = tmp_path / "figures.json"
    command = ["eval", "kv", str(nano_checkpoint), "--data", str(data), "--kv", "k8v4", "--no-baselines"]
    assert main([*command, "--json", str(figures)]) == 0
    out, err = capsys.readouterr()
    assert "k8v4" in out
    assert re.fullmatch(r"reading prompts\nevaluating\n1 of 2: exact, KL 0.*\n2 of 2: k8v4, KL .*\n", err), err
    found = json.loads(figures.read_text())
    exact, k8v4 = found["results"]
    assert found["complete"]
    assert (exact["name"], k8v4["name"]) == ("exact", "k8v4")
    assert exact["right"] == 1
    assert 0 < k8v4["kl"] < 0.1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "figures.json"]


def test_what_was_measured_before_an_interrupt_is_written(nano_checkpoint, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    lines = [{"prompt": f"{i}: The old farmer watched the lamp. " * 10, "answer": "Which?"} for i in range(5)]
    (data / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    figures, drawing = tmp_path / "figures.json", tmp_path / "figures.png"
    command = ["eval", "kv", nano_checkpoint, "--data", data, "--json", figures, "--plot", drawing]
    script = [sys.executable, "-c", "import sys; from pascalvl.runtime.cli import main; sys.exit(main())"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen([*script, *map(str, command)], text=True, **pipes)
    while not (line := process.stderr.readline()).startswith("2 of 18"):
        assert line, process.communicate()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.endswith("pascalvl: interrupted; nothing was left half-written\n")
    found = json.loads(figures.read_text())
    names = [row["name"] for row in found["results"]]
    assert not found["complete"]
    assert names[:2] == ["exact", "f16"]
    assert f"INCOMPLETE, {len(names)} of 18 formats: " in out
    assert all(f"│ {name} " in out for name in names)
    assert drawing.read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "figures.json", "figures.png"]


def test_a_drawing_can_be_read():
    """Every format has its name, none of which covers another, a point or the legend, and is cut off."""
    names = [
        f"int{bits} {means}" for bits in (8, 4) for means in ("plain", "Hadamard", "balance", "balance + Hadamard")
    ]
    names += ["llama.cpp q8_0", "llama.cpp q4_0", "k8v8", "k8v8,rv=112", "k4v4", "k4v4,rv=96"]
    rng = np.random.default_rng(0)
    nothing = {field.name: 0 for field in dataclasses.fields(kv_evaluation.Result)}
    exact = kv_evaluation.Result(**{**nothing, "name": "exact", "bytes_per_token": 1024, "positions": 12345})
    rows = [
        dataclasses.replace(exact, name=name, bytes_per_token=130 + 130 * ("8" in name) + i % 3, kl=kl)
        for i, (name, kl) in enumerate(zip(names, rng.uniform(1e-3, 2e-3, len(names)).tolist(), strict=True))
    ]
    figure = kv_evaluation.drawing([exact, *rows])
    (axes,) = figure.axes
    assert axes.get_title() == "KV caches: divergence by size, over 12,345 positions of text"
    assert {text.get_text() for text in axes.get_legend().get_texts()} == {"llama.cpp", "parts of PascalVL", "PascalVL"}
    assert any(line.get_visible() for line in axes.get_ygridlines())
    figure.draw_without_rendering()
    texts = {text.get_text(): Text.get_window_extent(text) for text in axes.texts}
    assert texts.keys() == set(names)
    points = [axes.transData.transform((row.bytes_per_token, row.kl)) for row in rows]
    for name, box in texts.items():
        others = [other for found, other in texts.items() if found != name]
        assert not box.count_overlaps([*others, axes.get_legend().get_window_extent()]), name
        assert not any(box.contains(*point) for point in points), name
        assert (box.min >= axes.bbox.min).all(), name
        assert (box.max <= axes.bbox.max).all(), name
    (only,) = kv_evaluation.drawing([exact, rows[-1]]).axes
    assert [text.get_text() for text in only.get_legend().get_texts()] == ["PascalVL"]
    assert kv_evaluation.drawing([exact]).axes[0].get_legend() is None


def test_command_line_errors(nano_checkpoint, tmp_path, capsys):
    assert main(["eval", "kv", str(nano_checkpoint), "--data", str(tmp_path)]) == 2
    assert "holds no prompts" in capsys.readouterr().err
    assert (
        main(["eval", "kv", str(nano_checkpoint), "--data", str(tmp_path), "--plot", str(tmp_path / "no/x.png")]) == 2
    )
    assert "the plot cannot be saved to" in capsys.readouterr().err
    assert main(["eval", "speed", str(nano_checkpoint), "--data", str(tmp_path)]) == 2
    assert "invalid choice: 'speed'" in capsys.readouterr().err


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_times_on_a_gpu(nano_checkpoint):
    """A smaller cache is read faster; storing a token takes a launch or three, not more."""
    with Checkpoint(nano_checkpoint) as checkpoint:
        text = checkpoint.model_config().text
    times = {kv: measure(CacheConfig.parse(kv).layers(text), 8, 1 << 18) for kv in ("f32", "f16", "k8v4,layer.0=f16")}
    assert times["f32"][1] > times["f16"][1] > times["k8v4,layer.0=f16"][1]
    assert all(0 < append < 100 for append, _ in times.values())

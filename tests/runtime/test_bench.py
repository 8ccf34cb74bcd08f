"""`pascalvl bench model` on the nano checkpoint: what runs, and what comes out of it."""

import dataclasses
import json

import pytest
from rich.console import Console

from pascalvl.plugins.errors import UserError
from pascalvl.plugins.kv_format import CacheConfig
from pascalvl.runtime import SamplingParams, VisionLanguageModel, bench
from pascalvl.runtime.bench import BenchOptions, BenchResult, DepthFigures, PictureFigures
from pascalvl.runtime.cli import main

OPTIONS = BenchOptions(depths=(0, 40), prefill=24, decode=3, follow_ups=(2, 5), picture=64, repeats=2)
RUNS = 1 + OPTIONS.repeats
SAMPLING = SamplingParams(temperature=0.7, top_k=20, top_p=0.8)


def opened(bundle, context_length=128, **options):
    return VisionLanguageModel.open(bundle, context_length=context_length, **options)


@pytest.fixture
def answers(monkeypatch):
    """How each answer was sampled, tokens that were asked for, and what came."""
    made = []
    answer = VisionLanguageModel.answer

    def recording(self, prompt, sampling=None, max_new_tokens=None, stop=()):
        generation = answer(self, prompt, sampling, max_new_tokens, stop)
        made.append((sampling, max_new_tokens, generation))
        return generation

    monkeypatch.setattr(VisionLanguageModel, "answer", recording)
    return made


@pytest.mark.parametrize("sampling", [None, SAMPLING])
def test_what_runs(nano_engine_bundle, answers, sampling):
    """As many tokens as were asked for behind exactly the depth, though every token would end an answer."""
    model = opened(nano_engine_bundle)
    vocabulary = frozenset(range(model.config.text.vocab_size))
    config = dataclasses.replace(
        model.generation_config, eos_token_ids=vocabulary, **({"sampling": sampling} if sampling else {})
    )
    model.generation_config = config
    told = []
    result = bench.measure(model, OPTIONS, told.append)
    assert model.generation_config is config
    assert len(told) == bench.count_runs(OPTIONS, model)

    greedy, own = SamplingParams(), dataclasses.replace(SAMPLING, seed=0)
    expected = []
    for depth in OPTIONS.depths:
        expected += [(0, depth, 1, greedy)] * (depth > 0)
        expected += [(depth, 24, 1, greedy)] * RUNS + [(depth, 1, 4, greedy)] * RUNS
        expected += [(depth, 1, 4, own)] * RUNS if sampling else []
        expected += [(depth, count, 1, greedy) for count in OPTIONS.follow_ups for _ in range(RUNS)]
    found = [(a.reused_tokens, a.prompt_tokens - a.reused_tokens, new, used) for used, new, a in answers]
    assert found[:-RUNS] == expected
    assert all(len(answer.token_ids) == new for _, new, answer in answers)
    assert all(answer.vision_seconds > 0 and (new, used) == (1, greedy) for used, new, answer in answers[-RUNS:])
    assert all((row.sampled_tokens_per_second is not None) == bool(sampling) for row in result.depths)
    assert result.sampling == ("temperature 0.7, top_k 20, top_p 0.8" if sampling else None)


def test_figures(nano_engine_bundle, answers):
    model = opened(nano_engine_bundle)
    result = bench.measure(model, OPTIONS)
    assert [row.depth for row in result.depths] == [0, 40]
    times = iter([generation for _, _, generation in answers])
    for row in result.depths:
        if row.depth:
            next(times)
        prefills, decodes = ([next(times) for _ in range(RUNS)][1:] for _ in range(2))
        follow_ups = {count: [next(times) for _ in range(RUNS)][1:] for count in OPTIONS.follow_ups}
        # The median of two is between them.
        rates = sorted(24 / generation.prefill_seconds for generation in prefills)
        assert rates[0] <= row.prefill_tokens_per_second <= rates[1]
        rates = sorted(3 / generation.decode_seconds for generation in decodes)
        assert rates[0] <= row.decode_tokens_per_second <= rates[1]
        for count, generations in follow_ups.items():
            assert row.follow_up_ms[count] >= 1e3 * min(generation.prefill_seconds for generation in generations)
        assert row.of_floor is None
    picture = result.picture
    assert (picture.width, picture.height, picture.tokens) == (64, 64, 4)
    assert picture.preprocessing_ms > 0
    assert picture.vision_ms > 0
    assert picture.preprocessing_ms + picture.vision_ms < picture.first_token_ms
    assert (result.gpu, result.read_bytes_per_second, result.launches_per_token) == (None, None, None)
    assert result.weight_bytes == model.manifest.weight_bytes("decoder")
    assert result.cache_bytes_per_token == 6 * 2 * 1024  # layers, KV heads, bytes in f32


def test_what_there_is_no_room_for_is_left_out(nano_engine_bundle):
    model = opened(nano_engine_bundle, context_length=64)
    result = bench.measure(model, dataclasses.replace(OPTIONS, depths=(0, 40, 10**9), picture=256))
    assert [row.depth for row in result.depths] == [0]
    assert result.picture is None
    first, second, third = result.left_out
    assert first == "depth 40 is left out: it takes a context of 65 tokens, and this one holds 64."
    assert second.startswith("depth 1,000,000,000 is left out")
    assert third.startswith("the picture is left out: the prompt has ")
    assert bench.measure(model, dataclasses.replace(OPTIONS, depths=(39,), picture=0)).left_out == ()


def test_a_window_keeps_a_depth_from_being_measured(nano_engine_bundle):
    model = opened(nano_engine_bundle, cache=CacheConfig.parse("f32,window=4+64"))
    result = bench.measure(model, dataclasses.replace(OPTIONS, depths=(39, 40), picture=0))
    assert [row.depth for row in result.depths] == [39]
    assert result.left_out == ("depth 40 is left out: the KV cache's window keeps 64 of 65 tokens.",)


def test_nothing_to_measure(nano_engine_bundle):
    with pytest.raises(UserError, match="there is nothing to measure: depth 4,096 is left out: it takes a context of"):
        bench.measure(opened(nano_engine_bundle), BenchOptions(depths=(4096, 16384)))


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"depths": (0, -1)}, "depths is out of range: expected numbers from 0, found -1"),
        ({"depths": ()}, "depths are missing"),
        ({"prefill": 0}, "prefill is out of range: expected numbers from 1, found 0"),
        ({"follow_ups": (8, 0)}, "follow_ups is out of range"),
        ({"picture": 31}, "picture is out of range: expected 32 to 4096 pixels, or 0: none; found 31"),
    ],
)
def test_options_out_of_range(given, match):
    with pytest.raises(UserError, match=match):
        BenchOptions(**given)


def test_the_context_holds_what_is_measured(nano_engine_bundle):
    config = opened(nano_engine_bundle).config
    assert BenchOptions(depths=(0, 4096), picture=0).context(config) == 4096 + 513
    assert BenchOptions(depths=(0,), decode=600, picture=0).context(config) == 602
    assert BenchOptions(depths=(0,)).context(config) >= 32 * 32 + 100
    assert BenchOptions(depths=(10**6,)).context(config) == config.text.max_position_embeddings


RESULT = BenchResult(
    source="Some-2B",
    backend="torch",
    gpu="Some GPU",
    weights="w4",
    kv_cache="k8v4",
    options=BenchOptions(depths=(0,), follow_ups=(8,)),
    weight_bytes=1_234_000_000,
    cache_bytes_per_token=3136,
    read_bytes_per_second=2.5e12,
    launches_per_token=1602,
    sampling="temperature 0.7",
    depths=(DepthFigures(0, 9091.2, 259.04, 0.4567, 250.0, {8: 40.04}),),
    picture=PictureFigures(1024, 992, 992, 10.0, 87.25, 150.5),
    left_out=("depth 9 is left out: so it is.",),
)


def shown(result):
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(*bench.tables(result), sep="\n")
    return console.export_text()


def test_tables():
    text = shown(RESULT)
    for expected in ("Some-2B: torch on Some GPU, weights w4, KV cache k8v4; medians of 10", "prefill of 512, tok/s",
                     "│ 9,091 │", "│ 259.0 │", "46%", "250.0", "40.0", "1024x992, 992 tokens", "87.2", "150.5",
                     "launches a token: 1,602", "1.234 GB", "3,136 bytes", "2,500 GB/s", "sampled: temperature 0.7",
                     "depth 9 is left out: so it is."):  # fmt: skip
        assert " ".join(expected.split()) in " ".join(text.split()), expected


def test_what_is_not_known_is_a_dash():
    row = dataclasses.replace(RESULT.depths[0], of_floor=None, sampled_tokens_per_second=None)
    nothing = {"gpu": None, "read_bytes_per_second": None, "launches_per_token": None, "sampling": None}
    text = shown(dataclasses.replace(RESULT, **nothing, depths=(row,), picture=None, left_out=()))
    assert text.count("–") == 4  # noqa: RUF001
    assert "torch on the CPU" in text
    assert "picture" not in text


@pytest.mark.parametrize(("backend", "depths", "picture"), [("onnxruntime", [0, 8], 32), ("torch", [2], 0)])
def test_command(backend, depths, picture, nano_engine, tmp_path, capsys):
    given = {"depths": depths, "prefill": 3, "decode": 1, "follow_ups": [2], "picture": picture, "repeats": 1}
    options = []
    for name, value in given.items():
        value = ",".join(map(str, value)) if isinstance(value, list) else str(value)
        options += ["--" + name.replace("_", "-"), value]
    file = tmp_path / "figures.json"
    assert main(["bench", "model", str(nano_engine("k8v4", backend)), *options, "--json", str(file)]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    figures = json.loads(file.read_text())
    assert (figures["backend"], figures["kv_cache"], figures["gpu"]) == (backend, "k8v4", None)
    assert figures["launches_per_token"] is None
    assert figures["options"] == given
    assert [row["depth"] for row in figures["depths"]] == depths
    assert all(row["follow_up_ms"]["2"] > 0 for row in figures["depths"])
    assert (figures["picture"] is None) == (not picture)
    for heading in ("prefill of 3, tok/s", "decode of 1, tok/s", "follow-up of 2, ms"):
        assert heading in " ".join(out.split())

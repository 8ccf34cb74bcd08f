"""`pascalvl bench model` on the nano checkpoint: what runs, and what comes out of it."""

import dataclasses
import json
import re

import numpy as np
import pytest
from rich.console import Console

from pascalvl.engines.engine import HostSession
from pascalvl.plugins.errors import UserError
from pascalvl.plugins.kv_format import CacheConfig, pages_of
from pascalvl.plugins.prompt import Prompt
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
    assert all(row.together_tokens_per_second == {} for row in result.depths)


@pytest.fixture
def sessions(monkeypatch):
    """By sessions that were opened: of each of their steps and of each sequence in it, its pages, past and tokens."""
    opened = []
    opening, step = HostSession.__init__, HostSession.step

    def recording(self, *args):
        opening(self, *args)
        self.steps = []
        opened.append(self)

    def recording_steps(self, sequences):
        rows = [(tuple(new.placement.pages), new.placement.past_length, new.embeds.rows) for new in sequences]
        self.steps.append(rows)
        return step(self, sequences)

    monkeypatch.setattr(HostSession, "__init__", recording)
    monkeypatch.setattr(HostSession, "step", recording_steps)
    return opened


@pytest.mark.parametrize("kv", ["f32", "f32,window=4+200"])
def test_sequences_together(kv, nano_engine_bundle, sessions):
    """Each behind the depth, the same tokens before it, in pages of its own; then a token of each in every step."""
    model = opened(nano_engine_bundle, context_length=256, prefill_chunk=64, cache=CacheConfig.parse(kv))
    own = sessions[0]
    options = dataclasses.replace(OPTIONS, depths=(0, 150), batch=(1, 3, 2, 3), picture=0)
    told = []
    result = bench.measure(model, options, told.append)
    assert len(told) == bench.count_runs(options, model)
    assert [what for what in told if "sequences" in what] == [
        f"decode of {count} sequences behind {depth} tokens"
        for depth in options.depths
        for count in (3, 2)
        for _ in range(RUNS)
    ]
    assert [(row.depth, list(row.together_tokens_per_second)) for row in result.depths] == [(0, [3, 2]), (150, [3, 2])]
    assert all(rate > 0 for row in result.depths for rate in row.together_tokens_per_second.values())
    assert result.left_out == ()
    assert all(len(step) == 1 for step in own.steps)

    assert len(sessions) == 1 + 4
    cases = [(depth, count) for depth in options.depths for count in (3, 2)]
    for session, (depth, count) in zip(sessions[1:], cases, strict=True):
        decodes = [step for step in session.steps if len(step) > 1]
        prefills = [row for step in session.steps if len(step) == 1 for row in step]
        assert len(decodes) == RUNS * options.decode
        assert session.steps == [[row] for row in prefills] + decodes
        pages = [row[0] for row in decodes[0]]
        assert all([row[0] for row in step] == pages for step in decodes)
        assert session.pages == len({page for own_pages in pages for page in own_pages})
        assert all(len(own_pages) == pages_of(depth + options.decode) for own_pages in pages)
        for number, step in enumerate(decodes):
            past = depth + number % options.decode
            assert [(row[1], len(row[2])) for row in step] == [(past, 1)] * count
        of_sequences = [[row for row in prefills if row[0] == own_pages] for own_pages in pages]
        assert sum(map(len, of_sequences)) == len(prefills)
        for rows in of_sequences:
            assert [(past, len(tokens)) for _, past, tokens in rows] == (
                [(0, 64), (64, 64), (128, 22)] if depth else []
            )
            for (*_, tokens), (*_, first) in zip(rows, of_sequences[0], strict=True):
                np.testing.assert_array_equal(tokens, first)


def test_sequences_together_choose_as_one_alone(nano_engine_bundle, sessions):
    """The tokens that each goes on with are those that the model itself has after the same ones."""
    model = opened(nano_engine_bundle)
    options = dataclasses.replace(OPTIONS, depths=(40,), batch=(2,), picture=0, decode=4)
    bench.measure(model, options)
    decodes = [step for step in sessions[1].steps if len(step) > 1][-options.decode :]
    depth = np.random.default_rng(0).integers(model.config.text.vocab_size, size=40)
    for sequence in range(2):
        tokens = np.append(depth, sequence)
        generation = model.answer(Prompt(tokens), SamplingParams(), options.decode - 1)
        list(generation)
        assert [token for step in decodes for token in step[sequence][2]] == [sequence, *generation.token_ids]


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


def test_sequences_that_there_is_no_room_for_are_left_out(nano_engine_bundle, monkeypatch):
    """Also where memory ends in the middle of a run; what else there is comes out."""
    step = HostSession.step

    def limited(self, sequences):
        if len(sequences) == 3:
            raise MemoryError("the decoder engine")
        return step(self, sequences)

    monkeypatch.setattr(HostSession, "step", limited)
    options = dataclasses.replace(OPTIONS, depths=(40,), batch=(10**10, 3, 2), picture=0)
    result = bench.measure(opened(nano_engine_bundle), options)
    pool, run = result.left_out
    assert pool.startswith("10,000,000,000 sequences behind 40 tokens are left out: ")
    assert "GB for its KV cache, which is more than can be allocated" in pool
    assert run == "3 sequences behind 40 tokens are left out: there is not enough memory (the decoder engine)."
    assert [list(row.together_tokens_per_second) for row in result.depths] == [[2]]
    assert " ".join(["depth", "1", "2"]) in " ".join(shown(result).replace("┃", " ").split())


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
        ({"batch": (2, 0)}, "batch is out of range: expected numbers from 1, found 0"),
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
    depths=(DepthFigures(0, 9091.2, 259.04, 0.4567, 250.0, {8: 40.04}, {2: 400.25, 8: 1234.5}),),
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


def cells(line):
    return [cell.strip() for cell in re.split("[│┃]", line)[1:-1]]


def test_table_of_sequences_together():
    """A column for each number of them that was measured anywhere, beside the conversation alone."""
    first = RESULT.depths[0]
    second = dataclasses.replace(
        first, depth=4096, decode_tokens_per_second=200.0, together_tokens_per_second={2: 350.0}
    )
    text = shown(dataclasses.replace(RESULT, depths=(first, second), picture=None, left_out=()))
    assert "sequences that decode 64 tokens together, tok/s of all" in " ".join(text.split())
    lines = text[text.index("sequences that decode") :].splitlines()
    rows = [cells(line) for line in lines if line.startswith(("│", "┃"))]
    assert rows == [
        ["depth", "1", "2", "8"],
        ["0", "259.0", "400.2", "1,234"],
        ["4,096", "200.0", "350.0", "–"],  # noqa: RUF001
    ]
    alone = dataclasses.replace(first, together_tokens_per_second={})
    assert "together" not in shown(dataclasses.replace(RESULT, depths=(alone,)))


def test_what_is_not_known_is_a_dash():
    row = dataclasses.replace(RESULT.depths[0], of_floor=None, sampled_tokens_per_second=None)
    nothing = {"gpu": None, "read_bytes_per_second": None, "launches_per_token": None, "sampling": None}
    text = shown(dataclasses.replace(RESULT, **nothing, depths=(row,), picture=None, left_out=()))
    assert text.count("–") == 4  # noqa: RUF001
    assert "torch on the CPU" in text
    assert "picture" not in text


@pytest.mark.parametrize(
    ("backend", "depths", "batch", "picture"), [("onnxruntime", [0, 8], [1, 2], 32), ("torch", [2], [2], 0)]
)
def test_command(backend, depths, batch, picture, nano_engine, tmp_path, capsys):
    given = {"depths": depths, "prefill": 3, "decode": 1, "follow_ups": [2], "batch": batch, "picture": picture}
    given["repeats"] = 1
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
    assert all(list(row["together_tokens_per_second"]) == ["2"] for row in figures["depths"])
    assert all(row["together_tokens_per_second"]["2"] > 0 for row in figures["depths"])
    assert (figures["picture"] is None) == (not picture)
    for heading in (
        "prefill of 3, tok/s",
        "decode of 1, tok/s",
        "follow-up of 2, ms",
        "decode 1 tokens together, tok/s of all",
    ):
        assert heading in " ".join(out.split())

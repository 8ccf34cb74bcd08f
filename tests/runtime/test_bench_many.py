"""`bench many`: what runs, and that the figures are those of these runs."""

import dataclasses
import json

import pytest

from pascalvl.plugins.errors import UserError
from pascalvl.runtime import VisionLanguageModel
from pascalvl.runtime.bench_many import ManyOptions, measure
from pascalvl.runtime.cli import main

SMALL = ManyOptions(streams=3, depth=70, steps=4, arriving=150, picture=64)


def test_what_runs(nano_engine_bundle, monkeypatch):
    model = VisionLanguageModel.open(nano_engine_bundle, context_length=SMALL.context, sequences=4)
    calls, choose = [], model.scheduler.session.choose

    def counted(sequences, choices=None):
        calls.append([len(new) for new in sequences])
        return choose(sequences, choices)

    monkeypatch.setattr(model.scheduler.session, "choose", counted)
    result = measure(model, dataclasses.replace(SMALL, picture=0))
    decodes = [call for call in calls if call == [1, 1, 1]]
    assert len(decodes) >= 2 + SMALL.steps
    assert [70] in calls or [64] in calls
    assert sum(sum(call) for call in calls if call[0] > 1) >= 2 * (3 * 70 + 150) - 8
    assert [row.sampling for row in result.writing] == ["the likeliest"]
    for row in result.writing:
        assert min(row.tokens_per_second, row.host_us, row.scheduler_us, row.prompt_tokens_per_second, *row.gap_ms) > 0
    assert result.first_token_ms is None
    assert model.scheduler.is_idle


def test_the_command(nano_engine_bundle, tmp_path, capsys):
    figures = tmp_path / "figures.json"
    options = [f"--{name}={value}" for name, value in dataclasses.asdict(SMALL).items()]
    assert main(["bench", "many", str(nano_engine_bundle), *options, "--json", str(figures)]) == 0
    written = json.loads(figures.read_text(encoding="utf-8"))
    assert written["options"] == dataclasses.asdict(SMALL)
    assert len(written["first_token_ms"]) == 3
    assert "3 answers behind 70 tokens" in " ".join(capsys.readouterr().out.split())


def test_numbers_out_of_range():
    with pytest.raises(UserError, match="streams is out of range: expected 1 to 8, found 9"):
        ManyOptions(streams=9)

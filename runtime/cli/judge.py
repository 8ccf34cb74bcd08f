"""How far from the original: `validate` and `eval`."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pascalvl.plugins.errors import UserError
from pascalvl.plugins.terminal import progress_bars, shows_progress
from pascalvl.runtime.cli.argument_types import STANDARD_OUTPUT
from pascalvl.runtime.cli.common import FINDING, check_json, notice, open_model, write_json, write_whole
from pascalvl.runtime.cli.convert import CALIBRATION_PIXELS, calibration_prompts
from pascalvl.runtime.cli.tables import figures_table, print_tables
from pascalvl.runtime.cli.talk import load_visuals, user_message

if TYPE_CHECKING:
    from rich.table import Table

    from pascalvl.runtime.prompt_folder import PromptCase

_OWN_ANSWER_TOKENS = 64
"""Tokens of an answer that the model gives itself where an evaluation has none."""
_REFERENCE_WEIGHTS = {
    True: "which read the weights itself",
    False: "with weights that PascalVL read for it, of which a wrong reading does not show here",
}
"""What a validation's reference is, by whether transformers reads the checkpoint itself."""


def validate(args: argparse.Namespace) -> int:
    """Run `pascalvl validate`; returns the exit code."""
    import dataclasses

    from pascalvl.engines.validation import first_deviation, summarise
    from pascalvl.export.checkpoint import Checkpoint
    from pascalvl.runtime import validation

    check_json(args.json)
    requests = _validation_requests(args)
    with Checkpoint(args.reference) as checkpoint:
        digest, is_read_by_transformers = checkpoint.digest(), checkpoint.is_read_by_transformers
    model = open_model(args, marked_layers=args.bisect)
    if digest != (exported := model.manifest.source)["sha256"]:
        raise UserError(
            f"{args.bundle} was not made from {args.reference} but from another checkpoint, {exported['name']}: give "
            "that as --reference."
        )
    rows = validation.validate(model, args.reference, requests)
    failed = sum(not row.passed for row in rows)
    reference = f"Hugging Face's model in float32, {_REFERENCE_WEIGHTS[is_read_by_transformers]}"
    first = first_deviation(rows)
    if args.json:
        outputs = [{**dataclasses.asdict(row), "passed": row.passed} for row in rows]
        deviation = first and {"prompt": first.prompt, "output": first.output}
        found = {"passed": not failed, "reference": reference, "first_deviation": deviation, "outputs": outputs}
        write_json(args.json, found)
    if args.json != STANDARD_OUTPUT:
        headings = ("output", "prompt", "largest error", "tolerance", "scale", "")
        table = figures_table("worst of each output; scale: largest value of the reference", headings)
        for row in summarise(rows):
            figures = [f"{figure:.2e}" for figure in (row.max_error, row.tolerance, row.scale)]
            table.add_row(row.output, row.prompt, *figures, "ok" if row.passed else "DEVIATES")
        print_tables(table, f"{len(rows)} outputs compared, {failed} out of tolerance", f"reference: {reference}")
        if args.bisect and first:
            print_tables(f"the first to deviate is {first.output}, of prompt {first.prompt!r}")
    return FINDING if failed else 0


def _validation_requests(args: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Conversations by name: the user's, or some of every kind."""
    if args.prompt is not None or args.visuals or args.fps is not None:
        return {"given": [user_message(load_visuals(args), args.prompt or "Describe what you see.")]}
    import numpy as np
    from PIL import Image

    from pascalvl.runtime.video import Video

    def picture(width: int, height: int, turn: float = 0.0) -> Image.Image:
        """Rings of changing colour, whose details are of all sizes."""
        y, x = np.mgrid[:height, :width] / 24.0
        phase = np.hypot(x - 2, y - 3)[..., None] ** 1.5 + np.array([0, 2, 4]) + turn
        return Image.fromarray((127.5 + 127.5 * np.sin(phase)).astype(np.uint8))

    clip = Video([picture(128, 96, turn / 4) for turn in range(8)], 2.0)
    first = user_message([("image", picture(300, 200))], "What is in the picture?")
    return {
        "text": [user_message([], "Why is the sky blue?")],
        "picture": [first],
        "pictures": [user_message([("image", picture(90, 210)), ("image", picture(256, 128, 1))], "Compare them.")],
        "video": [user_message([("video", clip)], "What happens?")],
        "turns": [first, {"role": "assistant", "content": "Rings."}, user_message([], "Which colours have they?")],
    }


def evaluate(args: argparse.Namespace) -> int:
    """Run `pascalvl eval`; returns the exit code."""
    import dataclasses
    import tempfile

    from pascalvl.export.checkpoint import Checkpoint
    from pascalvl.runtime.cli.common import check_writable
    from pascalvl.runtime.prompt_folder import read_prompts

    check_json(args.json)
    if args.plot:
        import matplotlib  # noqa: F401 - missing: said before the work

        check_writable(args.plot, "the plot")
    for other in {"kv", "weights"} - {args.what}:
        if getattr(args, other) or (args.plot and other == "kv"):
            option = f"--{other}" if getattr(args, other) else "--plot"
            raise UserError(f"{option} is not for 'eval {args.what}': leave it out, or give 'eval {other}'.")
    cases = read_prompts(args.data)
    learned = read_prompts(args.calibrate) if args.calibrate else []
    results: list[Any] = []
    count = 0
    try:
        with progress_bars() as progress, tempfile.TemporaryDirectory() as folder:
            with Checkpoint(args.checkpoint) as checkpoint:
                checkpoint.copy_host_files(Path(folder))
                config = checkpoint.model_config()
            calibration = calibration_prompts(learned, Path(folder), config) if learned else None
            prompts = _evaluation_prompts(args.checkpoint, cases, Path(folder), config, progress)
            measure = _measure_caches if args.what == "kv" else _measure_weights
            count, measured = measure(args, config, prompts, calibration, progress)
            for result in measured:
                results.append(result)
                if not shows_progress():
                    notice(f"{len(results)} of {count}: {result.name}, KL {result.kl:.2e}")
    finally:
        if results:  # of an interrupted evaluation, too
            is_complete = len(results) == count
            if args.json:
                rows = [dataclasses.asdict(row) for row in results]
                write_json(args.json, {"complete": is_complete, "results": rows})
            if args.json != STANDARD_OUTPUT:
                table = _table_of_caches if args.what == "kv" else _table_of_weights
                incomplete = "" if is_complete else f"INCOMPLETE, {len(results)} of {count} formats: "
                positions = (
                    f"{results[0].positions} positions of text, {results[0].answer_positions} of them of answers"
                )
                print_tables(table(incomplete + positions, results))
            if args.plot:
                from pascalvl.export import kv_evaluation

                write_whole(args.plot, lambda path: kv_evaluation.plot(results, path))
    return 0


def _begin(progress: Any, what: str, steps: int) -> Callable[[], None]:
    """Show that something is begun; returns what tells of each of its steps."""
    if not shows_progress():
        notice(what)
    task = progress.add_task(what, total=steps)
    return lambda: progress.advance(task)


def _measure_caches(
    args: argparse.Namespace, config: Any, prompts: list[Any], calibration: list[Any] | None, progress: Any
) -> tuple[int, Iterator[Any]]:
    """How many formats of the KV cache there are, and their results as they come."""
    from pascalvl.export import kv_evaluation
    from pascalvl.export.calibration import calibrate
    from pascalvl.plugins.kv_format import CacheConfig

    formats = args.kv or [CacheConfig.parse(text) for text in kv_evaluation.DEFAULT_FORMATS]
    statistics = None
    if calibration:
        step = _begin(progress, "calibrating", config.text.num_hidden_layers)
        statistics = calibrate(args.checkpoint, calibration, step)
    baselines = not args.no_baselines
    count = kv_evaluation.count_schemes(formats, baselines)
    step = _begin(progress, "evaluating", len(prompts) * count)
    return count, kv_evaluation.evaluate(args.checkpoint, prompts, formats, statistics, baselines, step)


def _table_of_caches(title: str, results: Sequence[Any]) -> Table:
    from pascalvl.export.kv_times import LENGTH

    timed = any(row.decode_us is not None for row in results)
    times = ["append us", f"decode {LENGTH:,} us"] if timed else []
    table = figures_table(title, ("KV cache", "bytes", *_SUMMARY, *times))
    for row in results:
        times = ["" if us is None else f"{us:.1f}" for us in (row.append_us, row.decode_us)] if timed else []
        table.add_row(row.name, f"{row.bytes_per_token:g}", *_summary_cells(row), *times)
    return table


def _measure_weights(
    args: argparse.Namespace, config: Any, prompts: list[Any], calibration: list[Any] | None, progress: Any
) -> tuple[int, Iterator[Any]]:
    """How many formats of the weights there are, and their results as they come."""
    from pascalvl.export import weight_evaluation
    from pascalvl.plugins.weight_format import WeightConfig

    formats = args.weights or [WeightConfig.parse(text) for text in weight_evaluation.DEFAULT_FORMATS]
    baselines = not args.no_baselines
    count = weight_evaluation.count_schemes(formats, calibration is not None, baselines)
    step = _begin(progress, "evaluating", len(prompts) * count)
    return count, weight_evaluation.evaluate(args.checkpoint, prompts, formats, calibration, baselines, step)


def _table_of_weights(title: str, results: Sequence[Any]) -> Table:
    table = figures_table(title, ("weights", "MB", *_SUMMARY))
    for row in results:
        table.add_row(row.name, f"{row.nbytes / 1e6:.1f}", *_summary_cells(row))
    return table


_SUMMARY = "KL", "KL 99.9%", "top-1", "perplexity", "answers: KL", "answers: top-1", "answers: right"


def _summary_cells(row: Any) -> list[str]:
    """The cells of `_SUMMARY`, of a `pascalvl.export.evaluation.Summary`."""
    right = "" if row.right is None else f"{row.right:.2%}"
    figures = [f"{row.kl:.2e}", f"{row.kl_999:.2e}", f"{row.top_1:.2%}", f"{row.perplexity:.5g}"]
    return [*figures, f"{row.answer_kl:.2e}", f"{row.answer_top_1:.2%}", right]


def _evaluation_prompts(
    checkpoint: Path, cases: Sequence[PromptCase], directory: Path, config: Any, progress: Any
) -> list[Any]:
    """Conversations with the answers that the folder gives, or else the model's own."""
    import numpy as np

    from pascalvl.export import kv_evaluation
    from pascalvl.plugins.bundle import GENERATION_CONFIG
    from pascalvl.runtime.generation import GenerationConfig
    from pascalvl.runtime.prompt import PromptBuilder

    builder = PromptBuilder(directory, config, CALIBRATION_PIXELS)
    eos = GenerationConfig.from_file(directory / GENERATION_CONFIG).eos_token_ids
    model, prompts = None, []
    step = _begin(progress, "reading prompts", len(cases))
    for case, prompt in zip(cases, calibration_prompts(cases, directory, config), strict=True):
        if case.answer is None:
            model = model or kv_evaluation.load(checkpoint)
            answer = kv_evaluation.greedy_answer(model, prompt, eos, _OWN_ANSWER_TOKENS)
        else:
            whole = builder.build([*case.messages, {"role": "assistant", "content": case.answer}]).token_ids
            rest = whole[len(prompt.token_ids) :]
            ends = np.flatnonzero(np.isin(rest, list(eos)))
            if not np.array_equal(whole[: len(prompt.token_ids)], prompt.token_ids) or not len(ends):
                raise UserError(f"the chat template has no place for the answer to {case.name}: leave the answer out.")
            answer = rest[: ends[0] + 1]
        prompts.append(kv_evaluation.EvaluationPrompt(prompt, answer, case.answer is not None, case.name))
        step()
    return prompts

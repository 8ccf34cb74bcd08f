"""How fast: `bench`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pascalvl.plugins.errors import UserError
from pascalvl.runtime.cli.common import TABLE_WIDTH, new_console, open_model, write_whole

if TYPE_CHECKING:
    from pascalvl.runtime.bench import BenchOptions, BenchResult
    from pascalvl.runtime.model import VisionLanguageModel


def figures_table(title: str, headings: Sequence[str]) -> Any:
    """A table whose first column is names."""
    from rich.table import Table

    table = Table(title=title)
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="right" if i else "left", no_wrap=True)
    return table


def bench_model(args: argparse.Namespace) -> int:
    """Run `pascalvl bench model`; returns the exit code."""
    import dataclasses
    import json

    from pascalvl.plugins.bundle import Manifest
    from pascalvl.runtime import bench

    given = {name: value for name, value in vars(args).items() if name in bench.BenchOptions.__dataclass_fields__}
    options = bench.BenchOptions(**given)
    if args.context is None:
        args.context = options.context(Manifest.read(args.bundle, "engine").model)
    result = measure(open_model(args), options)
    console = new_console()
    console.width = max(console.width, TABLE_WIDTH)
    console.print(*bench.tables(result), sep="\n")
    if args.json:
        figures = json.dumps(dataclasses.asdict(result), indent=1)
        write_whole(args.json, lambda path: path.write_text(figures + "\n", encoding="utf-8"))
    return 0


def measure(model: VisionLanguageModel, options: BenchOptions) -> BenchResult:
    """Time a model, showing how far that is; for errors see `pascalvl.runtime.bench.measure`."""
    from rich.console import Console
    from rich.progress import Progress

    from pascalvl.runtime import bench

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("measuring", total=bench.count_runs(options, model))
        return bench.measure(model, options, lambda what: progress.update(task, advance=1, description=what))


def bench_kernels(args: argparse.Namespace) -> int:
    """Run `pascalvl bench attention` or `linear`; returns the exit code."""
    import importlib

    import torch

    if not torch.cuda.is_available():
        raise UserError("the kernels are timed on a GPU, and PyTorch finds none here that it can use.")
    module = importlib.import_module(f"pascalvl.plugins.bench.{args.what}")
    options = ["--quick"] * args.quick + (["--json", str(args.json)] if args.json else [])
    return module.main(options)

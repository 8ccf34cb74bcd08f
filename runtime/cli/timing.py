"""How fast: `bench`."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from pascalvl.plugins.errors import UserError
from pascalvl.plugins.terminal import progress_bars
from pascalvl.runtime.cli.argument_types import STANDARD_OUTPUT
from pascalvl.runtime.cli.common import check_json, open_model, write_json
from pascalvl.runtime.cli.tables import print_tables

if TYPE_CHECKING:
    from pascalvl.runtime.bench import BenchOptions, BenchResult
    from pascalvl.runtime.model import VisionLanguageModel


def bench_model(args: argparse.Namespace) -> int:
    """Run `pascalvl bench model`; returns the exit code."""
    import dataclasses

    from pascalvl.plugins.bundle import Manifest
    from pascalvl.runtime import bench

    check_json(args.json)
    given = {name: value for name, value in vars(args).items() if name in bench.BenchOptions.__dataclass_fields__}
    options = bench.BenchOptions(**given)
    if args.context is None:
        args.context = options.context(Manifest.read(args.bundle, "engine").model)
    result = measure(open_model(args), options)
    if args.json:
        write_json(args.json, dataclasses.asdict(result))
    if args.json != STANDARD_OUTPUT:
        print_tables(*bench.tables(result))
    return 0


def bench_many(args: argparse.Namespace) -> int:
    """Run `pascalvl bench many`; returns the exit code."""
    import dataclasses

    from pascalvl.runtime import bench_many as bench

    check_json(args.json)
    given = {name: value for name, value in vars(args).items() if name in bench.ManyOptions.__dataclass_fields__}
    options = bench.ManyOptions(**given)
    args.context = args.context or options.context
    model = open_model(args, sequences=options.streams + 1)
    with progress_bars() as progress:
        task = progress.add_task("measuring", total=None)
        result = bench.measure(model, options, lambda what: progress.update(task, description=what))
    if args.json:
        write_json(args.json, dataclasses.asdict(result))
    if args.json != STANDARD_OUTPUT:
        print_tables(*bench.tables(result))
    return 0


def bench_server(args: argparse.Namespace) -> int:
    """Run `pascalvl bench server`; returns the exit code."""
    import dataclasses

    from pascalvl.runtime import bench_server as bench
    from pascalvl.runtime.cli.serve import KEY_VARIABLE

    check_json(args.json)
    given = {name: value for name, value in vars(args).items() if name in bench.ServerOptions.__dataclass_fields__}
    options = bench.ServerOptions(**given)
    with progress_bars() as progress:
        task = progress.add_task("asking", total=options.clients * options.requests)
        key = next(iter(os.environ.get(KEY_VARIABLE, "").split()), "")
        result = bench.measure(args.url, options, key, lambda: progress.advance(task))
    if args.json:
        write_json(args.json, dataclasses.asdict(result))
    if args.json != STANDARD_OUTPUT:
        print_tables(*bench.tables(result))
    return 0


def measure(model: VisionLanguageModel, options: BenchOptions) -> BenchResult:
    """Time a model, showing how far that is; for errors see `pascalvl.runtime.bench.measure`."""
    from pascalvl.runtime import bench

    with progress_bars() as progress:
        task = progress.add_task("measuring", total=bench.count_runs(options, model))
        return bench.measure(model, options, lambda what: progress.update(task, advance=1, description=what))


def bench_kernels(args: argparse.Namespace) -> int:
    """Run `pascalvl bench attention` or `linear`; returns the exit code."""
    import contextlib
    import importlib
    import json
    import tempfile

    import torch

    check_json(args.json)
    if not torch.cuda.is_available():
        raise UserError("the kernels are timed on a GPU, and PyTorch finds none here that it can use.")
    module = importlib.import_module(f"pascalvl.plugins.bench.{args.what}")
    elsewhere = contextlib.redirect_stdout(sys.stderr) if args.json == STANDARD_OUTPUT else contextlib.nullcontext()
    with tempfile.TemporaryDirectory() as folder:
        figures = Path(folder) / "figures.json"
        with elsewhere:
            code = module.main(["--quick"] * args.quick + ["--json", str(figures)])
        if args.json and code == 0:
            write_json(args.json, json.loads(figures.read_text(encoding="utf-8")))
    return code

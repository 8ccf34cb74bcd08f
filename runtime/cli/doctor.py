"""What this machine can run: `doctor`."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from pascalvl.plugins.errors import UserError
from pascalvl.plugins.terminal import progress_bars, shows_notices
from pascalvl.runtime.cli.argument_types import STANDARD_OUTPUT
from pascalvl.runtime.cli.common import FINDING, check_json, open_model, write_json, write_whole
from pascalvl.runtime.cli.tables import new_console
from pascalvl.runtime.cli.timing import measure

if TYPE_CHECKING:
    from pascalvl.engines.doctor import Bundle, Diagnosis


def doctor(args: argparse.Namespace) -> int:
    """Run `pascalvl doctor`; returns the exit code."""
    from rich.progress import SpinnerColumn, TextColumn

    from pascalvl.engines.doctor import diagnose

    check_json(args.json)
    bundle = _bundle(args)
    with progress_bars(SpinnerColumn(), TextColumn("{task.description}")) as progress:
        progress.add_task("looking; what is compiled first, which happens once, takes minutes", total=None)
        diagnosis = diagnose(bundle)
    if args.json:
        write_json(args.json, diagnosis.to_json())
    if args.json != STANDARD_OUTPUT:
        _show(diagnosis)
    if args.report:
        _write_report(args, diagnosis, bundle)
    return 0 if diagnosis.runs else FINDING


def _bundle(args: argparse.Namespace) -> Bundle | None:
    """What ``--engine`` names, with the context that `run` would give it."""
    if args.engine is None:
        return None
    from pascalvl.engines.doctor import Bundle
    from pascalvl.plugins.bundle import Manifest
    from pascalvl.runtime.model import default_context_length, pinned_slots

    manifest = Manifest.read(args.engine, "engine")
    context = default_context_length(manifest.model.text, manifest.kv_cache)
    return Bundle(args.engine, manifest, context, pinned_slots(manifest.kv_cache))


def _show(diagnosis: Diagnosis) -> None:
    """The answer, the table, and what to do about its rows."""
    from rich.table import Table

    console = new_console()
    console.print(f"{diagnosis.verdict}{':' if diagnosis.steps else ''}", soft_wrap=True)
    for number, step in enumerate(diagnosis.steps, 1):
        console.print(f"{number}. {step}", soft_wrap=True)
    table = Table()
    for heading in ("what", "found", "state"):
        table.add_column(heading, overflow="fold")
    for section in diagnosis.sections:
        table.add_section()
        table.add_row(section.name, section.about, style="bold")
        for row in section.rows:
            table.add_row(row.name, row.found, row.state.value)
    console.print(table)
    for section in diagnosis.sections:
        for row in section.rows:
            if row.remedy and row.remedy not in diagnosis.steps:
                console.print(f"{row.state.value}: {section.name}: {row.name}: {row.remedy}", soft_wrap=True)


def _write_report(args: argparse.Namespace, diagnosis: Diagnosis, bundle: Bundle | None) -> None:
    """Write the report, first without figures: so it is there whatever becomes of measuring them."""
    from pascalvl.engines.doctor.report import report

    def write(figures: str) -> None:
        text = report(diagnosis, bundle.manifest if bundle else None, figures)
        write_whole(args.report, lambda path: path.write_text(text, encoding="utf-8"))

    write("Not measured: that did not come to its end.")
    if bundle:
        write(_figures(bundle, diagnosis))
    told = sys.stderr if args.json == STANDARD_OUTPUT else sys.stdout
    if shows_notices():
        print(
            f"{args.report}: a report of this machine, without names, paths and serial numbers; read it, then open an "
            "issue with it: README.md says where, under 'Measurements on your card'",
            file=told,
        )


def _figures(bundle: Bundle, diagnosis: Diagnosis) -> str:
    """What `bench model` measures of a bundle, in short; or a sentence on why there is nothing."""
    import io

    from rich.console import Console

    from pascalvl.runtime import bench

    if not diagnosis.runs:
        return "Not measured: the bundle does not run here."
    if not diagnosis.on_gpu and bundle.backend != "onnxruntime":
        return f"Not measured: on the CPU an emulator runs the kernels of backend {bundle.backend}."
    options = bench.SHORT if diagnosis.on_gpu else bench.SHORT_ON_CPU
    given: dict[str, Any] = {
        "bundle": bundle.directory,
        "backend": bundle.backend,
        "context": options.context(bundle.manifest.model),
        **dict.fromkeys(("max_pixels", "kv"), None),
        "control_tokens_in_text": False,
    }
    try:
        result = measure(open_model(argparse.Namespace(**given)), options)
    except (UserError, MemoryError) as error:
        return f"Not measured: {error or 'there is not enough memory.'}"
    text = io.StringIO()
    Console(file=text, width=160, highlight=False, markup=False, emoji=False).print(*bench.tables(result), sep="\n")
    return text.getvalue()

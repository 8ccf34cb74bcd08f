"""What this machine can run: `doctor`."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from pascalvl.runtime.cli.common import FINDING, new_console, write_whole

if TYPE_CHECKING:
    from pascalvl.engines.doctor import Bundle, Diagnosis

_STANDARD_OUTPUT = "-"


def doctor(args: argparse.Namespace) -> int:
    """Run `pascalvl doctor`; returns the exit code."""
    from rich.console import Console

    from pascalvl.engines.doctor import diagnose

    bundle = _bundle(args)
    waiting = Console(stderr=True)
    waiting.quiet = not waiting.is_terminal
    with waiting.status("looking; what is compiled first, which happens once, takes minutes"):
        diagnosis = diagnose(bundle)
    figures = json.dumps(diagnosis.to_json(), indent=1)
    if str(args.json) == _STANDARD_OUTPUT:
        print(figures)
    else:
        _show(diagnosis)
        if args.json:
            write_whole(args.json, lambda path: path.write_text(figures + "\n", encoding="utf-8"))
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

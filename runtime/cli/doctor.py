"""What this machine can run: `doctor`."""

from __future__ import annotations

import argparse

from pascalvl.runtime.cli.common import FINDING, new_console


def doctor(args: argparse.Namespace) -> int:
    """Run `pascalvl doctor`; returns the exit code."""
    from rich.console import Console
    from rich.table import Table

    from pascalvl.engines import doctor
    from pascalvl.plugins.bundle import Manifest

    manifest = Manifest.read(args.engine, "engine") if args.engine else None
    waiting = Console(stderr=True)
    waiting.quiet = not waiting.is_terminal
    with waiting.status("looking; the plugin is compiled once, which takes a minute"):
        rows = doctor.diagnose(manifest)
    table = Table()
    for heading in ("what", "found", "state"):
        table.add_column(heading, overflow="fold")
    for row in rows:
        table.add_row(row.name, row.found, row.state.value)
    console = new_console()
    console.print(table)
    for row in rows:
        if row.remedy:
            console.print(f"{row.state.value}: {row.name}: {row.remedy}", soft_wrap=True)
    missing = any(row.state is doctor.State.MISSING for row in rows)
    console.print(f"the tensorrt backend {'cannot' if missing else 'can'} run here")
    return FINDING if missing else 0

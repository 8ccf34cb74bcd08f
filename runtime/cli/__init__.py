"""The command `pascalvl`: a file for the commands of a kind."""

from pascalvl.runtime.cli.entry import main

__all__ = ["main"]

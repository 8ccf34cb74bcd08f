"""The command `pascalvl` from its arguments to its exit code."""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import os
import shutil
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from types import FrameType

from pascalvl.plugins.errors import UserError
from pascalvl.runtime.cli.common import fail
from pascalvl.runtime.cli.parser import command_parser

_RETRY_SECONDS = 0.05
_SIGNALLED = 128
"""What is added to a signal's number to make an exit code, as shells do."""


class _Terminated(BaseException):
    """SIGTERM or SIGHUP came, whose number it has."""


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Let SIGTERM and SIGHUP clean up as Ctrl-C does, and none of them come up where it does harm.

    During an import it would abort the process in native code, or leave a module in pieces; during the removal of a
    folder it would leave the rest. It is then tried again a moment later. Native code that it came up in may have
    turned it into another error, which then is not told.
    """
    latest: int = signal.SIGINT
    came_up = False

    def interruption() -> BaseException:
        return KeyboardInterrupt() if latest == signal.SIGINT else _Terminated(latest)

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal latest, came_up
        latest = latest if number == signal.SIGALRM else number
        while frame is not None:
            code, frame = frame.f_code, frame.f_back
            if code.co_filename.startswith("<frozen importlib") or code is shutil.rmtree.__code__:  # type: ignore[attr-defined]
                signal.setitimer(signal.ITIMER_REAL, _RETRY_SECONDS)
                return
        came_up = True
        raise interruption()

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGALRM)
    previous = {number: signal.getsignal(number) for number in numbers}
    for number in numbers:
        if previous[number] is not signal.SIG_IGN:  # as under nohup
            signal.signal(number, handle)
    try:
        yield
    except Exception:
        if came_up:
            raise interruption() from None
        raise
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number in numbers:
            signal.signal(number, previous[number])


def _open_closed_streams() -> None:
    """Give the standard streams that the caller closed the null device, lest the next file opened takes their place."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 - for as long as the process lives


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code.

    0: done; 1: `validate` found a deviation, `doctor` that a bundle, or without one any backend on a GPU, does not run,
    or `run --batch` prompts that have errors; 2: something the user can put right, told in one sentence on stderr; 128
    and a signal's number: SIGHUP, SIGINT or SIGTERM ended it.
    """
    _open_closed_streams()
    root = logging.getLogger()
    level = root.level
    try:
        for stream in (sys.stdin, sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="replace")
        parser, given = command_parser(), sys.argv[1:] if argv is None else argv
        if not given:
            parser.print_help()
            return 0
        args = parser.parse_args(given, argparse.Namespace(given=given))
        logging.basicConfig(format="%(name)s: %(message)s")
        root.setLevel(logging.DEBUG if args.verbose else logging.ERROR if args.quiet else logging.WARNING)
        if not args.verbose:
            # What other libraries warn of is nothing that the user can put right.
            warnings.simplefilter("ignore")
            os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        with _interruptible():
            code = args.command(args)
            sys.stdout.flush()
        return code
    except UserError as error:
        return fail(f"error: {error}")
    except KeyboardInterrupt:
        return fail("interrupted; nothing was left half-written", _SIGNALLED + signal.SIGINT)
    except _Terminated as termination:
        return fail("terminated; nothing was left half-written", _SIGNALLED + termination.args[0])
    except BrokenPipeError:
        # The reader has what it wants. Python flushes stdout at exit: let that not fail too.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except MemoryError as error:
        what = f" ({error})" if str(error) else ""
        return fail(f"error: there is not enough memory{what}: give a smaller --context or --max-pixels.")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("pascalvl"):
            raise
        extras = f"[{args.needs}]" * bool(args.needs)
        return fail(f"error: the package {error.name} is not installed: pip install 'pascalvl{extras}'.")
    except OSError as error:
        return fail(f"error: {error.filename or 'a file'} cannot be read or written: {error.strerror or error}.")
    finally:
        root.setLevel(level)

"""The command line on a terminal: widths, what knows no escape codes, Ctrl-C and Ctrl-D wherever one may press them."""

import contextlib
import fcntl
import hashlib
import io
import os
import pty
import re
import select
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time

import pytest
from rich.cells import cell_len

from pascalvl.plugins.bundle import PIECE_BYTES, Manifest
from pascalvl.runtime.cli.tables import figures_table, print_tables
from tests.manifests import edit_manifest

SCRIPT = """import fcntl, signal, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # keys then send signals
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell ignores in the background
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # as nohup does
from pascalvl.runtime.cli import main
sys.exit(main())"""
LONGEST_WAIT = 60
"""Seconds, of a machine that does much else."""
CTRL_C, CTRL_D = b"\x03", b"\x04"
ESCAPE = re.compile(r"\x1b(\[[0-9;?]*([A-Za-z]|$)|[=>]|$)")
INTERRUPTED = "pascalvl: interrupted; nothing was left half-written\n"


class Terminal:
    """A command on a terminal of its own."""

    def __init__(self, *argv: object, width: int = 80, **environment: str) -> None:
        self._screen, keyboard = pty.openpty()
        fcntl.ioctl(keyboard, termios.TIOCSWINSZ, struct.pack("4H", 24, width, 0, 0))
        unset = "COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "INPUTRC"
        given = {name: value for name, value in os.environ.items() if name not in unset}
        given |= {"TERM": "xterm-256color", "LC_ALL": "C.UTF-8", **environment}
        command = [sys.executable, "-c", SCRIPT, *map(str, argv)]
        streams = dict.fromkeys(("stdin", "stdout", "stderr"), keyboard)
        self.process = subprocess.Popen(command, start_new_session=True, env=given, **streams)
        os.close(keyboard)
        self.output = ""
        """All that has come."""
        self._seen = 0

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        self.hang_up()

    def _read(self, seconds: float) -> bool:
        """Take what comes in so long; whether there was anything, or ever will be."""
        if not select.select([self._screen], [], [], seconds)[0]:
            return True
        data = b""
        with contextlib.suppress(OSError):  # EIO: nobody writes there any more
            data = os.read(self._screen, 1 << 16)
        self.output += data.decode(errors="replace")
        return bool(data)

    def expect(self, pattern: str, seconds: float = LONGEST_WAIT) -> bool:
        """Wait for text that matches, behind what was waited for before."""
        end = time.monotonic() + seconds
        alive = True
        while not (found := re.compile(pattern).search(self.text, self._seen)):
            if not alive or time.monotonic() > end:
                return False
            alive = self._read(0.1)
        self._seen = found.end()
        return True

    def press(self, keys: bytes) -> None:
        os.write(self._screen, keys)

    def interrupt_prompt(self) -> None:
        """Press Ctrl-C for a new prompt; again, where it came before Python waited for keys, as it then waits on."""
        for _ in range(LONGEST_WAIT // 5):
            self.press(CTRL_C)
            if self.expect("\n> ", 5):
                return
        raise AssertionError(self.output)

    def terminate_prompt(self) -> None:
        """Send SIGTERM; again, as Ctrl-C."""
        for _ in range(LONGEST_WAIT // 5):
            self.process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(5)
                return

    def hang_up(self) -> None:
        """Close the window."""
        if self._screen >= 0:
            os.close(self._screen)
            self._screen = -1

    def finish(self) -> tuple[int, str]:
        """Exit code, and all that came as plain text."""
        end = time.monotonic() + LONGEST_WAIT
        while self._read(0.1) and time.monotonic() < end:
            pass
        return self.process.wait(LONGEST_WAIT), self.text

    @property
    def text(self) -> str:
        """What came, without escape codes."""
        return ESCAPE.sub("", self.output).replace("\r", "")


# Ctrl-C and Ctrl-D ----------------------------------------------------------------------------------------------------


def test_keys_in_chat(endless_bundle):
    with Terminal("chat", endless_bundle, "--context", 8192) as terminal:
        assert terminal.expect("\n> "), terminal.output
        terminal.interrupt_prompt()
        terminal.press(b"Which shapes")
        assert terminal.expect("Which shapes")
        terminal.interrupt_prompt()
        terminal.press(b"/help\r")
        assert terminal.expect("/drop +leave out"), terminal.output  # nothing of the line that was begun
        assert terminal.expect("\n> ")
        for _ in range(2):
            terminal.press(b"Hello!\r")
            assert terminal.expect(r"Hello!\n.*\w"), terminal.output
            terminal.press(CTRL_D)  # is for the next prompt, unless Ctrl-C comes first
            terminal.press(CTRL_C)
            assert terminal.expect(r"\[stopped\]\n> "), terminal.output
        terminal.press(b"/hel")
        assert terminal.expect("/hel")
        terminal.press(CTRL_D + b"p\r")  # readline deletes what is behind the cursor, which is nothing
        assert terminal.expect("/drop +leave out"), terminal.output
        assert terminal.expect("\n> ")
        terminal.press(CTRL_D)
        code, text = terminal.finish()
    assert code == 0
    assert text.endswith("\n> \n")
    assert "unknown command" not in text


@pytest.mark.parametrize(("end", "code"), [(Terminal.terminate_prompt, 143), (Terminal.hang_up, 129)])
def test_ends_of_the_terminal_in_chat(nano_engine_bundle, end, code):
    with Terminal("chat", nano_engine_bundle) as terminal:
        assert terminal.expect("\n> ")
        end(terminal)
        assert terminal.process.wait(LONGEST_WAIT) == code


def test_ctrl_c_during_an_answer_of_run(endless_bundle):
    with Terminal("run", endless_bundle, "-p", "Hello!", "--context", 8192) as terminal:
        assert terminal.expect(r"^\w"), terminal.output
        terminal.press(CTRL_C)
        code, text = terminal.finish()
    assert code == 130
    assert text.endswith(INTERRUPTED)


@pytest.mark.parametrize("command", ["run", "chat"])
def test_ctrl_c_during_loading(nano_engine_bundle, tmp_path, command):
    """Of a bundle that takes minutes to check: its file is as large, and nothing on disk."""
    bundle, pieces = tmp_path / "engine", 10_000
    shutil.copytree(nano_engine_bundle, bundle)
    for size in (0, pieces * PIECE_BYTES):
        os.truncate(bundle / "vision.onnx.data", size)
    file = {"bytes": pieces * PIECE_BYTES, "sha256": [hashlib.sha256(bytes(PIECE_BYTES)).hexdigest()] * pieces}
    edit_manifest(bundle, lambda manifest: manifest["files"].update({"vision.onnx.data": file}))
    with Terminal(command, bundle, *["-p", "Hello!"] * (command == "run")) as terminal:
        assert terminal.expect("checking the bundle"), terminal.output
        terminal.press(CTRL_C)
        code, text = terminal.finish()
    assert code == 130
    assert text.endswith(INTERRUPTED)
    assert terminal.output.rindex("\x1b[?25h") > terminal.output.rindex("\x1b[?25l")  # the cursor is there again


def test_ctrl_c_during_an_export(nano_checkpoint, tmp_path):
    target = tmp_path / "out" / "model"
    with Terminal("export", nano_checkpoint, "--output", target) as terminal:
        assert terminal.expect("tracing decoder"), terminal.output
        terminal.press(CTRL_C)
        code, text = terminal.finish()
    assert code == 130
    assert text.endswith(INTERRUPTED)
    assert not list(target.parent.iterdir())


def test_ctrl_c_during_a_build(nano_model_bundle, tmp_path):
    """Which may just have come to its end."""
    target = tmp_path / "out" / "engine"
    with Terminal("build", nano_model_bundle, "--output", target, "--backend", "onnxruntime") as terminal:
        while not list(target.parent.glob(".engine.*")):
            assert terminal.process.poll() is None, terminal.finish()
            time.sleep(0.01)
        terminal.press(CTRL_C)
        code, text = terminal.finish()
    left = [path.name for path in target.parent.iterdir()]
    if code:
        assert (code, text, left) == (130, f"^C{INTERRUPTED}", [])
    else:
        assert left == ["engine"]
        Manifest.read(target, "engine").verify(target)


# Widths, and what knows no escape codes -------------------------------------------------------------------------------

PLAIN = [{"NO_COLOR": "1"}, {"TERM": "dumb"}]


def check_lines(terminal, width):
    """No line is longer than the terminal is wide, and no table is cut off."""
    for line in terminal.text.splitlines():
        assert cell_len(line) <= width, line
    assert "…" not in terminal.text.replace("…)", "")


@pytest.mark.parametrize("width", [40, 80, 120, 200])
def test_help(width):
    for command in ([], ["run"], ["chat"], ["bench", "model"]):
        with Terminal(*command, "--help", width=width) as terminal:
            code, text = terminal.finish()
        assert code == 0
        assert text.startswith("usage: pascalvl")
        check_lines(terminal, width)


@pytest.mark.parametrize("width", [40, 80, 120, 200])
@pytest.mark.parametrize("environment", [{}, *PLAIN])
def test_inspect(nano_model_bundle, width, environment):
    with Terminal("inspect", nano_model_bundle, width=width, **environment) as terminal:
        code, text = terminal.finish()
    assert code == 0
    check_lines(terminal, width)
    assert re.search(r"k4v4[ │]+1584[ │]+0\.002|KV cache: k4v4\n  bytes a token: 1584\n  1024: 0\.002\n", text), text
    assert ("│" in text) == (width > 40)
    if environment:
        assert "\x1b" not in terminal.output


@pytest.mark.parametrize(("width", "environment"), [(40, {}), (200, {}), *((80, plain) for plain in PLAIN)])
def test_run_and_chat(nano_engine_bundle, width, environment):
    asked = ["--max-new-tokens", 4, "--temperature", 0]
    with Terminal("run", nano_engine_bundle, "-p", "Hello!", *asked, width=width, **environment) as run:
        code, text = run.finish()
    assert code == 0
    answer = re.search(r"(Hello.*)\n10 prompt tokens in .*ended by length\n$", text)[1]
    assert ("checking the bundle" in text) == (not environment)
    with Terminal("chat", nano_engine_bundle, *asked, width=width, **environment) as chat:
        assert chat.expect("\n> "), chat.output
        chat.press(b"/help\r")
        assert chat.expect("/exit"), chat.output
        assert chat.expect("\n> ")
        chat.press(b"Hello!\r")
        assert chat.expect(f"\n{re.escape(answer)}\n> "), chat.output
        chat.press(CTRL_D)
        code, text = chat.finish()
    assert code == 0
    help_lines = text[text.index("/help\n") : text.index("> Hello")].splitlines()
    assert all(len(line) <= width for line in help_lines)
    if environment:
        assert "\x1b" not in run.output + chat.output


@pytest.mark.parametrize("width", [40, 80, 120, 200])
def test_tables(width, monkeypatch):
    """As they are, with headings on several lines, or row by row: no figure is cut off."""
    screen = io.StringIO()
    screen.isatty = lambda: True
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("NO_COLOR", "1")
    table = figures_table("medians of 10", ["depth", *(f"some figure that is called {name}" for name in "abcd")])
    figures = [f"1,234,567.{digit}%" for digit in range(4)]
    table.add_row("4,096", *figures)
    print_tables(table, [("a name", "some text " * 20), ("", "12345")], "a sentence " * 20)
    lines = screen.getvalue().splitlines()
    assert all(cell_len(line) <= width for line in lines)
    assert sum(line.count(figure) for line in lines for figure in figures) == 4
    headings = [line for line in lines if "┃" in line]
    assert len(headings) == {40: 0, 80: 3, 120: 3, 200: 1}[width]


def test_quiet(nano_engine_bundle):
    with Terminal("run", nano_engine_bundle, "-p", "Hello!", "--max-new-tokens", 4, "--quiet") as terminal:
        code, text = terminal.finish()
    assert code == 0
    assert re.fullmatch(r"Hello.*\n", text), text
    assert "\x1b" not in terminal.output

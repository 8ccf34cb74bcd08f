"""Messages to the text of a prompt, by the checkpoint's own Jinja template."""

from __future__ import annotations

import atexit
import contextlib
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, cast

from pascalvl.plugins.bundle import open_regular
from pascalvl.plugins.errors import UserError, reason, shown
from pascalvl.runtime.literal_text import LiteralText
from pascalvl.runtime.messages import Message, without_sources
from pascalvl.runtime.template_worker import MOST_CHARACTERS, MOST_SECONDS

_MOST_SOURCE_BYTES = 1 << 20
_MOST_REQUEST_BYTES = 1 << 26
_MOST_WAIT_SECONDS = 10 * MOST_SECONDS
"""For an answer, where the machine has other things to do."""
_MOST_ANSWER_BYTES = 12 * MOST_CHARACTERS + 100
"""JSON writes a character in 12 bytes at most."""


class ChatTemplate:
    """A template that can be rendered, within bounds: `pascalvl.runtime.template_worker` does it.

    Raises:
        UserError: the file is missing or is no valid template.
    """

    def __init__(self, path: Path) -> None:
        try:
            with open_regular(path) as file:
                source = file.read(_MOST_SOURCE_BYTES + 1)
            if len(source) > _MOST_SOURCE_BYTES:
                raise ValueError(f"it has more than {_MOST_SOURCE_BYTES} bytes")
            self._source = source.decode()
            _worker.ask(self._source, None)
        except (OSError, ValueError) as error:
            raise UserError(
                f"the chat template {path} cannot be used ({reason(error)}): download the model again and export it."
            ) from error

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
        literal: LiteralText | None = None,
    ) -> str:
        """The prompt's text up to where the assistant's answer begins, one placeholder for each picture and video.

        Args:
            messages: as `pascalvl.runtime.messages.normalised` returns them.
            tools: JSON schemas of functions that may be called.
            variables: what else the template may ask for, by name.
            literal: hides control tokens in what users and tools say, and in tools; None: the text has them.

        Raises:
            UserError: messages, tools or variables that the template refuses, or that are of another form.
        """
        if tools is not None and not (isinstance(tools, list | tuple) and all(isinstance(t, Mapping) for t in tools)):
            raise UserError(f"expected tools as a list of JSON schemas, found {shown(tools)}.")
        given = {} if variables is None else variables
        if not isinstance(given, Mapping) or not all(isinstance(name, str) for name in given):
            raise UserError(f"expected a template's variables by their names, found {shown(variables)}.")
        if own := [name for name in ("messages", "tools") if name in given]:
            raise UserError(f"expected a template's other variables, found {own[0]}: give it as the argument {own[0]}.")
        try:
            seen = _plain({"documents": None, "add_generation_prompt": True, **given, "tools": tools})
            seen["messages"] = _plain(without_sources(messages))
            if literal is not None:
                everything = json.dumps([self._source, seen])
                seen["messages"], seen["tools"] = literal.hide(seen["messages"], seen["tools"], everything)
            return _worker.ask(self._source, seen)
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"the chat template refuses the messages: {error}.") from error


class _Worker:
    """A process of `pascalvl.runtime.template_worker`, started when it is needed and another is not running."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def ask(self, source: str, variables: dict[str, Any] | None) -> str:
        """The text that a template makes of variables, "" where they are None and it is compiled only.

        Raises:
            ValueError: why there is none.
        """
        request = json.dumps([source, variables]).encode() + b"\n"
        if len(request) > _MOST_REQUEST_BYTES:
            raise ValueError(f"they have more than {_MOST_REQUEST_BYTES >> 20} MB of text")
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self.end()
                self._process = self._start()
            stdin, stdout = cast(BinaryIO, self._process.stdin), cast(BinaryIO, self._process.stdout)
            watch = threading.Timer(_MOST_WAIT_SECONDS, self._process.kill)
            watch.start()
            try:
                with contextlib.suppress(BrokenPipeError):
                    stdin.write(request)
                    stdin.flush()
                line = stdout.readline(_MOST_ANSWER_BYTES)
                if not line.endswith(b"\n"):
                    raise ValueError(self._end_reason(self._process.wait()))
            except BaseException:  # an interrupt, too: the next answer would be that to this request
                self.end()
                raise
            finally:
                watch.cancel()
        answer = json.loads(line)
        if "reason" in answer:
            raise ValueError(answer["reason"])
        return answer["text"]

    def end(self) -> None:
        """Kill the process, if there is one."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            with contextlib.suppress(BrokenPipeError):
                cast(BinaryIO, self._process.stdin).close()
            cast(BinaryIO, self._process.stdout).close()
            self._process = None

    @staticmethod
    def _start() -> subprocess.Popen[bytes]:
        script = "import sys; sys.path[:] = sys.argv[1:]; from pascalvl.runtime import template_worker as w; w.serve()"
        return subprocess.Popen(
            [sys.executable, "-c", script, *sys.path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for this process alone
        )

    @staticmethod
    def _end_reason(code: int) -> str:
        if code in (-signal.SIGXCPU, -signal.SIGKILL):
            return f"it takes more than {MOST_SECONDS} seconds"
        return f"the process that renders it ended with code {code}"


_worker = _Worker()
atexit.register(_worker.end)


def _plain(value: Any) -> Any:
    """What a template may see of messages: the types of JSON.

    Templates come with checkpoints, from anyone, and the methods of a picture or path write files.
    """
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, str):
        return str(value)
    return value if value is None or type(value) in (bool, int, float) else f"<{type(value).__name__}>"

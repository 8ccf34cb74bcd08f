"""Messages to the text of a prompt, by the checkpoint's own Jinja template."""

from __future__ import annotations

import atexit
import contextlib
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pascalvl.plugins.bundle import open_regular
from pascalvl.plugins.errors import UserError, reason
from pascalvl.runtime.template_worker import MOST_CHARACTERS, MOST_SECONDS

Message = dict[str, Any]
"""As Hugging Face writes it: ``{"role": ..., "content": text or list of parts}``, a part being ``{"type": "text",
"text": ...}``, ``{"type": "image", "image": ...}`` or ``{"type": "video", "video": ...}``."""

ROLES = ("system", "user", "assistant", "tool")
PART_TYPES = ("text", "image", "video")
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

    def render(self, messages: Sequence[Message]) -> str:
        """The prompt's text up to where the assistant's answer begins, one placeholder for each picture and video.

        Raises:
            UserError: messages of another form, or that the template refuses.
        """
        if not isinstance(messages, Sequence) or not messages:
            raise UserError(f"expected a list of at least one message, found {messages!r}.")
        for message in messages:
            check_message(message)
        variables = {"tools": None, "documents": None, "add_generation_prompt": True}
        try:
            return _worker.ask(self._source, {"messages": _plain(messages), **variables})
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
            watch = threading.Timer(_MOST_WAIT_SECONDS, self._process.kill)
            watch.start()
            try:
                with contextlib.suppress(BrokenPipeError):
                    self._process.stdin.write(request)
                    self._process.stdin.flush()
                line = self._process.stdout.readline(_MOST_ANSWER_BYTES)
                if not line.endswith(b"\n"):
                    raise ValueError(self._end_reason())
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
                self._process.stdin.close()
            self._process.stdout.close()
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

    def _end_reason(self) -> str:
        code = self._process.wait()
        if code in (-signal.SIGXCPU, -signal.SIGKILL):
            return f"it takes more than {MOST_SECONDS} seconds"
        return f"the process that renders it ended with code {code}"


_worker = _Worker()
atexit.register(_worker.end)


def check_message(message: Message) -> None:
    """Raise `UserError` unless ``message`` has a known role and content."""
    if not isinstance(message, dict) or message.get("role") not in ROLES:
        found = message.get("role") if isinstance(message, dict) else message
        raise UserError(f"expected a message with a role of {', '.join(ROLES)}, found {found!r}.")
    for part in parts(message):
        kind = part.get("type") if isinstance(part, dict) else part
        if kind not in PART_TYPES or kind not in part or (kind == "text" and not isinstance(part["text"], str)):
            raise UserError(
                f"expected message parts of type {', '.join(PART_TYPES)} with a field of that name, found {part!r}."
            )


def parts(message: Message) -> list[dict[str, Any]]:
    """The parts of a message's content; a plain text is one part."""
    content = message.get("content")
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise UserError(f"expected a message's content to be a text or a list of parts, found {content!r}.")
    return content


def _plain(value: Any) -> Any:
    """What a template may see of messages: the types of JSON.

    Templates come with checkpoints, from anyone, and the methods of a picture or path write files.
    """
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, str):
        return str(value)
    return value if value is None or type(value) in (bool, int, float) else f"<{type(value).__name__}>"

"""The process in which chat templates are compiled and rendered, within bounds of time and memory.

Templates come with checkpoints, from anyone, and Jinja's sandbox does not bound what they take: an expression as short
as ``9**(9**9)`` does not end, not even when it is compiled. `pascalvl.runtime.chat_template` starts this process and
talks to it in lines of JSON.
"""

from __future__ import annotations

import datetime
import functools
import json
import math
import resource
import sys
from typing import Any, NoReturn

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MOST_SECONDS = 3
"""Of the processor, for a request; templates as they come take milliseconds."""
MOST_CHARACTERS = 10_000_000
"""Of a prompt; a million tokens have about four million."""
_MOST_MEMORY = 1 << 30
_MOST_REASON = 300


def serve() -> None:
    """Answer requests until there are no more.

    A request is ``[source, variables]``, or ``[source, null]`` to compile only; its answer is ``{"text": ...}``, or
    ``{"reason": ...}`` why there is none.
    """
    _limit(resource.RLIMIT_AS, _MOST_MEMORY)
    _limit(resource.RLIMIT_CORE, 0)
    for line in sys.stdin.buffer:
        usage = resource.getrusage(resource.RUSAGE_SELF)
        _limit(resource.RLIMIT_CPU, math.ceil(usage.ru_utime + usage.ru_stime) + MOST_SECONDS)
        try:
            answer = _line(text=_render(*json.loads(line)))
        except MemoryError:
            answer = _line(reason=f"it needs more than {_MOST_MEMORY >> 30} GB of memory")
        except Exception as error:  # whatever Python raises for what the template is and does
            reason = " ".join(str(error).split())[:_MOST_REASON].rstrip(".")
            answer = _line(reason=reason or type(error).__name__)
        sys.stdout.buffer.write(answer)
        sys.stdout.buffer.flush()


def _line(**answer: str) -> bytes:
    return json.dumps(answer).encode() + b"\n"


def _limit(which: int, most: int) -> None:
    hard = resource.getrlimit(which)[1]
    resource.setrlimit(which, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


def _render(source: str, variables: dict[str, Any] | None) -> str:
    template = _compile(source)
    text = "" if variables is None else template.render(variables)
    if len(text) > MOST_CHARACTERS:
        raise ValueError(f"it makes a prompt of {len(text)} characters, more than {MOST_CHARACTERS}")
    return text


@functools.lru_cache(maxsize=4)
def _compile(source: str) -> jinja2.Template:
    """In the sandbox and with the names that Hugging Face gives templates."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _GenerationTag]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda pattern: datetime.datetime.now().strftime(pattern)
    return environment.from_string(source)


class _GenerationTag(Extension):
    """``{% generation %}``: marks, for training, what the assistant says; here its content alone matters."""

    tags = {"generation"}  # noqa: RUF012 (the base class declares it)

    def parse(self, parser: Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    """Jinja's own filter escapes HTML, which a prompt is not."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)

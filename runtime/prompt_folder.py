"""A folder of prompts: what a user measures a model on, or calibrates it with."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pascalvl.plugins.errors import UserError, shown
from pascalvl.runtime.messages import Message

PROMPTS = "prompts.jsonl"
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp")
PICTURE_PROMPT = "Describe the picture."
_LINE = f'a {PROMPTS} with lines such as {{"prompt": "What is it?", "images": ["a.png"], "answer": "A cup."}}'
_FIELDS = ("prompt", "images", "answer")


@dataclasses.dataclass(frozen=True)
class PromptCase:
    """One prompt of a folder."""

    name: str
    """The file it comes from, in `PROMPTS` with its line: ``prompts.jsonl:3``."""
    messages: list[Message]
    """One user message; its pictures are paths, not opened yet."""
    answer: str | None = None
    """What is right, if the folder says so."""


def read_prompts(directory: Path) -> list[PromptCase]:
    """Read the prompts of a folder: the lines of its `PROMPTS`, its ``*.txt`` files, its pictures, in this order.

    A line is a JSON object: ``prompt``, a text; ``images``, file names in the folder (optional); ``answer``, a text
    (optional). A text file is one prompt. A picture that no line names is asked `PICTURE_PROMPT`. Files of other kinds,
    and folders, do not count.

    Raises:
        UserError: no such folder, no prompts in it, a line or text that is none, a picture that is not there.
    """
    try:
        files = sorted(path for path in directory.iterdir() if path.is_file())
    except NotADirectoryError:
        raise UserError(f"{directory} is no folder: give one that holds {_LINE}, or texts and pictures.") from None
    except FileNotFoundError:
        raise UserError(f"no folder at {directory}: give one that holds {_LINE}, or texts and pictures.") from None
    except OSError as error:
        raise UserError(f"{directory} cannot be read ({error.strerror}): give a folder of prompts.") from error
    cases, shown = _read_lines(directory) if directory / PROMPTS in files else ([], set())
    for path in files:
        if path.suffix.lower() == ".txt":
            cases.append(PromptCase(path.name, _messages(_read_text(path).strip(), [], f"{path} holds no text")))
    for path in files:
        if path.suffix.lower() in PICTURE_SUFFIXES and path.resolve() not in shown:
            cases.append(PromptCase(path.name, _messages(PICTURE_PROMPT, [path])))
    if not cases:
        raise UserError(
            f"{directory} holds no prompts: put in {_LINE}, text files (*.txt, one prompt each), or pictures "
            f"({', '.join(PICTURE_SUFFIXES)})."
        )
    return cases


def _read_lines(directory: Path) -> tuple[list[PromptCase], set[Path]]:
    """The prompts of `PROMPTS`, and the pictures that they show."""
    path, cases, shown = directory / PROMPTS, [], set()
    # Not splitlines, which would also split at U+2028 and others that JSON allows inside texts.
    for number, line in enumerate(_read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        where = f"line {number} of {path}"
        prompt, images, answer = _parse(line, where)
        pictures = [directory / name for name in images]
        if missing := [picture for picture in pictures if not _is_file(picture)]:
            raise UserError(f"{where} shows a picture that is not there, {missing[0]}: put it there, or correct it.")
        shown |= {picture.resolve() for picture in pictures}
        cases.append(PromptCase(f"{PROMPTS}:{number}", _messages(prompt, pictures, f"{where} has no text"), answer))
    return cases, shown


def read_object(line: str, where: str, expected: str, fields: Sequence[str] | None = None) -> dict[str, Any]:
    """A line's JSON object; raises `UserError`, about ``where``, for what is none, or has other fields."""
    try:
        data = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is no JSON ({error}): expected {expected}.") from error
    if not isinstance(data, dict):
        raise UserError(f"{where} is no JSON object but a {type(data).__name__}: expected {expected}.")
    if fields is not None and (unknown := [name for name in data if name not in fields]):
        raise UserError(f"{where} has an unknown field {shown(unknown[0])}: expected {', '.join(fields)}.")
    return data


def _parse(line: str, where: str) -> tuple[str, list[str], str | None]:
    data = read_object(line, where, _LINE, _FIELDS)
    prompt, images, answer = data.get("prompt"), data.get("images", []), data.get("answer")
    if not isinstance(prompt, str):
        raise UserError(f"{where} has no prompt, found {shown(prompt)}: expected {_LINE}.")
    if not isinstance(images, list) or not all(isinstance(name, str) for name in images):
        raise UserError(f"{where} has images {shown(images)}: expected a list of file names.")
    if not isinstance(answer, str | None):
        raise UserError(f"{where} has the answer {shown(answer)}: expected a text.")
    return prompt, images, answer


def _messages(text: str, pictures: list[Path], empty: str = "") -> list[dict[str, Any]]:
    if not text.strip():
        raise UserError(f"{empty}: expected a prompt.")
    parts = [{"type": "image", "image": picture} for picture in pictures]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that no file can have
        return False


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): give a text file.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no text in UTF-8 ({error.reason}): save it as one.") from error

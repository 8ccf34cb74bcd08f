"""Many prompts: `run --batch`, which goes on where it was."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import fcntl
import io
import itertools
import json
import os
import queue
import shutil
import stat
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pascalvl.plugins.errors import UserError, reason, shown
from pascalvl.plugins.terminal import progress_bars, shows_progress
from pascalvl.runtime.cli.common import FINDING, check_cache, fail, model_with_cache, notice
from pascalvl.runtime.cli.sources import engine_bundle
from pascalvl.runtime.cli.talk import (
    answer_fields,
    given_grammar,
    given_sampling,
    sampling_params,
    system_messages,
    user_message,
)

if TYPE_CHECKING:
    from pascalvl.runtime.generation import Generation
    from pascalvl.runtime.grammar import Grammar
    from pascalvl.runtime.messages import Message
    from pascalvl.runtime.model import VisionLanguageModel
    from pascalvl.runtime.sequence import TokenSequence

Id = str | int
"""Of a prompt: a picture's path in its folder, or what its line says, which else is the line's number."""

_LINE = '{"prompt": "What is it?", "images": ["a.png"], "id": "first"}'
_BEGINNING = b'{"id": '
"""Of each line of answers."""
_AHEAD = 2
"""Prompts whose pictures are loaded before they are needed."""
_SECONDS_BETWEEN_NOTICES = 10.0


def run_batch(args: argparse.Namespace) -> int:
    """Run `pascalvl run --batch`; returns the exit code."""
    from pascalvl.runtime.scheduler import Limits

    for option, given in (("--json", args.json), ("--image or --video", args.visuals)):
        if given:
            raise UserError(f"{option} is for one prompt: leave it out with --batch.")
    if args.output is None:
        raise UserError("--batch asks for a file that the answers are added to: give --output FILE.jsonl.")
    at_once = Limits.sequences if args.at_once is None else args.at_once
    if not 1 <= at_once <= Limits.sequences:
        raise UserError(f"--at-once is out of range: expected 1 to {Limits.sequences}, found {at_once}.")
    check_cache(args)
    source = _source(args)
    with _Answers.open(args.output, args.batch, source.ids, bool(args.retry_errors)) as answers:
        if left := [one for one in source.ids if one not in answers.ids]:
            args.bundle = engine_bundle(args)
            with contextlib.ExitStack() as stack:
                try:
                    model = stack.enter_context(model_with_cache(args, at_once))
                except MemoryError as error:
                    raise UserError(
                        f"there is not enough memory{_named(error)} for {at_once} whole contexts: give a smaller "
                        "--at-once, --context or --max-pixels."
                    ) from error
                sampling = dataclasses.asdict(sampling_params(model, given_sampling(args)))
                model.check_grammar(args.grammar)
                try:
                    _answer(model, source, left, sampling, at_once, answers)
                except BaseException:
                    if answers.ids:
                        notice(
                            f"[{len(answers.ids)} of {len(source.ids)} are in {args.output}; "
                            "the same command goes on with the others]"
                        )
                    raise
    if answers.errors:
        return fail(
            f"{answers.errors} of {len(source.ids)} have errors, which {args.output} tells: --retry-errors asks them "
            "again.",
            FINDING,
        )
    if not left:
        notice(f"all {len(source.ids)} are answered in {args.output} already")
    return 0


def _answer(
    model: VisionLanguageModel,
    source: _Pictures | _Lines,
    ids: Sequence[Id],
    sampling: dict[str, Any],
    at_once: int,
    answers: _Answers,
) -> None:
    """Answer prompts, and write each as it ends."""
    at_work: dict[int, Id] = {}
    with _loading(model, source, ids, sampling) as loaded, _progress(answers, len(source.ids)) as count:

        def write(prompt: Id, result: Generation | Exception) -> None:
            answers.add(prompt, result)
            count(0 if isinstance(result, Exception) else len(result.token_ids))

        def sequences() -> Iterator[TokenSequence | None]:
            numbers = itertools.count()
            while True:
                try:
                    one = loaded.get(block=not at_work)
                except queue.Empty:  # what is at work goes on
                    yield None
                    continue
                if one is None:
                    return
                prompt, sequence = one
                if isinstance(sequence, Exception):
                    write(prompt, sequence)
                else:
                    at_work[next(numbers)] = prompt
                    yield sequence

        for number, generation in model.generate_many(sequences(), at_once):
            write(at_work.pop(number), generation.error or generation)


# What is asked --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Asked:
    """A prompt, whose pictures are paths.

    Attributes:
        messages: with everything that comes before the prompt.
        sampling: fields of `SamplingParams` that are its own.
        max_new_tokens: as in `Request`.
        stop: as in `Request`.
        grammar: as in `Request`.
    """

    messages: list[Message]
    sampling: dict[str, Any]
    max_new_tokens: int | None
    stop: str | Sequence[str]
    grammar: Grammar | None


def _source(args: argparse.Namespace) -> _Pictures | _Lines:
    """What is asked; raises `UserError` for what holds nothing, or something else."""
    given_sampling(args)
    args.grammar = given_grammar(args)
    _check_limits(args.max_new_tokens, args.stop)
    path = args.batch
    try:
        if path.is_dir():
            return _Pictures(args)
        if path.suffix.lower() == ".jsonl" and path.exists():
            return _Lines(args)
    except OSError as error:
        raise UserError(
            f"{error.filename or path} cannot be read ({reason(error)}): give a folder of pictures, or a .jsonl file."
        ) from error
    found = "something else" if path.exists() else "nothing"
    raise UserError(f"expected a folder of pictures or a .jsonl file of prompts at {path}, found {found}.")


def _check_limits(max_new_tokens: object, stop: Any) -> None:
    """Raise `UserError` for what ends no answer."""
    from pascalvl.runtime.generation import StopMatcher

    StopMatcher(stop)
    if max_new_tokens is not None and not (type(max_new_tokens) is int and max_new_tokens >= 1):
        raise UserError(f"max_new_tokens is out of range: expected at least 1, found {shown(max_new_tokens)}.")


class _Pictures:
    """The pictures of a folder and of those in it, by their paths; of hidden ones, none."""

    def __init__(self, args: argparse.Namespace) -> None:
        from pascalvl.runtime.prompt_folder import PICTURE_SUFFIXES

        if args.prompt is None:
            raise UserError("a folder of pictures asks for a prompt: give --prompt.")
        if args.fps is not None:
            raise UserError("--fps is for videos, and --batch names a folder of pictures: leave it out.")
        self._args, self._folder = args, args.batch
        self.ids: list[Id] = sorted(
            path.relative_to(self._folder).as_posix()
            for path in _files(self._folder)
            if path.suffix.lower() in PICTURE_SUFFIXES
        )
        if not self.ids:
            raise UserError(f"{self._folder} holds no pictures ({', '.join(PICTURE_SUFFIXES)}): give another folder.")

    def read(self, picture: Id) -> _Asked:
        visuals = [("image", self._folder / str(picture))]
        messages = [*system_messages(self._args), user_message(visuals, self._args.prompt)]
        return _Asked(messages, {}, self._args.max_new_tokens, self._args.stop, self._args.grammar)


def _files(folder: Path) -> Iterator[Path]:
    """Of a folder, at any depth; raises `OSError`."""

    def fail(error: OSError) -> None:
        raise error

    for parent, folders, names in os.walk(folder, onerror=fail):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(parent, name) for name in names if not name.startswith("."))


class _Lines:
    """The lines of a file, each a JSON object, which are read again when they are asked.

    All are read once, before any work, so that what is wrong with one is known then.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        from pascalvl.plugins.bundle import open_regular

        self._args, self._path = args, args.batch
        self._places: dict[Id, tuple[int, int]] = {}
        """Of each prompt its line's number, and where that begins."""
        with open_regular(self._path) as file:
            start = 0
            for number, line in enumerate(file, 1):
                if line.strip():
                    prompt, _ = self._parse(line, number)
                    if prompt in self._places:
                        first = self._places[prompt][0]
                        raise UserError(
                            f"line {number} of {self._path} has the id {shown(prompt)}, as line {first} has: give each "
                            "its own."
                        )
                    self._places[prompt] = number, start
                start += len(line)
        self.ids = list(self._places)
        if not self.ids:
            raise UserError(f"{self._path} holds no prompts: expected lines such as {_LINE}.")

    def read(self, prompt: Id) -> _Asked:
        """A prompt, with videos that were opened; raises `UserError`, or `OSError` where its line is gone."""
        from pascalvl.runtime.messages import visual_parts
        from pascalvl.runtime.video import load_video

        number, start = self._places[prompt]
        with self._path.open("rb") as file:
            file.seek(start)
            found, asked = self._parse(file.readline(), number)
        if found != prompt:
            raise UserError(f"line {number} of {self._path} was another one before: ask again what is there now.")
        for part in visual_parts(asked.messages):
            if part["type"] == "video":
                part["video"] = load_video(part["video"], self._args.fps)
        return asked

    def _parse(self, line: bytes, number: int) -> tuple[Id, _Asked]:
        from pascalvl.runtime.prompt_folder import read_object
        from pascalvl.runtime.sampling import SamplingParams

        where = f"line {number} of {self._path}"
        try:
            text = line.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise UserError(f"{where} is no text in UTF-8 ({error.reason}): save it as one.") from error
        options = [name for name in SamplingParams.__dataclass_fields__ if name != "logit_bias"]
        fields = "prompt", "messages", "images", "videos", "id", "system", "max_new_tokens", "stop", *options
        data = read_object(text, where, _LINE, fields)
        data = {name: value for name, value in data.items() if value is not None}
        prompt = data.get("id", number)
        if not isinstance(prompt, str) and type(prompt) is not int:
            raise UserError(f"{where} has the id {shown(prompt)}: expected a text or a whole number.")
        sampling = {name: data[name] for name in options if name in data}
        limit, stop = data.get("max_new_tokens", self._args.max_new_tokens), data.get("stop", self._args.stop)
        try:
            SamplingParams(**sampling)
            _check_limits(limit, stop)
            messages = self._messages(data)
        except UserError as error:
            raise UserError(f"{where} cannot be used: {error}") from error
        return prompt, _Asked(messages, sampling, limit, stop, self._args.grammar)

    def _messages(self, data: dict[str, Any]) -> list[Message]:
        from pascalvl.runtime.messages import normalised, visual_parts

        system = data.get("system", self._args.system)
        if not isinstance(system, str | None):
            raise UserError(f"expected the field system to be a text, found {shown(system)}.")
        if "messages" in data:
            if beside := [name for name in ("prompt", "images", "videos") if name in data]:
                raise UserError(f"the field {beside[0]} has no place beside messages: put it into them.")
            messages = normalised(data["messages"])
            if messages[0]["role"] == "system":
                if "system" in data:
                    raise UserError("the field system stands beside messages that begin with one: give one of them.")
                system = None
        else:
            visuals = [(kind, name) for kind in ("image", "video") for name in _names(data, f"{kind}s")]
            text = data.get("prompt", self._args.prompt)
            if not isinstance(text, str) or not text.strip():
                raise UserError(f"expected the field prompt to be a text, or messages, found {shown(text)}.")
            messages = [user_message(visuals, text)]
        for part in visual_parts(messages):
            part[part["type"]] = self._resolved(part[part["type"]])
        return [*([] if system is None else [{"role": "system", "content": system}]), *messages]

    def _resolved(self, source: Any) -> Any:
        """A path beside the file."""
        from pascalvl.runtime.image import is_url

        return self._path.parent / source if isinstance(source, str) and source and not is_url(source) else source


def _names(data: dict[str, Any], field: str) -> list[str]:
    names = data.get(field, [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"expected the field {field} to be a list of file names, found {shown(names)}.")
    return names


# Loading --------------------------------------------------------------------------------------------------------------

_Loaded = tuple[Id, "TokenSequence | Exception"] | None


@contextlib.contextmanager
def _loading(
    model: VisionLanguageModel, source: _Pictures | _Lines, ids: Sequence[Id], sampling: dict[str, Any]
) -> Iterator[queue.Queue[_Loaded]]:
    """What becomes of prompts, in their order and None behind them: a thread loads their pictures, a few ahead."""
    loaded: queue.Queue[_Loaded] = queue.Queue(_AHEAD)
    is_over = threading.Event()

    def load() -> None:
        for prompt in ids:
            one: TokenSequence | Exception
            try:
                one = _sequence(model, source, prompt, sampling)
            except Exception as error:
                one = error
            loaded.put((prompt, one))
            if is_over.is_set():
                return
        loaded.put(None)

    # Not waited for: a picture may take seconds, and whoever interrupts wants an end.
    threading.Thread(target=load, name="pictures", daemon=True).start()
    try:
        yield loaded
    finally:
        is_over.set()
        with contextlib.suppress(queue.Empty):
            while True:
                loaded.get_nowait()


def _sequence(
    model: VisionLanguageModel, source: _Pictures | _Lines, prompt: Id, sampling: dict[str, Any]
) -> TokenSequence:
    from pascalvl.runtime.model import Request
    from pascalvl.runtime.sampling import SamplingParams

    asked = source.read(prompt)
    params = SamplingParams(**{**sampling, **asked.sampling})
    sequence = model.sequence(Request(asked.messages, params, asked.max_new_tokens, asked.stop, grammar=asked.grammar))
    for visual in sequence.prompt.visuals:
        _ = visual.patches.pixel_values  # else made between two steps
    return sequence


# What is answered -----------------------------------------------------------------------------------------------------


class _Answers:
    """The file of answers: a JSON object a line, which a process adds whole, and no other at the same time.

    Args:
        path: of the file.
        file: it, locked.
        known: what may be answered there.
    """

    def __init__(self, path: Path, file: io.FileIO, known: Collection[Id]) -> None:
        self.path, self._file = path, file
        self.ids: set[Id] = set()
        """What is answered."""
        self.errors = 0
        """How many of them have an error in place of an answer."""
        self._read(set(known))

    @classmethod
    @contextlib.contextmanager
    def open(cls, path: Path, asked: Path, known: Collection[Id], retry_errors: bool) -> Iterator[_Answers]:
        """Open a file, which is made where it is missing, and removed if nothing is added to it.

        Args:
            path: of the file.
            asked: another one.
            known: what may be answered there.
            retry_errors: remove lines that have errors.

        Raises:
            UserError: another process writes it, it cannot be written, or it holds something else.
        """
        with contextlib.ExitStack() as stack:
            try:
                if path.exists() and path.samefile(asked):
                    raise UserError(f"{path} is what is asked: give another file for --output.")
                file = stack.enter_context(_locked(path))
                answers = cls(path, file, known)
                if retry_errors and answers.errors:
                    answers = cls(path, stack.enter_context(_without_errors(path)), known)
            except OSError as error:
                raise UserError(f"{path} cannot be written ({reason(error)}): choose another file.") from error
            try:
                yield answers
            finally:
                if answers.is_empty:
                    path.unlink(missing_ok=True)

    @property
    def is_empty(self) -> bool:
        return os.fstat(self._file.fileno()).st_size == 0

    def add(self, prompt: Id, result: Generation | Exception) -> None:
        """Write an answer, or why there is none; raises `UserError` where that cannot be done."""
        fields = {"error": _sentence(result)} if isinstance(result, Exception) else answer_fields(result)
        line = json.dumps({"id": prompt, **fields}).encode() + b"\n"
        try:
            _write(self._file, line)
        except OSError as error:
            raise UserError(
                f"{self.path} cannot be written ({reason(error)}): make room, and start again to go on."
            ) from error
        self.ids.add(prompt)
        self.errors += isinstance(result, Exception)

    def _read(self, known: Collection[Id]) -> None:
        """Note what is answered, and drop a last line that was not written whole."""
        whole = 0
        with self.path.open("rb") as file:
            for number, line in enumerate(file, 1):
                where = f"line {number} of {self.path}"
                if not line.endswith(b"\n"):
                    if not line.startswith(_BEGINNING[: len(line)]) or _is_json(line):
                        _answered(line, where)
                    break
                prompt, is_error = _answered(line, where)
                if prompt not in known:
                    raise UserError(
                        f"{where} answers {shown(prompt)}, which is not asked: give the prompts it was begun with, "
                        "or another file."
                    )
                if prompt in self.ids:
                    raise UserError(f"{where} answers {shown(prompt)} again: remove one of the lines.")
                self.ids.add(prompt)
                self.errors += is_error
                whole += len(line)
        if self._file.seek(0, os.SEEK_END) > whole:
            self._file.truncate(whole)


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _answered(line: bytes, where: str) -> tuple[Id, bool]:
    """What a line answers, and whether with an error."""
    from pascalvl.runtime.prompt_folder import read_object

    expected = "the answers of an earlier start, or choose another file"
    data = read_object(line.decode(errors="replace"), where, expected)
    prompt = data.get("id")
    if not (isinstance(prompt, str) or type(prompt) is int) or not ("answer" in data or "error" in data):
        raise UserError(f"{where} is no answer: expected {expected}.")
    return prompt, "error" in data


def _sentence(error: Exception) -> str:
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, MemoryError):
        return f"there is not enough memory{_named(error)}: give a smaller --max-pixels."
    if isinstance(error, OSError):
        return f"{error.filename or 'a file'} cannot be read: {error.strerror or error}."
    raise error


def _named(error: MemoryError) -> str:
    return f" ({error})" if str(error) else ""


def _locked(path: Path) -> io.FileIO:
    """A file to add to, which no other process has; for errors see `_Answers.open`."""
    while True:
        file = io.FileIO(path, "a+")
        try:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise OSError("it is no regular file")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(
                    f"another process adds answers to {path}: wait for its end, or choose another file."
                ) from None
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                    return file
        except BaseException:
            file.close()
            raise
        file.close()  # another process has removed or replaced it since it was opened


def _without_errors(path: Path) -> io.FileIO:
    """Replace a file, which is locked, by one without its lines that have errors, which is locked, too."""
    path = Path(os.path.realpath(path))
    partial = path.with_name(f".{path.name}.partial")
    partial.unlink(missing_ok=True)
    file = io.FileIO(partial, "a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
        shutil.copymode(path, partial)
        with path.open("rb") as lines:
            for line in lines:
                if not _answered(line, str(path))[1]:
                    _write(file, line)
        partial.replace(path)
    except BaseException:
        file.close()
        partial.unlink(missing_ok=True)
        raise
    return file


def _write(file: io.FileIO, data: bytes) -> None:
    while data:
        data = data[file.write(data) or 0 :]


# How far it is --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _progress(answers: _Answers, total: int) -> Iterator[Callable[[int], None]]:
    """Show how far answers are; what it gives takes the tokens of each."""
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn

    columns = BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[figures]}"), TimeRemainingColumn()
    before, start, tokens = len(answers.ids), time.monotonic(), 0
    latest = start
    if before:
        notice(f"[{before} of {total} are in {answers.path} already]")

    def figures() -> str:
        rate = f"{tokens / max(time.monotonic() - start, 1e-9):.1f} tokens/s"
        return f"{answers.errors} with errors, {rate}" if answers.errors else rate

    def add(more: int) -> None:
        nonlocal tokens, latest
        tokens += more
        now, done = time.monotonic(), len(answers.ids)
        bars.update(task, completed=done, figures=figures())
        if not shows_progress() and now - latest >= _SECONDS_BETWEEN_NOTICES:
            left = (now - start) / (done - before) * (total - done)
            notice(f"{done} of {total}, {figures()}, about {left:.0f} s left")
            latest = now

    with progress_bars(TextColumn("{task.description}"), *columns) as bars:
        task = bars.add_task("answering", total=total, completed=before, figures="")
        yield add
    done = len(answers.ids) - before
    notice(f"{done} prompts in {time.monotonic() - start:.1f} s, {tokens} new tokens, {figures()}")

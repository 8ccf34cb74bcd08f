"""Answers: `run` and `chat`."""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import shutil
import sys
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pascalvl.plugins.errors import UserError, shown
from pascalvl.runtime.cli.argument_types import STANDARD_OUTPUT
from pascalvl.runtime.cli.common import check_cache, check_json, fail, model_with_cache, notice, write_json
from pascalvl.runtime.cli.sources import engine_bundle

if TYPE_CHECKING:
    from pascalvl.runtime.generation import Generation
    from pascalvl.runtime.grammar import Grammar
    from pascalvl.runtime.idle import Idle
    from pascalvl.runtime.model import VisionLanguageModel
    from pascalvl.runtime.sampling import SamplingParams

_COMMANDS = {
    "/image PATH": "ask the next question about a picture, too",
    "/video PATH": "ask it about a video or a folder of pictures, too",
    "/drop": "leave out the picture or video that was given last",
    "/reset": "begin a new conversation",
    "/help": "tell what there is to write",
    "/exit": "leave, as Ctrl-D does; Ctrl-C stops an answer, and drops a line that was begun",
}
CHAT_COMMANDS = ", ".join(_COMMANDS)


def given_sampling(args: argparse.Namespace) -> dict[str, Any]:
    """The sampling options on the command line; raises `UserError` for values out of range, before any work."""
    from pascalvl.runtime.sampling import SamplingParams

    names = SamplingParams.__dataclass_fields__
    given = {name: value for name, value in vars(args).items() if name in names}
    SamplingParams(**given)
    return given


def sampling_params(model: VisionLanguageModel, given: dict[str, Any]) -> SamplingParams:
    """What was given, and the rest as the model's authors set it; raises `UserError` for what has no effect."""
    import dataclasses

    sampling = dataclasses.replace(model.generation_config.sampling, **given)
    without_effect = [name for name in ("top_k", "top_p", "min_p", "seed") if name in given]
    if sampling.temperature == 0 and without_effect:
        option = "--" + without_effect[0].replace("_", "-")
        raise UserError(
            f"{option} has no effect at temperature 0, which takes the likeliest token: give --temperature."
        )
    return sampling


def given_grammar(args: argparse.Namespace) -> Grammar | None:
    """What the answer has to be by the command line; raises `UserError` for what cannot be used, before any work."""
    from pascalvl.plugins.bundle import read_json
    from pascalvl.runtime.grammar import Grammar

    if args.json_schema:
        return Grammar.json_schema(read_json(args.json_schema, "give a file with a JSON schema"))
    return None if args.regex is None else Grammar.regex(args.regex)


def run(args: argparse.Namespace) -> int:
    """Run `pascalvl run`; returns the exit code."""
    if args.batch:
        from pascalvl.runtime.cli.batch import run_batch

        return run_batch(args)
    for name in ("output", "at_once", "retry_errors"):
        if getattr(args, name) is not None:
            raise UserError(f"--{name.replace('_', '-')} is for many prompts: leave it out, or give --batch.")
    if args.prompt is None:
        raise UserError("the following arguments are required: -p/--prompt; see 'pascalvl run --help'.")
    check_json(args.json)
    given, grammar = given_sampling(args), given_grammar(args)
    messages = [*system_messages(args), user_message(load_visuals(args), args.prompt)]
    check_cache(args)
    args.bundle = engine_bundle(args)
    with model_with_cache(args) as model:
        sampling = sampling_params(model, given)
        generation = model.generate(messages, sampling, args.max_new_tokens, args.stop, grammar=grammar)
        for piece in generation:
            if args.json != STANDARD_OUTPUT:
                print(piece, end="", flush=True)
        if args.json != STANDARD_OUTPUT:
            print()
        notice(_summary(generation))
        if args.json:
            write_json(args.json, _answered(generation, model))
    return 0


def chat(args: argparse.Namespace) -> int:
    """Run `pascalvl chat`; returns the exit code."""
    from pascalvl.runtime.idle import Idle

    given = given_sampling(args)
    check_cache(args)
    args.bundle = engine_bundle(args)
    with model_with_cache(args) as model, Idle(model, args.unload_after) as idle:
        _talk(args, sampling_params(model, given), model, idle)
    return 0


def _talk(args: argparse.Namespace, sampling: SamplingParams, model: VisionLanguageModel, idle: Idle) -> None:
    """Answer lines from the standard input until they end."""
    interactive = sys.stdin.isatty()
    if interactive:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - input() then edits lines
        notice(f"Write a line, or {CHAT_COMMANDS}.")
    messages = system_messages(args)
    visuals: list[tuple[str, Any]] = []
    while (line := _read_line("> " if interactive else "")) is not None:
        word, _, rest = line.strip().partition(" ")
        try:
            if word == "/exit":
                break
            elif word == "/help":
                print(_help(), file=sys.stderr)
            elif word == "/reset":
                messages, visuals = system_messages(args), []
            elif word in ("/image", "/video"):
                visuals.append(_shown(word[1:], _typed_path(rest), args.fps, model))
            elif word == "/drop":
                dropped = f"the {visuals.pop()[0]} is dropped" if visuals else "there is none to drop"
                notice(f"[{dropped}; {len(visuals)} for the next question]")
            elif word.startswith("/"):
                raise UserError(f"unknown command {word}: expected {CHAT_COMMANDS}.")
            elif word:
                asked = [*messages, user_message(visuals, line.strip())]
                with idle.busy():
                    answer = _answer(model, asked, sampling, args.max_new_tokens, args.stop)
                if answer:
                    messages, visuals = [*asked, {"role": "assistant", "content": answer}], []
        except UserError as error:
            if not interactive:
                raise
            fail(f"error: {error}")
        except KeyboardInterrupt:
            if not interactive:
                raise
            print()


def _help() -> str:
    """What can be written, in lines that fit the terminal."""
    indent = " " * (max(map(len, _COMMANDS)) + 2)
    width = shutil.get_terminal_size().columns - 1
    return "\n".join(
        textwrap.fill(meaning, width, initial_indent=command.ljust(len(indent)), subsequent_indent=indent)
        for command, meaning in _COMMANDS.items()
    )


def _answer(model: VisionLanguageModel, *request: Any) -> str:
    """Print an answer as it comes; returns as much of it as came before an interrupt."""
    text = ""
    try:
        generation = model.generate(*request)
        if generation.load_seconds:
            notice(f"[the model was loaded again, in {generation.load_seconds:.1f} s]")
        for piece in generation:
            text += piece
            print(piece, end="", flush=True)
        print()
    except KeyboardInterrupt:
        print(" [stopped]")
    return text


def _read_line(prompt: str) -> str | None:
    """A line of the standard input, or None at its end; Ctrl-C at a prompt drops the line that was begun."""
    while True:
        try:
            return input(prompt)
        except EOFError:
            if prompt:
                print()
            return None
        except KeyboardInterrupt:
            if not prompt:
                raise
            print()


def _typed_path(text: str) -> str:
    """A path as people type it, spaces and all, or as a shell or a terminal that it is dropped on quotes it."""
    text = text.strip()
    if not os.path.exists(os.path.expanduser(text)):
        with contextlib.suppress(ValueError):  # a quotation mark that nothing closes is part of the name
            words = shlex.split(text)
            text = words[0] if len(words) == 1 else text
    return os.path.expanduser(text)


def _shown(kind: str, path: str, fps: float | None, model: VisionLanguageModel) -> tuple[str, Any]:
    """Read a picture or video and tell what it is; raises `UserError` if nothing can be asked about it."""
    _, visual = loaded = load_visual(kind, path, fps)
    tokens = len(model.prompt([user_message([loaded], "")]).visuals[0].token_indices)
    size = f"{visual.width}x{visual.height} pixels" if kind == "image" else f"{len(visual.frames)} frames"
    notice(f"[{shown(path)}: {size}, {tokens} tokens]")
    return loaded


def system_messages(args: argparse.Namespace) -> list[dict[str, Any]]:
    """What comes before the conversation."""
    return [] if args.system is None else [{"role": "system", "content": args.system}]


def load_visuals(args: argparse.Namespace) -> list[tuple[str, Any]]:
    """Pictures and videos of the command line, with their kinds."""
    if args.fps is not None and not any(kind == "video" and os.path.isdir(path) for kind, path in args.visuals):
        raise UserError("--fps is for folders of pictures, and no --video names one: leave it out, or give a folder.")
    return [load_visual(kind, path, args.fps) for kind, path in args.visuals]


def load_visual(kind: str, path: str, fps: float | None) -> tuple[str, Any]:
    """Read a picture or video at once, so that one that cannot be used is known before any work."""
    from pascalvl.runtime.image import load_image
    from pascalvl.runtime.video import load_video

    return kind, load_image(path) if kind == "image" else load_video(path, fps)


def user_message(visuals: Sequence[tuple[str, Any]], text: str) -> dict[str, Any]:
    """A message of what `load_visuals` gave and a text."""
    parts = [{"type": kind, kind: visual} for kind, visual in visuals]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


def _summary(generation: Generation) -> str:
    count = len(generation.token_ids)
    rate = generation.tokens_per_second
    speed = "" if rate is None else f" ({rate:.1f} tokens/s)"
    reused = f" ({generation.reused_tokens} of them cached)" if generation.reused_tokens else ""
    seconds = generation.vision_seconds + generation.prefill_seconds
    reason = generation.finish_reason.value if generation.finish_reason else "nothing"
    return (
        f"{generation.prompt_tokens} prompt tokens{reused} in {seconds:.2f} s, "
        f"{count} new in {generation.decode_seconds:.2f} s{speed}; ended by {reason}"
    )


def _answered(generation: Generation, model: VisionLanguageModel) -> dict[str, Any]:
    """An answer and its figures, for JSON."""
    return {
        **answer_fields(generation),
        "tokens_per_second": generation.tokens_per_second,
        "backend": model.manifest.backend["name"],
        "model": model.manifest.source["name"],
    }


def answer_fields(generation: Generation) -> dict[str, Any]:
    """An answer, why it ended and what it took, for JSON."""
    return {
        "answer": generation.text,
        "finish_reason": generation.finish_reason and generation.finish_reason.value,
        "usage": {
            "prompt_tokens": generation.prompt_tokens,
            "cached_tokens": generation.reused_tokens,
            "new_tokens": len(generation.token_ids),
        },
        "seconds": {
            "vision": generation.vision_seconds,
            "prefill": generation.prefill_seconds,
            "decode": generation.decode_seconds,
        },
    }

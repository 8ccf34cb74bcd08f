"""Commands and their arguments."""

from __future__ import annotations

import argparse
import functools
import shutil
import textwrap
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from pascalvl.plugins.errors import UserError
from pascalvl.runtime.cli.argument_types import (
    AUTO,
    STANDARD_OUTPUT,
    cache_config,
    counts,
    duration,
    gigabytes,
    json_file,
    names,
    own_path,
    unicode_text,
    weight_config,
    weights_or_auto,
)
from pascalvl.runtime.cli.convert import build, export
from pascalvl.runtime.cli.doctor import doctor
from pascalvl.runtime.cli.judge import evaluate, validate
from pascalvl.runtime.cli.look import inspect
from pascalvl.runtime.cli.serve import KEY_VARIABLE, serve
from pascalvl.runtime.cli.sources import path_or_name
from pascalvl.runtime.cli.talk import CHAT_COMMANDS, chat, run
from pascalvl.runtime.cli.timing import bench_kernels, bench_many, bench_model, bench_server

_WEIGHTS = "w4, w8, f16 or f32[,group=INPUTS][,lm_head=FORMAT][,vision=FORMAT][,layer.FIRST-LAST=FORMAT]"
_OF_THE_HUB = "ORG/NAME[@REVISION] of the Hugging Face hub"


class _Parser(argparse.ArgumentParser):
    """Reports bad arguments as every other bad input is: in one sentence, without the usage."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see '{self.prog} --help'.")

    def format_help(self) -> str:
        """Argparse indents a usage by the command's name, for which a narrow terminal has no room."""
        width = shutil.get_terminal_size().columns
        return "".join(
            line if len(line) <= width + 1 else f"{textwrap.indent(textwrap.fill(line.strip(), width - 2), '  ')}\n"
            for line in super().format_help().splitlines(keepends=True)
        )


class _Version(argparse.Action):
    """Tells the version that is installed, which is looked up only then."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        from importlib import metadata

        try:
            found = metadata.version("pascalvl")
        except metadata.PackageNotFoundError:
            found = "of a folder that is not installed"
        print(f"pascalvl {found}")
        parser.exit()


class _Completion(argparse.Action):
    """Prints a shell's script for completion; shtab, which makes it, is loaded only then."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: Any, shell: Any, option_string: Any = None
    ) -> NoReturn:
        try:
            import shtab
        except ModuleNotFoundError:
            raise UserError("the package shtab is not installed: pip install 'shtab>=1.7,<2'.") from None
        for action in _all_actions(parser):
            if action.metavar in (*_FILES, *_FOLDERS):
                vars(action)["complete"] = shtab.FILE if action.metavar in _FILES else shtab.DIRECTORY
        print(shtab.complete(parser, shell))
        parser.exit()


_FILES = "FILE", "PATH"
_FOLDERS = "DIR", "CHECKPOINT", "MODEL", "MODEL_BUNDLE", "ENGINE_BUNDLE", "BUNDLE"
"""What arguments that are completed as paths are called."""


def _all_actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Arguments of a parser and of its commands."""
    for action in parser._actions:
        yield action
        for command in action.choices.values() if isinstance(action, argparse._SubParsersAction) else ():
            yield from _all_actions(command)


def command_parser() -> argparse.ArgumentParser:
    """The command's; a parsed command has its function, ``command``, and the extras that it ``needs``."""
    parser = _Parser("pascalvl", description="Qwen3-VL on NVIDIA Pascal, and on machines without a card.")
    parser.add_argument("--version", action=_Version, nargs=0, help="tell the version and exit")
    parser.add_argument(
        "--print-completion",
        action=_Completion,
        choices=("bash", "zsh", "tcsh"),
        help="print a script that lets this shell complete commands, options and paths, and exit",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(
        name: str, run: Callable[[argparse.Namespace], int], needs: str, description: str, among: Any = commands
    ) -> _Parser:
        sub = among.add_parser(name, help=description, description=f"{description[0].upper()}{description[1:]}.")
        sub.set_defaults(command=run, needs=needs)
        loudness = sub.add_mutually_exclusive_group()
        loudness.add_argument("--verbose", action="store_true", help="log what is done, and where errors come from")
        loudness.add_argument("--quiet", action="store_true", help="tell nothing but results and errors")
        return sub

    sub = command("export", export, "export", "checkpoint to model bundle")
    sub.add_argument(
        "checkpoint",
        type=path_or_name,
        metavar="CHECKPOINT",
        help=f"folder of a Hugging Face Qwen3-VL model, or {_OF_THE_HUB}, which is downloaded if what is here is older",
    )
    _add_output(sub)
    meaning = "for timings: random weights in the shape of Qwen3-VL-SIZE (2B, 4B, 8B, 32B); CHECKPOINT, of any size, "
    sub.add_argument("--random", metavar="SIZE", help=f"{meaning}gives the tokenizer and the processors")
    sub.add_argument("--layers", type=int, metavar="N", help="with --random: decoder layers (as published)")
    _add_kv(sub, "the KV cache it is for, of which the rank (rv) is made now, and the rest by 'build'")
    meaning = "how weights are stored (f32, or as the checkpoint has them in codes of 4 bits)"
    of_auto = f"{AUTO}: the most exact of w4, w8, f16 and f32 for which the card here has room"
    sub.add_argument("--weights", type=weights_or_auto, metavar="CONFIG", help=f"{meaning}: {_WEIGHTS}; {of_auto}")
    sub.add_argument(
        "--calibrate",
        type=own_path,
        metavar="DIR",
        help="folder of prompts and pictures, as the model will be asked, to fit keys and values to the cache by",
    )

    sub = command("build", build, "engines", "model bundle to engine bundle")
    sub.add_argument("bundle", type=own_path, metavar="MODEL_BUNDLE", help="folder written by 'pascalvl export'")
    _add_output(sub)
    _add_backend(sub, "what runs the engines; auto: the fastest that can be used here")
    _add_kv(sub, "what the KV cache is like (k8v8)")
    _add_tensorrt(sub)

    sub = command("run", run, "", "answer one prompt, or many")
    _add_model(sub)
    sub.add_argument("-p", "--prompt", type=unicode_text, metavar="TEXT", help="what to ask")
    _add_visuals(sub)
    _add_generation(sub)
    answer = sub.add_mutually_exclusive_group()
    answer.add_argument(
        "--json-schema", type=own_path, metavar="FILE", help="have the answer be JSON that is valid by the schema there"
    )
    answer.add_argument(
        "--regex", type=unicode_text, metavar="TEXT", help="have all of the answer match this expression"
    )
    _add_cache(sub)
    _add_json(sub, "the answer and its figures")
    _add_batch(sub)

    sub = command("chat", chat, "", f"talk to the model: lines of text, or {CHAT_COMMANDS}")
    _add_model(sub)
    _add_fps(sub)
    _add_generation(sub)
    _add_cache(sub)
    sub.add_argument(
        "--unload-after",
        type=duration,
        metavar="TIME",
        help="give the GPU back when nothing was asked for so long, such as 90s, 10m or 2h, until something is",
    )

    sub = command("serve", serve, "serve", "answer over HTTP, as OpenAI's interface has it")
    _add_model(sub)
    _add_server(sub)
    _add_cache(sub)

    sub = command("validate", validate, "engines,export", "compare the engines with the PyTorch model")
    _add_engine(sub)
    sub.add_argument(
        "--reference", type=own_path, required=True, metavar="CHECKPOINT", help="the checkpoint that was exported"
    )
    sub.add_argument(
        "--prompt", type=unicode_text, metavar="TEXT", help="compare on this prompt, not the built-in ones"
    )
    _add_visuals(sub)
    sub.add_argument("--bisect", action="store_true", help="compare every layer, and name the first that deviates")
    _add_json(sub, "what was compared")

    sub = command("eval", evaluate, "export,dev", "what compressed caches or weights do to a model's answers")
    sub.add_argument("what", choices=["kv", "weights"], help="formats of the KV cache, or of the weights")
    sub.add_argument("checkpoint", type=own_path, metavar="CHECKPOINT", help="folder of a Hugging Face Qwen3-VL model")
    sub.add_argument("--data", type=own_path, required=True, metavar="DIR", help="folder of prompts and pictures")
    sub.add_argument(
        "--calibrate", type=own_path, metavar="DIR", help="fit the formats by this folder of other prompts"
    )
    for name, kind in (("kv", cache_config), ("weights", weight_config)):
        meaning = f"eval {name}: a format to measure; can be repeated (several)"
        sub.add_argument(f"--{name}", type=kind, action="append", metavar="CONFIG", help=meaning)
    sub.add_argument("--no-baselines", action="store_true", help="leave out llama.cpp's formats, and parts of ours")
    _add_json(sub)
    sub.add_argument("--plot", type=own_path, metavar="FILE", help="eval kv: draw divergence against bytes there (PNG)")

    help_of_bench = "how fast a model answers, or its kernels are"
    bench = commands.add_parser("bench", help=help_of_bench, description=f"{help_of_bench.capitalize()}.")
    measured = bench.add_subparsers(required=True, metavar="WHAT")
    sub = command("model", bench_model, "", "time prompts, answers and a picture", measured)
    _add_engine(sub)
    _add_bench(sub)
    sub = command("many", bench_many, "", "time requests that are answered at once, as they would come", measured)
    _add_engine(sub)
    for name, form, meaning in (
        ("streams", "N", "answers that are written at once, up to 8 (8)"),
        ("depth", "N", "tokens of each one's prompt (4096)"),
        ("steps", "N", "tokens of each answer that are timed (200)"),
        ("arriving", "N", "tokens of a prompt that comes while the others write; 0: none (4096)"),
        ("picture", "SIDE", "side of a square picture, in pixels; 0: none (1024)"),
    ):
        sub.add_argument(f"--{name}", type=int, default=argparse.SUPPRESS, metavar=form, help=meaning)
    _add_json(sub)
    sub = command("server", bench_server, "", "time answers of a server, as its clients see them", measured)
    meaning = f"where its API is, such as http://127.0.0.1:8000/v1; a key it asks for is taken from {KEY_VARIABLE}"
    sub.add_argument("url", type=unicode_text, metavar="URL", help=meaning)
    for name, meaning in (
        ("clients", "that ask at once (8)"),
        ("requests", "of each client, one after the other (2)"),
        ("words", "of each prompt (500)"),
        ("tokens", "of each answer at most (256)"),
    ):
        sub.add_argument(f"--{name}", type=int, default=argparse.SUPPRESS, metavar="N", help=meaning)
    _add_json(sub)
    for what in ("attention", "linear"):
        sub = command(what, bench_kernels, "export,dev", f"check and time the kernels of {what} on a GPU", measured)
        sub.set_defaults(what=what)
        sub.add_argument("--quick", action="store_true", help="only check small shapes, for compute-sanitizer")
        _add_json(sub)

    sub = command("inspect", inspect, "", "what a bundle is, and the memory it needs")
    sub.add_argument("bundle", type=own_path, metavar="BUNDLE", help="folder of a model or engine bundle")
    _add_kv(sub, "tell of this KV cache")
    sub.add_argument(
        "--memory", type=float, action="append", metavar="GB", help="tell the longest context that fits in so much"
    )
    _add_json(sub, "all of it")

    sub = command("doctor", doctor, "", "which backends run on this machine, and what the others lack")
    sub.add_argument("--engine", type=own_path, metavar="ENGINE_BUNDLE", help="tell whether this bundle runs here")
    _add_json(sub, "what was found")
    meaning = "write there, in Markdown, what an issue needs: versions, card, what was found; with --engine figures"
    sub.add_argument("--report", type=own_path, metavar="FILE", help=meaning)
    return parser


def _add_output(parser: _Parser) -> None:
    parser.add_argument("--output", type=own_path, required=True, metavar="DIR", help="folder to write")


def _add_backend(parser: _Parser, meaning: str) -> None:
    parser.add_argument("--backend", default="auto", metavar="NAME", help=meaning)


def _add_kv(parser: argparse.ArgumentParser, meaning: str) -> None:
    forms = "k8v8, k8v4, k4v4, f16 or f32[,rv=RANK][,window=SINKS+LENGTH][,pin=image]..."
    parser.add_argument("--kv", type=cache_config, metavar="CONFIG", help=f"{meaning}: {forms}")


def _add_tensorrt(parser: _Parser) -> None:
    group = parser.add_argument_group("tensorrt", "for --backend tensorrt alone")
    for name, kind, form, meaning in (
        ("prefill-chunk", int, "N", "tokens of a prompt that one call takes at most (512)"),
        ("max-pixels", int, "N", "area of the largest picture (1048576)"),
        ("max-context", int, "N", "tokens of prompt and answer together, at most (32768)"),
        (
            "timing-cache",
            own_path,
            "FILE",
            "where the times of kernels are kept for later builds (in the cache folder)",
        ),
        ("tactic-sources", names, "A,B", "libraries whose kernels are tried (as TensorRT has it)"),
        ("preview-features", names, "A,B", "features to enable, the others being disabled (what suits the card)"),
    ):
        group.add_argument(f"--{name}", type=kind, default=argparse.SUPPRESS, metavar=form, help=meaning)


def _add_model(parser: _Parser) -> None:
    parser.add_argument(
        "bundle",
        type=path_or_name,
        metavar="MODEL",
        help=f"folder written by 'pascalvl build'; or a model bundle, a checkpoint or {_OF_THE_HUB}, of which an "
        "engine bundle is made on first use, in the cache folder, and taken from there later, without a network",
    )
    _add_backend(
        parser, "backend the bundle must be for, or is made for; auto: any, or the fastest that can be used here"
    )
    _add_run(parser, "as the engines were built, with another window; or what they are made for (k8v8)")
    meaning = "how weights are stored in a bundle that is made"
    of_auto = f"{AUTO} (the default): the most exact for which the card, or without one this machine, has room"
    parser.add_argument("--weights", type=weights_or_auto, metavar="CONFIG", help=f"{meaning}: {_WEIGHTS}; {of_auto}")
    parser.add_argument(
        "--refresh",
        action="store_true",
        help=f"of {_OF_THE_HUB}: ask the hub for a newer commit than the one that was taken first",
    )


def _add_engine(parser: _Parser) -> None:
    parser.add_argument("bundle", type=own_path, metavar="ENGINE_BUNDLE", help="folder written by 'pascalvl build'")
    _add_backend(parser, "backend the bundle must be for; auto: any")
    _add_run(parser, "as the engines were built, with another window")


def _add_run(parser: _Parser, meaning_of_kv: str) -> None:
    parser.add_argument("--context", type=int, metavar="N", help="tokens of prompt and answer together, at most")
    _add_kv(parser, meaning_of_kv)
    parser.add_argument("--max-pixels", type=int, metavar="N", help="resize larger pictures to this area")
    parser.add_argument(
        "--control-tokens-in-text",
        action="store_true",
        help="take what reads as a control token in a prompt, such as <|im_end|>, as that token; else it is text alone",
    )


def _visual(kind: str, path: str) -> tuple[str, str]:
    return kind, path


def _add_visuals(parser: _Parser) -> None:
    for kind, meaning in (("image", "picture file"), ("video", "video file or folder of pictures")):
        parser.add_argument(
            *(["-i"] if kind == "image" else []),
            f"--{kind}",
            type=functools.partial(_visual, kind),
            action="append",
            dest="visuals",
            default=[],
            metavar="PATH",
            help=f"{meaning} to ask about; may be given several times",
        )
    _add_fps(parser)


def _add_fps(parser: _Parser) -> None:
    meaning = "pictures a second of folders that are videos, which are taken in the order of the numbers in their names"
    parser.add_argument("--fps", type=float, metavar="X", help=f"{meaning} (24); other videos have times of their own")


def _add_batch(parser: _Parser) -> None:
    group = parser.add_argument_group("many prompts", "one that was ended goes on where it was with the same command")
    meaning = "a folder, of which each picture is asked the prompt, or a .jsonl file with a prompt a line"
    group.add_argument("--batch", type=own_path, metavar="PATH", help=meaning)
    group.add_argument(
        "--output", type=own_path, metavar="FILE", help="the .jsonl file to which answers are added as they come"
    )
    meaning = "prompts that are answered at once, for whose whole contexts the KV cache then has room (8)"
    group.add_argument("--at-once", type=int, metavar="N", help=meaning)
    meaning = "ask again what the output has errors of, and not answers"
    group.add_argument("--retry-errors", action="store_true", default=None, help=meaning)


def _add_cache(parser: _Parser) -> None:
    meaning = "keep the KV cache there: what a later prompt shares with these, as a picture, is not computed again"
    parser.add_argument("--cache", type=own_path, metavar="DIR", help=meaning)
    meaning = "what files there take at most; those that were not used the longest go first (4)"
    parser.add_argument("--cache-gb", type=gigabytes, metavar="X", default=4.0, help=meaning)


def _add_server(parser: _Parser) -> None:
    parser.add_argument("--host", default="127.0.0.1", metavar="HOST", help="address to listen at (127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, metavar="N", help="port; 0: one that is free (8000)")
    repeated: dict[str, Any] = {"action": "append", "default": [], "type": unicode_text}
    meaning = "what clients call the model; may be given several times (as its checkpoint)"
    parser.add_argument("--served-model-name", **repeated, metavar="NAME", help=meaning)
    group = parser.add_argument_group("who may ask")
    meaning = f"a key that clients need; may be given several times, and in {KEY_VARIABLE}, which others do not see"
    group.add_argument("--api-key", **repeated, metavar="KEY", help=meaning)
    group.add_argument("--api-key-file", type=own_path, metavar="FILE", help="a file with a key a line")
    meaning = "web pages there may ask, from browsers; may be given several times; *: all"
    group.add_argument("--allow-origin", **repeated, metavar="URL", help=meaning)
    meaning = "share what is computed of prompts and pictures between API keys, too, which its time can tell"
    group.add_argument("--shared-prefixes", action="store_true", help=meaning)
    group = parser.add_argument_group("how much")
    group.add_argument("--queue", type=int, default=64, metavar="N", help="answers that wait at most (64)")
    meaning = "whole contexts that the KV cache has room for; of shorter ones up to 8 run at once (1)"
    group.add_argument("--sequences", type=int, default=1, metavar="N", help=meaning)
    meaning = "processes that answer, each with a GPU, or a share of the cores, and all of this, of its own (1)"
    group.add_argument("--replicas", type=int, default=1, metavar="N", help=meaning)
    meaning = "give the GPU back when nothing was asked for so long, such as 90s, 10m or 2h, until something is"
    group.add_argument("--unload-after", type=duration, metavar="TIME", help=meaning)
    meaning = "how long answers may go on when the server is to end (60s)"
    group.add_argument("--drain", type=duration, default=60.0, metavar="TIME", help=meaning)
    group = parser.add_argument_group("pictures and videos", "in data: URLs, and from where is allowed here")
    meaning = "fetch http(s) URLs of this host; may be given several times (none)"
    group.add_argument("--allow-media-domain", **repeated, metavar="HOST", help=meaning)
    group.add_argument("--media-root", type=own_path, metavar="DIR", help="read files below this folder (none)")
    for name, number, meaning in (
        ("max-body", 48, "megabytes of a request, and of each file"),
        ("max-pictures", 16, "pictures and videos of a request"),
        ("max-picture-pixels", 50_000_000, "pixels of a picture as it comes"),
        ("max-frames", 3600, "frames of a video as it comes"),
    ):
        group.add_argument(f"--{name}", type=int, default=number, metavar="N", help=f"{meaning}, at most ({number})")


def _add_bench(parser: argparse.ArgumentParser) -> None:
    for name, kind, form, meaning in (
        ("depths", counts, "N,N", "tokens that the KV cache holds before (0,4096,16384)"),
        ("prefill", int, "N", "tokens of the prompt that is timed (512)"),
        ("decode", int, "N", "tokens of the answer that is timed (64)"),
        ("follow-ups", counts, "N,N", "tokens of further questions, until the first new token (8,20)"),
        ("batch", counts, "N,N", "sequences that decode together, each behind that many tokens (1)"),
        ("picture", int, "SIDE", "side of a square picture, in pixels; 0: none (1024)"),
        ("repeats", int, "N", "how often each is run, after once to warm up; figures are medians (10)"),
    ):
        parser.add_argument(f"--{name}", type=kind, default=argparse.SUPPRESS, metavar=form, help=meaning)
    _add_json(parser)


def _add_json(parser: argparse.ArgumentParser, what: str = "the figures") -> None:
    meaning = f"write {what} there as JSON; {STANDARD_OUTPUT}: to standard output, and nothing else"
    parser.add_argument("--json", type=json_file, metavar="FILE", help=meaning)


def _add_generation(parser: _Parser) -> None:
    parser.add_argument(
        "--system", type=unicode_text, metavar="TEXT", help="instructions that come before the conversation"
    )
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="tokens of an answer at most")
    parser.add_argument(
        "--stop", type=unicode_text, action="append", default=[], metavar="STR", help="text to end before"
    )
    sampling = parser.add_argument_group("sampling", "what is not given is as the model's authors set it")
    for name, kind, meaning in (
        ("temperature", float, "randomness; 0 always takes the likeliest token"),
        ("top-k", int, "choose among the K likeliest tokens; 0: all"),
        ("top-p", float, "choose among the likeliest tokens that together have probability P"),
        ("min-p", float, "choose among tokens at least P times as likely as the likeliest"),
        ("repetition-penalty", float, "above 1 makes tokens that were there before less likely"),
        ("presence-penalty", float, "above 0 makes tokens that the answer has less likely"),
        ("frequency-penalty", float, "above 0 makes tokens less likely each time that the answer has them"),
        ("seed", int, "the same seed gives the same answer"),
    ):
        sampling.add_argument(f"--{name}", type=kind, default=argparse.SUPPRESS, metavar="X", help=meaning)

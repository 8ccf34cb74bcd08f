"""The command `pascalvl`."""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import os
import re
import shutil
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from pascalvl.plugins.errors import UserError, shown

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from pascalvl.runtime.generation import Generation
    from pascalvl.runtime.idle import Idle
    from pascalvl.runtime.model import VisionLanguageModel
    from pascalvl.runtime.prompt_folder import PromptCase
    from pascalvl.runtime.sampling import SamplingParams

log = logging.getLogger(__name__)

_FINDING = 1
_USER_ERROR = 2
_RETRY_SECONDS = 0.05
_CARDS = (6.0, 8.0, 11.0, 24.0)
"""Gigabytes of the Pascal cards that there are."""
_CALIBRATION_PIXELS = 1 << 20
"""Area that larger pictures are resized to: more says nothing new about keys and values."""
_OWN_ANSWER_TOKENS = 64
"""Tokens of an answer that the model gives itself where an evaluation has none."""
_TABLE_WIDTH = 110
"""Of figures that are of no use where they are cut off."""
_AUTO = "auto"
_REFERENCE_WEIGHTS = {
    True: "which read the weights itself",
    False: "with weights that PascalVL read for it, of which a wrong reading does not show here",
}
"""What a validation's reference is, by whether transformers reads the checkpoint itself."""
_CHAT_COMMANDS = "/image PATH, /video PATH, /reset, /exit"


class _Terminated(BaseException):
    """SIGTERM or SIGHUP came."""


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Let SIGTERM and SIGHUP clean up as Ctrl-C does, and none of them come up where it does harm.

    During an import it would abort the process in native code, or leave a module in pieces; during the removal of a
    folder it would leave the rest. It is then tried again a moment later. Native code that it came up in may have
    turned it into another error, which then is not told.
    """
    latest = signal.SIGINT
    came_up = False

    def interruption() -> type[BaseException]:
        return KeyboardInterrupt if latest == signal.SIGINT else _Terminated

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal latest, came_up
        latest = latest if number == signal.SIGALRM else number
        while frame is not None:
            code, frame = frame.f_code, frame.f_back
            if code.co_filename.startswith("<frozen importlib") or code is shutil.rmtree.__code__:
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

    0: done; 1: `validate` found a deviation, or `doctor` what keeps the tensorrt backend from running; 2: something the
    user can put right, told in one sentence on stderr.
    """
    _open_closed_streams()
    try:
        for stream in (sys.stdin, sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="replace")
        args = _parser().parse_args(argv)
        logging.basicConfig(level=logging.DEBUG if args.verbose else logging.WARNING, format="%(name)s: %(message)s")
        if not args.verbose:
            # What other libraries warn of is nothing that the user can put right.
            warnings.simplefilter("ignore")
            os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        with _interruptible():
            code = args.command(args)
            sys.stdout.flush()
        return code
    except UserError as error:
        return _fail(f"error: {error}")
    except KeyboardInterrupt:
        return _fail("interrupted; nothing was left half-written")
    except _Terminated:
        return _fail("terminated; nothing was left half-written")
    except BrokenPipeError:
        # The reader has what it wants. Python flushes stdout at exit: let that not fail too.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except MemoryError as error:
        what = f" ({error})" if str(error) else ""
        return _fail(f"error: there is not enough memory{what}: give a smaller --context or --max-pixels.")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("pascalvl"):
            raise
        return _fail(f"error: the package {error.name} is not installed: pip install 'pascalvl[{args.needs}]'.")
    except OSError as error:
        return _fail(f"error: {error.filename or 'a file'} cannot be read or written: {error.strerror or error}.")


def _fail(sentence: str) -> int:
    log.debug("the error comes from here", exc_info=True)
    with contextlib.suppress(OSError):  # nobody can be told
        print(f"pascalvl: {' '.join(sentence.split())}", file=sys.stderr)
    return _USER_ERROR


# Arguments ------------------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """Reports bad arguments as every other bad input is: in one sentence, without the usage."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see '{self.prog} --help'.")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser("pascalvl", description="Qwen3-VL on NVIDIA Pascal, and on machines without a card.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(
        name: str, run: Callable[[argparse.Namespace], int], needs: str, description: str, among: Any = commands
    ) -> _Parser:
        sub = among.add_parser(name, help=description, description=f"{description[0].upper()}{description[1:]}.")
        sub.set_defaults(command=run, needs=needs)
        sub.add_argument("--verbose", action="store_true", help="log what is done, and where errors come from")
        return sub

    sub = command("export", _export, "export,runtime", "checkpoint to model bundle")
    sub.add_argument("checkpoint", type=_path, metavar="CHECKPOINT", help="folder of a Hugging Face Qwen3-VL model")
    _add_output(sub)
    meaning = "for timings: random weights in the shape of Qwen3-VL-SIZE (2B, 4B, 8B, 32B); CHECKPOINT, of any size, "
    sub.add_argument("--random", metavar="SIZE", help=f"{meaning}gives the tokenizer and the processors")
    sub.add_argument("--layers", type=int, metavar="N", help="with --random: decoder layers (as published)")
    _add_kv(sub, "the KV cache it is for, of which the rank (rv) is made now, and the rest by 'build'")
    forms = "w4, w8, f16 or f32[,group=INPUTS][,lm_head=FORMAT][,vision=FORMAT][,layer.FIRST-LAST=FORMAT]"
    meaning = "how weights are stored (f32, or as the checkpoint has them in codes of 4 bits)"
    forms += f"; {_AUTO}: the most exact of w4, w8, f16 and f32 for which the card here has room"
    sub.add_argument("--weights", type=_weights_or_auto, metavar="CONFIG", help=f"{meaning}: {forms}")
    sub.add_argument(
        "--calibrate",
        type=_path,
        metavar="DIR",
        help="folder of prompts and pictures, as the model will be asked, to fit keys and values to the cache by",
    )

    sub = command("build", _build, "engines", "model bundle to engine bundle")
    sub.add_argument("bundle", type=_path, metavar="MODEL_BUNDLE", help="folder written by 'pascalvl export'")
    _add_output(sub)
    _add_backend(sub, "what runs the engines; auto: the fastest that can be used here")
    _add_kv(sub, "what the KV cache is like (k8v8)")
    _add_tensorrt(sub)

    sub = command("run", _run, "runtime", "answer one prompt")
    _add_engine(sub)
    sub.add_argument("--prompt", type=_text, required=True, metavar="TEXT", help="what to ask")
    _add_visuals(sub)
    _add_generation(sub)
    sub.add_argument(
        "--cache",
        type=_path,
        metavar="FILE",
        help="keep the KV cache there: what a later prompt shares with this one, as a picture, is not computed again",
    )

    sub = command("chat", _chat, "runtime", f"talk to the model: lines of text, or {_CHAT_COMMANDS}")
    _add_engine(sub)
    _add_fps(sub)
    _add_generation(sub)
    sub.add_argument(
        "--unload-after",
        type=_duration,
        metavar="TIME",
        help="give the GPU back when nothing was asked for so long, such as 90s, 10m or 2h, until something is",
    )

    sub = command("validate", _validate, "engines,export,runtime", "compare the engines with the PyTorch model")
    _add_engine(sub)
    sub.add_argument(
        "--reference", type=_path, required=True, metavar="CHECKPOINT", help="the checkpoint that was exported"
    )
    sub.add_argument("--prompt", type=_text, metavar="TEXT", help="compare on this prompt, not the built-in ones")
    _add_visuals(sub)
    sub.add_argument("--bisect", action="store_true", help="compare every layer, and name the first that deviates")

    sub = command("eval", _evaluate, "export,runtime,dev", "what compressed caches or weights do to a model's answers")
    sub.add_argument("what", choices=["kv", "weights"], help="formats of the KV cache, or of the weights")
    sub.add_argument("checkpoint", type=_path, metavar="CHECKPOINT", help="folder of a Hugging Face Qwen3-VL model")
    sub.add_argument("--data", type=_path, required=True, metavar="DIR", help="folder of prompts and pictures")
    sub.add_argument("--calibrate", type=_path, metavar="DIR", help="fit the formats by this folder of other prompts")
    for name, kind in (("kv", _cache), ("weights", _weights)):
        meaning = f"eval {name}: a format to measure; can be repeated (several)"
        sub.add_argument(f"--{name}", type=kind, action="append", metavar="CONFIG", help=meaning)
    sub.add_argument("--no-baselines", action="store_true", help="leave out llama.cpp's formats, and parts of ours")
    _add_json(sub)
    sub.add_argument("--plot", type=_path, metavar="FILE", help="eval kv: draw divergence against bytes there (PNG)")

    help_of_bench = "how fast a model answers, or its kernels are"
    bench = commands.add_parser("bench", help=help_of_bench, description=f"{help_of_bench.capitalize()}.")
    measured = bench.add_subparsers(required=True, metavar="WHAT")
    sub = command("model", _bench_model, "runtime", "time prompts, answers and a picture", measured)
    _add_engine(sub)
    _add_bench(sub)
    for what in ("attention", "linear"):
        sub = command(what, _bench_kernels, "export,dev", f"check and time the kernels of {what} on a GPU", measured)
        sub.set_defaults(what=what)
        sub.add_argument("--quick", action="store_true", help="only check small shapes, for compute-sanitizer")
        _add_json(sub)

    sub = command("inspect", _inspect, "runtime", "what a bundle is, and the memory it needs")
    sub.add_argument("bundle", type=_path, metavar="BUNDLE", help="folder of a model or engine bundle")
    _add_kv(sub, "tell of this KV cache")
    sub.add_argument(
        "--memory", type=float, action="append", metavar="GB", help="tell the longest context that fits in so much"
    )

    sub = command("doctor", _doctor, "runtime", "what the tensorrt backend needs, and what this machine has of it")
    sub.add_argument("--engine", type=_path, metavar="ENGINE_BUNDLE", help="check whether this bundle runs here, too")
    return parser


def _add_output(parser: _Parser) -> None:
    parser.add_argument("--output", type=_path, required=True, metavar="DIR", help="folder to write")


def _add_backend(parser: _Parser, meaning: str) -> None:
    parser.add_argument("--backend", default="auto", metavar="NAME", help=meaning)


def _add_kv(parser: argparse.ArgumentParser, meaning: str) -> None:
    forms = "k8v8, k8v4, k4v4, f16 or f32[,rv=RANK][,window=SINKS+LENGTH][,pin=image]..."
    parser.add_argument("--kv", type=_cache, metavar="CONFIG", help=f"{meaning}: {forms}")


def _add_tensorrt(parser: _Parser) -> None:
    group = parser.add_argument_group("tensorrt", "for --backend tensorrt alone")
    for name, kind, form, meaning in (
        ("prefill-chunk", int, "N", "tokens of a prompt that one call takes at most (512)"),
        ("max-pixels", int, "N", "area of the largest picture (1048576)"),
        ("max-context", int, "N", "tokens of prompt and answer together, at most (32768)"),
        ("timing-cache", _path, "FILE", "where the times of kernels are kept for later builds (in the cache folder)"),
        ("tactic-sources", _names, "A,B", "libraries whose kernels are tried (as TensorRT has it)"),
        ("preview-features", _names, "A,B", "features to enable, the others being disabled (what suits the card)"),
    ):
        group.add_argument(f"--{name}", type=kind, default=argparse.SUPPRESS, metavar=form, help=meaning)


def _add_engine(parser: _Parser) -> None:
    parser.add_argument("bundle", type=_path, metavar="ENGINE_BUNDLE", help="folder written by 'pascalvl build'")
    _add_backend(parser, "backend the bundle must be for; auto: any")
    parser.add_argument("--context", type=int, metavar="N", help="tokens of prompt and answer together, at most")
    _add_kv(parser, "as the engines were built, with another window")
    parser.add_argument("--max-pixels", type=int, metavar="N", help="resize larger pictures to this area")
    parser.add_argument(
        "--control-tokens-in-text",
        action="store_true",
        help="take what reads as a control token in a prompt, such as <|im_end|>, as that token; else it is text alone",
    )


def _add_visuals(parser: _Parser) -> None:
    for kind, meaning in (("image", "picture file"), ("video", "video file or folder of pictures")):
        parser.add_argument(
            f"--{kind}",
            type=lambda path, kind=kind: (kind, path),
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


def _add_bench(parser: argparse.ArgumentParser) -> None:
    for name, kind, form, meaning in (
        ("depths", _counts, "N,N", "tokens that the KV cache holds before (0,4096,16384)"),
        ("prefill", int, "N", "tokens of the prompt that is timed (512)"),
        ("decode", int, "N", "tokens of the answer that is timed (64)"),
        ("follow-ups", _counts, "N,N", "tokens of further questions, until the first new token (8,20)"),
        ("batch", _counts, "N,N", "sequences that decode together, each behind that many tokens (1)"),
        ("picture", int, "SIDE", "side of a square picture, in pixels; 0: none (1024)"),
        ("repeats", int, "N", "how often each is run, after once to warm up; figures are medians (10)"),
    ):
        parser.add_argument(f"--{name}", type=kind, default=argparse.SUPPRESS, metavar=form, help=meaning)
    _add_json(parser)


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=_path, metavar="FILE", help="write the figures there")


def _add_generation(parser: _Parser) -> None:
    parser.add_argument("--system", type=_text, metavar="TEXT", help="instructions that come before the conversation")
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="tokens of an answer at most")
    parser.add_argument("--stop", type=_text, action="append", default=[], metavar="STR", help="text to end before")
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


def _text(argument: str) -> str:
    try:
        argument.encode()
    except UnicodeEncodeError:
        raise UserError(f"expected text in UTF-8, found {shown(argument.encode(errors='surrogateescape'))}.") from None
    return argument


def _path(argument: str) -> Path:
    """A folder of ours: its path, unlike a picture's, goes through libraries that take UTF-8 alone."""
    _text(os.path.abspath(argument))
    return Path(argument)


def _names(argument: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in argument.split(",") if name.strip())


def _counts(argument: str) -> tuple[int, ...]:
    parts = [part.strip() for part in argument.split(",")]
    if not all(part.isascii() and part.isdecimal() and len(part) < 10 for part in parts):
        raise UserError(f"expected whole numbers with commas between them, such as 0,4096, found {shown(argument)}.")
    return tuple(dict.fromkeys(map(int, parts)))


def _duration(argument: str) -> float:
    """Seconds."""
    found = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)([smh])", argument, re.ASCII)
    if not found:
        raise UserError(f"expected a time such as 90s, 10m or 2h, found {shown(argument)}.")
    return float(found[1]) * {"s": 1, "m": 60, "h": 3600}[found[2]]


def _cache(text: str) -> Any:
    from pascalvl.plugins.kv_format import CacheConfig

    return CacheConfig.parse(text)


def _weights(text: str) -> Any:
    from pascalvl.plugins.weight_format import WeightConfig

    return WeightConfig.parse(text)


def _weights_or_auto(text: str) -> Any:
    return text if text == _AUTO else _weights(text)


def _given_sampling(args: argparse.Namespace) -> dict[str, Any]:
    """The sampling options on the command line; raises `UserError` for values out of range, before any work."""
    from pascalvl.runtime.sampling import SamplingParams

    names = SamplingParams.__dataclass_fields__
    given = {name: value for name, value in vars(args).items() if name in names}
    SamplingParams(**given)
    return given


def _sampling(model: VisionLanguageModel, given: dict[str, Any]) -> SamplingParams:
    import dataclasses

    sampling = dataclasses.replace(model.generation_config.sampling, **given)
    without_effect = [name for name in ("top_k", "top_p", "min_p", "seed") if name in given]
    if sampling.temperature == 0 and without_effect:
        option = "--" + without_effect[0].replace("_", "-")
        raise UserError(
            f"{option} has no effect at temperature 0, which takes the likeliest token: give --temperature."
        )
    return sampling


# Commands -------------------------------------------------------------------------------------------------------------


def _export(args: argparse.Namespace) -> int:
    from pascalvl.export import export_checkpoint

    if args.random is not None:
        return _export_random(args)
    if args.layers is not None:
        raise UserError("--layers is for random weights: leave it out, or give --random.")
    weights = _fitting_weights(args) if args.weights == _AUTO else args.weights
    options = {name: value for name, value in (("cache", args.kv), ("weights", weights)) if value}
    if args.calibrate:
        from pascalvl.runtime.prompt_folder import read_prompts

        cases = read_prompts(args.calibrate)
        options["calibration"] = lambda directory, config: _calibration_prompts(cases, directory, config)
    _report(args.output, export_checkpoint(args.checkpoint, args.output, _check_host_files, **options))
    return 0


def _export_random(args: argparse.Namespace) -> int:
    from pascalvl.export.random_export import export_random

    if args.calibrate:
        raise UserError("random weights are fitted to no prompts: leave out --calibrate or --random.")
    if args.weights == _AUTO:
        raise UserError("random weights are of one format: give --weights w4, w8, f16 or f32.")
    options = {name: value for name, value in (("cache", args.kv), ("weights", args.weights)) if value}
    files = args.checkpoint, args.output, _check_host_files
    _report(args.output, export_random(args.random, *files, **options, layers=args.layers))
    return 0


def _fitting_weights(args: argparse.Namespace) -> Any:
    """The weights that the card here has room for; says which and why."""
    from pascalvl.engines.device.gpu import find_gpu
    from pascalvl.export.weight_size import fitting_weights
    from pascalvl.plugins.kv_format import CacheConfig
    from pascalvl.runtime.model import DEFAULT_CONTEXT_LENGTH

    try:
        gpu = find_gpu()
    except UserError as error:
        raise UserError(
            f"--weights auto asks the card how much room it has, and {str(error).rstrip('.')}; or give a format, for "
            "example --weights w4 (make: W=w4)."
        ) from error
    fitting = fitting_weights(
        args.checkpoint, gpu.name, gpu.total_memory, args.kv or CacheConfig(), DEFAULT_CONTEXT_LENGTH
    )
    print(f"weights: {fitting.reason}")
    return fitting.weights


def _calibration_prompts(cases: Sequence[PromptCase], directory: Path, config: Any) -> list[Any]:
    from pascalvl.export.calibration import CalibrationPrompt, CalibrationVisual
    from pascalvl.runtime.prompt import PromptBuilder

    prompts = PromptBuilder(directory, config, _CALIBRATION_PIXELS)
    return [
        CalibrationPrompt(
            prompt.token_ids,
            [CalibrationVisual(v.patches.pixel_values, v.patches.grid, v.patches.is_video) for v in prompt.visuals],
        )
        for prompt in (prompts.build(case.messages) for case in cases)
    ]


def _check_host_files(directory: Path, config: Any) -> None:
    """Raise `UserError` unless the runtime can make a prompt of every kind with a bundle's files."""
    from PIL import Image

    from pascalvl.plugins.bundle import GENERATION_CONFIG
    from pascalvl.runtime.generation import GenerationConfig
    from pascalvl.runtime.prompt import PromptBuilder
    from pascalvl.runtime.video import Video

    GenerationConfig.from_file(directory / GENERATION_CONFIG)
    picture = Image.new("RGB", (64, 64))
    visuals = [("image", picture), ("video", Video([picture] * 4, 2.0))]
    system = {"role": "system", "content": "Answer."}
    PromptBuilder(directory, config).build([system, _user_message(visuals, "What is it?")])


def _build(args: argparse.Namespace) -> int:
    from pascalvl.engines import BuildOptions, build

    given = {name: value for name, value in vars(args).items() if name in BuildOptions.__dataclass_fields__}
    options = BuildOptions(**given) if given else None
    told: list[str] = []
    _report(args.output, build(args.bundle, args.output, args.backend, args.kv, options, told.append))
    print(*told, sep="\n", end="\n" if told else "")
    return 0


def _report(output: Path, manifest: Any) -> None:
    megabytes = sum(file["bytes"] for file in manifest.files.values()) / 1e6
    print(f"{output}: {manifest.kind} bundle of {manifest.source['name']}, {megabytes:.0f} MB")


def _run(args: argparse.Namespace) -> int:
    from pascalvl.runtime.kv_cache import check_writable

    given = _given_sampling(args)
    messages = [*_system(args), _user_message(_load_visuals(args), args.prompt)]
    if args.cache:
        check_writable(args.cache)
    model = _open(args)
    sampling = _sampling(model, given)
    if args.cache and args.cache.exists():
        model.load_cache(args.cache)
    generation = model.generate(messages, sampling, args.max_new_tokens, args.stop)
    for piece in generation:
        print(piece, end="", flush=True)
    print()
    print(_summary(generation), file=sys.stderr)
    if args.cache:
        model.save_cache(args.cache)
    return 0


def _chat(args: argparse.Namespace) -> int:
    from pascalvl.runtime.idle import Idle

    given = _given_sampling(args)
    model = _open(args)
    sampling = _sampling(model, given)
    with Idle(model, args.unload_after) as idle:
        _talk(args, sampling, model, idle)
    return 0


def _talk(args: argparse.Namespace, sampling: SamplingParams, model: VisionLanguageModel, idle: Idle) -> None:
    """Answer lines from the standard input until they end."""
    interactive = sys.stdin.isatty()
    if interactive:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - input() then edits lines
        print(f"Write a line, or {_CHAT_COMMANDS}.", file=sys.stderr)
    messages, visuals = _system(args), []
    while (line := _read_line("> " if interactive else "")) is not None:
        word, _, rest = line.strip().partition(" ")
        try:
            if word == "/exit":
                break
            elif word == "/reset":
                messages, visuals = _system(args), []
            elif word in ("/image", "/video"):
                visuals.append(_load(word[1:], os.path.expanduser(rest.strip()), args.fps))
            elif word.startswith("/"):
                raise UserError(f"unknown command {word}: expected {_CHAT_COMMANDS}.")
            elif word:
                asked = [*messages, _user_message(visuals, line.strip())]
                with idle.busy():
                    answer = _answer(model, asked, sampling, args.max_new_tokens, args.stop)
                if answer:
                    messages, visuals = [*asked, {"role": "assistant", "content": answer}], []
        except UserError as error:
            if not interactive:
                raise
            _fail(f"error: {error}")


def _answer(model: VisionLanguageModel, *request: Any) -> str:
    """Print an answer as it comes; returns as much of it as came before an interrupt."""
    text = ""
    try:
        generation = model.generate(*request)
        if generation.load_seconds:
            print(f"[the model was loaded again, in {generation.load_seconds:.1f} s]", file=sys.stderr)
        for piece in generation:
            text += piece
            print(piece, end="", flush=True)
        print()
    except KeyboardInterrupt:
        print(" [stopped]")
    return text


def _read_line(prompt: str) -> str | None:
    try:
        return input(prompt)
    except EOFError:
        return None


def _validate(args: argparse.Namespace) -> int:
    from rich.table import Table

    from pascalvl.engines import validation
    from pascalvl.engines.tolerance import tolerance, vision_tolerance
    from pascalvl.export.checkpoint import Checkpoint

    requests = _validation_requests(args)
    with Checkpoint(args.reference) as checkpoint:
        digest, is_read_by_transformers = checkpoint.digest(), checkpoint.is_read_by_transformers
    model = _open(args, marked_layers=args.bisect)
    if digest != (exported := model.manifest.source)["sha256"]:
        raise UserError(
            f"{args.bundle} was not made from {args.reference} but from another checkpoint, {exported['name']}: give "
            "that as --reference."
        )
    prompts = []
    for name, messages in requests.items():
        prompt = model.prompt(messages)
        patches = [visual.patches for visual in prompt.visuals]
        visuals = [validation.VisualInput(p.pixel_values, p.grid, p.is_video) for p in patches]
        prompts.append(validation.ValidationPrompt(name, prompt.token_ids, visuals))
    conversations = list(requests.values())
    rows = validation.validate(
        args.reference,
        lambda index, forced: model.trace(conversations[index], forced),
        prompts,
        tolerance(model.cache_config, model.config, model.manifest.weights),
        allowed_of_vision=vision_tolerance(model.manifest.weights),
        name=model.manifest.backend["name"],
    )
    table = Table("output", "prompt", "largest error", "tolerance", "", title="worst of each output")
    for row in validation.summarise(rows):
        error, tolerance = f"{row.max_error:.2e}", f"{row.tolerance:.2e}"
        table.add_row(row.output, row.prompt, error, tolerance, "ok" if row.passed else "DEVIATES")
    failed = sum(not row.passed for row in rows)
    console = _console()
    console.print(table)
    console.print(f"{len(rows)} outputs compared, {failed} out of tolerance")
    console.print(f"reference: Hugging Face's model in float32, {_REFERENCE_WEIGHTS[is_read_by_transformers]}")
    if args.bisect and (first := validation.first_deviation(rows)):
        console.print(f"the first to deviate is {first.output}, of prompt {first.prompt!r}")
    return _FINDING if failed else 0


def _validation_requests(args: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Conversations by name: the user's, or some of every kind."""
    if args.prompt is not None or args.visuals or args.fps is not None:
        return {"given": [_user_message(_load_visuals(args), args.prompt or "Describe what you see.")]}
    import numpy as np
    from PIL import Image

    from pascalvl.runtime.video import Video

    def picture(width: int, height: int, turn: float = 0.0) -> Image.Image:
        """Rings of changing colour, whose details are of all sizes."""
        y, x = np.mgrid[:height, :width] / 24.0
        phase = np.hypot(x - 2, y - 3)[..., None] ** 1.5 + np.array([0, 2, 4]) + turn
        return Image.fromarray((127.5 + 127.5 * np.sin(phase)).astype(np.uint8))

    clip = Video([picture(128, 96, turn / 4) for turn in range(8)], 2.0)
    first = _user_message([("image", picture(300, 200))], "What is in the picture?")
    return {
        "text": [_user_message([], "Why is the sky blue?")],
        "picture": [first],
        "pictures": [_user_message([("image", picture(90, 210)), ("image", picture(256, 128, 1))], "Compare them.")],
        "video": [_user_message([("video", clip)], "What happens?")],
        "turns": [first, {"role": "assistant", "content": "Rings."}, _user_message([], "Which colours have they?")],
    }


def _evaluate(args: argparse.Namespace) -> int:
    import dataclasses
    import json
    import tempfile

    from rich.console import Console
    from rich.progress import Progress

    from pascalvl.export.checkpoint import Checkpoint
    from pascalvl.runtime.prompt_folder import read_prompts

    if args.plot:
        import matplotlib  # noqa: F401 - missing: said before the work
    for other in {"kv", "weights"} - {args.what}:
        if getattr(args, other) or (args.plot and other == "kv"):
            option = f"--{other}" if getattr(args, other) else "--plot"
            raise UserError(f"{option} is not for 'eval {args.what}': leave it out, or give 'eval {other}'.")
    cases = read_prompts(args.data)
    learned = read_prompts(args.calibrate) if args.calibrate else []
    console = Console(stderr=True)
    with (
        Progress(console=console, transient=True, disable=not console.is_terminal) as progress,
        tempfile.TemporaryDirectory() as folder,
    ):
        with Checkpoint(args.checkpoint) as checkpoint:
            checkpoint.copy_host_files(Path(folder))
            config = checkpoint.model_config()
        calibration = _calibration_prompts(learned, Path(folder), config) if learned else None
        prompts = _evaluation_prompts(args.checkpoint, cases, Path(folder), config, progress)
        run = _evaluate_cache if args.what == "kv" else _evaluate_weights
        results, tables = run(args, config, prompts, calibration, progress)
    console = _console()
    console.width = max(console.width, _TABLE_WIDTH)
    console.print(*tables)
    if args.json:
        figures = json.dumps([dataclasses.asdict(row) for row in results], indent=1)
        _write_whole(args.json, lambda path: path.write_text(figures + "\n", encoding="utf-8"))
    if args.plot:
        from pascalvl.export import kv_evaluation

        _write_whole(args.plot, lambda path: kv_evaluation.plot(results, path))
    return 0


def _evaluate_cache(
    args: argparse.Namespace, config: Any, prompts: list[Any], calibration: list[Any] | None, progress: Any
) -> tuple[list[Any], list[Any]]:
    """Results of formats of the KV cache, and tables of them."""
    from pascalvl.export import kv_evaluation
    from pascalvl.export.calibration import calibrate
    from pascalvl.export.kv_times import LENGTH
    from pascalvl.plugins.kv_format import CacheConfig

    formats = args.kv or [CacheConfig.parse(text) for text in kv_evaluation.DEFAULT_FORMATS]
    statistics = None
    if calibration:
        task = progress.add_task("calibrating", total=config.text.num_hidden_layers)
        statistics = calibrate(args.checkpoint, calibration, lambda: progress.advance(task))
    baselines = not args.no_baselines
    task = progress.add_task("evaluating", total=len(prompts) * kv_evaluation.passes(formats, baselines))
    results = kv_evaluation.evaluate(
        args.checkpoint, prompts, formats, statistics, baselines, lambda: progress.advance(task)
    )
    first, timed = results[0], results[0].decode_us is not None
    times = ["append us", f"decode {LENGTH:,} us"] if timed else []
    table = _figures(
        f"{first.positions} positions of text, {first.answer_positions} of them of answers",
        ("KV cache", "bytes", *_SUMMARY, *times),
    )
    for row in results:
        times = ["" if us is None else f"{us:.1f}" for us in (row.append_us, row.decode_us)] if timed else []
        table.add_row(row.name, f"{row.bytes_per_token:g}", *_summary_cells(row), *times)
    return results, [table]


def _evaluate_weights(
    args: argparse.Namespace, config: Any, prompts: list[Any], calibration: list[Any] | None, progress: Any
) -> tuple[list[Any], list[Any]]:
    """Results of formats of the weights, and a table of them."""
    from pascalvl.export import weight_evaluation
    from pascalvl.plugins.weight_format import WeightConfig

    formats = args.weights or [WeightConfig.parse(text) for text in weight_evaluation.DEFAULT_FORMATS]
    baselines = not args.no_baselines
    passes = weight_evaluation.passes(formats, calibration is not None, baselines)
    task = progress.add_task("evaluating", total=len(prompts) * passes)
    results = weight_evaluation.evaluate(
        args.checkpoint, prompts, formats, calibration, baselines, lambda: progress.advance(task)
    )
    first = results[0]
    table = _figures(
        f"{first.positions} positions of text, {first.answer_positions} of them of answers",
        ("weights", "MB", *_SUMMARY),
    )
    for row in results:
        table.add_row(row.name, f"{row.nbytes / 1e6:.1f}", *_summary_cells(row))
    return results, [table]


_SUMMARY = "KL", "KL 99.9%", "top-1", "perplexity", "answers: KL", "top-1", "right"


def _summary_cells(row: Any) -> list[str]:
    """The cells of `_SUMMARY`, of a `pascalvl.export.evaluation.Summary`."""
    right = "" if row.right is None else f"{row.right:.2%}"
    figures = [f"{row.kl:.2e}", f"{row.kl_999:.2e}", f"{row.top_1:.2%}", f"{row.perplexity:.5g}"]
    return [*figures, f"{row.answer_kl:.2e}", f"{row.answer_top_1:.2%}", right]


def _figures(title: str, headings: Sequence[str]) -> Any:
    """A table whose first column is names."""
    from rich.table import Table

    table = Table(title=title)
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="right" if i else "left", no_wrap=True)
    return table


def _bench_model(args: argparse.Namespace) -> int:
    import dataclasses
    import json

    from rich.console import Console
    from rich.progress import Progress

    from pascalvl.plugins.bundle import Manifest
    from pascalvl.runtime import bench

    given = {name: value for name, value in vars(args).items() if name in bench.BenchOptions.__dataclass_fields__}
    options = bench.BenchOptions(**given)
    if args.context is None:
        args.context = options.context(Manifest.read(args.bundle, "engine").model)
    model = _open(args)
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("measuring", total=bench.count_runs(options, model))
        result = bench.measure(model, options, lambda what: progress.update(task, advance=1, description=what))
    console = _console()
    console.width = max(console.width, _TABLE_WIDTH)
    console.print(*bench.tables(result), sep="\n")
    if args.json:
        figures = json.dumps(dataclasses.asdict(result), indent=1)
        _write_whole(args.json, lambda path: path.write_text(figures + "\n", encoding="utf-8"))
    return 0


def _bench_kernels(args: argparse.Namespace) -> int:
    import importlib

    import torch

    if not torch.cuda.is_available():
        raise UserError("the kernels are timed on a GPU, and PyTorch finds none here that it can use.")
    module = importlib.import_module(f"pascalvl.plugins.bench.{args.what}")
    options = ["--quick"] * args.quick + (["--json", str(args.json)] if args.json else [])
    return module.main(options)


def _evaluation_prompts(
    checkpoint: Path, cases: Sequence[PromptCase], directory: Path, config: Any, progress: Any
) -> list[Any]:
    """Conversations with the answers that the folder gives, or else the model's own."""
    import numpy as np

    from pascalvl.export import kv_evaluation
    from pascalvl.plugins.bundle import GENERATION_CONFIG
    from pascalvl.runtime.generation import GenerationConfig
    from pascalvl.runtime.prompt import PromptBuilder

    builder = PromptBuilder(directory, config, _CALIBRATION_PIXELS)
    eos = GenerationConfig.from_file(directory / GENERATION_CONFIG).eos_token_ids
    model, prompts = None, []
    task = progress.add_task("reading prompts", total=len(cases))
    for case, prompt in zip(cases, _calibration_prompts(cases, directory, config), strict=True):
        if case.answer is None:
            model = model or kv_evaluation.load(checkpoint)
            answer = kv_evaluation.greedy_answer(model, prompt, eos, _OWN_ANSWER_TOKENS)
        else:
            whole = builder.build([*case.messages, {"role": "assistant", "content": case.answer}]).token_ids
            rest = whole[len(prompt.token_ids) :]
            ends = np.flatnonzero(np.isin(rest, list(eos)))
            if not np.array_equal(whole[: len(prompt.token_ids)], prompt.token_ids) or not len(ends):
                raise UserError(f"the chat template has no place for the answer to {case.name}: leave the answer out.")
            answer = rest[: ends[0] + 1]
        prompts.append(kv_evaluation.EvaluationPrompt(prompt, answer, case.answer is not None, case.name))
        progress.advance(task)
    return prompts


def _write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file under another name, then give it its own."""
    partial = path.with_name(f".{path.name}.partial{path.suffix}")
    try:
        write(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _inspect(args: argparse.Namespace) -> int:
    from rich.table import Table

    from pascalvl.plugins.bundle import Manifest
    from pascalvl.plugins.kv_format import CacheConfig, KVFormat
    from pascalvl.runtime.model import pinned_slots

    manifest = Manifest.read(args.bundle, "model", "engine")
    text, vision = manifest.model.text, manifest.model.vision
    caches = [CacheConfig(f) for f in KVFormat] if manifest.kind == "model" else [manifest.kv_cache]
    caches = [cache.with_rank_of(manifest.kv_cache) for cache in ([args.kv] if args.kv else caches)]
    weights = manifest.weight_bytes(*manifest.graphs)

    facts = Table.grid(padding=(0, 2))
    facts.add_row("bundle", f"{manifest.kind}, version {manifest.version}")
    facts.add_row("source", f"{manifest.source['name']} (SHA-256 {manifest.source['sha256'][:12]}…)")
    if manifest.backend:
        facts.add_row("backend", ", ".join(f"{key} {value}" for key, value in manifest.backend.items()))
    facts.add_row(
        "decoder",
        f"{text.num_hidden_layers} layers, hidden size {text.hidden_size}, {text.num_attention_heads} heads on "
        f"{text.num_key_value_heads} KV heads of {text.head_dim}, vocabulary {text.vocab_size}",
    )
    facts.add_row(
        "vision",
        f"{vision.depth} layers, hidden size {vision.hidden_size}, {vision.num_heads} heads of {vision.head_dim}, "
        f"DeepStack after layers {', '.join(map(str, vision.deepstack_visual_indexes))}",
    )
    facts.add_row("weights", f"{manifest.weights}, {weights / 1e9:.3f} GB")
    for file, table in manifest.tables.items():
        name = Path(file).stem.replace("_", " ")
        facts.add_row(name, f"{table['dtype']} {table['shape']}, mapped from their file")
    for name, graph in manifest.graphs.items():
        ops, layer = (", ".join(f"{count} {op}" for op, count in graph[of].items()) for of in ("ops", "layer_ops"))
        facts.add_row(f"{name} graph", f"opset {graph['opset']}, IR {graph['ir_version']}, {graph['plugin']}; {ops}")
        facts.add_row("", f"a layer: {layer}")
    lengths = _context_lengths(text.max_position_embeddings)
    memory = Table("KV cache", "bytes a token", title="KV cache in GB, by tokens of context")
    for length in lengths:
        memory.add_column(str(length), justify="right")
    on_gpu, rest = _memory_of_gpu(args.bundle, manifest, caches[0], lengths)
    beside = f"{weights / 1e9:.3f} GB of weights"
    if rest:
        beside += f" and {rest / 1e9:.3f} GB of what else is allocated"
    fitting = Table("KV cache", title=f"longest context beside {beside}, by the card's GB")
    for size in args.memory or _CARDS:
        fitting.add_column(f"{size:g}", justify="right")
    for cache in caches:
        gigabytes = [f"{cache.nbytes(text, length, pinned_slots(cache)) / 1e9:.3f}" for length in lengths]
        memory.add_row(str(cache), str(cache.bytes_per_token(text)), *gigabytes)
        rooms = [int(size * 1e9) - weights - rest for size in args.memory or _CARDS]
        fitting.add_row(str(cache), *(_longest_context(cache, text, pinned_slots(cache), room) for room in rooms))
    console = _console()
    console.width = max(console.width, _TABLE_WIDTH)
    console.print(facts, memory, *on_gpu, fitting)
    return 0


def _memory_of_gpu(bundle: Path, manifest: Any, cache: Any, lengths: Sequence[int]) -> tuple[list[Table | str], int]:
    """Of an engine bundle: what it takes of this machine's GPU, by tokens of context; and the most beside weights and
    cache. Nothing and 0 where that is not told."""
    from rich.table import Table

    from pascalvl.engines import device_memory
    from pascalvl.runtime.model import pinned_slots

    rows = {}
    try:
        for length in lengths:
            found = device_memory(bundle, manifest, cache.slots(length, pinned_slots(cache)))
            if found is None:
                return [], 0
            rows[str(length)] = found
    except UserError as error:
        return [f"what else is allocated is told where it can run: {error}"], 0
    table = Table("tokens of context", title="a GPU's memory in GB, beside the CUDA context with the kernels in it")
    for length in rows:
        table.add_column(length, justify="right")
    for name, field in (
        ("weights", "weights"),
        ("KV cache", "cache"),
        ("steps", "steps"),
        ("a picture of 1024x1024", "picture"),
        ("together", "total"),
    ):
        table.add_row(name, *(f"{getattr(found, field) / 1e9:.3f}" for found in rows.values()))
    return [table], max(found.steps + found.picture for found in rows.values())


def _longest_context(cache: Any, text: Any, pinned: int, room: int) -> str:
    """Tokens whose cache fits in ``room`` bytes, up to what the model was made for."""
    longest = text.max_position_embeddings
    if cache.nbytes(text, longest, pinned) <= room:
        return f"{longest} (all)"
    low, high = 0, longest  # fits, does not fit
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if cache.nbytes(text, middle, pinned) <= room else (low, middle)
    return str(low) if low else "none"


def _context_lengths(longest: int) -> list[int]:
    """1024, doubled as often as fits, and the longest."""
    return [*(1 << bits for bits in range(10, longest.bit_length()) if 1 << bits < longest), longest]


def _doctor(args: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.table import Table

    from pascalvl.engines import doctor
    from pascalvl.plugins.bundle import Manifest

    manifest = Manifest.read(args.engine, "engine") if args.engine else None
    waiting = Console(stderr=True)
    waiting.quiet = not waiting.is_terminal
    with waiting.status("looking; the plugin is compiled once, which takes a minute"):
        rows = doctor.diagnose(manifest)
    table = Table()
    for heading in ("what", "found", "state"):
        table.add_column(heading, overflow="fold")
    for row in rows:
        table.add_row(row.name, row.found, row.state.value)
    console = _console()
    console.print(table)
    for row in rows:
        if row.remedy:
            console.print(f"{row.state.value}: {row.name}: {row.remedy}", soft_wrap=True)
    missing = any(row.state is doctor.State.MISSING for row in rows)
    console.print(f"the tensorrt backend {'cannot' if missing else 'can'} run here")
    return _FINDING if missing else 0


# Parts of commands ----------------------------------------------------------------------------------------------------


def _console() -> Console:
    """Standard output for tables; a reader that goes away is left to `main`, where rich would exit with code 1."""
    from rich.console import Console

    class Output(Console):
        def on_broken_pipe(self) -> None:
            raise

    return Output(highlight=False, markup=False, emoji=False)


def _open(args: argparse.Namespace, marked_layers: bool = False) -> VisionLanguageModel:
    """Open the engine bundle, showing how far the check of its files is."""
    from rich.console import Console
    from rich.progress import Progress

    from pascalvl.plugins.bundle import Manifest
    from pascalvl.runtime.model import VisionLanguageModel

    total = sum(file["bytes"] for file in Manifest.read(args.bundle, "engine").files.values())
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("checking the bundle", total=total)
        return VisionLanguageModel.open(
            args.bundle,
            args.backend,
            args.context,
            max_pixels=args.max_pixels,
            marked_layers=marked_layers,
            progress=lambda count: progress.advance(task, count),
            cache=args.kv,
            control_tokens_in_text=args.control_tokens_in_text,
        )


def _system(args: argparse.Namespace) -> list[dict[str, Any]]:
    return [] if args.system is None else [{"role": "system", "content": args.system}]


def _load_visuals(args: argparse.Namespace) -> list[tuple[str, Any]]:
    if args.fps is not None and not any(kind == "video" and os.path.isdir(path) for kind, path in args.visuals):
        raise UserError("--fps is for folders of pictures, and no --video names one: leave it out, or give a folder.")
    return [_load(kind, path, args.fps) for kind, path in args.visuals]


def _load(kind: str, path: str, fps: float | None) -> tuple[str, Any]:
    """Read a picture or video at once, so that one that cannot be used is known before any work."""
    from pascalvl.runtime.image import load_image
    from pascalvl.runtime.video import load_video

    return kind, load_image(path) if kind == "image" else load_video(path, fps)


def _user_message(visuals: Sequence[tuple[str, Any]], text: str) -> dict[str, Any]:
    parts = [{"type": kind, kind: visual} for kind, visual in visuals]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


def _summary(generation: Generation) -> str:
    count = len(generation.token_ids)
    rate = generation.tokens_per_second
    speed = "" if rate is None else f" ({rate:.1f} tokens/s)"
    reused = f" ({generation.reused_tokens} of them cached)" if generation.reused_tokens else ""
    seconds = generation.vision_seconds + generation.prefill_seconds
    return (
        f"{generation.prompt_tokens} prompt tokens{reused} in {seconds:.2f} s, "
        f"{count} new in {generation.decode_seconds:.2f} s{speed}; ended by {generation.finish_reason.value}"
    )

"""Checkpoint to model bundle, and model bundle to engine bundle: `export` and `build`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pascalvl.plugins.errors import UserError
from pascalvl.plugins.terminal import shows_notices
from pascalvl.runtime.cli.argument_types import AUTO
from pascalvl.runtime.cli.common import report_bundle
from pascalvl.runtime.cli.sources import HubName, checkpoint_folder
from pascalvl.runtime.cli.talk import user_message

if TYPE_CHECKING:
    from pascalvl.plugins.model_config import ModelConfig
    from pascalvl.plugins.prompt import Prompt
    from pascalvl.runtime.prompt_folder import PromptCase

CALIBRATION_PIXELS = 1 << 20
"""Area that larger pictures are resized to: more says nothing new about keys and values."""


def export(args: argparse.Namespace) -> int:
    """Run `pascalvl export`; returns the exit code."""
    if args.random is not None:
        return _export_random(args)
    if args.layers is not None:
        raise UserError("--layers is for random weights: leave it out, or give --random.")
    options: dict[str, Any] = {}
    if args.calibrate:
        from pascalvl.runtime.prompt_folder import read_prompts

        cases = read_prompts(args.calibrate)
        options["calibration"] = lambda directory, config: calibration_prompts(cases, directory, config)
    checkpoint, name = checkpoint_folder(args.checkpoint, args.output, args.weights if args.weights != AUTO else None)

    from pascalvl.export import export_checkpoint

    weights = _fitting_weights(args, checkpoint) if args.weights == AUTO else args.weights
    options |= {key: value for key, value in (("cache", args.kv), ("weights", weights), ("source_name", name)) if value}
    report_bundle(args.output, export_checkpoint(checkpoint, args.output, check_host_files, **options))
    return 0


def _export_random(args: argparse.Namespace) -> int:
    from pascalvl.export.random_export import export_random

    if isinstance(args.checkpoint, HubName):
        raise UserError("--random takes the tokenizer alone of a checkpoint: give one that is in a folder.")
    if args.calibrate:
        raise UserError("random weights are fitted to no prompts: leave out --calibrate or --random.")
    if args.weights == AUTO:
        raise UserError("random weights are of one format: give --weights w4, w8, f16 or f32.")
    options = {name: value for name, value in (("cache", args.kv), ("weights", args.weights)) if value}
    files = args.checkpoint, args.output, check_host_files
    report_bundle(args.output, export_random(args.random, *files, **options, layers=args.layers))
    return 0


def _fitting_weights(args: argparse.Namespace, checkpoint: Path) -> Any:
    """The weights that the card here has room for; says which and why."""
    from pascalvl.engines.device.gpu import find_gpu
    from pascalvl.export.weight_size import fitting_weights, room_of_card
    from pascalvl.plugins.kv_format import CacheConfig
    from pascalvl.runtime.model import DEFAULT_CONTEXT_LENGTH

    try:
        gpu = find_gpu()
    except UserError as error:
        raise UserError(
            f"--weights auto asks the card how much room it has, and {str(error).rstrip('.')}; or give a format, for "
            "example --weights w4 (make: W=w4)."
        ) from error
    room = room_of_card(gpu.name, gpu.total_memory)
    fitting = fitting_weights(checkpoint, room, args.kv or CacheConfig(), DEFAULT_CONTEXT_LENGTH)
    if shows_notices():
        print(f"weights: {fitting.reason}")
    return fitting.weights


def calibration_prompts(cases: Sequence[PromptCase], directory: Path, config: ModelConfig) -> list[Prompt]:
    """What statistics for the cache are taken of, read from a folder of prompts."""
    from pascalvl.runtime.prompt import PromptBuilder

    builder = PromptBuilder(directory, config, CALIBRATION_PIXELS)
    return [builder.build(case.messages) for case in cases]


def check_host_files(directory: Path, config: Any) -> None:
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
    PromptBuilder(directory, config).build([system, user_message(visuals, "What is it?")])


def build(args: argparse.Namespace) -> int:
    """Run `pascalvl build`; returns the exit code."""
    from pascalvl.engines import BuildOptions, build

    given = {name: value for name, value in vars(args).items() if name in BuildOptions.__dataclass_fields__}
    options = BuildOptions(**given) if given else None
    told: list[str] = []
    manifest = build(args.bundle, args.output, args.backend, args.kv, options, told.append)
    report_bundle(args.output, manifest, *told)
    return 0

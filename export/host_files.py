"""The files of a checkpoint that the runtime's tokenizer and processors read, in the one form that it reads.

Transformers has written them in several: processors each in a file of its own, or, since version 5, together in
`processor_config.json`; and it goes on without some of them.
"""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import tokenizers
from transformers import GenerationConfig

from pascalvl.plugins import bundle
from pascalvl.plugins.errors import UserError, library_reason, panics, shown

log = logging.getLogger(__name__)

_TOKENIZER_CONFIG = "tokenizer_config.json"
_PROCESSORS = "processor_config.json"
_TEMPLATE_IN_JSON = "chat_template.json"
FILES_READ = (
    bundle.TOKENIZER,
    _TOKENIZER_CONFIG,
    bundle.CHAT_TEMPLATE,
    _TEMPLATE_IN_JSON,
    bundle.GENERATION_CONFIG,
    _PROCESSORS,
    bundle.IMAGE_PROCESSOR,
    bundle.VIDEO_PROCESSOR,
)
"""Those that `HostFiles` looks for beside the config; a checkpoint has most of them."""
_VIDEO_PROCESSOR_TYPE = "Qwen3VLVideoProcessor"
_ALL_FRAMES = 1 << 31
"""More frames than a video has."""


class HostFiles:
    """What a bundle's files for the host are made of.

    Args:
        directory: the checkpoint.
        config: its `config.json`.
        read_json: reads one of its files by name, or raises `UserError`.

    Raises:
        UserError: files that are missing or cannot be read, another kind of video processor, or no token that ends an
            answer.
    """

    def __init__(self, directory: Path, config: dict[str, Any], read_json: Callable[[str], dict[str, Any]]) -> None:
        self._directory = directory
        self._config = config
        self._read_json = read_json
        read_json(bundle.TOKENIZER)
        self._processors = read_json(_PROCESSORS) if self._has(_PROCESSORS) else {}
        # By the file that they are written to: the file that they are from, and what it says.
        self._settings = {
            bundle.GENERATION_CONFIG: self._generation_config(),
            bundle.IMAGE_PROCESSOR: self._image_processor(),
            bundle.VIDEO_PROCESSOR: self._video_processor(),
        }
        self._chat_template = self._find_chat_template()

    def write(self, target: Path) -> None:
        """Put them into the folder ``target``; raises `UserError` for a tokenizer that cannot be read."""
        shutil.copyfile(self._directory / bundle.TOKENIZER, target / bundle.TOKENIZER)
        self._add_tokens(target / bundle.TOKENIZER)
        for name, (_, settings) in self._settings.items():
            text = json.dumps(_with_whole_numbers(settings), indent=2)
            (target / name).write_text(text + "\n", encoding="utf-8")
        (target / bundle.CHAT_TEMPLATE).write_text(self._chat_template, encoding="utf-8")

    @contextlib.contextmanager
    def errors_name_sources(self, target: Path) -> Iterator[None]:
        """Raise `UserError` about files that were written to ``target`` as one about those that they are from."""
        try:
            yield
        except UserError as error:
            text = str(error)
            for name, (source, _) in self._settings.items():
                text = text.replace(str(target / name), str(self._directory / source))
            raise UserError(text.replace(str(target), str(self._directory))) from error

    def _has(self, name: str) -> bool:
        return (self._directory / name).exists()

    def _generation_config(self) -> tuple[str, dict[str, Any]]:
        """The file, or what transformers' `generate` takes of the model's config where there is none.

        The tokens that end an answer are the config's too where the file names none: the reference would never end.
        """
        has_file = self._has(bundle.GENERATION_CONFIG)
        settings = self._read_json(bundle.GENERATION_CONFIG) if has_file else {}
        if settings.get("eos_token_id") not in (None, []):
            return bundle.GENERATION_CONFIG, settings
        try:
            of_model = GenerationConfig.from_model_config(copy.deepcopy(self._config)).to_diff_dict()
        except Exception as error:  # many kinds, all of them about values in that file
            told = f"{type(error).__name__}: {library_reason(error)}"
            raise UserError(
                f"{self._directory} has no {bundle.GENERATION_CONFIG} with an eos_token_id, and its "
                f"{bundle.CHECKPOINT_CONFIG} does not serve instead ({told}): add the model's "
                f"{bundle.GENERATION_CONFIG}."
            ) from error
        if "eos_token_id" not in of_model:
            raise UserError(
                f"neither {bundle.GENERATION_CONFIG} nor {bundle.CHECKPOINT_CONFIG} of {self._directory} has an "
                f"eos_token_id, the token that ends an answer: add the model's {bundle.GENERATION_CONFIG}."
            )
        if has_file:
            return bundle.GENERATION_CONFIG, {**settings, "eos_token_id": of_model["eos_token_id"]}
        return bundle.CHECKPOINT_CONFIG, of_model

    def _image_processor(self) -> tuple[str, dict[str, Any]]:
        if (settings := self._of_processors("image_processor")) is not None:
            return _PROCESSORS, settings
        return bundle.IMAGE_PROCESSOR, self._read_json(bundle.IMAGE_PROCESSOR)

    def _video_processor(self) -> tuple[str, dict[str, Any]]:
        """As the runtime knows it: by its rate, or, where that is null, by its limits of frames."""
        if (settings := self._of_processors("video_processor")) is not None:
            source = _PROCESSORS
        else:
            source = bundle.VIDEO_PROCESSOR if self._has(bundle.VIDEO_PROCESSOR) else bundle.IMAGE_PROCESSOR
            settings = self._read_json(source)
        if source == bundle.IMAGE_PROCESSOR:
            log.warning(
                "%s has no %s: videos get the sizes of pictures, and Qwen3-VL's defaults for all else",
                *(self._directory, bundle.VIDEO_PROCESSOR),
            )
        if (found := settings.get("video_processor_type") or _VIDEO_PROCESSOR_TYPE) != _VIDEO_PROCESSOR_TYPE:
            raise UserError(
                f"{self._directory} reads videos with {shown(found)}: only {_VIDEO_PROCESSOR_TYPE!r} is supported."
            )
        if not settings.get("do_sample_frames", True):
            settings = {**settings, "fps": None, "num_frames": None, "min_frames": 1, "max_frames": _ALL_FRAMES}
        elif settings.get("fps", 0) is None and (count := settings.get("num_frames")) is not None:
            settings = {**settings, "num_frames": None, "min_frames": count, "max_frames": count}
        return source, {**settings, "do_sample_frames": True}

    def _of_processors(self, name: str) -> dict[str, Any] | None:
        """One processor's part of the file that has several, if it has that."""
        settings = self._processors.get(name)
        if settings is not None and not isinstance(settings, dict):
            raise UserError(
                f"expected {name} in {self._directory / _PROCESSORS} to be a JSON object, found a "
                f"{type(settings).__name__}: download the model again."
            )
        return settings

    def _add_tokens(self, path: Path) -> None:
        """Add to a copy of the tokenizer the tokens that only its config has, as transformers does when it loads it."""
        if not self._has(_TOKENIZER_CONFIG):
            return
        added = self._read_json(_TOKENIZER_CONFIG).get("added_tokens_decoder") or {}
        try:
            with panics():
                tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise UserError(
                f"{self._directory / bundle.TOKENIZER} is not a tokenizer that can be read ({library_reason(error)}): "
                "download the model again."
            ) from error
        try:
            known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
            for _, fields in sorted((int(number), dict(fields)) for number, fields in added.items()):
                if fields["content"] not in known:
                    is_special = bool(fields.pop("special", False))
                    token = tokenizers.AddedToken(**fields, special=is_special)
                    (tokenizer.add_special_tokens if is_special else tokenizer.add_tokens)([token])
        except Exception as error:  # the library raises bare Exception
            told = f"{type(error).__name__}: {library_reason(error)}"
            raise UserError(
                f"the tokens that {self._directory / _TOKENIZER_CONFIG} adds cannot be read ({told}): download the "
                "model again."
            ) from error
        if len(tokenizer.get_added_tokens_decoder()) != len(known):
            tokenizer.save(str(path))

    def _find_chat_template(self) -> str:
        """Checkpoints of different ages keep it in a file of its own, plain or JSON, or in the tokenizer's config."""
        path = self._directory / bundle.CHAT_TEMPLATE
        if path.is_file():
            try:
                return path.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise UserError(f"{path} cannot be read ({error}): download the model again.") from error
        for name in (_TEMPLATE_IN_JSON, _TOKENIZER_CONFIG):
            if self._has(name) and isinstance(template := self._read_json(name).get("chat_template"), str):
                return template
        raise UserError(f"{self._directory} has no chat template: add the model's {bundle.CHAT_TEMPLATE}.")


def _with_whole_numbers(value: Any) -> Any:
    """JSON in which whole numbers are integers, however they were written."""
    if isinstance(value, dict):
        return {key: _with_whole_numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_with_whole_numbers(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value

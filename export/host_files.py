"""The files of a checkpoint that the runtime's tokenizer and processors read."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tokenizers

from pascalvl.plugins import bundle
from pascalvl.plugins.errors import UserError

_TOKENIZER_CONFIG = "tokenizer_config.json"
_COPIED_FILES = (bundle.TOKENIZER, bundle.GENERATION_CONFIG, bundle.IMAGE_PROCESSOR, bundle.VIDEO_PROCESSOR)
"""JSON that the runtime reads as it is."""


class HostFiles:
    """What a bundle's files for the host are made of.

    Args:
        directory: the checkpoint.
        read_json: reads one of its files by name, or raises `UserError`.

    Raises:
        UserError: files that are missing or cannot be read.
    """

    def __init__(self, directory: Path, read_json: Callable[[str], dict[str, Any]]) -> None:
        self._directory = directory
        self._read_json = read_json
        for name in _COPIED_FILES:
            read_json(name)
        self._chat_template = self._find_chat_template()

    def write(self, target: Path) -> None:
        """Put them into the folder ``target``; raises `UserError` for a tokenizer that cannot be read."""
        for name in _COPIED_FILES:
            shutil.copyfile(self._directory / name, target / name)
        self._add_tokens(target / bundle.TOKENIZER)
        (target / bundle.CHAT_TEMPLATE).write_text(self._chat_template, encoding="utf-8")

    def _add_tokens(self, path: Path) -> None:
        """Add to a copy of the tokenizer the tokens that only its config has, as transformers does when it loads it."""
        if not (self._directory / _TOKENIZER_CONFIG).is_file():
            return
        added = self._read_json(_TOKENIZER_CONFIG).get("added_tokens_decoder") or {}
        try:
            tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise UserError(
                f"{self._directory / bundle.TOKENIZER} is not a tokenizer that can be read ({error}): download the "
                "model again."
            ) from error
        try:
            known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
            for _, fields in sorted((int(number), dict(fields)) for number, fields in added.items()):
                if fields["content"] not in known:
                    is_special = bool(fields.pop("special", False))
                    token = tokenizers.AddedToken(**fields, special=is_special)
                    (tokenizer.add_special_tokens if is_special else tokenizer.add_tokens)([token])
        except Exception as error:  # the library raises bare Exception
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise UserError(
                f"the tokens that {self._directory / _TOKENIZER_CONFIG} adds cannot be read ({reason}): download the "
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
        for name in ("chat_template.json", _TOKENIZER_CONFIG):
            if (self._directory / name).is_file() and isinstance(
                template := self._read_json(name).get("chat_template"), str
            ):
                return template
        raise UserError(f"{self._directory} has no chat template: add the model's {bundle.CHAT_TEMPLATE}.")

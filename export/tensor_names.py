"""Names of a checkpoint's tensors: those of transformers' model, behind what tools put before them.

A model that was saved inside another module (DataParallel, PEFT, torch.compile, FSDP, a trainer's own), or without the
one around it, has the same names but for prefixes; older transformers' and vLLM's differ in where the text model is.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from pascalvl.plugins.errors import UserError

_WRAPPERS = re.compile(r"(?<![^.])(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
"""Modules that torch puts around any other."""
_OUTER = r"(?:(?:module|base_model|model)\.)*"
_TEXT = r"(?:(?:module|base_model|model|language_model)\.)*"
_PARTS = (
    (re.compile(rf"{_OUTER}(visual\..+)"), "model."),
    (re.compile(rf"{_TEXT}((?:embed_tokens|layers|norm|rotary_emb)\..+)"), "model.language_model."),
    (re.compile(rf"{_TEXT}(lm_head\..+)"), ""),
)
_UNMERGED = re.compile(r"\.(?:base_layer|modules_to_save|original_module)\.")


def resolve(stored: Iterable[str], where: object) -> dict[str, str]:
    """Names as transformers has them, of the tensors with the names ``stored``; ``where`` is what errors call them.

    Names that are of no part of the model stay as they are.

    Raises:
        UserError: two tensors are the same one of the model, or an adapter is not merged into it.
    """
    names: dict[str, str] = {}
    for name in stored:
        if _UNMERGED.search(name):
            raise UserError(
                f"{where} holds a model with an adapter around its layers, such as {name}: merge it (merge_and_unload "
                "of PEFT) and save the model again."
            )
        if (other := names.setdefault(_resolved(name), name)) != name:
            raise UserError(
                f"{where} holds {other} and {name}, which are the same tensor of Qwen3-VL: give a checkpoint of one "
                "model."
            )
    return names


def transformers_reads(stored: str, resolved: str) -> bool:
    """Whether transformers itself resolves a name so: by adding or taking away one prefix."""
    return stored in (resolved, f"model.{resolved}", resolved.removeprefix("model."))


def _resolved(name: str) -> str:
    bare = _WRAPPERS.sub("", name)
    for pattern, prefix in _PARTS:
        if match := pattern.fullmatch(bare):
            return prefix + match[1]
    return name

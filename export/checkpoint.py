"""A Qwen3-VL checkpoint on disk, as Hugging Face writes it, read one tensor at a time."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tokenizers
import torch
from safetensors import SafetensorError, safe_open
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from pascalvl.export.attention import ATTN_IMPLEMENTATION
from pascalvl.export.stored_codes import StoredCodes
from pascalvl.plugins import bundle
from pascalvl.plugins.errors import UserError
from pascalvl.plugins.model_config import ModelConfig, TextConfig, VisionConfig

log = logging.getLogger(__name__)

_CONFIG = bundle.CHECKPOINT_CONFIG
_MODELOPT_CONFIG = "hf_quant_config.json"
_TOKENIZER_CONFIG = "tokenizer_config.json"
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_MODEL_TYPE = "qwen3_vl"
TOKEN_EMBEDDINGS = "model.language_model.embed_tokens.weight"
"""The one tensor that is in no graph, unless it is the lm_head too: the runtime looks it up on the host."""
LM_HEAD = "lm_head.weight"
TOKEN_IDS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
"""Fields of a config that are the tokenizer's."""
_FLOATS = ("F32", "F16", "BF16")
_HARMLESS = re.compile(r"(^|\.)(rotary_emb|rotary_pos_emb)\.inv_freq$")
"""Tensors that a model computes itself, which some checkpoints hold all the same."""
_ADAPTER = re.compile(r"\.lora_[a-zA-Z_]+(\.|$)")
_COPIED_FILES = (bundle.TOKENIZER, bundle.GENERATION_CONFIG, bundle.IMAGE_PROCESSOR, bundle.VIDEO_PROCESSOR)
"""JSON that the runtime reads as it is."""
_STATIC_ROPE_TYPES = ("default", "linear", "yarn", "llama3")
"""Rope types whose frequencies do not depend on the length of the prompt."""


def meta_model(config: Qwen3VLConfig) -> Qwen3VLForConditionalGeneration:
    """The Hugging Face model in float32, with the op as its attention, and without memory for its weights."""
    config._attn_implementation = ATTN_IMPLEMENTATION
    with torch.device("meta"):
        model = Qwen3VLForConditionalGeneration(config).float()
    model.tie_weights()
    return model


def model_config(config: Qwen3VLConfig) -> ModelConfig:
    """What engines and runtime need to know of a config."""
    from transformers.models.qwen3_vl import modeling_qwen3_vl as hf

    text, vision = config.text_config, config.vision_config
    text_rope, vision_rope = hf.Qwen3VLTextRotaryEmbedding(text), hf.Qwen3VLVisionRotaryEmbedding(vision)
    return ModelConfig(
        text=_take(
            TextConfig,
            text,
            mrope_section=tuple(text_rope.mrope_section),
            rope_inv_freq=tuple(text_rope.inv_freq.tolist()),
            rope_attention_scaling=float(text_rope.attention_scaling),
            key_dims=(text.head_dim,) * text.num_hidden_layers,
            value_dims=(text.head_dim,) * text.num_hidden_layers,
        ),
        vision=_take(VisionConfig, vision, rope_inv_freq=tuple(vision_rope.inv_freq.tolist())),
        **{name: getattr(config, name) for name in TOKEN_IDS},
    )


def load_model(directory: Path) -> Qwen3VLForConditionalGeneration:
    """Hugging Face's model in float32 on the CPU; of a checkpoint in codes, with the weights that they stand for."""
    with Checkpoint(directory) as checkpoint:
        if checkpoint.codes is None:
            return Qwen3VLForConditionalGeneration.from_pretrained(directory, dtype=torch.float32).eval()
        tensors = {name: checkpoint.tensor(name) for name, _ in checkpoint.meta_model().named_parameters()}
        return Qwen3VLForConditionalGeneration.from_pretrained(
            None, config=checkpoint.hf_config, state_dict=tensors, dtype=torch.float32
        ).eval()


class Checkpoint:
    """A dense Qwen3-VL checkpoint directory: its config, its tensors and the files its processor needs.

    Attributes:
        codes: its linear layers that are in codes, in place of whose weights `tensor` gives what they stand for; None:
            there are none.

    Raises:
        UserError: no such directory, another architecture, or files that are missing, truncated or do not fit.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        if not directory.is_dir():
            raise UserError(f"no checkpoint directory at {directory}: give the folder of a Qwen3-VL model.")
        self._config = self._read_json(_CONFIG)
        data = dict(self._config)
        if (found := data.get("model_type")) != _MODEL_TYPE:
            raise UserError(
                f"expected a dense Qwen3-VL checkpoint (model_type {_MODEL_TYPE!r}) in {directory}, found {found!r}: "
                "give a Qwen3-VL 2B, 4B, 8B or 32B model."
            )
        quantization = data.pop("quantization_config", None)
        if not quantization:
            self._check_modelopt()
        self.codes = StoredCodes.parse(quantization, directory, self) if quantization else None
        with self._config_errors():
            self.hf_config = Qwen3VLConfig.from_dict(data)
        for name in _COPIED_FILES:
            self._read_json(name)
        self._chat_template = self._find_chat_template()
        self._files = contextlib.ExitStack()
        self._shard_of: dict[str, Any] = {}
        for name in self._shard_names():
            shard = self._open_shard(name)
            self._shard_of.update(dict.fromkeys(shard.keys(), shard))
        self._untie_another_head()
        self._is_checked = False

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self._files.close()

    def meta_model(self) -> Qwen3VLForConditionalGeneration:
        """The model that `meta_model` makes of the config; each of its tensors is on disk, and no others are.

        Raises:
            UserError: a tensor that is missing, of another shape or of no float type, or one that no model uses.
        """
        with self._config_errors():
            model = meta_model(self.hf_config)
        if not self._is_checked:
            self._check_tensors(model)
            self._is_checked = True
        return model

    def _check_tensors(self, model: Qwen3VLForConditionalGeneration) -> None:
        used = {LM_HEAD}  # a copy of the embeddings, where it is tied to them
        for name, parameter in model.named_parameters():
            if name not in self:
                raise UserError(
                    f"{self.directory} lacks the tensor {name} ({list(parameter.shape)}): download the model again."
                )
            if (found := self.shape(name)) != list(parameter.shape):
                raise UserError(
                    f"tensor {name} of {self.directory} has shape {found}, the config says {list(parameter.shape)}: "
                    "the files belong to different models."
                )
            if layer := self._layer_in_codes(name):
                self.codes.check(layer)
                used.update(self.codes.names(layer))
            elif (kind := self._shard_of[name].get_slice(name).get_dtype()) not in _FLOATS:
                raise UserError(
                    f"tensor {name} of {self.directory} has type {kind}, expected {', '.join(_FLOATS)}: give the "
                    "checkpoint with the original weights."
                )
            used.add(name)
        self._check_unused(sorted(self._shard_of.keys() - used))

    def _check_unused(self, names: list[str]) -> None:
        """Raise `UserError` for tensors that would be left out without a word, though they may mean something."""
        if adapters := [name for name in names if _ADAPTER.search(name)]:
            log.warning(
                "%s holds the weights of an adapter, such as %s, which are left out: merge it into the model before",
                *(self.directory, adapters[0]),
            )
        unknown = [name for name in names if not _HARMLESS.search(name) and not _ADAPTER.search(name)]
        if unknown:
            raise UserError(
                f"{self.directory} holds {len(unknown)} tensors that Qwen3-VL has no use for, such as {unknown[0]}: "
                "give a checkpoint of the model alone, with its original weights."
            )

    def _check_modelopt(self) -> None:
        """Raise `UserError` for weights that only ModelOpt's own file says are quantised."""
        if not (self.directory / _MODELOPT_CONFIG).is_file():
            return
        quantization = self._read_json(_MODELOPT_CONFIG).get("quantization")
        algorithm = quantization.get("quant_algo") if isinstance(quantization, dict) else quantization
        if algorithm:
            raise UserError(
                f"{self.directory} holds weights quantised with ModelOpt's {algorithm!r}, by its {_MODELOPT_CONFIG}, "
                "which is not supported: give the checkpoint with the original weights."
            )

    def _untie_another_head(self) -> None:
        """Take a stored lm_head that is not the embeddings for what it is, whatever the config says of ties.

        So does transformers.
        """
        if not self.hf_config.tie_word_embeddings or LM_HEAD not in self or TOKEN_EMBEDDINGS not in self:
            return
        head, embeddings = self.tensor(LM_HEAD), self.tensor(TOKEN_EMBEDDINGS)
        if head.shape == embeddings.shape and torch.equal(head, embeddings.to(head.dtype)):
            return
        log.info("the stored lm_head is not the embeddings: it is not tied to them")
        for config, data in (
            (self.hf_config, self._config),
            (self.hf_config.text_config, self._config.get("text_config", {})),
        ):
            config.tie_word_embeddings = data["tie_word_embeddings"] = False

    def __contains__(self, name: str) -> bool:
        return name in self._shard_of or self._layer_in_codes(name) is not None

    def shape(self, name: str) -> list[int]:
        """Of one tensor."""
        if layer := self._layer_in_codes(name):
            return self.codes.shape(layer)
        return self._shard_of[name].get_slice(name).get_shape()

    def tensor(self, name: str) -> torch.Tensor:
        """Read one tensor, in the type it has on disk; a weight that is there in codes in float32."""
        if layer := self._layer_in_codes(name):
            return torch.from_numpy(self.codes.read(layer).dense())
        return self._shard_of[name].get_tensor(name)

    def _layer_in_codes(self, name: str) -> str | None:
        """The layer whose weight a tensor of this name is, if that is in codes."""
        layer, _, part = name.rpartition(".")
        return layer if self.codes and part == "weight" and layer in self.codes else None

    def model_config(self) -> ModelConfig:
        """What engines and runtime need to know of the config; raises `UserError` for one that no model has."""
        rope_type = self.hf_config.text_config.rope_parameters["rope_type"]
        if rope_type not in _STATIC_ROPE_TYPES:
            raise UserError(
                f"rope type {rope_type!r} is not supported: expected one of {', '.join(_STATIC_ROPE_TYPES)}."
            )
        with self._config_errors():
            return model_config(self.hf_config)

    def digest(self) -> str:
        """SHA-256 over the config and all weight files: the identity of what was exported."""
        total = hashlib.sha256()
        for name in (_CONFIG, *self._shard_names()):
            total.update(bytes.fromhex(bundle.sha256(self.directory / name)))
        return total.hexdigest()

    def copy_host_files(self, target: Path) -> None:
        """Put the config, and the files that the runtime's tokenizer and processors read, into ``target``."""
        for name in _COPIED_FILES:
            shutil.copyfile(self.directory / name, target / name)
        (target / _CONFIG).write_text(json.dumps(self._config, indent=2) + "\n", encoding="utf-8")
        self._add_tokens(target / bundle.TOKENIZER)
        (target / bundle.CHAT_TEMPLATE).write_text(self._chat_template, encoding="utf-8")

    def _add_tokens(self, path: Path) -> None:
        """Add to a copy of the tokenizer the tokens that only its config has, as transformers does when it loads it."""
        if not (self.directory / _TOKENIZER_CONFIG).is_file():
            return
        added = self._read_json(_TOKENIZER_CONFIG).get("added_tokens_decoder") or {}
        try:
            tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise UserError(
                f"{self.directory / bundle.TOKENIZER} is not a tokenizer that can be read ({error}): download the "
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
                f"the tokens that {self.directory / _TOKENIZER_CONFIG} adds cannot be read ({reason}): download the "
                "model again."
            ) from error
        if len(tokenizer.get_added_tokens_decoder()) != len(known):
            tokenizer.save(str(path))

    @contextlib.contextmanager
    def _config_errors(self) -> Iterator[None]:
        """Raise `UserError` about the config for what transformers raises: many kinds, all of them about that file."""
        try:
            yield
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise UserError(
                f"{self.directory / _CONFIG} is not a valid Qwen3-VL config ({reason}): download the model again."
            ) from error

    def _read_json(self, name: str) -> dict[str, Any]:
        path = self.directory / name
        if not path.exists():
            raise UserError(
                f"{self.directory} lacks {name}: give the whole folder of a Qwen3-VL model, as its authors publish it."
            )
        return bundle.read_json(path, "download the model again")

    def _find_chat_template(self) -> str:
        """Checkpoints of different ages keep it in a file of its own, plain or JSON, or in the tokenizer's config."""
        path = self.directory / bundle.CHAT_TEMPLATE
        if path.is_file():
            try:
                return path.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise UserError(f"{path} cannot be read ({error}): download the model again.") from error
        for name in ("chat_template.json", "tokenizer_config.json"):
            if (self.directory / name).is_file() and isinstance(
                template := self._read_json(name).get("chat_template"), str
            ):
                return template
        raise UserError(f"{self.directory} has no chat template: add the model's {bundle.CHAT_TEMPLATE}.")

    def _shard_names(self) -> list[str]:
        if (self.directory / _SINGLE).is_file():
            # Transformers reads the one file where there is one, whatever else there is.
            if (self.directory / _INDEX).is_file():
                log.warning("of %s, %s is read, and %s with its files is not", self.directory, _SINGLE, _INDEX)
            return [_SINGLE]
        if (self.directory / _INDEX).is_file():
            weight_map = self._read_json(_INDEX).get("weight_map")
            if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
                raise UserError(f"{self.directory / _INDEX} names no weight files: download the model again.")
            return sorted(set(weight_map.values()))
        return [_SINGLE]

    def _open_shard(self, name: str) -> Any:
        path = self.directory / name
        try:
            return self._files.enter_context(safe_open(path, framework="pt"))
        except FileNotFoundError:
            raise UserError(f"{self.directory} lacks its weight file {name}: download the model again.") from None
        except (OSError, SafetensorError) as error:
            raise UserError(f"weight file {path} is truncated or damaged ({error}): download it again.") from error


def _take(kind: type, config: Any, **computed: Any) -> Any:
    """Make a ``kind`` from the fields of a Hugging Face config that have its fields' names, and the computed ones."""
    names = [field.name for field in dataclasses.fields(kind) if field.name not in computed]
    values = {name: getattr(config, name) for name in names}
    return kind(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}, **computed)

"""A Qwen3-VL checkpoint on disk, as Hugging Face writes it, read one tensor at a time."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from transformers import (
    FineGrainedFP8Config,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLTextConfig,
    Qwen3VLVisionConfig,
)

from pascalvl.export.host_files import FILES_READ, HostFiles
from pascalvl.export.modules import ACTIVATIONS, activation
from pascalvl.export.quantization import read_quantization
from pascalvl.export.scaled_weights import ScaledWeights
from pascalvl.export.stored_codes import StoredCodes
from pascalvl.export.tensor_names import resolve, transformers_reads
from pascalvl.plugins import bundle
from pascalvl.plugins.errors import UserError, library_reason, reason, shown
from pascalvl.plugins.model_config import TOKEN_IDS, ModelConfig, TextConfig, VisionConfig, check_sizes
from pascalvl.plugins.ops.flash_attention.drop_in import ATTN_IMPLEMENTATION
from pascalvl.plugins.prompt import Prompt

log = logging.getLogger(__name__)

_CONFIG = bundle.CHECKPOINT_CONFIG
_MODELOPT_CONFIG = "hf_quant_config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SMALL_FILES = (_CONFIG, INDEX, _MODELOPT_CONFIG, *FILES_READ)
"""All that is read of a checkpoint but its weights."""
PICKLES = ("pytorch_model*.*", "model*.bin*", "model*.pt*", "consolidated*.pt*")
"""Names of weights, and their index, in PyTorch's own format."""
_MODEL_TYPE = "qwen3_vl"
TOKEN_EMBEDDINGS = "model.language_model.embed_tokens.weight"
POSITION_EMBEDDINGS = "model.visual.pos_embed.weight"
HOST_TABLES = (TOKEN_EMBEDDINGS, POSITION_EMBEDDINGS)
"""The tensors that are in no graph, unless the first is the lm_head too: the runtime reads them on the host."""
LM_HEAD = "lm_head.weight"
_FLOATS = ("F32", "F16", "BF16")
_HARMLESS = re.compile(r"(^|\.)(rotary_emb|rotary_pos_emb)\.inv_freq$")
"""Tensors that a model computes itself, which some checkpoints hold all the same."""
_ADAPTER = re.compile(r"\.lora_[a-zA-Z_]+(\.|$)")
_STATIC_ROPE_TYPES = ("default", "linear", "yarn", "llama3")
"""Rope types whose frequencies do not depend on the length of the prompt."""


def read_config(data: dict[str, Any]) -> Qwen3VLConfig:
    """Hugging Face's config of what is in ``config.json``; raises `ValueError` for sizes that no model has."""
    check_sizes(data)
    return Qwen3VLConfig.from_dict(data)


def check_model_type(data: dict[str, Any], where: object) -> None:
    """Raise `UserError` unless what is in the ``config.json`` from ``where`` is of a model that can be exported."""
    if (found := data.get("model_type")) != _MODEL_TYPE:
        raise UserError(
            f"expected a dense Qwen3-VL checkpoint (model_type {_MODEL_TYPE!r}) in {where}, found {shown(found)}: "
            "give a Qwen3-VL 2B, 4B, 8B or 32B model."
        )


def read_config_file(path: Path) -> tuple[Qwen3VLConfig, dict[str, Any] | None]:
    """Hugging Face's config of a ``config.json``, and its part about quantised weights, None where there are none.

    Raises `UserError` for one of another model, or that no model has.
    """
    data = bundle.read_json(path, "download the model again")
    check_model_type(data, path)
    quantization = data.pop("quantization_config", None) or None
    with _config_errors(path):
        return read_config(data), quantization


def names_in_index(path: Path) -> list[str]:
    """The weight files that an index names; raises `UserError` for an index that cannot be used."""
    weight_map: Any = bundle.read_json(path, "download the model again").get("weight_map")
    names = [*weight_map.values()] if isinstance(weight_map, dict) else [{"weight_map": weight_map}]
    if others := [name for name in names if not isinstance(name, str) or not bundle.is_file_name(name)]:
        raise UserError(
            f"{path} names {shown(others[0])}: expected weight files in the same folder; download the model again."
        )
    return sorted({str(name) for name in names})


@contextlib.contextmanager
def _config_errors(path: Path) -> Iterator[None]:
    """Raise `UserError` about the config for what transformers raises: many kinds, all of them about that file."""
    try:
        yield
    except Exception as error:
        told = f"{type(error).__name__}: {library_reason(error)}"
        raise UserError(f"{path} is not a valid Qwen3-VL config ({told}): download the model again.") from error


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

    text, vision = cast(Qwen3VLTextConfig, config.text_config), cast(Qwen3VLVisionConfig, config.vision_config)
    text_rope, vision_rope = hf.Qwen3VLTextRotaryEmbedding(text), hf.Qwen3VLVisionRotaryEmbedding(vision)
    return ModelConfig(
        text=_take(
            TextConfig,
            text,
            mrope_section=tuple(cast(Any, text_rope.mrope_section)),
            rope_inv_freq=tuple(text_rope.inv_freq.tolist()),
            rope_attention_scaling=float(text_rope.attention_scaling),
            value_dims=(text.head_dim,) * text.num_hidden_layers,
        ),
        vision=_take(VisionConfig, vision, rope_inv_freq=tuple(vision_rope.inv_freq.tolist())),
        **{name: getattr(config, name) for name in TOKEN_IDS},
    )


def load_model(directory: Path) -> Qwen3VLForConditionalGeneration:
    """Hugging Face's model in float32 on the CPU; where it cannot read the checkpoint so, with the weights read here.

    `Checkpoint.is_read_by_transformers` tells which.
    """
    with Checkpoint(directory) as checkpoint:
        if checkpoint.is_read_by_transformers:
            options: dict[str, Any] = {}
            if checkpoint.quantization is not None:
                left_out = checkpoint.quantization.get("modules_to_not_convert")
                fp8 = FineGrainedFP8Config(dequantize=True, modules_to_not_convert=left_out)
                options["quantization_config"] = fp8
            return Qwen3VLForConditionalGeneration.from_pretrained(directory, dtype=torch.float32, **options).eval()
        tensors = {name: checkpoint.tensor(name) for name, _ in checkpoint.meta_model().named_parameters()}
        return Qwen3VLForConditionalGeneration.from_pretrained(
            None, config=checkpoint.hf_config, state_dict=tensors, dtype=torch.float32
        ).eval()


def model_inputs(model: Qwen3VLForConditionalGeneration, prompt: Prompt) -> dict[str, torch.Tensor]:
    """A prompt as Hugging Face's model takes it."""
    token_ids = torch.from_numpy(prompt.token_ids)[None]
    is_image, is_video = (token_ids == token for token in (model.config.image_token_id, model.config.video_token_id))
    inputs = {"input_ids": token_ids, "mm_token_type_ids": is_image.int() + 2 * is_video}
    for of_video, pixels, grid in (
        (False, "pixel_values", "image_grid_thw"),
        (True, "pixel_values_videos", "video_grid_thw"),
    ):
        if patches := [visual.patches for visual in prompt.visuals if visual.patches.is_video == of_video]:
            inputs[pixels] = torch.from_numpy(np.concatenate([p.pixel_values for p in patches]))
            inputs[grid] = torch.tensor([p.grid for p in patches])
    return inputs


@dataclasses.dataclass(frozen=True)
class _Stored:
    """A tensor, and the name that it has in its file."""

    shard: Any
    name: str

    @property
    def slice(self) -> Any:
        return self.shard.get_slice(self.name)

    def tensor(self) -> torch.Tensor:
        return self.shard.get_tensor(self.name)


class Checkpoint:
    """A dense Qwen3-VL checkpoint directory: its config, its tensors and the files its processor needs.

    Attributes:
        codes: its linear layers that are in codes of 4 bits, in place of whose weights `tensor` gives what they stand
            for, as it does for weights in 8 bits; None: there are none.
        quantization: the config's part about them, None where the weights are floats.
        host_files: what `copy_host_files` puts beside the config.

    Raises:
        UserError: no such directory, another architecture, or files that are missing, truncated or do not fit.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        if not directory.is_dir():
            raise UserError(f"no checkpoint directory at {directory}: give the folder of a Qwen3-VL model.")
        self._config = self._read_json(_CONFIG)
        data = dict(self._config)
        check_model_type(data, directory)
        self.quantization = data.pop("quantization_config", None) or None
        if self.quantization is None:
            self._check_modelopt()
        stored = None if self.quantization is None else read_quantization(self.quantization, directory, self)
        self.codes = stored if isinstance(stored, StoredCodes) else None
        self._scaled = stored if isinstance(stored, ScaledWeights) else None
        with _config_errors(self.directory / _CONFIG):
            self.hf_config = read_config(data)
        self.model_config()  # what it has to say comes before anything is built
        self.host_files = HostFiles(directory, self._config, self._read_json)
        self._files = contextlib.ExitStack()
        shard_of: dict[str, Any] = {}
        self._refuse_pickles()
        for name in self._shard_names():
            shard = self._open_shard(name)
            shard_of.update(dict.fromkeys(shard.keys(), shard))
        self._stored = {name: _Stored(shard_of[s], s) for name, s in resolve(shard_of, directory).items()}
        self._untie_another_head()
        self._is_checked = False

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self._files.close()

    @property
    def is_read_by_transformers(self) -> bool:
        """Whether transformers takes the same weights from the files by itself, on a CPU and in float32.

        Of those in codes it does so with Qwen's FP8 in whole blocks: it dequantises others with packages for GPUs, or
        (compressed-tensors') to bfloat16, and takes partial blocks for smaller whole ones.
        """
        names = [(tensor.name, name) for name, tensor in self._stored.items() if not _ADAPTER.search(name)]
        if self.codes is not None or not all(transformers_reads(stored, name) for stored, name in names):
            return False
        if self._scaled is None:
            return True
        in_codes = [self.shape(name) for name in self._stored if self._scaled.has(name)]
        return cast(dict[str, Any], self.quantization)["quant_method"] == "fp8" and all(
            map(self._scaled.has_whole_blocks, in_codes)
        )

    def meta_model(self) -> Qwen3VLForConditionalGeneration:
        """The model that `meta_model` makes of the config; each of its tensors is on disk, and no others are.

        Raises:
            UserError: a tensor that is missing, of another shape or of no float type, or one that no model uses.
        """
        with _config_errors(self.directory / _CONFIG):
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
            if self.codes and (layer := self._layer_in_codes(name)):
                self.codes.check(layer)
                used.update(self.codes.names(layer))
            elif self._scaled and self._scaled.has(name):
                self._scaled.check(name)
                used.add(self._scaled.scale_name(name))
            elif (kind := self.stored_type(name)) not in _FLOATS:
                raise UserError(
                    f"tensor {name} of {self.directory} has type {kind}, expected {', '.join(_FLOATS)}: give the "
                    "checkpoint with the original weights."
                )
            used.add(name)
        self._check_unused(sorted(self._stored[name].name for name in self._stored.keys() - used))

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

    def _refuse_pickles(self) -> None:
        """Raise `UserError` for a checkpoint that has its weights in PyTorch's own format alone."""
        if any((self.directory / name).exists() for name in (SINGLE, INDEX)):
            return
        if found := [path.name for names in PICKLES for path in sorted(self.directory.glob(names))]:
            raise UserError(
                f"{self.directory} holds its weights as {found[0]}, in PyTorch's own format, expected {SINGLE}: load "
                "them with transformers' Qwen3VLForConditionalGeneration and save that with its save_pretrained."
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
            (cast(Qwen3VLTextConfig, self.hf_config.text_config), self._config.get("text_config", {})),
        ):
            config.tie_word_embeddings = data["tie_word_embeddings"] = False

    def __contains__(self, name: str) -> bool:
        return name in self._stored or self._layer_in_codes(name) is not None

    def shape(self, name: str) -> list[int]:
        """Of one tensor."""
        if self.codes and (layer := self._layer_in_codes(name)):
            return self.codes.shape(layer)
        return self._stored[name].slice.get_shape()

    def stored_type(self, name: str) -> str:
        """Of one tensor on disk, as safetensors calls it."""
        return self._stored[name].slice.get_dtype()

    def tensor(self, name: str) -> torch.Tensor:
        """Read one tensor, in the type it has on disk; a weight that is there in codes in float32."""
        if self.codes and (layer := self._layer_in_codes(name)):
            return torch.from_numpy(self.codes.read(layer).dense())
        if self._scaled and self._scaled.has(name):
            return self._scaled.read(name, self._stored[name].tensor())
        return self._stored[name].tensor()

    def _layer_in_codes(self, name: str) -> str | None:
        """The layer whose weight a tensor of this name is, if that is in codes."""
        layer, _, part = name.rpartition(".")
        return layer if self.codes and part == "weight" and layer in self.codes else None

    def model_config(self) -> ModelConfig:
        """What engines and runtime need to know of the config; raises `UserError` for one that no model has."""
        for part in ACTIVATIONS:
            activation(part, getattr(self.hf_config, part).hidden_act)
        rope_type = cast(Any, self.hf_config.text_config).rope_parameters["rope_type"]
        if rope_type not in _STATIC_ROPE_TYPES:
            raise UserError(
                f"rope type {rope_type!r} is not supported: expected one of {', '.join(_STATIC_ROPE_TYPES)}."
            )
        with _config_errors(self.directory / _CONFIG):
            return model_config(self.hf_config)

    def digest(self) -> str:
        """SHA-256 over the config and all weight files: the identity of what was exported."""
        total = hashlib.sha256()
        for name in (_CONFIG, *self._shard_names()):
            total.update(bundle.sha256(self.directory / name))
        return total.hexdigest()

    def copy_host_files(self, target: Path) -> None:
        """Put the config, and the files that the runtime's tokenizer and processors read, into ``target``."""
        self.host_files.write(target)
        (target / _CONFIG).write_text(json.dumps(self._config, indent=2) + "\n", encoding="utf-8")

    def _read_json(self, name: str) -> dict[str, Any]:
        path = self.directory / name
        if not path.exists():
            raise UserError(
                f"{self.directory} lacks {name}: give the whole folder of a Qwen3-VL model, as its authors publish it."
            )
        return bundle.read_json(path, "download the model again")

    def _shard_names(self) -> list[str]:
        if (self.directory / SINGLE).is_file():
            # Transformers reads the one file where there is one, whatever else there is.
            if (self.directory / INDEX).is_file():
                log.warning("of %s, %s is read, and %s with its files is not", self.directory, SINGLE, INDEX)
            return [SINGLE]
        if (self.directory / INDEX).exists():
            return names_in_index(self.directory / INDEX)
        return [SINGLE]

    def _open_shard(self, name: str) -> Any:
        path = self.directory / name
        try:
            bundle.open_regular(path).close()
            return self._files.enter_context(safe_open(path, framework="pt"))
        except FileNotFoundError:
            raise UserError(f"{self.directory} lacks its weight file {name}: download the model again.") from None
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"weight file {path} is truncated or damaged ({reason(error)}): download it again."
            ) from error


def _take(kind: type, config: Any, **computed: Any) -> Any:
    """Make a ``kind`` from the fields of a Hugging Face config that have its fields' names, and the computed ones."""
    names = [field.name for field in dataclasses.fields(kind) if field.name not in computed]
    values = {name: getattr(config, name) for name in names}
    return kind(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}, **computed)

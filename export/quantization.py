"""A config's ``quantization_config``: what quantised a checkpoint's weights, and how they are stored."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Mapping
from typing import Any, cast

from pascalvl.export.scaled_weights import FLOAT8, INT8, Block, ScaledWeights, TypedSource
from pascalvl.export.stored_codes import AWQ, BITS, GPTQ, GPTQ_V2, PACKED, REMEDY, Layout, StoredCodes
from pascalvl.plugins.errors import UserError, shown
from pascalvl.plugins.weight_format import GROUPS, WeightFormat

log = logging.getLogger(__name__)

_SCALED_FORMATS = {
    "float-quantized": {"float": FLOAT8},
    "int-quantized": {"int": INT8},
    "naive-quantized": {"float": FLOAT8, "int": INT8},
}
"""Of compressed-tensors, weights in 8 bits: the codes of the types that they may have."""
_METHODS: dict[str, dict[str, Layout | None]] = {
    "awq": {"gemm": AWQ},
    "gptq": {"gptq": GPTQ, "gptq_v2": GPTQ_V2},
    "compressed-tensors": {"pack-quantized": PACKED, **dict.fromkeys(_SCALED_FORMATS)},
    "fp8": {"fp8": None},
}
"""By ``quant_method`` and its variants, of which the first is meant where none is named; with the layout of 4 bits."""
_FIELDS = {
    "awq": (
        "quant_method bits group_size version zero_point backend do_fuse exllama_config fuse_max_seq_len "
        "modules_to_fuse modules_to_not_convert"
    ),
    "gptq": (
        "quant_method bits group_size checkpoint_format format desc_act sym lm_head static_groups true_sequential "
        "damp_percent damp_auto_increment dataset tokenizer meta model_name_or_path model_file_base_name model_seqlen "
        "block_name_to_quantize modules_in_block_to_quantize module_name_preceding_first_block batch_size pad_token_id "
        "use_cuda_fp16 use_exllama disable_exllama exllama_config max_input_length cache_block_outputs pack_dtype "
        "is_marlin_format backend mse"
    ),
    "compressed-tensors": (
        "quant_method format version config_groups ignore quantization_status global_compression_ratio run_compressed"
    ),
    "fp8": (
        "quant_method fmt activation_scheme weight_block_size scale_fmt modules_to_not_convert ignored_layers "
        "modules_to_convert expert_dtype dequantize"
    ),
}
"""Fields of a config that are checked here, whose meaning is in the tensors, or of no matter to who reads them."""
_MUST_BE_EMPTY = ("dynamic", "kv_cache_scheme", "sparsity_config", "transform_config")
"""Fields that ask for more than codes, scales and zeros."""
_NOT_SPARSE = {"format": "dense"}
"""A ``sparsity_config`` that older llm-compressor writes of weights that are not sparse."""
_NOT_QUANTISED = "-:"
"""Begins GPTQModel's patterns of layers that are left as they are."""
_SCHEME = (
    "num_bits type symmetric group_size strategy dynamic actorder observer observer_kwargs block_structure scale_dtype "
    "zp_dtype"
)
"""Fields of compressed-tensors' weights and activations."""
_GROUP = "targets weights input_activations output_activations format"


def read_quantization(quantization: Any, where: object, source: TypedSource) -> StoredCodes | ScaledWeights:
    """Read a config's ``quantization_config``; ``where`` is what errors call the checkpoint.

    Raises:
        UserError: another method, or one of its variants that cannot be expressed here.
    """
    data = quantization if isinstance(quantization, dict) else {"quant_method": quantization}
    checks = _Checks(where, data.get("quant_method"))
    method = checks.one_of("quant_method", str(checks.method), tuple(_METHODS))
    variants = _METHODS[method]
    kind = next((data[key] for key in ("checkpoint_format", "format", "version") if data.get(key)), None)
    for name in _MUST_BE_EMPTY:
        found = data.get(name)
        is_harmless = found == _NOT_SPARSE or (name == "dynamic" and method == "gptq" and _leaves_out(found))
        if found and not is_harmless:
            raise UserError(
                f"{where} holds weights quantised with {method!r}, whose config sets {name!r}, which is not "
                f"supported: {REMEDY}."
            )
    checks.known(data, f"{_FIELDS[method]} {' '.join(_MUST_BE_EMPTY)}")
    variant = checks.one_of("the layout", str(kind or next(iter(variants))).lower(), tuple(variants))
    if method == "fp8":
        scaled = _fine_grained(data, checks, source)
    elif variant in _SCALED_FORMATS:
        scaled = _compressed_scaled(data, variant, checks, source)
    else:
        return _codes(data, cast(Layout, variants[variant]), checks, source)
    log.info("%s holds weights in 8 bits: they are read as floats, and their inputs are not rounded to 8 bits", where)
    return scaled


@dataclasses.dataclass(frozen=True)
class _Checks:
    """What is asked of a config's values; all raise `UserError`."""

    where: object
    method: object

    def one_of(self, what: str, found: object, accepted: tuple[object, ...]) -> Any:
        if found not in accepted:
            raise UserError(
                f"{self.where} holds weights quantised with {shown(self.method)}: expected {what} "
                f"{' or '.join(map(repr, accepted))}, found {shown(found)}; {REMEDY}."
            )
        return found

    def known(self, found: Mapping[str, Any], fields: str) -> None:
        if unknown := sorted(found.keys() - fields.split()):
            raise UserError(
                f"{self.where} holds weights quantised with {shown(self.method)}, whose config has the field "
                f"{shown(unknown[0])}, which is not known here: {REMEDY}."
            )

    def size(self, what: str, found: object) -> int:
        if type(found) is not int or found < 1:
            raise UserError(
                f"{self.where} holds weights quantised with {shown(self.method)}: expected {what} of at least 1, found "
                f"{shown(found)}; {REMEDY}."
            )
        return found

    def block(self, what: str, found: object) -> Block:
        outputs, inputs = found if isinstance(found, list | tuple) and len(found) == 2 else (found, None)
        return Block(self.size(what, outputs), self.size(what, inputs))


def _codes(data: Mapping[str, Any], layout: Layout, checks: _Checks, source: TypedSource) -> StoredCodes:
    schemes, bits = [data], "bits"
    if layout is PACKED:
        groups = _groups(data, checks)
        for group in groups:
            checks.one_of("input_activations", group.get("input_activations"), (None,))
        schemes, bits = [*_objects(group.get("weights") for group in groups)], "num_bits"
        for scheme in schemes:
            checks.known(scheme, _SCHEME)
            checks.one_of("type", scheme.get("type", "int"), ("int",))
    for scheme in schemes:
        checks.one_of("bits", scheme.get(bits), (BITS,))
        checks.one_of("group_size", scheme.get("group_size"), GROUPS)
    sizes = {scheme["group_size"] for scheme in schemes}
    checks.one_of("groups of one size, of which there are", len(sizes), (1,))
    return StoredCodes(WeightFormat(BITS, *sizes), layout, source)


def _fine_grained(data: Mapping[str, Any], checks: _Checks, source: TypedSource) -> ScaledWeights:
    checks.one_of("fmt", data.get("fmt", "e4m3"), ("e4m3",))
    checks.one_of("activation_scheme", data.get("activation_scheme", "dynamic"), ("dynamic",))
    checks.one_of("scale_fmt", data.get("scale_fmt", "float"), ("float", None))
    block = checks.block("weight_block_size", data.get("weight_block_size", [128, 128]))
    return ScaledWeights((FLOAT8,), "weight_scale_inv", (block,), source)


def _compressed_scaled(data: Mapping[str, Any], kind: str, checks: _Checks, source: TypedSource) -> ScaledWeights:
    types, blocks = _SCALED_FORMATS[kind], []
    for group in _groups(data, checks):
        checks.one_of("the layout of all groups", group.get("format") or kind, (kind,))
        for inputs in _objects([group.get("input_activations")]):
            checks.known(inputs, _SCHEME)
            checks.one_of("input_activations that are dynamic", inputs.get("dynamic"), (True,))
        for scheme in _objects([group.get("weights")]):
            checks.known(scheme, _SCHEME)
            checks.one_of("type", scheme.get("type", "int"), tuple(types))
            checks.one_of("bits", scheme.get("num_bits"), (8,))
            checks.one_of("symmetric", scheme.get("symmetric", True), (True,))
            blocks.append(_block(scheme, checks))
    checks.size("groups of weights", len(blocks))
    return ScaledWeights(tuple(types.values()), "weight_scale", tuple(blocks), source)


def _block(scheme: Mapping[str, Any], checks: _Checks) -> Block:
    """What compressed-tensors calls a strategy."""
    match checks.one_of("strategy", scheme.get("strategy"), ("tensor", "channel", "group", "block")):
        case "tensor":
            return Block(None, None)
        case "channel":
            return Block(1, None)
        case "group":
            return Block(1, checks.size("group_size", scheme.get("group_size")))
        case _:
            return checks.block("block_structure", scheme.get("block_structure"))


def _groups(data: Mapping[str, Any], checks: _Checks) -> list[dict[str, Any]]:
    """Of compressed-tensors: layers that are quantised alike."""
    named = data.get("config_groups")
    groups = _objects(named.values() if isinstance(named, dict) else ())
    for group in groups:
        checks.known(group, _GROUP)
        checks.one_of("output_activations", group.get("output_activations"), (None,))
    return groups


def _leaves_out(dynamic: object) -> bool:
    """Whether GPTQModel's ``dynamic`` only says which layers are not quantised, as their tensors do."""
    return isinstance(dynamic, dict) and all(pattern.startswith(_NOT_QUANTISED) for pattern in dynamic)


def _objects(values: Iterable[Any]) -> list[dict[str, Any]]:
    """Those of JSON's values that are objects."""
    return [value for value in values if isinstance(value, dict)]

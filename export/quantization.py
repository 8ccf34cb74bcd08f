"""A config's ``quantization_config``: what quantised a checkpoint's weights, and how they are stored."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from pascalvl.export.stored_codes import AWQ, BITS, GPTQ, GPTQ_V2, PACKED, REMEDY, StoredCodes, TensorSource
from pascalvl.plugins.errors import UserError
from pascalvl.plugins.weight_format import GROUPS, WeightFormat

_METHODS = {
    "awq": {"gemm": AWQ},
    "gptq": {"gptq": GPTQ, "gptq_v2": GPTQ_V2},
    "compressed-tensors": {"pack-quantized": PACKED},
}
"""By ``quant_method`` and its variants, of which the first is meant where none is named."""
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
}
"""Fields of a config whose meaning is in the tensors, or of no matter to who reads them."""
_MUST_BE_EMPTY = ("dynamic", "kv_cache_scheme", "sparsity_config", "transform_config")
"""Fields that ask for more than codes, scales and zeros."""
_SCHEME = (
    "num_bits type symmetric group_size strategy dynamic actorder observer observer_kwargs block_structure scale_dtype "
    "zp_dtype"
)
"""Fields of compressed-tensors' weights."""
_GROUP = "targets weights input_activations output_activations format"


def read_quantization(quantization: Any, where: object, source: TensorSource) -> StoredCodes:
    """Read a config's ``quantization_config``; ``where`` is what errors call the checkpoint.

    Raises:
        UserError: another method, or one of its variants that `QuantLinear` cannot express.
    """
    data = quantization if isinstance(quantization, dict) else {"quant_method": quantization}
    method, schemes, bits = data.get("quant_method"), [data], "bits"

    def check(what: str, found: object, accepted: tuple[object, ...]) -> Any:
        if found not in accepted:
            raise UserError(
                f"{where} holds weights quantised with {method!r}: expected {what} "
                f"{' or '.join(map(repr, accepted))}, found {found!r}; {REMEDY}."
            )
        return found

    def check_fields(found: Mapping[str, Any], known: str) -> None:
        if unknown := sorted(found.keys() - known.split()):
            raise UserError(
                f"{where} holds weights quantised with {method!r}, whose config has the field {unknown[0]!r}, "
                f"which is not known here: {REMEDY}."
            )

    variants = _METHODS[check("quant_method", str(method), tuple(_METHODS))]
    kind = next((data[key] for key in ("checkpoint_format", "format", "version") if data.get(key)), None)
    for name in _MUST_BE_EMPTY:
        check(f"no {name}", data.get(name) or None, (None,))
    check_fields(data, f"{_FIELDS[method]} {' '.join(_MUST_BE_EMPTY)}")
    layout = variants[check("the layout", str(kind or next(iter(variants))).lower(), tuple(variants))]
    if layout is PACKED:
        named = data.get("config_groups")
        groups = _objects(named.values() if isinstance(named, dict) else ())
        for group in groups:
            check_fields(group, _GROUP)
            for activations in ("input_activations", "output_activations"):
                check(activations, group.get(activations), (None,))
        schemes, bits = _objects(group.get("weights") for group in groups), "num_bits"
        for scheme in schemes:
            check_fields(scheme, _SCHEME)
            check("type", scheme.get("type", "int"), ("int",))
    for scheme in schemes:
        check("bits", scheme.get(bits), (BITS,))
        check("group_size", scheme.get("group_size"), GROUPS)
    sizes = {scheme["group_size"] for scheme in schemes}
    check("groups of one size, of which there are", len(sizes), (1,))
    return StoredCodes(WeightFormat(BITS, *sizes), layout, source)


def _objects(values: Iterable[Any]) -> list[dict[str, Any]]:
    """Those of JSON's values that are objects."""
    return [value for value in values if isinstance(value, dict)]

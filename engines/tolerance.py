"""How far an engine's outputs may be from the reference's."""

from __future__ import annotations

from pascalvl.plugins.kv_format import CacheConfig, KVFormat
from pascalvl.plugins.model_config import ModelConfig
from pascalvl.plugins.weight_format import FLOAT_WEIGHTS, WeightConfig

TOLERANCE = {KVFormat.F32: 5e-4, KVFormat.F16: 2e-2, KVFormat.K8V8: 0.1, KVFormat.K8V4: 0.8, KVFormat.K4V4: 1.5}
"""Largest error of an output, relative to the root mean square (RMS) of the reference's.

Not to its largest value: trained models have a few channels of hundreds of RMS, behind which anything would pass.
Both sides compute in float32, but sum in different orders, which leaves some 1e-6 of each value: 1e-5 of the RMS in the
nano checkpoint, more where such channels are rounded. A float16 cache rounds every key and value by up to 2^-11 = 5e-4,
which leaves 2e-3 there; both have a margin for deeper models and longer prompts. Codes leave noise: the largest error
among all logits and decode steps is 0.03 in k8v8 there, 0.4 in k8v4 and 0.6 in k4v4, half of what is allowed; logits of
another token differ by 4 and more. A rank below the head size changes the function, and is not allowed for.
"""
_OF_WEIGHTS = {32: 0.0, 16: 2e-2, 8: 0.3, 4: 1.2}
"""The same, by bits of the weights, on top of the cache's: inputs rounded to int8 leave up to 0.15 in the nano
checkpoint's vision encoder and 0.1 in its logits, weights of 4 bits up to 0.6, rounded to nearest: half of what is
allowed."""


def tolerance(cache: CacheConfig, model: ModelConfig, weights: WeightConfig = FLOAT_WEIGHTS) -> float:
    """Of the decoder: that of the coarsest formats among its layers."""
    forms = weights.lm_head, *weights.layers(model.text.num_hidden_layers)
    of_cache = max(TOLERANCE[layer.kv_format] for layer in cache.layers(model.text))
    # What comes from the vision encoder goes through the decoder.
    return of_cache + max(_OF_WEIGHTS[form.bits] for form in (*forms, weights.vision))


def vision_tolerance(weights: WeightConfig = FLOAT_WEIGHTS) -> float:
    """Of the vision encoder, which reads no cache."""
    return TOLERANCE[KVFormat.F32] + _OF_WEIGHTS[weights.vision.bits]

"""How far an engine's outputs may be from the reference's."""

from __future__ import annotations

from pascalvl.plugins.kv_format import CacheConfig, KVFormat
from pascalvl.plugins.model_config import ModelConfig

TOLERANCE = {KVFormat.F32: 5e-4, KVFormat.F16: 2e-2, KVFormat.K8V8: 0.1, KVFormat.K8V4: 0.5, KVFormat.K4V4: 1.0}
"""Largest error of an output, relative to the root mean square (RMS) of the reference's.

Not to its largest value: trained models have a few channels of hundreds of RMS, behind which anything would pass.
Both sides compute in float32, but sum in different orders, which leaves some 1e-6 of each value: 1e-5 of the RMS in the
nano checkpoint, more where such channels are rounded. A float16 cache rounds every key and value by up to 2^-11 = 5e-4,
which leaves 2e-3 there; both have a margin for deeper models and longer prompts.
"""


def tolerance(cache: CacheConfig, model: ModelConfig) -> float:
    """That of the coarsest format among a cache's layers."""
    return max(TOLERANCE[layer.kv_format] for layer in cache.layers(model.text))

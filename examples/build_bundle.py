"""A checkpoint to bundles: ``python examples/build_bundle.py CHECKPOINT MODEL_BUNDLE ENGINE_BUNDLE [WEIGHTS]``.

What ``pascalvl export`` and ``pascalvl build`` do; needs the extras ``export`` and ``engines``.
"""

from __future__ import annotations

import sys
from pathlib import Path

from pascalvl.engines import build
from pascalvl.export import export_checkpoint
from pascalvl.plugins.kv_format import CacheConfig
from pascalvl.plugins.weight_format import WeightConfig


def main(checkpoint: str, model_bundle: str, engine_bundle: str, weights: str = "w8") -> None:
    """Print what was built."""
    export_checkpoint(Path(checkpoint), Path(model_bundle), weights=WeightConfig.parse(weights))
    manifest = build(Path(model_bundle), Path(engine_bundle), cache=CacheConfig.parse("k8v8"), tell=print)
    print(f"{engine_bundle}: {manifest.source['name']} for backend {manifest.backend['name']}, weights {weights}")


if __name__ == "__main__":
    main(*sys.argv[1:])

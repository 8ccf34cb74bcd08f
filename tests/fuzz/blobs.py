"""Damaged serialised plugins in TensorRT's own registry: ``python -m tests.fuzz.blobs LIBRARY SECONDS [SEED]``.

What is taken must be a plugin that serialises to the very bytes. In a process of its own, which a crash ends.
"""

import random
import sys
import time

from tests.fuzz.mutators import damaged_bytes
from tests.plugins.tensorrt.registry import LINEAR, OP, attempt, open_registry


def main() -> None:
    library, seconds, *seed = sys.argv[1:]
    registry, create = open_registry(library)
    attention, linear = (registry.get_plugin_creator(*op) for op in (OP, LINEAR))
    layer = {"in_features": 64, "out_features": 256, "bits": 4, "group": 32, "activation": 2}
    of_layer = {**layer, "has_zero": 1, "has_bias": 0, "has_residual": 1, "norm": 1, "norm_size": 64, "epsilon": 1e-6}
    heads = {
        "softmax_scale": 0.125,
        "epsilon": 1e-6,
        "num_heads": 4,
        "num_kv_heads": 4,
        "head_dim": 64,
        "value_dim": 64,
    }
    whole = [
        (creator, bytes(create(creator, **attributes).serialize()))
        for creator, attributes in (
            (attention, {**heads, "causal": 1, "kv_format": "k8v4"}),
            (attention, {**heads, "causal": 0}),
            (linear, of_layer),
        )
    ]
    end, refused, taken = time.monotonic() + float(seconds), 0, 0
    for number in map(int, seed) if seed else range(1 << 62):
        if time.monotonic() > end and refused + taken:
            break
        draw = random.Random(number)
        creator, data = draw.choice(whole)
        damaged = damaged_bytes(draw, data)
        found = attempt(lambda: creator.deserialize_plugin("node", damaged))  # noqa: B023
        assert found in (None, damaged.hex()), f"seed {number}: {damaged.hex()} became {found}"
        refused, taken = refused + (found is None), taken + (found is not None)
    print(refused, taken)


if __name__ == "__main__":
    main()

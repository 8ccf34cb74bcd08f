"""Loads a plugin's library into TensorRT's own registry and tries its creator: ``python registry.py LIBRARY``.

Prints JSON, which has also what became of made-up bytes. In a process of its own, because what is loaded stays loaded.
"""

import ctypes
import functools
import importlib.util
import itertools
import json
import struct
import sys
from pathlib import Path

import numpy as np

OP, LINEAR = ("FlashAttention2", "3", ""), ("QuantLinear", "2", "")


NUMBERS = [-(1 << 31), -1, 0, 1, 2, 5, 64, 1 << 15, 1 << 24, (1 << 24) + 1, 1 << 30, (1 << 31) - 1]
NUMBERS += [struct.unpack("<i", struct.pack("<f", x))[0] for x in (0.5, 1e30, float("inf"), float("nan"))]


def made_up(data: bytes) -> list[bytes]:
    """A serialised plugin with two other numbers behind magic and layout, or any bits there; bytes of any length."""
    rng, words, found = np.random.default_rng(0), len(data) // 4, []
    for first, second in itertools.combinations(range(2, words), 2):
        for numbers in itertools.product(NUMBERS, repeat=2):
            blob = bytearray(data)
            for word, number in zip((first, second), numbers, strict=True):
                blob[4 * word : 4 * word + 4] = struct.pack("<i", number)
            found.append(bytes(blob))
    found += [data[:8] + rng.bytes(len(data) - 8) for _ in range(500)]
    found += [rng.bytes(int(length)) for length in rng.integers(1, 100, 500)]
    return found


def attempt(action) -> str | None:
    """The serialised plugin in hexadecimal; None where TensorRT got none."""
    try:
        plugin = action()
    except RuntimeError:
        return None
    return plugin and bytes(plugin.serialize()).hex()


def open_registry(library: str):
    """TensorRT's registry with the plugin library in it, and a function ``create(creator, **attributes)``."""
    folder = Path(importlib.util.find_spec("tensorrt_lean_libs").origin).parent
    ctypes.CDLL(str(folder / "libnvinfer_lean.so.10"), mode=ctypes.RTLD_GLOBAL)
    from tensorrt_lean_bindings import tensorrt_lean as trt

    ctypes.CDLL(library)
    kinds = trt.PluginFieldType

    def create(creator, **values):
        types = {int: (np.int32, kinds.INT32), float: (np.float32, kinds.FLOAT32)}
        fields = []
        for name, value in values.items():
            if isinstance(value, str):
                fields.append(trt.PluginField(name, np.frombuffer(value.encode(), np.int8), kinds.CHAR))
            else:
                dtype, kind = types[type(value)]
                fields.append(trt.PluginField(name, np.array([value], dtype), kind))
        return creator.create_plugin("node", trt.PluginFieldCollection(fields))

    return trt.get_plugin_registry(), create


def main() -> None:
    registry, create_by = open_registry(sys.argv[1])
    creator = registry.get_plugin_creator(*OP)
    if creator is None:
        print(json.dumps({"found": False}))
        return

    def create(creator=creator, **values):
        return create_by(creator, **values)

    linear = registry.get_plugin_creator(*LINEAR)
    sizes = {"in_features": 64, "out_features": 8, "bits": 4, "group": 32, "activation": 0}
    layer = {**sizes, "has_zero": 0, "has_bias": 1, "has_residual": 0, "norm": 1, "norm_size": 32, "epsilon": 0.5}
    of_linear = bytes(create(linear, **layer).serialize())
    heads = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 128, "value_dim": 96}
    text = {"causal": 1, **heads, "softmax_scale": 0.125, "epsilon": 0.5, "kv_format": "k8v4"}
    vision = {"causal": 0, "softmax_scale": 0.125, "epsilon": 0.0, **dict.fromkeys(("num_heads", "num_kv_heads"), 2)}
    vision |= {"head_dim": 72, "value_dim": 72}
    plugin = create(**text)
    data = bytes(plugin.serialize())
    taken = {}
    for name, maker, serialised in (("attention", creator, data), ("linear", linear, of_linear)):
        blobs = made_up(serialised)
        copies = {blob.hex(): attempt(functools.partial(maker.deserialize_plugin, "node", blob)) for blob in blobs}
        assert all(copy in (None, blob) for blob, copy in copies.items())
        taken[name] = {blob: copy is not None for blob, copy in copies.items()}
    print(
        json.dumps(
            {
                "found": True,
                "made up": taken,
                "fields": [field.name for field in creator.field_names],
                "identity": [plugin.plugin_type, plugin.plugin_version, plugin.plugin_namespace],
                "outputs": [
                    maker.num_outputs for maker in (plugin, create(**{**text, "kv_format": "f16"}), create(**vision))
                ],
                "bytes": data.hex(),
                "clone": attempt(plugin.clone),
                "copy": attempt(lambda: creator.deserialize_plugin("node", data)),
                "linear": {
                    "fields": [field.name for field in linear.field_names],
                    "bytes": of_linear.hex(),
                    "copy": attempt(lambda: linear.deserialize_plugin("node", of_linear)),
                    "foreign": attempt(lambda: linear.deserialize_plugin("node", data.ljust(len(of_linear), b"\0"))),
                    "bits": attempt(lambda: create(linear, **{**layer, "bits": 5})),
                    "incomplete": attempt(lambda: create(linear, **sizes)),
                    "epsilon": attempt(lambda: create(linear, **{**layer, "epsilon": float("nan")})),
                },
                "vision": attempt(lambda: create(**vision)),
                "refused": {
                    "truncated": attempt(lambda: creator.deserialize_plugin("node", data[:-1])),
                    "foreign": attempt(lambda: creator.deserialize_plugin("node", b"x" * len(data))),
                    "newer": attempt(lambda: creator.deserialize_plugin("node", data[:4] + b"\x09" + data[5:])),
                    "no heads": attempt(lambda: create(**{k: x for k, x in text.items() if k != "num_heads"})),
                    **{
                        f"{name} {value}": attempt(lambda name=name, value=value: create(**{**text, name: value}))
                        for name, value in (
                            *(("causal", 2), ("causal", 1.0), ("kv_format", "k8"), ("num_kv_heads", 3)),
                            *(("softmax_scale", float("nan")), ("softmax_scale", float("-inf"))),
                            *(("epsilon", -0.5), ("head_dim", 72)),
                        )
                    },
                    "head size": attempt(lambda: create(**{**vision, "value_dim": 64})),
                    "features": attempt(lambda: create(linear, **{**layer, "in_features": (1 << 31) - 1})),
                },
            }
        )
    )


if __name__ == "__main__":
    main()

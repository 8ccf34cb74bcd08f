"""Drives the plugin through its host: ``python -m tests.plugins.tensorrt.drive TARGET MAJOR``; prints JSON.

In a process of its own, because a process can have one host.
"""

from __future__ import annotations

import dataclasses
import json
import sys

import numpy as np

from pascalvl.engines.device import open_device
from pascalvl.plugins.errors import UserError
from pascalvl.plugins.kernels.build import Target
from pascalvl.plugins.kv_format import KVFormat, LayerLayout, RowFormat
from pascalvl.plugins.kv_rows import compress, expand
from pascalvl.plugins.tensorrt.host import PluginHost
from tests.plugins.kernels.reference import attention, expected_attention, relative_error

F32, F16, I32 = np.float32, np.float16, np.int32


@dataclasses.dataclass
class Stored:
    """A cache as NumPy compresses it."""

    formats: tuple[RowFormat, RowFormat]
    rotated: bool
    dims: tuple[int, int]
    rows: list[np.ndarray]
    scales: list[np.ndarray | None]

    @classmethod
    def of(cls, kv_format: KVFormat, key: np.ndarray, value: np.ndarray) -> Stored:
        """Of float32 keys and values ``[batch, num_kv_heads, capacity, dim]``."""
        dims = key.shape[-1], value.shape[-1]
        rotated = LayerLayout(kv_format, key.shape[1], *dims).is_rotated
        stored = [
            compress(x, form, turned)
            for x, form, turned in zip((key, value), kv_format.rows, (rotated, False), strict=True)
        ]
        return cls(kv_format.rows, rotated, dims, *(list(x) for x in zip(*stored, strict=True)))

    def contents(self, which: int) -> np.ndarray:
        return expand(self.rows[which], self.scales[which], self.formats[which], self.dims[which]).astype(np.float64)


def main() -> None:
    target = Target(sys.argv[1])
    host = PluginHost(target, int(sys.argv[2]))
    device = open_device(target, host.plugin)
    rng = np.random.default_rng(0)

    def normal(*shape: int, dtype=F32) -> np.ndarray:
        return rng.standard_normal(shape).astype(dtype)

    def run(attributes: dict, *inputs: np.ndarray, recorded: bool = target is Target.CUDA) -> np.ndarray:
        shapes = [(array.dtype, array.shape) for array in inputs]
        plugin = host.create(attributes)
        (dtype, shape), workspace = plugin.prepare(shapes)
        buffers = [device.allocate(array.nbytes) for array in inputs]
        output, working = np.empty(shape, dtype), device.allocate(workspace)
        result = device.allocate(output.nbytes)
        pointers = [buffer.pointer for buffer in buffers]

        def enqueue() -> None:
            plugin.enqueue(shapes, pointers, (dtype, shape), result.pointer, working.pointer, device.stream)

        if recorded:  # TensorRT's users record engines; the plugin is ready for that once initialised
            replay = device.capture(enqueue)
            assert replay, "enqueue cannot be captured in a CUDA graph"
        else:
            replay = enqueue
        for buffer, array in zip(buffers, inputs, strict=True):
            device.upload(buffer.pointer, array)
        replay()
        device.download(output, result.pointer)
        device.synchronize()
        return output

    def causal(
        kv_format: KVFormat,
        seq: int,
        masked: bool = False,
        recent: tuple[int, int] | None = None,
        dims: tuple[int, int] = (128, 128),
        past: tuple[int, int] = (40, 61),
        capacity: int = 64,
    ) -> float:
        q, k, v = normal(2, 4, seq, dims[0]), normal(2, 2, seq, dims[0]), normal(2, 2, seq, dims[1])
        cache = Stored.of(kv_format, *(normal(2, 2, capacity, dim) for dim in dims))
        past_length = np.array(past, I32)
        visible = rng.integers(0, seq + 1, (2, capacity)).astype(I32) if masked else None
        alike = np.full((2, 1), seq, I32)
        inputs = [q, k, v, past_length, alike if visible is None else visible, *cache.rows]
        if kv_format.is_quantised:
            inputs.append(np.stack(cache.scales))
        more = None
        if recent:
            more = Stored.of(KVFormat.F16, *(normal(2, 2, 48, dim) for dim in dims)), np.array(recent, I32)
            inputs += [more[1], *more[0].rows]
        attributes = {"causal": 1, "softmax_scale": 0.1, "kv_format": kv_format.value}
        found = run(attributes, *inputs)
        expected = expected_attention(cache, q, k, v, past_length, 0.1, visible, more)
        return float(relative_error(found, expected))

    def packed() -> float:
        q, k, v = (normal(1, 3, 50, 64) for _ in range(3))
        bounds = np.array([0, 20, 50], I32)
        # As exported nodes are, with an empty format.
        found = run({"causal": 0, "softmax_scale": 0.125, "kv_format": ""}, q, k, v, bounds)
        segment = np.arange(50) >= 20
        return float(relative_error(found[0], attention(q[0], k[0], v[0], segment[:, None] == segment[None], 0.125)))

    def refused(attributes: dict, *inputs: np.ndarray) -> str:
        try:
            run(attributes, *inputs, recorded=False)
        except UserError as error:
            return str(error)
        return ""

    def causal_refused(kv_format: str, change: dict[int, np.ndarray], count: int = 11) -> str:
        """Of a call over a cache of 16 slots with recent tokens, some of the inputs of which are others."""
        q, new = normal(1, 4, 1, 128), normal(1, 2, 1, 128)
        words, scale = np.zeros((1, 2, 16, 32), I32), np.ones((2, 1, 2, 16), F16)
        recent = normal(1, 2, 8, 128, dtype=F16)
        inputs = [q, new, new, lengths, np.ones((1, 1), I32), words, words, scale, lengths, recent, recent]
        for position, array in change.items():
            inputs[position] = array
        return refused(text | {"kv_format": kv_format}, *inputs[:count])

    vision, text = {"causal": 0, "softmax_scale": 0.1}, {"causal": 1, "softmax_scale": 0.1, "kv_format": "f16"}
    lengths, cache, alike = np.array([4], I32), normal(1, 2, 16, 128), np.ones((1, 1), I32)
    formats = {
        f"{kv.value} {phase}": causal(kv, seq) for kv in KVFormat for phase, seq in (("prefill", 9), ("decode", 1))
    }
    K8V4, K4V4 = KVFormat.K8V4, KVFormat.K4V4
    print(
        json.dumps(
            {
                "errors": formats
                | {
                    "mask": causal(KVFormat.F32, 9, masked=True),
                    "mask over codes": causal(K8V4, 9, masked=True),
                    "mask for one token": causal(K4V4, 1, masked=True),
                    "mask of one slot": causal(KVFormat.F16, 3, masked=True, past=(1, 1), capacity=1),
                    "recent": causal(K8V4, 1, recent=(7, 0)),
                    "recent alone": causal(KVFormat.K8V8, 1, recent=(48, 1), past=(0, 0)),
                    "recent beside one slot": causal(K4V4, 1, recent=(3, 9), past=(1, 0), capacity=1),
                    "several without recent": causal(K8V4, 9, recent=(0, 0)),
                    "ranks": causal(K4V4, 9, dims=(112, 96)),
                    "ranks, recent": causal(K4V4, 1, dims=(96, 112), recent=(20, 30)),
                    "packed": packed(),
                },
                "refused": {
                    "attributes": refused({"causal": 3, "softmax_scale": 0.1}, lengths),
                    "no format": refused({"causal": 1, "softmax_scale": 0.1}, lengths),
                    "inputs": refused(vision, normal(1, 2, 8, 64), normal(1, 2, 8, 64), normal(1, 2, 8, 64)),
                    "type": refused(text, *(normal(1, 2, 4, 128) for _ in range(3)), lengths, alike, cache, cache),
                    "inputs of codes": causal_refused("k8v8", {}, 10),
                    "mask": causal_refused("k8v8", {4: np.ones((1, 5), I32)}),
                    "mask and recent": causal_refused("k8v8", {4: np.ones((1, 16), I32)}),
                    "row": causal_refused("k8v4", {}),
                    "scale": causal_refused("k8v8", {7: np.ones((1, 2, 16, 2), F16)}),
                    "recent": causal_refused("k8v8", {10: normal(1, 2, 9, 128, dtype=F16)}),
                    "head size": refused(vision, *(normal(1, 2, 8, 80) for _ in range(3)), np.array([0, 8], I32)),
                },
            }
        )
    )


if __name__ == "__main__":
    main()

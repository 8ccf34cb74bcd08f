"""Drives the plugin through its host: ``python -m tests.plugins.tensorrt.drive TARGET MAJOR``; prints JSON.

In a process of its own, because a process can have one host.
"""

import json
import sys

import numpy as np

from pascalvl.engines.device import open_device
from pascalvl.plugins.errors import UserError
from pascalvl.plugins.kernels.build import Target
from pascalvl.plugins.tensorrt.host import PluginHost
from tests.plugins.kernels.reference import attention, relative_error

F32, F16, I32 = np.float32, np.float16, np.int32


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

    def causal(name: str, dtype: type, seq: int) -> float:
        past, capacity = 40, 64
        q, k, v = normal(1, 4, seq, 128), normal(1, 2, seq, 128), normal(1, 2, seq, 128)
        keys, values = normal(1, 2, capacity, 128, dtype=dtype), normal(1, 2, capacity, 128, dtype=dtype)
        attributes = {"causal": 1, "softmax_scale": 0.1, "kv_format": name}
        found = run(attributes, q, k, v, np.array([past], I32), keys, values)
        visible = np.arange(past + seq)[None] <= past + np.arange(seq)[:, None]
        both = [np.concatenate([old[0, :, :past].astype(F32), new[0]], 1) for old, new in ((keys, k), (values, v))]
        return float(relative_error(found[0], attention(q[0], *both, visible, 0.1)))

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

    vision, text = {"causal": 0, "softmax_scale": 0.1}, {"causal": 1, "softmax_scale": 0.1, "kv_format": "f16"}
    lengths, cache = np.array([4], I32), normal(1, 2, 16, 128)
    print(
        json.dumps(
            {
                "errors": {
                    "f32 prefill": causal("f32", F32, 9),
                    "f32 decode": causal("f32", F32, 1),
                    "f16 prefill": causal("f16", F16, 9),
                    "f16 decode": causal("f16", F16, 1),
                    "packed": packed(),
                },
                "refused": {
                    "attributes": refused({"causal": 3, "softmax_scale": 0.1}, lengths),
                    "no format": refused({"causal": 1, "softmax_scale": 0.1}, lengths),
                    "inputs": refused(vision, normal(1, 2, 8, 64), normal(1, 2, 8, 64), normal(1, 2, 8, 64)),
                    "type": refused(text, *(normal(1, 2, 4, 128) for _ in range(3)), lengths, cache, cache),
                    "head size": refused(vision, *(normal(1, 2, 8, 80) for _ in range(3)), np.array([0, 8], I32)),
                },
            }
        )
    )


if __name__ == "__main__":
    main()

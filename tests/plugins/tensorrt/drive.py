"""Drives the plugin through its host: ``python -m tests.plugins.tensorrt.drive TARGET MAJOR``; prints JSON.

In a process of its own, because a process can have one host.
"""

import dataclasses
import itertools
import json
import sys
from types import ModuleType

import numpy as np

from pascalvl.engines.device import open_device
from pascalvl.plugins.errors import UserError
from pascalvl.plugins.kernels.build import Target
from pascalvl.plugins.kv_format import KVFormat, LayerLayout
from pascalvl.plugins.kv_rows import compress, expand, hadamard
from pascalvl.plugins.ops.flash_attention import op as flash_attention
from pascalvl.plugins.ops.quant_linear import op as quant_linear
from pascalvl.plugins.ops.quant_linear.onnx_body import LinearBody
from pascalvl.plugins.ops.quant_linear.op import Activation
from pascalvl.plugins.tensorrt.host import PluginHost
from pascalvl.plugins.weight_format import WeightFormat
from pascalvl.plugins.weight_rows import QuantisedWeight, linear, quantise_weight
from tests.plugins.kernels.reference import attention, relative_error

F32, F16, I32 = np.float32, np.float16, np.int32
CAPACITY = 1024
"""Slots of the cache whose workspace is asked for."""
LEAST, MOST = np.iinfo(I32).min, np.iinfo(I32).max


def main() -> None:
    target = Target(sys.argv[1])
    major = int(sys.argv[2])
    host = PluginHost(target, major)
    device = open_device(target, host.plugin)
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(F32)

    def run(
        attributes: dict,
        *inputs: np.ndarray,
        recorded: bool = target is Target.CUDA,
        op: ModuleType = flash_attention,
    ) -> np.ndarray:
        shapes = [(array.dtype, array.shape) for array in inputs]
        plugin = host.create(attributes, op.OP_NAME, op.OP_VERSION)
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

    def causal(layout: LayerLayout, seq: int, masked: bool = False) -> float:
        """Over two sequences; with a mask or without."""
        past, capacity = np.array([40, 23], I32), 64
        heads, (key_dim, value_dim) = layout.num_kv_heads, layout.dims
        q, k, v = normal(2, 4, seq, key_dim), normal(2, heads, seq, key_dim), normal(2, heads, seq, value_dim)
        rotated = layout.is_rotated, False
        rows, scales = zip(
            *(
                compress(normal(2, heads, capacity, dim), row, turned)
                for dim, row, turned in zip(layout.dims, layout.kv_format.rows, rotated, strict=True)
            ),
            strict=True,
        )
        visible = np.full((2, 1), seq, I32)
        if masked:
            visible = rng.integers(0, seq + 1, (2, capacity)).astype(I32)
        inputs = [q, k, v, past, visible, *rows]
        if layout.kv_format.is_quantised:
            inputs.append(np.stack(scales).view(I32))
        attributes = {"causal": 1, "softmax_scale": 0.1, "kv_format": layout.kv_format.value}
        found = run(attributes, *inputs)
        keys, values = (
            expand(*arguments) for arguments in zip(rows, scales, layout.kv_format.rows, layout.dims, strict=True)
        )
        errors = []
        for b in range(2):
            met = q[b]
            if layout.kv_format.is_quantised:
                met = hadamard(met) if layout.is_rotated else met
                step = np.abs(met).max(-1, keepdims=True) / 127
                met = np.rint(met / step) * step
            # Cached keys and new ones meet different forms of q: both stacked, zeros where the other form is due.
            both = np.concatenate([met, q[b]], -1)
            old, new = keys[b, :, : past[b]], k[b]
            seen = [np.arange(seq)[:, None] < np.broadcast_to(visible[b], capacity)[: past[b]]]
            stacked = [np.concatenate([old, 0 * old], -1), np.concatenate([0 * new, new], -1)]
            both_values = np.concatenate([values[b, :, : past[b]], v[b]], 1)
            seen.append(np.arange(seq)[None] <= np.arange(seq)[:, None])
            expected = attention(both, np.concatenate(stacked, 1), both_values, np.concatenate(seen, 1), 0.1)
            errors.append(relative_error(found[b], expected))
        return float(max(errors))

    def workspace(seq: int, batch: int, slots: int, name: str = "f16") -> int:
        """Bytes for inputs of these sizes, a value for each of ``slots`` in past_visible."""
        layout = LayerLayout(KVFormat(name), 1, 128, 128)
        shapes = [(F32, (batch, heads, seq, 128)) for heads in (4, 1, 1)]
        shapes += [(I32, (batch,)), (I32, (batch, slots))]
        for row, elements in zip(layout.kv_format.rows, layout.row_elements, strict=True):
            shapes.append((row.dtype, (batch, 1, CAPACITY, elements)))
        if layout.kv_format.is_quantised:
            shapes.append((I32, (2, batch, 1, CAPACITY // 2)))
        return host.create({"causal": 1, "softmax_scale": 0.1, "kv_format": name}).prepare(shapes)[1]

    def causal_refused(kv_format: str, change: dict[int, np.ndarray], count: int = 8) -> str:
        """Of a call over a cache of 16 slots, some of the inputs of which are others."""
        q, new = normal(1, 4, 1, 128), normal(1, 2, 1, 128)
        scale = np.ones((2, 1, 2, 16), F16).view(I32)
        inputs = [q, new, new, lengths, visible, words, words, scale]
        for position, array in change.items():
            inputs[position] = array
        return refused({**text, "kv_format": kv_format}, *inputs[:count])

    def packed() -> float:
        q, k, v = (normal(1, 3, 50, 64) for _ in range(3))
        bounds = np.array([0, 20, 50], I32)
        # As exported nodes are, with an empty format.
        found = run({"causal": 0, "softmax_scale": 0.125, "kv_format": ""}, q, k, v, bounds)
        segment = np.arange(50) >= 20
        return float(relative_error(found[0], attention(q[0], k[0], v[0], segment[:, None] == segment[None], 0.125)))

    def layer(bits: int, outputs: int = 20, **options: int) -> tuple[dict, list[np.ndarray]]:
        """Attributes and inputs of a QuantLinear node, 2 x 7 rows of 100 features."""
        results = outputs // 2 if options.get("activation") == Activation.SILU_GATED else outputs
        inputs = [normal(2, 7, 100)]
        if bits == 16:
            inputs.append(np.pad(normal(outputs, 100), ((0, 0), (0, 4))).astype(F16).view(I32))
        else:
            weight = quantise_weight(normal(outputs, 100), WeightFormat(bits, 32))
            if options.get("has_zero"):
                zero = rng.integers(-8, 8, weight.scale.shape).astype(F16)
                weight = dataclasses.replace(weight, zero=zero)
            inputs += weight.packed().values()
        if options.get("has_bias"):
            inputs.append(normal(outputs))
        if options.get("has_residual"):
            inputs.append(normal(2, 7, results))
        attributes = dict.fromkeys(("activation", "has_zero", "has_bias", "has_residual"), 0)
        return {"in_features": 100, "out_features": outputs, "bits": bits, "group": 32, **attributes, **options}, inputs

    def linear_error(bits: int, **options: int) -> float:
        attributes, inputs = layer(bits, **options)
        found = run(attributes, *inputs, op=quant_linear)
        names = LinearBody.of(attributes).inputs
        named = dict(zip(names, inputs, strict=True))
        weight = named["weight"].view(F16)
        if bits != 16:
            weight = QuantisedWeight.unpacked(named, 100, WeightFormat(bits, 32))
        rows = {name: named[name].reshape(14, -1) if name in named else None for name in ("x", "residual")}
        activation = Activation(attributes["activation"])
        expected = linear(rows["x"], weight, named.get("bias"), rows["residual"], activation)
        return float(relative_error(found.reshape(14, -1), expected))

    def linear_refused(change: dict[int, np.ndarray] | None = None, count: int = 5, **attributes: int) -> str:
        given, inputs = layer(8, has_bias=1, has_residual=1)
        for position, array in (change or {}).items():
            inputs[position] = array
        return refused({**given, **attributes}, *inputs[:count], op=quant_linear)

    def untold_workspace() -> str:
        """Of a call with sizes that are right, after TensorRT was told no workspace for sizes that are not."""
        attributes, inputs = layer(8)
        plugin = host.create(attributes, quant_linear.OP_NAME, quant_linear.OP_VERSION)
        shapes = [(array.dtype, array.shape) for array in inputs]
        plugin.prepare([(F32, (70_000, 100)), *shapes[1:]])
        pointers = [device.allocate(array.nbytes).pointer for array in inputs]
        try:
            plugin.enqueue(shapes, pointers, (F32, (2, 7, 20)), device.allocate(1 << 16).pointer, 0, device.stream)
        except UserError as error:
            return str(error)
        return ""

    def sizes_refused() -> dict[str, str]:
        """Of calls in which a size is what would overflow, wherever it stands; TensorRT 10 has sizes of 64 bits."""
        strange = [LEAST, -1, 0, 1 << 25, 1 << 30, MOST] + [(1 << 32) + 1, 1 << 62] * (major == 10)
        told = {}

        def check(case: str, attributes: dict, op: ModuleType, shapes: list) -> None:
            plugin = host.create(attributes, op.OP_NAME, op.OP_VERSION)
            assert plugin.prepare(shapes)[1] == 0, case
            try:
                plugin.enqueue(shapes, [0] * len(shapes), (F32, (1,)), 0, 0, device.stream)
                told[case] = ""
            except UserError as error:
                told[case] = str(error)

        usual = {"batch": 1, "heads": 4, "kv": 2, "seq": 3, "capacity": 16, "bounds": 2, "rows": 7}
        for name, value in itertools.product(usual, strange):
            batch, heads, kv, seq, capacity, bounds, rows = (usual | {name: value}).values()
            q, new = (F32, (batch, heads, seq, 128)), (F32, (batch, kv, seq, 128))
            row, case = (I32, (batch, kv, capacity, 32)), f"{name} {value}"
            if name in ("batch", "heads", "kv", "seq", "capacity"):
                past = [(I32, (batch,)), (I32, (batch, 1)), row, row, (I32, (2, batch, kv, capacity // 2))]
                check(case, {**text, "kv_format": "k8v8"}, flash_attention, [q, new, new, *past])
            if name in ("heads", "seq", "bounds"):
                packed = F32, (1, heads, seq, 64)
                check(f"packed {case}", vision, flash_attention, [packed, packed, packed, (I32, (bounds,))])
            if name == "rows":
                attributes, inputs = layer(8)
                weight = [(array.dtype, array.shape) for array in inputs[1:]]
                check(case, attributes, quant_linear, [(F32, (rows, 100)), *weight])
                check(f"{case} twice", attributes, quant_linear, [(F32, (rows, rows, 100)), *weight])
        return told

    def refused(attributes: dict, *inputs: np.ndarray, op: ModuleType = flash_attention) -> str:
        try:
            run(attributes, *inputs, recorded=False, op=op)
        except UserError as error:
            return str(error)
        return ""

    vision, text = {"causal": 0, "softmax_scale": 0.1}, {"causal": 1, "softmax_scale": 0.1, "kv_format": "f16"}
    lengths, visible, cache = np.array([4], I32), np.array([[4]], I32), normal(1, 2, 16, 128)
    words = np.zeros((1, 2, 16, 32), I32)
    print(
        json.dumps(
            {
                "errors": {
                    **{f"{f.value} decode": causal(LayerLayout(f, 2, 128, 128), 1) for f in KVFormat},
                    **{f"{f.value} prefill": causal(LayerLayout(f, 2, 128, 128), 9) for f in KVFormat},
                    "rank": causal(LayerLayout(KVFormat.K4V4, 2, 128, 96), 9),
                    "mask": causal(LayerLayout(KVFormat.K8V4, 2, 128, 128), 9, masked=True),
                    "mask for one token": causal(LayerLayout(KVFormat.F16, 2, 128, 128), 1, masked=True),
                    "packed": packed(),
                    **{f"linear, {bits} bits": linear_error(bits) for bits in (16, 8, 4)},
                    "linear with all": linear_error(4, has_zero=1, has_bias=1, has_residual=1, activation=1),
                    "linear, gated": linear_error(8, outputs=256, activation=2, has_residual=1),
                },
                "workspaces": {
                    name: [workspace(*most, *more), max(workspace(*sizes, *more) for sizes in within)]
                    for name, most, within, more in (
                        ("a token without a mask", (2, 1, CAPACITY), [(1, 1, 1)], ()),
                        ("of codes", (2, 1, CAPACITY), [(1, 1, 1), (1, 1, CAPACITY)], ("k8v4",)),
                        ("fewer sequences", (1, 3, 1), [(1, 2, 1), (1, 1, 1)], ()),
                        ("fewer tokens", (1, 600, 1), [(1, 20, 1), (1, 5, 1)], ()),
                    )
                },
                "sizes": sizes_refused(),
                "refused": {
                    "k": causal_refused("k8v8", {1: normal(1, 2, 2, 128)}),
                    "mask": causal_refused("k8v8", {4: np.ones((1, 5), I32)}),
                    "lengths": causal_refused("k8v8", {3: np.ones(2, I32)}),
                    "scale": causal_refused("k8v8", {7: np.ones((2, 1, 2, 16), I32)}),
                    "halves": causal_refused("k8v8", {7: np.ones((2, 1, 2, 8), F16)}),
                    "odd": causal_refused("k8v8", {5: words[:, :, 1:], 6: words[:, :, 1:]}),
                    "no scale": causal_refused("k8v8", {}, 7),
                    "attributes": refused({"causal": 3, "softmax_scale": 0.1}, lengths),
                    "no format": refused({"causal": 1, "softmax_scale": 0.1}, lengths),
                    "inputs": refused(vision, normal(1, 2, 8, 64), normal(1, 2, 8, 64), normal(1, 2, 8, 64)),
                    "type": refused(text, *(normal(1, 2, 4, 128) for _ in range(3)), lengths, visible, cache, cache),
                    "words": refused(
                        {**text, "kv_format": "k8v4"},
                        *(normal(1, 2, 4, 128) for _ in range(3)),
                        *(lengths, visible, words, words, np.zeros((2, 1, 2, 8), I32)),
                    ),
                    "linear features": linear_refused({0: normal(2, 7, 96)}),
                    "linear weight": linear_refused({1: np.zeros((20, 25), I32)}),
                    "linear residual": linear_refused({4: normal(2, 6, 20)}),
                    "linear inputs": linear_refused(count=4),
                    "linear types": linear_refused({2: normal(4, 24)}),
                    "linear bits": linear_refused(bits=3),
                    "linear activation": linear_refused(activation=7),
                    "linear gates": linear_refused(activation=2, has_residual=0, count=4),
                    "workspace": untold_workspace(),
                    "head size": refused(vision, *(normal(1, 2, 8, 80) for _ in range(3)), np.array([0, 8], I32)),
                },
            }
        )
    )


if __name__ == "__main__":
    main()

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
from pascalvl.plugins.kernels.library import AttentionArgs, Rows
from pascalvl.plugins.kv_format import KVFormat, LayerLayout
from pascalvl.plugins.kv_rows import hadamard
from pascalvl.plugins.ops.flash_attention import op as flash_attention
from pascalvl.plugins.ops.quant_linear import op as quant_linear
from pascalvl.plugins.ops.quant_linear.op import Activation, Norm
from pascalvl.plugins.tensorrt.host import PluginHost
from pascalvl.plugins.weight_format import WeightFormat
from pascalvl.plugins.weight_rows import InputNorm, QuantisedWeight, linear, quantise_weight
from tests.plugins.kernels import reference
from tests.plugins.kernels.reference import (
    HostRows,
    Prologue,
    Shape,
    attention,
    away_from_ties,
    expected_attention,
    random_norm,
    relative_error,
)

F32, F16, I32 = np.float32, np.float16, np.int32
CAPACITY = 1023
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
    ) -> list[np.ndarray]:
        shapes = [(array.dtype, array.shape) for array in inputs]
        plugin = host.create(attributes, op.OP_NAME, op.OP_VERSION)
        results, workspace = plugin.prepare(shapes)
        buffers = [device.allocate(array.nbytes) for array in inputs]
        outputs, working = [np.empty(shape, dtype) for dtype, shape in results], device.allocate(workspace)
        given = [device.allocate(array.nbytes) for array in outputs]
        pointers, to = ([buffer.pointer for buffer in side] for side in (buffers, given))

        def enqueue() -> None:
            plugin.enqueue(shapes, pointers, results, to, working.pointer, device.stream)

        if recorded:  # TensorRT's users record engines; the plugin is ready for that once initialised
            replay = device.capture(enqueue)
            assert replay, "enqueue cannot be captured in a CUDA graph"
        else:
            replay = enqueue
        for buffer, array in zip(buffers, inputs, strict=True):
            device.upload(buffer.pointer, array)
        replay()
        for array, pointer in zip(outputs, to, strict=True):
            device.download(array, pointer)
        device.synchronize()
        return outputs

    def attributes_of(layout: LayerLayout, num_heads: int) -> dict:
        return {
            **{"causal": 1, "softmax_scale": 0.1, "epsilon": 0.1, "kv_format": layout.kv_format.value},
            **{"num_heads": num_heads, "num_kv_heads": layout.num_kv_heads},
            **{"head_dim": layout.head_dim, "value_dim": layout.value_dim},
        }

    def tables(*shape: int) -> list[np.ndarray]:
        """Cosines and sines ``[..., head_dim]``."""
        angle = np.tile(rng.uniform(0, 6.3, (*shape[:-1], shape[-1] // 2)), 2)
        return [f(angle).astype(F32) for f in (np.cos, np.sin)]

    def causal(layout: LayerLayout, seq: int, masked: bool = False) -> list[float]:
        """Over two sequences; with a mask or without. Errors of the result, and of new keys and values."""
        past, capacity = np.array([40, 23], I32), 65
        heads, (head_dim, value_dim) = layout.num_kv_heads, layout.dims
        q, k, v = normal(2, 4, seq, head_dim), normal(2, heads, seq, head_dim), normal(2, heads, seq, value_dim)
        prologue = Prologue(normal(head_dim), normal(head_dim), *tables(2, seq, head_dim), 0.1)
        cache, new = (
            HostRows(
                device.kernels,
                Shape(2, 4, heads, head_dim, value_dim, slots),
                layout.kv_format.rows,
                layout.is_rotated,
            )
            for slots in (capacity, seq)
        )
        cache.fill(normal(1, 2, heads, capacity, head_dim), normal(1, 2, heads, capacity, value_dim))
        visible = rng.integers(0, seq + 1, (2, capacity)).astype(I32) if masked else None
        out, *rows = run(
            attributes_of(layout, 4),
            *(reference.packed(q, k, v), prologue.q_norm, prologue.k_norm, prologue.rope_cos, prologue.rope_sin),
            *(past, np.full((2, 1), seq, I32) if visible is None else visible),
            *(array[0].view(F32 if layout.kv_format is KVFormat.F32 else I32) for array in cache.arrays),
        )
        for array, found in zip(new.arrays, rows, strict=True):
            array[0] = found.view(array.dtype)
        met, keys = (prologue.of(x, norm).astype(F32) for x, norm in ((q, prologue.q_norm), (k, prologue.k_norm)))
        expected = expected_attention(cache, new, met, past, 0.1, visible)
        keys = hadamard(keys) if layout.is_rotated else keys
        errors = [relative_error(new.contents(which), x) for which, x in enumerate((keys, v))]
        return [relative_error(out.reshape(expected.shape), expected), *errors]

    def causal_shapes(layout: LayerLayout, num_heads: int, batch: int, seq: int, capacity: int, slots: int) -> list:
        """Types and shapes of a node's inputs, a value for each of ``slots`` in past_visible."""
        table = F32, (batch, seq, layout.head_dim)
        shapes = [(F32, (batch, seq, num_heads * layout.head_dim + layout.num_kv_heads * sum(layout.dims)))]
        shapes += [(F32, (layout.head_dim,))] * 2 + [table, table, (I32, (batch,)), (I32, (batch, slots))]
        lead = batch, layout.num_kv_heads, capacity
        for row, elements in zip(layout.kv_format.rows, layout.row_elements, strict=True):
            shapes.append((row.dtype, (*lead, elements)))
        return [*shapes, (I32, lead)] if layout.kv_format.is_quantised else shapes

    def workspace(batch: int, seq: int, slots: int, name: str) -> list[int]:
        """Bytes for inputs of these sizes; and the most that the kernels ask for with fewer tokens and sequences."""
        layout = LayerLayout(KVFormat(name), 1, 128, 128)
        asked = host.create(attributes_of(layout, 4)).prepare(causal_shapes(layout, 4, batch, seq, CAPACITY, slots))[1]
        here = device.allocate(16).pointer
        rows, (key_format, value_format) = Rows(key=here, value=here, scale=here), layout.kv_format.rows
        needed = (
            device.kernels.attention_workspace(
                AttentionArgs(
                    **dict.fromkeys(("qkv", "out", "past_length"), here),
                    **{"new_rows": rows, "past": rows, "past_visible": here if masked else None},
                    **{"batch": b, "num_heads": 4, "num_kv_heads": 1, "seq": s, "head_dim": 128, "value_dim": 128},
                    **{"key_format": key_format, "value_format": value_format, "capacity": CAPACITY, "causal": 1},
                )
            )
            for b, s, masked in itertools.product(range(1, batch + 1), range(1, seq + 1), (False, True))
        )
        return [asked, max(needed)]

    def causal_refused(kv_format: str, change: dict[int, np.ndarray] | None = None, count: int = 10) -> str:
        """Of a call over a cache of 15 slots, some of the inputs of which are others."""
        layout = LayerLayout(KVFormat(kv_format), 2, 128, 128)
        inputs = [np.ones(shape, dtype) for dtype, shape in causal_shapes(layout, 4, 1, 1, 15, 1)]
        for position, array in (change or {}).items():
            inputs[position] = array
        return refused(attributes_of(layout, 4), *inputs[:count])

    def packed() -> float:
        q, k, v = (normal(1, 3, 50, 64) for _ in range(3))
        prologue = Prologue(None, None, *tables(1, 50, 64))
        found = run(
            vision,
            *(reference.packed(q, k, v)[0], prologue.rope_cos[0], prologue.rope_sin[0]),
            np.array([0, 20, 50], I32),
        )
        segment = np.arange(50) >= 20
        visible = segment[:, None] == segment[None]
        expected = attention(prologue.roped(q)[0], prologue.roped(k)[0], v[0], visible, vision["softmax_scale"])
        return relative_error(found[0].reshape(50, 3, 64), expected)

    def packed_refused(*change: np.ndarray) -> str:
        inputs = [np.ones((8, 2 * 3 * 64), F32), *[np.ones((8, 64), F32)] * 2, np.array([0, 8], I32)]
        return refused({**vision, "num_heads": 2, "num_kv_heads": 2}, *change, *inputs[len(change) :])

    def layer(bits: int, outputs: int = 20, inputs: int = 100, **options: int) -> tuple[dict, dict[str, np.ndarray]]:
        """Attributes, and inputs by name, of a QuantLinear node, 2 x 7 rows of 100 features."""
        results = outputs // 2 if options.get("activation") == Activation.SILU_GATED else outputs
        attributes = {"in_features": inputs, "out_features": outputs, "bits": bits, "group": 32}
        attributes |= dict.fromkeys(("activation", "has_zero", "has_bias", "has_residual", "norm"), 0)
        attributes |= {"norm_size": inputs if options.get("norm") else 0, "epsilon": 0.0, **options}
        form = WeightFormat(bits, 32)
        named = {"x": normal(2, 7, inputs)}
        if form.is_quantised:
            weight = quantise_weight(normal(outputs, inputs), form)
            if options.get("has_zero"):
                zero = rng.integers(-8, 8, weight.scale.shape).astype(F16)
                weight = dataclasses.replace(weight, zero=zero)
            named |= weight.packed()
        else:
            floats = np.pad(normal(outputs, inputs), ((0, 0), (0, form.padded(inputs) - inputs)))
            named["weight"] = floats.astype(F16).view(I32) if bits == 16 else floats
        if attributes["has_bias"]:
            named["bias"] = normal(outputs)
        if attributes["has_residual"]:
            named["residual"] = normal(2, 7, results)
        if attributes["norm"]:
            norm = random_norm(rng, Norm(attributes["norm"]), attributes["norm_size"])
            attributes["epsilon"] = norm.epsilon
            named["norm_weight"] = norm.weight
            if norm.bias is not None:
                named["norm_bias"] = norm.bias
            if form.is_quantised:
                named["x"] = away_from_ties(named["x"].reshape(14, -1), norm, form).reshape(2, 7, -1)
        return attributes, named

    def linear_error(bits: int, **options: int) -> float:
        attributes, named = layer(bits, **options)
        (found,) = run(attributes, *named.values(), op=quant_linear)
        weight = named["weight"].view(F16 if bits == 16 else F32)
        if bits < 16:
            weight = QuantisedWeight.unpacked(named, named["x"].shape[-1], WeightFormat(bits, 32))
        rows = {name: named[name].reshape(14, -1) if name in named else None for name in ("x", "residual")}
        activation, norm = Activation(attributes["activation"]), None
        if attributes["norm"]:
            operands = named["norm_weight"], attributes["epsilon"], named.get("norm_bias")
            norm = InputNorm(Norm(attributes["norm"]), *operands)
        expected = linear(rows["x"], weight, named.get("bias"), rows["residual"], activation, norm)
        return float(relative_error(found.reshape(14, -1), expected))

    def linear_refused(change: dict[str, np.ndarray] | None = None, count: int = 7, **attributes: int | float) -> str:
        given, named = layer(8, has_bias=1, has_residual=1, norm=2)
        inputs = list((named | (change or {})).values())
        return refused({**given, **attributes}, *inputs[:count], op=quant_linear)

    def untold_workspace() -> str:
        """Of a call with sizes that are right, after TensorRT was told no workspace for sizes that are not."""
        attributes, named = layer(8)
        inputs = list(named.values())
        plugin = host.create(attributes, quant_linear.OP_NAME, quant_linear.OP_VERSION)
        shapes = [(array.dtype, array.shape) for array in inputs]
        plugin.prepare([(F32, (70_000, 100)), *shapes[1:]])
        pointers = [device.allocate(array.nbytes).pointer for array in inputs]
        try:
            plugin.enqueue(shapes, pointers, [(F32, (2, 7, 20))], [device.allocate(1 << 16).pointer], 0, device.stream)
        except UserError as error:
            return str(error)
        return ""

    def sizes_refused() -> dict[str, str]:
        """Of calls in which a size is what would overflow, wherever it stands; TensorRT 10 has sizes of 64 bits."""
        strange = [LEAST, -1, 0, 1 << 25, 1 << 30, MOST] + [(1 << 32) + 1, 1 << 62] * (major == 10)
        told = {}

        def check(case: str, attributes: dict, op: ModuleType, shapes: list) -> None:
            plugin = host.create(attributes, op.OP_NAME, op.OP_VERSION)
            results, needed = plugin.prepare(shapes)
            assert needed == 0, case
            try:
                plugin.enqueue(shapes, [0] * len(shapes), results, [0] * len(results), 0, device.stream)
                told[case] = ""
            except UserError as error:
                told[case] = str(error)

        usual = {"batch": 1, "seq": 3, "capacity": 15, "bounds": 2, "rows": 7}
        layout = LayerLayout(KVFormat.K8V8, 2, 128, 128)
        for name, value in itertools.product(usual, strange):
            batch, seq, capacity, bounds, rows = (usual | {name: value}).values()
            case = f"{name} {value}"
            if name in ("batch", "seq", "capacity"):
                shapes = causal_shapes(layout, 4, batch, seq, capacity, 1)
                check(case, attributes_of(layout, 4), flash_attention, shapes)
            if name in ("seq", "bounds"):
                table = F32, (seq, 64)
                check(f"packed {case}", vision, flash_attention, [(F32, (seq, 576)), table, table, (I32, (bounds,))])
            if name == "rows":
                attributes, named = layer(8)
                weight = [(array.dtype, array.shape) for name, array in named.items() if name != "x"]
                check(case, attributes, quant_linear, [(F32, (rows, 100)), *weight])
                check(f"{case} twice", attributes, quant_linear, [(F32, (rows, rows, 100)), *weight])
        for name, value in itertools.product(("num_heads", "num_kv_heads", "head_dim", "value_dim"), strange[:6]):
            told[f"{name} {value}"] = refused({**attributes_of(layout, 4), name: value})
            told[f"packed {name} {value}"] = refused({**vision, name: value})
        return told

    def refused(attributes: dict, *inputs: np.ndarray, op: ModuleType = flash_attention) -> str:
        try:
            run(attributes, *inputs, recorded=False, op=op)
        except UserError as error:
            return str(error)
        return ""

    # As exported nodes are, with an empty format.
    vision = {"causal": 0, "softmax_scale": 0.125, "epsilon": 0.0, "kv_format": ""}
    vision |= {"num_heads": 3, "num_kv_heads": 3, "head_dim": 64, "value_dim": 64}
    text = attributes_of(LayerLayout(KVFormat.F16, 2, 128, 128), 4)
    floats, words = np.ones((1, 2, 15, 128), F32), np.ones((1, 2, 15, 32), I32)
    print(
        json.dumps(
            {
                "causal": {
                    **{f"{f.value} decode": causal(LayerLayout(f, 2, 128, 128), 1) for f in KVFormat},
                    **{f"{f.value} prefill": causal(LayerLayout(f, 2, 128, 128), 9) for f in KVFormat},
                    "k4v4 rank": causal(LayerLayout(KVFormat.K4V4, 2, 128, 96), 9),
                    "k8v4 mask": causal(LayerLayout(KVFormat.K8V4, 2, 128, 128), 9, masked=True),
                    "f16 mask for one token": causal(LayerLayout(KVFormat.F16, 2, 128, 128), 1, masked=True),
                },
                "errors": {
                    "packed": packed(),
                    **{f"linear, {bits} bits": linear_error(bits) for bits in (32, 16, 8, 4)},
                    "linear with all": linear_error(4, has_zero=1, has_bias=1, has_residual=1, activation=1),
                    "linear, gated": linear_error(8, outputs=256, activation=2, has_residual=1),
                    **{f"RMS, {bits} bits": linear_error(bits, norm=1, activation=3) for bits in (32, 16, 8, 4)},
                    **{f"layer norm, {bits} bits": linear_error(bits, norm=2, has_residual=1) for bits in (16, 4)},
                    "norms of a part": linear_error(8, inputs=192, norm=2, norm_size=64),
                },
                "workspaces": {
                    f"{sizes} {name}": workspace(*sizes, name)
                    for name in ("f16", "k8v4")
                    for sizes in ((1, 1, 1), (2, 1, CAPACITY), (3, 7, 1), (1, 600, 1))
                },
                "sizes": sizes_refused(),
                "refused": {
                    "qkv": causal_refused("k8v8", {0: np.ones((1, 1, 512), F32)}),
                    "qkv's axes": causal_refused("k8v8", {0: np.ones((1, 1024), F32)}),
                    "norm": causal_refused("k8v8", {2: np.ones(64, F32)}),
                    "table": causal_refused("k8v8", {3: np.ones((1, 2, 128), F32)}),
                    "mask": causal_refused("k8v8", {6: np.ones((1, 5), I32)}),
                    "lengths": causal_refused("k8v8", {5: np.ones(2, I32)}),
                    "scale": causal_refused("k8v8", {9: np.ones((1, 2, 16), I32)}),
                    "halves": causal_refused("k8v8", {9: np.ones((1, 2, 15), F16)}),
                    "no scale": causal_refused("k8v8", count=9),
                    "type": causal_refused("f16", {7: floats, 8: floats}),
                    "words": causal_refused("k8v4", {8: words}),
                    "axes": causal_refused("k8v4", {7: words[0]}),
                    "attributes": refused({**text, "causal": 3}),
                    "no format": refused({**text, "kv_format": ""}),
                    "heads": refused({**text, "num_heads": 5}),
                    "key size": refused({**text, "head_dim": 80}),
                    "inputs": refused(vision, *[floats] * 3),
                    "packed qkv": packed_refused(np.ones((8, 192), F32)),
                    "bounds": packed_refused(*[np.ones((8, n), F32) for n in (384, 64, 64)], np.ones((1, 2), I32)),
                    "head size": refused({**vision, "head_dim": 80, "value_dim": 80}),
                    "linear features": linear_refused({"x": normal(2, 7, 96)}),
                    "linear weight": linear_refused({"weight": np.zeros((20, 25), I32)}),
                    "linear residual": linear_refused({"residual": normal(2, 6, 20)}),
                    "linear inputs": linear_refused(count=4),
                    "linear types": linear_refused({"scale": normal(4, 24)}),
                    "linear floats": linear_refused(bits=32, count=6),
                    "norm's weight": linear_refused({"norm_weight": normal(96)}),
                    "norm's bias": linear_refused({"norm_bias": normal(1, 100)}),
                    "linear norm": linear_refused(norm=3),
                    "norm size": linear_refused(norm_size=48),
                    "norm's groups": linear_refused(norm_size=50),
                    "no norm": linear_refused(norm=0),
                    "epsilon": linear_refused(epsilon=-0.5),
                    "linear bits": linear_refused(bits=3),
                    "linear activation": linear_refused(activation=7),
                    "linear gates": linear_refused(activation=2),
                    "workspace": untold_workspace(),
                },
            }
        )
    )


if __name__ == "__main__":
    main()

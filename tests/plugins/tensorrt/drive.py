"""Drives the plugin through its host: ``python -m tests.plugins.tensorrt.drive TARGET MAJOR``; prints JSON.

In a process of its own, because a process can have one host.
"""

import dataclasses
import itertools
import json
import sys
from types import ModuleType

import numpy as np

from pascalvl.engines.device.memory import ALIGNMENT, open_device
from pascalvl.plugins.errors import UserError
from pascalvl.plugins.kernels.build import Target
from pascalvl.plugins.kernels.library import AttentionArgs, Rows
from pascalvl.plugins.kv_format import PAGE_SLOTS, KVFormat, LayerLayout
from pascalvl.plugins.ops.flash_attention import op as flash_attention
from pascalvl.plugins.ops.quant_linear import op as quant_linear
from pascalvl.plugins.ops.quant_linear.op import Activation, Norm
from pascalvl.plugins.tensorrt.host import PluginHost
from pascalvl.plugins.weight_format import WeightFormat
from pascalvl.plugins.weight_rows import InputNorm, QuantisedWeight, linear, quantise_weight
from tests.plugins.kernels.reference import away_from_ties, random_norm
from tests.plugins.tensorrt import paged
from tests.plugins.tensorrt.paged import LEAST, MOST, Case, attributes_of, relative_error

F32, F16, I32 = np.float32, np.float16, np.int32
GUARD = 4096
"""Bytes on either side of what is given to the plugin that it may not write."""
PATTERN = 0xA5


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
        sizes = [array.nbytes for array in inputs]
        outputs = [np.empty(shape, dtype) for dtype, shape in results]
        sizes += [*(array.nbytes for array in outputs), workspace]
        memory = device.allocate(GUARD + sum(_padded(size) + GUARD for size in sizes))
        starts = np.cumsum([GUARD, *(_padded(size) + GUARD for size in sizes[:-1])])
        *pointers, working = (memory.pointer + int(start) for start in starts)
        to = pointers[len(inputs) :]
        before = np.full(memory.nbytes, PATTERN, np.uint8)
        for start, size in zip(starts, sizes, strict=True):
            before[start : start + size] = 0xFF  # no number, wherever it is read before it is written
        for start, array in zip(starts[: len(inputs)], inputs, strict=True):
            before[start : start + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)

        def enqueue() -> None:
            plugin.enqueue(shapes, pointers[: len(inputs)], results, to, working, device.stream)

        if recorded:  # TensorRT's users record engines; the plugin is ready for that once initialised
            replay = device.capture(enqueue)
            assert replay, "enqueue cannot be captured in a CUDA graph"
        else:
            replay = enqueue
        device.upload(memory.pointer, before)
        replay()
        after = np.empty_like(before)
        device.download(after, memory.pointer)
        device.synchronize()
        written = np.zeros(memory.nbytes, bool)
        for start, size in list(zip(starts, sizes, strict=True))[len(inputs) :]:
            written[start : start + size] = True
        assert (after[~written] == before[~written]).all(), "the plugin wrote beside its outputs and its workspace"
        for array, start in zip(outputs, starts[len(inputs) : -1], strict=True):
            array.reshape(-1).view(np.uint8)[...] = after[start : start + array.nbytes]
        return outputs

    def causal(case: Case) -> dict[str, float]:
        """Errors of the result, and of new keys and values; and the largest number of what comes out for padding."""
        inputs = paged.draw(rng, case)
        out, *rows = run(case.attributes, *inputs.arrays)
        padding = out[sum(case.lengths) :]
        assert padding.shape[0] == case.padding
        return {
            **dict(zip(("result", "key", "value"), paged.errors(case, inputs, out, *rows), strict=True)),
            "padding": float(np.abs(padding).max(initial=0)),
        }

    def made_up(case: Case, name: str | None = None) -> bool:
        """Whether numbers came out for the new tokens' keys and values; integers of the input of this name, or of all,
        are any."""
        inputs = paged.draw(rng, case)
        for field in ("cu_seqlens", "past_length", "page_table", "past_visible"):
            if name in (None, field):
                shape = getattr(inputs, field).shape
                anything = rng.integers(LEAST, MOST, shape, I32, endpoint=True)
                close = rng.integers(-2, case.tokens + 3, shape, I32)
                chosen = np.where(rng.random(shape) < 0.5, anything, close).astype(I32)
                inputs = dataclasses.replace(inputs, **{field: chosen})
        _, *rows = run(case.attributes, *inputs.arrays)
        return all(np.isfinite(paged.contents(case.layout, rows, which)).all() for which in range(2))

    def workspace(
        layout: LayerLayout, num_heads: int, tokens: int, batch: int, sequence_pages: int, masked: bool = False
    ) -> list[int]:
        """Bytes for inputs of these sizes; and the most that the kernels ask for with as many or fewer of each, and
        without a mask where there is one."""
        slots = sequence_pages * PAGE_SLOTS if masked else 1
        shapes = paged.shapes(layout, num_heads, tokens, batch, sequence_pages, 5, slots)
        asked = host.create(attributes_of(layout, num_heads)).prepare(shapes)[1]
        here = device.allocate(16).pointer
        rows, (key_format, value_format) = Rows(key=here, value=here, scale=here), layout.kv_format.rows
        args = AttentionArgs(
            **dict.fromkeys(("qkv", "out", "cu_seqlens", "past_length", "page_table"), here),
            **{"new_rows": rows, "pool": rows, "num_heads": num_heads, "num_kv_heads": layout.num_kv_heads},
            **{"head_dim": layout.head_dim, "value_dim": layout.value_dim, "key_format": key_format},
            **{"value_format": value_format, "num_pages": 5, "causal": 1},
        )
        needed = 0
        sizes = (range(1, most + 1) for most in (tokens, batch, sequence_pages))
        for *smaller, has_mask in itertools.product(*sizes, {False, masked}):
            args.tokens, args.batch, args.sequence_pages = smaller
            args.past_visible = here if has_mask else None
            needed = max(needed, device.kernels.attention_workspace(args))
        return [asked, needed]

    def causal_refused(kv_format: str, change: dict[int, np.ndarray] | None = None, count: int = 12) -> str:
        """Of a call of a token over two pages, some of the inputs of which are others."""
        layout = LayerLayout(KVFormat(kv_format), 2, 128, 128)
        inputs = [np.ones(shape, dtype) for dtype, shape in paged.shapes(layout, 4, 1, 1, 2, 3, 1)]
        for position, array in (change or {}).items():
            inputs[position] = array
        return refused(attributes_of(layout, 4), *inputs[:count])

    def packed() -> float:
        """Over sequences of unequal length, one of none."""
        qkv, (cos, sin), bounds = (
            normal(220, 3 * 3 * 64),
            paged.tables(rng, 220, 64),
            np.array([0, 20, 20, 150, 220], I32),
        )
        (found,) = run(vision, qkv, cos, sin, bounds)
        q, k, v = paged.split_heads(qkv, 3, LayerLayout(KVFormat.F32, 3, 64, 64))
        sequence = np.searchsorted(bounds, np.arange(220), "right")
        sees = sequence[:, None] == sequence
        expected = paged.attention(*(paged.rope(x, cos, sin) for x in (q, k)), v, sees, vision["softmax_scale"])
        return relative_error(found.reshape(expected.shape), expected)

    def packed_made_up() -> None:
        """What comes out means nothing, but lies where it should."""
        for bounds in (rng.integers(LEAST, MOST, 5, I32), np.array([-5, 90, 20, 66, 1000], I32)):
            run(vision, normal(70, 3 * 3 * 64), *paged.tables(rng, 70, 64), bounds)

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

        usual = {"tokens": 3, "bounds": 2, "sequence_pages": 2, "pages": 3, "rows": 7}
        layout = LayerLayout(KVFormat.K8V8, 2, 128, 128)
        for name, value in itertools.product(usual, strange):
            tokens, bounds, sequence_pages, pages, rows = (usual | {name: value}).values()
            case = f"{name} {value}"
            if name != "rows":
                batch = max(bounds, 1) - 1
                for slots in (1, min(sequence_pages, 1 << 40) * PAGE_SLOTS):
                    shapes = paged.shapes(layout, 4, tokens, batch, sequence_pages, pages, slots)
                    shapes[5] = I32, (bounds,)
                    check(f"{case}, {slots} slots", attributes_of(layout, 4), flash_attention, shapes)
            if name in ("tokens", "bounds"):
                table = F32, (tokens, 64)
                shapes = [(F32, (tokens, 576)), table, table, (I32, (bounds,))]
                check(f"packed {case}", vision, flash_attention, shapes)
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
    floats, words = np.ones((3, 2, PAGE_SLOTS, 128), F32), np.ones((3, 2, PAGE_SLOTS, 32), I32)
    packed_made_up()
    nobody = {7: np.ones((0, 2), I32), 8: np.ones((0, 1), I32)}
    cases = paged.cases()
    f16, k8v4 = (LayerLayout(KVFormat(name), 1, 128, 128) for name in ("f16", "k8v4"))
    narrow = LayerLayout(KVFormat.F32, 1, 128, 64)

    # The most may be needed by the largest call, a decode step, one sequence or some of them, and fewer tokens.
    workspaces = {
        "a token": workspace(f16, 4, 1, 1, 8),
        "a token, masked": workspace(k8v4, 4, 1, 1, 8, masked=True),
        "a prompt": workspace(f16, 4, 600, 1, 8),
        "a prompt, masked": workspace(k8v4, 4, 600, 1, 8, masked=True),
        "fewer tokens than sequences": workspace(f16, 4, 2, 9, 8),
        "fewer tokens than sequences, masked": workspace(k8v4, 4, 2, 9, 8, masked=True),
        "a decode step": workspace(f16, 4, 9, 9, 3),
        "many sequences": workspace(k8v4, 4, 60, 20, 3),
        "two sequences": workspace(k8v4, 4, 60, 2, 8),
        "two sequences of three": workspace(k8v4, 4, 16, 3, 4),
        "large groups, masked": workspace(narrow, 8, 60, 3, 8, masked=True),
        "groups of which tiles have no whole number": workspace(narrow, 3, 100, 3, 8),
        "groups larger than a tile": workspace(narrow, 200, 5, 3, 8),
        "heads": workspace(LayerLayout(KVFormat.K4V4, 2, 96, 112), 16, 40, 3, 8),
    }
    print(
        json.dumps(
            {
                "causal": {name: causal(case) for name, case in cases.items()},
                "made up": {
                    f"{name}, {field}": made_up(cases[name], field)
                    for name in ("f16 decode step", "k8v4 sequences of any length", "f32 mask", "f32 splits of a chunk")
                    for field in ("cu_seqlens", "past_length", "page_table", "past_visible", None)
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
                "workspaces": workspaces,
                "sizes": sizes_refused(),
                "refused": {
                    "qkv": causal_refused("k8v8", {0: np.ones((1, 512), F32)}),
                    "qkv's axes": causal_refused("k8v8", {0: np.ones((1, 1, 1024), F32)}),
                    "no axes": causal_refused("k8v8", {0: np.ones((), F32)}),
                    "norm": causal_refused("k8v8", {2: np.ones(64, F32)}),
                    "table": causal_refused("k8v8", {3: np.ones((2, 128), F32)}),
                    "sine": causal_refused("k8v8", {4: np.ones((1, 64), F32)}),
                    "causal bounds": causal_refused("k8v8", {5: np.ones((1, 2), I32)}),
                    "no sequences": causal_refused("k8v8", {5: np.ones(1, I32), 6: np.ones(0, I32), **nobody}),
                    "lengths": causal_refused("k8v8", {6: np.ones(2, I32)}),
                    "table's axes": causal_refused("k8v8", {7: np.ones(2, I32)}),
                    "page table": causal_refused("k8v8", {7: np.ones((2, 2), I32)}),
                    "mask": causal_refused("k8v8", {8: np.ones((1, 255), I32)}),
                    "mask of a page": causal_refused("k8v8", {8: np.ones((1, 128), I32)}),
                    "mask's axes": causal_refused("k8v8", {8: np.ones(256, I32)}),
                    "mask's sequences": causal_refused("k8v8", {8: np.ones((2, 1), I32)}),
                    "scale": causal_refused("k8v8", {11: np.ones((3, 2, 127), I32)}),
                    "halves": causal_refused("k8v8", {11: np.ones((3, 2, PAGE_SLOTS), F16)}),
                    "no scale": causal_refused("k8v8", count=11),
                    "type": causal_refused("f16", {9: floats, 10: floats}),
                    "words": causal_refused("k8v4", {10: words}),
                    "axes": causal_refused("k8v4", {9: words[0]}),
                    "slots": causal_refused("k8v4", {9: np.ones((3, 2, 64, 32), I32)}),
                    "heads of the pool": causal_refused("k8v4", {9: np.ones((3, 1, PAGE_SLOTS, 32), I32)}),
                    "values' pages": causal_refused("k8v4", {10: np.ones((2, 2, PAGE_SLOTS, 16), I32)}),
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


def _padded(size: int) -> int:
    """What follows is aligned as TensorRT's tensors are."""
    return -(-size // ALIGNMENT) * ALIGNMENT


if __name__ == "__main__":
    main()

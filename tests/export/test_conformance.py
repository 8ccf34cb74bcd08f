"""Each thing that TensorRT's importers refuse or misread is found and named; what comes nearest to it passes."""

import onnx
import onnx.parser
import pytest

from pascalvl.export import conformance
from pascalvl.plugins.errors import UserError


def graph(text: str, ir_version: int = 8, opset: int = 17, **changes: str) -> onnx.ModelProto:
    """A model of the text of a graph, of input ``x`` and output ``y`` if it is of nodes alone."""
    if "=>" not in text:
        text = f"g (float[n, s, 64] x) => (float[n, s, 64] y) {{ {text} }}"
    opsets = f'["" : {opset}, "pascalvl" : 1, "pascalvl.w8" : 1, "com.microsoft" : 1]'
    model = onnx.parser.parse_model(f"<ir_version: {ir_version}, opset_import: {opsets}> {text}")
    for name, value in changes.items():
        setattr(model, name, value)
    return model


def of(nodes: str, *others: str, x: str = "float[n, s, 64]", y: str = "float[n, s, 64]") -> onnx.ModelProto:
    """A graph with initializers, types of intermediate values and further inputs, those with a dot before them."""
    inputs = [f"{x} x", *(other[1:] for other in others if other.startswith("."))]
    values = [other for other in others if not other.startswith(".")]
    return graph(f"g ({', '.join(inputs)}) => ({y} y) <{', '.join(values)}> {{ {nodes} }}")


def plugin(attributes: str, operands: str = "x", domain: str = "pascalvl") -> str:
    return f"y = {domain}.FlashAttention2 <{attributes}> ({operands})"


RULES = {
    "IR version": (graph("y = Relu (x)", ir_version=9), "IR version 9, at most 8", graph("y = Relu (x)")),
    "opset": (graph("y = Relu (x)", opset=18), "opset 18, expected 13 to 17", graph("y = Relu (x)", opset=17)),
    "an opset whose axes are attributes": (
        graph("y = Relu (x)", opset=12),
        "opset 12, expected 13 to 17",
        graph("y = Relu (x)", opset=13),
    ),
    "what TensorRT wrote itself": (
        graph("y = Relu (x)", producer_name="TensorRT"),
        "producer TensorRT",
        graph("y = Relu (x)", producer_name="pascalvl"),
    ),
    "an operator without rules": (
        graph("y = Softmax (x)"),
        "(Softmax): operator Softmax is not supported",
        graph("y = Tanh (x)"),
    ),
    "layer norms": (
        of("y = LayerNormalization (x, w)", "float[64] w"),
        "operator LayerNormalization is not supported, 8.6 hands it to Myelin",
        of(
            "m = ReduceMean <axes = [-1]> (x) c = Sub (x, m) y = Mul (c, w)",
            *("float[64] w = {1}", "float[n, s, 1] m", "float[n, s, 64] c"),
        ),
    ),
    "an operator of a foreign domain": (
        graph("y = com.microsoft.Gelu (x)"),
        "operator com.microsoft.Gelu is not supported",
        graph("y = Erf (x)"),
    ),
    "a known name in a foreign domain": (
        graph("y = com.microsoft.Relu (x)"),
        "operator com.microsoft.Relu is not supported",
        graph("y = Relu (x)"),
    ),
    "a plugin in a foreign domain": (
        graph(plugin("causal = 0", domain="com.microsoft")),
        "operator com.microsoft.FlashAttention2 is not supported",
        graph(plugin("causal = 0")),
    ),
    "a subgraph": (
        of("y = If (c) <then_branch = t () => (float[1] a) {a = Constant <value = float[1] {1.0}> ()}>", ".bool[1] c"),
        "operator If is not supported",
        graph("y = Relu (x)"),
    ),
    "an attribute of a later opset": (
        graph("y = ReduceMean <axes = [1], keepdims = 1, noop_with_empty_axes = 0> (x)"),
        "attribute noop_with_empty_axes has no meaning to importers",
        graph("y = ReduceMean <axes = [1], keepdims = 1> (x)"),
    ),
    "an attribute left out": (
        graph("y = ReduceMean (x)"),
        "attribute axes is missing",
        graph("y = ReduceMean <axes = [2]> (x)"),
    ),
    "doubles": (of("y = Relu (x)", x="double[n, 64]"), "'x' has type DOUBLE, expected FLOAT", graph("y = Relu (x)")),
    "halves at a plugin": (
        of(plugin("causal = 0", "x, past"), ".float16[n, 64] past"),
        "past has type FLOAT16, expected FLOAT or INT32",
        of(plugin("causal = 0", "x, past"), ".int32[n, 32] past"),
    ),
    "halves among the weights": (
        of("y = pascalvl.w8.QuantLinear <bits = 8> (x, w)", "float16[2] w = {1, 2}"),
        "constant 'w' has type FLOAT16, expected FLOAT or INT32",
        of("y = pascalvl.w8.QuantLinear <bits = 8> (x, w)", "int32[1] w = {15360}"),
    ),
    "bytes among the weights": (
        of("y = pascalvl.w8.QuantLinear <bits = 8> (x, w)", "uint8[2] w = {1, 2}"),
        "constant 'w' has type UINT8",
        of("y = pascalvl.w8.QuantLinear <bits = 8> (x, w)", "int32[2] w = {1, 2}"),
    ),
    "int64 between nodes": (
        of(plugin("causal = 0", "x, lengths"), ".int64[n] lengths"),
        "'lengths' has type INT64, expected FLOAT or INT32",
        of(plugin("causal = 0", "x, lengths"), ".int32[n] lengths"),
    ),
    "int64 as a constant of a plugin": (
        of(plugin("causal = 0", "x, lengths"), "int64[1] lengths = {3}"),
        "lengths has type INT64, expected FLOAT or INT32",
        of(plugin("causal = 0", "x, lengths"), "int32[1] lengths = {3}"),
    ),
    "conditions": (
        of("y = Add (x, c)", ".bool[n, s, 64] c"),
        "c has type BOOL, expected FLOAT",
        of("y = Add (x, c)", ".float[n, s, 64] c"),
    ),
    "arithmetic of integers": (
        of("z = Mul (i, i) y = Gather (x, z)", ".int32[2] i", "int32[2] z"),
        "i has type INT32, expected FLOAT",
        of("y = Gather (x, i)", ".int32[2] i"),
    ),
    "powers of another type": (
        of("y = Pow (x, e)", "int64[1] e = {2}"),
        "e has type INT64, expected FLOAT",
        of("y = Pow (x, e)", "float[1] e = {2}"),
    ),
    "values of unknown type": (
        graph("z = Relu (x) y = Relu (z)"),
        "z has type UNDEFINED, expected FLOAT",
        of("z = Relu (x) y = Relu (z)", "float[n, s, 64] z"),
    ),
    "values beyond int32": (
        of("y = Slice (x, a, b, c)", "int64[1] a = {0}", f"int64[1] b = {{{1 << 31}}}", "int64[1] c = {1}"),
        "constant 'b' has values beyond int32",
        of("y = Slice (x, a, b, c)", "int64[1] a = {0}", f"int64[1] b = {{{(1 << 31) - 1}}}", "int64[1] c = {1}"),
    ),
    "an input left out": (
        graph(plugin("causal = 0", 'x, "", x').replace('""', "")),
        "an input is left out",
        graph(plugin("causal = 0", "x, x")),
    ),
    "more than eight dimensions": (
        of("y = Relu (x)", x="float[1, 1, 1, 1, 1, 1, 1, 1, n]", y="float[1, 1, 1, 1, 1, 1, 1, 1, n]"),
        "x has 9 dimensions, at most 8",
        of("y = Relu (x)", x="float[1, 1, 1, 1, 1, 1, 1, n]", y="float[1, 1, 1, 1, 1, 1, 1, n]"),
    ),
    "an output that is an input": (
        graph("g (float[n] x) => (float[n] x) {}"),
        "output 'x' is computed by no node",
        graph("g (float[n] x) => (float[n] y) { y = Relu (x) }"),
    ),
    "concatenation of other types": (
        of("y = Concat <axis = 0> (x, i)", ".int32[n, s, 64] i"),
        "its operands have the types FLOAT and INT32, expected one",
        of("y = Concat <axis = 0> (x, i)", ".float[n, s, 64] i"),
    ),
    "concatenation of other ranks": (
        of("y = Concat <axis = 0> (x, i)", ".float[n, 64] i"),
        "it concatenates tensors of 2, 3 dimensions",
        of("y = Concat <axis = 0> (x, i)", ".float[n, s, 64] i"),
    ),
    "an axis just beyond": (
        graph("y = Concat <axis = 3> (x, x)"),
        "axis 3 is none of a tensor of 3 dimensions",
        graph("y = Concat <axis = -3> (x, x)"),
    ),
    "the last of an axis by index -1": (
        of("y = Gather <axis = 1> (x, last)", "int64[1] last = {-1}", y="float[n, 1, 64]"),
        "index -1 is negative",
        of(
            "y = Slice (x, last, end, axis)",
            *("int64[1] last = {-1}", "int64[1] end = {2147483647}", "int64[1] axis = {1}"),
            y="float[n, 1, 64]",
        ),
    ),
    "indices computed in int64": (
        of("y = Gather <axis = 1> (x, i)", "int64[1] i"),
        "its indices are of type INT64",
        of("y = Gather <axis = 1> (x, i)", ".int32[1] i"),
    ),
    "Gemm of more dimensions": (
        of("y = Gemm (x, w)", "float[64, 64] w"),
        "its factors have 3 and 2 dimensions, expected 2",
        of("y = Gemm (x, w)", "float[64, 64] w", x="float[n, 64]"),
    ),
    "products of vectors": (
        of("y = MatMul (x, w)", "float[64] w"),
        "a factor has fewer than 2 dimensions",
        of("y = MatMul (x, w)", "float[64, 64] w"),
    ),
    "axes of ReduceMean as an input": (
        of("y = ReduceMean <axes = [1]> (x, axes)", "int64[1] axes = {1}"),
        "axes must be an attribute",
        graph("y = ReduceMean <axes = [1]> (x)"),
    ),
    "axes of ReduceSum that are computed": (
        of("y = ReduceSum (x, axes)", "int64[1] axes"),
        "axes must be an initializer of 1 dimension",
        of("y = ReduceSum (x, axes)", "int64[1] axes = {1}"),
    ),
    "axes that there are not": (
        of("y = ReduceSum (x, axes)", "int64[1] axes = {3}"),
        "axes [3] are not those of a tensor of 3 dimensions",
        of("y = ReduceSum (x, axes)", "int64[1] axes = {-3}"),
    ),
    "a reshape by shapes, as views are exported": (
        of(
            "a = Shape <start = 0, end = 1> (x) b = Shape <start = 1, end = 2> (x) "
            "t = Concat <axis = 0> (a, b, c) y = Reshape (x, t)",
            *("int64[1] a", "int64[1] b", "int64[4] t", "int64[2] c = {8, 8}"),
            y="float[n, s, 8, 8]",
        ),
        "operator Shape is not supported, its start and end are ignored before 10.1",
        of("y = Reshape (x, t)", "int64[4] t = {0, 0, 8, 8}", y="float[n, s, 8, 8]"),
    ),
    "a target that is computed": (
        of("y = Reshape (x, t)", "int64[2] t"),
        "its target must be an initializer of 1 dimension",
        of("y = Reshape (x, t)", "int64[2] t = {-1, 64}"),
    ),
    "a target of more than eight dimensions": (
        of("y = Reshape (x, t)", "int64[9] t = {0, 0, 1, 1, 1, 1, 1, 1, 64}"),
        "the result has 9 dimensions, at most 8",
        of("y = Reshape (x, t)", "int64[8] t = {0, 0, 1, 1, 1, 1, 1, 64}"),
    ),
    "a target with two wildcards": (
        of("y = Reshape (x, t)", "int64[3] t = {-1, -1, 64}"),
        "target [-1, -1, 64] of 3 dimensions means nothing",
        of("y = Reshape (x, t)", "int64[3] t = {0, -1, 64}"),
    ),
    "a target that copies beyond the tensor": (
        of("y = Reshape (x, t)", "int64[4] t = {-1, 8, 8, 0}"),
        "target [-1, 8, 8, 0] of 3 dimensions means nothing",
        of("y = Reshape (x, t)", "int64[4] t = {0, 0, 8, -1}"),
    ),
    "a target where zeros are sizes": (
        of("y = Reshape <allowzero = 1> (x, t)", "int64[2] t = {-1, 64}"),
        "attribute allowzero has no meaning",
        of("y = Reshape (x, t)", "int64[2] t = {-1, 64}"),
    ),
    "slices without axes": (
        of("y = Slice (x, a, b)", "int64[3] a = {0, 0, 0}", "int64[3] b = {1, 1, 1}"),
        "expected starts, ends and axes",
        of("y = Slice (x, a, b, c)", "int64[1] a = {0}", "int64[1] b = {1}", "int64[1] c = {0}"),
    ),
    "slices by values that are computed": (
        of("y = Slice (x, a, b, c)", "int64[1] a", "int64[1] b = {1}", "int64[1] c = {0}"),
        "starts, ends, axes and steps must be initializers",
        of("y = Slice (x, a, b, c)", "int64[1] a = {0}", "int64[1] b = {1}", "int64[1] c = {0}"),
    ),
    "slices of int32": (
        of("y = Slice (x, a, b, c)", "int32[1] a = {0}", "int32[1] b = {1}", "int32[1] c = {0}"),
        "a has type INT32, expected INT64",
        of("y = Slice (x, a, b, c)", "int64[1] a = {0}", "int64[1] b = {1}", "int64[1] c = {0}"),
    ),
    "slices of unequal numbers": (
        of("y = Slice (x, a, b, c)", "int64[2] a = {0, 0}", "int64[1] b = {1}", "int64[1] c = {0}"),
        "starts, ends, axes and steps are not equally many",
        of("y = Slice (x, a, b, c)", "int64[2] a = {0, 0}", "int64[2] b = {1, 1}", "int64[2] c = {0, 1}"),
    ),
    "slices backwards": (
        of("y = Slice (x, a, a, a, s)", "int64[1] a = {1}", "int64[1] s = {-1}"),
        "steps [-1] are not positive",
        of("y = Slice (x, a, a, a, s)", "int64[1] a = {1}", "int64[1] s = {2}"),
    ),
    "slices of an axis twice": (
        of("y = Slice (x, a, b, c)", "int64[2] a = {0, 0}", "int64[2] b = {1, 1}", "int64[2] c = {1, -2}"),
        "axes [1, -2] are not those of a tensor",
        of("y = Slice (x, a, b, c)", "int64[2] a = {0, 0}", "int64[2] b = {1, 1}", "int64[2] c = {1, -1}"),
    ),
    "Squeeze without axes": (
        graph("y = Squeeze (x)"),
        "axes must be an initializer",
        of("y = Squeeze (x, a)", "int64[1] a = {0}"),
    ),
    "Squeeze by int32, which 9.x reads as int64": (
        of("y = Squeeze (x, a)", "int32[1] a = {0}"),
        "a has type INT32, expected INT64",
        of("y = Squeeze (x, a)", "int64[1] a = {0}"),
    ),
    "Squeeze of what is longer": (
        of("y = Squeeze (x, a)", "int64[1] a = {2}"),
        "it squeezes axes of sizes [64]",
        of("y = Squeeze (x, a)", "int64[1] a = {1}"),
    ),
    "Unsqueeze to more than eight dimensions": (
        of("y = Unsqueeze (x, a)", "int64[6] a = {0, 1, 2, 3, 4, 5}"),
        "the result has 9 dimensions, at most 8",
        of("y = Unsqueeze (x, a)", "int64[5] a = {0, 1, 2, 3, 4}"),
    ),
    "a permutation of other dimensions": (
        graph("y = Transpose <perm = [1, 0]> (x)"),
        "perm [1, 0] does not permute 3 dimensions",
        graph("y = Transpose <perm = [1, 0, 2]> (x)"),
    ),
    "an attribute that the plugin does not have": (
        graph(plugin("causal = 0, dropout = 1")),
        "attribute dropout has no meaning to importers",
        graph(plugin("causal = 0")),
    ),
    "an integer that a field cuts": (
        graph(plugin(f"causal = {1 << 32}")),
        "attribute causal is 4294967296, beyond int32",
        graph(plugin("causal = 0")),
    ),
    "an attribute that is no field": (
        graph(plugin("causal = [1, 2]")),
        "attribute causal is of kind INTS, expected FLOAT, INT or STRING",
        graph(plugin('causal = 0, softmax_scale = 0.5, kv_format = "f32"')),
    ),
    "new rows left out": (
        graph(plugin('causal = 1, kv_format = "f16"')),
        "it has 1 outputs, expected 3",
        graph(plugin('causal = 1, kv_format = "f16"').replace("y =", "y, key, value =")),
    ),
    "scales left out": (
        graph(plugin('causal = 1, kv_format = "k8v4"').replace("y =", "y, key, value =")),
        "it has 3 outputs, expected 4",
        graph(plugin('causal = 1, kv_format = "k8v4"').replace("y =", "y, key, value, scale =")),
    ),
    "an output without a name": (
        graph(plugin('causal = 1, kv_format = "f32"').replace("y =", 'y, "", value =').replace('""', "")),
        "it has 2 outputs, expected 3",
        graph(plugin('causal = 1, kv_format = "f32"').replace("y =", "y, key, value =")),
    ),
    "outputs that there are not": (
        graph(plugin("causal = 0").replace("y =", "y, key =")),
        "it has 2 outputs, expected 1",
        graph(plugin("causal = 0")),
    ),
}


@pytest.mark.parametrize("rule", RULES)
def test_what_is_against_a_rule_is_named(rule):
    refused, phrase, _ = RULES[rule]
    with pytest.raises(UserError, match=r"the decoder graph does not fit TensorRT 8\.6's parser") as error:
        conformance.check(refused, "decoder")
    assert phrase in str(error.value)


@pytest.mark.parametrize("rule", RULES)
def test_what_comes_nearest_passes(rule):
    conformance.check(RULES[rule][2], "decoder")


def test_an_error_names_some_nodes_and_counts_the_rest():
    nodes = " ".join(f"y{i} = Softmax (x)" for i in range(20))
    with pytest.raises(UserError, match=r"node 'y0' \(Softmax\).* and 12 more\. This model"):
        conformance.check(graph(f"{nodes} y = Relu (x)"), "decoder")

"""What builds change in a decoder graph, on a small one of two layers."""

from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import helper

from pascalvl.engines import graphs
from pascalvl.export import onnx_op
from pascalvl.plugins import bindings
from pascalvl.plugins.kv_format import CacheConfig, KVFormat, LayerLayout
from pascalvl.plugins.model_config import TextConfig
from pascalvl.plugins.ops.flash_attention.op import OP_NAME, OP_VERSION
from tests.engines.decoder import floats_of
from tests.plugins.ops.flash_attention import reference

HEADS, KV_HEADS, DIM = 4, 2, 64
WIDTH = (HEADS + 2 * KV_HEADS) * DIM
CONFIG = TextConfig(
    vocab_size=HEADS * DIM,
    hidden_size=WIDTH,
    num_hidden_layers=2,
    num_attention_heads=HEADS,
    num_key_value_heads=KV_HEADS,
    head_dim=DIM,
    max_position_embeddings=64,
    mrope_section=(12, 10, 10),
    rope_inv_freq=(0.5,) * 32,
    rope_attention_scaling=1.0,
    value_dims=(DIM, DIM),
)
MODEL = SimpleNamespace(text=CONFIG, num_deepstack=1)
F32 = CacheConfig(KVFormat.F32)
KINDS = ["f32", "f16", "k8v8", "k4v4,layer.1=f32", "f16,layer.0=k8v4"]


def case(kv_format: KVFormat, layer: int) -> reference.CausalCase:
    """Inputs of a layer: the tokens are those of layer 0."""
    layout = LayerLayout(kv_format, KV_HEADS, DIM, DIM)
    tokens, own = (reference.causal_case(layout, [3, 1], [5, 129], HEADS, padding=1, seed=seed) for seed in (0, layer))
    arrays = {n: (own if n.startswith(("past_key", "past_val", "past_sc")) else tokens).arrays[n] for n in own.arrays}
    return reference.CausalCase(layout, HEADS, arrays)


def decoder() -> onnx.ModelProto:
    """As exported: attention over the embeddings themselves, twice; the logits are rows of the first layer's."""
    values = [
        [
            helper.make_tensor_value_info(b.name, helper.np_dtype_to_tensor_dtype(b.dtype), b.shape)
            for b in listed(MODEL, F32)
        ]
        for listed in (bindings.decoder_inputs, bindings.decoder_outputs)
    ]
    example = case(KVFormat.F32, 0)
    constants = [onnx.numpy_helper.from_array(example.arrays[name], name) for name in ("q_norm", "k_norm")]
    nodes = []
    for layer in range(2):
        names = [bindings.past_key(layer), bindings.past_value(layer)]
        new = [bindings.new_key(layer), bindings.new_value(layer)]
        inputs = [bindings.INPUTS_EMBEDS, "q_norm", "k_norm", bindings.ROPE_COS, bindings.ROPE_SIN]
        inputs += [bindings.CU_SEQLENS, bindings.PAST_LENGTH, bindings.PAGE_TABLE, bindings.PAST_VISIBLE, *names]
        outputs = [f"attended.{layer}", *new]
        nodes.append(helper.make_node(OP_NAME, inputs, outputs, domain="pascalvl", **example.attributes))
    nodes.append(helper.make_node("Gather", ["attended.0", bindings.LOGIT_ROWS], [bindings.LOGITS]))
    model = helper.make_model(helper.make_graph(nodes, "decoder", *values, constants), ir_version=onnx_op.IR_VERSION)
    onnx_op.add_bodies(model)
    return model


@pytest.mark.parametrize("kv", KINDS)
def test_a_decoder_reads_and_writes_the_cache_asked_for(kv):
    cache, model = CacheConfig.parse(kv), decoder()
    graphs.set_cache(model, MODEL, cache)
    onnx.checker.check_model(model)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    kinds = {"tensor(float)": np.float32, "tensor(int32)": np.int32}
    for found, expected in (
        (session.get_inputs(), bindings.decoder_inputs(MODEL, cache)),
        (session.get_outputs(), bindings.decoder_outputs(MODEL, cache)),
    ):
        assert [(v.name, kinds[v.type], tuple(v.shape)) for v in found] == [
            (b.name, b.dtype, b.shape) for b in expected
        ]

    cases = [case(layout.kv_format, layer) for layer, layout in enumerate(cache.layers(CONFIG))]
    rows_asked_for = np.array([3, 2], np.int32)
    feeds = {bindings.DEEPSTACK_EMBEDS: np.zeros((1, 5, WIDTH), np.float32), bindings.LOGIT_ROWS: rows_asked_for}
    for layer, each in enumerate(cases):
        for name, array in each.arrays.items():
            feeds[{"qkv": bindings.INPUTS_EMBEDS}.get(name, name)] = array
            feeds[f"{name}.{layer}"] = array
    feeds = {value.name: feeds[value.name] for value in session.get_inputs()}
    outputs = dict(zip([value.name for value in session.get_outputs()], session.run(None, feeds), strict=True))
    rows = floats_of(MODEL, cache, outputs)
    for layer, each in enumerate(cases):
        _, k, v = reference.prologue(each)
        keys, values = (rows[name(layer)] for name in (bindings.new_key, bindings.new_value))
        steps = {"f32": 1e-6, "f16": 4e-3, "k8v8": 0.03, "k8v4": 0.5, "k4v4": 0.5}[each.layout.kv_format.value]
        np.testing.assert_allclose(keys, k, atol=steps)
        np.testing.assert_allclose(values, v, atol=steps)
    # A code beside the middle of two may be the other one.
    expected = reference.causal(cases[0])["output"][rows_asked_for]
    np.testing.assert_allclose(outputs[bindings.LOGITS], expected, atol=5e-3)


def test_ops_are_left_to_plugins_of_their_version():
    """TensorRT's parser takes version 1 where a node names none."""
    model = decoder()
    assert model.functions
    graphs.leave_ops_to_plugins(model)
    assert not model.functions
    versions = [
        [(a.name, a.s.decode()) for a in node.attribute if a.name == "plugin_version"] for node in model.graph.node
    ]
    assert versions == [[("plugin_version", OP_VERSION)]] * 2 + [[]]

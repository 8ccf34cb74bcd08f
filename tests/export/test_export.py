"""Exported graphs: their structure for every real size, their numbers against Hugging Face."""

import dataclasses
import json
from collections import Counter

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration
from transformers.vision_utils import (
    get_vision_cu_seqlens,
    get_vision_interpolation_indices_and_weights,
    get_vision_position_ids,
)

from pascalvl.engines import build, open_engine
from pascalvl.export import conformance, export_checkpoint, exporter, published_sizes
from pascalvl.export.checkpoint import Checkpoint, meta_model, model_config
from pascalvl.export.modules import Decoder, VisionEncoder
from pascalvl.export.transforms import plan_transforms
from pascalvl.plugins import bindings
from pascalvl.plugins.bundle import Manifest
from pascalvl.plugins.errors import UserError
from pascalvl.plugins.kv_format import PAGE_SLOTS, CacheConfig, KVFormat, pages_of
from pascalvl.plugins.ops.flash_attention.drop_in import ATTN_IMPLEMENTATION
from pascalvl.plugins.ops.flash_attention.op import OP_DOMAIN, OP_NAME
from pascalvl.plugins.prompt import Prompt
from pascalvl.plugins.weight_format import WeightConfig, WeightFormat

# Both sides float32, summed in different orders: a few units in 1e-6 of values of size one after a few layers.
TOLERANCE = 2e-5


WEIGHT_BYTES = {
    "2B": (413_577_216, 1_043_386_368, 6e9),
    "4B": (422_113_280, 2_269_654_016, 8e9),
    "8B": (588_460_032, 4_214_956_032, 8e9),
}
"""Of `vision.onnx.data` and `decoder.onnx.data` as exported with w4 (2026-11-25, less the positions and half of the
patches' weight that were in the former), and a card's memory."""


@pytest.mark.parametrize("size", WEIGHT_BYTES)
def test_what_4_bits_take_of_a_card(size):
    """As much as was measured, to the pages on which weights start; and a context of 16k fits beside it."""
    *measured, card = WEIGHT_BYTES[size]
    config, weights = published_sizes.config(size), WeightConfig.parse("w4")
    text, model = model_config(config).text, meta_model(config)
    for module, found in zip(
        (VisionEncoder(model, weights.vision), Decoder(model, text, weights)), measured, strict=True
    ):
        sizes = [p.nbytes for n, p in module.named_parameters() if "embed_tokens" not in n and "pos_embed" not in n]
        assert sum(sizes) <= found <= sum(sizes) + 4096 * len(sizes)
    assert sum(measured) + CacheConfig().nbytes(text, 16384) < card


INVENTORY = {
    "vision": "Concat 1 FlashAttention2 2 QuantLinear 15 Reshape 2 Unsqueeze 2",
    "decoder": "Add 2 FlashAttention2 2 Gather 3 QuantLinear 9",
}
"""The operators of two layers of either part, with what comes before and after them, in whatever weight format."""


def two_layers(size):
    """A real size's model on the meta device, and its config: two decoder layers and the vision layers up to the second
    DeepStack level, at full width."""
    config = published_sizes.config(size, {"num_hidden_layers": 2}, {"depth": 2, "deepstack_visual_indexes": [0, 1]})
    config._attn_implementation = ATTN_IMPLEMENTATION
    with torch.device("meta"):
        model = Qwen3VLForConditionalGeneration(config)
    model.tie_weights()
    return model, model_config(config)


def operators(proto):
    return dict(sorted(Counter(node.op_type for node in proto.graph.node).items()))


def inventory(graph):
    words = INVENTORY[graph].split()
    return {op: int(count) for op, count in zip(words[::2], words[1::2], strict=True)}


KINDS = {
    "vision": {
        ("residual",): 1 + 2 * 2,  # of the patches, to which positions are added; projections and second layers
        ("layer",): 2,
        ("gelu_tanh", "layer"): 2,
        ("gelu_erf", "layer"): 3,
        (): 3,
    },
    "decoder": {("rms",): 2 + 1, ("residual",): 2 * 2, ("silu_gated", "rms"): 2},
}
"""Linear layers of such two layers, by what they do besides."""


def kinds_of(proto):
    """By a linear layer's domain: what it does besides adding a bias."""
    nodes = [node for node in proto.graph.node if node.op_type == "QuantLinear"]
    return [tuple(part for part in node.domain.split(".")[2:] if part != "bias") for node in nodes]


def check_that_all_is_used(proto):
    """Every node, input and constant; and tensors are of float32 and int32, or constants of int64."""
    used = {name for node in proto.graph.node for name in node.input} | {value.name for value in proto.graph.output}
    assert all(used & set(node.output) for node in proto.graph.node)
    assert {value.name for value in (*proto.graph.input, *proto.graph.initializer)} <= used
    values = *proto.graph.input, *proto.graph.value_info, *proto.graph.output
    assert {value.type.tensor_type.elem_type for value in values} <= {TensorProto.FLOAT, TensorProto.INT32}
    kinds = {TensorProto.FLOAT, TensorProto.INT32, TensorProto.INT64}
    assert {tensor.data_type for tensor in proto.graph.initializer} <= kinds


@pytest.mark.parametrize("weights", ["f32", "w4,vision=f16", "w8,layer.1=f16"])
@pytest.mark.parametrize("size", published_sizes.SIZES)
def test_graphs_of_the_real_sizes_fit_tensorrt(size, weights):
    weights = WeightConfig.parse(weights)
    model, model_config = two_layers(size)

    for graph, traced, inputs, outputs in (
        (bindings.VISION, exporter.trace_vision(model, model_config, weights), *_vision_bindings(model_config)),
        (bindings.DECODER, exporter.trace_decoder(model, model_config, weights), *_decoder_bindings(model_config)),
    ):
        conformance.check(traced.proto, graph)
        check_that_all_is_used(traced.proto)
        assert operators(traced.proto) == inventory(graph)
        found = [v for v in traced.proto.graph.input if v.name not in traced.weights]
        assert [_signature(v) for v in found] == [(b.name, b.shape) for b in inputs]
        assert [_signature(v) for v in traced.proto.graph.output] == [(b.name, b.shape) for b in outputs]
        attention = [n for n in traced.proto.graph.node if (n.domain, n.op_type) == (OP_DOMAIN, OP_NAME)]
        assert len(attention) == 2
        # Every weight of the model is in a graph, but the tables of embeddings, which stay on the host.
        sizes = sum(np.prod(w.shape) for w in traced.weights.values())
        module = model.model.visual if graph == bindings.VISION else model.model.language_model.layers
        assert sizes >= sum(p.numel() for n, p in module.named_parameters() if n != "pos_embed.weight")
        assert all(w.source != "model.visual.pos_embed.weight" for w in traced.weights.values())
        assert all(w.shape[0] < 10**6 for w in traced.weights.values())
        linears = [n for n in traced.proto.graph.node if n.op_type == "QuantLinear"]
        # The patches', two blocks of four layers and three mergers of two; two layers of four, and the lm_head.
        assert len(linears) == {bindings.VISION: 1 + 2 * 4 + 3 * 2, bindings.DECODER: 2 * 4 + 1}[graph]
        assert Counter(kinds_of(traced.proto)) == KINDS[graph]
        # And what DeepStack takes of these layers: features go to a merger, and are added.
        deepstack = {"Reshape": 1} if graph == bindings.VISION else {"Add": 1, "Gather": 1}
        assert exporter.describe(traced.proto)["layer_ops"] == {"FlashAttention2": 1, "QuantLinear": 4, **deepstack}
    lm_head = next(w for w in traced.weights.values() if w.source == "lm_head.weight")
    assert lm_head.shape == weights.lm_head.weight_shape(model_config.text.vocab_size, model_config.text.hidden_size)


def test_groups_that_norms_do_not_fill():
    """Those of the mergers, over a patch each; rows may end within a group."""
    config = published_sizes.config("2B", {"num_hidden_layers": 1}, {"hidden_size": 1120, "num_heads": 16, "depth": 1})
    with pytest.raises(UserError, match="hidden size of 1120 is no multiple of groups of 128 inputs"):
        VisionEncoder(meta_model(config), WeightFormat(8))
    for form in (WeightFormat(8, 32), WeightFormat(16)):
        VisionEncoder(meta_model(config), form)


@pytest.mark.parametrize("weights", ["f32", "w4"])
def test_graphs_with_a_rank_fit_tensorrt(weights):
    """It takes no node more."""
    weights = WeightConfig.parse(weights)
    model, config = two_layers("4B")
    text = dataclasses.replace(config.text, value_dims=(96, 64))
    proto = exporter.trace_decoder(model, dataclasses.replace(config, text=text), weights).proto
    conformance.check(proto, bindings.DECODER)
    check_that_all_is_used(proto)
    assert operators(proto) == dict(sorted(inventory(bindings.DECODER).items()))


def _vision_bindings(config):
    return bindings.vision_inputs(config), bindings.vision_outputs(config)


def _decoder_bindings(config):
    return tuple(
        names(config, CacheConfig(KVFormat.F32)) for names in (bindings.decoder_inputs, bindings.decoder_outputs)
    )


def _signature(value):
    dims = value.type.tensor_type.shape.dim
    return value.name, tuple(d.dim_param or d.dim_value for d in dims)


def test_default_text_config_keeps_its_32_layers_and_32_heads(random_checkpoint, tmp_path):
    """Hugging Face's default text config, narrowed: every layer and head is exported, the logits are the model's."""
    config = Qwen3VLConfig(
        text_config={"vocab_size": 2048, "hidden_size": 64, "intermediate_size": 96, "head_dim": 16,
         "rope_parameters": {**published_sizes.MROPE, "mrope_section": [4, 2, 2]}},
        vision_config={"depth": 3, "hidden_size": 64, "num_heads": 4, "intermediate_size": 96, "out_hidden_size": 64,
         "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1, 2]},
    )  # fmt: skip
    model = random_checkpoint(tmp_path / "checkpoint", config)
    text = model.config.text_config
    assert (text.num_hidden_layers, text.num_attention_heads, text.num_key_value_heads) == (32, 32, 32)
    manifest = export_checkpoint(tmp_path / "checkpoint", tmp_path / "model")
    assert manifest.graphs["decoder"]["ops"][OP_NAME] == 32
    _compare_decoder(model, tmp_path)


def test_numbers_at_the_width_of_the_2b_model(random_checkpoint, tmp_path):
    config = published_sizes.config(
        "2B", {"num_hidden_layers": 2, "vocab_size": 2048}, {"depth": 2, "deepstack_visual_indexes": [0, 1]}
    )
    model = random_checkpoint(tmp_path / "checkpoint", config)
    export_checkpoint(tmp_path / "checkpoint", tmp_path / "model")
    _compare_decoder(model, tmp_path)
    _compare_vision(model, tmp_path)


def _compare_decoder(model, tmp_path):
    """Sequences of different lengths, one of them empty, with DeepStack features, against Hugging Face one by one.

    The past is what the engine returned for it: keys and values are transformed, scores and outputs are not.
    """
    build(tmp_path / "model", tmp_path / "engine", "onnxruntime", CacheConfig(KVFormat.F32))
    engine = open_engine(tmp_path / "engine")
    config = engine.manifest.model
    text = config.text
    torch.manual_seed(3)
    new, past_lengths, expected = [5, 0, 4], [4, 3, 126], []
    feeds = _decoder_feeds(config, new, past_lengths)
    bounds = feeds[bindings.CU_SEQLENS]
    language_model = model.model.language_model
    for b, (seq, past) in enumerate(zip(new, past_lengths, strict=True)):
        if not seq:
            continue
        own = slice(bounds[b], bounds[b + 1])
        token_ids = torch.randint(0, text.vocab_size, (1, past + seq))
        embeds = language_model.embed_tokens(token_ids).detach()
        visual = torch.zeros(1, past + seq, dtype=torch.bool)
        visual[0, past + 1 : past + 4] = True
        features = torch.randn(config.num_deepstack, 3, text.hidden_size)
        position_ids = torch.randint(0, 50, (3, 1, past + seq))
        with torch.no_grad():
            rest = {"visual_pos_masks": visual, "deepstack_visual_embeds": list(features)}
            result = language_model(inputs_embeds=embeds, position_ids=position_ids, use_cache=True, **rest)
            logits = model.lm_head(result.last_hidden_state[0, -1])
            expected.append((b, own, past, logits, result.past_key_values.layers))
            cos, sin = language_model.rotary_emb(embeds, position_ids)
        first = _decoder_feeds(config, [past], [0])
        whole = {bindings.INPUTS_EMBEDS: embeds, bindings.ROPE_COS: cos, bindings.ROPE_SIN: sin}
        for name, states in whole.items():
            first[name][:], feeds[name][own] = states[0, :past], states[0, past:]
        feeds[bindings.DEEPSTACK_EMBEDS][:, own][:, 1:4] = features
        outputs = engine.run(bindings.DECODER, first)
        slots = np.arange(past)
        pages = feeds[bindings.PAGE_TABLE][b, slots // PAGE_SLOTS]
        for layer in range(text.num_hidden_layers):
            for pool, rows in ((bindings.past_key, bindings.new_key), (bindings.past_value, bindings.new_value)):
                feeds[pool(layer)][pages, :, slots % PAGE_SLOTS] = outputs[rows(layer)].swapaxes(0, 1)
    outputs = engine.run(bindings.DECODER, feeds)
    with Checkpoint(tmp_path / "checkpoint") as checkpoint:
        planned = plan_transforms(checkpoint, text, CacheConfig(KVFormat.F32))
    for b, own, past, logits, layers in expected:
        np.testing.assert_allclose(outputs[bindings.LOGITS][b], logits, atol=TOLERANCE * logits.abs().max())
        for layer, (cached, transform) in enumerate(zip(layers, planned, strict=True)):
            keys, values = (states[0, :, past:].double().numpy() for states in (cached.keys, cached.values))
            keys, values = keys / transform.balance, values @ transform.value_down.swapaxes(1, 2)
            for name, rows in ((bindings.new_key, keys), (bindings.new_value, values)):
                np.testing.assert_allclose(outputs[name(layer)][:, own], rows, atol=TOLERANCE * np.abs(rows).max())


def _decoder_feeds(config, new, past_length):
    """Zeros, with all slots visible, for sequences of so many ``new`` tokens; the last page is the first's first."""
    batch, pages = len(new), pages_of(max(past_length) + 1)
    sizes = {"tokens": sum(new), "batch": batch, "batch_plus_1": batch + 1, "visible_slots": 1, "rows": batch}
    sizes |= {bindings.PAGES: batch * pages, bindings.SEQUENCE_PAGES: pages}
    feeds = {b.name: np.zeros([sizes.get(d, d) for d in b.shape], b.dtype)
             for b in bindings.decoder_inputs(config, CacheConfig(KVFormat.F32))}  # fmt: skip
    feeds[bindings.PAST_VISIBLE][:] = np.iinfo(np.int32).max
    feeds[bindings.CU_SEQLENS][1:] = np.cumsum(new)
    feeds[bindings.PAST_LENGTH][:] = past_length
    feeds[bindings.PAGE_TABLE][:] = np.arange(batch * pages)[::-1].reshape(batch, pages)
    feeds[bindings.LOGIT_ROWS][:] = np.maximum(np.cumsum(new) - 1, 0)  # the last of each sequence
    return feeds


def _compare_vision(model, tmp_path):
    engine = open_engine(tmp_path / "engine")
    vision = engine.manifest.model.vision
    torch.manual_seed(4)
    grid = torch.tensor([[1, 4, 6], [2, 8, 4]])
    pixels = torch.randn(int(grid.prod(1).sum()), vision.patch_dim)
    with torch.no_grad():
        expected = model.model.visual(pixels, grid)
    indices, weights = get_vision_interpolation_indices_and_weights(
        grid, vision.num_grid_per_side, "bilinear", True, vision.spatial_merge_size
    )
    with torch.no_grad():
        embeds = (model.model.visual.pos_embed(indices) * weights[:, :, None]).sum(1)
    cos, sin = model.model.visual.rotary_pos_emb(pixels, get_vision_position_ids(grid, vision.spatial_merge_size))
    outputs = engine.run(
        bindings.VISION,
        {
            bindings.PIXEL_VALUES: pixels.numpy(),
            bindings.POSITION_EMBEDS: embeds.numpy(),
            bindings.ROPE_COS: cos.numpy(),
            bindings.ROPE_SIN: sin.numpy(),
            bindings.CU_SEQLENS: get_vision_cu_seqlens(grid).int().numpy(),
        },
    )
    features = [expected.pooler_output, *expected.deepstack_features]
    found = [outputs[bindings.IMAGE_EMBEDS], *outputs[bindings.DEEPSTACK_EMBEDS]]
    for reference, output in zip(features, found, strict=True):
        np.testing.assert_allclose(output, reference.numpy(), atol=TOLERANCE * float(reference.abs().max()))


def test_a_rank_from_a_calibration(nano_checkpoint, nano_reference, tmp_path):
    """Values come out shorter, as the manifest says, and the answer as good as the same; the rank stays noted."""
    rng = np.random.default_rng(0)
    given, asked = rng.integers(0, 2000, (2, 400))
    seen = []

    def prompts(directory, config):
        seen.append((sorted(path.name for path in directory.iterdir()), config))
        return [Prompt(given)]

    cache = CacheConfig(KVFormat.K4V4, 1e-3)
    manifest = export_checkpoint(nano_checkpoint, tmp_path / "model", cache=cache, calibration=prompts)
    assert manifest.kv_cache == CacheConfig(KVFormat.F32, 1e-3)
    (names, config) = seen[0]
    assert "tokenizer.json" in names
    assert config.text.value_dims == (128,) * 6
    config = Manifest.read(tmp_path / "model", "model").model
    assert set(config.text.value_dims) <= {64, 96, 112}  # random tokens use few directions

    build(tmp_path / "model", tmp_path / "engine", "onnxruntime", CacheConfig(KVFormat.F32))
    feeds = _decoder_feeds(config, [400], [0])
    language_model, token_ids = nano_reference.model.language_model, torch.from_numpy(asked)[None]
    with torch.no_grad():
        expected = nano_reference(input_ids=token_ids).logits[0, -1].log_softmax(0).numpy()
        embeds = language_model.embed_tokens(token_ids)
        cos, sin = language_model.rotary_emb(embeds, torch.arange(400).expand(3, 1, 400))
    per_token = {bindings.INPUTS_EMBEDS: embeds, bindings.ROPE_COS: cos, bindings.ROPE_SIN: sin}
    feeds |= {name: states[0].numpy() for name, states in per_token.items()}
    outputs = open_engine(tmp_path / "engine").run(bindings.DECODER, feeds)
    for layer, value_dim in enumerate(config.text.value_dims):
        found = tuple(outputs[name(layer)].shape[-1] for name in (bindings.new_key, bindings.new_value))
        assert found == (128, value_dim)
    found = torch.from_numpy(outputs[bindings.LOGITS][0]).log_softmax(0).numpy()
    divergence = (np.exp(expected) * (expected - found)).sum()
    assert 1e-9 < divergence < 0.02


def test_a_calibration_that_cannot_be_had_leaves_nothing_behind(nano_checkpoint, tmp_path):
    with pytest.raises(UserError, match="at least 128 tokens"):
        export_checkpoint(nano_checkpoint, tmp_path / "model", calibration=lambda *_: [])
    assert not list(tmp_path.iterdir())


def test_bundle_carries_what_the_checkpoint_says(nano_checkpoint, nano_model_bundle):
    manifest = Manifest.read(nano_model_bundle, "model")
    manifest.verify(nano_model_bundle)
    hf = json.loads((nano_checkpoint / "config.json").read_text())
    assert manifest.model.text.num_hidden_layers == hf["text_config"]["num_hidden_layers"]
    assert manifest.model.vision.deepstack_visual_indexes == tuple(hf["vision_config"]["deepstack_visual_indexes"])
    assert manifest.model.image_token_id == hf["image_token_id"]
    for graph in ("vision", "decoder"):
        proto = onnx.load(nano_model_bundle / f"{graph}.onnx", load_external_data=False)
        conformance.check(proto, graph)
        assert proto.ir_version <= 8
        assert all(node.op_type != "Cast" for node in proto.graph.node)  # float32 throughout
        functions = {(function.domain, function.name) for function in proto.functions}
        assert functions == {(node.domain, node.op_type) for node in proto.graph.node if node.domain}
        assert (OP_DOMAIN, OP_NAME) in functions
        assert all(domain.startswith("pascalvl.w32.") for domain, name in functions if name == "QuantLinear")
        assert manifest.graphs[graph]["ops"][OP_NAME] == sum(n.op_type == OP_NAME for n in proto.graph.node)
    with Checkpoint(nano_checkpoint) as checkpoint:
        for described, file, name in (
            (manifest.embeddings, "embeddings.bin", "model.language_model.embed_tokens.weight"),
            (manifest.position_embeddings, "position_embeddings.bin", "model.visual.pos_embed.weight"),
        ):
            table = checkpoint.tensor(name)
            assert described == {"dtype": str(table.dtype).removeprefix("torch."), "shape": list(table.shape)}
            stored = np.fromfile(nano_model_bundle / file, np.uint8)
            np.testing.assert_array_equal(stored, table.view(torch.uint8).numpy().ravel())

"""Exported graphs: their structure for every real size, their numbers against Hugging Face."""

import json

import numpy as np
import onnx
import pytest
import torch
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration
from transformers.vision_utils import (
    get_vision_cu_seqlens,
    get_vision_interpolation_indices_and_weights,
    get_vision_position_ids,
)

from pascalvl.engines import build, open_engine
from pascalvl.export import conformance, export_checkpoint, exporter
from pascalvl.export.attention import ATTN_IMPLEMENTATION
from pascalvl.export.checkpoint import Checkpoint
from pascalvl.plugins import bindings
from pascalvl.plugins.bundle import Manifest
from pascalvl.plugins.flash_attention import OP_DOMAIN, OP_NAME
from pascalvl.plugins.kv_format import CacheConfig, KVFormat
from tests import real_sizes

# Both sides float32, summed in different orders: a few units in 1e-6 of values of size one after a few layers.
TOLERANCE = 2e-5


@pytest.mark.parametrize("size", real_sizes.SIZES)
def test_graphs_of_the_real_sizes_fit_tensorrt(size):
    """Two decoder layers and the vision layers up to the second DeepStack level, at full width."""
    config = real_sizes.config(size, {"num_hidden_layers": 2}, {"depth": 2, "deepstack_visual_indexes": [0, 1]})
    config._attn_implementation = ATTN_IMPLEMENTATION
    checkpoint = Checkpoint.__new__(Checkpoint)
    checkpoint.hf_config = config
    model_config = checkpoint.model_config()
    with torch.device("meta"):
        model = Qwen3VLForConditionalGeneration(config)
    model.tie_weights()

    for graph, traced, inputs, outputs in (
        (bindings.VISION, exporter.trace_vision(model, model_config), *_vision_bindings(model_config)),
        (bindings.DECODER, exporter.trace_decoder(model, model_config), *_decoder_bindings(model_config)),
    ):
        conformance.check(traced.proto, graph)
        found = [v for v in traced.proto.graph.input if v.name not in traced.weights]
        assert [_signature(v) for v in found] == [(b.name, b.shape) for b in inputs]
        assert [_signature(v) for v in traced.proto.graph.output] == [(b.name, b.shape) for b in outputs]
        attention = [n for n in traced.proto.graph.node if (n.domain, n.op_type) == (OP_DOMAIN, OP_NAME)]
        assert len(attention) == 2
        # Every weight of the model is in a graph, but the token embeddings, which stay on the host.
        sizes = sum(np.prod(w.shape) for w in traced.weights.values())
        module = model.model.visual if graph == bindings.VISION else model.model.language_model.layers
        assert sizes >= sum(p.numel() for p in module.parameters())
        assert all(w.shape[0] < 10**6 for w in traced.weights.values())
    lm_head = "model.language_model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
    assert any(w.source == lm_head for w in traced.weights.values())


def _vision_bindings(config):
    return bindings.vision_inputs(config), bindings.vision_outputs(config)


def _decoder_bindings(config):
    return bindings.decoder_inputs(config, CacheConfig(KVFormat.F32)), bindings.decoder_outputs(config)


def _signature(value):
    dims = value.type.tensor_type.shape.dim
    return value.name, tuple(d.dim_param or d.dim_value for d in dims)


def test_default_text_config_keeps_its_32_layers_and_32_heads(random_checkpoint, tmp_path):
    """Hugging Face's default text config, narrowed: every layer and head is exported, the logits are the model's."""
    config = Qwen3VLConfig(
        text_config={"vocab_size": 2048, "hidden_size": 64, "intermediate_size": 96, "head_dim": 16,
         "rope_parameters": {**real_sizes.MROPE, "mrope_section": [4, 2, 2]}},
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
    config = real_sizes.config(
        "2B", {"num_hidden_layers": 2, "vocab_size": 2048}, {"depth": 2, "deepstack_visual_indexes": [0, 1]}
    )
    model = random_checkpoint(tmp_path / "checkpoint", config)
    export_checkpoint(tmp_path / "checkpoint", tmp_path / "model")
    _compare_decoder(model, tmp_path)
    _compare_vision(model, tmp_path)


def _compare_decoder(model, tmp_path):
    """Two sequences of different past lengths, with DeepStack features, against Hugging Face one by one."""
    build(tmp_path / "model", tmp_path / "engine", "onnxruntime")
    engine = open_engine(tmp_path / "engine")
    config = engine.manifest.model
    text, seq, capacity = config.text, 5, 9
    torch.manual_seed(3)
    past_lengths, seen = [4, 7], []
    feeds = {b.name: np.zeros([dict(batch=2, seq=seq, capacity=capacity).get(d, d) for d in b.shape], b.dtype)
             for b in bindings.decoder_inputs(config, CacheConfig(KVFormat.F32))}  # fmt: skip
    feeds[bindings.PAST_LENGTH][:] = past_lengths
    language_model = model.model.language_model
    for b, past in enumerate(past_lengths):
        token_ids = torch.randint(0, text.vocab_size, (1, past + seq))
        embeds = language_model.embed_tokens(token_ids).detach()
        visual = torch.zeros(1, past + seq, dtype=torch.bool)
        visual[0, past + 1 : past + 4] = True
        features = torch.randn(config.num_deepstack, 3, text.hidden_size)
        position_ids = torch.randint(0, 50, (3, 1, past + seq))
        with torch.no_grad():
            rest = {"visual_pos_masks": visual, "deepstack_visual_embeds": list(features)}
            result = language_model(inputs_embeds=embeds, position_ids=position_ids, use_cache=True, **rest)
            seen.append((result, model.lm_head(result.last_hidden_state[:, -1])))
            cos, sin = language_model.rotary_emb(embeds, position_ids)
        feeds[bindings.INPUTS_EMBEDS][b] = embeds[0, past:]
        feeds[bindings.ROPE_COS][b], feeds[bindings.ROPE_SIN][b] = cos[0, past:], sin[0, past:]
        feeds[bindings.DEEPSTACK_EMBEDS][:, b, 1:4] = features
        for layer in range(text.num_hidden_layers):
            cached = result.past_key_values.layers[layer]
            feeds[bindings.past_key(layer)][b, :, :past] = cached.keys[0, :, :past]
            feeds[bindings.past_value(layer)][b, :, :past] = cached.values[0, :, :past]
    outputs = engine.run(bindings.DECODER, feeds)
    for b, (past, (result, logits)) in enumerate(zip(past_lengths, seen, strict=True)):
        scale = logits.abs().max()
        np.testing.assert_allclose(outputs[bindings.LOGITS][b], logits[0].detach(), atol=TOLERANCE * scale)
        for layer in range(text.num_hidden_layers):
            cached = result.past_key_values.layers[layer]
            for name, rows in ((bindings.new_key, cached.keys), (bindings.new_value, cached.values)):
                expected = rows[0, :, past:].numpy()
                atol = TOLERANCE * np.abs(expected).max()
                np.testing.assert_allclose(outputs[name(layer)][b], expected, atol=atol)


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
    cos, sin = model.model.visual.rotary_pos_emb(pixels, get_vision_position_ids(grid, vision.spatial_merge_size))
    outputs = engine.run(
        bindings.VISION,
        {
            bindings.PIXEL_VALUES: pixels.numpy(),
            bindings.POSITION_INDICES: indices.int().numpy(),
            bindings.POSITION_WEIGHTS: weights.numpy(),
            bindings.ROPE_COS: cos.numpy(),
            bindings.ROPE_SIN: sin.numpy(),
            bindings.CU_SEQLENS: get_vision_cu_seqlens(grid).int().numpy(),
        },
    )
    features = [expected.pooler_output, *expected.deepstack_features]
    found = [outputs[bindings.IMAGE_EMBEDS], *outputs[bindings.DEEPSTACK_EMBEDS]]
    for reference, output in zip(features, found, strict=True):
        np.testing.assert_allclose(output, reference.numpy(), atol=TOLERANCE * float(reference.abs().max()))


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
        assert [(f.domain, f.name) for f in proto.functions] == [(OP_DOMAIN, OP_NAME)]
        assert manifest.graphs[graph]["ops"][OP_NAME] == sum(n.op_type == OP_NAME for n in proto.graph.node)
    with Checkpoint(nano_checkpoint) as checkpoint:
        table = checkpoint.tensor("model.language_model.embed_tokens.weight")
    assert manifest.embeddings == {"dtype": str(table.dtype).removeprefix("torch."), "shape": list(table.shape)}
    stored = np.fromfile(nano_model_bundle / "embeddings.bin", np.uint8)
    np.testing.assert_array_equal(stored, table.view(torch.uint8).numpy().ravel())

"""Weight-space transforms: exact at full rank, the best of their rank below it, and what they are for."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.qwen3_vl.modeling_qwen3_vl import apply_rotary_pos_emb

from pascalvl.export import transforms
from pascalvl.export.calibration import calibrate
from pascalvl.export.checkpoint import Checkpoint
from pascalvl.export.modules import Decoder
from pascalvl.export.quantised_weights import QuantisedWeights, quant_layers
from pascalvl.export.transforms import LayerStatistics, TransformedWeights, plan_transforms
from pascalvl.plugins.errors import UserError
from pascalvl.plugins.kv_format import PAGE_SLOTS, CacheConfig, KVFormat
from pascalvl.runtime.prompt import PromptBuilder
from tests.conftest import NANO

FULL = CacheConfig(KVFormat.F32)
LOGITS_TOLERANCE = 1e-4
"""Of the largest logit; both sides float32, the folded weights rounded once more. Some 1e-6 is measured."""
EXACT = 1e-9
"""Float64, through roots and their inverses, whose condition is up to 1e4."""


@pytest.fixture(scope="module")
def checkpoint(nano_checkpoint):
    with Checkpoint(nano_checkpoint) as opened:
        yield opened


@pytest.fixture(scope="module")
def text(checkpoint):
    return checkpoint.model_config().text


@pytest.fixture(scope="module")
def statistics(checkpoint):
    """Of text and pictures."""
    builder = PromptBuilder(checkpoint.directory, checkpoint.model_config())
    english = (NANO / "english.txt").read_text(encoding="utf-8")
    parts = [[{"type": "text", "text": english[:2000]}]]
    for name in ("sample", "square"):
        image = Image.open(NANO / "pictures" / f"{name}.png")
        parts.append([{"type": "image", "image": image}, {"type": "text", "text": "Describe the picture."}])
    prompts = [builder.build([{"role": "user", "content": content}]) for content in parts]
    return calibrate(checkpoint.directory, prompts)


@pytest.fixture(scope="module")
def token_ids(checkpoint):
    """Not those of the calibration."""
    builder = PromptBuilder(checkpoint.directory, checkpoint.model_config())
    english = (NANO / "english.txt").read_text(encoding="utf-8")
    return torch.from_numpy(builder.build([{"role": "user", "content": english[-1500:]}]).token_ids)[None]


def run_decoder(checkpoint, text, planned, reference, token_ids):
    """The transformed decoder over text; returns the logits ``[seq, vocab]`` and the new keys and values by layer."""
    text = dataclasses.replace(text, value_dims=tuple(t.value_dim for t in planned))
    model = checkpoint.meta_model()
    decoder = Decoder(model, text).eval()
    weights = QuantisedWeights(TransformedWeights(checkpoint, planned), quant_layers(model))
    state = {name: weights.tensor(name).float() for name, _ in model.named_parameters()}
    model.load_state_dict(state, assign=True, strict=False)

    language_model, seq = reference.model.language_model, token_ids.shape[1]
    embeds = language_model.embed_tokens(token_ids)
    cos, sin = language_model.rotary_emb(embeds, torch.arange(seq).expand(3, 1, seq))
    page = 1, text.num_key_value_heads, PAGE_SLOTS
    caches = [
        {"past_key": torch.zeros(*page, text.head_dim), "past_value": torch.zeros(*page, dim)}
        for dim in text.value_dims
    ]
    none, bounds = (torch.tensor(x, dtype=torch.int32) for x in ([0], [0, seq]))
    with torch.no_grad():
        no_deepstack, rows = embeds.new_empty(0, *embeds[0].shape), torch.arange(seq, dtype=torch.int32)
        past = none, none[:, None], none[:, None]
        outputs = decoder(embeds[0], cos[0], sin[0], no_deepstack, bounds, *past, rows, caches)
    layers = text.num_hidden_layers
    return outputs[0], list(zip(outputs[1 : 1 + 2 * layers : 2], outputs[2 : 1 + 2 * layers : 2], strict=True))


def reference_logits(reference, token_ids):
    with torch.no_grad():
        return reference(input_ids=token_ids, use_cache=False).logits[0]


@pytest.mark.parametrize("calibrated", [False, True])
def test_at_full_rank_the_model_is_the_same(checkpoint, text, statistics, nano_reference, token_ids, calibrated):
    planned = plan_transforms(checkpoint, text, FULL, statistics if calibrated else None)
    expected = reference_logits(nano_reference, token_ids)
    found, cached = run_decoder(checkpoint, text, planned, nano_reference, token_ids)
    assert (found - expected).abs().max() <= LOGITS_TOLERANCE * expected.abs().max()
    # But its cache is another: queries share k_norm's spread (5.0 of a median at most are left, before from 8.5 up).
    for key, _ in cached:
        sizes = key.square().mean((0, 1)).sqrt()
        assert sizes.max() < 6 * sizes.median()


def test_a_rank_changes_little_of_the_model(checkpoint, text, statistics, nano_reference, token_ids):
    planned = plan_transforms(checkpoint, text, CacheConfig(KVFormat.F32, 96), statistics)
    found, cached = run_decoder(checkpoint, text, planned, nano_reference, token_ids)
    assert {(key.shape[2], value.shape[2]) for key, value in cached} == {(128, 96)}
    expected = reference_logits(nano_reference, token_ids).log_softmax(-1)
    divergence = (expected.exp() * (expected - found.log_softmax(-1))).sum(-1).mean()
    print("DIV", divergence)
    assert 0 < divergence < 5e-3


@pytest.mark.parametrize("calibrated", [False, True])
def test_the_balance_keeps_scores_and_makes_queries_and_keys_alike(checkpoint, text, statistics, calibrated):
    planned = plan_transforms(checkpoint, text, FULL, statistics if calibrated else None)
    rng = np.random.default_rng(0)
    dim = text.head_dim
    for layer, transform in enumerate(planned):
        np.testing.assert_array_equal(transform.balance[: dim // 2], transform.balance[dim // 2 :])
        # q_norm and k_norm end in a product with their weights, which RoPE follows.
        weights = TransformedWeights(checkpoint, planned)
        query, key = torch.from_numpy(rng.standard_normal((2, 1, 1, 5, dim)))
        angles = torch.from_numpy(rng.uniform(0, 7, (1, 5, dim // 2))).repeat(1, 1, 2)
        scores = []
        for source in (checkpoint, weights):
            q_norm, k_norm = (
                source.tensor(f"model.language_model.layers.{layer}.self_attn.{name}.weight").double()
                for name in ("q_norm", "k_norm")
            )
            q, k = apply_rotary_pos_emb(query * q_norm, key * k_norm, angles.cos(), angles.sin())
            scores.append(q @ k.mT)
        torch.testing.assert_close(*scores, rtol=1e-5, atol=1e-5)  # the new weights are rounded to float32

        source = statistics[layer] if calibrated else LayerStatistics.from_weights(checkpoint, text, layer)
        query_sizes, key_sizes = (
            np.einsum("hii->i", moment).reshape(2, -1).sum(0) for moment in (source.query, source.key)
        )
        pair = transform.balance[: dim // 2]
        np.testing.assert_allclose(key_sizes / pair**2, query_sizes * pair**2, rtol=1e-9)


@pytest.mark.parametrize("rank", [128, 112, 64])
def test_the_fold_of_values_is_exact(checkpoint, text, statistics, rank):
    """What o_proj' makes of any mix of v_proj's values is what o_proj makes of their projections."""
    planned = plan_transforms(checkpoint, text, CacheConfig(KVFormat.F32, rank), statistics)
    weights = TransformedWeights(checkpoint, planned)
    heads, kv_heads, dim = text.num_attention_heads, text.num_key_value_heads, text.head_dim
    rng = np.random.default_rng(0)
    hidden = rng.standard_normal((7, text.hidden_size))
    attended = rng.dirichlet(np.ones(7), heads)  # of each head, over the seven tokens

    def outputs(source, projections):
        v_proj, o_proj = (
            source.tensor(f"model.language_model.layers.3.self_attn.{name}.weight").double().numpy()
            for name in ("v_proj", "o_proj")
        )
        result = 0
        for head in range(heads):
            kv_head = head * kv_heads // heads
            values = (hidden @ v_proj.T).reshape(7, kv_heads, -1)[:, kv_head]
            columns = o_proj.reshape(text.hidden_size, heads, -1)[:, head]
            result = result + columns @ projections[kv_head] @ values.T @ attended[head]
        return result

    down, up = planned[3].value_down, planned[3].value_up
    assert (down.shape, up.shape) == ((kv_heads, rank, dim), (kv_heads, dim, rank))
    projections = up @ down
    assert np.linalg.matrix_rank(projections[0], 1e-6) == rank
    if rank == dim:
        np.testing.assert_allclose(projections, np.tile(np.eye(dim), (kv_heads, 1, 1)), atol=1e-7)
    expected = outputs(checkpoint, projections)
    found = outputs(weights, np.tile(np.eye(rank), (kv_heads, 1, 1)))
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())  # float32 weights


def test_biases_of_values_are_folded_too(checkpoint, text):
    class Biased:
        bias = torch.linspace(-1, 1, text.num_key_value_heads * text.head_dim)

        def __contains__(self, name):
            return name.endswith("v_proj.bias") or name in checkpoint

        def tensor(self, name):
            return self.bias if name.endswith("v_proj.bias") else checkpoint.tensor(name)

    planned = plan_transforms(Biased(), text, CacheConfig(KVFormat.F32, None, 96))
    found = TransformedWeights(Biased(), planned).tensor("model.language_model.layers.0.self_attn.v_proj.bias")
    own = Biased.bias.double().numpy().reshape(text.num_key_value_heads, text.head_dim, 1)
    np.testing.assert_allclose(found, (planned[0].value_down @ own).ravel(), atol=1e-5)
    with_bias, without = (LayerStatistics.from_weights(source, text, 0).value for source in (Biased(), checkpoint))
    np.testing.assert_allclose(with_bias - without, own @ own.swapaxes(1, 2), atol=EXACT * with_bias.max())


def random_moments(heads, dim, seed):
    """Of sizes from 1 to 1e-3."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((heads, 2 * dim, dim)) * np.geomspace(1, 0.03, dim) @ rng.standard_normal((dim, dim))
    return x.swapaxes(1, 2) @ x / (2 * dim)


@pytest.mark.parametrize("rank", [5, 12, 16])
def test_the_error_of_a_rank_is_what_the_spectrum_leaves_out(rank):
    moment, weight = random_moments(2, 16, 1), random_moments(2, 16, 2)
    down, up = transforms.projection(moment, weight, rank)
    left = np.eye(16) - up @ down
    found = np.trace(left.swapaxes(1, 2) @ weight @ left @ moment, axis1=1, axis2=2)
    # The eigenvalues of a product of two symmetric matrices, neither's root taken.
    spectrum = np.array([np.sort(np.linalg.eigvals(m @ w).real)[::-1] for m, w in zip(moment, weight, strict=True)])
    np.testing.assert_allclose(found, spectrum[:, rank:].sum(1), atol=EXACT * spectrum.max())
    np.testing.assert_allclose(
        transforms.rank_errors(moment, weight)[rank], (spectrum[:, rank:].sum(1) / spectrum.sum(1)).mean(), atol=EXACT
    )
    # No other projection of that rank does better: not the moment's own first eigenvectors.
    own = np.linalg.eigh(moment)[1][:, :, -rank:]
    left = np.eye(16) - own @ own.swapaxes(1, 2)
    others = np.trace(left.swapaxes(1, 2) @ weight @ left @ moment, axis1=1, axis2=2)
    assert rank == 16 or (found < others).all()


def test_the_noise_of_one_scale_a_row_is_the_least_there_is():
    """Its bound, (sum of sqrt L)^2, up to what the ridge costs; and each element of a row gets its share."""
    moment, weight = random_moments(1, 64, 3), random_moments(1, 64, 4)
    down, up = transforms.projection(moment, weight, 64)
    cached = down @ moment @ down.swapaxes(1, 2)
    noise = np.trace(cached[0]) * np.trace((up.swapaxes(1, 2) @ weight @ up)[0])
    bound = np.sqrt(np.abs(np.linalg.eigvals(moment[0] @ weight[0]))).sum() ** 2
    assert bound * (1 - EXACT) <= noise < 1.1 * bound < 0.5 * np.trace(moment[0]) * np.trace(weight[0])
    shares = np.diagonal(cached[0]) / np.trace(cached[0]) * 64
    assert shares.max() < 4 < np.linalg.eigvalsh(cached[0]).max() / np.trace(cached[0]) * 64


@pytest.mark.parametrize("dim", [64, 96, 112, 128])
def test_rotations_are_orthogonal_and_spread_every_element(dim):
    rotation = transforms.spread(dim)
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(dim), atol=1e-12)
    assert np.abs(rotation).max() <= (2 / dim) ** 0.5 + 1e-12


@pytest.mark.parametrize(
    ("budget", "expected"), [(0.3, 64), (0.05, 96), (0.0499, 112), (0.01, 112), (0.0099, 128), (1e-6, 128)]
)
def test_auto_takes_the_lowest_rank_within_the_budget(checkpoint, text, budget, expected):
    """Errors made to be 0.2 at 64, 0.05 at 96 and 0.01 at 112, mean of two heads that differ."""
    shares = np.zeros((2, 128))
    for head, (at_64, at_96, at_112) in enumerate([(0.1, 0.02, 0.005), (0.3, 0.08, 0.015)]):
        for first, last, share in ((0, 64, 1 - at_64), (64, 96, at_64 - at_96), (96, 112, at_96 - at_112),
                                   (112, 128, at_112)):  # fmt: skip
            shares[head, first:last] = share / (last - first)
    one_layer = dataclasses.replace(text, num_hidden_layers=1, value_dims=(128,))
    output = transforms.output_moment(checkpoint, text, 0)
    root = np.array([np.linalg.cholesky(np.linalg.inv(moment)) for moment in output])
    value = root @ (shares[:, :, None] * root.swapaxes(1, 2))  # in o_proj's metric, its eigenvalues are the shares
    flat = np.tile(np.eye(128), (2, 1, 1))
    statistics = [LayerStatistics(flat, flat, value)]
    # A budget that is met to the last bit is not what is tested.
    cache = CacheConfig(KVFormat.F32, budget * (1 + 1e-9))
    (planned,) = plan_transforms(checkpoint, one_layer, cache, statistics)
    assert planned.value_dim == expected


def test_auto_follows_each_layers_spectrum(checkpoint, text, statistics):
    budget = 2e-4
    planned = plan_transforms(checkpoint, text, CacheConfig(KVFormat.F32, budget), statistics)
    found = [transform.value_dim for transform in planned]
    assert len(set(found)) > 1
    for layer, value_dim in enumerate(found):
        output = transforms.output_moment(checkpoint, text, layer)
        spectrum = np.sort(np.linalg.eigvals(statistics[layer].value @ output).real, 1)[:, ::-1]
        errors = {rank: (spectrum[:, rank:].sum(1) / spectrum.sum(1)).mean() for rank in (64, 96, 112, 128)}
        assert value_dim == min(rank for rank, error in errors.items() if error <= budget)


def test_statistics_of_weights_are_those_of_white_hidden_states(checkpoint, text):
    """Moments of v_proj's outputs for random hidden states of the size that the norm before it makes."""
    prefix = "model.language_model.layers.1"
    norm, v_proj = (
        checkpoint.tensor(f"{prefix}.{name}.weight").double() for name in ("input_layernorm", "self_attn.v_proj")
    )
    torch.manual_seed(0)
    values = (torch.randn(200_000, text.hidden_size, dtype=torch.float64) * norm) @ v_proj.T
    values = values.view(len(values), text.num_key_value_heads, -1).transpose(0, 1)
    direct = (values.mT @ values / values.shape[1]).numpy()
    found = LayerStatistics.from_weights(checkpoint, text, 1).value
    np.testing.assert_allclose(found, direct, atol=0.02 * np.abs(direct).max())  # 200,000 samples


def test_a_rank_that_cannot_be_had(checkpoint, text):
    short = dataclasses.replace(text, head_dim=64, rope_inv_freq=text.rope_inv_freq[:32], mrope_section=(12, 10, 10),
                                value_dims=(64,) * 6)  # fmt: skip
    with pytest.raises(UserError, match="rv=96 is more than this model's head size, 64"):
        plan_transforms(checkpoint, short, CacheConfig(KVFormat.F32, 96))


@pytest.mark.parametrize("dead", ["query", "key", "value", "o_proj"])
def test_heads_that_do_nothing(checkpoint, text, statistics, dead):
    """Pruned, or never used by the prompts: nothing becomes infinite."""

    class Pruned:
        def __contains__(self, name):
            return name in checkpoint

        def tensor(self, name):
            tensor = checkpoint.tensor(name)
            if dead == "o_proj" and name.endswith("o_proj.weight"):
                tensor[:, : tensor.shape[1] // 2] = 0
            return tensor

    changed = statistics
    if dead != "o_proj":
        zeros = np.zeros_like(statistics[0].query)
        changed = [dataclasses.replace(layer, **{dead: zeros}) for layer in statistics]
    for transform in plan_transforms(Pruned(), text, CacheConfig(KVFormat.F32, 1e-3), changed):
        for name, array in vars(transform).items():
            assert array is None or np.isfinite(array).all(), name

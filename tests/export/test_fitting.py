"""Fits of the nano checkpoint: folded scales change nothing, interrupted runs go on, codes are what is run."""

import dataclasses

import numpy as np
import pytest
import torch

from pascalvl.export import fitting
from pascalvl.export.calibration import HiddenStates, make_runnable
from pascalvl.export.checkpoint import Checkpoint
from pascalvl.export.fitting import Fit, fit
from pascalvl.export.modules import Decoder
from pascalvl.export.quantised_weights import QuantisedWeights, quant_layers
from pascalvl.plugins.kv_format import CacheConfig
from pascalvl.plugins.prompt import Prompt
from pascalvl.plugins.weight_format import FLOAT_WEIGHTS, WeightConfig

WEIGHTS = WeightConfig.parse("w4,layer.2=w8")
CACHE = CacheConfig.parse("k8v4")
PROMPTS = [Prompt(np.random.default_rng(seed).integers(0, 1900, 90)) for seed in range(2)]


@pytest.fixture(scope="module")
def checkpoint(nano_checkpoint):
    with Checkpoint(nano_checkpoint) as opened:
        yield opened


@pytest.fixture(autouse=True)
def own_cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "pascalvl"


def run(checkpoint, fitted: Fit, weights: WeightConfig) -> torch.Tensor:
    """The last hidden states of the first prompt."""
    model = checkpoint.meta_model()
    Decoder(model, checkpoint.model_config().text, weights)
    make_runnable(model, checkpoint)
    source = QuantisedWeights(fitted.weights(checkpoint), quant_layers(model), fitted.codes)
    text = model.model.language_model
    prefix = "model.language_model."
    tensors = {name: source.tensor(prefix + name).to(p.dtype) for name, p in text.named_parameters()}
    text.load_state_dict(tensors, assign=True)
    with torch.no_grad():
        token_ids = torch.from_numpy(PROMPTS[0].token_ids)[None]
        return text(inputs_embeds=text.embed_tokens(token_ids)).last_hidden_state[0]


def relative(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


def test_a_fit(checkpoint, own_cache_folder):
    config, done = checkpoint.model_config(), []
    fitted = fit(checkpoint, config, PROMPTS, CACHE, WEIGHTS, progress=lambda: done.append(None))
    assert len(done) == len(fitted.scales) == config.text.num_hidden_layers
    assert fitted.scales[2] == {}  # 8 bits take the weights as they are
    assert fitted.codes("model.language_model.layers.2.mlp.down_proj") is None
    assert fitted.codes("lm_head") is None
    exact = run(checkpoint, dataclasses.replace(fitted, scales=[], transforms=[]), FLOAT_WEIGHTS)
    # Scales and transforms alone leave the function as it is, to float32's rounding.
    assert relative(run(checkpoint, fitted, FLOAT_WEIGHTS), exact) < 1e-5
    compensated = relative(run(checkpoint, fitted, WEIGHTS), exact)
    nearest = relative(run(checkpoint, Fit(fitted.transforms), WEIGHTS), exact)
    assert compensated < 0.85 * nearest
    fitted.discard()
    assert list(own_cache_folder.iterdir()) == []


def test_an_interrupted_run_goes_on(checkpoint, own_cache_folder, monkeypatch):
    config = checkpoint.model_config()
    whole = fit(checkpoint, config, PROMPTS, CACHE, WEIGHTS)
    names = [
        f"model.language_model.layers.{i}.{part}" for i in (1, 5) for part in ("self_attn.qkv_proj", "mlp.down_proj")
    ]
    expected = {name: whole.codes(name) for name in names}
    whole.discard()

    def stop():
        if len(list(own_cache_folder.glob("*/layer-*"))) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(checkpoint, config, PROMPTS, CACHE, WEIGHTS, progress=stop)
    ran = []
    statistics = HiddenStates.statistics
    monkeypatch.setattr(
        HiddenStates,
        "statistics",
        lambda self, *arguments, **o: ran.append(self.layer) or statistics(self, *arguments, **o),
    )
    again = fit(checkpoint, config, PROMPTS, CACHE, WEIGHTS)
    assert ran == [3, 4, 5]
    for name, parts in expected.items():
        for part, tensor in again.codes(name).items():
            assert torch.equal(tensor, parts[part]), (name, part)
    other = fitting._folder(checkpoint, PROMPTS[:1], CACHE, WEIGHTS)
    assert other != again.folder


def test_moments_are_those_of_the_inputs(checkpoint):
    """Of the first layer's, against the embeddings' own norm."""
    hidden = HiddenStates(checkpoint, PROMPTS)
    config = checkpoint.model_config()
    layer = fitting.DecoderLayer(hidden.layer_module(), config.text, 0, fitting.F32)
    prefix = "model.language_model.layers.0."
    source = QuantisedWeights(checkpoint, {prefix + name: part for name, part in quant_layers(layer).items()})
    fitting.assign(layer, {name: source.tensor(prefix + name) for name, _ in layer.named_parameters()})
    states = torch.cat([state[0] for state in hidden.states]).double()
    with fitting._moments(layer) as moments:
        hidden.run(layer, keep=False)
    normed = states / (states.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    normed = normed * checkpoint.tensor(prefix + "input_layernorm.weight").double()
    torch.testing.assert_close(moments["qkv_proj"].double(), normed.T @ normed / len(states), rtol=0, atol=1e-4)

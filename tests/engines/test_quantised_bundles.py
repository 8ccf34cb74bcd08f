"""A model with weights of every format, run by every backend and by the reference host: the same outputs and answers.

On a GPU machine that cannot export, carry the model bundle there (its path in PASCALVL_NANO_QUANTISED_BUNDLE).
"""

import functools

import numpy as np
import pytest
import torch

from pascalvl.engines import build, open_engine
from pascalvl.plugins import bindings
from pascalvl.plugins.bundle import Manifest
from pascalvl.plugins.kernels import torch_calls
from pascalvl.plugins.kernels.library import KernelLibrary
from pascalvl.plugins.kv_format import CacheConfig
from pascalvl.plugins.tensorrt.host import HostedPlugin
from pascalvl.runtime import VisionLanguageModel
from tests.engines.decoder import decoder_feeds, floats_of
from tests.engines.torch_reference import answer, reference_answer, scene, user

CONTEXT, NEW_TOKENS = 256, 20
PICTURE = [user(scene(3, 100, 70), "How many squares are there?")]
pytestmark = pytest.mark.usefixtures("cuda_anywhere")
QUANT_LINEARS = {bindings.VISION: 1 + 4 * 6 + 2 * 4, bindings.DECODER: 4 * 6 + 1}
"""Linear layers of the two graphs."""
TOLERANCE = {"torch": 2e-2, "cuda": 2e-2, "reference": 2e-2}
"""Of outputs, by the RMS of ONNX Runtime's, which takes other ties when it rounds inputs to int8."""


@pytest.fixture(scope="module")
def engines(nano_quantised_bundle, tmp_path_factory):
    """Engine bundles by backend."""
    folder = tmp_path_factory.mktemp("quantised")

    @functools.cache
    def built(backend: str):
        build(nano_quantised_bundle, folder / backend, backend, CacheConfig.parse("k8v4"))
        return folder / backend

    return built


def opened(engines, backend: str):
    """A backend's engine."""
    return open_engine(engines(backend))


def test_the_manifest_says_so(nano_quantised_bundle):
    manifest = Manifest.read(nano_quantised_bundle, "model")
    assert str(manifest.weights) == "w4,layer.1=w8,layer.2=f16,layer.3=f32"
    assert {name: graph["ops"]["QuantLinear"] for name, graph in manifest.graphs.items()} == QUANT_LINEARS


@pytest.mark.parametrize("backend", TOLERANCE)
@pytest.mark.parametrize("seq", [1, 3])
def test_decoder_outputs(backend, seq, engines):
    manifest = Manifest.read(engines("onnxruntime"), "engine")
    feeds = decoder_feeds(manifest, seq=seq, capacity=10, past=4)
    found, expected = (
        floats_of(manifest.model, manifest.kv_cache, opened(engines, name).run(bindings.DECODER, feeds))
        for name in (backend, "onnxruntime")
    )
    for name, value in expected.items():
        rms = np.sqrt(np.square(value).mean())
        assert np.sqrt(np.square(found[name] - value).mean()) < TOLERANCE[backend] * rms, name


@pytest.mark.parametrize("backend", ["onnxruntime", "torch", "cuda", "reference"])
def test_a_picture_question(backend, engines, nano_reference, monkeypatch):
    """4-bit weights rounded to nearest still answer as Hugging Face does in float32."""
    calls = []
    kernels = {"reference": (HostedPlugin, "enqueue")} | dict.fromkeys(("torch", "cuda"), (KernelLibrary, "linear"))
    if counted := kernels.get(backend):
        launch = getattr(*counted)
        monkeypatch.setattr(*counted, lambda *arguments: calls.append(1) or launch(*arguments))
    model = VisionLanguageModel.open(engines(backend), context_length=CONTEXT)
    expected = reference_answer(nano_reference, model.prompt(PICTURE), NEW_TOKENS)[0]
    calls.clear()
    assert answer(model, PICTURE, NEW_TOKENS).token_ids == expected
    if counted and not torch.cuda.is_available():  # where a graph is replayed, nothing is called
        steps = len(expected)
        attention = (6 + 6 * steps) if backend == "reference" else 0
        assert len(calls) == QUANT_LINEARS[bindings.VISION] + steps * QUANT_LINEARS[bindings.DECODER] + attention


def test_the_torch_backend_reads_what_was_exported(engines, nano_quantised_bundle):
    """Weights are mapped as they are, in words of codes or halves."""
    engine = opened(engines, "torch")
    modules = engine._modules[bindings.DECODER].language_model.layers
    weights = [layer.self_attn.o_proj.weight for layer in modules]
    words = [128, 256, 512, 1024, 128, 128]  # of 1,024 inputs: w4, w8, f16; f32; w4
    assert [weight.shape[1] for weight in weights] == words
    assert [weight.dtype for weight in weights] == [torch.float32 if n == 1024 else torch.int32 for n in words]
    assert torch_calls.library(engine.device) is engine.kernels

"""The torch backend on a CUDA device: the real kernels inside the whole model, and the decode step's CUDA graph.

Needs torch, transformers and onnx; where nothing can be exported or compiled, carry there a model bundle of the nano
checkpoint (its path in PASCALVL_NANO_MODEL_BUNDLE) and the kernels' library (`pascalvl.plugins.kernels.build.cached`).
"""

import copy
import dataclasses
import subprocess
import sys

import numpy as np
import pytest
import torch

from pascalvl.engines import open_engine
from pascalvl.engines.engine import Placement, Session
from pascalvl.engines.tolerance import tolerance
from pascalvl.engines.torch.backend import TorchSession
from pascalvl.engines.torch.steps import CapturedStep
from pascalvl.plugins import bindings
from pascalvl.plugins.errors import UserError
from pascalvl.plugins.prompt import Prompt
from pascalvl.runtime import SamplingParams, VisionLanguageModel, bench
from pascalvl.runtime.video import Video
from tests.engines.batches import CAPACITY, POOL, alone, changed, decodes, fresh_pool, places
from tests.engines.decoder import CACHES, Conversation, random_tokens
from tests.engines.torch_reference import answer, assistant, kept_pages, kept_tokens, reference_answer, scene, user

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

NEW_TOKENS = 32
FIRST = [user(scene(3, 200, 133), "Describe the picture.")]
CONVERSATIONS = {
    "text": [user("Hello!")],
    "long text": [
        user(" ".join(f"The code of lamp {i} is {7 * i}." for i in range(70)) + " What is the code of lamp 3?")
    ],
    "picture": FIRST,
    "large picture": [user(scene(4, 1200, 900, 3, 4), "How many squares are there?")],
    "pictures": [user(scene(5, 64, 256), scene(6, 256, 256), scene(7, 77, 190), "Describe the last picture.")],
    "video": [user(Video([scene(seed, 96, 64, 1, 2) for seed in range(6)], 3.0), "What happens?")],
    "turns": [*FIRST, assistant("A grid."), user(scene(8, 96, 96), "Which shapes are red?")],
}


@pytest.fixture(scope="module")
def bundle(nano_engine):
    return nano_engine("f32", "torch")


@pytest.fixture(scope="module")
def model(bundle):
    return VisionLanguageModel.open(bundle)


@pytest.fixture(scope="module")
def reference(nano_reference):
    # Its convolution too must not round to TF32.
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    return copy.deepcopy(nano_reference).to("cuda")


@pytest.fixture
def endless(model, monkeypatch):
    monkeypatch.setattr(
        model, "generation_config", dataclasses.replace(model.generation_config, eos_token_ids=frozenset())
    )
    return model


@pytest.mark.parametrize("name", CONVERSATIONS)
@pytest.mark.parametrize("kv", ["f32", "f16", "k8v8"])
def test_tokens_and_logits_equal_the_reference(name, kv, nano_engine, reference, monkeypatch):
    model = VisionLanguageModel.open(nano_engine(kv, "torch"))
    messages = CONVERSATIONS[name]
    expected, expected_logits = reference_answer(reference, model.prompt(messages), NEW_TOKENS)
    assert answer(model, messages, NEW_TOKENS).token_ids == expected

    logits = []
    step = TorchSession.step
    monkeypatch.setattr(TorchSession, "choose", Session.choose)  # so that logits come to the host

    def noting(self, sequences):
        outputs = step(self, sequences)
        logits.append(outputs[bindings.LOGITS][0])
        return outputs

    monkeypatch.setattr(TorchSession, "step", noting)
    assert answer(model, messages, NEW_TOKENS).token_ids == expected
    rms = np.sqrt(np.square(expected_logits, dtype=np.float64).mean())
    np.testing.assert_allclose(
        np.stack(logits), expected_logits, rtol=0, atol=tolerance(model.cache_config, model.config) * rms
    )


def test_order_of_prompts_changes_nothing(model, bundle):
    for name in [*CONVERSATIONS, *reversed(CONVERSATIONS)]:
        generation = answer(model, CONVERSATIONS[name], 12)
        fresh = answer(VisionLanguageModel.open(bundle), CONVERSATIONS[name], 12)
        assert generation.token_ids == fresh.token_ids
    again = answer(model, CONVERSATIONS[name], 12)
    assert again.reused_tokens == again.prompt_tokens - 1
    assert again.token_ids == fresh.token_ids


def test_chunked_prefill_equals_one_shot(model, bundle):
    chunked = VisionLanguageModel.open(bundle, prefill_chunk=7)
    for name in ("pictures", "turns"):
        assert answer(chunked, CONVERSATIONS[name], 12).token_ids == answer(model, CONVERSATIONS[name], 12).token_ids


@pytest.mark.parametrize("kv", CACHES)
def test_caches(kv, nano_engine):
    """The reference is ONNX Runtime with the same cache."""
    found, expected = (VisionLanguageModel.open(nano_engine(kv, backend)) for backend in ("torch", "onnxruntime"))
    assert answer(found, FIRST, NEW_TOKENS).token_ids == answer(expected, FIRST, NEW_TOKENS).token_ids


def test_repetition_penalty(model, reference):
    """It needs the logits on the host."""
    found = answer(model, FIRST, NEW_TOKENS, SamplingParams(repetition_penalty=10.0)).token_ids
    prompt = model.prompt(FIRST)
    assert found == reference_answer(reference, prompt, NEW_TOKENS, repetition_penalty=10.0)[0]
    assert found != reference_answer(reference, prompt, NEW_TOKENS)[0]


def rows_of(model):
    """The keys and values of a conversation, without what is in its last page behind them."""
    nodes = kept_pages(model)
    rows = model._session.read(np.array([node.page for node in nodes]))
    for array in rows.values():
        array[-1, :, len(nodes[-1].identities) :] = 0
    return rows


# The CUDA graph -------------------------------------------------------------------------------------------------------


def test_each_decode_step_is_one_graph(model, endless, monkeypatch):
    replays = 0
    replay = torch.cuda.CUDAGraph.replay

    def counting(graph):
        nonlocal replays
        replays += 1
        replay(graph)

    for _ in range(2):  # the prompt, and its last token, which is what the next time leaves of it
        answer(model, FIRST, 1)
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", counting)
    monkeypatch.setattr(CapturedStep, "_step", None)  # running it otherwise is an error
    generation = answer(model, FIRST, 20)
    assert len(generation.token_ids) == 20
    assert replays == 20  # the first token comes with the prompt


@pytest.mark.parametrize("kv", ["f32", "k8v4"])
def test_prefill_of_every_length_agrees(kv, nano_engine):
    """Captured and replayed, behind tokens that stay, against the same without graphs."""
    captured, plain = (VisionLanguageModel.open(nano_engine(kv, "torch")) for _ in range(2))
    plain._session.decode_step.graph = None
    tokens = np.random.default_rng(0).integers(captured.config.text.vocab_size, size=800)
    for count in (1, 2, 7, 8, 9, 20, 33, 500, 512, 700):
        for attempt in range(3):
            for model in (captured, plain):
                chunk = np.concatenate([tokens[:70], np.roll(tokens, attempt)[:count]])
                assert len(list(model.answer(Prompt(chunk), SamplingParams(temperature=0), 1))) <= 1
            found, expected = (rows_of(model) for model in (captured, plain))
            for name, rows in expected.items():
                if rows.dtype.kind == "f":  # codes may differ by one at ties
                    np.testing.assert_allclose(found[name], rows, rtol=0, atol=1e-3 * np.abs(rows).max(), err_msg=name)


def test_graph_and_plain_steps_agree(bundle, endless):
    plain = VisionLanguageModel.open(bundle)
    plain.generation_config = endless.generation_config
    plain._session.decode_step.graph = None
    for messages in CONVERSATIONS.values():
        generation = answer(endless, messages, 40)
        assert answer(plain, messages, 40).token_ids == generation.token_ids
        length = kept_tokens(endless)
        assert kept_tokens(plain) == length == generation.prompt_tokens + 39
        found, expected = (rows_of(model) for model in (endless, plain))
        for name, rows in expected.items():
            np.testing.assert_allclose(found[name], rows, rtol=0, atol=1e-4 * np.abs(rows).max(), err_msg=name)


@pytest.mark.parametrize("kv", ["f32", "k8v4"])
def test_captured_steps_of_several_sequences_equal_single_ones(kv, nano_engine, monkeypatch):
    """To the bit, captured and replayed; three sequences run in the step of four."""
    session = open_engine(nano_engine(kv, "torch")).open_session(CAPACITY, POOL)
    sequences = decodes(session)
    pool = fresh_pool(session)
    expected = alone(session, sequences)[bindings.LOGITS]
    stored = session.read(np.arange(POOL))
    replays = []
    replay = torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: replays.append(graph) or replay(graph))
    for attempt in range(3):
        replays.clear()
        for numbers in ([4], [6, 1], [2, 5, 0], [7, 3, 4, 1], [3, 0, 7, 1, 6, 2, 5, 4]):
            fresh_pool(session)
            given = [sequences[number] for number in numbers]
            found = session.step(given)[bindings.LOGITS]
            np.testing.assert_array_equal(found, expected[numbers])
            assert session.choose(given) == [(row.argmax(), row.max()) for row in expected[numbers]]
            assert changed(session, pool) == places(given)
        for name, rows in session.read(np.arange(POOL)).items():  # after all eight
            np.testing.assert_array_equal(rows, stored[name], err_msg=name)
        # The first time, sizes but one run before they are captured; the second time is `greedy`'s.
        assert len(replays) == (10 if attempt else 7)
    assert len(set(replays)) == 4


@pytest.mark.parametrize(("kv", "tolerance"), [("f32", 1e-4), ("k8v4", 6e-2)])
def test_a_captured_step_of_a_chunk_beside_decodes(kv, tolerance, nano_engine):
    """Padded to sixteen tokens of four sequences. Products of more rows are summed in other orders, after which a code
    may be the next one: of four bits, an eighth of the largest."""
    session = open_engine(nano_engine(kv, "torch")).open_session(CAPACITY, POOL)
    one, *_, other = decodes(session)
    slots = np.arange(120, 129, dtype=np.int32)
    placement = Placement(np.array([16, 13], np.int32), 120, slots)
    chunk = random_tokens(session.model.text, placement, np.random.default_rng(99))
    sequences = [one, chunk, other]
    pool = fresh_pool(session)
    expected = alone(session, sequences)[bindings.LOGITS]
    for _ in range(3):
        fresh_pool(session)
        found = session.step(sequences)[bindings.LOGITS]
        np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * np.abs(expected).max())
        assert session.choose(sequences) == [(row.argmax(), row.max()) for row in found]
        assert changed(session, pool) == places(sequences)
    assert session._steps[16, 4, 0].graph


CAPTURE_FAILS = """
import logging, sys
import torch
from pascalvl.engines.tolerance import tolerance
from pascalvl.engines.torch.backend import TorchSession
from pascalvl.runtime import SamplingParams, VisionLanguageModel

def synchronising(session, inputs, run=TorchSession._run):
    torch.cuda.synchronize()  # which no capture allows
    return run(session, inputs)

TorchSession._run = synchronising
logging.basicConfig()
model = VisionLanguageModel.open(sys.argv[1])
assert model._session.decode_step.graph is None
generation = model.generate([{"role": "user", "content": "Hello!"}], SamplingParams(), 8)
list(generation)
print(generation.token_ids)
"""


def test_a_step_that_cannot_be_captured(bundle, model):
    command = [sys.executable, "-c", CAPTURE_FAILS, str(bundle)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "a step of 1 tokens of 1 sequences is no CUDA graph, and slower: it cannot be captured (" in result.stderr
    assert result.stdout.strip() == str(answer(model, CONVERSATIONS["text"], 8).token_ids)


def test_an_interrupted_step_appends_nothing(bundle, model):
    expected = answer(model, FIRST, 12).token_ids
    fresh = VisionLanguageModel.open(bundle)
    graph = fresh._session.decode_step.graph

    class Interrupted:
        left, pool = 3, graph.pool

        def replay(self):
            graph.replay()
            self.left -= 1
            if not self.left:
                raise KeyboardInterrupt

    fresh._session.decode_step.graph = Interrupted()
    with pytest.raises(KeyboardInterrupt):
        answer(fresh, FIRST, 12)
    assert kept_tokens(fresh) == len(fresh.prompt(FIRST).token_ids) + 2
    fresh._session.decode_step.graph = graph
    assert answer(fresh, FIRST, 12).token_ids == expected


def test_sessions_do_not_disturb_each_other(bundle):
    engine = open_engine(bundle)
    alone, first, second = (Conversation(engine.open_session(16)) for _ in range(3))
    expected = [alone.step(1, seed)[bindings.LOGITS] for seed in range(4)]
    for seed, logits in enumerate(expected):
        second.choose(1, 0)
        found = first.step(1, seed)[bindings.LOGITS]
        np.testing.assert_allclose(found, logits, rtol=0, atol=1e-5 * np.abs(logits).max())


def test_launches_of_a_step(bundle, endless):
    """As many at each count, about as many outside the graph (where libraries may choose others); nothing is stored."""
    plain = VisionLanguageModel.open(bundle)
    plain._session.decode_step.graph = None
    for model in (endless, plain):
        answer(model, FIRST, 4)
    rows = endless._session.read(np.arange(endless._session.pages))
    launches = endless.decode_launches()
    # Norm, GEMV, prologue, decode, merge, GEMV, norm, GEMV, GEMV (codes: two more); and what comes before and after.
    layers = endless.config.text.num_hidden_layers
    assert 9 * layers < launches < 9 * layers + 14
    assert endless.decode_launches() == launches
    assert plain.decode_launches() == pytest.approx(launches, rel=0.05)
    for name, found in endless._session.read(np.arange(endless._session.pages)).items():
        np.testing.assert_array_equal(found, rows[name])


def test_bench(endless):
    """The read's kernel too is compiled here, or carried (`pascalvl.plugins.bench.timing.Yardstick.ptx`)."""
    result = bench.measure(endless, bench.BenchOptions(depths=(0, 256), prefill=64, decode=16, picture=256, repeats=3))
    assert result.gpu == torch.cuda.get_device_name()
    assert result.launches_per_token == endless.decode_launches()
    assert result.read_bytes_per_second > 50e9
    assert all(0 < row.of_floor < 1 for row in result.depths)


# Memory and time ------------------------------------------------------------------------------------------------------


def test_more_context_than_memory(bundle):
    with pytest.raises(UserError, match=r"a context of \d+ tokens needs [\d.]+ GB for its KV cache"):
        open_engine(bundle).open_session(1 << 40)


def test_time_of_a_decode_step(endless, bundle, capsys):
    plain = VisionLanguageModel.open(bundle)
    plain.generation_config = endless.generation_config
    plain._session.decode_step.graph = None
    with capsys.disabled():
        print()
        for name, model in (("CUDA graph", endless), ("plain", plain)):
            answer(model, FIRST, 101)
            generation = answer(model, FIRST, 101)
            print(f"{name}: {10 * generation.decode_seconds:.3f} ms a token, on {torch.cuda.get_device_name()}")

"""Backend ``cuda``: the exported graphs as launches of the kernels, on a GPU or, where there is none, the emulator."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import weakref

import numpy as np
import onnx
import pytest

from pascalvl.engines import build, device_memory, open_engine
from pascalvl.engines.choice import Choice, LogitState
from pascalvl.engines.cuda import backend, engine
from pascalvl.engines.cuda.lowering import lower
from pascalvl.engines.cuda.plan import Plan, laid_out
from pascalvl.engines.device.gpu import Gpu
from pascalvl.engines.device.memory import EmulatedDevice, Graph, available_target
from pascalvl.engines.engine import Placement
from pascalvl.plugins import bindings
from pascalvl.plugins.bundle import Manifest
from pascalvl.plugins.errors import UserError
from pascalvl.plugins.kernels.build import Target
from pascalvl.plugins.kernels.library import KernelLibrary
from pascalvl.plugins.kv_format import CacheConfig
from pascalvl.plugins.weight_format import WeightConfig
from pascalvl.runtime import SamplingParams, VisionLanguageModel
from pascalvl.runtime.cli import main
from pascalvl.runtime.video import Video
from tests.engines.batches import CAPACITY, POOL, alone, changed, decodes, fresh_pool, places
from tests.engines.decoder import CACHES, decoder_feeds, random_tokens
from tests.engines.torch_reference import answer, assistant, kept_tokens, reference_answer, scene, user

pytestmark = pytest.mark.usefixtures("cuda_anywhere")

ON_GPU = available_target() is Target.CUDA
NEW_TOKENS = 32 if ON_GPU else 5
CONTEXT = 160
NEAR_TIE = 0.15
"""Of logprobs: what rounding moves them by, see `test_tokens_are_those_of_the_torch_backend`; measured up to 0.11."""
PICTURE = [user(scene(1, 64, 64), "Describe the picture.")]
CONVERSATIONS = {
    "text": [user("Hello!")],
    "picture": PICTURE,
    "pictures": [user(scene(5, 64, 96), scene(6, 96, 64), "Describe the last picture.")],
    "video": [user(Video([scene(seed, 64, 64, 1, 2) for seed in range(4)], 2.0), "What happens?")],
    "turns": [*PICTURE, assistant("A grid."), user("Which shapes are red?")],
}


@pytest.fixture(scope="module")
def bundle(nano_engine):
    return nano_engine("f32", "cuda")


def fresh(bundle, **options) -> VisionLanguageModel:
    return VisionLanguageModel.open(bundle, context_length=CONTEXT, **options)


@pytest.fixture
def padding(monkeypatch) -> None:
    """Steps of several tokens are padded as on a GPU."""
    if not ON_GPU:
        monkeypatch.setattr(EmulatedDevice, "gpu", Gpu("a GPU", (6, 1), 0, 0, (12, 0)))


@pytest.fixture
def recorded(monkeypatch) -> list[Graph]:
    """On the emulator, what a GPU's capture is: steps that are played again. In the order in which they are."""
    played = []
    if not ON_GPU:
        monkeypatch.setattr(EmulatedDevice, "capture", lambda self, step: Graph(step, 7))
    call = Graph.__call__
    monkeypatch.setattr(Graph, "__call__", lambda self: played.append(self) or call(self))
    return played


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_tokens_equal_the_reference(name, bundle, nano_reference):
    model = fresh(bundle)
    messages = CONVERSATIONS[name]
    assert (
        answer(model, messages, NEW_TOKENS).token_ids
        == reference_answer(nano_reference, model.prompt(messages), NEW_TOKENS)[0]
    )


@pytest.mark.parametrize("kv", CACHES)
def test_caches(kv, nano_engine):
    """The reference is ONNX Runtime with the same cache."""
    found, expected = (fresh(nano_engine(kv, backend)) for backend in ("cuda", "onnxruntime"))
    assert answer(found, PICTURE, NEW_TOKENS).token_ids == answer(expected, PICTURE, NEW_TOKENS).token_ids


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU, for the torch backend")
@pytest.mark.parametrize("weights", ["f32", "f16", "w8", "w4"])
def test_tokens_are_those_of_the_torch_backend(weights, nano_checkpoint, tmp_path):
    """But where two are nearly as likely: codes of the cache and of activations make steps of 1/127 of last places."""
    from pascalvl.export import export_checkpoint

    export_checkpoint(nano_checkpoint, tmp_path / "model", weights=WeightConfig.parse(weights))
    for kv in CACHES:
        models = []
        for name in ("cuda", "torch"):
            build(tmp_path / "model", tmp_path / f"{name} {kv}", name, CacheConfig.parse(kv))
            models.append(fresh(tmp_path / f"{name} {kv}"))
        for name, messages in CONVERSATIONS.items():
            generations = [model.generate(messages, SamplingParams(), NEW_TOKENS, logprobs=2) for model in models]
            found, expected = (list(generation) and generation.logprobs for generation in generations)
            for ours, theirs in zip(found, expected, strict=False):
                if ours.token_id != theirs.token_id:
                    assert theirs.top[0][1] - theirs.top[1][1] < NEAR_TIE, (kv, name)
                    break
            else:
                assert len(found) == len(expected)


def test_ranks(nano_checkpoint, tmp_path):
    from pascalvl.export import export_checkpoint

    cache = CacheConfig.parse("k8v4,rv=112")
    export_checkpoint(nano_checkpoint, tmp_path / "model", cache=cache)
    for name in ("onnxruntime", "cuda"):
        build(tmp_path / "model", tmp_path / name, name, cache)
    found, expected = (answer(fresh(tmp_path / name), PICTURE, NEW_TOKENS) for name in ("cuda", "onnxruntime"))
    assert found.token_ids == expected.token_ids


@pytest.mark.parametrize("seq", [1, 3])
def test_outputs_equal_the_exported_graphs(seq, nano_engine):
    """Also of the marked layers. Both sum in float32, in other orders."""
    found, expected = (open_engine(nano_engine("f32", b), marked_layers=True) for b in ("cuda", "onnxruntime"))
    feeds = decoder_feeds(found.manifest, seq=seq, capacity=10, past=4)
    outputs, other = (engine.run(bindings.DECODER, feeds) for engine in (found, expected))
    assert outputs.keys() == other.keys() > {bindings.hidden_states(0)}
    for name, value in other.items():
        np.testing.assert_allclose(outputs[name], value, rtol=0, atol=2e-5 * np.abs(value).max(), err_msg=name)


def test_conversations_in_chunks(bundle, nano_reference):
    """A prefix that is not run again, and chunks."""
    model = fresh(bundle, prefill_chunk=13)
    answer(model, PICTURE, 2)
    generation = answer(model, CONVERSATIONS["turns"], NEW_TOKENS)
    assert generation.reused_tokens >= len(model.prompt(PICTURE).token_ids) - 1
    expected = reference_answer(nano_reference, model.prompt(CONVERSATIONS["turns"]), NEW_TOKENS)[0]
    assert generation.token_ids == expected


def test_a_repetition_penalty(bundle, nano_reference):
    """It needs the logits on the host."""
    model = fresh(bundle)
    found = answer(model, PICTURE, NEW_TOKENS, SamplingParams(repetition_penalty=10.0)).token_ids
    assert found == reference_answer(nano_reference, model.prompt(PICTURE), NEW_TOKENS, repetition_penalty=10.0)[0]


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(temperature=1.5, top_k=20, top_p=0.9, seed=3),
        SamplingParams(temperature=1.2, seed=1, presence_penalty=1.0, frequency_penalty=0.5, logit_bias={7: -20.0}),
    ],
)
@pytest.mark.parametrize("kv", ["f32", "f32,window=4+16"])
def test_a_seed_gives_the_same_tokens_on_every_backend(kv, sampling, nano_engine):
    answers = {}
    # The plugin is for the emulator, and need not be compiled for a GPU.
    for name in ("onnxruntime", "cuda", "torch", *(() if ON_GPU else ("reference",))):
        model = VisionLanguageModel.open(nano_engine("f32", name), context_length=CONTEXT, cache=CacheConfig.parse(kv))
        answers[name] = answer(model, [user("Hello! " * 7)], 6, sampling).token_ids
    assert len(set(map(tuple, answers.values()))) == 1, answers


def test_logits_stay_on_the_device(bundle, monkeypatch):
    """But what is chosen of them."""
    model = fresh(bundle)
    moved = []
    download = type(model.engine.device).download
    monkeypatch.setattr(
        type(model.engine.device), "download", lambda self, to, at: moved.append(to.nbytes) or download(self, to, at)
    )
    answer(model, PICTURE, 4, SamplingParams(temperature=0.7, top_k=20, repetition_penalty=1.1, seed=0))
    assert len(moved) >= (1 if ON_GPU else 4)  # recorded once
    assert max(moved) <= 512


# Recorded steps -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sampling", [SamplingParams(), SamplingParams(temperature=0.9, top_k=5, presence_penalty=1.0, seed=3)]
)
def test_logprobs(sampling, bundle, nano_engine, padding):
    """Those that ONNX Runtime's logits have; of a prompt's last chunk, and of decode steps."""
    generations = []
    for folder in (bundle, nano_engine("f32")):
        generation = fresh(folder, prefill_chunk=16).generate(PICTURE, sampling, 4, logprobs=3)
        list(generation)
        generations.append(generation)
    found, expected = generations
    assert found.token_ids == expected.token_ids == [row.token_id for row in found.logprobs]
    for ours, theirs in zip(found.logprobs, expected.logprobs, strict=True):
        assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-3)
        assert [token for token, _ in ours.top] == [token for token, _ in theirs.top]
        assert ours.top[0][1] >= ours.top[1][1] >= ours.top[2][1]


def test_a_conversation_of_recorded_steps(bundle, nano_reference, padding, recorded):
    """Prompts are padded, pictures among them; the second time all steps are played again."""
    model = fresh(bundle)
    for messages in (PICTURE, CONVERSATIONS["turns"], CONVERSATIONS["text"], PICTURE, CONVERSATIONS["turns"]):
        model.scheduler.tree.clear()
        expected = reference_answer(nano_reference, model.prompt(messages), 3)[0]
        recorded.clear()
        assert answer(model, messages, 3).token_ids == expected
    assert len(recorded) == 3  # the prompt, and two decode steps
    assert len(set(map(id, recorded))) == 2
    assert model.decode_launches() == (7 if not ON_GPU else pytest.approx(9 * 6 + 4, abs=8))


def test_padded_steps_of_several_sequences(bundle, padding, recorded):
    """Three decode steps in that of four, to the bit, then a chunk in one of eight tokens."""
    session = open_engine(bundle).open_session(CAPACITY, POOL)
    placement = Placement(np.array([16, 13], np.int32), 126, np.arange(126, 130, dtype=np.int32))
    chunk = random_tokens(session.model.text, placement, np.random.default_rng(99))
    sequences = [*decodes(session)[:3], chunk]
    pool = fresh_pool(session)
    expected = alone(session, sequences)[bindings.LOGITS]
    for numbers, atol in (((2, 0, 1), 0), ((3, 1), 1e-5)):
        for _ in range(2):  # run, and played again
            fresh_pool(session)
            given = [sequences[number] for number in numbers]
            found = session.step(given)[bindings.LOGITS]
            of_these = expected[list(numbers)]
            np.testing.assert_allclose(found, of_these, rtol=0, atol=atol * np.abs(of_these).max())
            assert session.choose(given) == [(row.argmax(), row.max()) for row in found]
            assert changed(session, pool) == places(given)
    assert [(shape.tokens, shape.batch) for shape in session._steps] == [(1, 1), (8, 1), (4, 4), (8, 2)]


def test_records_of_sequences_that_are_no_more_are_cleared(bundle):
    """They point to memory that was freed with them."""
    session = open_engine(bundle).open_session(CAPACITY, POOL)
    sequences = decodes(session)[:4]
    vocab_size = session.model.text.vocab_size
    choices = [Choice(presence_penalty=1.0, state=LogitState(np.zeros(vocab_size, np.uint32))) for _ in sequences]
    session.choose(sequences, choices)
    (step,) = [step for shape, step in session._steps.items() if shape.batch == 4]
    records = step._inputs.arrays["choices"]
    assert (records["counts"] != 0).all()
    for fewer, given in ((3, choices[:1] + [Choice()] * 2), (4, None)):
        session.choose(sequences[:fewer], given)
        assert (records["counts"] != 0).tolist() == [given is not None, False, False, False]


@pytest.mark.parametrize("appends", [0, 1, 3])
def test_an_interrupt_leaves_the_cache_as_it_was(bundle, nano_reference, monkeypatch, appends):
    model = fresh(bundle, prefill_chunk=16)
    expected = reference_answer(nano_reference, model.prompt(PICTURE), 4)[0]
    append, left = KernelLibrary.kv_append, appends

    def interrupted(*arguments):
        nonlocal left
        if not left:
            raise KeyboardInterrupt
        left -= 1
        append(*arguments)

    if ON_GPU:
        pytest.skip("what a graph launches cannot be interrupted so")
    with monkeypatch.context() as patch:
        patch.setattr(KernelLibrary, "kv_append", interrupted)
        with pytest.raises(KeyboardInterrupt):
            answer(model, PICTURE, 4)
    prompt_tokens = len(model.prompt(PICTURE).token_ids)
    assert kept_tokens(model) == [0, 16, prompt_tokens, prompt_tokens + 1][appends]
    assert answer(model, PICTURE, 4).token_ids == expected


def test_memory_is_what_the_plan_says(bundle, monkeypatch):
    """Intermediate results of steps and pictures share one block; a large picture's are given back."""
    sizes = []
    opened = open_engine(bundle)
    allocate = type(opened.device).allocate
    monkeypatch.setattr(type(opened.device), "allocate", lambda self, n: sizes.append(n) or allocate(self, n))
    opened.open_session(CAPACITY)
    assert len(opened._memory) == 1
    model = VisionLanguageModel(opened, CONTEXT, 512)
    answer(model, CONVERSATIONS["text"], 2)
    assert len(opened._memory) == 1
    patches = 4 * (opened._memory[0].nbytes // (4 * opened.plans[bindings.VISION].unit) + 1)
    vision = model.config.vision
    feeds = {
        bindings.PIXEL_VALUES: np.zeros((patches, vision.patch_dim), np.float32),
        bindings.POSITION_EMBEDS: np.zeros((patches, vision.hidden_size), np.float32),
        bindings.ROPE_COS: np.ones((patches, vision.head_dim), np.float32),
        bindings.ROPE_SIN: np.zeros((patches, vision.head_dim), np.float32),
        bindings.CU_SEQLENS: np.array([0, 4, patches], np.int32),
    }
    bound = opened.bound(
        bindings.VISION,
        opened._sizes(bindings.VISION, feeds),
        dict.fromkeys((b.name for b in (*opened.inputs[bindings.VISION], *opened.outputs[bindings.VISION])), 256),
    )
    assert bound.nbytes > opened._memory[0].nbytes
    sizes.clear()
    opened._working_memory(bound.nbytes, kept=False)
    assert sizes == [bound.nbytes]
    large = opened._large
    answer(model, PICTURE, 1)
    assert large is not None
    assert opened._large is not large


@pytest.mark.parametrize("kv", ["f32", "k8v8", "k4v4,layer.0-1=f16,layer.3=k8v8"])
@pytest.mark.parametrize("context", [60, 1000, 4000])
def test_memory_is_as_inspect_tells(kv, context, nano_engine, padding, monkeypatch):
    """To the byte: in steps of text, and at most for a picture that needs more than they do."""
    monkeypatch.setattr(backend, "_PICTURE", 256)
    folder = nano_engine(kv, "cuda")
    (told,) = device_memory(folder, Manifest.read(folder, "engine"), [context])
    live, peak = weakref.WeakSet(), 0
    device_type = type(backend.open_device())
    allocate = device_type.allocate

    def counted(self, nbytes):
        nonlocal peak
        live.add(buffer := allocate(self, nbytes))
        peak = max(peak, sum(buffer.nbytes for buffer in live))
        return buffer

    monkeypatch.setattr(device_type, "allocate", counted)
    model = VisionLanguageModel.open(folder, context_length=context)
    assert model._session.nbytes == told.cache
    assert model.manifest.weight_bytes("decoder", "vision") == told.weights
    assert sum(buffer.nbytes for buffer in live) == peak == told.weights + told.cache + told.steps
    answer(model, CONVERSATIONS["text"], 2)
    assert peak == told.weights + told.cache + told.steps
    model.steps.encode(model.engine, model.prompt([user(scene(1, 256, 256), "What is it?")]).visuals[0].patches)
    assert peak == told.total > told.weights + told.cache + told.steps


def test_inspect_tells_of_a_gpu(bundle, monkeypatch, capsys):
    assert main(["inspect", str(bundle)]) == 0
    found = capsys.readouterr().out
    assert "a GPU's memory in GB" in found
    assert "GB of what else is allocated, by the card's GB" in " ".join(found.split())
    monkeypatch.setattr(backend, "open_device", lambda: (_ for _ in ()).throw(UserError("there is no GPU.")))
    assert main(["inspect", str(bundle)]) == 0
    assert "what else is allocated is told where it can run: there is no GPU." in capsys.readouterr().out


# Plans ----------------------------------------------------------------------------------------------------------------


def test_no_two_tensors_that_live_together_overlap():
    rng = np.random.default_rng(0)
    for _ in range(200):
        count = int(rng.integers(1, 30))
        units = (256 * rng.integers(1, 40, count)).tolist()
        lifetimes = [tuple(sorted(pair)) for pair in rng.integers(0, 40, (count, 2)).tolist()]
        offsets, size = laid_out(units, lifetimes)
        for a in range(count):
            assert 0 <= offsets[a] <= size - units[a]
            for b in range(a):
                if lifetimes[a][0] <= lifetimes[b][1] and lifetimes[b][0] <= lifetimes[a][1]:
                    assert offsets[a] + units[a] <= offsets[b] or offsets[b] + units[b] <= offsets[a]
        at_once = [sum(u for u, (f, t) in zip(units, lifetimes, strict=True) if f <= node <= t) for node in range(40)]
        assert max(at_once) <= size <= 2 * max(at_once)
    assert laid_out([], []) == ([], 0)


def test_plans_of_both_graphs(bundle):
    """Five launches a layer, and hardly more memory than the most that lives at once."""
    manifest = Manifest.read(bundle, "engine")
    graphs = json.loads((bundle / "plan.json").read_text())["graphs"]
    plans = {name: Plan.from_json(plan) for name, plan in graphs.items()}
    text, vision, levels = manifest.model.text, manifest.model.vision, manifest.model.num_deepstack
    assert len(plans[bindings.DECODER].nodes) == 5 * text.num_hidden_layers + levels + 2
    assert len(plans[bindings.VISION].nodes) == 1 + 5 * vision.depth + 2 * (levels + 1)
    for plan in plans.values():
        alive = [0] * len(plan.nodes)
        for name, matrix in plan.matrices.items():
            if matrix.offset is not None:
                touched = [i for i, node in enumerate(plan.nodes) if name in node.tensors.values()]
                for i in range(touched[0], touched[-1] + 1):
                    alive[i] += matrix.unit
        assert max(alive) <= plan.unit <= 1.1 * max(alive)


@pytest.mark.parametrize(
    ("node", "told"),
    [
        (onnx.helper.make_node("Softmax", ["inputs_embeds"], ["logits"]), r"no kernel for a node Softmax \(logits\)"),
        (onnx.helper.make_node("Add", ["inputs_embeds", "rope_cos"], ["logits"]), "no addition to inputs_embeds"),
    ],
)
def test_graphs_that_have_no_plan(node, told, bundle):
    manifest = Manifest.read(bundle, "engine")
    inputs = bindings.decoder_inputs(manifest.model, manifest.kv_cache)
    outputs = bindings.decoder_outputs(manifest.model, manifest.kv_cache)
    with pytest.raises(ValueError, match=told):
        lower(onnx.helper.make_model(onnx.helper.make_graph([node], "graph", [], [])), inputs, outputs)


# What is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(ON_GPU, reason="there is a GPU")
def test_without_a_gpu(bundle, monkeypatch, capsys):
    monkeypatch.undo()
    script = "import sys; from pascalvl.runtime.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", script, "run", str(bundle), "--prompt", "Hello!"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "backend cuda cannot run here: no NVIDIA " in result.stderr
    assert "Traceback" not in result.stderr


def test_a_gpu_older_than_pascal(monkeypatch):
    monkeypatch.setattr(backend, "find_gpu", lambda: Gpu("Tesla M40", (5, 2), 1 << 34, 1 << 34, (12, 8)))
    assert backend.unavailable() == ("the kernels are for compute capability 6.1 and above; Tesla M40 has sm_52")


def test_bundles_of_another_version(bundle, tmp_path, monkeypatch):
    monkeypatch.setitem(backend._VERSIONS, "QuantLinear", "9.9")
    with pytest.raises(UserError, match=r"was built by another version of PascalVL \(QuantLinear 2\.2; this one has"):
        open_engine(bundle)


def test_a_plan_of_another_cache(bundle, nano_engine, tmp_path):
    other = shutil.copytree(bundle, tmp_path / "mixed")
    shutil.copyfile(nano_engine("k8v8", "cuda") / "plan.json", other / "plan.json")
    Manifest.read(other, "engine").write(other)
    with pytest.raises(UserError, match=r"plan\.json is for another model, or another KV cache: write the"):
        open_engine(other)


@pytest.mark.parametrize("text", ["{", "[]", '{"graphs": {}}', '{"graphs": {"vision": {"nodes": 3}}}'])
def test_damaged_plans(bundle, tmp_path, text):
    other = shutil.copytree(bundle, tmp_path / "damaged")
    (other / "plan.json").write_text(text)
    Manifest.read(other, "engine").write(other)
    with pytest.raises(UserError, match=r"plan\.json.* write the bundle again with 'pascalvl build'"):
        open_engine(other)


def test_memory_that_runs_out(bundle, monkeypatch):
    opened = open_engine(bundle)
    with pytest.raises(UserError, match=r"a context of \d+ tokens needs [\d.]+ GB for its KV cache"):
        opened.open_session(1 << 40)

    def full(*_):
        raise MemoryError

    monkeypatch.setattr(type(opened.device), "allocate", full)
    with pytest.raises(UserError, match=r"the weights of .* take 0\.0 GB, more than is free of the GPU's memory"):
        open_engine(bundle)


def test_command_line(bundle, capsys):
    options = ["--backend", "cuda", "--prompt", "Hello!", "--max-new-tokens", "2", "--context", str(CONTEXT)]
    assert main(["run", str(bundle), *options]) == 0
    assert "2 new in" in capsys.readouterr().err
    assert main(["inspect", str(bundle)]) == 0
    assert "cuda" in capsys.readouterr().out


def test_weights_arrive_whole_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "PIECE_BYTES", 1000)
    contents = {name: np.random.default_rng(n).integers(0, 256, n, np.uint8) for name, n in (("a", 12345), ("b", 999))}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content.tobytes())
    device, told, checked = backend.open_device(), [], []
    buffers = engine.upload_files(
        device,
        {name: tmp_path / name for name in contents},
        lambda path, number, piece: checked.append(
            bytes(piece) == contents[path.name][1000 * number :][:1000].tobytes()
        ),
        told.append,
    )
    for name, content in contents.items():
        found = np.empty_like(content)
        device.download(found, buffers[name].pointer)
        device.synchronize()
        np.testing.assert_array_equal(found, content)
    assert sum(told) == 12345 + 999
    assert checked == [True] * 14


def test_altered_weights_are_found_on_their_way(bundle, tmp_path):
    copy = shutil.copytree(bundle, tmp_path / "altered")
    with (copy / "decoder.onnx.data").open("r+b") as file:
        file.seek((16 << 20) + 5)
        old = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([old[0] ^ 1]))
    with pytest.raises(UserError, match=r"decoder.onnx.data was altered: .* from byte 16777216 on; write the bundle"):
        open_engine(copy)


def test_progress_is_told_of_all_files(bundle):
    told = []
    VisionLanguageModel.open(bundle, context_length=CONTEXT, progress=told.append)
    assert sum(told) == sum(file["bytes"] for file in Manifest.read(bundle, "engine").files.values())

"""The TensorRT runtime on the reference host: every attention node in the plugin's library, through its interface.

On a GPU where there is one, else on the emulator; there, carry what `test_torch_backend_cuda.py` says, and the
libraries of the plugin and of its host.
"""

from __future__ import annotations

import dataclasses
import logging

import numpy as np
import onnx
import pytest
from PIL import Image

from pascalvl.engines import build, open_engine
from pascalvl.engines.device.memory import EmulatedDevice, Graph, available_target, open_device
from pascalvl.engines.engine import NewTokens, Placement
from pascalvl.engines.reference import backend as plugin_host
from pascalvl.engines.tensorrt.engine import TensorRTEngine
from pascalvl.engines.tensorrt.profiles import Limits
from pascalvl.export import export_checkpoint
from pascalvl.plugins import bindings
from pascalvl.plugins.bundle import Manifest
from pascalvl.plugins.errors import UserError
from pascalvl.plugins.kernels.build import Target
from pascalvl.plugins.kernels.library import KernelLibrary
from pascalvl.plugins.kv_format import PAGE_SLOTS, CacheConfig
from pascalvl.plugins.ops.flash_attention.op import OP_DOMAIN, OP_NAME, OP_VERSION
from pascalvl.plugins.tensorrt.host import HostedPlugin
from pascalvl.runtime import VisionLanguageModel
from pascalvl.runtime.cli import main
from tests.engines.decoder import CACHES, Conversation, decoder_feeds, random_pool, random_tokens
from tests.engines.torch_reference import answer, assistant, kept_tokens, reference_answer, scene, user
from tests.plugins.tensorrt import paged

ON_GPU = available_target() is Target.CUDA
PICTURE = [user(scene(1, 64, 64), "Describe the picture.")]
TURNS = [*PICTURE, assistant("A grid."), user("Which shapes are red?")]
NEW_TOKENS = 32 if ON_GPU else 5
CONTEXT = 96
LIMITS = Limits(prefill_chunk=7, max_patches=64, max_context=1 << 40)


@pytest.fixture(scope="module")
def bundle(nano_engine):
    return nano_engine("f32", "reference")


def fresh(bundle, **options) -> VisionLanguageModel:
    return VisionLanguageModel.open(bundle, context_length=CONTEXT, **options)


@pytest.fixture
def limited(bundle, monkeypatch) -> TensorRTEngine:
    monkeypatch.setattr(plugin_host, "_LIMITS", LIMITS)
    return plugin_host.open_engine(bundle, Manifest.read(bundle, "engine"), marked_layers=True)


@pytest.fixture
def calls(monkeypatch):
    """Counts what the plugin and the kernels' library are called for."""
    counts = {}
    for owner, name in ((HostedPlugin, "enqueue"), (KernelLibrary, "kv_append"), (KernelLibrary, "choose")):
        counts[name], call = 0, getattr(owner, name)

        def counting(self, *arguments, name=name, call=call):
            counts[name] += 1
            call(self, *arguments)

        monkeypatch.setattr(owner, name, counting)
    return counts


@pytest.mark.parametrize("kv", CACHES)
def test_tokens_equal_the_reference_and_both_ops_are_the_plugins(kv, nano_engine, nano_reference, calls):
    """The reference is Hugging Face, or, of a cache that may change the answer, ONNX Runtime with that cache."""
    engine = nano_engine(kv, "reference")
    model = fresh(engine)
    if CacheConfig.parse(kv).kv_format.is_quantised:
        on_onnxruntime = VisionLanguageModel.open(nano_engine(kv), context_length=CONTEXT)
        expected = answer(on_onnxruntime, PICTURE, NEW_TOKENS).token_ids
    else:
        expected = reference_answer(nano_reference, model.prompt(PICTURE), NEW_TOKENS)[0]
    warm_up = dict(calls)
    generation = answer(model, PICTURE, NEW_TOKENS)
    assert generation.token_ids == expected
    steps = len(generation.token_ids)
    vision, decoder = (
        Manifest.read(engine, "engine").graphs[graph]["ops"] for graph in (bindings.VISION, bindings.DECODER)
    )
    assert vision["FlashAttention2"] == model.config.vision.depth
    assert decoder["FlashAttention2"] == model.config.text.num_hidden_layers
    assert {name: count - warm_up[name] for name, count in calls.items()} == {
        "enqueue": sum(vision[op] + steps * decoder[op] for op in ("FlashAttention2", "QuantLinear")),
        "kv_append": steps,  # one of the tokens comes with the prompt
        "choose": steps,
    }


def test_ranks(nano_checkpoint, tmp_path):
    """Values of 112, whose rows in half a byte each are padded."""
    cache = CacheConfig.parse("k8v4,rv=112")
    export_checkpoint(nano_checkpoint, tmp_path / "model", cache=cache)
    for backend in ("onnxruntime", "reference", "torch"):
        build(tmp_path / "model", tmp_path / backend, backend, cache)
    model = VisionLanguageModel.open(tmp_path / "onnxruntime", context_length=CONTEXT)
    expected = answer(model, PICTURE, NEW_TOKENS).token_ids
    assert answer(fresh(tmp_path / "reference"), PICTURE, NEW_TOKENS).token_ids == expected
    emulated = VisionLanguageModel.open(tmp_path / "torch", context_length=CONTEXT)
    assert answer(emulated, PICTURE, NEW_TOKENS).token_ids == expected


def test_a_conversation_in_chunks(limited, nano_reference):
    """Chunks longer than the engine takes, a prefix that is not run again, and the cache after a truncation."""
    model = VisionLanguageModel(limited, CONTEXT, prefill_chunk=16)
    first = answer(model, PICTURE, NEW_TOKENS).token_ids
    second = answer(model, TURNS, NEW_TOKENS)
    assert second.reused_tokens >= len(model.prompt(PICTURE).token_ids) - 1
    assert first == reference_answer(nano_reference, model.prompt(PICTURE), NEW_TOKENS)[0]
    assert second.token_ids == reference_answer(nano_reference, model.prompt(TURNS), NEW_TOKENS)[0]


def test_outputs_equal_onnx_runtimes(nano_engine_bundle, limited):
    """Also of the marked layers. Both sum in float32, in other orders."""
    feeds = decoder_feeds(limited.manifest, seq=3, capacity=10, past=4)
    expected = open_engine(nano_engine_bundle, marked_layers=True).run(bindings.DECODER, feeds)
    found = limited.run(bindings.DECODER, feeds)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=0, atol=2e-5 * np.abs(value).max(), err_msg=name)


def test_a_decode_step_is_the_same_greedy_or_not(limited):
    session, other = (Conversation(limited.open_session(8)) for _ in range(2))
    for seed in range(3):
        (logits,) = session.step(1, seed)[bindings.LOGITS]
        assert other.choose(1, seed) == (logits.argmax(), logits.max())
    assert session.session.nbytes == limited.manifest.kv_cache.nbytes(limited.manifest.model.text, 8)


def decode_tokens(session, number: int) -> NewTokens:
    """A token of the sequence that has one page, of this number, with as many tokens behind it."""
    placement = Placement(np.array([number], np.int32), number, np.array([number], np.int32))
    return random_tokens(session.model.text, placement, np.random.default_rng(number))


def test_decode_steps_of_all_sizes_compute_in_one_block(limited, monkeypatch):
    """In one block of memory, with one set of outputs, and give what they give where no other came between."""
    contexts = []
    execute = plugin_host.ReferenceContext.execute_async_v3
    monkeypatch.setattr(
        plugin_host.ReferenceContext, "execute_async_v3", lambda self, s: contexts.append(self) or execute(self, s)
    )
    session = limited.open_session(PAGE_SLOTS, 4)
    session.write(np.arange(4), random_pool(session.model, session.cache, 4, np.random.default_rng(0)))
    tokens = [decode_tokens(session, number) for number in range(4)]
    expected = np.concatenate([session.step([new])[bindings.LOGITS] for new in tokens])
    contexts.clear()
    for numbers in [(3, 1, 2), (0,), (1, 0)]:
        found = session.step([tokens[number] for number in numbers])[bindings.LOGITS]
        np.testing.assert_array_equal(found, expected[list(numbers)])
    assert {context._shapes[bindings.PAST_LENGTH] for context in contexts} == {(1,), (2,), (4,)}
    assert {context.device_memory for context in contexts} == {limited.device_memory.pointer}
    assert len({context._addresses[bindings.LOGITS] for context in contexts}) == 1
    assert len({id(context) for context in contexts}) == 3


def test_pages_move_in_runs(limited, monkeypatch):
    """Those that follow each other in the pool in one transfer, whatever their order."""
    transfers = {"upload": [], "download": []}
    for name, sizes in transfers.items():
        move = getattr(type(limited.device), name)

        def recorded(self, *arguments, sizes=sizes, move=move):
            sizes.append(next(argument.nbytes for argument in arguments if isinstance(argument, np.ndarray)))
            move(self, *arguments)

        monkeypatch.setattr(type(limited.device), name, recorded)
    session = limited.open_session(PAGE_SLOTS, 8)
    rows = random_pool(session.model, session.cache, 6, np.random.default_rng(0))
    pages = np.array([4, 5, 6, 1, 0, 3])
    page_bytes = [array[0].nbytes for array in rows.values()]
    expected = [runs * nbytes for nbytes in page_bytes for runs in (3, 1, 1, 1)]
    for sizes in transfers.values():
        sizes.clear()
    session.write(pages, rows)
    assert (transfers["upload"], transfers["download"]) == (expected, [])
    transfers["upload"].clear()
    found = session.read(pages)
    assert (transfers["upload"], transfers["download"]) == ([], expected)
    whole = session.read(np.arange(8))
    for name, array in rows.items():
        np.testing.assert_array_equal(found[name], array)
        np.testing.assert_array_equal(whole[name][pages], array)
    assert all(not len(array) for array in session.read(pages[:0]).values())


def test_several_sequences_have_more_tokens_than_one_holds(bundle):
    """There is room for as many as the engine takes, whatever the context."""
    session = open_engine(bundle).open_session(PAGE_SLOTS, 2)
    tokens = []
    for page, seq in ((1, 100), (0, 40)):
        placement = Placement(np.array([page], np.int32), 0, np.arange(seq, dtype=np.int32))
        tokens.append(random_tokens(session.model.text, placement, np.random.default_rng(page)))
    expected = np.concatenate([session.step([new])[bindings.LOGITS] for new in tokens])
    found = session.step(tokens)[bindings.LOGITS]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize(("appends", "length"), [(0, 0), (2, 14), (3, 18), (4, 19)])
def test_an_interrupt_leaves_the_cache_as_it_was(limited, nano_reference, monkeypatch, appends, length):
    """The engine takes 7 tokens at a time, of a prompt that has 18."""
    model = VisionLanguageModel(limited, CONTEXT, prefill_chunk=16)
    expected = reference_answer(nano_reference, model.prompt(PICTURE), 3)[0]
    append, left = KernelLibrary.kv_append, appends

    def interrupted(*arguments):
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        append(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(KernelLibrary, "kv_append", interrupted)
        with pytest.raises(KeyboardInterrupt):
            answer(model, PICTURE, 3)
    assert kept_tokens(model) == length
    assert answer(model, PICTURE, 3).token_ids == expected


def test_without_a_graph_steps_run_one_by_one(limited, caplog):
    """NumPy cannot be recorded: on a GPU the capture is refused, and the host says so."""
    session = limited.open_session(8)
    assert session.decode_launches() is None
    warnings = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == ON_GPU
    if ON_GPU:
        assert "a step is no CUDA graph, and slower" in warnings[0]


@pytest.mark.skipif(ON_GPU, reason="stands in for a GPU's capture")
def test_a_step_that_was_recorded_is_replayed(limited, monkeypatch):
    """What CUDA records and plays again is what the session starts in a step, and nothing else."""
    replays = 0

    def capture(self, step):
        def replay():
            nonlocal replays
            replays += 1
            step()

        return Graph(replay, 5)

    monkeypatch.setattr(EmulatedDevice, "capture", capture)
    sequence = Conversation(limited.open_session(8))
    assert sequence.session.decode_launches() == 5
    sequence.step(1, 0)
    sequence.choose(1, 1)
    assert (replays, sequence.cache.length) == (2, 2)
    sequence.step(2, 2)
    assert (replays, sequence.cache.length) == (2, 4)


@pytest.mark.parametrize("name", ["f32 decode step", "k8v4 sequences of any length", "k8v4 mask"])
def test_a_node_over_a_pool_of_pages(name):
    """Sequences of unequal length, of several pages each, in one call of a graph, whose pool stays on the device."""
    case = paged.cases()[name]
    given = paged.draw(np.random.default_rng(0), case)
    inputs = {
        **{field.name: getattr(given, field.name) for field in dataclasses.fields(given)[:-1]},
        **{f"past_{kind}.0": array for kind, array in zip(("key", "value", "scale"), given.pool, strict=False)},
    }
    outputs = ["output", *(f"new_{kind}.0" for kind in ("key", "value", "scale")[: len(given.pool)])]
    node = onnx.helper.make_node(OP_NAME, [*inputs], outputs, domain=OP_DOMAIN, **case.attributes)
    types = [onnx.TensorProto.FLOAT, *(onnx.helper.np_dtype_to_tensor_dtype(array.dtype) for array in given.pool)]
    proto = onnx.helper.make_model(
        onnx.helper.make_graph(
            [node],
            "attention",
            [
                onnx.helper.make_tensor_value_info(
                    name, onnx.helper.np_dtype_to_tensor_dtype(array.dtype), [None] * array.ndim
                )
                for name, array in inputs.items()
            ],
            [onnx.helper.make_tensor_value_info(name, t, None) for name, t in zip(outputs, types, strict=True)],
        ),
        opset_imports=[onnx.helper.make_opsetid("", 17), onnx.helper.make_opsetid(OP_DOMAIN, int(OP_VERSION))],
    )
    host = plugin_host.plugin_host(available_target())
    device = open_device(available_target(), host.plugin)
    ranges = {name: (array.shape,) * 3 for name, array in inputs.items()}
    plan = plugin_host.ReferencePlan(proto, [ranges], plugin_host._Plugins(host, device), device)
    context = plan.create_execution_context_without_device_memory()
    memory = device.allocate(plan.device_memory_size)
    context.device_memory = memory.pointer
    layout, tokens = case.layout, case.tokens
    found = [np.empty((tokens, case.num_heads * layout.value_dim), np.float32)]
    found += [np.empty((layout.num_kv_heads, tokens, *array.shape[3:]), array.dtype) for array in given.pool]
    buffers = {
        name: device.allocate(array.nbytes) for name, array in [*inputs.items(), *zip(outputs, found, strict=True)]
    }
    for name, array in inputs.items():
        device.upload(buffers[name].pointer, np.ascontiguousarray(array))
        assert context.set_input_shape(name, array.shape)
    assert all(context.set_tensor_address(name, buffer.pointer) for name, buffer in buffers.items())
    assert context.execute_async_v3(device.stream)
    for name, array in zip(outputs, found, strict=True):
        device.download(array, buffers[name].pointer)
    device.synchronize()
    result, _, _ = paged.errors(case, given, *found)
    assert result < (1e-3 if layout.kv_format.is_quantised else 3e-6)


# What is refused ------------------------------------------------------------------------------------------------------


def test_a_picture_larger_than_the_engine_takes(limited):
    picture = [user(Image.new("RGB", (256, 256)), "What is it?")]
    resized = VisionLanguageModel(limited, CONTEXT, prefill_chunk=16).prompt(picture)
    assert len(resized.visuals[0].patches.pixel_values) == 64
    model = VisionLanguageModel(limited, CONTEXT, prefill_chunk=16, max_pixels=256 * 256)
    with pytest.raises(UserError, match="a picture has 256 patches; this engine was built for up to 64: give"):
        answer(model, picture, 1)


def test_sizes_that_the_engine_was_not_built_for(limited):
    feeds = decoder_feeds(limited.manifest, seq=8, capacity=10, past=4)
    with pytest.raises(UserError, match=r"the decoder engine does not take inputs_embeds of shape \[8, \d+\]"):
        limited.run(bindings.DECODER, feeds)


def test_a_context_longer_than_the_engine_takes(bundle):
    engine = open_engine(bundle)
    with pytest.raises(UserError, match="a context of 262145 tokens is more than this engine was built for, 262144"):
        engine.open_session(262145)


def test_memory_that_runs_out(limited):
    with pytest.raises(UserError, match=r"a context of \d+ tokens needs [\d.]+ GB for its KV cache"):
        limited.open_session(1 << 39)


def test_command_line(bundle, capsys):
    options = ["--prompt", "Hello!", "--max-new-tokens", "2", "--context", str(CONTEXT)]
    assert main(["run", str(bundle), *options]) == 0
    assert "2 new in" in capsys.readouterr().err


@pytest.mark.skipif(ON_GPU, reason="polygraphy is not where GPUs are")
def test_validation(bundle, nano_checkpoint, capsys):
    options = ["--reference", str(nano_checkpoint), "--context", str(CONTEXT), "--bisect"]
    assert main(["validate", str(bundle), *options, "--prompt", "Hello!"]) == 0
    out = capsys.readouterr().out
    assert "prefill.hidden_states" in out
    assert "0 out of tolerance" in out

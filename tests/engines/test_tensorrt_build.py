"""TensorRT's build, with TensorRT-RTX standing in: a real parser, compiler and configuration, on the CPU.

TensorRT-RTX has no plugin layers, so the attention nodes are replaced by their function bodies where it has to compile.
The plugin is loaded as in a build by TensorRT-lean, a real registry. The GPU is made up.
"""

import dataclasses
import importlib
import json
import logging
import subprocess
import sys
import types

import onnx
import onnx.inliner
import pytest
import tensorrt_rtx

from pascalvl.engines import BuildOptions, backends, build, open_engine
from pascalvl.engines.device.gpu import Gpu
from pascalvl.engines.tensorrt.profiles import profiles
from pascalvl.plugins import bindings, bundle
from pascalvl.plugins.bundle import Manifest
from pascalvl.plugins.errors import UserError
from pascalvl.plugins.kernels.build import Target
from pascalvl.plugins.kv_format import PAGE_SLOTS, CacheConfig, KVFormat
from pascalvl.plugins.tensorrt import build as plugin_build

NAME = "pascalvl.engines.tensorrt.backend"
PASCAL = Gpu("NVIDIA GeForce GTX 1080", (6, 1), 8_500_000_000, 8_000_000_000, (13, 0))
TURING = dataclasses.replace(PASCAL, name="Tesla T4", capability=(7, 5))
FEATURE, SOURCE = "RUNTIME_ACTIVATION_RESIZE_10_10", "JIT_CONVOLUTIONS"
FEATURES_OF_8_6 = {
    "FASTER_DYNAMIC_SHAPES_0805": 0,
    "DISABLE_EXTERNAL_TACTIC_SOURCES_FOR_CORE_0805": 1,
    "PROFILE_SHARING_0806": 2,
}
SMALL = BuildOptions(prefill_chunk=64, max_pixels=256 * 256, tactic_sources=(SOURCE,), preview_features=(FEATURE,))


@pytest.fixture(scope="module")
def stand_in():
    """TensorRT-RTX as the module `tensorrt`; polygraphy takes it for that too."""
    names = {name: getattr(tensorrt_rtx, name) for name in dir(tensorrt_rtx) if not name.startswith("__")}
    module = types.ModuleType("tensorrt")
    module.__dict__.update(names, __version__="10.16.1.11")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "tensorrt", module)
        patch.delitem(sys.modules, NAME, raising=False)
        importlib.import_module(NAME)
        yield module
        sys.modules.pop(NAME)


@pytest.fixture
def tensorrt(stand_in, monkeypatch, tmp_path):
    """The backend's module on a T4 with TensorRT 10, its plugin taken as loaded."""
    module = sys.modules[NAME]
    library = tmp_path / "kernels-0123456789abcdef" / "libpascalvl_plugin10.so"
    monkeypatch.setattr(module, "find_gpu", lambda: TURING)
    monkeypatch.setattr(module, "_load_plugin", lambda: library)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return module


def set_gpu(monkeypatch, module, gpu=TURING, version="10.16.1.11", **changes):
    monkeypatch.setattr(module, "find_gpu", lambda: dataclasses.replace(gpu, **changes))
    monkeypatch.setattr(module.trt, "__version__", version)


def expand(proto):
    proto.CopyFrom(onnx.inliner.inline_local_functions(proto))


@pytest.fixture(scope="module")
def built(stand_in, nano_model_bundle, tmp_path_factory):
    """A bundle that TensorRT-RTX built, with the configurations that it was given, and its progress."""
    folder = tmp_path_factory.mktemp("built")
    module, phases, configs, networks = sys.modules[NAME], [], [], []

    class Builder(stand_in.Builder):
        def build_serialized_network(self, network, config):
            configs.append(config)
            networks.append(network)
            return super().build_serialized_network(network, config)

    def monitor(bars, logger, original=module._monitor):
        shown = original(bars, logger)

        class Recorder(type(shown)):
            def phase_start(self, phase_name, parent_phase, num_steps):
                super().phase_start(phase_name, parent_phase, num_steps)
                phases.append((phase_name, num_steps, [task.total for task in bars.tasks]))

        return Recorder()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "find_gpu", lambda: TURING)
        patch.setattr(module, "_load_plugin", lambda: folder / "kernels-0123456789abcdef" / "plugin.so")
        patch.setattr(module, "_monitor", monitor)
        patch.setattr(stand_in, "Builder", Builder)
        patch.setattr("pascalvl.engines.graphs.leave_ops_to_plugins", expand)
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        manifest = build(nano_model_bundle, folder / "engine", "tensorrt", CacheConfig(KVFormat.F32), SMALL)
    return types.SimpleNamespace(
        folder=folder,
        directory=folder / "engine",
        manifest=manifest,
        phases=phases,
        configs=configs,
        networks=networks,
    )


# Building -------------------------------------------------------------------------------------------------------------


def test_bundle(built):
    manifest = Manifest.read(built.directory, "engine")
    assert manifest.kv_cache == CacheConfig(KVFormat.F32)
    assert set(manifest.files) == {*bundle.HOST_FILES, "vision.plan", "decoder.plan"}
    assert all(manifest.files[name]["bytes"] > 1_000_000 for name in ("vision.plan", "decoder.plan"))
    cuda = manifest.backend.pop("cuda")
    assert cuda.count(".") == 1
    assert manifest.backend == {
        "name": "tensorrt",
        "version": "10.16.1.11",
        "capability": "7.5",
        "gpu": "Tesla T4",
        "contract": plugin_build.contract(),
        "plugin": "0123456789abcdef",
        "prefill_chunk": "64",
        "max_patches": str(256 * 256 // built.manifest.model.vision.patch_size**2),
        "max_context": str(built.manifest.model.text.max_position_embeddings),
    }


def test_networks_read_the_caches_format(built):
    vision, decoder = built.networks
    model = built.manifest.model
    for network, inputs in (
        (vision, bindings.vision_inputs(model)),
        (decoder, bindings.decoder_inputs(model, CacheConfig(KVFormat.F32))),
    ):
        kinds = {"float32": "FLOAT", "int32": "INT32"}
        found = [network.get_input(i) for i in range(network.num_inputs)]
        assert [(value.name, value.dtype.name) for value in found] == [(b.name, kinds[b.dtype.name]) for b in inputs]


def test_configuration(built):
    assert [config.num_optimization_profiles for config in built.configs] == [1, 2]
    for config in built.configs:
        assert not config.get_flag(tensorrt_rtx.BuilderFlag.TF32)
        assert config.get_tactic_sources() == 1 << int(getattr(tensorrt_rtx.TacticSource, SOURCE))
        assert config.max_aux_streams == 0
        features = tensorrt_rtx.PreviewFeature.__members__
        assert [name for name in features if config.get_preview_feature(features[name])] == [FEATURE]


def test_phases_are_shown(built):
    assert len(built.phases) >= 2
    assert all(num_steps in totals for _, num_steps, totals in built.phases)


def test_without_progress_monitors(tensorrt, monkeypatch):
    monkeypatch.delattr(tensorrt.trt, "IProgressMonitor")  # as in TensorRT 8.6
    with tensorrt._progress("building", tensorrt._logger()) as monitor:
        assert monitor is None


def test_timing_cache_is_kept(built):
    path = built.folder / "cache/pascalvl/tensorrt-10.16.1.11-sm_75-Tesla-T4.timing"
    assert path.stat().st_size > 0


def test_profiles(tensorrt, nano_model_bundle):
    model = Manifest.read(nano_model_bundle, "model").model
    limits = tensorrt._limits(model, BuildOptions(max_pixels=1_000_000, max_context=5000))
    (vision,) = profiles(bindings.VISION, model, CacheConfig(KVFormat.F32), limits)
    prefill, decode = profiles(bindings.DECODER, model, CacheConfig(KVFormat.F32), limits)
    side, merged = model.vision.patch_size, model.vision.spatial_merge_size**2
    smallest, usual, largest = (shape[0] for shape in vision[bindings.PIXEL_VALUES])
    assert smallest == merged
    assert largest % merged == usual % merged == 0
    assert 1_000_000 - merged * side**2 < largest * side**2 <= 1_000_000
    assert vision[bindings.CU_SEQLENS] == ((2,), (2,), (2,))

    hidden = model.text.hidden_size
    assert prefill[bindings.INPUTS_EMBEDS] == ((1, hidden), (512, hidden), (512, hidden))
    assert decode[bindings.INPUTS_EMBEDS] == ((1, hidden), (1, hidden), (8, hidden))
    for profile in (prefill, decode):  # of eight sequences of forty pages each
        assert profile[bindings.CU_SEQLENS] == ((2,), (2,), (9,))
        assert profile[bindings.PAST_LENGTH] == profile[bindings.LOGIT_ROWS] == ((1,), (1,), (8,))
        assert profile[bindings.PAGE_TABLE] == ((1, 1), (1, 32), (8, 40))
        assert [shape[0] for shape in profile[bindings.past_value(0)]] == [1, 32, 320]
        assert {shape[2] for shape in profile[bindings.past_value(0)]} == {PAGE_SLOTS}
    assert prefill[bindings.PAST_VISIBLE] == ((1, 1), (1, 1), (8, 40 * PAGE_SLOTS))
    assert decode[bindings.PAST_VISIBLE] == ((1, 1), (1, 1), (8, 1))
    assert prefill[bindings.DEEPSTACK_EMBEDS][2] == (model.num_deepstack, 512, hidden)
    names = [binding.name for binding in bindings.decoder_inputs(model, CacheConfig(KVFormat.F32))]
    assert list(prefill) == list(decode) == names


def test_profiles_of_scales(tensorrt, nano_model_bundle):
    """As many pages as keys have, whether the context fills the last or not."""
    model, cache = Manifest.read(nano_model_bundle, "model").model, CacheConfig(KVFormat.K8V4)
    limits = tensorrt._limits(model, BuildOptions(max_context=4999))
    assert limits.max_context == 4999
    for profile in profiles(bindings.DECODER, model, cache, limits):
        for name in (bindings.past_key(0), bindings.past_scale(0)):
            assert [shape[0] for shape in profile[name]] == [1, 32, 8 * 40]
            assert {shape[2] for shape in profile[name]} == {PAGE_SLOTS}


def test_weights_are_linked_not_copied(tensorrt, nano_model_bundle, tmp_path):
    manifest, cache = Manifest.read(nano_model_bundle, "model"), CacheConfig(KVFormat.K8V4)
    path = tensorrt._prepare(nano_model_bundle, tmp_path, bindings.DECODER, manifest, cache)
    data = tmp_path / "decoder.onnx.data"
    assert data.is_symlink()
    assert data.samefile(nano_model_bundle / "decoder.onnx.data")
    proto = onnx.load(path, load_external_data=False)
    assert not proto.functions
    assert sum(node.op_type == "FlashAttention2" for node in proto.graph.node) == manifest.model.text.num_hidden_layers
    found = [(v.name, onnx.helper.tensor_dtype_to_np_dtype(v.type.tensor_type.elem_type)) for v in proto.graph.input]
    assert found == [(binding.name, binding.dtype) for binding in bindings.decoder_inputs(manifest.model, cache)]


@pytest.mark.parametrize(("bundle", "kv"), [("nano_model_bundle", "f32"), ("nano_quantised_bundle", "k8v4")])
@pytest.mark.parametrize("graph", [bindings.VISION, bindings.DECODER])
def test_the_parser_looks_for_the_plugins(tensorrt, graph, bundle, kv, request, tmp_path):
    """And takes words among the initializers."""
    bundle = request.getfixturevalue(bundle)
    manifest = Manifest.read(bundle, "model")
    path = tensorrt._prepare(bundle, tmp_path, graph, manifest, CacheConfig.parse(kv))
    logger = tensorrt._logger()
    sentence = r"^TensorRT 10\.16\.1\.11 cannot parse \w+\.onnx: [^\n]*QuantLinear[^\n]*Plugin not found[^\n]*[^.]\.$"
    with pytest.raises(UserError, match=sentence):  # of the first node
        tensorrt._parse(path, logger)
    nodes = [error for error in logger.errors if "While parsing node" in error]
    ops = manifest.graphs[graph]["ops"]
    for op in ("QuantLinear", "FlashAttention2"):
        assert sum(f"[{op} ->" in node for node in nodes) == ops[op] > 0
    assert len(nodes) == ops["QuantLinear"] + ops["FlashAttention2"]


@pytest.mark.parametrize(("version", "flags"), [("8.6.1", 1 << 5), ("9.3.0", 1 << 5), ("10.0.1", 0), ("11.1.0", 0)])
def test_networks_have_an_explicit_batch(tensorrt, tmp_path, monkeypatch, version, flags):
    asked = []
    builder = types.SimpleNamespace(create_network=asked.append)
    parser = types.SimpleNamespace(parse_from_file=lambda path: True)
    monkeypatch.setattr(tensorrt.trt, "Builder", lambda logger: builder)
    monkeypatch.setattr(tensorrt.trt, "OnnxParser", lambda network, logger: parser)
    monkeypatch.setattr(tensorrt.trt, "NetworkDefinitionCreationFlag", types.SimpleNamespace(EXPLICIT_BATCH=5))
    monkeypatch.setattr(tensorrt.trt, "__version__", version)
    assert tensorrt._parse(tmp_path, tensorrt._logger())[2] is parser
    assert asked == [flags]


def test_error_of_a_build_is_one_sentence(tensorrt, nano_model_bundle, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("pascalvl.engines.graphs.leave_ops_to_plugins", expand)
    # Patches in other numbers than their positions.
    odd = {bindings.ROPE_COS: (((3, 32),) * 3)}
    monkeypatch.setattr(tensorrt, "profiles", lambda *args: [{**shapes, **odd} for shapes in profiles(*args)])
    with pytest.raises(
        UserError, match=r"^TensorRT 10\.16\.1\.11 cannot build the vision engine: [^\n]*tensor rope_cos[^\n]*[^.]\.$"
    ):
        build(nano_model_bundle, tmp_path / "engine", "tensorrt", options=SMALL)
    assert not (tmp_path / "engine").exists()
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, SystemExit])
def test_interruption_in_a_callback_ends_the_build(tensorrt, nano_model_bundle, tmp_path, monkeypatch, interruption):
    from rich.progress import Progress

    steps = []

    def interrupted(*_args, completed, **_kwargs):
        steps.append(completed)
        raise interruption

    monkeypatch.setattr("pascalvl.engines.graphs.leave_ops_to_plugins", expand)
    monkeypatch.setattr(Progress, "update", interrupted)
    with pytest.raises(interruption):
        build(nano_model_bundle, tmp_path / "engine", "tensorrt", options=SMALL)
    assert steps == [1]
    assert not (tmp_path / "engine").exists()


# The plugin -----------------------------------------------------------------------------------------------------------

REGISTER = """
import json, sys, types
from pathlib import Path
for name in ("torch", "onnx", "polygraphy"):
    sys.modules[name] = None  # a card's owner who runs an engine has none of them
import tensorrt_lean_bindings as lean
module = types.ModuleType("tensorrt")
names = vars(lean.tensorrt_lean)
module.__dict__.update({name: names[name] for name in names if not name.startswith("__")}, __version__="10.16.1.11")
sys.modules["tensorrt"] = module
from pascalvl.engines.tensorrt import backend as tensorrt_backend
from pascalvl.plugins.errors import UserError
tensorrt_backend._LIBRARY = sys.argv[1]
found = []
for library in map(Path, sys.argv[2:]):
    try:
        found.append(tensorrt_backend._register(library))
    except UserError as error:
        found.append(str(error))
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def plugins(tmp_path_factory):
    """Libraries of the plugin for TensorRT 8 and 10."""
    folder = tmp_path_factory.mktemp("plugins")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plugin_build.kernels_build, "SOURCES", ())
        for major in plugin_build.MAJORS:
            plugin_build.build(folder / f"{major}.so", major, target=Target.EMULATOR)
    return [folder / "8.so", folder / "10.so"]


def register(*arguments):
    command = [sys.executable, "-c", REGISTER, *map(str, arguments)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def test_the_plugin_finds_its_way_into_the_registry(plugins, tmp_path):
    for_8, for_10 = plugins
    (tmp_path / "text.so").write_text("no library")
    refused, taken, broken = register("libnvinfer_lean.so", for_8, for_10, tmp_path / "text.so")
    assert "did not take the plugin FlashAttention2 from" in refused
    assert taken is None
    assert "cannot be loaded" in broken


def test_tensorrt_that_loads_no_library_of_its_own(plugins):
    (refused,) = register("libnvinfer.so", plugins[1])
    assert "did not load libnvinfer.so.10" in refused


@pytest.mark.parametrize(("version", "major"), [("8.6.1", 8), ("9.3.0.1", 8), ("10.16.1.11", 10), ("11.1.0", 10)])
def test_the_plugins_library_is_for_the_version(stand_in, tmp_path, monkeypatch, version, major):
    module, asked = sys.modules[NAME], []
    monkeypatch.setattr(module.trt, "__version__", version)
    monkeypatch.setattr(module.plugin_build, "cached", lambda *key: asked.append(key) or tmp_path)
    monkeypatch.setattr(module, "_register", lambda library: None)
    assert module._load_plugin() == tmp_path
    assert asked == [(major, Target.CUDA)]


# What is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gpu", "version", "match"),
    [
        ({"capability": (6, 0)}, "8.6.1", "has compute capability 6.0, and the kernels need 6.1 or newer"),
        ({"capability": (5, 2)}, "10.0.1", "has compute capability 5.2"),
        (
            {},
            "10.0.1",
            r"TensorRT 10\.0\.1 does not serve sm_61 \(NVIDIA GeForce GTX 1080\): install 8\.6\.1.* pip inst",
        ),
        ({"capability": (7, 0)}, "10.16.1", "does not serve sm_70"),
        ({}, "8.5.3.1", r"TensorRT 8\.5\.3\.1 is too old, expected 8\.6 or newer"),
        (
            {"total_memory": 300_000_000},
            "8.6.1",
            r"has 0\.3 GB of memory, and the engines .* at least 0\.\d GB \(0\.\d GB",
        ),
    ],
)
def test_unsuitable_card_or_version(tensorrt, nano_model_bundle, tmp_path, monkeypatch, gpu, version, match):
    set_gpu(monkeypatch, tensorrt, PASCAL, version, **gpu)
    with pytest.raises(UserError, match=match):
        build(nano_model_bundle, tmp_path / "engine", "tensorrt")


@pytest.mark.parametrize(
    ("gpu", "version"), [(PASCAL, "8.6.1"), (PASCAL, "9.3.0"), (TURING, "8.6.1"), (TURING, "10.16.1.11")]
)
def test_suitable_cards(tensorrt, monkeypatch, gpu, version):
    set_gpu(monkeypatch, tensorrt, gpu, version)
    assert tensorrt.unavailable() is None


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (
            {"tactic_sources": ("JIT_CONVOLUTIONS", "CUBLAS9")},
            "tactic source 'CUBLAS9': .* has EDGE_MASK_CONVOLUTIONS, JIT",
        ),
        (
            {"preview_features": ("FASTER",)},
            "preview feature 'FASTER': TensorRT 10.16.1.11 has ALIASED_PLUGIN_IO_10_03, ",
        ),
        ({"prefill_chunk": 1_000_000}, r"prefill_chunk is out of range: expected at most the model's \d+ tokens"),
        ({"max_pixels": 1000}, "max_pixels is out of range: expected at least 1024, found 1000"),
    ],
)
def test_options_out_of_range(tensorrt, nano_model_bundle, tmp_path, options, match):
    with pytest.raises(UserError, match=match):
        build(nano_model_bundle, tmp_path / "engine", "tensorrt", options=BuildOptions(**options))


def test_options_below_one():
    with pytest.raises(UserError, match="prefill_chunk is out of range: expected at least 1, found 0"):
        BuildOptions(prefill_chunk=0)


def test_timing_cache_that_cannot_be_written(tensorrt, nano_model_bundle, tmp_path):
    with pytest.raises(UserError, match=r"timing cache .* cannot be written \(Is a directory\)"):
        build(nano_model_bundle, tmp_path / "engine", "tensorrt", options=BuildOptions(timing_cache=tmp_path))


@pytest.mark.parametrize(
    ("gpu", "version", "expected"),
    [
        (PASCAL, "8.6.1", ("FASTER_DYNAMIC_SHAPES_0805", "PROFILE_SHARING_0806")),
        (TURING, "8.6.1", tuple(FEATURES_OF_8_6)),
        (PASCAL, "9.3.0", None),
        (TURING, "10.16.1.11", None),
    ],
)
def test_cublas_is_left_to_pascal_and_sessions_share_profiles(tensorrt, monkeypatch, gpu, version, expected):
    monkeypatch.setattr(tensorrt.trt, "PreviewFeature", types.SimpleNamespace(__members__=FEATURES_OF_8_6))
    monkeypatch.setattr(tensorrt.trt, "__version__", version)
    assert tensorrt.default_preview_features(gpu) == expected


@pytest.mark.parametrize(("version", "expected"), [("8.6.1", True), ("9.3.0", True), ("10.16.1.11", False)])
def test_tactics_are_those_of_products(tensorrt, monkeypatch, version, expected):
    set_gpu(monkeypatch, tensorrt, version=version)
    assert tensorrt.default_tactic_sources() == (("CUBLAS", "CUBLAS_LT") if expected else None)


# Opening --------------------------------------------------------------------------------------------------------------


def test_engines_for_another_machine(tensorrt, built, monkeypatch):
    set_gpu(monkeypatch, tensorrt, version="10.1.0")
    with pytest.raises(UserError, match=r"were built by TensorRT 10\.16\.1\.11, found 10\.1\.0: build them again"):
        open_engine(built.directory)
    set_gpu(monkeypatch, tensorrt, capability=(8, 6))
    with pytest.raises(UserError, match=r"were built for compute capability 7\.5, found 8\.6: build them again"):
        open_engine(built.directory)


@pytest.mark.parametrize(
    ("module", "name", "value", "found"),
    [
        (plugin_build.flash_attention, "OP_VERSION", "9", "FlashAttention2 9 layout"),
        (plugin_build.flash_attention, "SERIALISED_LAYOUT", 9, r"FlashAttention2 \d layout 9, QuantLinear"),
        (plugin_build.quant_linear, "SERIALISED_LAYOUT", 9, r"QuantLinear \d layout 9, cache rows"),
        (plugin_build.kv_format, "ROW_LAYOUT", 9, "cache rows 9"),
    ],
)
def test_engines_of_another_contract(tensorrt, built, monkeypatch, module, name, value, found):
    expected = plugin_build.contract()
    monkeypatch.setattr(module, name, value)
    with pytest.raises(
        UserError, match=rf"were built for the contract {expected}, found .*{found}.*: build them again"
    ):
        open_engine(built.directory)


def test_no_hidden_states(tensorrt, built):
    with pytest.raises(UserError, match=r"plans, which do not return .* bisect with a bundle .* --backend reference"):
        open_engine(built.directory, marked_layers=True)


def test_plans_reach_the_engine(tensorrt, built, monkeypatch, caplog):
    """With a made-up runtime, which needs a GPU: the plans are handed over whole, and one that is refused is told.

    Whatever the sources of the plugin that they were built with: the contract is the same.
    """
    library = built.folder / "kernels-fedcba9876543210" / "plugin.so"
    monkeypatch.setattr(tensorrt, "_load_plugin", lambda: library)
    caplog.set_level(logging.INFO)
    read = []

    class Runtime:
        def __init__(self, logger):
            self.logger = logger

        def deserialize_cuda_engine(self, plan):
            read.append(bytes(plan))
            if len(read) > 2:
                self.logger.log(tensorrt.trt.ILogger.Severity.ERROR, "out of\nmemory.")
                return None
            return f"engine {len(read)}"

    engine = types.ModuleType("pascalvl.engines.tensorrt.engine")
    engine.TensorRTEngine = lambda *args: args
    device = types.ModuleType("pascalvl.engines.device.memory")
    device.CudaDevice = lambda library: library.name
    for module in (engine, device):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(tensorrt.trt, "Runtime", Runtime)
    directory, _, engines, found, marked = open_engine(built.directory)
    assert (directory, found, marked) == (built.directory, "plugin.so", False)
    assert "with the plugin of sources 0123456789abcdef; here they are fedcba9876543210" in caplog.text
    assert engines == {bindings.VISION: "engine 1", bindings.DECODER: "engine 2"}
    assert read == [(directory / name).read_bytes() for name in ("vision.plan", "decoder.plan")]
    with pytest.raises(UserError, match=r"cannot load .*vision.plan \(out of memory\) onto Tesla T4, of whose 8\.5 GB"):
        open_engine(built.directory)


def test_plan_that_the_runtime_refuses(tensorrt, tmp_path):
    path = tmp_path / "vision.plan"
    path.write_bytes(b"no plan" * 1000)
    with pytest.raises(
        UserError, match=r"cannot load .*vision\.plan \(IRuntime::deserializeCudaEngine: .*\) onto Tesla T4"
    ):
        tensorrt._deserialise(path, TURING)


# Choosing -------------------------------------------------------------------------------------------------------------


def chosen(caplog):
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="pascalvl.engines.backends"):
        module = backends._backend_module("auto")
    return module.NAME, caplog.messages[-1]


def test_auto_takes_tensorrt_where_it_works(tensorrt, monkeypatch, caplog):
    assert chosen(caplog) == (
        "tensorrt",
        "backend tensorrt: the fastest that can be used here; --backend cuda would be the next",
    )
    set_gpu(monkeypatch, tensorrt, PASCAL)
    name, told = chosen(caplog)
    assert name == "onnxruntime"
    assert "; tensorrt is skipped: TensorRT 10.16.1.11 does not serve sm_61" in told

    def no_gpu():
        raise UserError("no NVIDIA driver was found: install one.")

    monkeypatch.setattr(tensorrt, "find_gpu", no_gpu)
    name, told = chosen(caplog)
    assert name == "onnxruntime"
    assert "; tensorrt is skipped: no NVIDIA driver was found: install one; cuda is skipped: " in told


def test_named_backend_is_not_skipped(tensorrt, nano_model_bundle, tmp_path, monkeypatch):
    set_gpu(monkeypatch, tensorrt, PASCAL)
    with pytest.raises(UserError, match="does not serve sm_61"):
        build(nano_model_bundle, tmp_path / "engine", "tensorrt")


def test_tensorrt_that_is_not_installed(nano_model_bundle, tmp_path, monkeypatch, caplog):
    monkeypatch.delitem(sys.modules, NAME, raising=False)
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    name, told = chosen(caplog)
    assert name == "onnxruntime"
    assert "; tensorrt is skipped: needs the package tensorrt; cuda is skipped: no NVIDIA " in told
    with pytest.raises(UserError, match=r"backend not installed: tensorrt \(needs the package tensorrt\)"):
        build(nano_model_bundle, tmp_path / "engine", "tensorrt")


def test_tensorrt_whose_libraries_are_missing(tmp_path, monkeypatch, caplog):
    (tmp_path / "tensorrt.py").write_text("raise ImportError('libnvinfer.so.8: cannot open shared object file')")
    monkeypatch.delitem(sys.modules, NAME, raising=False)
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    name, told = chosen(caplog)
    assert name == "onnxruntime"
    assert "; tensorrt is skipped: libnvinfer.so.8: cannot open shared object file; cuda is skipped: " in told


def test_options_for_another_backend(nano_model_bundle, tmp_path):
    with pytest.raises(UserError, match="these options are for backend tensorrt, and the backend is onnxruntime"):
        build(nano_model_bundle, tmp_path / "engine", "onnxruntime", options=SMALL)
    assert not list(tmp_path.iterdir())


def test_command_line(tensorrt, nano_model_bundle, tmp_path, monkeypatch, capsys):
    from pascalvl.runtime.cli import main

    found = []

    def stop(*args):
        found.append(args[3:])
        raise UserError("enough.")

    monkeypatch.setattr(tensorrt, "build", stop)
    command = ["build", str(nano_model_bundle), "--output", str(tmp_path / "engine"), "--backend", "tensorrt"]
    options = ["--prefill-chunk", "64", "--max-pixels", "5000", "--timing-cache", str(tmp_path / "t")]
    names = ["--max-context", "900", "--tactic-sources", "CUBLAS,CUDNN", "--preview-features", ""]
    assert main([*command, *options, *names]) == 2
    assert capsys.readouterr().err == "pascalvl: error: enough.\n"
    assert found.pop() == (CacheConfig(), BuildOptions(64, 5000, 900, tmp_path / "t", ("CUBLAS", "CUDNN"), ()))
    assert main(command) == 2
    assert found.pop() == (CacheConfig(),)

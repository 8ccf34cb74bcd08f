"""Fixtures that more than one folder of tests uses: the nano checkpoint, its bundles and its Hugging Face reference."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
from pathlib import Path

if worker := os.environ.get("PYTEST_XDIST_WORKER"):
    # Cores of its own for each of the processes, before libraries count them: threads of one would wait for another's.
    cores, count = sorted(os.sched_getaffinity(0)), int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.sched_setaffinity(0, cores[int(worker.removeprefix("gw")) % len(cores) :: count])

from tests import torchvision_for_cpu  # noqa: F401

# isort: split
import pytest
import torch
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from pascalvl.engines import build
from pascalvl.plugins.bundle import GENERATION_CONFIG, Manifest
from pascalvl.plugins.kv_format import CacheConfig
from pascalvl.plugins.weight_format import WeightConfig
from tests.real_sizes import HOST_FILES

NANO = Path(__file__).parent / "nano"
ALL_WEIGHT_FORMATS = "w4,layer.1=w8,layer.2=f16,layer.3=f32"
_LONGEST = "test_cuda_build.py", "test_sanitizers.py", "test_kv_window.py", "test_tensorrt_build.py"
# The kernels compiled for the tests stay in the repository, for the next time.
os.environ.setdefault("XDG_CACHE_HOME", str(Path(__file__).parents[1] / "build" / "cache"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fuzz-seconds", type=float, default=4.0, help="how long each fuzzer in tests/fuzz runs")
    parser.addoption("--fuzz-seed", type=int, help="run fuzzers on this seed alone")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take longest first, so that no process is left with them in the end; and the first of all what
    compiles the kernels, for which others would wait."""
    order = {name: number for number, name in enumerate(_LONGEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


@pytest.fixture
def fuzz_limits(request: pytest.FixtureRequest) -> list[str]:
    """For fuzzers that are programs: seconds, and the seed if there is one alone."""
    options = request.config.getoption("--fuzz-seconds"), request.config.getoption("--fuzz-seed")
    return [str(option) for option in options if option is not None]


@pytest.fixture(scope="session")
def nano_checkpoint() -> Path:
    return NANO / "checkpoint"


@pytest.fixture(scope="session")
def nano_model_bundle(nano_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Exported here, or elsewhere: a GPU machine need not have what an export takes."""
    if carried := os.environ.get("PASCALVL_NANO_MODEL_BUNDLE"):
        return Path(carried)
    from pascalvl.export import export_checkpoint

    bundle = tmp_path_factory.mktemp("nano") / "model"
    export_checkpoint(nano_checkpoint, bundle)
    return bundle


@pytest.fixture(scope="session")
def nano_quantised_bundle(nano_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model bundle with layers in every weight format; like `nano_model_bundle`, it can be carried."""
    if carried := os.environ.get("PASCALVL_NANO_QUANTISED_BUNDLE"):
        return Path(carried)
    from pascalvl.export import export_checkpoint

    bundle = tmp_path_factory.mktemp("nano") / "quantised"
    export_checkpoint(nano_checkpoint, bundle, weights=WeightConfig.parse(ALL_WEIGHT_FORMATS))
    return bundle


@pytest.fixture(scope="session")
def nano_engine_bundle(nano_engine) -> Path:
    """With a cache in float32."""
    return nano_engine("f32")


@pytest.fixture(scope="session")
def nano_engine(nano_model_bundle: Path, tmp_path_factory: pytest.TempPathFactory):
    """Engine bundles of the nano checkpoint: ``nano_engine(kv, backend="onnxruntime")``, each built once."""
    folder = tmp_path_factory.mktemp("nano")

    @functools.cache
    def built(kv: str, backend: str = "onnxruntime") -> Path:
        bundle = folder / f"{backend}-{kv}"
        build(nano_model_bundle, bundle, backend, CacheConfig.parse(kv))
        return bundle

    return built


@pytest.fixture(scope="session")
def endless_bundle(nano_engine_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An engine bundle whose answers only the context ends."""
    bundle = tmp_path_factory.mktemp("nano") / "endless"
    shutil.copytree(nano_engine_bundle, bundle)
    (bundle / GENERATION_CONFIG).write_text('{"eos_token_id": []}')
    Manifest.read(bundle, "engine").write(bundle)
    return bundle


@pytest.fixture(scope="module")
def cuda_anywhere():
    """Backend ``cuda`` on the emulator, where there is no GPU."""
    from pascalvl.engines.cuda import backend
    from pascalvl.engines.device.memory import EmulatedDevice, available_target
    from pascalvl.plugins.kernels.build import Target, cached

    with pytest.MonkeyPatch.context() as patch:
        if available_target() is Target.EMULATOR:
            patch.setattr(backend, "open_device", lambda: EmulatedDevice(cached(Target.EMULATOR)))
        yield


@pytest.fixture(scope="session")
def network_watch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library that refuses and tells what a command asks of the network."""
    library = tmp_path_factory.mktemp("watch") / "network_watch.so"
    source = Path(__file__).with_name("network_watch.cpp")
    subprocess.run(["g++", "-std=c++17", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    return library


@pytest.fixture(scope="session")
def nano_reference(nano_checkpoint: Path) -> Qwen3VLForConditionalGeneration:
    """Hugging Face's model in float32."""
    return Qwen3VLForConditionalGeneration.from_pretrained(nano_checkpoint, dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def random_checkpoint(nano_checkpoint: Path):
    """Make checkpoints with random weights, in float32: ``random_checkpoint(directory, config)``."""

    def make(directory: Path, config: Qwen3VLConfig) -> Qwen3VLForConditionalGeneration:
        nano = Qwen3VLConfig.from_pretrained(nano_checkpoint)
        for name in ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"):
            setattr(config, name, getattr(nano, name))  # the tokenizer is nano's
        torch.manual_seed(0)
        model = Qwen3VLForConditionalGeneration(config).eval()
        # Norm weights of one would hide a norm that is left out.
        for name, parameter in model.named_parameters():
            if "norm" in name and parameter.dim() == 1:
                torch.nn.init.uniform_(parameter, 0.5, 1.5)
        model.save_pretrained(directory)
        for name in HOST_FILES:
            shutil.copyfile(nano_checkpoint / name, directory / name)
        return model

    return make

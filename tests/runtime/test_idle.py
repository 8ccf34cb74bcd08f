"""Models that are unloaded, and come back: on backend cuda, on a GPU or, where there is none, on the emulator."""

import gc
import io
import threading
import time
import weakref

import pytest

from pascalvl.engines.cuda import backend
from pascalvl.engines.device.gpu import find_gpu
from pascalvl.engines.device.memory import available_target
from pascalvl.plugins.errors import UserError
from pascalvl.plugins.kernels.build import Target
from pascalvl.plugins.kv_format import CacheConfig
from pascalvl.runtime import VisionLanguageModel
from pascalvl.runtime.cli import main
from pascalvl.runtime.idle import Idle
from tests.engines.torch_reference import answer, assistant, user

pytestmark = pytest.mark.usefixtures("cuda_anywhere")

ON_GPU = available_target() is Target.CUDA
FIRST = [user("Hello!")]
SECOND = [*FIRST, assistant("Hello."), user("Which shapes are red?")]


@pytest.fixture(params=["onnxruntime", "cuda"])
def bundle(request, nano_engine):
    return nano_engine("k8v8", request.param)


@pytest.mark.parametrize("cache", ["k8v8", "k8v8,window=4+200"])
def test_the_conversation_goes_on(bundle, cache):
    """Without a token of it being computed again."""
    models = [VisionLanguageModel.open(bundle, context_length=160, cache=CacheConfig.parse(cache)) for _ in range(2)]
    generations = []
    for model, unloads in zip(models, (False, True), strict=True):
        answer(model, FIRST, 3)
        if unloads:
            model.unload()
            model.unload()
        generations.append(answer(model, SECOND, 4))
    expected, found = generations
    assert found.token_ids == expected.token_ids
    assert found.reused_tokens == expected.reused_tokens > 8
    assert found.load_seconds > expected.load_seconds == 0
    assert model.load() == 0


def test_what_a_window_has_dropped_is_computed_again(nano_engine):
    model = VisionLanguageModel.open(
        nano_engine("f32"), context_length=2000, cache=CacheConfig.parse("f32,window=4+16")
    )
    answer(model, SECOND, 4)
    model.unload()
    assert answer(model, SECOND, 4).reused_tokens == 0


def test_the_device_is_given_back(nano_engine, monkeypatch):
    live = weakref.WeakSet()
    device_type = type(backend.open_device())
    allocate = device_type.allocate

    def counted(self, nbytes):
        live.add(buffer := allocate(self, nbytes))
        return buffer

    monkeypatch.setattr(device_type, "allocate", counted)
    model = VisionLanguageModel.open(nano_engine("k8v8", "cuda"), context_length=160)
    answer(model, FIRST, 3)
    free = find_gpu().free_memory if ON_GPU else 0
    assert len(live) > 5
    model.unload()
    gc.collect()
    assert not live
    if ON_GPU:
        assert find_gpu().free_memory > free + 40e6
    assert answer(model, FIRST, 3).token_ids
    assert live


def test_a_device_that_is_not_there_any_more(nano_engine, monkeypatch):
    model = VisionLanguageModel.open(nano_engine("k8v8", "cuda"), context_length=160)
    expected = answer(model, FIRST, 3).token_ids
    model.unload()
    with monkeypatch.context() as patch:
        patch.setattr(backend, "unavailable", lambda: "no NVIDIA GPU can be used")
        patch.setattr(backend, "open_device", _without_gpu)
        with pytest.raises(UserError, match="no NVIDIA GPU can be used"):
            answer(model, FIRST, 3)
    generation = answer(model, FIRST, 3)
    assert generation.token_ids == expected
    assert generation.reused_tokens > 0


def _without_gpu():
    raise UserError("no NVIDIA GPU can be used.")


class Model:
    """Notes when it is unloaded."""

    def __init__(self) -> None:
        self.unloads: list[float] = []
        self.unloaded = threading.Event()

    def unload(self) -> None:
        self.unloads.append(time.monotonic())
        self.unloaded.set()


def test_only_an_idle_model_is_unloaded():
    model = Model()
    with Idle(model, 0.2) as idle:
        for _ in range(3):
            with idle.busy():
                time.sleep(0.3)
            assert not model.unloads
        used = time.monotonic()
        assert model.unloaded.wait(10)
        assert model.unloads[0] >= used + 0.15
        with idle.busy():
            pass
    time.sleep(0.3)
    assert len(model.unloads) == 1


def test_a_model_that_stays():
    model = Model()
    with Idle(model, None) as idle, idle.busy():
        pass
    assert not model.unloads


def test_an_unload_that_fails(caplog):
    model = Model()
    model.unload = lambda: (_ for _ in ()).throw(MemoryError)
    with Idle(model, 0.01):
        for _ in range(100):
            if caplog.messages:
                break
            time.sleep(0.05)
    assert caplog.messages == ["the model was not unloaded as it should be: memory has run out"]


def test_chat(bundle, monkeypatch, capsys):
    """The second line comes when the model has been unloaded."""
    unload, unloaded = VisionLanguageModel.unload, threading.Event()
    monkeypatch.setattr(VisionLanguageModel, "unload", lambda self: (unload(self), unloaded.set()))

    class Lines(io.StringIO):
        def readline(self, *args):
            assert self.tell() == 0 or unloaded.wait(60)
            return super().readline(*args)

    monkeypatch.setattr("sys.stdin", Lines("Hello!\nWhich shapes are red?\n"))
    options = ["--context", "160", "--max-new-tokens", "3", "--temperature", "0", "--unload-after", "0.1s"]
    assert main(["chat", str(bundle), *options]) == 0
    out, err = capsys.readouterr()
    assert "[the model was loaded again, in " in err
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello!\nWhich shapes are red?\n"))
    assert main(["chat", str(bundle), *options[:-2]]) == 0
    assert capsys.readouterr().out == out


@pytest.mark.parametrize("time_", ["10", "m", "1d", "1e3s", "9" * 30 + "s", ""])
def test_what_is_no_time(time_, capsys):
    assert main(["chat", "bundle", "--unload-after", time_]) == 2
    assert "expected a time such as 90s, 10m or 2h, found" in capsys.readouterr().err


def test_only_what_was_opened_from_a_bundle(nano_engine):
    from pascalvl.engines import open_engine

    model = VisionLanguageModel(open_engine(nano_engine("f32")), 160, 16)
    with pytest.raises(ValueError, match="not opened from a bundle"):
        model.unload()
    assert answer(model, FIRST, 2).token_ids
    assert model.load() == 0

"""Memory and streams, on the emulator, and on a GPU where there is one."""

import logging

import numpy as np
import pytest

from pascalvl.engines.device.gpu import find_gpu
from pascalvl.engines.device.memory import ALIGNMENT, CudaDevice, EmulatedDevice, available_target, open_device
from pascalvl.plugins.errors import UserError
from pascalvl.plugins.kernels.build import Target, cached

ON_GPU = available_target() is Target.CUDA
needs_gpu = pytest.mark.skipif(not ON_GPU, reason="needs a CUDA device")


@pytest.fixture(scope="module", params=[Target.EMULATOR, pytest.param(Target.CUDA, marks=needs_gpu)])
def device(request):
    return open_device(request.param, cached(request.param))


def test_memory_is_aligned_and_keeps_what_is_copied(device):
    array = np.arange(1000, dtype=np.int32)
    buffer, found = device.allocate(array.nbytes), np.zeros_like(array)
    device.upload(buffer.pointer, array)
    device.download(found, buffer.pointer)
    device.synchronize()
    assert buffer.pointer % ALIGNMENT == 0
    assert buffer.nbytes == array.nbytes
    np.testing.assert_array_equal(found, array)


def test_memory_that_runs_out(device):
    with pytest.raises(MemoryError):
        device.allocate(1 << 60)


def greedy_step(device):
    """A step that chooses the largest of 1,000 logits of the host: what it reads, what it writes, and it."""
    logits = device.host_array(4000).view(np.float32)
    found = device.host_array(512)
    memory, choice = device.allocate(4000), device.allocate(512)

    def step():
        device.upload(memory.pointer, logits)
        device.kernels.choose(memory.pointer, 1, 1000, 0, choice.pointer, choice.pointer + 256, device.stream)
        device.download(found, choice.pointer)

    return logits, found[:4].view(np.int32), step


def test_a_step_of_copies_and_kernels(device):
    logits, token, step = greedy_step(device)
    for expected in (3, 997):
        logits[:] = 0
        logits[expected] = 1
        step()
        device.synchronize()
        assert token[0] == expected


@needs_gpu
def test_a_recorded_step_reads_what_the_host_wrote_since():
    device = CudaDevice(cached(Target.CUDA))
    logits, token, step = greedy_step(device)
    step()
    replay = device.capture(step)
    assert not device.is_capturing()
    for expected in (3, 997):
        logits[:] = 0
        logits[expected] = 1
        replay()
        device.synchronize()
        assert token[0] == expected


@needs_gpu
def test_what_cannot_be_recorded_is_said_and_harmless(caplog):
    device = CudaDevice(cached(Target.CUDA))
    logits, token, step = greedy_step(device)

    def waits():
        step()
        device.synchronize()

    with caplog.at_level(logging.WARNING):
        assert device.capture(waits) is None
    assert "it cannot be captured" in caplog.text
    logits[5] = 1
    waits()
    assert token[0] == 5


@needs_gpu
def test_the_gpu():
    gpu = find_gpu()
    assert gpu.capability >= (6, 1)
    assert 0 < gpu.free_memory <= gpu.total_memory
    assert gpu.sm == "sm_{}{}".format(*gpu.capability)


@pytest.mark.skipif(ON_GPU, reason="there is a GPU")
def test_without_a_gpu():
    assert isinstance(open_device(available_target(), cached(Target.EMULATOR)), EmulatedDevice)
    with pytest.raises(UserError, match=r"no NVIDIA (driver was found|GPU can be used)"):
        CudaDevice(cached(Target.CUDA))

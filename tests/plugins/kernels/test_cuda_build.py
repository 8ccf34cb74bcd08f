"""The kernels compiled for SM61: that they are, what they take of the card, the library where there is no driver."""

import ctypes
import ctypes.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pascalvl import plugins
from pascalvl.plugins.errors import UserError
from pascalvl.plugins.kernels import build as kernels_build
from pascalvl.plugins.kernels import report
from pascalvl.plugins.kernels.build import Target, build, cached
from pascalvl.plugins.kernels.library import KernelLibrary
from pascalvl.plugins.kv_format import RowFormat


@pytest.fixture(scope="module")
def cuda_library(tmp_path_factory):
    path = tmp_path_factory.mktemp("cuda") / "libpascalvl.so"
    build(path, Target.CUDA)
    return path


@pytest.fixture(scope="module")
def resources():
    return kernels_build.resources()


def test_the_committed_table_is_what_the_compiler_says(resources):
    assert report.TABLE.read_text(encoding="utf-8") == report.table(resources)


def test_no_kernel_spills_and_two_blocks_fit(resources):
    for kernel, use in resources.items():
        assert use.spills == 0, kernel
        assert report.resident_warps(use) >= 8, kernel


def test_prefill_does_enough_with_what_it_loads(resources):
    """An SM61 reads a word of shared memory for every two FFMA it does: of 16 bytes, one for every eight."""
    for kernel, use in resources.items():
        if kernel.startswith("prefill"):
            assert use.multiply_adds_per_load > 8, kernel


def test_images_for_sm61_and_for_newer_gpus_are_inside(cuda_library):
    content = cuda_library.read_bytes()
    assert b".target sm_61" in content
    assert content.count(b"\x7fELF") == 1 + len(kernels_build.SOURCES)


def test_the_driver_is_asked_for_kernels_by_their_names(cuda_library, resources):
    content = cuda_library.read_bytes()
    assert [kernel for kernel in resources if f"\0{kernel}\0".encode() not in content] == []


def test_the_yardstick_is_built_of_the_kernels_parts():
    source = Path(plugins.__file__).parent / "bench" / "yardstick.cu"
    assert b".entry sgemm" in kernels_build.compile_cuda(source).ptx


def test_the_library_loads_and_explains_itself_without_a_driver(cuda_library):
    if ctypes.util.find_library("cuda"):
        pytest.skip("there is a CUDA driver here")
    with pytest.raises(UserError, match=r"The CUDA driver \(libcuda.so.1\) is not installed"):
        KernelLibrary(cuda_library).load()


@pytest.mark.parametrize(
    ("attribute", "value", "told"),
    [("CXX", "no-such-compiler", "'no-such-compiler' was not found"), ("CXX", "false", "failed to build")],
)
def test_a_failed_build_leaves_nothing(tmp_path, monkeypatch, attribute, value, told):
    monkeypatch.setenv(attribute, value)
    with pytest.raises(UserError, match=told):
        build(tmp_path / "lib.so", Target.EMULATOR)
    assert not list(tmp_path.iterdir())


def test_missing_nvrtc_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(kernels_build.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(kernels_build, "compile_cuda", kernels_build.compile_cuda.__wrapped__)  # remembers nothing
    with pytest.raises(UserError, match="nvidia-cuda-nvrtc-cu12"):
        build(tmp_path / "lib.so", Target.CUDA)
    assert not {path.suffix for path in tmp_path.rglob("*")} & {".o", ".so"}


def test_a_cached_library_serves_where_nothing_compiles(tmp_path, monkeypatch):
    compiled = kernels_build.kernels_object(Target.EMULATOR)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = tmp_path / "pascalvl" / compiled.parent.name
    folder.mkdir(0o700, parents=True)
    shutil.copy(compiled, folder)
    path = cached(Target.EMULATOR)
    assert tmp_path in path.parents
    assert KernelLibrary(path).row_bytes(RowFormat.INT4, 112) == 64
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert cached(Target.EMULATOR) == path
    with pytest.raises(UserError, match="'no-such-compiler' was not found"):
        cached(Target.CUDA)


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"cannot be written to .*: set XDG_CACHE_HOME"):
        cached(Target.EMULATOR)


def test_other_sources_are_cached_elsewhere(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(kernels_build, "build", lambda output, target: output.touch())
    monkeypatch.setattr(kernels_build, "FOLDER", Path(shutil.copytree(kernels_build.FOLDER, tmp_path / "kernels")))
    before = cached(Target.EMULATOR)
    (tmp_path / "kernels" / "device.cuh").write_text("// edited\n", encoding="utf-8")
    after = cached(Target.EMULATOR)
    assert before.name == after.name
    assert before.parent != after.parent


def test_the_command_builds(tmp_path):
    module = "pascalvl.plugins.kernels.build"
    subprocess.run([sys.executable, "-m", module, tmp_path / "lib.so", "--target", "emulator"], check=True)
    assert KernelLibrary(tmp_path / "lib.so").row_bytes(RowFormat.INT4, 112) == 64

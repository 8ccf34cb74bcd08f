"""`pascalvl doctor`: every state of every check from stand-in facts, and what this machine gives for real."""

import ctypes
import dataclasses
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pascalvl.engines import doctor
from pascalvl.engines.device.gpu import INSTALL_TENSORRT_8, Gpu
from pascalvl.engines.doctor import Row, State, facts, machine
from pascalvl.engines.doctor import tensorrt as trt
from pascalvl.engines.doctor.facts import Driver, Plugin, TensorRT
from pascalvl.engines.tensorrt import cuda_libraries
from pascalvl.plugins.bundle import Manifest
from pascalvl.plugins.errors import UserError
from pascalvl.plugins.kernels.build import Target
from pascalvl.plugins.ops.flash_attention.op import OP_NAME, OP_VERSION
from pascalvl.plugins.tensorrt import build as plugin_build
from pascalvl.runtime.cli import main

GTX1080 = Gpu("NVIDIA GeForce GTX 1080", (6, 1), 8 << 30, 7 << 30, (13, 0))
RTX3090 = dataclasses.replace(GTX1080, name="NVIDIA GeForce RTX 3090", capability=(8, 6))
DRIVER = Driver("580.95.05", (13, 0))
NONE, TRT8, TRT10 = TensorRT(), TensorRT("8.6.1"), TensorRT("10.16.1.11")
PLUGIN = Plugin(Path("cache/kernels-0123456789abcdef/libpascalvl_plugin8.so"))
BUNDLE = {"name": "tensorrt", "version": "8.6.1", "cuda": "12.9", "capability": "6.1"}
BUNDLE |= {"contract": plugin_build.contract(), "plugin": "0123456789abcdef"}
without_driver = pytest.mark.skipif(facts.find_driver() is not None, reason="there is an NVIDIA driver")
without_tensorrt = pytest.mark.skipif(importlib.util.find_spec("tensorrt") is not None, reason="TensorRT is installed")


def gpu(capability, driver_cuda=(13, 0)):
    return dataclasses.replace(GTX1080, capability=capability, driver_cuda=driver_cuda)


def check(row: Row, state: State, found: str, remedy: str = "") -> None:
    """The state, what was found in full, and a part of the one sentence on what to do, which only what is ok lacks."""
    assert (row.state, row.found) == (state, found)
    assert remedy in row.remedy
    assert bool(row.remedy) == bool(remedy) == (state is not State.OK)
    assert not row.remedy or re.fullmatch(r"[A-Z][^\n]*[^.]\.", row.remedy)


# Checks ---------------------------------------------------------------------------------------------------------------


def test_python():
    check(trt.check_python((3, 11, 9), NONE), State.OK, "3.11.9")
    check(trt.check_python((3, 12, 0), TRT10), State.OK, "3.12.0")
    check(trt.check_python((3, 12, 0), NONE), State.WARNING, "3.12.0", "with Python 3.10 or 3.11")


def test_driver():
    check(machine.check_driver(DRIVER, GTX1080), State.OK, "580.95.05, runs CUDA 13.0")
    check(machine.check_driver(Driver("525.60.13", (12, 0)), None), State.OK, "525.60.13, runs CUDA 12.0")
    check(machine.check_driver(Driver("580.95.05", None), None), State.OK, "580.95.05")
    check(machine.check_driver(Driver("595.10", (13, 2)), RTX3090), State.OK, "595.10, runs CUDA 13.2")
    check(machine.check_driver(None, GTX1080), State.OK, "of unknown version, runs CUDA 13.0")
    check(machine.check_driver(None, None), State.MISSING, "none", "Install branch 580")
    old = machine.check_driver(Driver("470.82", (11, 4)), GTX1080)
    check(old, State.MISSING, "470.82, runs CUDA 11.4", "needs branch 525 or newer: install branch 580")
    new = machine.check_driver(Driver("595.10", (13, 2)), None)
    check(new, State.MISSING, "595.10, runs CUDA 13.2", "branch 580 is the last that serves Pascal cards: install that")
    modules = dataclasses.replace(DRIVER, open_modules=True)
    check(machine.check_driver(modules, RTX3090), State.OK, "580.95.05, runs CUDA 13.0")
    unseen = machine.check_driver(modules, None)
    found = "580.95.05, runs CUDA 13.0, open kernel modules"
    check(unseen, State.MISSING, found, "begin with Turing: install branch 580")


def test_gpu():
    name = "NVIDIA GeForce GTX 1080, compute capability"
    check(machine.check_gpu(GTX1080, ""), State.OK, f"{name} 6.1")
    # The cubin for SM61 needs no compiler in the driver.
    check(machine.check_gpu(gpu((6, 1), (12, 0)), ""), State.OK, f"{name} 6.1")
    newer = f"{name} 8.6 (kernels through PTX for 6.1)"
    check(machine.check_gpu(gpu((8, 6), (12, 9)), ""), State.OK, newer)
    check(machine.check_gpu(gpu((8, 6), (12, 8)), ""), State.MISSING, newer, "install branch 575 or newer")
    for capability in ((6, 0), (5, 2)):
        found = "{} {}.{}".format(name, *capability)
        check(machine.check_gpu(gpu(capability), ""), State.MISSING, found, "6.1 or higher: use another card")
    none = machine.check_gpu(None, "no NVIDIA GPU can be used (it sees none): check nvidia-smi.")
    check(none, State.MISSING, "none that CUDA can use", "No NVIDIA GPU can be used (it sees none)")


def test_memory():
    check(machine.check_memory(GTX1080), State.OK, "8.6 GB, 7.5 GB free")
    full = dataclasses.replace(GTX1080, free_memory=3 << 30)
    check(machine.check_memory(full), State.WARNING, "8.6 GB, 3.2 GB free", "Other programs hold more than half")


def test_cuda_bindings():
    pin = "pip install 'cuda-bindings>=12.6,<13'"
    check(machine.check_cuda_bindings("12.9.4", DRIVER, GTX1080), State.OK, "12.9.4")
    check(machine.check_cuda_bindings("13.5.0", DRIVER, RTX3090), State.OK, "13.5.0")
    check(machine.check_cuda_bindings("", DRIVER, GTX1080), State.MISSING, "not installed", pin)
    check(machine.check_cuda_bindings("13.5.0", DRIVER, GTX1080), State.WARNING, "13.5.0", f"dropped this card: {pin}")
    # No GPU is seen then, for these are too new for the driver.
    old = machine.check_cuda_bindings("13.5.0", Driver("535.1", (12, 2)), None)
    check(old, State.MISSING, "13.5.0", f"The driver runs CUDA 12.2, these are for CUDA 13: {pin}")


def test_tensorrt():
    install_8 = "pip install --extra-index-url https://pypi.nvidia.com tensorrt==8.6.1.post1 tensorrt_bindings==8.6.1 "
    install_10 = "pip install 'tensorrt-cu12>=10,<11'"
    check(trt.check_tensorrt(TRT8, GTX1080), State.OK, "8.6.1")
    check(trt.check_tensorrt(TensorRT("9.3.0.post12.dev1"), GTX1080), State.OK, "9.3.0.post12.dev1")
    check(trt.check_tensorrt(TRT10, RTX3090), State.OK, "10.16.1.11")
    check(trt.check_tensorrt(TRT8, RTX3090), State.OK, "8.6.1")
    refused = trt.check_tensorrt(TRT10, GTX1080)
    check(refused, State.MISSING, "10.16.1.11", f"refuses compute capability 6.1, 8.6.1 does not: {install_8}")
    check(trt.check_tensorrt(TRT10, gpu((7, 0))), State.MISSING, "10.16.1.11", "refuses compute capability 7.0")
    check(trt.check_tensorrt(TRT10, gpu((7, 5))), State.OK, "10.16.1.11")
    check(trt.check_tensorrt(NONE, GTX1080), State.MISSING, "not installed", install_8)
    check(trt.check_tensorrt(NONE, None), State.MISSING, "not installed", install_8)
    check(trt.check_tensorrt(NONE, RTX3090), State.MISSING, "not installed", install_10)
    check(trt.check_tensorrt(TRT8, gpu((9, 0))), State.OK, "8.6.1")
    check(trt.check_tensorrt(TRT8, gpu((12, 0))), State.MISSING, "8.6.1", f"12.0, TensorRT 10 does: {install_10}")
    for version in ("8.5.3.1", "11.4.0.106"):
        row = trt.check_tensorrt(TensorRT(version), RTX3090)
        check(row, State.MISSING, version, f"for TensorRT 8.6, 9.x and 10.x: {install_10}")
    cudnn = TensorRT("8.6.1.post1", "it cannot be imported (libcudnn.so.8: cannot open shared object file)")
    row = trt.check_tensorrt(cudnn, GTX1080)
    check(row, State.MISSING, "8.6.1.post1, unusable", "shared object file): pip install 'nvidia-cudnn-cu12==8.9.*'.")
    broken = TensorRT("8.6.1.post1", "it cannot be imported (No module named 'tensorrt_bindings')")
    check(trt.check_tensorrt(broken, GTX1080), State.MISSING, "8.6.1.post1, unusable", f"bindings'): {install_8}")


def test_numpy():
    check(trt.check_numpy("1.26.4", TRT8, GTX1080), State.OK, "1.26.4")
    check(trt.check_numpy("2.4.6", TRT10, RTX3090), State.OK, "2.4.6")
    for tensorrt, card in ((TRT8, GTX1080), (TRT8, RTX3090), (TRT10, GTX1080), (NONE, None)):
        check(trt.check_numpy("2.4.6", tensorrt, card), State.WARNING, "2.4.6", "pip install 'numpy<2'")


CUDA_LIBRARIES = {
    "CUDA runtime": ("libcudart.so.12", "nvidia-cuda-runtime-cu12", "nvidia-cuda-runtime-cu12"),
    "cuBLAS": ("libcublas.so.12, libcublasLt.so.12", "nvidia-cublas-cu12", "nvidia-cublas-cu12"),
    "cuDNN": ("libcudnn.so.8", "nvidia-cudnn-cu12", "'nvidia-cudnn-cu12==8.9.*'"),
}
"""By row: the libraries, their package, and how pip is asked for it."""


@pytest.mark.parametrize("name", CUDA_LIBRARIES)
def test_libraries_are_judged_by_whether_they_load(monkeypatch, name):
    """A package that is there may be another version, or damaged."""
    libraries, package, pin = CUDA_LIBRARIES[name]
    loading = dict.fromkeys(cuda_libraries.PACKAGES, "")
    broken = {**loading, libraries.rpartition(" ")[2]: "libx.so: cannot open shared object file"}
    remedy = f"TensorRT 8.6 needs it (libx.so: cannot open shared object file): pip install {pin}."

    def row(problems, tensorrt, card, version=""):
        monkeypatch.setattr(trt, "installed", lambda asked: version if asked == package else "")
        return next(row for row in trt.check_libraries(problems, tensorrt, card) if row.name == name)

    check(row(loading, TRT8, GTX1080), State.OK, libraries)
    check(row(loading, TRT8, GTX1080, "12.9.1"), State.OK, f"{libraries} ({package} 12.9.1)")
    check(row(broken, TRT10, RTX3090), State.OK, "none; TensorRT 10 needs none")
    check(row(broken, TRT8, GTX1080), State.MISSING, "none", remedy)
    check(row(broken, TRT8, RTX3090, "9.10.2.21"), State.MISSING, "9.10.2.21", remedy)
    # TensorRT 10 cannot stay on this card.
    check(row(broken, TRT10, GTX1080), State.MISSING, "none", remedy)
    check(row(broken, NONE, None), State.MISSING, "none", remedy)


def test_libraries_of_packages_are_loaded_by_their_paths(tmp_path, monkeypatch):
    """For TensorRT, and before any that the system's loader finds; the doctor reads the same."""
    folder = tmp_path / "nvidia" / "cublas" / "lib"
    folder.mkdir(parents=True)
    (tmp_path / "nothing.c").write_text("int nothing;")
    library = folder / "libcublasLt.so.12"
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, tmp_path / "nothing.c"], check=True)
    (folder / "libcublas.so.12").write_text("This is no library.")
    metadata = tmp_path / "nvidia_cublas_cu12-12.9.1.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: nvidia-cublas-cu12\nVersion: 12.9.1\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    found = facts.find_libraries()
    assert list(found) == list(cuda_libraries.PACKAGES)
    assert found["libcublasLt.so.12"] == ""
    assert "libcublas.so.12: " in found["libcublas.so.12"]
    script = f"import {cuda_libraries.__name__} as c; c.preload(); print(open('/proc/self/maps').read())"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert str(library) in loaded


def test_the_readme_installs_what_the_doctor_says():
    text = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    command = re.search(r"\.venv/bin/(pip install --extra-index-url.*?[^\\])\n", text, re.DOTALL)[1]
    assert shlex.split(command.replace("\\\n", " ")) == shlex.split(INSTALL_TENSORRT_8)


def test_plugin():
    found = f"libpascalvl_plugin8.so; TensorRT finds {OP_NAME} {OP_VERSION} in it"
    check(trt.check_plugin(PLUGIN, TRT8), State.OK, found)
    for tensorrt in (NONE, TensorRT("8.6.1", "it cannot be imported")):
        untried = trt.check_plugin(PLUGIN, tensorrt)
        check(untried, State.WARNING, "libpascalvl_plugin8.so", "there is no TensorRT to try it in")
    unseen = trt.check_plugin(dataclasses.replace(PLUGIN, problem="TensorRT does not find it"), TRT8)
    check(unseen, State.MISSING, "libpascalvl_plugin8.so, unusable", "TensorRT does not find it: remove cache/kernels-")
    unbuilt = trt.check_plugin(Plugin(None, "the C++ compiler 'g++' was not found: install g++ or set CXX."), TRT8)
    check(unbuilt, State.MISSING, "cannot be compiled", "The C++ compiler 'g++' was not found: install g++")


def test_what_compiles_the_plugin_is_needed_only_until_it_is_compiled():
    unbuilt, compiled = Plugin(), "none; the plugin is compiled already"
    check(machine.check_compiler("bin/g++", unbuilt), State.OK, "bin/g++")
    check(machine.check_compiler(None, PLUGIN), State.OK, compiled)
    check(machine.check_compiler(None, unbuilt), State.WARNING, "none", "install g++, or set CXX")
    check(machine.check_nvrtc("12.9.86", unbuilt), State.OK, "12.9.86")
    check(machine.check_nvrtc("", PLUGIN), State.OK, compiled)
    check(machine.check_nvrtc("", unbuilt), State.WARNING, "none", "pip install 'nvidia-cuda-nvrtc-cu12")


def test_onnxruntime():
    check(machine.check_onnxruntime("1.32.0"), State.OK, "1.32.0, the backend on the CPU")
    check(machine.check_onnxruntime(""), State.WARNING, "not installed", "pip install 'pascalvl[runtime]'")


# Engine bundles -------------------------------------------------------------------------------------------------------


def engine(backend, tensorrt=TRT8, card=GTX1080, driver=DRIVER, plugin=PLUGIN, onnxruntime="1.32.0"):
    return {row.name: row for row in trt.check_engine(backend, tensorrt, card, driver, plugin, onnxruntime)}


def test_engine_that_runs_here():
    rows = engine(BUNDLE)
    names = "TensorRT", "CUDA", "compute capability", "contract", "plugin"
    sources = "sources 0123456789abcdef, here 0123456789abcdef"
    for name, found in zip(names, ("8.6.1", "12.9", "6.1", plugin_build.contract(), sources), strict=True):
        check(rows[f"engine's {name}"], State.OK, found)
    assert len(rows) == len(names)
    # The plugin of other sources runs it, too.
    other = engine({**BUNDLE, "plugin": "fedcba9876543210"})["engine's plugin"]
    check(other, State.OK, "sources fedcba9876543210, here 0123456789abcdef")
    # Minor versions of CUDA run each other's binaries, and `.post1` is the same library.
    assert engine(BUNDLE, TensorRT("8.6.1.post1"), gpu((6, 1), (12, 0))) == rows


@pytest.mark.parametrize(
    ("name", "key", "value", "here"),
    [
        ("TensorRT", "version", "8.6.0", "8.6.1"),
        ("CUDA", "cuda", "14.0", "13.0"),
        ("compute capability", "capability", "8.6", "6.1"),
        ("contract", "contract", "FlashAttention2 1 layout 3", plugin_build.contract()),
    ],
)
def test_engine_for_something_else(name, key, value, here):
    rows = engine({**BUNDLE, key: value})
    row = rows.pop(f"engine's {name}")
    check(row, State.MISSING, value, f"Here it is {here}: build it again here with --backend tensorrt")
    assert {row.state for row in rows.values()} == {State.OK}


def test_engine_with_nothing_to_compare():
    rows = engine(BUNDLE, NONE, None, None, Plugin())
    *of_machine, contract, sources = rows.values()
    for row, found in zip(of_machine, ("8.6.1", "12.9", "6.1"), strict=True):
        check(row, State.WARNING, found, "nothing here to compare it with")
    check(contract, State.OK, plugin_build.contract())
    check(sources, State.OK, "sources 0123456789abcdef, here none")
    *compared, sources = engine({"name": "tensorrt"}).values()
    for row in compared:
        check(row, State.WARNING, "unknown", "does not say: build it again")
    check(sources, State.OK, "sources unknown, here 0123456789abcdef")


def test_engine_of_another_backend():
    check(engine({"name": "torch"})["engine"], State.OK, "for torch, which needs none of TensorRT and its plugin")
    assert engine({"name": "onnxruntime"})["engine"].state is State.OK
    row = engine({"name": "onnxruntime"}, onnxruntime="")["engine"]
    check(row, State.MISSING, "for onnxruntime", "pip install 'pascalvl[runtime]'")


# This machine ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "open_modules"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.183.01  Sun May 12 19:39:15 UTC 2024", False),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  535.183.01  Release Build  (user@host)", True),
    ],
)
def test_driver_by_the_kernel_modules_file(tmp_path, monkeypatch, line, open_modules):
    def absent(_):
        raise OSError

    monkeypatch.setattr(facts.ctypes, "CDLL", absent)
    (tmp_path / "version").write_text(f"{line}\nGCC version:  gcc version 12.3.0\n")
    assert facts.find_driver(tmp_path / "version") == Driver("535.183.01", None, open_modules)
    (tmp_path / "version").write_text("Something else.")
    assert facts.find_driver(tmp_path / "version") is None
    assert facts.find_driver(tmp_path / "absent") is None


def test_driver_by_its_library(tmp_path, monkeypatch):
    """A library with NVML's functions, of its answers on a machine with driver 580.159.04."""
    source = tmp_path / "nvml.c"
    source.write_text(
        "#include <string.h>\n"
        "int nvmlInit_v2(void) { return 0; }\n"
        "int nvmlShutdown(void) { return 0; }\n"
        'int nvmlSystemGetDriverVersion(char* text, unsigned n) { return !strncpy(text, "580.159.04", n); }\n'
        "int nvmlSystemGetCudaDriverVersion_v2(int* version) { return *version = 13000, 0; }\n"
    )
    library = tmp_path / "libnvml.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, source], check=True)
    load = ctypes.CDLL
    monkeypatch.setattr(facts.ctypes, "CDLL", lambda name: load(library if name == "libnvidia-ml.so.1" else name))
    assert facts.find_driver(tmp_path / "absent") == Driver("580.159.04", (13, 0))


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """Put a package ``tensorrt`` with this source where the other process finds it."""

    def make(source: str) -> None:
        (tmp_path / "tensorrt").mkdir()
        (tmp_path / "tensorrt" / "__init__.py").write_text(source)
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))

    return make


@pytest.fixture
def lean(stand_in, tmp_path, monkeypatch):
    """TensorRT's lean runtime under the names of the full one: its plugin registry is the same."""
    spec = importlib.util.find_spec("tensorrt_lean_libs")
    (tmp_path / "libnvinfer.so.10").symlink_to(Path(spec.origin).parent / "libnvinfer_lean.so.10")
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    stand_in("from tensorrt_lean_bindings import *\nfrom tensorrt_lean_bindings import __version__\n")


def test_the_plugin_is_tried_in_tensorrts_registry(lean, tmp_path):
    tensorrt = facts.find_tensorrt()
    assert tensorrt == TRT10
    plugin = facts.find_plugin(tensorrt)
    assert (plugin.library.name, plugin.problem) == ("libpascalvl_plugin10.so", "")

    source = tmp_path / "empty.c"
    source.write_text("int nothing;")
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", tmp_path / "empty.so", source], check=True)
    assert facts.probe(tmp_path / "empty.so")["problem"] == f"TensorRT does not find {OP_NAME} {OP_VERSION} in it"
    (tmp_path / "text.so").write_text("This is no library.")
    assert re.match(r"it cannot be loaded \(.*text\.so", facts.probe(tmp_path / "text.so")["problem"])


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        (
            "raise ImportError('libcudnn.so.8: no such file')",
            r"it cannot be imported \(libcudnn\.so\.8: no such file\)",
        ),
        ("import numpy\nnumpy.no_such_type", r"it cannot be imported \(module 'numpy' has no attribute"),
        ("import os\nos.abort()", "it ends Python with code -6"),
        ("raise ValueError('strange')", "it ends Python with code 1: ValueError: strange"),
    ],
)
def test_tensorrt_that_cannot_be_imported(stand_in, monkeypatch, source, problem):
    stand_in(source)
    monkeypatch.setattr(facts, "installed", lambda *_: "8.6.1.post1")
    tensorrt = facts.find_tensorrt()
    assert tensorrt.version == "8.6.1.post1"
    assert re.match(problem, tensorrt.problem)
    assert not tensorrt.usable


def test_plugin_that_cannot_be_compiled(monkeypatch):
    def fail(error):
        def cached(major, target):
            assert (major, target) == (8, Target.CUDA)
            raise error

        monkeypatch.setattr(plugin_build, "cached", cached)
        return facts.find_plugin(NONE)

    assert fail(UserError("g++ failed:\n  line 1")) == Plugin(None, "g++ failed: line 1")
    assert fail(PermissionError(13, "Permission denied", "plugin.cpp")) == Plugin(
        None, "plugin.cpp cannot be read or written (Permission denied)"
    )


def test_gpu_without_cuda_bindings(monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    found, problem = facts.find_usable_gpu()
    assert found is None
    assert machine.check_gpu(found, problem).remedy == "cuda-bindings, which would tell, is not there: install it."


def test_versions_of_packages():
    assert facts.installed("no-such-package") == ""
    assert facts.installed("no-such-package", "pytest") == pytest.__version__


@without_driver
@without_tensorrt
def test_machine_without_driver_and_tensorrt(capsys):
    rows = {row.name: row for row in doctor.diagnose()}
    assert {name for name, row in rows.items() if row.state is State.MISSING} >= {"NVIDIA driver", "GPU", "TensorRT"}
    check(rows["NVIDIA driver"], State.MISSING, "none", "Install branch 580")
    check(rows["GPU"], State.MISSING, "none that CUDA can use", "No NVIDIA driver was found")
    check(rows["TensorRT"], State.MISSING, "not installed", "tensorrt==8.6.1.post1")
    check(rows["plugin"], State.WARNING, "libpascalvl_plugin8.so", "no TensorRT to try it in")
    assert rows["Python"].found == ".".join(map(str, sys.version_info[:3]))
    assert rows["C++ compiler"].state is rows["NVRTC"].state is rows["onnxruntime"].state is State.OK

    assert main(["doctor"]) == 1
    out, err = capsys.readouterr()
    assert err == ""
    assert out.endswith("the tensorrt backend cannot run here\n")
    for row in rows.values():
        assert re.search(rf"{re.escape(row.name)} .*{row.state.value}", out)
        assert not row.remedy or f"{row.state.value}: {row.name}: {row.remedy}\n" in out


def test_command_where_everything_is_there(monkeypatch, capsys):
    monkeypatch.setattr(
        doctor, "diagnose", lambda manifest: [Row("GPU", "[red]GTX 1080"), Row("x", "y", State.WARNING)]
    )
    assert main(["doctor"]) == 0
    out, _ = capsys.readouterr()
    assert "[red]GTX 1080" in out
    assert out.endswith("the tensorrt backend can run here\n")


def test_command_with_an_engine_bundle(nano_engine_bundle, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(doctor, "find_plugin", lambda _: PLUGIN)
    main(["doctor", "--engine", str(nano_engine_bundle)])
    assert "for onnxruntime, which needs none of TensorRT" in capsys.readouterr().out

    bundle = tmp_path / "engine"
    shutil.copytree(nano_engine_bundle, bundle)
    dataclasses.replace(Manifest.read(bundle, "engine"), backend={**BUNDLE, "version": "7.2.3"}).write(bundle)
    assert main(["doctor", "--engine", str(bundle)]) == 1
    assert "engine's TensorRT" in capsys.readouterr().out

    assert main(["doctor", "--engine", str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "is not a bundle" in err

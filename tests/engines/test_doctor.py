"""`pascalvl doctor`: every state of every check from stand-in facts, and what this machine gives for real."""

import ctypes
import dataclasses
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pascalvl.engines import backends, doctor
from pascalvl.engines.backends import BACKENDS
from pascalvl.engines.device.gpu import INSTALL_TENSORRT_8, Gpu
from pascalvl.engines.doctor import Bundle, Machine, Row, State, facts, frameworks, machine, probe
from pascalvl.engines.doctor import bundle as of_bundle
from pascalvl.engines.doctor import tensorrt as trt
from pascalvl.engines.doctor.facts import Compiled, Driver, Plugin, TensorRT, Torch
from pascalvl.engines.engine import DeviceMemory
from pascalvl.engines.tensorrt import cuda_libraries
from pascalvl.plugins.bundle import Manifest
from pascalvl.plugins.errors import UserError
from pascalvl.plugins.kernels import build as kernels_build
from pascalvl.plugins.kernels.build import Target, cached
from pascalvl.plugins.ops.flash_attention.op import OP_NAME, OP_VERSION
from pascalvl.plugins.tensorrt import build as plugin_build
from pascalvl.runtime.cli import main

ROOT = Path(__file__).parents[2]
GTX1080 = Gpu("NVIDIA GeForce GTX 1080", (6, 1), 8 << 30, 7 << 30, (13, 0))
RTX3090 = dataclasses.replace(GTX1080, name="NVIDIA GeForce RTX 3090", capability=(8, 6))
DRIVER = Driver("580.95.05", (13, 0))
NONE, TRT8, TRT10 = TensorRT(), TensorRT("8.6.1"), TensorRT("10.16.1.11")
KERNELS = Compiled(Path("cache/kernels-0123456789abcdef/libpascalvl.so"))
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
    check(trt.check_python((3, 11, 9), NONE, GTX1080), State.OK, "3.11.9")
    check(trt.check_python((3, 12, 0), TRT10, RTX3090), State.OK, "3.12.0")
    check(trt.check_python((3, 12, 0), NONE, RTX3090), State.OK, "3.12.0")
    for card in (GTX1080, None):
        check(trt.check_python((3, 12, 0), NONE, card), State.WARNING, "3.12.0", "with Python 3.10 or 3.11")


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
def test_libraries_are_judged_by_whether_they_load(name):
    """A package that is there may be another version, or damaged."""
    libraries, package, pin = CUDA_LIBRARIES[name]
    loading = dict.fromkeys(cuda_libraries.PACKAGES, "")
    broken = {**loading, libraries.rpartition(" ")[2]: "libx.so: cannot open shared object file"}
    remedy = f"TensorRT 8.6 needs it (libx.so: cannot open shared object file): pip install {pin}."

    def row(problems, tensorrt, card, version=""):
        packages = {package: version} if version else {}
        return next(row for row in trt.check_libraries(problems, packages, tensorrt, card) if row.name == name)

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
    text = (ROOT / "README.md").read_text(encoding="utf-8")
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


def test_kernels_and_what_compiles_them_until_they_are_compiled():
    unbuilt, compiled = Compiled(), "none; the kernels are compiled already"
    check(machine.check_kernels(KERNELS), State.OK, "libpascalvl.so")
    check(machine.check_kernels(unbuilt), State.OK, "compiled on first use, which takes two minutes")
    others = machine.check_kernels(Compiled(None, "/cache belongs to another user (number 7): remove it."))
    check(others, State.MISSING, "unusable", "What is there cannot be used: /cache belongs to another user")
    check(machine.check_compiler("bin/g++", unbuilt), State.OK, "bin/g++")
    check(machine.check_compiler(None, KERNELS), State.OK, compiled)
    check(machine.check_compiler(None, unbuilt), State.MISSING, "none", "install g++, or set CXX")
    check(machine.check_nvrtc("12.9.86", unbuilt), State.OK, "12.9.86")
    check(machine.check_nvrtc("", KERNELS), State.OK, compiled)
    check(machine.check_nvrtc("", unbuilt), State.MISSING, "none", "pip install 'nvidia-cuda-nvrtc-cu12")


def test_the_emulator():
    compiled = Compiled(Path("cache/libpascalvl_emulated.so"))
    check(frameworks.check_emulator(compiled, None), State.OK, "libpascalvl_emulated.so")
    check(frameworks.check_emulator(Compiled(), "bin/g++"), State.OK, "compiled on first use, in a minute")
    check(frameworks.check_emulator(Compiled(), None), State.MISSING, "not compiled", "install g++, or set CXX")
    unusable = frameworks.check_emulator(Compiled(None, "no home folder."), "bin/g++")
    check(unusable, State.MISSING, "unusable", "What is there cannot be used: no home folder.")


# PyTorch and ONNX Runtime ---------------------------------------------------------------------------------------------


SM61, NEWER = ("sm_50", "sm_60", "sm_70", "sm_75"), ("sm_75", "sm_80", "sm_86", "sm_90")
OF_PYPI = "the last that have are 2.7.1 of PyPI and 2.14.1 of PyTorch's cu126 index: take 2.11 to 2.14.1 from "


@pytest.mark.parametrize(
    ("torch", "card", "state", "remedy"),
    [
        # By what it says itself, on a card: a binary runs on later minor versions, PTX on all that is newer.
        (Torch("2.14.1+cu126", "12.6", "", SM61, "GTX"), "pascal", State.OK, ""),
        (Torch("2.14.1+cu126", "12.6", "", ("sm_50", "compute_60"), "GTX"), "pascal", State.OK, ""),
        (Torch("2.14.1+cu126", "12.6", "", ("sm_50", "sm_62"), "GTX"), "pascal", State.MISSING, OF_PYPI),
        (Torch("2.14.1+cu130", "13.0", "", NEWER, "GTX"), "pascal", State.MISSING, OF_PYPI),
        (Torch("2.20.0+cu126", "12.6", "", SM61, "GTX"), "pascal", State.OK, ""),
        (Torch("2.14.1+cu130", "13.0", "", NEWER, "RTX"), "ampere", State.OK, ""),
        (Torch("2.14.1+cu126", "12.6", "", SM61, "RTX"), "ampere", State.MISSING, "for compute capability 8.6"),
        # By its wheel, where it sees no card.
        (Torch("2.14.1+cu126", "12.6"), "none", State.OK, ""),
        (Torch("2.15.0+cu126", "12.6"), "none", State.WARNING, OF_PYPI),
        (Torch("2.11.0+cu128", "12.8"), "none", State.WARNING, OF_PYPI),
        (Torch("2.7.1", "12.6"), "none", State.WARNING, "made for 2.11 or newer: take 2.11 to 2.14.1"),
        (Torch("2.14.1+cu126", "12.6"), "pascal", State.MISSING, "It sees no GPU, and CUDA does: take 2.11 to"),
        (
            Torch("2.14.1+cpu"),
            "pascal",
            State.MISSING,
            "does not compute on a card: take 2.11 to 2.14.1 from PyTorch's",
        ),
        (Torch("2.14.1+cpu"), "ampere", State.MISSING, "does not compute on a card: install one that is made for it"),
        (Torch("2.14.1+cpu"), "none", State.WARNING, "does not compute on a card: take 2.11 to 2.14.1 from PyTorch's"),
        (Torch("2.14.1", "12.6", problem="it cannot be imported (x)"), "none", State.MISSING, "It cannot be imported"),
        (Torch(), "none", State.MISSING, "pip install 'pascalvl[export,engines]', and for a Pascal card take 2.11 to"),
        (Torch(), "ampere", State.MISSING, "pip install 'pascalvl[export,engines]'."),
    ],
)
def test_torch(torch, card, state, remedy):
    row = frameworks.check_torch(torch, {"pascal": GTX1080, "ampere": RTX3090, "none": None}[card])
    check(row, state, row.found, remedy)
    assert row.found.startswith(torch.version or "not installed")
    assert all(architecture in row.found for architecture in torch.architectures)


def test_the_oldest_torch_is_what_packages_ask_for():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'"torch>={frameworks.OLDEST_TORCH},<' in text


def test_onnxruntime():
    check(frameworks.check_onnxruntime({"onnxruntime": "1.32.0"}), State.OK, "1.32.0, the backend on the CPU")
    check(frameworks.check_onnxruntime({"onnxruntime-gpu": "1.26.0"}), State.OK, "as onnxruntime-gpu")
    check(frameworks.check_onnxruntime({}), State.MISSING, "not installed", "pip install 'onnxruntime>=1.20,<2'")
    both = frameworks.check_onnxruntime({"onnxruntime": "1.32.0", "onnxruntime-gpu": "1.26.0"})
    check(both, State.WARNING, "1.32.0, and onnxruntime-gpu 1.26.0 in its place", "Both are one module: pip uninstall")


@pytest.mark.parametrize(
    ("version", "python", "last"),
    [
        ("1.26.0", (3, 11, 9), ""),
        ("1.27.0", (3, 12, 0), "==1.26.0"),
        ("1.23.2", (3, 10, 1), ""),
        ("1.24.0", (3, 10, 1), "==1.23.2"),
    ],
)
def test_onnxruntime_gpu(version, python, last):
    for card, state in ((GTX1080, State.MISSING), (None, State.WARNING)):
        row = frameworks.check_onnxruntime_gpu(version, python, card)
        check(
            row,
            state if last else State.OK,
            version,
            last and f"pip install onnxruntime-gpu{last}, or use backend cuda",
        )
    check(frameworks.check_onnxruntime_gpu(version, python, RTX3090), State.OK, version)


def test_cudnn():
    check(frameworks.check_cudnn("9.10.2", "1.26.0", GTX1080), State.OK, "9.10.2")
    for card, state in ((GTX1080, State.MISSING), (None, State.WARNING)):
        row = frameworks.check_cudnn("9.11.0", "1.26.0", card)
        check(row, state, "9.11.0", "From 9.11 on it has no code for Pascal: pip install 'nvidia-cudnn-cu12>=9,<9.11'")
    check(frameworks.check_cudnn("9.20.0", "1.32.0", RTX3090), State.OK, "9.20.0")
    none = frameworks.check_cudnn("", "1.26.0", GTX1080)
    check(none, State.MISSING, "none", "onnxruntime-gpu 1.26.0 loads it: pip install 'nvidia-cudnn-cu12>=9,<9.11'")
    old = frameworks.check_cudnn("", "1.18.1", GTX1080)
    check(old, State.OK, "none; onnxruntime-gpu before 1.19 needs cuDNN 8.9 instead")


def test_what_wants_two_environments():
    torch = Torch("2.14.1+cu126", "12.6", "9.10.2.21")
    both = frameworks.check_environment(TRT8, torch, "1.26.0")
    found = "for TensorRT 8.6.1 and onnxruntime-gpu 1.26.0 and torch 2.14.1+cu126"
    check(both, State.WARNING, found, "wants cuDNN 8.9 and onnxruntime-gpu 1.26.0 and torch 2.14.1+cu126 cuDNN 9")
    alone = frameworks.check_environment(TRT8, torch, "")
    check(alone, State.WARNING, "for TensorRT 8.6.1 and torch 2.14.1+cu126", "make an environment for each")
    for tensorrt, other, onnxruntime_gpu in (
        (TRT8, Torch("2.14.1+cpu"), ""),
        (TRT8, Torch("2.3.1", "12.1", "8.9.2.26"), "1.18.1"),
        (TRT10, torch, "1.26.0"),
        (NONE, torch, "1.26.0"),
    ):
        assert frameworks.check_environment(tensorrt, other, onnxruntime_gpu) is None


# Engine bundles -------------------------------------------------------------------------------------------------------


def engine(backend, tensorrt=TRT8, card=GTX1080, driver=DRIVER, plugin=PLUGIN):
    return {row.name: row for row in trt.check_engine(backend, tensorrt, card, driver, plugin)}


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


@pytest.mark.parametrize(
    ("free", "total", "state", "remedy"),
    [
        (4_000_000_000, 8_000_000_000, State.OK, ""),
        (3_999_999_999, 8_000_000_000, State.WARNING, "End what else uses the card (nvidia-smi lists it), or give a"),
        (3_000_000_000, 3_500_000_000, State.WARNING, "more than the card has: give a smaller --context, or build it"),
        (2_000_000_000, 2_500_000_000, State.MISSING, "export the checkpoint with smaller weights (--weights w4)"),
    ],
)
def test_memory_that_a_bundle_needs(nano_engine_bundle, free, total, state, remedy):
    card = dataclasses.replace(GTX1080, free_memory=free, total_memory=total)
    needs = DeviceMemory(2_000_000_000, 1_000_000_000, 600_000_000, 400_000_000)
    needed = "4.00 GB: 2.00 of weights, 1.00 of a cache of 4,096 tokens, 1.00 for steps and a picture"
    found = f"{needed}; {free / 1e9:.2f} GB of {total / 1e9:.2f} GB are free"
    check(of_bundle.check_memory_for(bundle_of(nano_engine_bundle), needs, card), state, found, remedy)


def test_memory_that_is_known_of_any_bundle(nano_engine_bundle):
    bundle = bundle_of(nano_engine_bundle)
    weights = sum((nano_engine_bundle / f"{graph}.onnx.data").stat().st_size for graph in ("vision", "decoder"))
    text = bundle.manifest.model.text
    cache = 4096 * text.num_hidden_layers * text.num_key_value_heads * 2 * text.head_dim * 4
    match = re.fullmatch(
        r"at least (.*) GB: (.*) of weights, (.*) of a cache of 4,096 tokens",
        of_bundle.check_memory_for(bundle, None, None).found,
    )
    together, of_weights, of_cache = map(float, match.groups())
    assert of_cache == pytest.approx(cache / 1e9, abs=0.005)
    assert of_weights == pytest.approx(weights / 1e9, abs=0.005)
    assert together == pytest.approx((weights + cache) / 1e9, abs=0.005)


# What runs ------------------------------------------------------------------------------------------------------------


NO_DRIVER = "no NVIDIA driver was found (libcuda.so.1): install one"
PACKAGES = {"nvidia-cuda-nvrtc-cu12": "12.9.86", "numpy": "2.4.6", "onnxruntime": "1.32.0"}
LOADING = dict.fromkeys(cuda_libraries.PACKAGES, "")


def made_up(**facts) -> Machine:
    """A GTX 1080 with the environment of the runtime, in which backend cuda runs."""
    given = {
        "python": (3, 11, 9),
        "packages": PACKAGES,
        "driver": DRIVER,
        "gpu": GTX1080,
        "compiler": "bin/g++",
        "kernels": KERNELS,
        "unavailable": unavailable(tensorrt="needs the package tensorrt", torch="needs the package torch"),
    }
    return Machine(**{**given, **facts})


def unavailable(**reasons) -> dict[str, str]:
    return {**dict.fromkeys(BACKENDS, ""), **reasons}


def without_card(**facts) -> Machine:
    no_gpu = unavailable(tensorrt="needs the package tensorrt", cuda=NO_DRIVER, torch="needs the package torch")
    return made_up(**{"driver": None, "gpu": None, "gpu_problem": f"{NO_DRIVER}.", "unavailable": no_gpu, **facts})


def bundle_of(directory, **backend) -> Bundle:
    manifest = Manifest.read(directory, "engine")
    return Bundle(directory, dataclasses.replace(manifest, backend=backend or manifest.backend), 4096, 0)


def test_cuda_is_enough():
    found = doctor.judge(made_up())
    assert (found.runs, found.backend, found.auto, found.on_gpu, found.steps) == (True, "cuda", "cuda", True, ())
    assert found.verdict == "backend cuda runs on the GPU here; auto takes cuda"
    names = [section.name for section in found.sections]
    assert names == ["this machine", *(f"backend {name}" for name in ("cuda", "onnxruntime", "torch", "tensorrt"))]
    # Of TensorRT nothing is told but how all of it is installed.
    (python, tensorrt) = found.sections[-1].rows
    assert (python.name, tensorrt.found) == ("Python", "not installed")
    assert "an environment of its own: Python 3.10 or 3.11, NumPy 1, cuDNN 8.9" in found.sections[-1].about


def test_the_shortest_way_to_a_gpu():
    found = doctor.judge(without_card())
    assert (found.runs, found.backend, found.auto, found.on_gpu) == (False, None, "onnxruntime", False)
    assert found.verdict == (
        "no backend runs on a GPU here; auto takes onnxruntime; the shortest way to one is backend cuda"
    )
    assert found.steps == ("Install branch 580, the last that serves Pascal cards.",)
    packages = {name: version for name, version in PACKAGES.items() if name == "onnxruntime"}
    bare = doctor.judge(without_card(packages=packages, kernels=Compiled(), compiler=None))
    first, *others = bare.steps
    assert first == found.steps[0]
    assert [re.search(r"pip install \S+(?=\.)|g\+\+", step)[0] for step in others] == [
        "g++",
        "pip install 'nvidia-cuda-nvrtc-cu12>=12.4,<13'",
    ]
    assert doctor.judge(without_card(unavailable=unavailable(**dict.fromkeys(BACKENDS, "x")))).auto is None


def test_what_auto_takes_may_lack_something():
    """Only `auto` knows what it takes; the rows know more."""
    found = doctor.judge(made_up(kernels=Compiled(), compiler=None))
    assert not found.runs
    assert "auto takes cuda, which lacks C++ compiler; the shortest way to one is backend cuda" in found.verdict
    assert found.steps == ("The kernels are compiled with it, once: install g++, or set CXX.",)
    strange = doctor.judge(made_up(unavailable=unavailable(cuda="strange")))
    assert strange.sections[1].rows[-1] == Row(
        "the backend", "cannot be used", State.MISSING, "It cannot be used here: strange."
    )
    assert not strange.runs


def test_tensorrt_runs_in_its_environment():
    packages = {**PACKAGES, "numpy": "1.26.4"}
    facts = {"tensorrt": TRT8, "plugin": PLUGIN, "libraries": LOADING, "packages": packages}
    found = doctor.judge(made_up(**facts, unavailable=unavailable(torch="x")))
    assert found.verdict == "backends cuda and tensorrt run on the GPU here; auto takes tensorrt"
    assert (found.backend, found.auto) == ("tensorrt", "tensorrt")
    broken = doctor.judge(made_up(**{**facts, "plugin": Plugin(None, "g++ failed.")}, unavailable=unavailable()))
    assert broken.verdict == "backend cuda runs on the GPU here; auto takes tensorrt, which lacks plugin"
    assert broken.backend == "cuda"


def test_torch_on_the_gpu():
    """Which auto never takes."""
    no_cuda = unavailable(cuda="strange", tensorrt="needs the package tensorrt")
    found = doctor.judge(made_up(torch=PASCAL_TORCH, unavailable=no_cuda))
    assert found.verdict == "backend torch runs on the GPU here; auto takes onnxruntime"
    assert (found.runs, found.backend, found.on_gpu) == (True, "torch", True)
    both = doctor.judge(made_up(torch=PASCAL_TORCH, unavailable=unavailable(tensorrt="needs the package tensorrt")))
    assert both.verdict == "backends cuda and torch run on the GPU here; auto takes cuda"


CPU_TORCH = Torch("2.14.1+cpu")
PASCAL_TORCH = Torch("2.14.1+cu126", "12.6", "", SM61, "GTX")


@pytest.mark.parametrize(
    ("backend", "machine", "runs"),
    [
        ("onnxruntime", without_card(), "runs here, on the CPU"),
        ("onnxruntime", without_card(packages={}), "does not run here"),
        ("onnxruntime", without_card(unavailable=unavailable(onnxruntime="libx.so")), "does not run here"),
        ("cuda", made_up(), "runs here, on the GPU"),
        ("cuda", without_card(), "does not run here"),
        ("cuda", made_up(kernels=Compiled(), packages={}), "does not run here"),
        ("torch", without_card(torch=CPU_TORCH, unavailable=unavailable(cuda=NO_DRIVER)), "runs here, on the CPU"),
        ("torch", without_card(torch=CPU_TORCH), "does not run here"),
        ("torch", without_card(torch=CPU_TORCH, unavailable=unavailable(), compiler=None), "does not run here"),
        ("torch", made_up(torch=CPU_TORCH, unavailable=unavailable()), "runs here, on the CPU"),
        ("torch", made_up(torch=PASCAL_TORCH, unavailable=unavailable()), "runs here, on the GPU"),
        ("torch", made_up(torch=Torch("2.14.1", "13.0", "", NEWER, "GTX")), "does not run here"),
        ("reference", without_card(), "runs here, on the CPU"),
        ("reference", made_up(), "runs here, on the GPU"),
        ("reference", made_up(kernels=Compiled(), compiler=None), "does not run here"),
        ("reference", without_card(unavailable=unavailable(reference="needs the package onnx")), "does not run here"),
        ("reference", without_card(unavailable=unavailable(reference="strange")), "does not run here"),
        ("tensorrt", made_up(), "does not run here"),
        ("vulkan", made_up(), "does not run here"),
    ],
)
def test_bundles(nano_engine_bundle, backend, machine, runs):
    found = doctor.judge(machine, bundle_of(nano_engine_bundle, name=backend))
    assert found.verdict == f"the bundle, for backend {backend}, {runs}"
    assert found.runs == runs.startswith("runs")
    assert bool(found.steps) != found.runs
    assert found.backend == backend
    assert found.sections[-1].rows[0].found == f"for {backend}"


def test_a_bundle_that_its_backend_does_not_take(nano_engine_bundle):
    bundle = bundle_of(nano_engine_bundle, name="cuda")
    found = doctor.judge(made_up(), bundle, None, "the plan is for another model: build it again.")
    assert (found.runs, found.steps) == (
        False,
        ("It cannot be opened: the plan is for another model: build it again.",),
    )
    memory = DeviceMemory(9_000_000_000, 1, 1, 1)
    (step,) = doctor.judge(made_up(), bundle, memory).steps
    assert "with smaller weights" in step


def test_a_plan_for_something_else_does_not_run(nano_engine_bundle):
    facts = {"tensorrt": TRT8, "plugin": PLUGIN, "libraries": LOADING, "unavailable": unavailable()}
    assert doctor.judge(made_up(**facts), bundle_of(nano_engine_bundle, **BUNDLE)).runs
    found = doctor.judge(made_up(**facts), bundle_of(nano_engine_bundle, **{**BUNDLE, "version": "8.6.0"}))
    assert (found.runs, found.steps) == (False, ("Here it is 8.6.1: build it again here with --backend tensorrt.",))


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
    assert (
        facts.probe_tensorrt(tmp_path / "empty.so")["problem"] == f"TensorRT does not find {OP_NAME} {OP_VERSION} in it"
    )
    (tmp_path / "text.so").write_text("This is no library.")
    assert re.match(r"it cannot be loaded \(.*text\.so", facts.probe_tensorrt(tmp_path / "text.so")["problem"])


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


def test_versions_of_packages():
    assert facts.installed("no-such-package") == ""
    assert facts.installed("no-such-package", "pytest") == pytest.__version__


@pytest.fixture
def other_packages(tmp_path, monkeypatch):
    """Install a package, of these files, where this process and the others find it before the real one."""
    folder = tmp_path / "packages"
    folder.mkdir()
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.syspath_prepend(folder)

    def install(name: str, version: str, files: dict[str, str], requires: str = "") -> Path:
        metadata = folder / f"{name.replace('-', '_')}-{version}.dist-info" / "METADATA"
        metadata.parent.mkdir()
        wanted = f"Requires-Dist: {requires}\n" if requires else ""
        metadata.write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{wanted}")
        for file, text in files.items():
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_text(text)
        return folder

    return install


TORCH_VERSION = "from typing import Optional\n__version__ = '2.14.1+cu126'\ncuda: Optional[str] = '12.6'\n"
TORCH_CUDA = """
def is_available(): return True
def get_arch_list(): return ["sm_50", "sm_60"]
def get_device_name(): return "NVIDIA GeForce GTX 1080"
"""


def test_torch_for_cuda_is_asked(other_packages):
    files = {"torch/__init__.py": "from torch import cuda", "torch/version.py": TORCH_VERSION}
    files["torch/cuda.py"] = TORCH_CUDA
    folder = other_packages("torch", "2.14.1+cu126", files, 'nvidia-cudnn-cu12==9.10.2.21; sys_platform == "linux"')
    name = "NVIDIA GeForce GTX 1080"
    assert facts.find_torch() == Torch("2.14.1+cu126", "12.6", "9.10.2.21", ("sm_50", "sm_60"), name)
    (folder / "torch" / "cuda.py").write_text("def is_available(): return False")
    assert facts.find_torch() == Torch("2.14.1+cu126", "12.6", "9.10.2.21")
    (folder / "torch" / "__init__.py").write_text("raise ImportError('libcudart.so.12: no such file')")
    assert facts.find_torch().problem == "it cannot be imported (libcudart.so.12: no such file)"
    (folder / "torch" / "__init__.py").write_text("import os\nos.abort()")
    assert facts.find_torch().problem == "it ends Python with code -6"


def test_torch_for_the_cpu_is_not_imported(other_packages):
    version = TORCH_VERSION.replace("'12.6'", "None").replace("cu126", "cpu")
    other_packages("torch", "2.14.1+cpu", {"torch/version.py": version, "torch/__init__.py": "raise SystemExit(9)"})
    assert facts.find_torch() == Torch("2.14.1+cpu")


def test_the_torch_that_is_here():
    import torch

    found = facts.find_torch()
    assert (found.version, found.cuda) == (torch.__version__, torch.version.cuda or "")


def test_cudnn_of_a_package(other_packages, tmp_path):
    assert facts._ask("pascalvl.engines.doctor.probe", "cudnn") == {}
    folder = other_packages("nvidia-cudnn-cu12", "9.10.2.21", {"nvidia/cudnn/lib/x": ""})
    source = tmp_path / "cudnn.c"
    source.write_text("unsigned long cudnnGetVersion(void) { return 91002; }")
    library = folder / "nvidia" / "cudnn" / "lib" / "libcudnn.so.9"
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, source], check=True)
    assert facts._ask("pascalvl.engines.doctor.probe", "cudnn") == {"version": "9.10.2"}


def test_kernels_that_are_compiled(tmp_path, monkeypatch):
    there = cached(Target.EMULATOR)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert facts.find_compiled(Target.EMULATOR) == Compiled()
    folder = tmp_path / "pascalvl" / there.parent.name
    folder.mkdir(mode=0o700, parents=True)
    library = Path(shutil.copy2(there, folder))
    assert facts.find_compiled(Target.EMULATOR) == Compiled(library)
    assert facts.find_compiled(Target.CUDA) == Compiled()
    library.chmod(0o777)
    assert "can be written by other users" in facts.find_compiled(Target.EMULATOR).problem
    monkeypatch.setattr(kernels_build, "PACKAGED", library.parent)  # as a wheel has it
    assert facts.find_compiled(Target.EMULATOR) == Compiled(library)


def test_what_auto_takes_is_what_backends_say():
    reasons = facts.find_machine("reference").unavailable
    assert {*backends.AUTOMATIC, "reference"} <= reasons.keys()
    assert reasons == {name: backends.unavailable(name) for name in reasons}
    taken, skipped = backends.automatic(reasons.get)
    assert (taken, skipped) == backends.automatic()


@without_driver
@without_tensorrt
def test_machine_without_driver_and_tensorrt(tmp_path, capsys):
    found = doctor.diagnose()
    rows = {row.name: row for section in found.sections for row in section.rows}
    assert {name for name, row in rows.items() if row.state is State.MISSING} == {"NVIDIA driver", "GPU", "TensorRT"}
    check(rows["NVIDIA driver"], State.MISSING, "none", "Install branch 580")
    check(rows["GPU"], State.MISSING, "none that CUDA can use", "No NVIDIA driver was found")
    check(rows["TensorRT"], State.MISSING, "not installed", "tensorrt==8.6.1.post1")
    assert rows["Python"].found == ".".join(map(str, sys.version_info[:3]))
    assert "plugin" not in rows

    assert main(["doctor"]) == 1
    out, err = capsys.readouterr()
    assert err == ""
    assert out.startswith(f"{found.verdict}:\n1. Install branch 580, the last that serves Pascal cards.\n")
    for row in rows.values():
        assert re.search(rf"{re.escape(row.name)} .*{row.state.value}", out)
        assert not row.remedy or f"{row.name}: {row.remedy}\n" in out or f"1. {row.remedy}\n" in out

    file = tmp_path / "doctor.json"
    assert main(["doctor", "--json", str(file)]) == 1
    assert capsys.readouterr().out == out
    assert main(["doctor", "--json", "-"]) == 1
    told = capsys.readouterr().out
    assert told == file.read_text(encoding="utf-8")
    content = json.loads(told)
    assert (content["runs"], content["backend"], content["auto"]) == (False, None, "onnxruntime")
    assert (content["verdict"], content["steps"]) == (found.verdict, list(found.steps))
    assert content["sections"][0]["rows"][0] == {
        "name": "NVIDIA driver",
        "found": "none",
        "state": "missing",
        "remedy": "Install branch 580, the last that serves Pascal cards.",
    }


def test_command_where_cuda_runs(monkeypatch, capsys):
    card = dataclasses.replace(GTX1080, name="[red]GTX 1080")
    monkeypatch.setattr(doctor, "find_machine", lambda _: made_up(gpu=card))
    assert main(["doctor"]) == 0
    out, _ = capsys.readouterr()
    assert out.startswith("backend cuda runs on the GPU here; auto takes cuda\n")
    assert "[red]GTX 1080" in out
    assert "missing: backend tensorrt: TensorRT: Install it: pip install" in out


def test_command_with_an_engine_bundle(nano_engine_bundle, tmp_path, monkeypatch, capsys):
    assert main(["doctor", "--engine", str(nano_engine_bundle)]) == 0
    assert capsys.readouterr().out.startswith("the bundle, for backend onnxruntime, runs here, on the CPU\n")

    monkeypatch.setattr(facts, "find_plugin", lambda _: PLUGIN)
    bundle = tmp_path / "engine"
    shutil.copytree(nano_engine_bundle, bundle)
    dataclasses.replace(Manifest.read(bundle, "engine"), backend={**BUNDLE, "version": "7.2.3"}).write(bundle)
    assert main(["doctor", "--engine", str(bundle)]) == 1
    out = capsys.readouterr().out
    assert out.startswith("the bundle, for backend tensorrt, does not run here:\n1. ")
    assert "engine's TensorRT" in out

    assert main(["doctor", "--engine", str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "is not a bundle" in err


@without_driver
def test_memory_where_there_is_no_gpu(nano_engine):
    bundle = bundle_of(nano_engine("k8v8", "cuda"))
    needs, problem = facts.find_memory(bundle)
    assert needs is None
    assert "backend cuda cannot run here: no NVIDIA" in problem


def test_memory_as_the_backend_tells_it(nano_engine, cuda_anywhere):
    bundle = bundle_of(nano_engine("k8v8", "cuda"))
    report = json.loads(json.dumps(probe.memory(str(bundle.directory), str(bundle.slots))))
    (expected,) = backends.device_memory(bundle.directory, bundle.manifest, [bundle.slots])
    assert DeviceMemory(**report) == expected
    assert expected.weights > 0 < expected.cache

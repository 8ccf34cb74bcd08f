"""What is installed, and what is not: wheel and source distribution against the repository's folders; an answer from
the wheel alone."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("engines", "export", "plugins", "runtime")
WITHOUT_INSTALLATION = ("examples", "tests")
TOP = (
    *(".clang-format", "CHANGELOG.md", "CONTRIBUTING.md", "Dockerfile", "LICENSE", "MANIFEST.in", "Makefile"),
    *("README.md", "pyproject.toml"),
)
SUFFIXES = (".py", ".cu", ".cuh", ".cpp", ".h", ".html")
TYPED = "py.typed"
PACKAGING = "plugins/packaging/"
LIBRARIES = {f"pascalvl/plugins/native/libpascalvl{name}.so" for name in ("", "_plugin8", "_plugin10")}
GLIBC = (2, 28)
BUILD = "import backend; backend.build_sdist('dist'); backend.build_wheel('dist')"
MOST_MB = 215
"""Of an environment with the wheel: NumPy and ONNX Runtime take 133 of it."""
USE = """
from pascalvl.engines import build
from pascalvl.export import export_checkpoint
from pascalvl.plugins.kv_format import CacheConfig
from pascalvl.runtime import Model, VisionLanguageModel

model = VisionLanguageModel.open("bundle", cache=CacheConfig.parse("k8v8"))
for piece in model.generate("What is it?"):
    print(piece)
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """The folder of both, made of a copy in which `make kernels` and a test run have left what they leave."""
    copy = tmp_path_factory.mktemp("packaging") / "pascalvl"
    kept = {"ignore": shutil.ignore_patterns("__pycache__"), "dirs_exist_ok": True}
    for folder in (*FOLDERS, *WITHOUT_INSTALLATION):
        shutil.copytree(ROOT / folder, copy / folder, **kept)
    for name in TOP:
        shutil.copyfile(ROOT / name, copy / name)
    recipe = subprocess.run(["make", "-n", "kernels", "plugin"], cwd=copy, capture_output=True, text=True, check=True)
    libraries = [word for word in recipe.stdout.split() if word.endswith(".so")]
    assert len(libraries) == 2, recipe.stdout
    for library in (*libraries, "build/cache/pascalvl/kernels-0/libpascalvl.so"):
        (copy / library).parent.mkdir(parents=True, exist_ok=True)
        (copy / library).write_bytes(b"\x7fELF")
    environment = {name: value for name, value in os.environ.items() if name != "CXX"}
    environment["PYTHONPATH"] = str(copy / PACKAGING)
    done = subprocess.run([sys.executable, "-c", BUILD], cwd=copy, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return copy / "dist"


@pytest.fixture(scope="module")
def wheel(built) -> Path:
    (wheel,) = built.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def sources() -> set[str]:
    files = (file for folder in FOLDERS for file in (ROOT / folder).rglob("*"))
    return {file.relative_to(ROOT).as_posix() for file in files if file.suffix in SUFFIXES or file.name == TYPED}


def test_a_wheel_holds_the_sources_and_the_libraries(wheel, sources):
    with zipfile.ZipFile(wheel) as archive:
        files = {name for name in archive.namelist() if not name.startswith("pascalvl-0.1.0.dist-info/")}
        metadata = message_from_bytes(archive.read("pascalvl-0.1.0.dist-info/METADATA"))
        licences = {name for name in archive.namelist() if "/licenses/" in name}
    installed = {f"pascalvl/{source}" for source in sources if not source.startswith(PACKAGING)}
    assert files == installed | LIBRARIES
    assert {Path(name).name for name in licences} == {"LICENSE", "NOTICE"}
    assert metadata["License-Expression"] == "Apache-2.0 AND (Apache-2.0 WITH LLVM-exception)"
    assert metadata["Keywords"]
    assert "Programming Language :: Python :: 3.10" in metadata.get_all("Classifier")


def test_a_wheel_serves_where_its_tag_says(wheel):
    """By the versions of the symbols of glibc that its libraries ask for."""
    assert wheel.name == "pascalvl-0.1.0-py3-none-manylinux_{}_{}_x86_64.whl".format(*GLIBC)
    command = [sys.executable, "-m", "auditwheel", "show", str(wheel)]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r'platform tag:\s+"manylinux_(\d+)_(\d+)_x86_64"', told)
    assert found, told
    assert tuple(map(int, found.groups())) <= GLIBC


def test_a_source_distribution_holds_what_tests_need_too(built, sources):
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        files = {Path(*Path(member.name).parts[1:]).as_posix() for member in archive if member.isfile()}
    of_the_project = {file for file in files if not file.startswith("pascalvl.egg-info/")}
    more = (file for folder in WITHOUT_INSTALLATION for file in (ROOT / folder).rglob("*") if file.is_file())
    more = {file for file in more if "__pycache__" not in file.parts}
    notes = {"plugins/bench/README.md", "plugins/kernels/sm61.md", f"{PACKAGING}NOTICE"}
    expected = sources | {file.relative_to(ROOT).as_posix() for file in more} | notes | set(TOP)
    assert of_the_project - {"PKG-INFO", "setup.cfg"} == expected


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """The folder of programs of an environment with the wheel, and with what pip takes with it, alone."""
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder, with_pip=True)
    command = [folder / "bin/python", "-m", "pip", "install", "--quiet", "--no-compile", wheel]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder / "bin"


def alone(installed: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """A program of that environment, which finds no compiler and none of this environment's or this user's files."""
    environment = {"PATH": str(installed), "HOME": str(installed.parent / "home")}
    program, *arguments = command
    return subprocess.run(
        [installed / program, *arguments], env=environment, capture_output=True, text=True, check=False
    )


def test_a_wheel_answers_where_there_is_no_compiler(installed, nano_engine_bundle):
    question = ["--image", str(ROOT / "tests/nano/pictures/sample.png"), "--prompt", "Describe the picture."]
    command = ["run", str(nano_engine_bundle), *question]
    found = alone(installed, "pascalvl", *command)
    assert found.returncode == 0, found.stderr
    script = "import sys; from pascalvl.runtime.cli import main; sys.exit(main())"
    here = subprocess.run([sys.executable, "-c", script, *command], capture_output=True, text=True, check=True)
    assert found.stdout == here.stdout
    assert "grid" in found.stdout


def test_its_libraries_load(installed):
    """And are taken, where a checkout would compile."""
    script = """
from pascalvl.plugins.kernels.build import Target, cached
from pascalvl.plugins.kernels.library import KernelLibrary
from pascalvl.plugins.tensorrt import build
for library in (cached(Target.CUDA), *(build.cached(major, Target.CUDA) for major in build.MAJORS)):
    KernelLibrary(library)
    print(library)
"""
    found = alone(installed, "python", "-c", script)
    assert found.returncode == 0, found.stderr
    site = next(installed.parent.glob("lib/python*/site-packages"))
    assert {str(Path(line).relative_to(site)) for line in found.stdout.split()} == LIBRARIES


def test_the_environment_is_small(installed):
    site = next(installed.parent.glob("lib/python*/site-packages"))
    files = (file for file in site.rglob("*") if file.is_file() and file.suffix != ".pyc")
    packages = [file for file in files if file.relative_to(site).parts[0].split("-")[0] not in ("pip", "setuptools")]
    assert sum(file.stat().st_size for file in packages) < MOST_MB * 1e6
    assert not (site / "cuda").exists()


def test_a_type_checker_knows_what_a_wheel_holds(installed, tmp_path):
    """In an environment with that alone: it reads the types, and so finds what is wrong."""
    (tmp_path / "use.py").write_text(USE)
    command = [sys.executable, "-m", "mypy", "--python-executable", installed / "python", "use.py"]
    found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    errors = re.findall(r"^use\.py:(\d+): error: .* \[(.*)\]$", found.stdout, re.MULTILINE)
    assert errors == [("5", "attr-defined"), ("8", "arg-type")], found.stdout + found.stderr

"""What is installed, and what is not: wheel and source distribution against the repository's folders."""

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("engines", "export", "plugins", "runtime")
SUFFIXES = (".py", ".cu", ".cuh", ".cpp", ".h")
BUILD = "import setuptools.build_meta as backend; backend.build_sdist('dist'); backend.build_wheel('dist')"


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """The folder of both, made of a copy in which `make kernels` and a test run have left what they leave."""
    copy = tmp_path_factory.mktemp("packaging") / "pascalvl"
    kept = {"ignore": shutil.ignore_patterns("__pycache__"), "dirs_exist_ok": True}
    for folder in (*FOLDERS, "tests"):
        shutil.copytree(ROOT / folder, copy / folder, **kept)
    for name in ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "Makefile"):
        shutil.copyfile(ROOT / name, copy / name)
    recipe = subprocess.run(["make", "-n", "kernels", "plugin"], cwd=copy, capture_output=True, text=True, check=True)
    libraries = [word for word in recipe.stdout.split() if word.endswith(".so")]
    assert len(libraries) == 2, recipe.stdout
    for library in (*libraries, "build/cache/pascalvl/kernels-0/libpascalvl.so"):
        (copy / library).parent.mkdir(parents=True, exist_ok=True)
        (copy / library).write_bytes(b"\x7fELF")
    subprocess.run([sys.executable, "-c", BUILD], cwd=copy, capture_output=True, check=True)
    return copy / "dist"


@pytest.fixture(scope="module")
def sources() -> set[str]:
    files = (file for folder in FOLDERS for file in (ROOT / folder).rglob("*"))
    return {file.relative_to(ROOT).as_posix() for file in files if file.suffix in SUFFIXES}


def test_a_wheel_holds_the_sources_alone(built, sources):
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        files = {name for name in archive.namelist() if not name.startswith("pascalvl-0.1.0.dist-info/")}
    assert files == {f"pascalvl/{source}" for source in sources}


def test_a_source_distribution_holds_what_a_wheel_is_made_of(built, sources):
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        files = {Path(*Path(member.name).parts[1:]).as_posix() for member in archive if member.isfile()}
    of_the_project = {file for file in files if not file.startswith("pascalvl.egg-info/")}
    generated = {"PKG-INFO", "setup.cfg"}
    assert of_the_project - generated == sources | {"pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"}

"""Libraries in the user's cache folder: nobody else puts one there, and processes do not disturb each other."""

import ctypes
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from pascalvl.plugins.errors import UserError
from pascalvl.plugins.kernels.build import cached_file, compile_library
from pascalvl.plugins.user_cache import cache_folder, open_cache_folder

NAME = "liban answer.so"
BUILDER = """
import ctypes, pathlib, sys, time
from pascalvl.plugins.kernels.build import cached_file, compile_library

source, started, seconds = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), float(sys.argv[3])

def make(library):
    partial = library.with_name(f".{library.name}.partial-0")
    partial.mkdir()
    (partial / "half").touch()
    with started.open("a") as log:
        print("made", file=log)
    time.sleep(seconds)
    (partial / "half").unlink()
    partial.rmdir()
    compile_library(library, [source])

print(ctypes.CDLL(str(cached_file(NAME, [source], make))).answer())
""".replace("NAME", repr(NAME))


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "pascalvl"


@pytest.fixture
def source(tmp_path) -> Path:
    path = tmp_path / "answer.cpp"
    path.write_text('extern "C" int answer() { return 42; }\n', encoding="utf-8")
    return path


def library_of(source: Path) -> Path:
    return cached_file(NAME, [source], lambda library: compile_library(library, [source]))


def builder(source: Path, seconds: float) -> subprocess.Popen:
    """A process that wants the library, and takes so long to make it."""
    command = [sys.executable, "-c", BUILDER, str(source), str(source.with_name("started")), str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def answer(process: subprocess.Popen) -> str:
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    return out.strip()


def wait_until_started(source: Path, process: subprocess.Popen) -> None:
    started = source.with_name("started")
    while not started.exists():
        assert process.poll() is None, process.stderr.read()


# Whose it is ----------------------------------------------------------------------------------------------------------


def test_folders_are_made_for_the_user_alone(cache, source):
    before = os.umask(0)
    try:
        library = library_of(source)
    finally:
        os.umask(before)
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in (cache.parent, cache, library.parent, library)}
    assert modes == dict.fromkeys((cache.parent, cache, library.parent), 0o700) | {library: 0o755}
    assert ctypes.CDLL(str(library)).answer() == 42


@pytest.mark.parametrize("mode", [0o020, 0o002])
@pytest.mark.parametrize("above", [0, 1, 2], ids=["library", "folder", "cache"])
def test_what_others_can_write_is_not_loaded(cache, source, above, mode):
    library = library_of(source)
    path = [library, *library.parents][above]
    path.chmod(0o700 | mode)
    with pytest.raises(UserError) as error:
        library_of(source)
    assert f"{path} can be written by other users (mode {0o700 | mode:o})" in str(error.value)
    assert "remove it, run chmod go-w on it if" in str(error.value)
    path.chmod(0o700)
    assert library_of(source) == library


@pytest.mark.parametrize("above", [0, 1, 2], ids=["library", "folder", "cache"])
def test_what_another_user_owns_is_not_loaded(cache, source, monkeypatch, above):
    library = library_of(source)
    path = [library, *library.parents][above]
    if os.geteuid() == 0:
        os.chown(path, 12345, -1)
    else:  # nothing can be given away: this process is somebody else
        path, owner = cache, os.geteuid()
        monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    with pytest.raises(UserError, match=r"belongs to another user \(number \d+\), .* remove it, or set XDG") as error:
        library_of(source)
    assert str(path) in str(error.value)


def test_a_relative_cache_home_is_ignored(tmp_path, source, monkeypatch):
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(home))
    for relative in ("cache", "./cache", "../cache", ""):
        monkeypatch.setenv("XDG_CACHE_HOME", relative)
        assert cache_folder() == home / ".cache" / "pascalvl"
    assert home in library_of(source).parents
    assert sorted(path.name for path in tmp_path.iterdir()) == ["answer.cpp", "home"]


def test_a_file_in_the_place_of_the_folder(cache):
    cache.parent.mkdir()
    cache.touch()
    with pytest.raises(OSError, match="Not a directory"):
        open_cache_folder("kernels")


# Several processes ----------------------------------------------------------------------------------------------------


def test_of_two_processes_one_builds_and_both_have_it(cache, source):
    first = builder(source, 1)
    wait_until_started(source, first)
    second = builder(source, 0)
    assert answer(second) == answer(first) == "42"
    assert source.with_name("started").read_text() == "made\n"
    assert {path.name for path in library_of(source).parent.iterdir()} == {NAME, f".{NAME}.lock"}


def test_a_builder_that_is_killed_leaves_no_lock_and_nothing_half_made(cache, source):
    killed = builder(source, 600)
    wait_until_started(source, killed)
    waiting = builder(source, 0)
    (folder,) = cache.iterdir()
    assert not (folder / NAME).exists()
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert answer(waiting) == "42"
    assert source.with_name("started").read_text() == "made\n" * 2
    assert {path.name for path in folder.iterdir()} == {NAME, f".{NAME}.lock"}


def test_a_builder_that_fails_leaves_the_next_one_to_try(cache, source):
    def make(library: Path) -> None:
        library.with_name(f".{NAME}.partial-0").mkdir()
        raise UserError("no compiler")

    with pytest.raises(UserError, match="no compiler"):
        cached_file(NAME, [source], make)
    library = library_of(source)
    assert ctypes.CDLL(str(library)).answer() == 42
    assert {path.name for path in library.parent.iterdir()} == {NAME, f".{NAME}.lock"}

"""From a name, a checkpoint or a model bundle to an answer, in one command, and what is kept for the next one."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import pytest
from huggingface_hub import constants

from pascalvl.engines.device import gpu
from pascalvl.plugins.bundle import Manifest
from pascalvl.runtime.cli import main
from pascalvl.runtime.cli.sources import HubName, path_or_name
from tests.hub_server import COMMIT, REPO, Hub, serving
from tests.test_cli_errors import COMMAND, check_sentence

QUESTION = ("--image", str(Path(__file__).parent / "nano" / "pictures" / "sample.png"), "--prompt", "How many squares?")
LARGE = "model-00001-of-00002.safetensors"
NEWER = COMMIT[::-1]
DiskUsage = namedtuple("DiskUsage", "total used free")


class User:
    """Somebody who has nothing yet, and runs commands."""

    def __init__(self, home: Path, url: str, watch: Path) -> None:
        self.cache, self.network = home / "cache" / "pascalvl", home / "network"
        given = {"XDG_CACHE_HOME": str(home / "cache"), "HF_HOME": str(home / "hf"), "HF_ENDPOINT": url}
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")} | given
        self.watched = {"LD_PRELOAD": str(watch), "NETWORK_WATCH": str(self.network)}

    def start(self, *arguments: object, **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*COMMAND, *map(str, arguments)],
            env=self.environment | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *arguments: object, **environment: str) -> tuple[str, str]:
        """Returns what a command that succeeds says on stdout, and on stderr."""
        process = self.start(*arguments, **environment)
        out, err = process.communicate()
        assert process.returncode == 0, err
        return out, err

    def bundles(self) -> list[Path]:
        """What is kept, and nothing else may be."""
        folders = sorted(path for path in self.cache.glob("models/*/*") if path.is_dir())
        assert all((folder / "manifest.json").exists() for folder in folders), folders
        return folders


@pytest.fixture(scope="module")
def answer(nano_engine) -> str:
    """That of an engine bundle which was exported and built by hand."""
    command = [*COMMAND, "run", str(nano_engine("k8v8")), *QUESTION]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def hub(nano_checkpoint):
    with serving(nano_checkpoint) as hub:
        yield hub


@pytest.fixture(scope="module")
def user(hub, tmp_path_factory, network_watch) -> User:
    return User(tmp_path_factory.mktemp("user"), hub.url, network_watch)


@pytest.fixture(scope="module")
def first(hub: Hub, user: User) -> str:
    """What the first use by name says on stderr, after another one that was interrupted while it downloaded."""
    import threading

    hub.cut_at, hub.stalled = {LARGE: (10 << 20) + 200_000}, threading.Event()
    process = user.start("run", REPO, *QUESTION)
    while not any(path.stat().st_size for path in (user.cache.parents[1] / "hf").glob("**/*.incomplete")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    hub.stalled.set()
    hub.stalled = None
    assert process.returncode not in (0, None)
    assert out == ""
    assert err.endswith("interrupted; nothing was left half-written\n")
    assert user.bundles() == []
    out, err = user.run("run", REPO, *QUESTION)
    assert hub.ranges(LARGE) == [None, f"bytes={10 << 20}-"]
    for asked in hub.requests:  # nothing but the model is asked for, and nothing told of what is installed
        assert REPO in asked.path or asked.path.startswith("/cdn/"), asked
        assert "torch" not in asked.headers["user-agent"]
    (user.cache / "answer").write_text(out)
    return err


def test_from_a_name_to_an_answer(user, first, answer):
    assert (user.cache / "answer").read_text() == answer
    for told in (f"downloading {REPO}", "weights: f32, the most", f"exporting {REPO}", f"building {REPO} for backend"):
        assert told in first
    (bundle,) = user.bundles()
    assert f"{bundle} (45.5 MB) is kept" in first
    manifest = Manifest.read(bundle, "engine")
    assert manifest.source["name"] == REPO
    manifest.verify(bundle)


def test_later_uses_find_what_was_built_without_a_network(user, first, hub, answer):
    hub.requests.clear()
    out, err = user.run("run", REPO, *QUESTION, **user.watched)
    assert out == answer
    assert re.fullmatch(r"\d+ prompt tokens[^\n]*\n", err)
    assert hub.requests == []
    assert not user.network.exists(), user.network.read_text()


def test_what_a_name_means_changes_only_when_that_is_asked_for(user, first, hub, answer, monkeypatch):
    hub.requests.clear()
    out, err = user.run("run", REPO, "--refresh", *QUESTION)
    assert out == answer
    assert f"{REPO} is the commit {COMMIT[:12]} still" in err
    assert not any(asked.method == "GET" and "/resolve/" in asked.path for asked in hub.requests)
    before = user.bundles()
    monkeypatch.setattr(hub, "commit", NEWER)
    monkeypatch.setitem(hub.files, "config.json", b'{"model_type": "llava"}')
    process = user.start("run", REPO, "--refresh", *QUESTION)
    check_sentence(process.communicate()[1], "expected a dense Qwen3-VL checkpoint .* found 'llava'")
    assert process.returncode == 2
    assert user.run("run", REPO, *QUESTION)[0] == answer
    assert user.bundles() == before


def test_another_cache_is_another_bundle_and_what_was_killed_is_made_again(user, first, hub):
    """Of the same commit, whose checkpoint is here: the hub is not asked."""
    (before,) = user.bundles()
    hub.requests.clear()
    arguments = "run", REPO, "--kv", "k8v4,window=64+1024", *QUESTION
    process = user.start(*arguments)
    while not list(user.cache.glob("models/*/.model-*.partial/decoder.onnx.data")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.kill()
    process.communicate()
    assert [path for path in user.cache.glob("models/*/*") if path.is_dir() and "partial" not in path.name] == [before]
    _, err = user.run(*arguments)
    assert f"exporting {REPO}" in err
    assert hub.requests == []
    (after,) = set(user.bundles()) - {before}
    assert str(Manifest.read(after, "engine").kv_cache) == "k8v4"
    _, err = user.run("run", REPO, "--kv", "k8v4", *QUESTION)  # windows are chosen at each run
    assert "exporting" not in err


def test_of_two_processes_one_makes_it(user, nano_checkpoint, tmp_path, answer):
    """Of a checkpoint's folder, which needs no network."""
    checkpoint = tmp_path / "Nano"
    shutil.copytree(nano_checkpoint, checkpoint)
    cache = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    processes = [user.start("run", checkpoint, *QUESTION, **cache, **user.watched) for _ in range(2)]
    said = [process.communicate() for process in processes]
    assert [out for out, _ in said] == [answer, answer]
    assert sorted(f"exporting {checkpoint}" in err for _, err in said) == [False, True]
    assert sum("waiting for another process" in err for _, err in said) == 1
    (bundle,) = (path for path in (tmp_path / "cache").glob("pascalvl/models/*/*") if path.is_dir())
    assert Manifest.read(bundle, "engine").source["name"] == "Nano"
    assert not user.network.exists(), user.network.read_text()


def test_a_model_bundle_is_built(user, nano_model_bundle, tmp_path, answer):
    """Anew, when it is another one."""
    model = tmp_path / "model"
    shutil.copytree(nano_model_bundle, model)
    before = user.bundles()
    said = [user.run("run", model, *QUESTION) for _ in range(2)]
    assert [out for out, _ in said] == [answer, answer]
    assert [f"building {model} for backend onnxruntime" in err for _, err in said] == [True, False]
    (bundle,) = set(user.bundles()) - set(before)
    (bundle / "manifest.json").write_text("{")
    out, err = user.run("run", model, *QUESTION)
    assert out == answer
    assert f"building {model}" in err
    assert bundle in user.bundles()


# In this process ------------------------------------------------------------------------------------------------------


@pytest.fixture
def here(hub, user, first, monkeypatch):
    """Let this process be the user, who has downloaded the checkpoint."""
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(user.cache.parents[1] / "hf" / "hub"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(user.cache.parent))
    return user


def refused(capsys, match: str, *arguments: object) -> None:
    assert main([str(argument) for argument in arguments]) == 2
    check_sentence(capsys.readouterr().err.splitlines(keepends=True)[-1], match)


def test_an_export_by_name(here, hub, tmp_path, capsys):
    hub.requests.clear()
    assert main(["export", REPO, "--output", str(tmp_path / "model")]) == 0
    assert f"model bundle of {REPO}" in capsys.readouterr().out
    assert any("/api/" in asked.path for asked in hub.requests)  # whether there is a newer one
    manifest = Manifest.read(tmp_path / "model", "model")
    assert manifest.source["sha256"] == Manifest.read(here.bundles()[0], "engine").source["sha256"]


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("Qwen/Qwen3-VL-2B-Instruct", HubName("Qwen/Qwen3-VL-2B-Instruct")),
        ("Qwen/Qwen3-VL-2B-Instruct@refs/pr/1", HubName("Qwen/Qwen3-VL-2B-Instruct", "refs/pr/1")),
        ("there/is@main", HubName("there/is", "main")),
        ("there/is", Path("there/is")),
        ("there/folder", Path("there/folder")),
        ("./Qwen/Qwen3-VL-2B-Instruct", Path("Qwen/Qwen3-VL-2B-Instruct")),
        ("/Qwen/Qwen3-VL-2B-Instruct", Path("/Qwen/Qwen3-VL-2B-Instruct")),
        ("Qwen/a/b", Path("Qwen/a/b")),
        ("Qwen/", Path("Qwen")),
        ("Qwen", Path("Qwen")),
        ("../Qwen", Path("../Qwen")),
        ("a--b/c", Path("a--b/c")),
        ("a/b.git", Path("a/b.git")),
        ("a/b..c", Path("a/b..c")),
        ("a/b@", Path("a/b@")),
        ("ä/b", Path("ä/b")),
    ],
)
def test_names_and_paths(argument, expected, tmp_path, monkeypatch):
    (tmp_path / "there" / "folder").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert path_or_name(argument) == expected


def test_what_is_neither(tmp_path, monkeypatch, capsys):
    (tmp_path / "build").mkdir()
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    match = (
        r"no directory build/2b: expected the engine bundle .* or the name of a model on the Hugging Face hub, ORG/NAME"
    )
    refused(capsys, match, "run", "build/2b", *QUESTION)
    refused(capsys, "empty is not a bundle", "chat", "empty")
    refused(
        capsys,
        "no checkpoint directory at build/2b: .* or its name .*, ORG/NAME",
        "export",
        "build/2b",
        "--output",
        "o",
    )
    refused(capsys, "--random takes the tokenizer alone", "export", "a/b", "--random", "2B", "--output", "o")


def test_options_for_something_else(nano_engine, nano_model_bundle, nano_checkpoint, capsys):
    for bundle in (nano_engine("k8v8"), nano_model_bundle):
        match = r"has its weights in a format already \(f32\), which --weights cannot change: .* give the checkpoint"
        refused(capsys, match, "run", bundle, "--weights", "w8", *QUESTION)
    refused(capsys, "--refresh asks the hub .* is a folder", "run", nano_checkpoint, "--refresh", *QUESTION)


def test_packages_that_are_not_installed(here, hub, monkeypatch, capsys, nano_model_bundle, tmp_path):
    """What was built needs none of them; the rest is told before anything is downloaded."""
    hub.requests.clear()
    monkeypatch.setitem(sys.modules, "torch", None)
    match = r"has to be made into an engine bundle first, .* package torch: pip install 'pascalvl\[export,engines\]'"
    refused(capsys, f"{REPO} {match}", "run", REPO, "--kv", "f16", *QUESTION)
    assert main(["run", REPO, *QUESTION]) == 0
    monkeypatch.setitem(sys.modules, "onnx", None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    refused(capsys, r"package onnx: pip install", "run", nano_model_bundle, *QUESTION)
    assert hub.requests == []


def test_a_disk_that_is_too_small(here, hub, monkeypatch, capsys, tmp_path, nano_checkpoint, nano_model_bundle):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: DiskUsage(10**9, 10**9, 10**6))
    match = (
        r"the disk of .* has 1.0 MB free, and \d+.\d MB are needed for .*: free some space, set HF_HOME and XDG_CACHE"
    )
    refused(capsys, match, "run", REPO, "--kv", "f16", *QUESTION)
    refused(capsys, match, "run", nano_checkpoint, *QUESTION)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    refused(capsys, match, "run", nano_model_bundle, *QUESTION)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    hub.requests.clear()
    refused(capsys, match, "export", REPO, "--output", tmp_path / "model")
    assert not hub.ranges(LARGE)


def test_a_card_that_is_too_small(here, hub, monkeypatch, capsys, tmp_path):
    """It is told before the weights are downloaded."""
    from pascalvl.engines.cuda import backend

    monkeypatch.setattr(gpu, "find_gpu", lambda: gpu.Gpu("GT 1030", (6, 1), 600_000_000, 0, (12, 9)))
    monkeypatch.setattr(backend, "find_gpu", gpu.find_gpu)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    hub.requests.clear()
    match = "GT 1030 has 0.6 GB of memory, and even in 4 bits this model takes"
    refused(capsys, match, "run", REPO, "--backend", "cuda", *QUESTION)
    assert not hub.ranges(LARGE)

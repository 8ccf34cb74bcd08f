"""Commands keep to themselves: they open no connection, and leave nothing in the user's folders that is not told."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pascalvl.plugins.kernels.build import Target
from pascalvl.plugins.tensorrt import build as plugin_build

SCRIPT = "import sys; from pascalvl.runtime.cli import main; sys.exit(main())"
PICTURE = Path(__file__).parent / "nano" / "pictures" / "sample.png"
LINGER = "import atexit, time; atexit.register(time.sleep, 1); "
"""Time in which a library's own threads come to what they wait with."""


@pytest.fixture
def watched(network_watch, tmp_path):
    """Run a script of Python as a new user would; returns what it asked of the network, and the files it left."""
    home, temporary, log = tmp_path / "home", tmp_path / "tmp", tmp_path / "network"
    home.mkdir()
    temporary.mkdir()
    unset = "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "HF_HOME", "ORT_DISABLE_TELEMETRY"
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    environment |= {
        "HOME": str(home),
        "TMPDIR": str(temporary),
        "LD_PRELOAD": str(network_watch),
        "NETWORK_WATCH": str(log),
    }

    def left() -> set[str]:
        return {str(path) for folder in (home, temporary) for path in folder.rglob("*") if not path.is_dir()}

    def run(script: str, *arguments: object, codes: tuple[int, ...] = (0,)) -> tuple[list[str], set[str]]:
        before = left()
        command = [sys.executable, "-c", script, *map(str, arguments)]
        result = subprocess.run(
            command, env=environment, input="Hello!\n/exit\n", capture_output=True, text=True, check=False
        )
        assert result.returncode in codes, result.stderr
        return log.read_text().splitlines() if log.exists() else [], left() - before

    run.home = home
    return run


def test_the_watch_sees_connections_and_files(watched):
    script = """
import pathlib, socket
(pathlib.Path.home() / ".cache").mkdir()
(pathlib.Path.home() / ".cache" / "deviceid").touch()
for attempt in (lambda: socket.create_connection(("192.0.2.1", 443)), lambda: socket.create_connection(("a.test", 1))):
    try:
        attempt()
    except OSError:
        pass
socket.socket(socket.AF_UNIX).close()
try:
    socket.socket(socket.AF_INET6)
except OSError:
    pass
"""
    asked, left = watched(script)
    assert asked == ["getaddrinfo 192.0.2.1", "getaddrinfo a.test", "socket AF_INET6"]
    assert left == {str(watched.home / ".cache" / "deviceid")}


def test_no_command_opens_a_connection_or_leaves_files(
    watched, nano_checkpoint, nano_model_bundle, nano_engine, tmp_path
):
    engine = nano_engine("k8v4")
    # Doctor finds the plugin compiled, which is the one thing that is kept in the user's cache folder.
    plugin = plugin_build.cached(8, Target.CUDA)
    cache = watched.home / ".cache" / "pascalvl"
    cache.mkdir(mode=0o700, parents=True)
    (cache / plugin.parent.name).mkdir(mode=0o700)
    shutil.copy2(plugin, cache / plugin.parent.name)  # of the folder, others may be writing the rest
    commands = {
        "export": (nano_checkpoint, "--output", tmp_path / "model"),
        "build": (nano_model_bundle, "--output", tmp_path / "engine", "--backend", "auto"),
        "run": (engine, "--image", PICTURE, "--prompt", "Describe the picture."),
        "chat": (engine,),
        "validate": (engine, "--reference", nano_checkpoint, "--prompt", "Hello!"),
        "inspect": (engine,),
        "doctor": (),
    }
    for command, arguments in commands.items():
        # Doctor's exit code says whether there is a card.
        asked, left = watched(LINGER + SCRIPT, command, *arguments, codes=(0, 1) if command == "doctor" else (0,))
        assert (asked, left) == ([], set()), command


@pytest.mark.parametrize(("given", "expected"), [({}, "1"), ({"ORT_DISABLE_TELEMETRY": "0"}, "0")])
def test_a_user_may_turn_telemetry_on(given, expected):
    script = "import os, pascalvl.engines; print(os.environ['ORT_DISABLE_TELEMETRY'])"
    environment = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"} | given
    result = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert result.stdout == f"{expected}\n"

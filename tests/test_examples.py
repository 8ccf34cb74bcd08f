"""The examples run as they are, on the nano checkpoint; those that are settings of other programs are asked from."""

import base64
import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.request import urlopen

import openai
import pytest
import yaml

from tests.runtime.server.served import Served, serving

ROOT = Path(__file__).parents[1]
PICTURES = ROOT / "tests/nano/pictures"


def example(name: str, *arguments: object, **environment: str) -> str:
    """What it prints."""
    file = ROOT / "examples" / name
    program = [file] if file.suffix == ".sh" else [sys.executable, file.with_suffix(".py")]
    command = [*program, *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | environment)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def served(nano_engine_bundle):
    with serving(nano_engine_bundle, "--api-key", "key") as server:
        yield server


def where(server: Served) -> dict[str, str]:
    return {"OPENAI_BASE_URL": server.url, "OPENAI_API_KEY": "key"}


def test_describe_picture(nano_engine_bundle):
    told = example("describe_picture", nano_engine_bundle, PICTURES / "sample.png")
    assert told.startswith("A 2 by 3 grid. Row 1: red diamond, purple square, empty.")


def test_conversation(nano_engine_bundle):
    """The second question finds the picture in the cache."""
    questions = "Describe the picture.", "How many squares are there?"
    told = example("conversation", nano_engine_bundle, PICTURES / "sample.png", *questions)
    first, second = (line for line in told.splitlines() if line.startswith("["))
    computed, prompt = (int(word) for word in first[1:].split() if word.isdigit())
    assert computed == prompt
    computed, prompt = (int(word) for word in second[1:].split() if word.isdigit())
    assert computed < 30 < prompt


def test_sort_pictures(nano_engine_bundle):
    pictures = [PICTURES / f"{name}.png" for name in ("sample", "small", "wide")]
    told = example("sort_pictures", nano_engine_bundle, "Is there a red diamond?", *pictures).splitlines()
    probabilities = [float(line.split()[0]) for line in told]
    assert probabilities == sorted(probabilities, reverse=True)
    assert {line.split()[1] for line in told} == {str(picture) for picture in pictures}


def test_build_bundle(nano_checkpoint, tmp_path):
    folder = tmp_path / "engine"
    told = example("build_bundle", nano_checkpoint, tmp_path / "model", folder)
    assert f"{folder}: checkpoint for backend onnxruntime, weights w8" in told
    assert example("describe_picture", folder, PICTURES / "sample.png").startswith("A 2 by 3 grid.")


def test_openai_client(served):
    told = example("openai_client", PICTURES / "sample.png", **where(served)).splitlines()
    assert told[0].startswith("A 2 by 3 grid. Row 1: red diamond, purple square, empty.")
    assert told[1].startswith("{'colour': ")
    assert any(line in ('time_in {"city": "Berlin"}', 'time_in {"city": "Tokyo"}') for line in told[2:])


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl(served):
    told = example("curl.sh", PICTURES / "sample.png", "How many squares are there?", **where(served))
    *events, done, _ = told.split("\n\n")
    assert done == "data: [DONE]"
    assert json.loads(events[-1].removeprefix("data: "))["choices"][0]["finish_reason"] == "stop"


def settings(name: str) -> dict:
    return yaml.safe_load((ROOT / "examples" / name).read_text(encoding="utf-8"))


def test_frigate(nano_engine_bundle):
    """A request such as Frigate makes of these settings, of a server that is started as they say."""
    (provider,) = settings("frigate.yaml")["genai"].values()
    assert provider["provider"] == "openai"
    prompt = settings("frigate.yaml")["objects"]["genai"]["prompt"].format(label="dog", camera="garden")
    with serving(nano_engine_bundle, "--api-key", "key", "--served-model-name", provider["model"]) as server:
        path = provider["base_url"].partition(":8000")[2]
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}{path}", api_key="key", max_retries=0)
        models = {model.id: model.max_model_len for model in client.models.list().data}
        assert models[provider["model"]] == 768
        picture = base64.b64encode((PICTURES / "sample.png").read_bytes()).decode()
        part = {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{picture}", "detail": "low"}}
        messages = [{"role": "user", "content": [{"type": "text", "text": prompt}, part, part]}]
        answer = client.chat.completions.create(model=provider["model"], messages=messages, timeout=60)
        assert answer.choices[0].message.content.strip()


def test_open_webui(served):
    """The addresses fit together: the server's default one, asked as Open WebUI does when it is connected."""
    service = settings("open-webui.yaml")["services"]["open-webui"]
    variables = service["environment"]
    assert service["network_mode"] == "host"
    path = variables["OPENAI_API_BASE_URL"].removeprefix("http://127.0.0.1:8000")
    assert path == served.url.partition(f":{served.port}")[2]
    assert all(isinstance(value, str) for value in variables.values())
    assert served.ask(f"{path}/models", headers={"Authorization": "Bearer key"})[1]["data"][0]["id"] == "nano"


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed (extra ray, 500 MB)")
def test_ray_serve(nano_engine_bundle, tmp_path):
    """Its settings, with two replicas on the CPU: answers are streamed, and one that is killed is replaced."""
    config = settings("ray_serve.yaml")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        config["http_options"]["port"] = port = free.getsockname()[1]
    (application,) = config["applications"]
    application["args"] = {"bundle": str(nano_engine_bundle), "name": "nano", "api_keys": ["key"], "sequences": 2}
    (deployment,) = application["deployments"]
    deployment["ray_actor_options"] = {"num_gpus": 0, "num_cpus": 0.5}
    deployment["autoscaling_config"]["min_replicas"] = 2
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "ray.serve.scripts", "run", tmp_path / "config.yaml"]
    environment = os.environ | {"RAY_USAGE_STATS_ENABLED": "0"}
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=ROOT / "examples", stdout=log, stderr=log, env=environment)
    server = Served(process, f"http://127.0.0.1:{port}/v1")
    try:
        wait_until_well(port)
        client = server.client("key")
        options = {"model": "nano", "messages": [{"role": "user", "content": "Hello!"}], "temperature": 0}
        whole = client.chat.completions.create(**options).choices[0].message.content
        chunks = [chunk for _ in range(8) for chunk in client.chat.completions.create(stream=True, **options)]
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == 8 * whole
        with pytest.raises(openai.AuthenticationError):
            server.client("wrong").models.list()
        pids = replicas_of_ray()
        assert len(pids) == 2
        os.kill(pids[0], signal.SIGKILL)
        end = time.monotonic() + 60
        while len(now := replicas_of_ray()) < 2 or pids[0] in now:
            assert time.monotonic() < end, "it is not replaced"
            time.sleep(0.5)
        assert client.with_options(max_retries=5).chat.completions.create(**options).choices[0].message.content == whole
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)


def wait_until_well(port: int) -> None:
    end = time.monotonic() + 120
    while time.monotonic() < end:
        try:
            with urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                return
        except OSError:
            time.sleep(0.5)
    raise AssertionError("Ray Serve does not answer")


def replicas_of_ray() -> list[int]:
    """Processes, by the name that Ray gives them."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            name = (folder / "cmdline").read_bytes()
        except OSError:
            continue
        if name.startswith(b"ray::ServeReplica:pascalvl:PascalVL"):
            found.append(int(folder.name))
    return sorted(found)


def test_every_example_is_tested():
    assert all(f"test_{file.stem.replace('-', '_')}" in globals() for file in (ROOT / "examples").glob("*.*"))

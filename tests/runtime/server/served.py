"""A server in a process of its own, and how tests ask it."""

import base64
import contextlib
import dataclasses
import http.client
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import openai
from PIL import Image

COMMAND = [sys.executable, "-c", "import sys; from pascalvl.runtime.cli import main; sys.exit(main())", "serve"]
CONFIGURED = """
import sys
from pascalvl.runtime import VisionLanguageModel
from pascalvl.runtime.server import operation
from pascalvl.runtime.server.config import MediaConfig, ServerConfig
from pascalvl.runtime.server.service import Service

model = VisionLanguageModel.open(sys.argv[1], context_length=768, sequences=4)
{change}
bound = operation.bound_socket("127.0.0.1", 0)
service = Service(model, ServerConfig(("nano",), **dict({config})))
sys.exit(operation.serve(service, bound, lambda: print("nano at", operation.address_of(bound) + "/v1", flush=True)))
"""
"""A server with what the command has no options for."""


@dataclasses.dataclass
class Served:
    """A server at work."""

    process: subprocess.Popen
    url: str

    @property
    def port(self) -> int:
        return int(self.url.split(":")[2].split("/")[0])

    def client(self, key: str = "none", **options) -> openai.OpenAI:
        return openai.OpenAI(base_url=self.url, api_key=key, **{"timeout": 60, "max_retries": 0, **options})

    def connection(self, timeout: float = 60) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)

    def ask(self, path: str, body=None, headers: dict[str, str] | None = None, method: str | None = None):
        """Status, JSON (or text) and headers of one request."""
        content = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        sent = {"Content-Type": "application/json"} if body is not None else {}
        with contextlib.closing(self.connection()) as connection:
            connection.request(method or ("GET" if body is None else "POST"), path, content, sent | (headers or {}))
            response = connection.getresponse()
            text = response.read()
        is_json = response.getheader("Content-Type", "").startswith("application/json")
        return response.status, json.loads(text) if is_json else text.decode(), response.headers

    def chat(self, content="Hello!", headers=None, **fields):
        """Status and JSON of a chat completion."""
        messages = [{"role": "user", "content": content}]
        body = {"messages": messages, "max_tokens": 4, "temperature": 0, **fields}
        return self.ask("/v1/chat/completions", body, headers)[:2]

    def figure(self, name: str) -> float:
        """One of its metrics, which have names without labels."""
        line = next(line for line in self.ask("/metrics")[1].splitlines() if line.startswith(f"{name} "))
        return float(line.split()[1])

    def wait_until(self, name: str, expected: float, seconds: float = 20) -> None:
        """That a metric is this."""
        end = time.monotonic() + seconds
        while (found := self.figure(name)) != expected:
            assert time.monotonic() < end, f"{name} is {found}, not {expected}"
            time.sleep(0.05)

    def end(self, number: int = signal.SIGTERM) -> int:
        """Send a signal; returns the exit code."""
        self.process.send_signal(number)
        return self.process.wait(60)


@contextlib.contextmanager
def serving(bundle: Path, *options, environment=None) -> Iterator[Served]:
    """The command, with options."""
    command = [*COMMAND, bundle, "--port", 0, "--context", 768, "--served-model-name", "nano", *options]
    with _started(command, environment) as served:
        yield served


@contextlib.contextmanager
def configured(bundle: Path, config: str = "", change: str = "") -> Iterator[Served]:
    """A server with a config, as arguments in Python, and maybe with the model changed."""
    script = CONFIGURED.format(config=config, change=change)
    with _started([sys.executable, "-c", script, bundle], None) as served:
        yield served


@contextlib.contextmanager
def _started(command, environment) -> Iterator[Served]:
    process = subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, text=True, env=os.environ | (environment or {})
    )
    try:
        line = process.stdout.readline()
        assert " at http://" in line, f"the server did not begin: {line!r}"
        yield Served(process, line.split(" at ")[1].strip())
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def data_url(picture: Image.Image, form: str = "PNG") -> str:
    """A picture as requests have it."""
    file = io.BytesIO()
    picture.save(file, form)
    return encoded(file.getvalue(), f"image/{form.lower()}")


def encoded(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def picture_part(url: str, **more) -> dict:
    return {"type": "image_url", "image_url": {"url": url, **more}}


def text_part(text: str) -> dict:
    return {"type": "text", "text": text}

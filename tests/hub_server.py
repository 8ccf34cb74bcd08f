"""A server of this machine that speaks what downloads need of the Hugging Face hub's protocol, for one model."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

REPO = "maker/Nano-VL"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
_LFS = (".safetensors", ".bin", ".gguf")
_OTHER_FILES = ("README.md", "original/consolidated.bin", "model.gguf", "vocab.json", "onnx/model.onnx")


@dataclasses.dataclass
class Request:
    """What was asked for; headers by their names in lower case."""

    method: str
    path: str
    headers: dict[str, str]


@dataclasses.dataclass
class Hub:
    """The server, and how it behaves.

    Attributes:
        files: of the model, by name.
        url: where it is.
        commit: that branch ``main`` is at.
        token: without which nothing is told.
        refusal: status and headers that answer everything.
        cut_at: of each file that breaks off once: bytes that are sent before.
        is_refused_then: whether everything is refused after that.
        stalled: of a file that breaks off: what is waited for before.
        is_damaged: whether the last byte of large files is another.
        requests: all that came.
    """

    files: dict[str, bytes]
    url: str = ""
    commit: str = COMMIT
    token: str | None = None
    refusal: tuple[int, dict[str, str]] | None = None
    cut_at: dict[str, int] = dataclasses.field(default_factory=dict)
    is_refused_then: bool = False
    stalled: threading.Event | None = None
    is_damaged: bool = False
    requests: list[Request] = dataclasses.field(default_factory=list)

    @property
    def sent(self) -> set[str]:
        """Names of files that were sent."""
        found = (
            re.search("(?:/resolve/[^/]+|/cdn)/(.+)", asked.path) for asked in self.requests if asked.method == "GET"
        )
        return {match[1] for match in found if match}

    def ranges(self, name: str) -> list[str | None]:
        """What was asked for of a large file, each time."""
        return [asked.headers.get("range") for asked in self.requests if asked.path == f"/cdn/{name}"]

    def listing(self) -> dict[str, object]:
        siblings = []
        for name, content in self.files.items():
            size, digest = len(content), hashlib.sha256(content).hexdigest()
            file = {"rfilename": name, "size": size, "blobId": hashlib.sha1(content).hexdigest()}
            lfs = {"lfs": {"sha256": digest, "size": size, "pointerSize": 134}} if name.endswith(_LFS) else {}
            siblings.append(file | lfs)
        return {"id": REPO, "sha": self.commit, "siblings": siblings, "tags": [], "downloads": 0}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: object) -> None:
        """Not on stderr."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        hub, path = self.hub, unquote(urlsplit(self.path).path)
        headers = {name.lower(): value for name, value in self.headers.items()}
        hub.requests.append(Request(self.command, path, headers))
        if hub.refusal:
            self._send(*hub.refusal)
        elif found := re.fullmatch("/cdn/(.+)", path):
            self._send_large(found[1], headers)
        elif hub.token and headers.get("authorization") != f"Bearer {hub.token}":
            self._send(401, {"X-Error-Message": "Invalid credentials in Authorization header"})
        elif not re.search(f"/{REPO}(/|$)", path):
            self._send(404, {"X-Error-Code": "RepoNotFound"})
        elif not (found := re.fullmatch(rf"/(?:api/models/)?{REPO}(?:/(?:revision|resolve)/(\w+))?(?:/(.+))?", path)):
            self._send(404, {"X-Error-Code": "EntryNotFound"})
        elif found[1] not in (None, "main", hub.commit):
            self._send(404, {"X-Error-Code": "RevisionNotFound"})
        elif found[2] is None:
            self._send(200, {"Content-Type": "application/json"}, json.dumps(hub.listing()).encode())
        else:
            self._resolve(found[2])

    def _resolve(self, name: str) -> None:
        """Send a small file; the large ones are elsewhere."""
        content = self.hub.files[name]
        headers = {"X-Repo-Commit": self.hub.commit, "Accept-Ranges": "bytes"}
        if not name.endswith(_LFS):
            self._send(200, {**headers, "ETag": f'"{hashlib.sha1(content).hexdigest()}"'}, content)
            return
        linked = {"X-Linked-Etag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Linked-Size": str(len(content))}
        elsewhere = f"http://localhost:{urlsplit(self.hub.url).port}/cdn/{name}"  # another host than 127.0.0.1
        self._send(302, {**headers, **linked, "Location": elsewhere})

    def _send_large(self, name: str, headers: dict[str, str]) -> None:
        content, status, more = self.hub.files[name], 200, {"Accept-Ranges": "bytes"}
        if self.hub.is_damaged:
            content = content[:-1] + bytes([content[-1] ^ 1])
        if asked := re.fullmatch(r"bytes=(\d+)-", headers.get("range", "")):
            start, size = int(asked[1]), len(content)
            content, status, more["Content-Range"] = content[start:], 206, f"bytes {start}-{size - 1}/{size}"
        self._send(status, more, content, self.hub.cut_at.pop(name, None))

    def _send(self, status: int, headers: dict[str, str], content: bytes = b"", cut: int | None = None) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            with contextlib.suppress(OSError):  # who asked is gone
                self.wfile.write(content[:cut])
        if cut is not None:
            if self.hub.is_refused_then:
                self.hub.refusal = 503, {}
            if self.hub.stalled:
                self.hub.stalled.wait(60)
            self.close_connection = True


@contextlib.contextmanager
def serving(checkpoint: Path) -> Iterator[Hub]:
    """Serve a checkpoint's files, and some that nobody wants."""
    files = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    hub = Hub({**files, **dict.fromkeys(_OTHER_FILES, b"Nobody wants this.")})
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()

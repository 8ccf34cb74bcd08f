"""A server that speaks the part of the Hugging Face hub's protocol that downloads of a model need, for one model."""

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


@dataclasses.dataclass
class Hub:
    """The server, and how it behaves.

    Attributes:
        files: of the model, by name.
        commit: that branch ``main`` is at.
        requests: what was asked for: method, path, and range if there was one.
        refuse: status, headers and body that answer everything.
        cut_at: bytes after which a connection is cut that sends a weight file, once for each of them.
        token: that is asked for, of everything.
    """

    files: dict[str, bytes]
    url: str = ""
    commit: str = COMMIT
    requests: list[tuple[str, str, str | None]] = dataclasses.field(default_factory=list)
    headers: list[dict[str, str]] = dataclasses.field(default_factory=list)
    refuse: tuple[int, dict[str, str]] | None = None
    cut_at: list[int] = dataclasses.field(default_factory=list)
    damaged: bool = False
    token: str | None = None

    def ranges(self, name: str) -> list[str | None]:
        """Of what was sent of a file."""
        return [asked for method, path, asked in self.requests if method == "GET" and path.endswith(f"/cdn/{name}")]


def listing(hub: Hub) -> dict[str, object]:
    siblings: list[dict[str, object]] = []
    for name, content in hub.files.items():
        digest = hashlib.sha256(content).hexdigest()
        entry = {"rfilename": name, "size": len(content), "blobId": hashlib.sha1(content).hexdigest()}
        lfs = {"lfs": {"sha256": digest, "size": len(content), "pointerSize": 134}} if name.endswith(_LFS) else {}
        siblings.append({**entry, **lfs})
    return {"id": REPO, "modelId": REPO, "sha": hub.commit, "siblings": siblings, "tags": [], "downloads": 0}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        hub, path = self.hub, unquote(urlsplit(self.path).path)
        hub.requests.append((self.command, path, self.headers.get("Range")))
        hub.headers.append({name.lower(): value for name, value in self.headers.items()})
        if hub.refuse is not None:
            return self._send(hub.refuse[0], hub.refuse[1], b"{}")
        if cdn := re.fullmatch("/cdn/(.+)", path):
            return self._send_file(cdn[1])
        if hub.token and self.headers.get("Authorization") != f"Bearer {hub.token}":
            return self._send(401, {"X-Error-Message": "Invalid credentials in Authorization header"}, b"{}")
        if found := re.fullmatch("/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            if found[1] != REPO:
                return self._send(404, {"X-Error-Code": "RepoNotFound"}, b"{}")
            if found[2] not in (None, "main", hub.commit):
                return self._send(404, {"X-Error-Code": "RevisionNotFound"}, b"{}")
            return self._send(200, {"Content-Type": "application/json"}, json.dumps(listing(hub)).encode())
        if found := re.fullmatch(f"/{REPO}/resolve/([^/]+)/(.+)", path):
            return self._resolve(found[2])
        return self._send(404, {"X-Error-Code": "RepoNotFound"}, b"{}")

    def _resolve(self, name: str) -> None:
        """Small files are answered, and those of LFS are elsewhere."""
        if name not in self.hub.files:
            return self._send(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": self.hub.commit}, b"")
        content, headers = self.hub.files[name], {"X-Repo-Commit": self.hub.commit, "Accept-Ranges": "bytes"}
        if not name.endswith(_LFS):
            return self._send(200, {**headers, "ETag": f'"{hashlib.sha1(content).hexdigest()}"'}, content)
        linked = {"X-Linked-Etag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Linked-Size": str(len(content))}
        elsewhere = f"http://localhost:{urlsplit(self.hub.url).port}/cdn/{name}"  # the hub's own is 127.0.0.1
        return self._send(302, {**headers, **linked, "Location": elsewhere}, b"")

    def _send_file(self, name: str) -> None:
        content, status, headers = self.hub.files[name], 200, {"Accept-Ranges": "bytes"}
        if self.hub.damaged:
            content = content[:-1] + bytes([content[-1] ^ 1])
        size = len(content)
        if asked := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            start = int(asked[1])
            content, status = content[start:], 206
            headers["Content-Range"] = f"bytes {start}-{size - 1}/{size}"
        cut = self.hub.cut_at.pop(0) if self.hub.cut_at and self.command == "GET" else None
        self._send(status, headers, content, cut)

    def _send(self, status: int, headers: dict[str, str], content: bytes, cut: int | None = None) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            with contextlib.suppress(OSError):  # who asked has gone
                self.wfile.write(content[:cut])
        self.close_connection = self.close_connection or cut is not None


@contextlib.contextmanager
def serving(checkpoint: Path) -> Iterator[Hub]:
    """Serve a checkpoint's files, and some that nobody wants, on this machine alone."""
    files = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    others = {
        "README.md": b"Nano.",
        "original/consolidated.bin": b"x" * 99,
        "model.gguf": b"x" * 99,
        "vocab.json": b"{}",
    }
    hub = Hub({**files, **others})
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()

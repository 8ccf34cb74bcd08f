"""What a server is told when it is started."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from pascalvl.plugins.errors import UserError
from pascalvl.runtime.video import VideoLimits


@dataclasses.dataclass(frozen=True)
class MediaConfig:
    """What pictures and videos requests may show, and how large."""

    domains: frozenset[str] = frozenset()
    """Hosts of which http and https URLs are fetched; none by default."""
    root: Path | None = None
    """Folder below which files may be named; None: none may."""
    items: int = 16
    """Pictures and videos of a request, at most."""
    file_bytes: int = 32 << 20
    """Of each, as it is encoded."""
    picture_pixels: int = 50_000_000
    """Of each picture, and of each frame of a video."""
    request_pixels: int = 100_000_000
    """Of all pictures of a request together."""
    frames: int = 3600
    """Of a video as it comes, of which the model sees a part."""
    video_pixels: int = 8_000_000_000
    """Of all frames of a video together: a minute in 1080p at 60 a second."""
    fetch_seconds: float = 15.0
    """For all of a URL, redirects too; only that names are resolved has times of its own."""

    @property
    def video_limits(self) -> VideoLimits:
        """Of a video file."""
        return VideoLimits(self.frames, self.picture_pixels, self.video_pixels)

    def __post_init__(self) -> None:
        for name in ("items", "file_bytes", "picture_pixels", "frames"):
            if (found := getattr(self, name)) < 1:
                raise UserError(f"{name} is out of range: expected at least 1, found {found}.")


@dataclasses.dataclass(frozen=True)
class ServerConfig:
    """How one model is served."""

    model_names: tuple[str, ...]
    """What clients may call it, the first being its own."""
    api_keys: tuple[str, ...] = ()
    """Any of which a client needs; none: anyone may ask."""
    queue: int = 64
    """Answers that wait for their turn, at most."""
    unload_after: float | None = None
    """Seconds without a request, after which the model's memory is given back; None: never."""
    shared_prefixes: bool = False
    """Share what is computed of prompts and pictures between API keys, and not only within one."""
    allowed_origins: tuple[str, ...] = ()
    """Web pages of other servers that may ask, from a browser."""
    is_local: bool = True
    """Whether only this machine reaches the server."""
    media: MediaConfig = MediaConfig()
    body_bytes: int = 48 << 20
    """Of a request."""
    memory_bytes: int = 2 << 30
    """Of the bodies and decoded pictures of all requests together."""
    head_seconds: float = 15.0
    """In which a client sends a request's head, and between requests begins another."""
    body_seconds: float = 60.0
    """In which it sends a request's body."""
    write_seconds: float = 30.0
    """In which it takes something of what it was sent."""
    drain_seconds: float = 60.0
    """In which answers may end when the server is to."""

    def named(self, model_names: tuple[str, ...]) -> ServerConfig:
        """The same, of a model that is called otherwise."""
        return dataclasses.replace(self, model_names=model_names)

    def __post_init__(self) -> None:
        for name, least in (("queue", 0), ("body_bytes", 1), ("memory_bytes", 1)):
            if (found := getattr(self, name)) < least:
                raise UserError(f"{name} is out of range: expected at least {least}, found {found}.")
        for key in self.api_keys:
            if not key or not key.isascii() or not key.isprintable() or " " in key:
                raise UserError("an API key is of no use: expected printable ASCII characters without spaces.")

"""What a request may show: pictures and videos of its messages, within limits that are checked before decoding."""

from __future__ import annotations

import base64
import binascii
import contextlib
import dataclasses
import io
import os
import re
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

from PIL import Image

from pascalvl.plugins.errors import UserError
from pascalvl.runtime.image import load_image, picture_errors
from pascalvl.runtime.server.config import MediaConfig
from pascalvl.runtime.server.errors import APIError
from pascalvl.runtime.server.fetch import Fetcher
from pascalvl.runtime.video import Video, load_video

_FORMATS = "PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"
"""Of Pillow: not all that it reads, of which some run other programs."""
_MOST_ASPECT_RATIO = 200
_LOW_DETAIL_PIXELS = 512 * 512
"""Of a picture that is asked for with ``"detail": "low"``."""
_BYTES_OF_PIXEL = 3
_ANIMATIONS = {b"GIF8": ".gif", b"RIFF": ".webp", b"\x89PNG": ".png"}
"""By their first bytes."""
_DATA_URL = re.compile(r"data:([\w.+-]+/[\w.+-]+)?(;[\w.+=-]+)*,", re.ASCII | re.IGNORECASE)
_CHUNK = 1 << 20


class Source(NamedTuple):
    """A picture or video that a request names."""

    kind: str
    """``image`` or ``video``."""
    url: str
    param: str
    """The field that names it."""
    detail: str = "auto"


@dataclasses.dataclass(frozen=True)
class Media:
    """Gets what requests show.

    Attributes:
        config: what they may, and its limits.
        fetcher: for http(s) URLs.
    """

    config: MediaConfig
    fetcher: Fetcher

    @classmethod
    def of(cls, config: MediaConfig) -> Media:
        """With the network's own fetcher."""
        return cls(config, Fetcher(config.domains, config.file_bytes, config.fetch_seconds))

    def check_count(self, count: int) -> None:
        """Raise `APIError` for more pictures and videos than a request may show."""
        if count > self.config.items:
            raise APIError(
                400, f"the request shows {count} pictures and videos: expected at most {self.config.items}.", "messages"
            )

    @staticmethod
    def is_far(source: Source) -> bool:
        """Whether it is fetched, which may take long."""
        return source.url[:5].lower() == "http:" or source.url[:6].lower() == "https:"

    def read(self, source: Source) -> bytes:
        """The file of a source; raises `APIError` for one that may not be read, or cannot be."""
        if self.is_far(source):
            return self.fetcher.fetch(source.url, source.param)
        if source.url[:5].lower() == "data:":
            content = _decoded(source)
        elif source.url[:8].lower() == "file:///":
            content = self._below_root(unquote(source.url[7:], errors="surrogateescape"), source)
        elif "://" not in source.url[:32]:
            content = self._below_root(source.url, source)
        else:
            raise APIError(400, f"{source.param} has a scheme that is not read: expected a data: URL.", source.param)
        self._check_bytes(len(content), source)
        return content

    def _check_bytes(self, nbytes: int, source: Source) -> None:
        if nbytes > self.config.file_bytes:
            raise APIError(
                413, f"{source.param} is too large: expected at most {self.config.file_bytes} bytes.", source.param
            )

    def _below_root(self, path: str, source: Source) -> bytes:
        """A regular file below the root, by its path in it or from ``/``, whatever links there are meanwhile."""
        root = self.config.root
        if root is None:
            raise APIError(
                400,
                f"{source.param} is no URL that is read here: send the picture or video as a data: URL, or start the "
                "server with --media-root.",
                source.param,
                "local_files_not_allowed",
            )
        try:
            base = root.resolve(strict=True)
            inside = Path(os.path.realpath(base / path, strict=True)).relative_to(base)
            with open(_opened_below(base, inside), "rb") as file:
                found = os.fstat(file.fileno())
                if not stat.S_ISREG(found.st_mode):
                    raise ValueError("it is no regular file")
                self._check_bytes(found.st_size, source)
                return file.read(self.config.file_bytes + 1)
        except (OSError, ValueError):  # which of them, nobody is told: that would tell of files outside
            raise APIError(
                400, f"{source.param} is no file below the server's media root.", source.param, "no_such_file"
            ) from None

    def opened(
        self, sources: list[Source], files: list[bytes], take: Callable[[int], None], stack: contextlib.ExitStack
    ) -> list[Any]:
        """What `pascalvl.runtime.prompt.PromptBuilder` takes of sources' files.

        Args:
            sources: of one request.
            files: of each.
            take: is called with bytes of memory before they are used.
            stack: at whose end the result is of no use any more.

        Raises:
            APIError: a picture or video that cannot be used, or is larger than it may be; what ``take`` raises.
        """
        left = self.config.request_pixels
        opened: list[Any] = []
        for source, file in zip(sources, files, strict=True):
            try:
                if source.kind == "image":
                    picture = self._picture(file)
                    left -= picture.width * picture.height
                    if left < 0:
                        most = self.config.request_pixels
                        raise UserError(f"the request's pictures have more than {most} pixels together: send less.")
                    take(picture.width * picture.height * _BYTES_OF_PIXEL)
                    loaded = load_image(picture)
                    opened.append(_in_low_detail(loaded) if source.detail == "low" else loaded)
                else:
                    take(self.config.request_pixels * _BYTES_OF_PIXEL)
                    opened.append(self._video(file, stack))
            except UserError as error:
                raise APIError(422, f"{source.param}: {error}", source.param, "invalid_media") from None
        return opened

    def _picture(self, file: bytes) -> Image.Image:
        """Of which only the head is read; raises `UserError` for one that is too large to be decoded, or too thin."""
        with picture_errors("the picture"):
            picture = Image.open(io.BytesIO(file), formats=_FORMATS)
        width, height = picture.size
        if width * height > self.config.picture_pixels:
            raise UserError(
                f"the picture is too large ({width}x{height} pixels): expected at most "
                f"{self.config.picture_pixels} pixels; make it smaller."
            )
        if max(width, height) > _MOST_ASPECT_RATIO * min(width, height):
            raise UserError(
                f"a picture of {width}x{height} pixels is too thin: expected at most {_MOST_ASPECT_RATIO} times as "
                "long as wide; crop it."
            )
        return picture

    def _video(self, file: bytes, stack: contextlib.ExitStack) -> Video:
        """Of a copy of the file, of which frames are decoded when they are used."""
        limits = self.config.video_limits
        suffix = next((suffix for head, suffix in _ANIMATIONS.items() if file.startswith(head)), ".video")
        if suffix == ".webp" and file[8:12] != b"WEBP":
            suffix = ".video"
        if suffix != ".video":  # whose frames are all kept, of their full size
            self._picture(file)
            limits = dataclasses.replace(limits, pixels=self.config.request_pixels)
        copy = stack.enter_context(tempfile.NamedTemporaryFile(prefix="pascalvl-", suffix=suffix))  # noqa: SIM115
        copy.write(file)
        copy.flush()
        return load_video(copy.name, limits=limits)


def _in_low_detail(picture: Image.Image) -> Image.Image:
    pixels = picture.width * picture.height
    if pixels <= _LOW_DETAIL_PIXELS:
        return picture
    scale = (_LOW_DETAIL_PIXELS / pixels) ** 0.5
    size = max(1, int(picture.width * scale)), max(1, int(picture.height * scale))
    return picture.resize(size, Image.Resampling.BICUBIC)


def _decoded(source: Source) -> bytes:
    """What a ``data:`` URL holds."""
    head = _DATA_URL.match(source.url[:256])
    if not head or not head.group().lower().endswith(";base64,"):
        raise APIError(
            400, f"{source.param} is no data: URL in base64, such as data:image/png;base64,...", source.param
        )
    data = source.url[head.end() :]
    try:
        return base64.b64decode(unquote(data) if "%" in data else data, validate=True)
    except (binascii.Error, ValueError):
        raise APIError(400, f"{source.param} has no valid base64.", source.param) from None


def _opened_below(base: Path, inside: Path) -> int:
    """A file descriptor of a file in a folder, on the way to which no link is followed."""
    folder = os.open(base, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for part in inside.parts[:-1]:
            deeper = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=folder)
            os.close(folder)
            folder = deeper
        return os.open(inside.name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
    finally:
        with contextlib.suppress(OSError):
            os.close(folder)

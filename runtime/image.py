"""Pictures to patches, equal to Hugging Face's Qwen2-VL image processor with Pillow."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import hashlib
import io
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from pascalvl.plugins.bundle import open_regular, read_json
from pascalvl.plugins.errors import UserError, reason, shown
from pascalvl.plugins.prompt import Grid, Patches

ImageSource = str | Path | bytes | Image.Image
_MAX_ASPECT_RATIO = 200
_URL = re.compile("([a-z][a-z0-9+.-]*)://|data:", re.IGNORECASE)
_MAX_PATH = 4096
"""Characters; Linux takes as many bytes."""
_MAX_BYTES = 1 << 30
"""Of a picture's file, which decoders copy."""
_MAX_PIXELS = 178_956_970
"""Of a picture before it is decoded: what Pillow itself refuses unless a program says otherwise."""
_FIXED_SETTINGS = {
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": True,
    "resample": Image.Resampling.BICUBIC.value,
}
"""What a processor's file may say, but not otherwise; null, to the reference, is not the default, but false."""


@contextlib.contextmanager
def picture_errors(name: str) -> Iterator[None]:
    """Raise `UserError` about the picture ``name`` for what Pillow raises on files that it cannot read."""
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"no picture at {name}: give the path of an image file.") from None
    except UnidentifiedImageError:
        raise UserError(f"{name} is not a picture that can be read: give a PNG, JPEG, WebP, GIF or BMP file.") from None
    except Image.DecompressionBombError as error:
        raise UserError(f"{name} is too large ({error}): make it smaller first.") from error
    except Exception as error:  # each decoder raises kinds of its own on damaged files
        raise UserError(f"{name} cannot be read ({reason(error)}): give an undamaged image file.") from error


def is_url(source: str) -> bool:
    """Whether a text is no path, but a URL, ``data:`` ones too."""
    return _URL.match(source) is not None


def local_path(source: str | Path) -> Path:
    """The path that a text or ``file://`` URL names; raises `UserError` for other URLs, of which none is fetched."""
    if isinstance(source, str) and (url := _URL.match(source)):
        host, _, path = source[url.end() :].partition("/")
        if (url[1] or "").lower() != "file" or host not in ("", "localhost"):
            raise UserError(f"{shown(source)} is no file here: download or save it first, and give its path.")
        source = "/" + unquote(path, errors="surrogateescape")
    if not 0 < (length := len(str(source))) <= _MAX_PATH:
        raise UserError(f"expected the path of a file, found {length} characters, {shown(str(source))}.")
    return Path(source)


def load_image(source: ImageSource) -> Image.Image:
    """Open a picture as RGB on white, turned as its EXIF orientation says.

    It is given by its path, a ``file://`` or ``data:`` URL, its encoded bytes, or as a PIL image.

    Grey levels of 16 bits are divided by 257, floats from 0 to 1 multiplied by 255, and integers of 32 bits and floats
    beyond 0 to 255 scaled by their range. Hugging Face's processor instead makes white of all above 255, and black of
    floats below 1.

    Raises:
        UserError: missing, unreadable, not a picture, too large to be decoded, or without pixels.
    """
    if not isinstance(source, ImageSource):
        raise UserError(f"expected a picture as a path, bytes or PIL image, found {shown(source)}.")
    name = "the picture"
    if isinstance(source, str | Path) and not _is_data_url(source):
        source = local_path(source)
        name = str(source)
    with picture_errors(name):
        image = source if isinstance(source, Image.Image) else _opened(source)
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I") or image.mode == "F":
            image = _grey_levels(image)
        if "A" in image.getbands() or "transparency" in image.info:
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image.convert("RGBA"))
        image = image.convert("RGB")
    if not image.width or not image.height:
        raise UserError(f"{name} has no pixels ({image.width}x{image.height}): give a picture of at least 1x1.")
    return image


def _opened(source: Path | str | bytes) -> Image.Image:
    """A picture from a file, ``data:`` URL or bytes, which is not decoded yet, and not too large for that."""
    file: Path | io.BytesIO
    if isinstance(source, Path):
        open_regular(source).close()
        size, file = source.stat().st_size, source
    else:
        data = source if isinstance(source, bytes) else _decoded(source)
        size, file = len(data), io.BytesIO(data)
    if size > _MAX_BYTES:
        raise Image.DecompressionBombError(f"{size} bytes, more than {_MAX_BYTES}")
    image = Image.open(file)
    if image.width * image.height > _MAX_PIXELS:
        raise Image.DecompressionBombError(f"{image.width}x{image.height} pixels, more than {_MAX_PIXELS}")
    return image


def _is_data_url(source: str | Path) -> bool:
    return isinstance(source, str) and source[:5].lower() == "data:"


def _decoded(url: str) -> bytes:
    """What a ``data:`` URL holds."""
    head, _, data = url.partition(",")
    if not head.endswith(";base64"):
        raise ValueError("it is a data: URL, but not in base64")
    return base64.b64decode("".join(unquote(data).split()), validate=True)


def _grey_levels(image: Image.Image) -> Image.Image:
    """Scale a grey picture of 16-bit or 32-bit integers, or floats, to 8 bits; what it calls transparent is white.

    Black and white are 0 and 65535 of one of 16 bits. Of one of 32 bits they are the first of these ranges that holds
    all its finite numbers: of floats 0 to 1; 0 to 255, an 8-bit picture in a wider type, which stays as it is; of
    integers 0 to 65535; its own range. Infinite numbers are white or black, by their sign; what is no number is black.
    """
    values = np.array(image, np.float64)
    finite = values[np.isfinite(values)]
    least, greatest = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    floats = image.mode == "F"
    if image.mode.startswith("I;16"):
        black, white = 0.0, 65535.0
    elif floats and least >= 0 and greatest <= 1:
        black, white = 0.0, 1.0
    elif least >= 0 and greatest <= 255:
        return image
    elif not floats and least >= 0 and greatest <= 65535:
        black, white = 0.0, 65535.0
    else:
        black, white = least, greatest
    levels = (values - black) * (255 / ((white - black) or 1))
    levels = np.nan_to_num(levels, nan=0, posinf=255, neginf=0).round()
    if (transparent := image.info.get("transparency")) is not None:
        levels[values == transparent] = 255
    return Image.fromarray(levels.astype(np.uint8))


@dataclasses.dataclass(frozen=True)
class PatchParameters:
    """What the image and the video processor of a checkpoint have in common: sizes, colours, patches."""

    patch_size: int
    temporal_patch_size: int
    merge_size: int
    min_pixels: int
    """Smallest area after resizing; of a video, over all its frames."""
    max_pixels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    rescale_factor: float
    """What levels of 0 to 255 are multiplied by before mean and std."""

    @classmethod
    def read(
        cls, path: Path, defaults: dict[str, Any], fixed: dict[str, Any], max_pixels: int | None
    ) -> tuple[PatchParameters, dict[str, Any]]:
        """Read a processor's JSON; returns the parameters and all settings that ``defaults`` names, filled in from it.

        ``max_pixels`` lowers the largest area that the file allows.

        Raises:
            UserError: not readable, a setting that differs from `_FIXED_SETTINGS` or ``fixed``, or a limit below one
                token's area.
        """
        data = read_json(path, "download the model again and export it")
        try:
            settings = {name: data.get(name, default) for name, default in defaults.items()}
            for name, expected in {**_FIXED_SETTINGS, **fixed}.items():
                if (found := data.get(name, expected)) != expected:
                    raise UserError(f"{path} sets {name} to {found!r}: only {expected!r} is supported.")
            smallest = int(settings.get("min_pixels") or settings["size"]["shortest_edge"])
            largest = int(settings.get("max_pixels") or settings["size"]["longest_edge"])
            patch, temporal, merge = (
                int(settings[name]) for name in ("patch_size", "temporal_patch_size", "merge_size")
            )
            mean, std = (tuple(map(float, settings[name])) for name in ("image_mean", "image_std"))
            if min(patch, temporal, merge, smallest, largest) < 1 or not len(mean) == len(std) == 3 or 0 in std:
                raise ValueError("sizes below 1, or colours that are not three")
            if not 0 < (rescale_factor := float(data.get("rescale_factor", 1 / 255))) <= 1:
                raise ValueError("a rescale_factor that is not above 0 and at most 1")
        except (ValueError, TypeError, LookupError, AttributeError, OverflowError) as error:
            raise UserError(f"{path} cannot be read ({error!r}): download the model again and export it.") from error
        if max_pixels is not None:
            if max_pixels < (token := (patch * merge) ** 2):
                raise UserError(
                    f"a limit of {max_pixels} pixels is out of range: expected at least {token}, one token."
                )
            largest = min(largest, max_pixels)
        return cls(patch, temporal, merge, min(smallest, largest), largest, mean, std, rescale_factor), settings

    @property
    def factor(self) -> int:
        """Sides of resized frames are multiples of this many pixels."""
        return self.patch_size * self.merge_size

    def patches(self, frames: list[Image.Image]) -> tuple[np.ndarray, Grid]:
        """Normalise and cut RGB frames of one size, whose number is a multiple of ``temporal_patch_size``."""
        pixels = np.stack([np.asarray(frame) for frame in frames])
        count, height, width, channels = pixels.shape
        t, h, w = count // self.temporal_patch_size, height // self.patch_size, width // self.patch_size
        m = self.merge_size
        blocks = pixels.reshape(
            t, self.temporal_patch_size, h // m, m, self.patch_size, w // m, m, self.patch_size, channels
        )
        # to [t, block row, block column, row in block, column in block, channel, frame, y, x]
        levels = blocks.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7).reshape(t * h * w, channels, -1)
        # Rescaling is a float64 product rounded to float32, then normalising in float32: the reference's rounding. Done
        # once for each of a byte's values: the float arrays of a large picture would take gigabytes.
        rescaled = (np.arange(256) * self.rescale_factor).astype(np.float32)
        pixel_values = np.empty(levels.shape, np.float32)
        for channel in range(channels):
            normalised = (rescaled - np.float32(self.mean[channel])) / np.float32(self.std[channel])
            pixel_values[:, channel] = normalised[levels[:, channel]]
        return pixel_values.reshape(t * h * w, -1), (t, h, w)


@dataclasses.dataclass(frozen=True)
class ImageProcessor:
    """Resizes a picture to whole patches within the checkpoint's limits of area, and cuts it."""

    parameters: PatchParameters

    @classmethod
    def from_file(cls, path: Path, max_pixels: int | None = None) -> ImageProcessor:
        """Read ``preprocessor_config.json``; what it leaves out is Qwen2-VL's default."""
        defaults = {
            "patch_size": 14,
            "temporal_patch_size": 2,
            "merge_size": 2,
            "size": {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280},
            "min_pixels": None,
            "max_pixels": None,
            "image_mean": [0.48145466, 0.4578275, 0.40821073],
            "image_std": [0.26862954, 0.26130258, 0.27577711],
        }
        return cls(PatchParameters.read(path, defaults, {}, max_pixels)[0])

    def __call__(self, image: Image.Image) -> Patches:
        """Raises `UserError` for a picture more than 200 times as long as it is wide."""
        p = self.parameters
        height, width = resized_size(image.height, image.width, p.factor, p.min_pixels, p.max_pixels)

        def pixel_values() -> np.ndarray:
            return p.patches([image.resize((width, height), Image.Resampling.BICUBIC)] * p.temporal_patch_size)[0]

        digest = hashlib.sha256(repr((p, image.mode, image.size)).encode())
        digest.update(image.tobytes())
        grid = 1, height // p.patch_size, width // p.patch_size
        return Patches(pixel_values, grid, p.merge_size, digest.digest())


def resized_size(
    height: int, width: int, factor: int, min_pixels: int, max_pixels: int, frames: float = 1, frames_kept: int = 1
) -> tuple[int, int]:
    """Height and width in multiples of ``factor`` near the picture's own, with an area within the limits.

    For a video the area counts all frames: ``frames`` of them, of which ``frames_kept`` fill whole temporal patches.
    """
    if max(height, width) > _MAX_ASPECT_RATIO * min(height, width):
        raise UserError(
            f"a picture of {width}x{height} pixels is too thin: expected at most {_MAX_ASPECT_RATIO} times as long as "
            "wide; crop it."
        )
    rows, columns = round(height / factor) * factor, round(width / factor) * factor
    if frames_kept * rows * columns > max_pixels:
        shrink = math.sqrt(frames * height * width / max_pixels)
        rows = max(factor, math.floor(height / shrink / factor) * factor)
        columns = max(factor, math.floor(width / shrink / factor) * factor)
    elif frames_kept * rows * columns < min_pixels:
        grow = math.sqrt(min_pixels / (frames * height * width))
        rows = math.ceil(height * grow / factor) * factor
        columns = math.ceil(width * grow / factor) * factor
    return rows, columns

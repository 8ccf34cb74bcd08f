"""Pictures to patches, equal to Hugging Face's Qwen2-VL image processor with Pillow."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from pascalvl.plugins.errors import UserError
from pascalvl.runtime.positions import Grid

ImageSource = str | Path | bytes | Image.Image
_MAX_ASPECT_RATIO = 200


def load_image(source: ImageSource) -> Image.Image:
    """Open a picture (path, encoded bytes or PIL image) as RGB on white, turned as its EXIF orientation says.

    Raises:
        UserError: missing, unreadable, not a picture, or without pixels.
    """
    name = "the picture" if isinstance(source, bytes | Image.Image) else str(source)
    try:
        if isinstance(source, Image.Image):
            image = source
        else:
            image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
        image = ImageOps.exif_transpose(image)
        if "A" in image.getbands() or "transparency" in image.info:
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image.convert("RGBA"))
        image = image.convert("RGB")
    except FileNotFoundError:
        raise UserError(f"no picture at {name}: give the path of an image file.") from None
    except UnidentifiedImageError:
        raise UserError(f"{name} is not a picture that can be read: give a PNG, JPEG, WebP, GIF or BMP file.") from None
    except Image.DecompressionBombError as error:
        raise UserError(f"{name} is too large ({error}): make it smaller first.") from error
    except (OSError, ValueError, SyntaxError) as error:
        raise UserError(f"{name} cannot be read ({error}): give an undamaged image file.") from error
    if not image.width or not image.height:
        raise UserError(f"{name} has no pixels ({image.width}x{image.height}): give a picture of at least 1x1.")
    return image


@dataclasses.dataclass(frozen=True, eq=False)
class Patches:
    """A picture or video as the vision encoder takes it."""

    pixel_values: np.ndarray
    """float32 ``[t * h * w, patch_dim]``, merge block by merge block."""
    grid: Grid
    """Temporal patches, rows and columns."""
    merge_size: int
    timestamps: tuple[float, ...] = ()
    """Video: the middle of each temporal patch, in seconds; a picture has none."""

    @property
    def is_video(self) -> bool:
        return bool(self.timestamps)

    @property
    def tokens_per_frame(self) -> int:
        """Tokens of one temporal patch."""
        return self.grid[1] * self.grid[2] // self.merge_size**2

    @functools.cached_property
    def digest(self) -> bytes:
        """Identity of the content: equal digests mean equal features."""
        return hashlib.sha256(repr(self.grid).encode() + self.pixel_values.tobytes()).digest()


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

    @classmethod
    def read(
        cls, path: Path, defaults: dict[str, Any], max_pixels: int | None
    ) -> tuple[PatchParameters, dict[str, Any]]:
        """Read a processor's JSON; returns the parameters and all of its settings, ``defaults`` filling in.

        ``max_pixels`` lowers the largest area that the file allows.

        Raises:
            UserError: not readable, a limit below one token's area, or a processing step switched off that the model
                cannot do without.
        """
        try:
            settings = {**defaults, **json.loads(path.read_text(encoding="utf-8"))}
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read ({error}): write the bundle again.") from error
        off = [s for s in ("do_resize", "do_rescale", "do_normalize", "do_convert_rgb") if not settings.get(s, True)]
        if off:
            raise UserError(f"{path} switches off {', '.join(off)}: expected a processor that does all its steps.")
        size = settings["size"]
        smallest = settings.get("min_pixels") or size["shortest_edge"]
        largest = settings.get("max_pixels") or size["longest_edge"]
        if max_pixels is not None:
            token = (settings["patch_size"] * settings["merge_size"]) ** 2
            if max_pixels < token:
                raise UserError(
                    f"a limit of {max_pixels} pixels is out of range: expected at least {token}, one token."
                )
            largest = min(largest, max_pixels)
        return cls(
            settings["patch_size"],
            settings["temporal_patch_size"],
            settings["merge_size"],
            min(smallest, largest),
            largest,
            tuple(settings["image_mean"]),
            tuple(settings["image_std"]),
        ), settings

    @property
    def factor(self) -> int:
        """Sides of resized frames are multiples of this many pixels."""
        return self.patch_size * self.merge_size

    def patches(self, frames: list[Image.Image]) -> tuple[np.ndarray, Grid]:
        """Normalise and cut frames of one size, whose number is a multiple of ``temporal_patch_size``."""
        # Rescaling is a float64 factor rounded to float32, then normalising in float32: the reference's rounding.
        pixels = np.stack([np.asarray(frame, np.uint8) for frame in frames]).astype(np.float64) * (1 / 255)
        pixels = (pixels.astype(np.float32) - np.float32(self.mean)) / np.float32(self.std)
        count, height, width, channels = pixels.shape
        t, h, w = count // self.temporal_patch_size, height // self.patch_size, width // self.patch_size
        m = self.merge_size
        blocks = pixels.reshape(
            t, self.temporal_patch_size, h // m, m, self.patch_size, w // m, m, self.patch_size, channels
        )
        # to [t, block row, block column, row in block, column in block, channel, frame, y, x]
        flat = blocks.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7).reshape(t * h * w, -1)
        return np.ascontiguousarray(flat, np.float32), (t, h, w)


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
            "image_mean": [0.48145466, 0.4578275, 0.40821073],
            "image_std": [0.26862954, 0.26130258, 0.27577711],
        }
        return cls(PatchParameters.read(path, defaults, max_pixels)[0])

    def __call__(self, image: Image.Image) -> Patches:
        """Raises `UserError` for a picture more than 200 times as long as it is wide."""
        p = self.parameters
        height, width = resized_size(image.height, image.width, p.factor, p.min_pixels, p.max_pixels)
        frame = image.resize((width, height), Image.Resampling.BICUBIC)
        pixel_values, grid = p.patches([frame] * p.temporal_patch_size)
        return Patches(pixel_values, grid, p.merge_size)


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

"""Videos to patches, equal to Hugging Face's Qwen3-VL video processor."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageSequence

from pascalvl.plugins.errors import UserError
from pascalvl.runtime.image import Patches, PatchParameters, load_image, resized_size

_ANIMATIONS = (".gif", ".webp", ".png", ".apng")
_DEFAULT_FPS = 24.0
"""Assumed, as by the reference, where a video does not say its frame rate."""


@dataclasses.dataclass(frozen=True)
class Video:
    """Frames, RGB and of one size, and how many of them make a second.

    ``frame_indices`` tells, where the frames are a selection already, which of the original's they are; they are then
    taken as they come.
    """

    frames: Sequence[Image.Image]
    fps: float
    frame_indices: tuple[int, ...] | None = None


VideoSource = str | Path | Video


def load_video(source: VideoSource) -> Video:
    """Open a video: a folder of pictures, an animated GIF, WebP or PNG, or (with PyAV installed) a video file.

    A folder's pictures are taken in the order of their names, at 24 frames a second.

    Raises:
        UserError: missing, unreadable, or of a kind that is not supported here.
    """
    if isinstance(source, Video):
        return source
    path = Path(source)
    if path.is_dir():
        frames, fps = [load_image(file) for file in sorted(path.iterdir()) if file.is_file()], _DEFAULT_FPS
    elif not path.is_file():
        raise UserError(f"no video at {path}: give a video file or a folder of pictures.")
    elif path.suffix.lower() in _ANIMATIONS:
        frames, fps = _animation(path)
    else:
        frames, fps = _decoded(path)
    if not frames:
        raise UserError(f"{path} holds no frames: give a video file or a folder of pictures.")
    if len({frame.size for frame in frames}) > 1:
        raise UserError(f"the frames of {path} differ in size: expected all of one size.")
    return Video(frames, fps)


def _animation(path: Path) -> tuple[list[Image.Image], float]:
    try:
        with Image.open(path) as image:
            pairs = [(frame.convert("RGB"), frame.info.get("duration", 0)) for frame in ImageSequence.Iterator(image)]
    except (OSError, ValueError, SyntaxError) as error:
        raise UserError(f"{path} cannot be read as an animation ({error}): give an undamaged file.") from error
    seconds = sum(duration for _, duration in pairs) / 1000
    return [frame for frame, _ in pairs], len(pairs) / seconds if seconds else _DEFAULT_FPS


def _decoded(path: Path) -> tuple[list[Image.Image], float]:
    try:
        import av
    except ModuleNotFoundError:
        raise UserError(
            f"reading {path} needs PyAV (pip install av); without it, give a folder of pictures or an animated GIF."
        ) from None
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            frames = [frame.to_image() for frame in container.decode(stream)]
            return frames, float(stream.average_rate or _DEFAULT_FPS)
    except (av.FFmpegError, IndexError) as error:
        raise UserError(f"{path} cannot be read as a video ({error}): give a video file or pictures.") from error


@dataclasses.dataclass(frozen=True)
class VideoProcessor:
    """Picks frames, resizes them to whole patches within the checkpoint's limits of volume, and cuts them."""

    parameters: PatchParameters
    fps: float
    """Frames to take from each second."""
    min_frames: int
    max_frames: int

    @classmethod
    def from_file(cls, path: Path, max_pixels: int | None = None) -> VideoProcessor:
        """Read ``video_preprocessor_config.json``; what it leaves out is Qwen3-VL's default."""
        defaults: dict[str, Any] = {
            "patch_size": 16,
            "temporal_patch_size": 2,
            "merge_size": 2,
            "size": {"shortest_edge": 128 * 32 * 32, "longest_edge": 32 * 32 * 768},
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
            "fps": 2,
            "min_frames": 4,
            "max_frames": 768,
        }
        parameters, settings = PatchParameters.read(path, defaults, max_pixels)
        return cls(parameters, settings["fps"], settings["min_frames"], settings["max_frames"])

    def __call__(self, video: Video) -> Patches:
        """Raises `UserError` for a video of fewer frames than a temporal patch takes."""
        p = self.parameters
        if video.frame_indices is None:
            indices = self._sample(len(video.frames), video.fps)
            frames = [video.frames[index] for index in indices]
        else:
            indices, frames = list(video.frame_indices), list(video.frames)
        if len(frames) < p.temporal_patch_size:
            raise UserError(
                f"a video needs at least {p.temporal_patch_size} frames, found {len(frames)}: give it as a picture."
            )
        height, width = self._resized_size(frames)
        missing = -len(frames) % p.temporal_patch_size
        resized = [frame.resize((width, height), Image.Resampling.BICUBIC) for frame in frames]
        pixel_values, grid = p.patches(resized + resized[-1:] * missing)
        return Patches(pixel_values, grid, p.merge_size, tuple(self._timestamps(indices, video.fps)))

    def _sample(self, total: int, fps: float) -> list[int]:
        """Indices of evenly spaced frames, first and last among them."""
        wanted = int(total / fps * self.fps)
        count = min(max(wanted, self.min_frames), self.max_frames, total)
        return np.linspace(0, total - 1, count).round().astype(int).tolist()

    def _resized_size(self, frames: list[Image.Image]) -> tuple[int, int]:
        p = self.parameters
        width, height = frames[0].size
        if min(height, width) < p.factor:
            scale = max(p.factor / height, p.factor / width)
            height, width = int(height * scale), int(width * scale)
        whole = round(len(frames) / p.temporal_patch_size) * p.temporal_patch_size
        return resized_size(height, width, p.factor, p.min_pixels, p.max_pixels, len(frames), whole)

    def _timestamps(self, indices: list[int], fps: float) -> Iterator[float]:
        """The middle between the first and last frame of each temporal patch, in seconds."""
        step = self.parameters.temporal_patch_size
        padded = indices + indices[-1:] * (-len(indices) % step)
        for first, last in zip(padded[::step], padded[step - 1 :: step], strict=True):
            yield (first / fps + last / fps) / 2

"""Videos to patches, equal to Hugging Face's Qwen3-VL video processor."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageSequence

from pascalvl.plugins.errors import UserError
from pascalvl.runtime.image import ImageSource, Patches, PatchParameters, load_image, picture_errors, resized_size

_ANIMATIONS = (".gif", ".webp", ".png", ".apng")
_DEFAULT_FPS = 24.0
"""Assumed, as by the reference, where a video does not say its frame rate."""


@dataclasses.dataclass(frozen=True)
class Video:
    """Frames of one size, anything that `load_image` takes, and how many of them make a second.

    ``frame_indices`` tells, where the frames are a selection already, which of the original's they are; they are then
    taken as they come.

    Raises:
        UserError: a frame rate that is not a positive number, or another number of indices than frames.
    """

    frames: Sequence[ImageSource]
    fps: float
    frame_indices: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if not 0 < self.fps < math.inf:
            raise UserError(f"a video of {self.fps} frames a second: expected a positive number.")
        if self.frame_indices is not None and len(self.frame_indices) != len(self.frames):
            raise UserError(
                f"a video of {len(self.frames)} frames with {len(self.frame_indices)} frame indices: expected one each."
            )


VideoSource = str | Path | Video


def load_video(source: VideoSource) -> Video:
    """Open a video: a folder of pictures, an animated GIF, WebP or PNG, or (with PyAV installed) a video file.

    A folder's pictures are taken in the order of their names, at 24 frames a second. Frames of folders and video files
    are read when they are used: those of a minute would fill gigabytes.

    Raises:
        UserError: missing, unreadable, or of a kind that is not supported here.
    """
    if isinstance(source, Video):
        return source
    if not isinstance(source, str | Path):
        raise UserError(f"expected a video as a path or a Video, found {source!r}.")
    if source == "":  # which would be the current folder
        raise UserError("expected the path of a video, found an empty one.")
    path = Path(source)
    frames: Sequence[ImageSource]
    if path.is_dir():
        frames, fps = _pictures(path), _DEFAULT_FPS
    elif not path.is_file():
        raise UserError(f"no video at {path}: give a video file or a folder of pictures.")
    elif path.suffix.lower() in _ANIMATIONS:
        frames, fps = _animation(path)
    else:
        frames = _FileFrames(path)
        fps = frames.fps
    if not frames:
        raise UserError(f"{path} holds no frames: give a video file or a folder of pictures.")
    return Video(frames, fps)


def _pictures(folder: Path) -> list[Path]:
    paths = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    for path in paths:
        with picture_errors(str(path)), Image.open(path):  # reads the header alone
            pass
    return paths


def _animation(path: Path) -> tuple[list[Image.Image], float]:
    try:
        with Image.open(path) as image:
            pairs = [(load_image(frame), frame.info.get("duration", 0)) for frame in ImageSequence.Iterator(image)]
    except Exception as error:  # each decoder raises kinds of its own on damaged files
        raise UserError(f"{path} cannot be read as an animation ({error}): give an undamaged file.") from error
    seconds = sum(duration for _, duration in pairs) / 1000
    return [frame for frame, _ in pairs], len(pairs) / seconds if seconds else _DEFAULT_FPS


class _FileFrames(Sequence[Image.Image]):
    """The frames of a video file, decoded as they are asked for; quick in ascending order.

    They are counted by decoding them once: what a file says of their number is not reliable.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.fps = _DEFAULT_FPS
        self._count = sum(1 for _ in self._decode())
        self._next = self._count  # of the decoder's frames; at the end it starts anew

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Image.Image:
        if not 0 <= index < self._count:
            raise IndexError(index)
        if index < self._next:
            self._decoder, self._next = self._decode(), 0
        frame = next(itertools.islice(self._decoder, index - self._next, None))
        self._next = index + 1
        return frame.to_image()

    def _decode(self) -> Iterator[Any]:
        try:
            import av
        except ModuleNotFoundError:
            raise UserError(
                f"reading {self._path} needs PyAV (pip install av); without it, give a folder of pictures or an "
                "animated GIF."
            ) from None
        try:
            with av.open(str(self._path)) as container:
                stream = container.streams.video[0]
                stream.thread_type = "AUTO"
                self.fps = float(stream.average_rate or _DEFAULT_FPS)
                yield from container.decode(stream)
        except (av.FFmpegError, IndexError, UnicodeError) as error:
            raise UserError(
                f"{self._path} cannot be read as a video ({error}): give a video file or pictures."
            ) from error


@dataclasses.dataclass(frozen=True)
class VideoProcessor:
    """Picks frames, resizes them to whole patches within the checkpoint's limits of volume, and cuts them."""

    parameters: PatchParameters
    fps: float
    """Frames to take from each second."""
    min_frames: int
    max_frames: int
    max_frame_tokens: int | None
    """Tokens of one frame at most; None: no limit but the video's."""

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
            "cap_pixels_per_frame": None,
            "max_video_tokens": 768,
        }
        fixed = {"do_sample_frames": True, "num_frames": None}
        parameters, settings = PatchParameters.read(path, defaults, fixed, max_pixels)
        fps, *counts = [settings[name] for name in ("fps", "min_frames", "max_frames", "max_video_tokens")]
        if (
            not isinstance(fps, int | float)
            or not 0 < fps < math.inf
            or any(type(n) is not int or n < 1 for n in counts)
        ):
            raise UserError(
                f"{path} has a frame rate or a limit that is not positive: download the model again and export it."
            )
        *limits, frame_tokens = counts
        return cls(parameters, fps, *limits, frame_tokens if settings["cap_pixels_per_frame"] else None)

    def __call__(self, video: Video) -> Patches:
        """Raises `UserError` for frames of different sizes, or fewer than a temporal patch takes."""
        p = self.parameters
        taken = range(len(video.frames)) if video.frame_indices else self._sample(len(video.frames), video.fps)
        if len(taken) < p.temporal_patch_size:
            raise UserError(
                f"a video needs at least {p.temporal_patch_size} frames, found {len(taken)}: give it as a picture."
            )
        frames = (load_image(video.frames[index]) for index in taken)
        first = next(frames)
        size = self._resized_size(len(taken), *first.size)
        resized = []
        for frame in itertools.chain([first], frames):
            if frame.size != first.size:
                raise UserError("the frames of a video differ in size: expected all of one size.")
            resized.append(frame.resize(size, Image.Resampling.BICUBIC))
        pixel_values, grid = p.patches(resized + resized[-1:] * (-len(resized) % p.temporal_patch_size))
        indices = video.frame_indices or taken
        return Patches(pixel_values, grid, p.merge_size, tuple(self._timestamps(list(indices), video.fps)))

    def _sample(self, total: int, fps: float) -> list[int]:
        """Indices of evenly spaced frames, first and last among them."""
        wanted = int(total / fps * self.fps)
        count = min(max(wanted, self.min_frames), self.max_frames, total)
        return np.linspace(0, total - 1, count).round().astype(int).tolist()

    def _resized_size(self, count: int, width: int, height: int) -> tuple[int, int]:
        """Width and height for ``count`` frames."""
        p = self.parameters
        if min(height, width) < p.factor:
            scale = max(p.factor / height, p.factor / width)
            height, width = int(height * scale), int(width * scale)
        max_pixels = p.max_pixels
        if self.max_frame_tokens is not None:
            # The reference's floor: a little above what even the smallest video must have in all.
            share = min(int(self.max_frame_tokens) * p.factor**2, max_pixels // count)
            max_pixels = max(share, int(p.min_pixels * 1.05)) * count
        whole = round(count / p.temporal_patch_size) * p.temporal_patch_size
        return resized_size(height, width, p.factor, p.min_pixels, max_pixels, count, whole)[::-1]

    def _timestamps(self, indices: list[int], fps: float) -> Iterator[float]:
        """The middle between the first and last frame of each temporal patch, in seconds."""
        step = self.parameters.temporal_patch_size
        padded = indices + indices[-1:] * (-len(indices) % step)
        for first, last in zip(padded[::step], padded[step - 1 :: step], strict=True):
            yield (first / fps + last / fps) / 2

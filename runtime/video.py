"""Videos to patches, equal to Hugging Face's Qwen3-VL video processor."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageSequence

from pascalvl.plugins.errors import UserError, shown
from pascalvl.plugins.prompt import Patches
from pascalvl.runtime.image import (
    ImageSource,
    PatchParameters,
    load_image,
    local_path,
    picture_errors,
    resized_size,
)

log = logging.getLogger(__name__)

_ANIMATIONS = (".gif", ".webp", ".png", ".apng")
_DEFAULT_FPS = 24.0
"""Assumed, as by the reference, where a video does not say its frame rate."""
_CONTAINERS_ALONE = {
    "protocol_whitelist": "file",
    "format_whitelist": "mov,matroska,webm,avi,mpegts,mpeg,ogg,flv,asf",
}
"""Options of FFmpeg for files from anyone: not the playlists and descriptions that name other files."""
_END_TOLERANCE = 0.5
"""Seconds by which a video file may end before the time that it states, which writers round."""
_TURNS = {
    (False, False, False): None,
    (False, True, False): Image.Transpose.FLIP_LEFT_RIGHT,
    (False, False, True): Image.Transpose.FLIP_TOP_BOTTOM,
    (False, True, True): Image.Transpose.ROTATE_180,
    (True, False, False): Image.Transpose.TRANSPOSE,
    (True, True, False): Image.Transpose.ROTATE_270,
    (True, False, True): Image.Transpose.ROTATE_90,
    (True, True, True): Image.Transpose.TRANSVERSE,
}
"""What a display matrix does: are x and y exchanged, is the new x reversed, is the new y."""


@dataclasses.dataclass(frozen=True)
class Video:
    """Frames of one size, anything that `load_image` takes, and how many of them make a second.

    ``frame_indices`` tells, where the frames are a selection already, which of the original's they are; they are then
    taken as they come. ``times`` tells, where the rate varies, when each frame is shown, in seconds; ``fps`` is then
    their mean rate.

    Raises:
        UserError: a frame rate that is not a positive number, another number of indices or times than frames, both
            indices and times, or times that do not ascend.
    """

    frames: Sequence[ImageSource]
    fps: float
    frame_indices: tuple[int, ...] | None = None
    times: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if not 0 < self.fps < math.inf:
            raise UserError(f"a video of {self.fps} frames a second: expected a positive number.")
        if self.frame_indices is not None and len(self.frame_indices) != len(self.frames):
            raise UserError(
                f"a video of {len(self.frames)} frames with {len(self.frame_indices)} frame indices: expected one each."
            )
        if self.times is not None:
            if self.frame_indices is not None:
                raise UserError("a video with frame indices and times: expected one of them.")
            if len(self.times) != len(self.frames):
                raise UserError(
                    f"a video of {len(self.frames)} frames with {len(self.times)} times: expected one each."
                )
            if not np.isfinite(self.times).all() or (np.diff(self.times) < 0).any():
                raise UserError("a video whose times do not ascend: expected seconds, in the order of the frames.")


VideoSource = str | Path | Video


class _BeyondLimits(UserError):
    pass


@dataclasses.dataclass(frozen=True)
class VideoLimits:
    """Of a video file from anyone, checked before its frames are decoded, and while they are; of containers, only those
    are then read that name no other files.

    Attributes:
        frames: of the file, whichever are taken.
        frame_pixels: of each.
        pixels: of all frames together.
    """

    frames: int
    frame_pixels: int
    pixels: int

    def check(self, frames: int, width: int, height: int) -> None:
        """Raise `UserError` for a video beyond the limits."""
        for what, found, most in (
            ("frames", frames, self.frames),
            ("pixels in a frame", width * height, self.frame_pixels),
            ("pixels in all frames", frames * width * height, self.pixels),
        ):
            if found > most:
                raise _BeyondLimits(
                    f"the video is too large ({found} {what}): expected at most {most}; make it shorter or smaller."
                )


def load_video(source: VideoSource, fps: float | None = None, limits: VideoLimits | None = None) -> Video:
    """Open a video: a folder of pictures, an animated GIF, WebP or PNG, or (with PyAV installed) a video file.

    It is given by its path or a ``file://`` URL.

    A folder's pictures are taken in the order of the numbers in their names, ``fps`` of them a second (24); other
    videos have times of their own. A video file's frames are turned as its display matrix says. Frames of folders and
    video files are read when they are used: those of a minute would fill gigabytes. Of a file that is damaged or breaks
    off, what can be read is taken, with a warning.

    Raises:
        UserError: missing, unreadable, beyond ``limits``, or of a kind that is not supported here.
    """
    if isinstance(source, Video):
        return source
    if not isinstance(source, str | Path):
        raise UserError(f"expected a video as a path or a Video, found {shown(source)}.")
    path = local_path(source)
    if path.is_dir():
        video = Video(_pictures(path), _DEFAULT_FPS if fps is None else fps)
    elif not path.is_file():
        raise UserError(f"no video at {path}: give a video file or a folder of pictures.")
    elif path.suffix.lower() in _ANIMATIONS:
        video = _animation(path, limits)
    else:
        frames = _FileFrames(path, limits)
        video = Video(frames, frames.fps, times=frames.times)
    if not video.frames:
        raise UserError(f"{path} holds no frames: give a video file or a folder of pictures.")
    return video


def _pictures(folder: Path) -> list[Path]:
    paths = [path for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")]
    for path in sorted(paths):
        with picture_errors(str(path)), Image.open(path):  # reads the header alone
            pass
    return sorted(paths, key=_numbered)


def _numbered(path: Path) -> tuple[list[str | int], str]:
    """Sorts ``frame2`` before ``frame10``: texts and numbers of a name in turn, and the name where they are equal."""
    parts = re.split("([0-9]+)", path.name)
    return [int(part) if place % 2 else part for place, part in enumerate(parts)], path.name


def _animation(path: Path, limits: VideoLimits | None) -> Video:
    frames: list[Image.Image] = []
    durations: list[float] = []  # in milliseconds
    try:
        with Image.open(path) as image:
            for frame in ImageSequence.Iterator(image):
                if limits:
                    limits.check(len(frames) + 1, *image.size)
                if image.info.get("default_image") and image.tell() == 0:
                    continue  # of an APNG: for programs that show no animations
                loaded = load_image(frame)  # before which a WebP's frame does not tell its duration
                durations.append(frame.info.get("duration", 0))
                frames.append(loaded)
    except _BeyondLimits:
        raise
    except Exception as error:  # each decoder raises kinds of its own on damaged files
        if not frames:
            raise UserError(f"{path} cannot be read as an animation ({error}): give an undamaged file.") from error
        _warn_of_damage(path, str(error), len(frames))
    starts = list(itertools.accumulate(durations[:-1], initial=0))
    if len(set(durations)) <= 1 or not starts[-1]:
        seconds = sum(durations) / 1000
        return Video(frames, len(frames) / seconds if seconds else _DEFAULT_FPS)
    return Video(frames, (len(frames) - 1) * 1000 / starts[-1], times=tuple(start / 1000 for start in starts))


def _warn_of_damage(path: Path, reason: str, count: int) -> None:
    log.warning("%s is damaged or breaks off (%s): the %d frames that can be read are taken", path, reason, count)


class _FileFrames(Sequence[Image.Image]):
    """The frames of a video file, decoded as they are asked for; quick in ascending order.

    They are counted by decoding them once: what a file says of their number is not reliable.
    """

    def __init__(self, path: Path, limits: VideoLimits | None = None) -> None:
        self._path, self._limits = path, limits
        faults: list[str] = []
        pts = [frame.pts for frame in self._decode(faults)]
        if faults and not pts:
            raise UserError(f"{path} cannot be read as a video ({faults[0]}): give a video file or pictures.")
        if faults:
            _warn_of_damage(path, faults[0], len(pts))
        self._count = len(pts)
        self._next = self._count  # of the decoder's frames; at the end it starts anew
        self.fps = float(self._rate or _DEFAULT_FPS)
        self.times = self._times(pts)
        if self.times:
            self.fps = (self._count - 1) / self.times[-1]

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Image.Image:  # type: ignore[override]
        if not 0 <= index < self._count:
            raise IndexError(index)
        if index < self._next:
            self._decoder, self._next = self._decode([]), 0
        frame = next(itertools.islice(self._decoder, index - self._next, None), None)
        if frame is None:
            raise UserError(
                f"{self._path} has fewer frames than when it was opened: leave it as it is while it is used."
            )
        self._next = index + 1
        return _turned(frame)

    def _times(self, pts: list[int | None]) -> tuple[float, ...] | None:
        """Seconds from the first frame on; None: at a constant rate, as far as the file's clock can tell."""
        known = [tick for tick in pts if tick is not None]
        if len(known) < 2 or len(known) < len(pts) or not self._time_base:
            return None
        ticks = np.array([tick - known[0] for tick in known], np.float64)
        interval = 1 / (self.fps * self._time_base)
        if np.abs(ticks - np.arange(len(ticks)) * interval).max() <= min(1, interval / 4):
            return None
        if not ticks[-1] or (np.diff(ticks) < 0).any():
            log.warning("%s has timestamps that do not ascend: its frames are taken as evenly spaced", self._path)
            return None
        return tuple((ticks * self._time_base).tolist())

    def _decode(self, faults: list[str]) -> Iterator[Any]:
        """Frames of PyAV in the order they are shown in; what keeps others from being read goes to ``faults``."""
        try:
            import av
        except ModuleNotFoundError:
            raise UserError(
                f"reading {self._path} needs PyAV (pip install av); without it, give a folder of pictures or an "
                "animated GIF."
            ) from None
        try:
            with av.open(str(self._path), options=_CONTAINERS_ALONE if self._limits else {}) as container:
                stream = container.streams.video[0]
                if stream.codec_context is None:  # the process of older PyAV would die on using it
                    raise UserError(f"{self._path} has a video of an unknown codec: convert it, or give pictures.")
                stream.thread_type = "AUTO"
                if self._limits:
                    self._limits.check(stream.frames, stream.codec_context.width, stream.codec_context.height)
                    stream.codec_context.options = {"max_pixels": str(self._limits.frame_pixels)}
                self._rate = stream.average_rate or stream.guessed_rate
                self._time_base = float(stream.time_base or 0)
                count = 0
                for packet in _packets(container, stream, faults):
                    try:
                        frames = stream.decode(packet)
                    except av.FFmpegError as error:
                        faults.append(str(error))
                        continue
                    count += len(frames)
                    if self._limits and frames:
                        self._limits.check(count, frames[-1].width, frames[-1].height)
                    yield from frames
        except (av.FFmpegError, IndexError, UnicodeError) as error:
            raise UserError(
                f"{self._path} cannot be read as a video ({error}): give a video file or pictures."
            ) from error


def _packets(container: Any, stream: Any, faults: list[str]) -> Iterator[Any]:
    """A stream's packets, and None, with which decoders end; what shows that some are missing goes to ``faults``."""
    import av

    end = None  # of whatever is shown or heard last: any stream may be the one that reaches the time stated
    try:
        for packet in container.demux():
            if packet.pts is not None and packet.time_base:
                end = max(end or 0.0, float((packet.pts + (packet.duration or 0)) * packet.time_base))
            if packet.is_corrupt:
                faults.append("a piece of it is cut off")
            if packet.stream_index == stream.index and packet.size:  # an empty packet would end decoding
                yield packet
    except av.FFmpegError as error:
        faults.append(str(error))
    stated = (container.duration or 0) / av.time_base
    if end is not None and stated > end + _END_TOLERANCE:
        faults.append(f"it ends after {end:.1f} of {stated:.1f} seconds")
    yield None


def _turned(frame: Any) -> Image.Image:
    """A frame of PyAV as its display matrix wants it shown, to the nearest quarter turn."""
    image = frame.to_image()
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return image
    # FFmpeg's libavutil/display.h: x' = a x + c y and y' = b x + d y, of int32 a, b, u, c, d, v, ...
    a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5].tolist()
    exchanged = abs(b) + abs(c) > abs(a) + abs(d)
    turn = _TURNS[(exchanged, c < 0, b < 0) if exchanged else (False, a < 0, d < 0)]
    return image if turn is None else image.transpose(turn)


@dataclasses.dataclass(frozen=True)
class VideoProcessor:
    """Picks frames, resizes them to whole patches within the checkpoint's limits of volume, and cuts them."""

    parameters: PatchParameters
    fps: float | None
    """Frames to take from each second; None: as many as ``max_frames`` allows, at any rate."""
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
        is_rate = fps is None or (isinstance(fps, int | float) and 0 < fps < math.inf)
        if not is_rate or any(type(n) is not int or n < 1 for n in counts):
            raise UserError(
                f"{path} has a frame rate or a limit that is not positive: download the model again and export it."
            )
        min_frames, max_frames, frame_tokens = counts
        most = frame_tokens if settings["cap_pixels_per_frame"] else None
        return cls(parameters, fps, min_frames, max_frames, most)

    def __call__(self, video: Video) -> Patches:
        """Raises `UserError` for frames of different sizes, or fewer than a temporal patch takes."""
        p = self.parameters
        if len(video.frames) < p.temporal_patch_size:
            raise UserError(
                f"a video needs at least {p.temporal_patch_size} frames, found {len(video.frames)}: give it as a "
                "picture."
            )
        taken = range(len(video.frames)) if video.frame_indices else self._sample(video)
        frames = (load_image(video.frames[index]) for index in taken)
        first = next(frames)
        size = self._resized_size(len(taken), *first.size)
        resized = []
        for frame in itertools.chain([first], frames):
            if frame.size != first.size:
                raise UserError("the frames of a video differ in size: expected all of one size.")
            resized.append(frame.resize(size, Image.Resampling.BICUBIC))
        pixel_values, grid = p.patches(resized + resized[-1:] * (-len(resized) % p.temporal_patch_size))
        if video.times is None:
            seconds = [index / video.fps for index in video.frame_indices or taken]
        else:
            seconds = [video.times[index] for index in taken]
        return Patches.of(pixel_values, grid, p.merge_size, tuple(self._timestamps(seconds)))

    def _sample(self, video: Video) -> list[int]:
        """Indices of evenly spaced frames, first and last among them.

        Where the frame rate varies, they are those nearest to evenly spaced times, none taken twice; by number, where
        these would be fewer than ``min_frames``. Without ``fps``, always by number, and those of a video that has fewer
        than ``min_frames`` several times: so does the reference.
        """
        total = len(video.frames)
        if self.fps is None:
            count = min(max(total, self.min_frames), self.max_frames)
            return np.linspace(0, total - 1, count).round().astype(int).tolist()
        least = min(self.min_frames, self.max_frames, total)
        count = int(min(max(total / video.fps * self.fps, least), self.max_frames, total))
        if video.times is not None:
            times = np.array(video.times)
            targets = np.linspace(times[0], times[-1], count)
            nearest = sorted({int(np.abs(times - target).argmin()) for target in targets})
            if len(nearest) >= least:
                return nearest
            count = least
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

    def _timestamps(self, seconds: list[float]) -> Iterator[float]:
        """The middle between the first and last frame of each temporal patch."""
        step = self.parameters.temporal_patch_size
        padded = seconds + seconds[-1:] * (-len(seconds) % step)
        for first, last in zip(padded[::step], padded[step - 1 :: step], strict=True):
            yield (first + last) / 2

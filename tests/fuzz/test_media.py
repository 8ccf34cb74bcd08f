"""Pictures and videos whose bytes came to harm."""

import io

import numpy as np
import pytest

from pascalvl.plugins.bundle import IMAGE_PROCESSOR, VIDEO_PROCESSOR
from pascalvl.runtime.image import ImageProcessor, load_image
from pascalvl.runtime.video import VideoProcessor, load_video
from tests.fuzz.mutators import damaged_bytes

MODES = {
    "png": "RGB L LA RGBA P I;16 1",
    "jpeg": "RGB L CMYK",
    "webp": "RGB RGBA",
    "gif": "P",
    "bmp": "RGB L 1",
    "tiff": "RGB L I;16 F CMYK",
}


def check(patches):
    """Patches that a model can take."""
    t, h, w = patches.grid
    assert len(patches.pixel_values) == t * h * w > 0
    assert np.isfinite(patches.pixel_values).all()
    assert np.abs(patches.pixel_values).max() <= 1


def test_pictures(fuzz, nano_checkpoint, colours):
    processor = ImageProcessor.from_file(nano_checkpoint / IMAGE_PROCESSOR, 100_000)
    files = []
    for kind, modes in MODES.items():
        for mode in modes.split():
            file = io.BytesIO()
            colours(61, 47).convert("RGB").convert("L" if mode in ("I;16", "F") else mode).convert(mode).save(
                file, kind
            )
            files.append(file.getvalue())

    def case(draw):
        content = damaged_bytes(draw, draw.choice(files))
        if patches := fuzz.attempt(lambda: processor(load_image(content))):
            check(patches)

    fuzz(case)
    assert fuzz.refused
    assert fuzz.used


def animation(kind, frames):
    file = io.BytesIO()
    frames[0].save(file, kind, save_all=True, append_images=frames[1:], duration=200)
    return file.getvalue()


def encoded(container, codec, frames):
    av = pytest.importorskip("av")
    file = io.BytesIO()
    with av.open(file, "w", format=container) as output:
        stream = output.add_stream(codec, rate=5)
        stream.width, stream.height, stream.pix_fmt = *frames[0].size, "yuv420p"
        for frame in frames:
            output.mux(stream.encode(av.VideoFrame.from_image(frame)))
        output.mux(stream.encode())
    return file.getvalue()


def test_videos(fuzz, nano_checkpoint, colours, tmp_path):
    processor = VideoProcessor.from_file(nano_checkpoint / VIDEO_PROCESSOR, 200_000)
    frames = [colours(64, 48, turn) for turn in range(8)]
    files = [(kind, animation(kind, frames)) for kind in ("gif", "webp", "png")]
    files += [
        (suffix, encoded(container, codec, frames))
        for suffix, container, codec in (
            ("mp4", "mp4", "mpeg4"),
            ("mkv", "matroska", "mpeg4"),
            ("avi", "avi", "mpeg4"),
            ("webm", "webm", "libvpx"),
            ("ts", "mpegts", "mpeg2video"),
        )
    ]

    def case(draw):
        suffix, content = draw.choice(files)
        path = tmp_path / f"clip.{suffix}"
        path.write_bytes(damaged_bytes(draw, content))
        if patches := fuzz.attempt(lambda: processor(load_video(path))):
            check(patches)
            assert list(patches.timestamps) == sorted(patches.timestamps)

    fuzz(case)
    assert fuzz.refused
    assert fuzz.used

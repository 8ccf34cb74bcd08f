"""Videos preprocessed as Hugging Face does it."""

import numpy as np
import pytest
from PIL import Image
from transformers import Qwen3VLVideoProcessor
from transformers.video_utils import VideoMetadata

from pascalvl.plugins.errors import UserError
from pascalvl.runtime.image import load_image
from pascalvl.runtime.video import Video, VideoProcessor, load_video

# The reference resizes with torchvision: on smooth frames its pixels are at most two levels of 2/255 from Pillow's.
TWO_LEVELS = 2 * 2 / 255 + 1e-5


@pytest.fixture(scope="module")
def processor(nano_checkpoint):
    return VideoProcessor.from_file(nano_checkpoint / "video_preprocessor_config.json")


@pytest.fixture(scope="module")
def reference(nano_checkpoint):
    return Qwen3VLVideoProcessor.from_pretrained(nano_checkpoint)


def clip(count, width=64, height=96):
    t, y, x, channel = np.mgrid[0:count, 0:height, 0:width, 0:3]
    frames = (128 + 100 * np.sin(x / 9 + channel + t) * np.cos(y / 7 + t / 3)).astype(np.uint8)
    return frames, [Image.fromarray(frame) for frame in frames]


@pytest.mark.parametrize(
    ("count", "fps"), [(4, 2.0), (8, 2.0), (60, 24.0), (61, 30.0), (7, 1.0), (2, 24.0), (240, 25.0)]
)
def test_equals_the_reference_where_nothing_is_resized(processor, reference, count, fps):
    frames, pictures = clip(count)
    metadata = VideoMetadata(count, fps=fps, width=64, height=96, duration=count / fps)
    expected = reference(
        [frames], video_metadata=[metadata], do_sample_frames=True, return_metadata=True, return_tensors="np"
    )
    patches = processor(Video(pictures, fps))
    assert patches.grid == tuple(expected["video_grid_thw"][0])
    expected_pixels = np.asarray(expected["pixel_values_videos"])
    resized = patches.grid[1:] != (96 // 16, 64 // 16)
    np.testing.assert_allclose(patches.pixel_values, expected_pixels, atol=TWO_LEVELS if resized else 1e-5, rtol=0)


@pytest.mark.parametrize("size", [(100, 75), (17, 20), (640, 360), (33, 300)])
def test_equals_the_reference_to_two_levels_where_frames_are_resized(processor, reference, size):
    frames, pictures = clip(6, *size)
    expected = reference([frames], do_sample_frames=False, return_tensors="np")
    patches = processor(Video(pictures, 2.0, tuple(range(6))))
    assert patches.grid == tuple(expected["video_grid_thw"][0])
    difference = np.abs(patches.pixel_values - np.asarray(expected["pixel_values_videos"]))
    assert difference.max() <= TWO_LEVELS
    assert difference.mean() <= TWO_LEVELS / 8


def test_defaults_are_the_references(tmp_path):
    (tmp_path / "video_preprocessor_config.json").write_text("{}")
    processor = VideoProcessor.from_file(tmp_path / "video_preprocessor_config.json")
    reference = Qwen3VLVideoProcessor()
    frames, pictures = clip(50, 256, 160)
    metadata = VideoMetadata(50, fps=10.0, width=256, height=160, duration=5.0)
    expected = reference([frames], video_metadata=[metadata], do_sample_frames=True, return_tensors="np")
    patches = processor(Video(pictures, 10.0))
    assert patches.grid == tuple(expected["video_grid_thw"][0])
    assert np.abs(patches.pixel_values - np.asarray(expected["pixel_values_videos"])).max() <= TWO_LEVELS


def test_timestamps_are_the_middles_of_the_temporal_patches(processor):
    _, pictures = clip(5)
    patches = processor(Video(pictures, 4.0, (0, 4, 8, 12, 16)))
    assert patches.is_video
    np.testing.assert_allclose(patches.timestamps, [0.5, 2.5, 4.0])  # the last frame is repeated


def test_loads_animations_and_folders(tmp_path):
    pictures = [Image.new("RGB", (32, 32), (i * 60, 0, 0)) for i in range(4)]
    pictures[0].save(tmp_path / "clip.gif", save_all=True, append_images=pictures[1:], duration=250)
    pictures[0].save(tmp_path / "clip.png", save_all=True, append_images=pictures[1:], duration=250)
    (tmp_path / "frames").mkdir()
    for i, picture in enumerate(pictures):
        picture.save(tmp_path / "frames" / f"{i:03}.png")
    for name, fps in (("clip.gif", 4.0), ("clip.png", 4.0), ("frames", 24.0)):
        video = load_video(tmp_path / name)
        assert video.fps == fps
        assert [frame.getpixel((5, 5))[0] for frame in video.frames] == pytest.approx([0, 60, 120, 180], abs=8)
    assert load_video(video) is video


def test_loads_video_files(tmp_path):
    av = pytest.importorskip("av")
    path = tmp_path / "clip.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=5)
        stream.width = stream.height = 64
        for level in (40, 90, 140, 190):
            frame = av.VideoFrame.from_image(Image.new("RGB", (64, 64), (level, level, level)))
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    video = load_video(path)
    assert video.fps == 5.0
    assert [frame.getpixel((30, 30))[0] for frame in video.frames] == pytest.approx([40, 90, 140, 190], abs=6)


@pytest.mark.parametrize(
    ("name", "phrase"),
    [("nowhere.mp4", "no video at"), ("empty", "holds no frames"), ("text.gif", "cannot be read as")],
)
def test_bad_videos(tmp_path, name, phrase):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.gif").write_text("no animation")
    with pytest.raises(UserError, match=phrase):
        load_video(tmp_path / name)


def test_file_that_is_no_video(tmp_path):
    (tmp_path / "text.mp4").write_text("no video")
    with pytest.raises(UserError, match=r"cannot be read as a video|needs PyAV"):
        load_video(tmp_path / "text.mp4")


def test_frames_of_different_sizes(tmp_path):
    for i in range(2):
        Image.new("RGB", (32, 32 + i)).save(tmp_path / f"{i}.png")
    with pytest.raises(UserError, match="differ in size"):
        load_video(tmp_path)


def test_too_few_frames(processor):
    with pytest.raises(UserError, match="at least 2 frames, found 1"):
        processor(Video([load_image(Image.new("RGB", (32, 32)))], 2.0))

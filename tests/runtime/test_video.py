"""Videos preprocessed as Hugging Face does it."""

import functools
import json
import sys

import numpy as np
import pytest
from PIL import Image
from transformers import Qwen3VLProcessor, Qwen3VLVideoProcessor
from transformers.video_utils import VideoMetadata
from transformers.video_utils import load_video as reference_load_video

from pascalvl.plugins.errors import UserError
from pascalvl.runtime import video as video_module
from pascalvl.runtime.image import load_image
from pascalvl.runtime.video import Video, VideoProcessor, load_video

# The reference resizes with torchvision: on smooth frames, as these are, its pixels are at most two levels of 2/255
# from Pillow's (measured: 2). The test of pictures tells the reason.
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
    indices = expected["video_metadata"][0].frames_indices
    assert patches.timestamps == tuple(Qwen3VLProcessor._calculate_timestamps(None, indices, fps, 2))
    resized = patches.grid[1:] != (96 // 16, 64 // 16)
    np.testing.assert_allclose(patches.pixel_values, expected_pixels, atol=TWO_LEVELS if resized else 1e-5, rtol=0)


@pytest.mark.parametrize("size", [(100, 75), (17, 20), (100, 10), (640, 360), (33, 300)])
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


@pytest.mark.parametrize(
    "settings",
    [
        {"cap_pixels_per_frame": True},
        {"cap_pixels_per_frame": True, "max_video_tokens": 8, "size": {"shortest_edge": 4096, "longest_edge": 10**7}},
        {"cap_pixels_per_frame": True, "size": {"shortest_edge": 5000, "longest_edge": 5100}},
        {"min_pixels": 10**6, "max_pixels": 2 * 10**6},  # the older names mean nothing here
        {"fps": 5, "min_frames": 2, "max_frames": 5},
        {"temporal_patch_size": 3},
    ],
)
def test_settings_mean_what_they_do_to_the_reference(nano_checkpoint, tmp_path, settings):
    path = tmp_path / "video_preprocessor_config.json"
    path.write_text(json.dumps(json.loads((nano_checkpoint / path.name).read_text()) | settings))
    processor, reference = VideoProcessor.from_file(path), Qwen3VLVideoProcessor.from_pretrained(tmp_path)
    for count, fps, width, height in [(16, 2.0, 160, 90), (7, 3.3, 33, 120), (30, 10.0, 64, 96)]:
        frames, pictures = clip(count, width, height)
        metadata = VideoMetadata(count, fps=fps, width=width, height=height, duration=count / fps)
        expected = reference([frames], video_metadata=[metadata], return_tensors="np")
        patches = processor(Video(pictures, fps))
        assert patches.grid == tuple(expected["video_grid_thw"][0])
        assert np.abs(patches.pixel_values - np.asarray(expected["pixel_values_videos"])).max() <= TWO_LEVELS


@pytest.mark.parametrize(
    ("settings", "phrase"),
    [
        ({"do_sample_frames": False}, "sets do_sample_frames to False: only True is supported"),
        ({"num_frames": 6}, "sets num_frames to 6: only None"),
        ({"fps": None}, "not positive"),
        ({"fps": float("inf")}, "not positive"),
        ({"max_frames": 0}, "not positive"),
        ({"min_frames": 4.5}, "not positive"),
        ({"size": None}, "cannot be read"),
    ],
)
def test_processor_files_that_cannot_be_used(tmp_path, settings, phrase):
    (tmp_path / "video_preprocessor_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=phrase):
        VideoProcessor.from_file(tmp_path / "video_preprocessor_config.json")


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
        reds = [load_image(frame).getpixel((5, 5))[0] for frame in video.frames]
        assert reds == pytest.approx([0, 60, 120, 180], abs=8)
    assert load_video(video) is video


def test_frames_of_a_folder_are_read_only_if_they_are_taken(processor, tmp_path, monkeypatch):
    _, pictures = clip(50)
    for i, picture in enumerate(pictures):
        picture.save(tmp_path / f"{i:03}.png")
    (tmp_path / ".index").write_text("of a file manager")
    expected = processor(Video(pictures, 24.0))
    opened = []
    monkeypatch.setattr(video_module, "load_image", lambda path: opened.append(path.name) or load_image(path))
    patches = processor(load_video(tmp_path))
    assert opened == ["000.png", "016.png", "033.png", "049.png"]
    np.testing.assert_array_equal(patches.pixel_values, expected.pixel_values)


def test_frames_may_be_transparent(processor):
    """They are put on white, as pictures are."""
    clear, white = (Video([Image.new("RGBA", (64, 64), (255, 255, 255, a))] * 4, 2.0) for a in (0, 255))
    np.testing.assert_array_equal(processor(clear).pixel_values, processor(white).pixel_values)
    assert processor(clear).pixel_values.min() == 1


@pytest.fixture
def video_file(tmp_path):
    av = pytest.importorskip("av")
    path = tmp_path / "clip.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=5)
        stream.width, stream.height = 64, 96
        for picture in clip(23)[1]:
            container.mux(stream.encode(av.VideoFrame.from_image(picture)))
        container.mux(stream.encode())
    return path


def test_video_files_are_decoded_and_sampled_as_the_reference_does(processor, reference, video_file):
    video = load_video(video_file)
    assert (len(video.frames), video.fps) == (23, 5.0)
    sample = functools.partial(reference.sample_frames, fps=reference.fps)
    frames, metadata = reference_load_video(str(video_file), backend="pyav", sample_indices_fn=sample)
    for index, frame in zip(metadata.frames_indices, frames, strict=True):
        np.testing.assert_array_equal(np.asarray(video.frames[index]), frame)
    patches = processor(video)
    selected = Video([Image.fromarray(frame) for frame in frames], 5.0, tuple(metadata.frames_indices))
    np.testing.assert_array_equal(patches.pixel_values, processor(selected).pixel_values)
    assert patches.timestamps == processor(selected).timestamps


def test_frames_of_a_video_file_in_any_order(video_file):
    frames = load_video(video_file).frames
    in_order = [np.asarray(frame) for frame in frames]
    assert len(in_order) == 23
    for index in (22, 3, 3, 0, 17):
        np.testing.assert_array_equal(np.asarray(frames[index]), in_order[index])
    with pytest.raises(IndexError):
        frames[23]


def test_without_pyav(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    (tmp_path / "clip.mp4").write_bytes(b"anything")
    with pytest.raises(UserError, match=r"needs PyAV \(pip install av\)"):
        load_video(tmp_path / "clip.mp4")


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


def test_picture_in_a_folder_that_cannot_be_read(tmp_path):
    (tmp_path / "0.png").write_text("no picture")
    with pytest.raises(UserError, match=r"0\.png is not a picture"):
        load_video(tmp_path)


@pytest.mark.parametrize("error", [IndexError("index out of range"), Image.DecompressionBombError("too large")])
def test_damage_of_which_decoders_raise_other_errors(tmp_path, monkeypatch, error):
    def fail(_):
        raise error

    (tmp_path / "clip.gif").touch()
    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(UserError, match=r"clip\.gif cannot be read as an animation"):
        load_video(tmp_path / "clip.gif")


@pytest.mark.parametrize("source", [None, b"bytes", 5])
def test_what_is_no_source(source):
    with pytest.raises(UserError, match="expected a video as a path"):
        load_video(source)


def test_frames_of_different_sizes(processor):
    with pytest.raises(UserError, match="differ in size"):
        processor(Video([Image.new("RGB", (32, 32 + i)) for i in range(4)], 2.0))


def test_too_few_frames(processor):
    for frames in ([], [Image.new("RGB", (32, 32))]):
        with pytest.raises(UserError, match=f"at least 2 frames, found {len(frames)}"):
            processor(Video(frames, 2.0))


@pytest.mark.parametrize("fps", [0, -1.0, float("nan"), float("inf")])
def test_frame_rates_out_of_range(fps):
    with pytest.raises(UserError, match="expected a positive number"):
        Video([Image.new("RGB", (32, 32))] * 4, fps)


def test_indices_that_do_not_fit_the_frames():
    with pytest.raises(UserError, match="4 frames with 3 frame indices"):
        Video([Image.new("RGB", (32, 32))] * 4, 2.0, (0, 1, 2))

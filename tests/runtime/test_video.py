"""Videos preprocessed as Hugging Face does it."""

import functools
import json
import logging
import re
import sys
from fractions import Fraction

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
def unlimited(nano_checkpoint, tmp_path_factory):
    """As `processor`, with as many frames as two a second are."""
    path = tmp_path_factory.mktemp("unlimited") / "video_preprocessor_config.json"
    path.write_text(json.dumps(json.loads((nano_checkpoint / path.name).read_text()) | {"max_frames": 768}))
    return VideoProcessor.from_file(path)


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
        {"fps": None},
        {"fps": None, "min_frames": 20, "max_frames": 24},
        {"rescale_factor": 0.00392157},
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
        assert video.times is None
    assert load_video(video) is video


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_frames_of_an_animation_last_as_long_as_it_says(processor, tmp_path, suffix):
    _, pictures = clip(5)
    durations = [100, 300, 50, 1050, 2000]
    pictures[0].save(tmp_path / f"clip.{suffix}", save_all=True, append_images=pictures[1:], duration=durations)
    video = load_video(tmp_path / f"clip.{suffix}")
    assert video.times == (0.0, 0.1, 0.4, 0.45, 1.5)
    assert video.fps == pytest.approx(4 / 1.5)
    # 5 frames of this rate make 3 at two a second, and 4 is the least: at 0, 0.5, 1 and 1.5 seconds, where twice the
    # fourth frame is the nearest. So they are taken by number, as few as they are.
    assert processor(video).timestamps == pytest.approx([(0 + 0.1) / 2, (0.45 + 1.5) / 2])


def test_a_held_last_frame_does_not_slow_the_others(tmp_path):
    _, pictures = clip(6)
    pictures[0].save(tmp_path / "clip.gif", save_all=True, append_images=pictures[1:], duration=[100] * 5 + [5000])
    video = load_video(tmp_path / "clip.gif")
    assert (video.fps, video.times) == (10.0, (0.0, 0.1, 0.2, 0.3, 0.4, 0.5))


def test_picture_for_programs_without_animations_is_no_frame(tmp_path):
    _, (poster, *pictures) = clip(4)
    poster.save(
        tmp_path / "clip.png", save_all=True, append_images=pictures, duration=[100, 200, 300], default_image=True
    )
    video = load_video(tmp_path / "clip.png")
    assert video.times == pytest.approx((0, 0.1, 0.3))
    for frame, picture in zip(video.frames, pictures, strict=True):
        np.testing.assert_array_equal(np.asarray(frame), np.asarray(picture))


def test_pictures_of_a_folder_come_in_the_order_of_their_numbers(tmp_path):
    ordered = ["2x10.png", "10x2.png", "10x10.png", "frame1.png", "frame02.png", "frame2.png", "frame010.png"]
    ordered += ["frame99999999999999999999.png", "frames1.png", "last.png"]
    for name in sorted(ordered):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    assert [path.name for path in load_video(tmp_path).frames] == ordered


def test_a_folder_has_the_rate_that_is_given(processor, tmp_path):
    _, pictures = clip(12)
    for i, picture in enumerate(pictures):
        picture.save(tmp_path / f"frame{i}.png")
    patches = processor(load_video(tmp_path, 3.0))
    expected = processor(Video(pictures, 3.0))
    assert patches.timestamps == expected.timestamps != processor(load_video(tmp_path)).timestamps
    np.testing.assert_array_equal(patches.pixel_values, expected.pixel_values)
    with pytest.raises(UserError, match=r"0\.0 frames a second: expected a positive number"):
        load_video(tmp_path, 0.0)


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


def write_video(path, pictures, rate=5, pts=None, tick=Fraction(1, 1000), codec="mpeg4", **options):
    """A video file of ``rate`` frames a second, or of frames that are shown at ``pts``, in ticks."""
    av = pytest.importorskip("av")
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream(codec, rate=rate, options={"g": "12"} if codec == "mpeg4" else {})
        stream.width, stream.height = pictures[0].size
        stream.pix_fmt = "yuv420p" if codec == "mpeg4" else "yuvj420p"
        if pts is not None:
            stream.codec_context.time_base = tick
        for i, picture in enumerate(pictures):
            frame = av.VideoFrame.from_image(picture)
            if pts is not None:
                frame.pts, frame.time_base = pts[i], tick
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


@pytest.fixture
def video_file(tmp_path):
    return write_video(tmp_path / "clip.mp4", clip(23)[1])


def warnings_of(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


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


@pytest.mark.parametrize("rate", [Fraction(30), Fraction(30000, 1001), Fraction(24000, 1001), Fraction(7)])
@pytest.mark.parametrize("suffix", ["mp4", "mkv", "avi", "ts"])
def test_constant_rates_are_sampled_as_the_reference_does(processor, reference, tmp_path, caplog, suffix, rate):
    """Whatever the ticks that the container rounds times to: Matroska's are milliseconds."""
    video = load_video(write_video(tmp_path / f"clip.{suffix}", clip(70)[1], rate))
    assert (len(video.frames), video.fps, video.times) == (70, float(rate), None)
    metadata = VideoMetadata(70, fps=float(rate), width=64, height=96, duration=70 / float(rate))
    taken = reference.sample_frames(metadata, fps=reference.fps)
    expected = Qwen3VLProcessor._calculate_timestamps(None, list(taken), float(rate), 2)
    assert processor(video).timestamps == tuple(expected)
    assert warnings_of(caplog) == []


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_frames_are_shown_when_the_file_says(unlimited, tmp_path, suffix):
    """Ten frames a second, then one: evenly spaced, as their mean rate has it, they would be 0.37 seconds apart."""
    milliseconds = [*range(500, 2500, 100), *range(2500, 8500, 1000)]
    _, pictures = clip(len(milliseconds))
    video = load_video(write_video(tmp_path / f"clip.{suffix}", pictures, 10, milliseconds))
    assert video.times == pytest.approx([(time - 500) / 1000 for time in milliseconds])
    assert video.fps == pytest.approx(25 / 7)
    # 26 frames of this rate are 7.28 seconds, of which two a second are taken: 14 times from 0 to 7, 7/13 apart.
    taken = [0, 5, 11, 16, 20, 21, 22, 23, 24, 25]
    distance = np.abs(np.linspace(0, 7, 14)[:, None] - np.array(video.times))
    assert sorted(set(distance.argmin(1).tolist())) == taken
    seconds = [0, 0.5, 1.1, 1.6, 2, 3, 4, 5, 6, 7]
    patches = unlimited(video)
    assert patches.timestamps == pytest.approx([(a + b) / 2 for a, b in zip(seconds[::2], seconds[1::2], strict=True)])
    selected = Video([video.frames[i] for i in taken], 1.0, tuple(range(10)))
    np.testing.assert_array_equal(patches.pixel_values, unlimited(selected).pixel_values)


@pytest.mark.parametrize(("count", "fps"), [(96, 24.0), (250, 25.0), (61, 30.0)])
def test_dropped_frames_change_neither_frames_nor_times(processor, reference, count, fps):
    """A video whose encoder left out frames that the reference would not take: what it takes of the whole is taken."""
    _, pictures = clip(count)
    metadata = VideoMetadata(count, fps=fps, width=64, height=96, duration=count / fps)
    wanted = reference.sample_frames(metadata, fps=reference.fps)
    others = np.random.default_rng(count).permutation(np.setdiff1d(range(count), wanted))[: count // 2]
    kept = sorted({*wanted.tolist(), *others.tolist()})
    times = tuple(index / fps for index in kept)
    mean = (len(kept) - 1) / times[-1]
    varied, whole = Video([pictures[i] for i in kept], mean, times=times), Video(pictures, fps)
    assert processor(varied).timestamps == pytest.approx(processor(whole).timestamps)
    np.testing.assert_array_equal(processor(varied).pixel_values, processor(whole).pixel_values)


def test_a_frame_that_is_shown_long_is_taken_once(unlimited):
    """Two a second of 22 seconds: a burst of 20 frames a second, a still of 20 seconds, and another burst."""
    times = (*np.arange(20) / 20, *(21 + np.arange(20) / 20))
    _, pictures = clip(40)
    patches = unlimited(Video(pictures, 39 / times[-1], times=times))
    seconds = [times[i] for i in (0, 11, 19, 20, 28, 39)]
    targets = np.linspace(0, times[-1], 40)
    assert {times[i] for i in np.abs(targets[:, None] - np.array(times)).argmin(1)} == set(seconds)
    assert patches.timestamps == pytest.approx([(a + b) / 2 for a, b in zip(seconds[::2], seconds[1::2], strict=True)])


def test_times_that_run_backwards(tmp_path, caplog):
    """Two recordings in one file, as MPEG-TS allows: the second begins at the time of the first."""
    once = write_video(tmp_path / "clip.ts", clip(20)[1], 10).read_bytes()
    (tmp_path / "clip.ts").write_bytes(once * 2)
    video = load_video(tmp_path / "clip.ts")
    assert (len(video.frames), video.times) == (40, None)
    assert "timestamps that do not ascend: its frames are taken as evenly spaced" in warnings_of(caplog)[-1]


@pytest.mark.parametrize(
    ("a", "b", "c", "d"),
    [(s, 0, 0, t) for s in (1, -1) for t in (1, -1)] + [(0, s, t, 0) for s in (1, -1) for t in (1, -1)],
)
def test_frames_are_turned_as_the_file_says(processor, video_file, a, b, c, d):
    """The matrix of an MP4 file's track header, by which (x, y) goes to (a x + c y, b x + d y)."""
    plain = np.asarray(load_video(video_file).frames[7])
    data = bytearray(video_file.read_bytes())
    start = data.index(b"tkhd") + 44  # the name, version and flags, 20 bytes of times and ids, 16 of others
    matrix = np.frombuffer(data, ">i4", 9, start)
    assert matrix.tolist() == [1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30]
    matrix[[0, 1, 3, 4]] = np.array([a, b, c, d]) << 16
    video_file.write_bytes(data)
    height, width, _ = plain.shape
    y, x = np.mgrid[:height, :width]
    new_x, new_y = a * x + c * y, b * x + d * y
    new_x, new_y = new_x - new_x.min(), new_y - new_y.min()
    expected = np.empty((new_y.max() + 1, new_x.max() + 1, 3), np.uint8)
    expected[new_y, new_x] = plain
    video = load_video(video_file)
    np.testing.assert_array_equal(np.asarray(video.frames[7]), expected)
    rows, columns = processor(video).grid[1:]
    assert (rows > columns) == (expected.shape[0] > expected.shape[1])


@pytest.mark.parametrize(
    ("suffix", "options", "reason"),
    [
        ("mp4", {"movflags": "faststart"}, "a piece of it is cut off"),
        ("mkv", {}, r"it ends after \d\.\d of 6\.0 seconds"),
        ("avi", {}, "a piece of it is cut off"),
    ],
)
def test_video_file_that_breaks_off(tmp_path, caplog, suffix, options, reason):
    path = write_video(tmp_path / f"clip.{suffix}", clip(60)[1], 10, **options)
    whole = load_video(path)
    assert len(whole.frames) == 60
    assert warnings_of(caplog) == []
    data = path.read_bytes()
    cut = tmp_path / f"cut.{suffix}"
    cut.write_bytes(data[: len(data) * 3 // 5])
    video = load_video(cut)
    count = len(video.frames)
    assert 10 < count < 50
    (warning,) = warnings_of(caplog)
    assert re.search(rf"cut\.{suffix} is damaged or breaks off \({reason}\): the {count} frames .* are taken", warning)
    for index in (0, count - 3):  # the last ones may be damaged
        np.testing.assert_array_equal(np.asarray(video.frames[index]), np.asarray(whole.frames[index]))
    cut.write_bytes(data[:200])
    with pytest.raises(UserError, match=r"cannot be read as a video"):
        load_video(cut)


def test_video_file_with_a_hole(tmp_path, caplog):
    """Frames after the damage are read, too."""
    path = write_video(tmp_path / "clip.mkv", clip(60)[1], 10, codec="mjpeg")
    whole = [np.asarray(frame) for frame in load_video(path).frames]
    data = path.read_bytes()
    start = data.index(b"\xff\xd8\xff", len(data) // 2)  # of a picture
    end = data.index(b"\xff\xd9", start)
    path.write_bytes(data[:start] + bytes(end - start) + data[end:])
    video = load_video(path)
    assert len(video.frames) == 59
    np.testing.assert_array_equal(np.asarray(video.frames[58]), whole[59])
    assert video.times[-1] == pytest.approx(5.9)
    (warning,) = warnings_of(caplog)
    assert "clip.mkv is damaged or breaks off" in warning


@pytest.mark.parametrize("suffix", ["gif", "png"])
def test_animation_that_breaks_off(tmp_path, caplog, suffix):
    _, pictures = clip(6)
    path = tmp_path / f"clip.{suffix}"
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=[100, 200, 300, 400, 500, 600])
    whole = load_video(path)
    assert warnings_of(caplog) == []
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 3 // 5])
    video = load_video(path)
    assert len(video.frames) == 3
    assert video.times == (0, 0.1, 0.3)
    for frame, expected in zip(video.frames, whole.frames, strict=False):
        np.testing.assert_array_equal(np.asarray(frame), np.asarray(expected))
    (warning,) = warnings_of(caplog)
    assert re.search(r"is damaged or breaks off \(.*\): the 3 frames that can be read are taken", warning)


def test_video_file_that_is_cut_while_it_is_used(tmp_path):
    path = write_video(tmp_path / "clip.mkv", clip(60)[1], 10)
    video = load_video(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match="has fewer frames than when it was opened"):
        video.frames[59]


def test_codec_that_is_not_known(video_file):
    video_file.write_bytes(video_file.read_bytes().replace(b"mp4v", b"none").replace(b"esds", b"free"))
    with pytest.raises(UserError, match="unknown codec: convert it"):
        load_video(video_file)


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


def test_a_rate_near_zero(processor):
    """Of which a second lasts longer than any number can say."""
    assert processor(Video([Image.new("RGB", (64, 64))] * 4, 5e-324)).grid[0] == 2


@pytest.mark.parametrize(
    ("given", "phrase"),
    [
        ({"frame_indices": (0, 1, 2)}, "4 frames with 3 frame indices"),
        ({"times": (0.0, 1.0, 2.0)}, "4 frames with 3 times"),
        ({"times": (0.0, 2.0, 1.0, 3.0)}, "times do not ascend"),
        ({"times": (0.0, 1.0, 2.0, float("nan"))}, "times do not ascend"),
        ({"times": (0.0, 1.0, 2.0, 3.0), "frame_indices": (0, 1, 2, 3)}, "expected one of them"),
    ],
)
def test_indices_and_times_that_do_not_fit_the_frames(given, phrase):
    with pytest.raises(UserError, match=phrase):
        Video([Image.new("RGB", (32, 32))] * 4, 2.0, **given)

"""Pictures preprocessed as Hugging Face does it."""

import base64
import io
import json
import os
import struct
from fractions import Fraction
from urllib.parse import quote

import numpy as np
import pytest
from PIL import Image, ImageOps
from transformers import Qwen2VLImageProcessor, Qwen2VLImageProcessorPil
from transformers.image_utils import load_image as reference_load_image

from pascalvl.plugins.errors import UserError
from pascalvl.runtime.image import ImageProcessor, load_image

# What the interface promises; both round alike, and the difference measured is 0.
TOLERANCE = 1e-5
LEVEL = 2 / 255
"""One of a byte's levels, after normalising with mean and deviation 0.5."""
SIZES = [(64, 64), (63, 97), (1, 1), (1, 150), (150, 1), (31, 33), (500, 500), (1999, 301), (48, 80)]


@pytest.fixture(scope="module")
def processor(nano_checkpoint):
    return ImageProcessor.from_file(nano_checkpoint / "preprocessor_config.json")


@pytest.fixture(scope="module")
def reference(nano_checkpoint):
    return Qwen2VLImageProcessorPil.from_pretrained(nano_checkpoint)


def noise(width, height, mode="RGB"):
    rng = np.random.default_rng(width * 10007 + height)
    return Image.fromarray(rng.integers(0, 256, (height, width, 4), np.uint8), "RGBA").convert(mode)


def smooth(width, height):
    y, x = np.mgrid[0:height, 0:width]
    waves = [128 + 100 * np.sin(x / 9 + channel) * np.cos(y / 7) for channel in range(3)]
    return Image.fromarray(np.stack(waves, -1).astype(np.uint8))


def check_equal(processor, reference, image):
    patches = processor(load_image(image))
    expected = reference(image, return_tensors="np")
    assert patches.grid == tuple(expected["image_grid_thw"][0])
    np.testing.assert_allclose(patches.pixel_values, expected["pixel_values"], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("size", SIZES)
def test_equals_the_reference_at_odd_sizes(processor, reference, size):
    check_equal(processor, reference, noise(*size))


def test_equals_the_reference_on_a_very_large_picture(processor, reference):
    check_equal(processor, reference, noise(6000, 4001))


@pytest.mark.parametrize("mode", ["RGBA", "P", "L", "LA", "1", "CMYK", "I", "F"])
def test_equals_the_reference_in_every_mode(processor, reference, mode):
    image = noise(75, 60, "L").convert(mode) if mode in "IF" else noise(75, 60, mode)
    check_equal(processor, reference, image)


def test_equals_the_reference_on_files(processor, reference, tmp_path):
    """Files as they come: palette with transparency, CMYK JPEG, turned by EXIF."""
    exif = Image.Exif()
    exif[0x0112] = 6
    noise(90, 40, "P").save(tmp_path / "palette.png", transparency=0)
    noise(90, 40, "CMYK").save(tmp_path / "cmyk.jpg")
    noise(90, 40).save(tmp_path / "turned.jpg", exif=exif)
    assert load_image(tmp_path / "turned.jpg").size == (40, 90)
    for path in sorted(tmp_path.iterdir()):
        expected = reference(ImageOps.exif_transpose(Image.open(path)), return_tensors="np")["pixel_values"]
        patches = processor(load_image(path))
        np.testing.assert_allclose(patches.pixel_values, expected, atol=TOLERANCE, rtol=0, err_msg=path.name)


def check_greys(source, expected):
    np.testing.assert_array_equal(np.asarray(load_image(source)), np.asarray(expected)[..., None].repeat(3, -1))


@pytest.mark.parametrize("suffix", ["png", "tiff", "pgm"])
def test_levels_of_16_bits_are_divided_by_257(tmp_path, suffix):
    """Every level; Hugging Face's processor makes all of them above 255 white."""
    levels = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    if suffix == "pgm":  # which older Pillow does not write
        (tmp_path / "deep.pgm").write_bytes(b"P5 256 256 65535\n" + levels.astype(">u2").tobytes())
    else:
        Image.fromarray(levels).save(tmp_path / f"deep.{suffix}")
    expected = [[round(Fraction(level, 257)) for level in row] for row in levels.tolist()]
    check_greys(tmp_path / f"deep.{suffix}", expected)
    assert (expected[0][0], expected[128][0], expected[255][255]) == (0, 128, 255)


@pytest.mark.parametrize("order", ["<", ">"])
def test_levels_of_16_bits_in_every_byte_order(order):
    """Of a dark picture, too, which a rule by its own values would take for one of 8 bits."""
    data = np.array([[0, 100, 128, 129, 250, 514]], f"{order}u2").tobytes()
    image = Image.frombytes("I;16" if order == "<" else "I;16B", (6, 1), data)
    check_greys(image, [[0, 0, 0, 1, 1, 2]])


def test_transparent_level_of_16_bits_is_white(tmp_path):
    levels = np.array([[0, 5140, 5141, 65535]], np.uint16)
    Image.fromarray(levels).save(tmp_path / "deep.png", transparency=5140)
    check_greys(tmp_path / "deep.png", [[0, 255, 20, 255]])


def test_deep_picture_is_turned_by_exif(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.array([[0, 25700, 65535]], np.uint16)).save(tmp_path / "deep.png", exif=exif)
    check_greys(tmp_path / "deep.png", [[0], [100], [255]])


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0, 1, 128, 255], [0, 1, 128, 255]),  # 8 bits in a wider type
        ([0, 256, 257, 65535], [0, 1, 1, 255]),  # 16 bits
        ([0, 1000, 50000, 65536], [0, 4, 195, 255]),  # its own range
        ([-(2**31), -1, 0, 2**31 - 1], [0, 127, 128, 255]),
        ([-500, 0, 1500, 1500], [0, 64, 255, 255]),
        ([70000, 70000, 70000, 70000], [0, 0, 0, 0]),
    ],
)
def test_integers_of_32_bits(tmp_path, values, expected):
    Image.fromarray(np.array([values], np.int32)).save(tmp_path / "deep.tiff")
    check_greys(tmp_path / "deep.tiff", [expected])


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0, 0.25, 0.5, 1], [0, 64, 128, 255]),
        ([0.1, 0.2, 0.2, 0.3], [26, 51, 51, 77]),  # not stretched
        ([0, 1, 128, 255], [0, 1, 128, 255]),  # 8 bits in a wider type
        ([0, 1, 2, 255.9], [0, 1, 2, 255]),  # its own range, as of all below
        ([-1, 0, 0.5, 1], [0, 128, 191, 255]),
        ([0, 1000, 2000, 10000], [0, 26, 51, 255]),
        ([-3e38, 0, 0, 3e38], [0, 128, 128, 255]),
        ([0, np.nan, np.inf, -np.inf], [0, 0, 255, 0]),
        ([100, np.nan, np.inf, 300], [0, 0, 255, 255]),
        ([np.nan, np.nan, np.nan, np.nan], [0, 0, 0, 0]),
    ],
)
def test_floats(tmp_path, values, expected):
    Image.fromarray(np.array([values], np.float32)).save(tmp_path / "deep.tiff")
    check_greys(tmp_path / "deep.tiff", [expected])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_opening_equals_the_reference_in_every_orientation(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    noise(90, 40).save(tmp_path / "turned.jpg", exif=exif)
    expected = reference_load_image(str(tmp_path / "turned.jpg"))
    for source in (tmp_path / "turned.jpg", (tmp_path / "turned.jpg").read_bytes()):
        np.testing.assert_array_equal(np.asarray(load_image(source)), np.asarray(expected))


def test_transparency_is_on_white():
    """As the reference's processor does it; its `load_image`, which drops the alpha channel, shows what was hidden."""
    assert load_image(Image.new("RGBA", (4, 4), (255, 0, 0, 0))).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize(("picture", "most", "mean"), [(smooth, 2, 0.25), (noise, 30, 0.5)])
def test_torchvision_backed_processor_differs_by_rounding_alone(processor, nano_checkpoint, picture, most, mean):
    """Levels that differ at most, measured over sizes from 20 to 700: smooth pictures 2, on average 0.14; noise 25 and
    0.39. Both round to bytes between a pass over rows and one over columns, where Pillow from version 13 on takes the
    quicker one first: up to version 12 noise too differs by 2."""
    reference = Qwen2VLImageProcessor.from_pretrained(nano_checkpoint)
    for size in [(500, 333), (40, 70), (63, 97), (120, 600)]:
        image = picture(*size)
        expected = reference(image, return_tensors="np")
        patches = processor(image)
        assert patches.grid == tuple(expected["image_grid_thw"][0])
        difference = np.abs(patches.pixel_values - np.asarray(expected["pixel_values"])) / LEVEL
        assert difference.max() <= most + 1e-3
        assert difference.mean() <= mean


def test_defaults_are_the_references(tmp_path):
    (tmp_path / "preprocessor_config.json").write_text("{}")
    processor = ImageProcessor.from_file(tmp_path / "preprocessor_config.json")
    check_equal(processor, Qwen2VLImageProcessorPil(), noise(300, 200))


@pytest.mark.parametrize("settings", [{"min_pixels": 10000, "max_pixels": 30000}, {"max_pixels": 20000}])
def test_older_names_of_the_limits(tmp_path, settings):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    processor = ImageProcessor.from_file(tmp_path / "preprocessor_config.json")
    for size in [(300, 200), (60, 30)]:
        check_equal(processor, Qwen2VLImageProcessorPil(**settings), noise(*size))


def test_max_pixels_lowers_the_limit(nano_checkpoint):
    path = nano_checkpoint / "preprocessor_config.json"
    image = noise(300, 200)
    limited = ImageProcessor.from_file(path, 32 * 32 * 6)(image)
    expected = Qwen2VLImageProcessorPil.from_pretrained(nano_checkpoint)(
        image, size={"shortest_edge": 32 * 32 * 4, "longest_edge": 32 * 32 * 6}, return_tensors="np"
    )
    np.testing.assert_allclose(limited.pixel_values, expected["pixel_values"], atol=TOLERANCE, rtol=0)
    assert np.prod(ImageProcessor.from_file(path, 10**9)(image).grid) > np.prod(limited.grid)
    with pytest.raises(UserError, match="a limit of 1000 pixels is out of range: expected at least 1024"):
        ImageProcessor.from_file(path, 1000)


def test_digest_is_of_the_content(processor):
    first = processor(noise(64, 96)).digest
    assert processor(noise(64, 96)).digest == first
    black = Image.new("RGB", (64, 96))
    dot = black.copy()
    dot.putpixel((63, 95), (0, 0, 1))
    others = [processor(picture).digest for picture in (black, dot, Image.new("RGB", (96, 64)))]
    assert len({first, *others}) == 4


@pytest.mark.parametrize(
    ("content", "phrase"),
    [(b"", "not a picture"), (b"not a picture at all", "not a picture"), ("truncated", "cannot be read")],
)
def test_unreadable_files(tmp_path, content, phrase):
    if content == "truncated":
        buffer = io.BytesIO()
        noise(64, 64).save(buffer, "PNG")
        content = buffer.getvalue()[:2000]
    (tmp_path / "bad.png").write_bytes(content)
    with pytest.raises(UserError, match=phrase):
        load_image(tmp_path / "bad.png")
    with pytest.raises(UserError, match=phrase):
        load_image(content)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(UserError, match="no picture at"):
        load_image(tmp_path / "nowhere.png")
    with pytest.raises(UserError, match="cannot be read"):
        load_image(tmp_path)


@pytest.mark.parametrize("source", [None, 5, ["a.png"]])
def test_what_is_no_source(source):
    with pytest.raises(UserError, match="expected a picture as a path"):
        load_image(source)


@pytest.mark.parametrize("error", [IndexError("index"), RuntimeError("codec"), EOFError("end"), ZeroDivisionError("0")])
def test_damage_of_which_decoders_raise_other_errors(tmp_path, monkeypatch, error):
    def fail(_):
        raise error

    monkeypatch.setattr(Image, "open", fail)
    (tmp_path / "bad.avif").touch()
    with pytest.raises(UserError, match=rf"bad\.avif cannot be read \({error}\)"):
        load_image(tmp_path / "bad.avif")


def test_picture_without_pixels():
    with pytest.raises(UserError, match="has no pixels"):
        load_image(Image.new("RGB", (0, 5)))


def test_decompression_bomb(tmp_path, monkeypatch):
    noise(64, 64).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(UserError, match="too large"):
        load_image(tmp_path / "bomb.png")


def test_pictures_by_their_urls(tmp_path):
    """A file and a ``data:`` URL; that is as Hugging Face reads it."""
    picture = noise(40, 30)
    path = tmp_path / "a picture, 100%#é?.png"
    picture.save(path)
    encoded = base64.b64encode(path.read_bytes()).decode()
    urls = [path.as_uri(), f"FILE://localhost{path.as_uri()[7:]}", f"file://{tmp_path}/a picture, 100%25#é?.png"]
    urls += [f"data:image/png;base64,{encoded}", f"DATA:;base64,{encoded[:50]}\n{quote(encoded[50:])}"]
    for url in urls:
        assert load_image(url).tobytes() == picture.tobytes()
    odd = os.fsdecode(bytes(tmp_path) + b"/\xff.png")  # which is no UTF-8
    picture.save(odd)
    for url in (f"file://{tmp_path}/%ff.png", f"file://{odd}", odd):
        assert load_image(url).tobytes() == picture.tobytes()
    assert reference_load_image(urls[3]).tobytes() == picture.tobytes()


@pytest.mark.parametrize(
    ("url", "phrase"),
    [
        ("https://example.org/a.png", "'https://example.org/a.png' is no file here: download or save it first"),
        ("s3://bucket/a.png", "is no file here"),
        ("file://elsewhere/a.png", "is no file here"),
        ("file:///nowhere/a.png", "no picture at /nowhere/a.png"),
        ("file:///\ud800", "/.* cannot be read"),
        ("file:///a%00b", r"cannot be read \(embedded null"),
        ("data:image/png;base64,AAAA", "the picture is not a picture that can be read"),
        ("data:image/png;base64,A===", r"the picture cannot be read \(.*base64"),
        ("data:image/png;base64,_-!?", r"the picture cannot be read \(.*base64"),
        ("data:image/png,AAAA", r"the picture cannot be read \(it is a data: URL, but not in base64\)"),
        ("data:", "not in base64"),
        ("https://example.org/" + "a" * 10**6, "is no file here"),
        ("iVBORw0KGgo" * 10**5, "expected the path of a file, found 1100000 characters, 'iVBORw0KGgo.*…"),
        (["a" * 10**6], "expected a picture as a path, bytes or PIL image, found .'aaa.*…"),
    ],
)
def test_urls_that_cannot_be_read(url, phrase):
    with pytest.raises(UserError, match=phrase) as error:
        load_image(url)
    assert len(str(error.value)) < 300


def test_limits_before_decoding(tmp_path, monkeypatch):
    """Whatever Pillow's own limit is; of a file whose pixels are missing nothing but the header can be read."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    path = tmp_path / "large.bmp"
    Image.new("1", (8, 8)).save(path)
    header = bytearray(path.read_bytes())
    for width, height in ((13_378, 13_378), (200_000, 900)):
        header[18:26] = struct.pack("<ii", width, height)
        path.write_bytes(header)
        for source in (path, str(path), path.as_uri(), bytes(header)):
            with pytest.raises(UserError, match=rf"too large \({width}x{height} pixels, more than 178956970\)"):
                load_image(source)
    with path.open("wb") as file:
        file.truncate((1 << 30) + 1)
    with pytest.raises(UserError, match=r"large\.bmp is too large \(1073741825 bytes, more than 1073741824\)"):
        load_image(path)


def test_special_files(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, "/dev/zero"):
        with pytest.raises(UserError, match=r"cannot be read \(it is no regular file\)"):
            load_image(path)


def test_too_thin(processor):
    with pytest.raises(UserError, match="1x201 pixels is too thin"):
        processor(noise(1, 201))


@pytest.mark.parametrize(
    ("content", "phrase"),
    [
        ('{"do_normalize": false}', "sets do_normalize to False: only True is supported"),
        ('{"resample": 2}', "sets resample to 2: only 3"),
        ('{"do_normalize": null}', "sets do_normalize to None: only True"),
        ('{"rescale_factor": 0}', "cannot be read .*rescale_factor"),
        ('{"rescale_factor": 255}', "cannot be read .*rescale_factor"),
        ('{"rescale_factor": null}', "cannot be read"),
        ("[", "cannot be read"),
        ("[" * 100_000, "cannot be read"),
        ("[]", "expected a JSON object"),
        ('{"size": {"height": 64, "width": 64}}', "cannot be read .*shortest_edge"),
        ('{"patch_size": 0}', "cannot be read"),
        ('{"image_mean": [0.5]}', "cannot be read"),
        ('{"image_std": 0.5}', "cannot be read"),
    ],
)
def test_processor_files_that_cannot_be_used(tmp_path, content, phrase):
    path = tmp_path / "preprocessor_config.json"
    path.write_text(content)
    with pytest.raises(UserError, match=phrase):
        ImageProcessor.from_file(path)


@pytest.mark.parametrize(
    "settings",
    [
        {"do_normalize": True, "rescale_factor": 0.00392156862745098, "resample": 3, "do_resize": True},
        {"do_convert_rgb": None},
        {"rescale_factor": 0.00392157},
        {"rescale_factor": 0.0078},
    ],
)
def test_settings_mean_what_they_do_to_the_reference(tmp_path, settings):
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps(settings))
    check_equal(ImageProcessor.from_file(path), Qwen2VLImageProcessorPil.from_pretrained(tmp_path), noise(70, 90))

"""Pictures preprocessed as Hugging Face does it."""

import io
import json

import numpy as np
import pytest
from PIL import Image, ImageOps
from transformers import Qwen2VLImageProcessor, Qwen2VLImageProcessorPil

from pascalvl.plugins.errors import UserError
from pascalvl.runtime.image import ImageProcessor, load_image

# One rounding of float32 near one; the reference rescales and normalises in the same order.
TOLERANCE = 1e-5
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
    """Files as they come: palette with transparency, 16 bits, CMYK JPEG, turned by EXIF."""
    exif = Image.Exif()
    exif[0x0112] = 6
    noise(90, 40, "P").save(tmp_path / "palette.png", transparency=0)
    Image.fromarray(np.arange(64 * 80, dtype=np.uint16).reshape(64, 80) * 12).save(tmp_path / "deep.png")
    noise(90, 40, "CMYK").save(tmp_path / "cmyk.jpg")
    noise(90, 40).save(tmp_path / "turned.jpg", exif=exif)
    assert load_image(tmp_path / "turned.jpg").size == (40, 90)
    for path in sorted(tmp_path.iterdir()):
        expected = reference(ImageOps.exif_transpose(Image.open(path)), return_tensors="np")["pixel_values"]
        patches = processor(load_image(path))
        np.testing.assert_allclose(patches.pixel_values, expected, atol=TOLERANCE, rtol=0, err_msg=path.name)


def test_torchvision_backed_processor_differs_by_its_rounding_alone(processor, nano_checkpoint):
    """Its 8-bit resize has 16-bit weights where Pillow's have 22: smooth pictures are at most two levels apart."""
    reference = Qwen2VLImageProcessor.from_pretrained(nano_checkpoint)
    for size in [(500, 333), (40, 70), (63, 97)]:
        image = smooth(*size)
        expected = reference(image, return_tensors="np")
        patches = processor(image)
        assert patches.grid == tuple(expected["image_grid_thw"][0])
        difference = np.abs(patches.pixel_values - np.asarray(expected["pixel_values"]))
        assert difference.max() <= 2 * 2 / 255 + TOLERANCE
        assert difference.mean() <= 0.25 * 2 / 255


def test_defaults_are_the_references(tmp_path):
    (tmp_path / "preprocessor_config.json").write_text("{}")
    processor = ImageProcessor.from_file(tmp_path / "preprocessor_config.json")
    check_equal(processor, Qwen2VLImageProcessorPil(), noise(300, 200))


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
    first, again, other = noise(64, 64), noise(64, 64), noise(64, 96)
    assert processor(first).digest == processor(again).digest != processor(other).digest


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


def test_picture_without_pixels():
    with pytest.raises(UserError, match="has no pixels"):
        load_image(Image.new("RGB", (0, 5)))


def test_decompression_bomb(tmp_path, monkeypatch):
    noise(64, 64).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(UserError, match="too large"):
        load_image(tmp_path / "bomb.png")


def test_too_thin(processor):
    with pytest.raises(UserError, match="1x201 pixels is too thin"):
        processor(noise(1, 201))


def test_processor_with_a_step_switched_off(tmp_path):
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps({"do_normalize": False}))
    with pytest.raises(UserError, match="switches off do_normalize"):
        ImageProcessor.from_file(path)
    path.write_text("[")
    with pytest.raises(UserError, match="cannot be read"):
        ImageProcessor.from_file(path)

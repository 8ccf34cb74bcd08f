"""Files for the host as people have them: read as Hugging Face reads the same folder, or refused in one sentence."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, Qwen2VLImageProcessorPil, Qwen3VLForConditionalGeneration
from transformers.video_utils import VideoMetadata

from pascalvl.engines import build
from pascalvl.export import export_checkpoint
from pascalvl.export.checkpoint import Checkpoint
from pascalvl.plugins.errors import UserError
from pascalvl.plugins.kv_format import CacheConfig
from pascalvl.runtime import VisionLanguageModel
from pascalvl.runtime.generation import GenerationConfig
from pascalvl.runtime.image import ImageProcessor
from pascalvl.runtime.prompt import PromptBuilder
from pascalvl.runtime.video import Video, VideoProcessor
from tests.engines.torch_reference import answer, reference_answer, scene, user

IMAGE, VIDEO, BOTH = "preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json"
GENERATION, CONFIG = "generation_config.json", "config.json"
# The reference resizes videos with torchvision, see the tests of videos.
TWO_LEVELS = 2 * 2 / 255 + 1e-5


@pytest.fixture
def copy(nano_checkpoint, tmp_path):
    return shutil.copytree(nano_checkpoint, tmp_path / "checkpoint")


def edit(checkpoint, name, **settings):
    path = checkpoint / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


def written(checkpoint):
    """The folder with the files that a bundle gets, and the model's config."""
    folder = checkpoint.parent / "files"
    folder.mkdir()
    with Checkpoint(checkpoint) as opened:
        opened.copy_host_files(folder)
        return folder, opened.model_config()


def conversation(count, fps, size):
    rng = np.random.default_rng(count)
    levels = np.linspace(0, 255, count * size[0] * size[1] * 3).reshape(count, size[1], size[0], 3).astype(np.uint8)
    video = Video([Image.fromarray(frame) for frame in levels], fps)
    picture = Image.fromarray(rng.integers(0, 256, (90, 130, 3), np.uint8))
    parts = [{"type": "image", "image": picture}, {"type": "video", "video": video}, {"type": "text", "text": "What?"}]
    metadata = VideoMetadata(count, fps=fps, width=size[0], height=size[1], frames_indices=list(range(count)))
    return [{"role": "user", "content": parts}], {"images": [picture], "videos": [levels], "video_metadata": [metadata]}


def check_prompts(checkpoint, reference):
    """Prompts with the files of a checkpoint are those of Hugging Face's processor with the folder ``reference``."""
    folder, config = written(checkpoint)
    builder = PromptBuilder(folder, config)
    processor = AutoProcessor.from_pretrained(reference)
    processor.image_processor = Qwen2VLImageProcessorPil.from_pretrained(reference)
    for count, fps, size in [(9, 2.0, (64, 96)), (30, 10.0, (160, 90)), (3, 2.0, (64, 64))]:
        messages, media = conversation(count, fps, size)
        text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        expected = processor(text=[text], return_tensors="pt", **media)
        prompt = builder.build(messages)
        np.testing.assert_array_equal(prompt.token_ids, expected["input_ids"][0])
        picture, video = (visual.patches for visual in prompt.visuals)
        assert [list(picture.grid), list(video.grid)] == [
            expected[f"{kind}_grid_thw"][0].tolist() for kind in ("image", "video")
        ]
        np.testing.assert_allclose(picture.pixel_values, expected["pixel_values"], atol=1e-5, rtol=0)
        np.testing.assert_allclose(video.pixel_values, expected["pixel_values_videos"], atol=TWO_LEVELS, rtol=0)


def as_transformers_saves_it(checkpoint):
    processor = AutoProcessor.from_pretrained(checkpoint)
    for name in (IMAGE, VIDEO, "chat_template.jinja", "tokenizer.json", "tokenizer_config.json"):
        (checkpoint / name).unlink()
    processor.save_pretrained(checkpoint)
    assert not (checkpoint / IMAGE).exists()
    assert not (checkpoint / VIDEO).exists()


def with_older_files_beside_it(checkpoint):
    """What `processor_config.json` says counts."""
    as_transformers_saves_it(checkpoint)
    (checkpoint / IMAGE).write_text('{"size": {"shortest_edge": 4096, "longest_edge": 4096}}')
    (checkpoint / VIDEO).write_text('{"size": {"shortest_edge": 4096, "longest_edge": 4096}}')


def with_a_processor_config_of_old(checkpoint):
    """Which names the class alone."""
    (checkpoint / BOTH).write_text('{"processor_class": "Qwen3VLProcessor"}')


@pytest.mark.parametrize(
    "change",
    [as_transformers_saves_it, with_older_files_beside_it, with_a_processor_config_of_old],
    ids=lambda change: change.__name__,
)
def test_processors_in_one_file(copy, change):
    change(copy)
    check_prompts(copy, copy)


def test_videos_without_a_file_of_their_own(copy, caplog):
    (copy / VIDEO).unlink()
    check_prompts(copy, copy)
    assert f"has no {VIDEO}: videos get the sizes of pictures" in caplog.text


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        (IMAGE, {"rescale_factor": 0.00392157}),
        (IMAGE, {"rescale_factor": 0.0078}),
        (IMAGE, {"size": {"shortest_edge": 4096.0, "longest_edge": 8192.0}}),
        (VIDEO, {"rescale_factor": 0.00392157}),
        (VIDEO, {"fps": None}),
        (VIDEO, {"fps": None, "max_frames": 6}),
        (VIDEO, {"fps": None, "min_frames": 8}),
        (VIDEO, {"fps": None, "num_frames": 5}),
        (VIDEO, {"do_sample_frames": False}),
        (VIDEO, {"cap_pixels_per_frame": None}),
    ],
    ids=str,
)
def test_settings_mean_what_they_do_to_the_reference(copy, name, settings):
    edit(copy, name, **settings)
    check_prompts(copy, copy)


@pytest.mark.parametrize(
    "settings",
    [
        {"patch_size": 16.0},
        {"merge_size": 2.0, "temporal_patch_size": 2.0},
        {"fps": 2.0, "min_frames": 2.0, "max_frames": 6.0, "max_video_tokens": 700.0},
    ],
    ids=str,
)
def test_whole_numbers_written_as_floats(copy, tmp_path, settings):
    """Most of which the reference takes as integers alone."""
    reference = shutil.copytree(copy, tmp_path / "reference")
    for name in (IMAGE, VIDEO):
        edit(copy, name, **settings)
        edit(reference, name, **{key: int(value) for key, value in settings.items()})
    check_prompts(copy, reference)


def test_what_is_written_is_what_the_runtime_reads(copy, nano_checkpoint):
    """All variants come out as one."""
    as_transformers_saves_it(copy)
    folder, _ = written(copy)
    for kind, name in ((ImageProcessor, IMAGE), (VideoProcessor, VIDEO), (GenerationConfig, GENERATION)):
        assert kind.from_file(folder / name) == kind.from_file(nano_checkpoint / name)


# The tokens that end an answer ----------------------------------------------------------------------------------------


def without_a_file(checkpoint):
    (checkpoint / GENERATION).unlink()


def with_tokens_in_the_outer_config(checkpoint):
    without_a_file(checkpoint)
    edit(checkpoint, CONFIG, eos_token_id=[7, 8])


def with_settings_in_the_text_config(checkpoint):
    without_a_file(checkpoint)
    text = json.loads((checkpoint / CONFIG).read_text())["text_config"]
    edit(checkpoint, CONFIG, text_config={**text, "do_sample": True, "temperature": 0.5, "eos_token_id": 5})


def with_one_token(checkpoint):
    edit(checkpoint, GENERATION, eos_token_id=2001)


@pytest.mark.parametrize(
    ("change", "tokens"),
    [
        (without_a_file, {2002}),
        (with_tokens_in_the_outer_config, {7, 8}),
        (with_settings_in_the_text_config, {5}),
        (with_one_token, {2001}),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_generation_settings_are_the_references(copy, change, tokens):
    change(copy)
    expected = Qwen3VLForConditionalGeneration.from_pretrained(copy, dtype=torch.float32).generation_config
    found = GenerationConfig.from_file(written(copy)[0] / GENERATION)
    eos = expected.eos_token_id
    assert found.eos_token_ids == set(eos if isinstance(eos, list) else [eos]) == tokens
    assert found.sampling.temperature == ((expected.temperature or 1) if expected.do_sample else 0)


@pytest.mark.parametrize("stored", [{}, {"eos_token_id": None}, {"eos_token_id": [], "repetition_penalty": 1.5}])
def test_a_file_that_names_no_token_has_the_text_configs(copy, stored):
    """The reference's answers would not end."""
    (copy / GENERATION).write_text(json.dumps(stored))
    found = GenerationConfig.from_file(written(copy)[0] / GENERATION)
    assert found.eos_token_ids == {2002}
    assert found.sampling.repetition_penalty == stored.get("repetition_penalty", 1)


def test_answers_of_what_transformers_saves(nano_checkpoint, nano_reference, tmp_path):
    """Of the inner model, with its names of tensors; without a generation config, and processors in one file."""
    nano_reference.model.save_pretrained(tmp_path / "checkpoint")
    AutoProcessor.from_pretrained(nano_checkpoint).save_pretrained(tmp_path / "checkpoint")
    assert not {IMAGE, VIDEO, GENERATION} & {path.name for path in (tmp_path / "checkpoint").iterdir()}
    export_checkpoint(tmp_path / "checkpoint", tmp_path / "model")
    build(tmp_path / "model", tmp_path / "engine", "onnxruntime", CacheConfig.parse("f32"))
    model = VisionLanguageModel.open(tmp_path / "engine", context_length=256)
    messages = [user(scene(3, 100, 70), "How many squares are there?")]
    reference = Qwen3VLForConditionalGeneration.from_pretrained(tmp_path / "checkpoint", dtype=torch.float32).eval()
    expected = reference_answer(reference, model.prompt(messages), 20)[0]
    assert answer(model, messages, 20).token_ids == expected


# What cannot be used --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "phrase"),
    [
        (BOTH, '{"image_processor": [1]}', "expected image_processor in"),
        (BOTH, "{", "processor_config.json cannot be read"),
        (VIDEO, '{"video_processor_type": "Qwen2VLVideoProcessor"}', "only 'Qwen3VLVideoProcessor' is supported"),
        (GENERATION, "[]", "expected a JSON object"),
    ],
)
def test_files_that_cannot_be_used(copy, name, content, phrase):
    (copy / name).write_text(content)
    with pytest.raises(UserError) as error:
        Checkpoint(copy)
    assert phrase in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "phrase"),
    [
        ({"eos_token_id": None}, "neither generation_config.json nor config.json"),
        ({"eos_token_id": None, "do_sample": "maybe", "max_new_tokens": -1}, "add the model's generation_config.json"),
    ],
)
def test_no_token_that_ends_an_answer(copy, changes, phrase):
    without_a_file(copy)
    text = json.loads((copy / CONFIG).read_text())["text_config"]
    edit(copy, CONFIG, text_config={**text, **changes})
    with pytest.raises(UserError, match=phrase):
        Checkpoint(copy)

"""What people's disks hold, damaged: bundles, checkpoints, tokenizers, folders of prompts, saved caches."""

import json
import os
import shutil

import pytest

from pascalvl.export.checkpoint import Checkpoint
from pascalvl.plugins.bundle import EMBEDDINGS, GENERATION_CONFIG, HOST_FILES, MANIFEST, POSITIONS, TOKENIZER, Manifest
from pascalvl.runtime import VisionLanguageModel
from pascalvl.runtime.generation import GenerationConfig
from pascalvl.runtime.prompt import PromptBuilder
from pascalvl.runtime.prompt_folder import read_prompts
from pascalvl.runtime.tokenizer import Tokenizer
from tests.fuzz.mutators import damaged_bytes, damaged_file, damaged_json

MESSAGES = [{"role": "user", "content": "What is in the picture?"}]


def linked(folder, target):
    """A copy of a folder, of links."""
    target.mkdir()
    for path in folder.iterdir():
        os.link(path, target / path.name)
    return target


def replace(path, content):
    """Write a file in place of a link."""
    path.unlink(missing_ok=True)
    path.write_bytes(content)


@pytest.fixture
def bundle(nano_engine_bundle, tmp_path):
    return linked(nano_engine_bundle, tmp_path / "bundle")


def test_bytes_of_manifests(fuzz, bundle):
    """None is taken that says anything else."""
    whole = (bundle / MANIFEST).read_bytes()
    expected = Manifest.read(bundle, "engine")

    def case(draw):
        replace(bundle / MANIFEST, damaged_file(draw, whole))
        if found := fuzz.attempt(lambda: Manifest.read(bundle, "engine")):
            assert found == expected

    fuzz(case)
    assert fuzz.refused


def test_one_file_of_a_bundle(fuzz, bundle):
    """Whichever is altered, the bundle is not opened."""
    names = sorted(path.name for path in bundle.iterdir() if path.stat().st_size < 1 << 20)
    contents = {name: (bundle / name).read_bytes() for name in names}

    def case(draw):
        name = draw.choice(names)
        damaged = damaged_bytes(draw, contents[name])
        replace(bundle / name, damaged)
        opened = fuzz.attempt(lambda: VisionLanguageModel.open(bundle, context_length=64))
        assert opened is None or damaged == contents[name] or json.loads(damaged) == json.loads(contents[name])
        replace(bundle / name, contents[name])

    fuzz(case)
    assert fuzz.refused


def test_files_of_a_checkpoint(fuzz, nano_checkpoint, tmp_path):
    directory = linked(nano_checkpoint, tmp_path / "checkpoint")
    names = sorted(path.name for path in directory.glob("*.json"))
    contents = {name: (directory / name).read_bytes() for name in names}

    def export():
        with Checkpoint(directory) as checkpoint:
            checkpoint.model_config()
            checkpoint.meta_model()
            shutil.rmtree(tmp_path / "files", ignore_errors=True)
            (tmp_path / "files").mkdir()
            checkpoint.copy_host_files(tmp_path / "files")
            return checkpoint.model_config()

    def case(draw):
        name = draw.choice(names)
        replace(directory / name, damaged_file(draw, contents[name]))
        if config := fuzz.attempt(export):
            fuzz.attempt(lambda: use_host_files(tmp_path / "files", config))
        replace(directory / name, contents[name])

    fuzz(case)
    assert fuzz.refused
    assert fuzz.used


def use_host_files(directory, config):
    GenerationConfig.from_file(directory / GENERATION_CONFIG)
    prompt = PromptBuilder(directory, config).build(MESSAGES)
    assert prompt.token_ids.min() >= 0
    assert prompt.token_ids.max() < config.text.vocab_size


def test_files_that_the_runtime_reads(fuzz, bundle):
    """With hashes that are right: as another's export may have written them."""
    config = Manifest.read(bundle, "engine").model
    names = sorted(set(HOST_FILES) - {EMBEDDINGS, POSITIONS, "chat_template.jinja"})
    contents = {name: (bundle / name).read_bytes() for name in names}

    def case(draw):
        name = draw.choice(names)
        replace(bundle / name, damaged_file(draw, contents[name]))
        fuzz.attempt(lambda: use_host_files(bundle, config))
        replace(bundle / name, contents[name])

    fuzz(case)
    assert fuzz.refused
    assert fuzz.used


def test_tokenizers(fuzz, nano_checkpoint, tmp_path):
    whole = (nano_checkpoint / TOKENIZER).read_bytes()
    small = json.loads(whole)
    del small["model"]["vocab"], small["model"]["merges"]  # of a thousand like things; the others are told apart
    path = tmp_path / TOKENIZER

    def use():
        tokenizer = Tokenizer(path)
        stream = tokenizer.stream()
        ids = tokenizer.encode("Hällo <|im_start|>user\n\u202e 12 <think> x")
        for token in [*ids.tolist(), 0, 1, 2]:
            stream.push(token)
        tokenizer.decode(ids.tolist())

    def case(draw):
        if draw.random() < 0.3:
            path.write_bytes(damaged_bytes(draw, whole))
        else:
            altered = damaged_json(draw, small)
            if isinstance(altered, dict) and isinstance(altered.get("model"), dict):
                altered["model"] = {**json.loads(whole)["model"], **altered["model"]}
            path.write_text(json.dumps(altered))
        fuzz.attempt(use)

    fuzz(case)
    assert fuzz.refused
    assert fuzz.used


def test_headers_of_shards(fuzz, nano_checkpoint, tmp_path):
    """A shard whose header is damaged is refused, or holds every tensor of the model in its place."""
    directory = linked(nano_checkpoint, tmp_path / "checkpoint")
    shard = directory / "model-00002-of-00002.safetensors"
    whole = shard.read_bytes()
    size = int.from_bytes(whole[:8], "little")
    header, content = whole[8 : 8 + size], whole[8 + size :]
    with Checkpoint(directory) as checkpoint:
        names = [name for name, _ in checkpoint.meta_model().named_parameters()]

    def read():
        with Checkpoint(directory) as checkpoint:
            checkpoint.meta_model()
            return [checkpoint.tensor(name).shape for name in names[-3:]]

    def case(draw):
        if draw.random() < 0.3:
            start = damaged_bytes(draw, whole[: 8 + size])
        else:
            altered = json.dumps(damaged_json(draw, json.loads(header))).encode()
            start = len(altered).to_bytes(8, "little") + altered
        replace(shard, start + (content if draw.random() < 0.9 else content[: draw.randrange(len(content))]))
        fuzz.attempt(read)

    fuzz(case)
    assert fuzz.refused


def test_folders_of_prompts(fuzz, tmp_path):
    lines = [{"prompt": "What?", "images": ["a.png"], "answer": "A cup."}, {"prompt": "Why is the sky blue?"}]
    (tmp_path / "a.png").write_bytes(b"")
    (tmp_path / "b.txt").write_text("Who?")

    def case(draw):
        altered = [json.dumps(damaged_json(draw, line)) for line in lines]
        whole = "\n".join(draw.sample([*altered, *map(json.dumps, lines)], 3)).encode()
        (tmp_path / "prompts.jsonl").write_bytes(damaged_bytes(draw, whole) if draw.random() < 0.3 else whole)
        (tmp_path / "b.txt").write_bytes(damaged_bytes(draw, b"Who are you, and why?"))
        cases = fuzz.attempt(lambda: read_prompts(tmp_path)) or []
        for prompt in cases:
            assert prompt.messages[0]["content"][-1]["text"].strip()

    fuzz(case)
    assert fuzz.refused
    assert fuzz.used

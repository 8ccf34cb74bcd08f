"""The command line on bad input: exit code 2, one sentence on stderr, nothing on stdout, nothing half-written."""

import argparse
import io
import json
import logging
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from PIL import Image

from pascalvl.plugins.bundle import EMBEDDINGS, MANIFEST, POSITIONS
from pascalvl.plugins.errors import UserError
from pascalvl.runtime import VisionLanguageModel
from pascalvl.runtime.cli import entry, main
from pascalvl.runtime.cli import parser as parser_module
from pascalvl.runtime.cli.argument_types import json_file, own_path
from pascalvl.runtime.cli.common import check_writable, write_json
from pascalvl.runtime.cli.parser import command_parser
from pascalvl.runtime.cli.sources import path_or_name
from tests.manifests import edit_manifest

PICTURE = Path(__file__).parent / "nano" / "pictures" / "sample.png"
COMMAND = [sys.executable, "-c", "import sys; from pascalvl.runtime.cli import main; sys.exit(main())"]


@pytest.fixture
def refused(capsys):
    """Run a command and check that it fails as it should, with an error that matches ``match``."""

    def check(match, *argv):
        code = main([str(argument) for argument in argv])
        out, err = capsys.readouterr()
        assert code == 2
        assert out == ""
        check_sentence(err, match)

    return check


def check_sentence(err, match):
    assert re.fullmatch(r"pascalvl: error: [^\n]+\.\n", err), err
    assert re.search(match, err), err


# Arguments ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "match"),
    [
        (["--verbose"], "required: COMMAND"),
        (["translate"], "invalid choice: 'translate'"),
        (["run", "engine"], "required: -p/--prompt; see 'pascalvl run --help'"),
        (["run", "engine", "--prompt", "x", "--colour", "red"], "unrecognized arguments: --colour red"),
        (["build", "model", "--output", "o", "--kv", "f8"], "unknown KV cache format 'f8': expected one of f32, f16"),
        (["build", "model", "--output", "o", "--kv", "k8v4,rv=100"], "'rv=100' is no rank: expected one of 64, 96"),
        (["run", "engine", "--prompt", "x", "--kv", "k8v4,window=8192"], "'window=8192' is no window: expected first"),
        (["run", "engine", "--prompt", "x", "--kv", "f16,pin=image"], "pin=image is for a window"),
        (["chat", "engine", "--kv", "f16,size=3"], r"unknown KV cache option 'size=3': expected FORMAT\[,rv=RANK\]"),
        (["inspect", "bundle", "--memory", "lots"], "--memory: invalid float value: 'lots'"),
        (["run", "engine", "--prompt", "x", "--temperature", "hot"], "--temperature: invalid float value: 'hot'"),
        (["run", "engine", "--prompt", "x", "--temperature", "-1"], "temperature is out of range: expected 0 .* -1.0"),
        (["run", "engine", "--prompt", "x", "--top-k", "-2"], "top_k is out of range"),
        (["run", "engine", "--prompt", "x", "--top-p", "1.5"], "top_p is out of range"),
        (["run", "engine", "--prompt", "x", "--min-p", "nan"], "min_p is out of range"),
        (["run", "engine", "--prompt", "x", "--repetition-penalty", "0"], "repetition_penalty is out of range"),
        (["chat", "engine", "--seed", "-1"], "seed is out of range"),
        (["run", "engine", "--prompt", "caf\udce9"], r"expected text in UTF-8, found b'caf\\xe9'"),
        (["bench"], "required: WHAT; see 'pascalvl bench --help'"),
        (["bench", "model"], "required: ENGINE_BUNDLE"),
        (["bench", "model", "engine", "--depths", "0,4k"], "whole numbers with commas between them, .* found '0,4k'"),
        (["bench", "model", "engine", "--depths", ""], "expected whole numbers with commas between them"),
        (["bench", "model", "engine", "--repeats", "0"], "repeats is out of range: expected numbers from 1, found 0"),
        (["bench", "model", "engine", "--picture", "9"], "picture is out of range: expected 32 to 4096 pixels"),
        (["export", "model", "--output", "o", "--layers", "2"], "--layers is for random weights"),
        (["export", "model", "--output", "o", "--random", "3B"], "unknown size '3B': expected one of 2B, 4B, 8B, 32B"),
        (["export", "model", "--output", "o", "--random", "2B", "--layers", "29"], "expected 1 to 28"),
        (["export", "model", "--output", "o", "--random", "2B", "--weights", "auto"], "give --weights w4, w8, f16 or"),
        (["export", "model", "--output", "o", "--random", "2B", "--calibrate", "d"], "leave out --calibrate or"),
        (["inspect", "caf\udce9"], r"expected text in UTF-8, found b'.*/caf\\xe9'"),
    ],
)
def test_arguments(refused, argv, match):
    refused(match, *argv)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (["--backend", "metal"], "unknown backend 'metal': expected one of auto, tensorrt, cuda, onnxruntime"),
        (["--context", "0"], "a context of 0 tokens is out of range: expected 2 to 8192"),
        (["--context", "1000000"], "a context of 1000000 tokens is out of range"),
        (["--max-new-tokens", "0"], "max_new_tokens is out of range: expected at least 1, found 0"),
        (["--stop", ""], "stop string is empty"),
        (["--regex", "("], "the regular expression cannot be used"),
        (["--regex", "a", "--json-schema", "s.json"], "--json-schema: not allowed with argument --regex"),
        (["--json-schema", "absent.json"], "absent.json cannot be read .*: give a file with a JSON schema"),
        (["--top-k", "5", "--temperature", "0"], "--top-k has no effect at temperature 0"),
    ],
)
def test_options_that_the_model_refuses(refused, nano_engine_bundle, options, match):
    refused(match, "run", nano_engine_bundle, "--prompt", "Hello!", *options)


def test_placeholders_in_a_prompt(refused, nano_engine_bundle, capsys):
    """They are text, unless they are asked to be what they stand for."""
    run = ["run", str(nano_engine_bundle), "--max-new-tokens", "1", "--prompt", "<|image_pad|>"]
    assert main(run) == 0
    assert "prompt tokens" in capsys.readouterr().err
    refused("the messages' text holds the placeholder '<|image_pad|>'", *run, "--control-tokens-in-text")


def test_prompt_longer_than_the_context(refused, nano_engine_bundle):
    prompt = "The old farmer watched the lamp. " * 40
    match = r"the prompt has \d+ tokens, but the context holds 100 with the answer: shorten the prompt, limit its"
    refused(match, "run", nano_engine_bundle, "--prompt", prompt, "--context", 100)


# Pictures and videos --------------------------------------------------------------------------------------------------


@pytest.fixture
def broken(tmp_path):
    """Paths of things that are no pictures and videos."""
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("This is no picture.")
    encoded = io.BytesIO()
    Image.effect_noise((200, 200), 50).save(encoded, "PNG")
    (tmp_path / "truncated.png").write_bytes(encoded.getvalue()[:5000])
    Image.new("RGB", (4000, 4)).save(tmp_path / "thin.png")
    (tmp_path / "folder").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("option", "name", "match"),
    [
        ("--image", "absent.png", "no picture at .*absent.png: give"),
        ("--image", "empty.png", "empty.png is not a picture"),
        ("--image", "text.png", "text.png is not a picture"),
        ("--image", "truncated.png", "truncated.png cannot be read"),
        ("--image", "folder", "folder cannot be read"),
        ("--image", "thin.png", "4000x4 pixels is too thin"),
        ("--video", "absent.mp4", "no video at .*absent.mp4"),
        ("--video", "folder", "folder holds no frames"),
        ("--video", "", "expected the path of a file, found 0 characters"),
        ("--image", "", "expected the path of a file, found 0 characters"),
        ("--video", "text.png", "text.png cannot be read as an animation"),
    ],
)
def test_pictures_and_videos(refused, broken, nano_engine_bundle, option, name, match):
    refused(match, "run", nano_engine_bundle, "--prompt", "What is it?", option, name and broken / name)


@pytest.mark.parametrize(
    ("fps", "name", "match"),
    [
        ("fast", "frames", "--fps: invalid float value: 'fast'"),
        ("0", "frames", r"a video of 0\.0 frames a second: expected a positive number"),
        ("nan", "frames", "expected a positive number"),
        ("2", "text.png", "--fps is for folders of pictures, and no --video names one: leave it out"),
    ],
)
def test_rates_of_folders(refused, broken, nano_engine_bundle, fps, name, match):
    (broken / "frames").mkdir()
    Image.new("RGB", (64, 64)).save(broken / "frames" / "1.png")
    refused(match, "run", nano_engine_bundle, "--prompt", "What is it?", "--video", broken / name, "--fps", fps)
    refused("--fps is for folders", "run", nano_engine_bundle, "--prompt", "What is it?", "--fps", "2")
    refused("--fps is for folders", "validate", nano_engine_bundle, "--reference", broken, "--fps", "2")


def test_rate_of_a_folder_in_chat(refused, broken, nano_engine_bundle, monkeypatch):
    (broken / "frames").mkdir()
    Image.new("RGB", (64, 64)).save(broken / "frames" / "1.png")
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"/video {broken / 'frames'}\n"))
    refused("a video of 0.0 frames a second", "chat", nano_engine_bundle, "--fps", "0")


def test_a_slower_folder_makes_a_longer_prompt(tmp_path, nano_engine_bundle, capsys):
    """Two pictures a second are taken, and 4 at least: of 8 pictures 8 at two a second, 5 at 2.7, 4 at 24."""
    for i in range(8):
        Image.new("RGB", (64, 64), (30 * i, 0, 0)).save(tmp_path / f"{i}.png")
    tokens = []
    for options in (["--fps", "2"], ["--fps", "2.7"], ["--fps", "24"], []):
        asked = ["--prompt", "What?", "--video", str(tmp_path), "--max-new-tokens", "1", *options]
        assert main(["run", str(nano_engine_bundle), *asked]) == 0
        tokens.append(int(re.search(r"(\d+) prompt tokens", capsys.readouterr().err)[1]))
    assert tokens[0] > tokens[1] > tokens[2] == tokens[3]


def test_home_directory_in_chat(broken, nano_engine_bundle, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(broken))
    Image.new("RGB", (64, 64)).save(broken / "fine.png")
    monkeypatch.setattr(sys, "stdin", io.StringIO("/image ~/fine.png\n"))
    assert main(["chat", str(nano_engine_bundle)]) == 0
    assert capsys.readouterr().err == f"['{broken}/fine.png': 64x64 pixels, 4 tokens]\n"


@pytest.mark.filterwarnings("default")
def test_no_raw_warning_for_a_large_picture(broken, nano_engine_bundle, monkeypatch, capsys):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 3000)
    Image.new("RGB", (64, 64)).save(broken / "large.png")
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"/image {broken}/large.png\n"))
    with warnings.catch_warnings(record=True) as caught:
        assert main(["chat", str(nano_engine_bundle)]) == 0
    assert not caught


def test_names_are_no_markup(nano_engine_bundle, tmp_path, capsys):
    bundle = tmp_path / "engine"
    shutil.copytree(nano_engine_bundle, bundle)
    edit_manifest(bundle, lambda m: m["source"].update(name="[red]cat[/blue]:smiley:"))
    assert main(["inspect", str(bundle)]) == 0
    out = capsys.readouterr().out
    assert "[red]cat[/blue]:smiley:" in out
    assert out.count("a layer: 1 FlashAttention2, 4 QuantLinear") == 2


def test_piped_chat(refused, broken, nano_engine_bundle, monkeypatch):
    for line, match in ((f"/image {broken}/text.png", "is not a picture"), ("/undo", "unknown command /undo")):
        monkeypatch.setattr(sys, "stdin", io.StringIO(f"{line}\nWhat is it?\n"))
        refused(match, "chat", nano_engine_bundle)


# Bundles --------------------------------------------------------------------------------------------------------------


def _flip_a_byte(bundle):
    path = bundle / "decoder.onnx.data"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (_flip_a_byte, r"decoder.onnx.data was altered: expected SHA-256 [0-9a-f]+…, found"),
        (lambda b: (b / EMBEDDINGS).write_bytes(b"short"), "embeddings.bin was altered: expected .* found 5"),
        (lambda b: os.truncate(b / POSITIONS, 256), "position_embeddings.bin was altered: expected .* found 256"),
        (lambda b: (b / POSITIONS).unlink(), "lacks the file position_embeddings.bin"),
        (lambda b: (b / "tokenizer.json").unlink(), "lacks the file tokenizer.json"),
        (lambda b: (b / MANIFEST).unlink(), "it has no manifest.json"),
        (lambda b: (b / MANIFEST).write_text("{"), "manifest.json cannot be read"),
        (lambda b: edit_manifest(b, lambda m: m.update(version=0)), "has bundle version 0"),
        (lambda b: edit_manifest(b, lambda m: m.update(kv_cache="f16")), "is for another model: .* past_key.0 int32"),
        (lambda b: edit_manifest(b, lambda m: m["model"]["text"].update(head_dim=64)), "rope_inv_freq is"),
        (lambda b: edit_manifest(b, lambda m: m["backend"].update(name="abacus")), "unknown backend 'abacus'"),
    ],
)
def test_damaged_engine_bundles(refused, nano_engine_bundle, tmp_path, damage, match):
    bundle = tmp_path / "engine"
    shutil.copytree(nano_engine_bundle, bundle)
    damage(bundle)
    refused(match, "run", bundle, "--prompt", "Hello!")


def test_caches_that_cannot_be_kept(refused, nano_engine_bundle, tmp_path):
    """Known before the answer, of which nothing is printed, and before the bundle is opened."""
    (tmp_path / "file").write_bytes(b"mine")
    for bundle in (nano_engine_bundle, tmp_path):
        for command in (["run", bundle, "--prompt", "Hello!", "--max-new-tokens", "1"], ["chat", bundle]):
            for name, why in (("file", "Not a directory"), ("n" * 256, "File name too long")):
                match = f"cannot be kept in .*{name} [(]{why}[)]: choose another folder"
                refused(match, *command, "--cache", tmp_path / name)
            refused("expected gigabytes from 0.1, such as 4, found '0'", *command, "--cache-gb", "0")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_files_that_can_be_written(tmp_path):
    """It is known before, and nothing is changed."""
    (tmp_path / "there").write_bytes(b"mine")
    for path in (tmp_path / "there", tmp_path / ("n" * 255)):
        check_writable(path, "JSON")
    for path, why in (
        (tmp_path / "none" / "file", "No such file or directory"),
        (tmp_path / "there" / "file", "Not a directory"),
        (tmp_path / ("n" * 256), "File name too long"),
        (tmp_path, "it is no regular file"),
    ):
        with pytest.raises(UserError, match=rf"JSON cannot be saved to .* \({why}\): choose another file\."):
            check_writable(path, "JSON")
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
    assert (tmp_path / "there").read_bytes() == b"mine"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_files_without_permission(tmp_path):
    (tmp_path / "there").write_bytes(b"mine")
    (tmp_path / "there").chmod(0o400)
    (tmp_path / "closed").mkdir(0o500)
    for path in (tmp_path / "there", tmp_path / "closed" / "file"):
        with pytest.raises(UserError, match=r"\(Permission denied\)"):
            check_writable(path, "JSON")


def test_what_is_no_engine_bundle(refused, nano_model_bundle, tmp_path):
    refused("no directory .* engine bundle", "run", tmp_path / "absent", "--prompt", "Hello!")
    refused("has no manifest.json", "chat", tmp_path)
    refused("has no manifest.json", "inspect", tmp_path)
    refused("is a bundle of kind 'model': expected the engine", "bench", "model", nano_model_bundle)


def test_build_from_what_is_no_model_bundle(refused, nano_model_bundle, nano_engine_bundle, tmp_path):
    output = tmp_path / "out" / "engine"
    refused("no directory .* the model bundle", "build", tmp_path / "absent", "--output", output)
    refused("is a bundle of kind 'engine': expected the model", "build", nano_engine_bundle, "--output", output)
    refused("unknown backend 'metal'", "build", nano_model_bundle, "--output", output, "--backend", "metal")
    ranks = "has another rank than the model was exported with .* export it with --kv k8v4,rv=96, or give no rank"
    refused(ranks, "build", nano_model_bundle, "--output", output, "--kv", "k8v4,rv=96")
    refused(
        "layer.6 is out of range: this model has layers 0-5",
        "build",
        nano_model_bundle,
        "--output",
        output,
        "--kv",
        "f16,layer.2-6=f32",
    )
    altered = tmp_path / "model"
    shutil.copytree(nano_model_bundle, altered)
    _flip_a_byte(altered)
    refused("was altered", "build", altered, "--output", output)
    assert not output.parent.exists()


def test_output_that_is_something_else(refused, nano_model_bundle, tmp_path):
    (tmp_path / "thesis.txt").write_text("Important.")
    refused("exists and is no engine bundle", "build", nano_model_bundle, "--output", tmp_path)
    refused("exists and is no engine bundle", "build", nano_model_bundle, "--output", tmp_path / "thesis.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


# Checkpoints ----------------------------------------------------------------------------------------------------------


def _shards(checkpoint):
    return sorted(checkpoint.glob("*.safetensors"))


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (lambda c: shutil.rmtree(c), "no checkpoint directory at"),
        (lambda c: (c / "config.json").unlink(), "lacks config.json"),
        (lambda c: (c / "config.json").write_text('{"model_type": "llama"}'), "expected a dense .* found 'llama'"),
        (lambda c: _shards(c)[-1].unlink(), "lacks its weight file"),
        (lambda c: _shards(c)[0].write_bytes(_shards(c)[0].read_bytes()[:-1000]), "is truncated or damaged"),
        (lambda c: (c / "tokenizer.json").unlink(), "lacks tokenizer.json"),
        (lambda c: (c / "tokenizer.json").write_text("{}"), "checkpoint/tokenizer.json is not a tokenizer"),
        (lambda c: (c / "chat_template.jinja").write_text("{% if %}"), "checkpoint/chat_template.jinja cannot be used"),
        (lambda c: (c / "chat_template.jinja").write_text("{% break %}"), "cannot be used .'break' outside loop"),
        (lambda c: (c / "chat_template.jinja").write_text("{{ 'x' * 10**10 }}"), "it needs more than 1 GB of memory"),
        (lambda c: (c / "chat_template.jinja").write_text("Hello"), "has no place for one of the pictures"),
        (
            lambda c: (c / "generation_config.json").write_text('{"eos_token_id": "end"}'),
            "checkpoint/generation_config.json is of no use",
        ),
        (
            lambda c: (c / "processor_config.json").write_text('{"image_processor": {"do_resize": false}}'),
            "checkpoint/processor_config.json sets do_resize to False",
        ),
        (
            lambda c: (c / "processor_config.json").write_text('{"video_processor": {"patch_size": 14}}'),
            "checkpoint/processor_config.json makes patches",
        ),
    ],
)
def test_damaged_checkpoints(refused, nano_checkpoint, tmp_path, damage, match):
    checkpoint, output = tmp_path / "checkpoint", tmp_path / "out" / "model"
    shutil.copytree(nano_checkpoint, checkpoint)
    damage(checkpoint)
    refused(match, "export", checkpoint, "--output", output)
    assert not output.parent.exists() or not list(output.parent.iterdir())


def test_validation_against_another_checkpoint(refused, nano_engine_bundle, nano_checkpoint, tmp_path):
    refused("no checkpoint directory at", "validate", nano_engine_bundle, "--reference", tmp_path / "absent")
    other = tmp_path / "other"
    shutil.copytree(nano_checkpoint, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"initializer_range": 0.5}))
    match = "was not made from .*other but from another checkpoint"
    refused(match, "validate", nano_engine_bundle, "--reference", other)


# Ctrl-C, full disks, closed pipes -------------------------------------------------------------------------------------


def _start(*argv, **options):
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    return subprocess.Popen([*COMMAND, *map(str, argv)], text=True, **pipes, **options)


def test_interrupted_generation(endless_bundle):
    process = _start("run", endless_bundle, "--prompt", "Hello!", "--context", 8192)
    assert process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err == "pascalvl: interrupted; nothing was left half-written\n"


def test_interrupted_chat_goes_on(endless_bundle):
    process = _start("chat", endless_bundle, "--context", 8192)
    process.stdin.write("Hello!\n")
    process.stdin.flush()
    assert process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    while "[stopped]\n" not in (line := process.stdout.readline()):
        assert line, process.communicate()
    process.stdin.write("Go on.\n")
    process.stdin.flush()
    assert process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate("/exit\n", timeout=60)
    assert out.endswith("[stopped]\n")
    assert err == ""
    assert process.returncode == 0


@pytest.mark.parametrize(
    ("number", "written", "code", "word"),
    [
        (signal.SIGINT, "", 130, "interrupted"),
        (signal.SIGINT, "vision.onnx.data", 130, "interrupted"),
        (signal.SIGTERM, "vision.onnx.data", 143, "terminated"),
    ],
)
def test_interrupted_export(nano_checkpoint, tmp_path, number, written, code, word):
    """In the middle of tracing, and in the middle of writing."""
    output = tmp_path / "out" / "model"
    process = _start("export", nano_checkpoint, "--output", output)
    while not list(output.parent.glob(f".model.*/{written}")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert (out, err) == ("", f"pascalvl: {word}; nothing was left half-written\n")
    assert not list(output.parent.iterdir())


def test_interrupts_wait_for_the_end_of_an_import(tmp_path, monkeypatch):
    (tmp_path / "heavy_module.py").write_text(
        "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(0.1)\ncomplete = True\n"
    )
    monkeypatch.syspath_prepend(tmp_path)

    def command():
        import heavy_module

        assert heavy_module.complete
        time.sleep(10)

    with pytest.raises(KeyboardInterrupt), entry._interruptible():
        command()
    assert sys.modules.pop("heavy_module").complete


def test_interrupts_that_native_code_turns_into_an_error_are_told():
    def command():
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(10)
        except KeyboardInterrupt:
            raise ValueError("could not determine the shape of object") from None

    with pytest.raises(KeyboardInterrupt), entry._interruptible():
        command()


@pytest.mark.parametrize("descriptor", [0, 1, 2])
def test_closed_standard_streams(nano_engine_bundle, descriptor):
    for argv in (("inspect", nano_engine_bundle), ("chat", nano_engine_bundle)):
        process = _start(*argv, preexec_fn=lambda: os.close(descriptor))
        _, err = process.communicate("", timeout=60)
        assert (process.returncode, err) == (0, "")


@pytest.mark.parametrize("command", ["export", "build"])
def test_files_that_cannot_be_written(command, nano_checkpoint, nano_model_bundle, tmp_path):
    """A limit on the size of files makes writes fail nearly as a full disk does."""
    output = tmp_path / "out" / "bundle"
    source = nano_checkpoint if command == "export" else nano_model_bundle

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (5_000_000, 5_000_000))

    process = _start(command, source, "--output", output, preexec_fn=limit)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 2
    assert out == ""
    check_sentence(err, r"bundle needs more than the \d MB that could be written \(File too large\): raise the limit")
    assert not list(output.parent.iterdir())


def test_closed_pipe(endless_bundle):
    process = _start("run", endless_bundle, "--prompt", "Hello!", "--context", 8192)
    assert process.stdout.read(1)
    process.stdout.close()
    assert process.wait(timeout=60) == 0
    assert process.stderr.read() == ""


def test_table_into_a_closed_pipe(nano_engine_bundle):
    reader, writer = os.pipe()
    os.close(reader)
    command = [*COMMAND, "inspect", str(nano_engine_bundle)]
    result = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert (result.returncode, result.stderr) == (0, "")


def test_not_enough_memory(refused, nano_engine_bundle, monkeypatch):
    def run(*_):
        raise MemoryError("the decoder engine")

    monkeypatch.setattr("pascalvl.engines.onnxruntime.backend.OnnxRuntimeEngine.run", run)
    refused(r"not enough memory \(the decoder engine\): give", "run", nano_engine_bundle, "--prompt", "Hello!")


# What is no error -----------------------------------------------------------------------------------------------------


def test_version(capsys):
    with pytest.raises(SystemExit) as left:
        main(["--version"])
    assert left.value.code == 0
    assert re.fullmatch(r"pascalvl (\d+\.\d+\.\d+|of a folder that is not installed)\n", capsys.readouterr().out)


def test_the_command_alone(capsys):
    assert main([]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("usage: pascalvl ")
    assert err == ""


def test_pictures_in_chat(refused, nano_engine_bundle, tmp_path, monkeypatch, capsys):
    """Paths as people and terminals write them, told of as they are read; what is dropped is not asked about."""
    for name in ("my picture.png", "it's.png"):
        shutil.copyfile(PICTURE, tmp_path / name)
    (tmp_path / "video").mkdir()
    for i in range(4):
        Image.new("RGB", (64, 64)).save(tmp_path / "video" / f"{i}.png")
    Image.new("RGB", (4000, 4)).save(tmp_path / "thin.png")
    monkeypatch.setenv("HOME", str(tmp_path))
    lines = [
        f"/image {tmp_path}/my picture.png",
        f'/image  "{tmp_path}/my picture.png"',
        f"/image '{tmp_path}/my picture.png' ",
        rf"/image {tmp_path}/my\ picture.png",
        "/image ~/it's.png",
        f"/video '{tmp_path}/video'",
        *["/drop"] * 5,
        "Describe the picture.",
        "/drop",
        "/help",
    ]
    options = ["--temperature", "0"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    assert main(["chat", str(nano_engine_bundle), *options]) == 0
    out, err = capsys.readouterr()
    told = err.splitlines()
    for line in told[:5]:
        assert re.fullmatch(r"\[['\"]/.*/(my picture|it's)\.png['\"]: 384x256 pixels, 54 tokens\]", line), line
    assert re.fullmatch(r"\['/.*/video': 4 frames, 8 tokens\]", told[5]), told[5]
    dropped = [
        f"[the {kind} is dropped; {5 - i} for the next question]" for i, kind in enumerate(["video", *["image"] * 4])
    ]
    assert told[6:11] == dropped
    assert told[11] == "[there is none to drop; 0 for the next question]"
    assert [line.split()[0] for line in told[12:] if line[0] != " "] == [
        "/image",
        "/video",
        "/drop",
        "/reset",
        "/help",
        "/exit",
    ]
    assert main(["run", str(nano_engine_bundle), "-i", str(PICTURE), "-p", "Describe the picture.", *options]) == 0
    assert capsys.readouterr().out == out != "\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"/image {tmp_path}/thin.png\n"))
    refused("4000x4 pixels is too thin", "chat", nano_engine_bundle)  # at once, not with the next question


def test_short_options(nano_engine_bundle, capsys):
    options = ["--max-new-tokens", "2", "--context", "200", "--temperature", "0"]
    answers = []
    for image, prompt in (("-i", "-p"), ("--image", "--prompt")):
        assert (
            main(["run", str(nano_engine_bundle), image, str(PICTURE), prompt, "Describe the picture.", *options]) == 0
        )
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1] != "\n"


COMPLETE = """
eval "$1"
shift
COMP_WORDS=("$@") COMP_CWORD=$(($# - 1))
$(complete -p pascalvl | sed -E 's/.*-F ([^ ]+).*/\\1/')
printf '%s\\n' "${COMPREPLY[@]}"
"""
"""Completes the last of some words by a script, as bash does at a tab."""


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_completion_in_bash(tmp_path, capsys):
    with pytest.raises(SystemExit) as left:
        main(["--print-completion", "bash"])
    assert left.value.code == 0
    script = capsys.readouterr().out
    (tmp_path / "photo.png").touch()
    (tmp_path / "pictures").mkdir()
    for words, expected in (
        (["ins"], {"inspect"}),
        (["bench", "mo"], {"model"}),
        (["run", "--max-n"], {"--max-new-tokens"}),
        (["run", "--image", "p"], {"photo.png", "pictures"}),
        (["inspect", "p"], {"pictures"}),
        (["--print-completion", "z"], {"zsh"}),
    ):
        command = ["bash", "--norc", "-c", COMPLETE, "bash", script, "pascalvl", *words]
        result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        assert set(result.stdout.split()) == expected, words


@pytest.mark.parametrize("shell", ["zsh", "tcsh"])
def test_completion_in_other_shells(shell, capsys):
    with pytest.raises(SystemExit):
        main(["--print-completion", shell])
    out = capsys.readouterr().out
    assert "validate" in out
    if shutil.which(shell):
        subprocess.run([shell, "-n"], input=out, text=True, check=True)


def test_every_path_is_completed_as_one():
    parsers = [command_parser()]
    paths = 0
    for parser in parsers:
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                parsers += action.choices.values()
            elif action.type in (own_path, json_file, path_or_name):
                paths += 1
                assert action.metavar in (*parser_module._FILES, *parser_module._FOLDERS), action.metavar
    assert paths > 20


# JSON, and --quiet ----------------------------------------------------------------------------------------------------


def test_an_answer_as_json(nano_engine_bundle, tmp_path, capsys):
    asked = ["run", str(nano_engine_bundle), "-p", "Hello!", "--temperature", "0", "--max-new-tokens", "5"]
    assert main([*asked, "--json", "-"]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    seconds, rate = found.pop("seconds"), found.pop("tokens_per_second")
    assert rate == pytest.approx(4 / seconds["decode"])
    assert seconds.keys() == {"vision", "prefill", "decode"}
    answer = found["answer"]
    assert found == {
        "answer": answer,
        "finish_reason": "length",
        "usage": {"prompt_tokens": 10, "cached_tokens": 0, "new_tokens": 5},
        "backend": "onnxruntime",
        "model": "checkpoint",
    }
    assert "10 prompt tokens in" in err
    assert main([*asked, "--json", str(tmp_path / "answer.json"), "--cache", str(tmp_path / "cache")]) == 0
    assert capsys.readouterr().out == f"{answer}\n"
    assert json.loads((tmp_path / "answer.json").read_text())["answer"] == answer
    assert main([*asked, "--json", "-", "--cache", str(tmp_path / "cache")]) == 0
    assert json.loads(capsys.readouterr().out)["usage"]["cached_tokens"] == 9


def test_a_bundle_as_json(nano_model_bundle, capsys):
    assert main(["inspect", str(nano_model_bundle), "--json", "-", "--memory", "0.08"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["kind"], found["weights"], found["gpu_memory"]) == ("model", "f32", {})
    assert found["model"]["text"]["num_hidden_layers"] == 6
    assert [cache["format"] for cache in found["kv_caches"]] == ["f32", "f16", "k8v8", "k8v4", "k4v4"]
    first = found["kv_caches"][0]
    assert first["bytes"]["4096"] == 4096 * first["bytes_per_token"] == 4096 * 12288
    fits = (80_000_000 - found["weight_bytes"]) // (128 * 12288) * 128
    assert first["longest_context"] == {"0.08": fits}


def test_a_validation_as_json_and_its_scales(nano_engine_bundle, nano_checkpoint, nano_reference, capsys):
    command = ["validate", str(nano_engine_bundle), "--reference", str(nano_checkpoint), "--prompt", "Hello!"]
    assert main([*command, "--json", "-"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["passed"]
    assert found["first_deviation"] is None
    assert "which read the weights itself" in found["reference"]
    rows = {row["output"]: row for row in found["outputs"]}
    prompt = VisionLanguageModel.open(nano_engine_bundle).prompt([{"role": "user", "content": "Hello!"}])
    with torch.no_grad():
        logits = nano_reference(input_ids=torch.from_numpy(prompt.token_ids)[None]).logits[0, -1]
    assert rows["prefill.logits"]["scale"] == pytest.approx(float(logits.abs().max()), rel=1e-5)
    assert 0 < rows["prefill.logits"]["max_error"] < rows["prefill.logits"]["tolerance"]
    assert main(command) == 0
    out = capsys.readouterr().out
    scale = re.escape(f"{rows['prefill.logits']['scale']:.2e}")
    assert re.search(rf"prefill\.logits .* {scale} .* ok ", out), out


def test_numbers_that_json_does_not_have(tmp_path):
    write_json(tmp_path / "x.json", {"a": [float("nan"), 1.5], "b": float("inf")})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": [None, 1.5], "b": None}
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


def test_json_that_cannot_be_written(refused, nano_engine_bundle, tmp_path):
    """Known before the work."""
    for command in (
        ["run", nano_engine_bundle, "-p", "Hello!"],
        ["inspect", nano_engine_bundle],
        ["validate", nano_engine_bundle, "--reference", tmp_path],
        ["eval", "kv", tmp_path, "--data", tmp_path],
        ["bench", "model", nano_engine_bundle],
        ["bench", "linear"],
    ):
        refused("JSON cannot be saved to .* [(]No such file", *command, "--json", tmp_path / "no" / "figures.json")
        refused("JSON cannot be saved to .* [(]it is no regular file[)]", *command, "--json", "/dev/null")


def test_quiet(refused, nano_engine_bundle, nano_model_bundle, tmp_path, monkeypatch, capsys):
    def told(*argv):
        assert main([*map(str, argv), "--quiet"]) == 0
        out, err = capsys.readouterr()
        assert err == ""
        return out

    greedy = ["--temperature", 0, "--max-new-tokens", 3]
    answer = told("run", nano_engine_bundle, "-p", "Hello!", *greedy)
    assert re.fullmatch(r"\w.*\n", answer)
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"/image {PICTURE}\n/drop\nHello!\n/reset\n"))
    assert told("chat", nano_engine_bundle, *greedy) == answer
    assert told("build", nano_model_bundle, "--output", tmp_path / "engine", "--backend", "onnxruntime") == ""
    assert "KV cache in GB" in told("inspect", tmp_path / "engine")
    figures = told("bench", "model", nano_engine_bundle, "--depths", 0, "--decode", 1, "--picture", 0, "--repeats", 1)
    assert "prefill of 512" in figures
    refused("no picture at", "run", nano_engine_bundle, "-p", "x", "-i", tmp_path / "absent.png", "--quiet")
    refused("--verbose: not allowed with argument --quiet", "inspect", nano_engine_bundle, "--quiet", "--verbose")
    assert logging.getLogger().level == logging.WARNING

"""Batch jobs: each prompt is answered once, as it is alone, however often the job is ended and started again."""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
from PIL import Image

from pascalvl.runtime import SamplingParams, VisionLanguageModel
from pascalvl.runtime.cli import main
from pascalvl.runtime.video import load_video
from tests.engines.torch_reference import scene, user
from tests.test_terminal import CTRL_C, Terminal

COMMAND = [sys.executable, "-c", "import sys; from pascalvl.runtime.cli import main; sys.exit(main())"]
PROMPT = "Describe the picture."
NAMES = [*(f"{i:02}.png" for i in range(10)), "more/deep/x.png", "more/Ä b.PNG"]
LONGEST_WAIT = 60
"""Seconds, of a machine that does much else."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Twelve pictures, two of them in folders, among other files."""
    top = tmp_path_factory.mktemp("batch") / "pictures"
    (top / "more" / "deep").mkdir(parents=True)
    (top / ".hidden").mkdir()
    for number, name in enumerate(NAMES):
        scene(number, 96, 64).save(top / name, "PNG")
    for name in ("._00.png", ".hidden/a.png", "notes.txt"):
        (top / name).write_text("no picture")
    return top


def opened(path):
    return Image.open(path).convert("RGB")


def rows(output):
    return [json.loads(line) for line in output.read_text(encoding="utf-8").split("\n")[:-1]]


def answers(output):
    """By what was asked, of which each is there once."""
    found = rows(output)
    assert len({row["id"] for row in found}) == len(found)
    return {row["id"]: row.get("answer") for row in found}


def arguments(bundle, source, output, *options, prompt=PROMPT):
    return [
        *("run", bundle, "--batch", source, "--output", output),
        *(["--prompt", prompt] if prompt else []),
        *("--context", "512", *options),
    ]


def run(*given, **options):
    return main([str(argument) for argument in arguments(*given, **options)])


def start(*given, **options):
    command = [*COMMAND, *map(str, arguments(*given, **options))]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def alone(bundle, messages, sampling=None, max_new_tokens=None, stop=()):
    model = VisionLanguageModel.open(bundle, context_length=512)
    generation = model.generate(messages, sampling, max_new_tokens, stop)
    return "".join(generation), generation


@pytest.fixture
def refused(capsys):
    """Run a command and check that it fails in one sentence that matches."""

    def check(match, *given, **options):
        capsys.readouterr()
        assert run(*given, **options) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert re.fullmatch(r"pascalvl: error: [^\n]+\.\n", err), err
        assert re.search(match, err), err

    return check


def wait_for_lines(process, output, count):
    end = time.monotonic() + LONGEST_WAIT
    while not output.exists() or output.read_bytes().count(b"\n") < count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.005)


# Answers --------------------------------------------------------------------------------------------------------------


def test_a_folder_is_answered_as_each_picture_alone(nano_engine_bundle, folder, tmp_path, capsys):
    output = tmp_path / "answers.jsonl"
    options = ("--system", "Be brief.", "--max-new-tokens", "24", "--stop", "Row 2")
    assert run(nano_engine_bundle, folder, output, *options) == 0
    out, err = capsys.readouterr()
    assert out == ""
    assert re.search(r"12 prompts in .* s, \d+ new tokens, .* tokens/s", err)
    found = {row["id"]: row for row in rows(output)}
    assert sorted(found) == NAMES
    for name, row in found.items():
        messages = [{"role": "system", "content": "Be brief."}, user(opened(folder / name), PROMPT)]
        text, generation = alone(nano_engine_bundle, messages, None, 24, "Row 2")
        assert row["answer"] == text
        assert row["finish_reason"] == generation.finish_reason.value
        assert row["usage"]["prompt_tokens"] == generation.prompt_tokens
        assert row["usage"]["new_tokens"] == len(generation.token_ids)
        assert row["seconds"].keys() == {"vision", "prefill", "decode"}
        assert min(row["seconds"].values()) > 0


def test_answers_of_a_given_form(nano_engine_bundle, folder, tmp_path, capsys):
    schema = {"type": "object", "properties": {"shape": {"enum": ["square", "circle"]}}, "required": ["shape"]}
    schema["additionalProperties"] = False
    (tmp_path / "schema.json").write_text(json.dumps(schema))
    output = tmp_path / "answers.jsonl"
    assert run(nano_engine_bundle, folder, output, "--json-schema", tmp_path / "schema.json") == 0
    assert {row["finish_reason"] for row in rows(output)} == {"stop"}
    assert {json.loads(row["answer"])["shape"] for row in rows(output)} <= {"square", "circle"}
    capsys.readouterr()
    assert run(nano_engine_bundle, folder, tmp_path / "none.jsonl", "--regex", "(") == 2
    assert "the regular expression cannot be used" in capsys.readouterr().err
    assert not (tmp_path / "none.jsonl").exists() or not rows(tmp_path / "none.jsonl")


def test_lines_with_every_field(nano_engine_bundle, folder, tmp_path):
    frames = tmp_path / "frames"
    frames.mkdir()
    for i in range(4):
        scene(i, 64, 64).save(frames / f"{i}.png")
    shutil.copy(folder / "00.png", tmp_path / "a.png")
    seeded = {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "min_p": 0.01, "seed": 7}
    penalties = {"repetition_penalty": 1.1, "presence_penalty": 0.1, "frequency_penalty": 0.1}
    url = {"type": "image_url", "image_url": {"url": "a.png"}}
    lines = [
        {"prompt": "Hello!", "system": "Be brief.", "max_new_tokens": 5},
        {"id": "seeded", "images": ["a.png"], **seeded, **penalties},
        {"id": "stopped", "images": ["a.png", str(folder / "01.png")], "prompt": "Describe both.", "stop": ["Row"]},
        {"id": 17, "videos": ["frames"], "prompt": "What is it?", "system": None, "max_new_tokens": 3},
        {"id": "openai", "messages": [{"role": "user", "content": [url, {"type": "text", "text": PROMPT}]}]},
    ]
    source, output = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    source.write_text("\n\n".join(map(json.dumps, lines)), encoding="utf-8-sig")
    assert run(nano_engine_bundle, source, output, "--max-new-tokens", "9", "--system", "Hi.") == 0
    a, b = opened(tmp_path / "a.png"), opened(folder / "01.png")
    asked = {
        1: ([user("Hello!")], None, 5, ()),
        "seeded": ([user(a, PROMPT)], SamplingParams(**seeded, **penalties), 9, ()),
        "stopped": ([user(a, b, "Describe both.")], None, 9, ["Row"]),
        17: ([user(load_video(frames), "What is it?")], None, 3, ()),
        "openai": ([user(a, PROMPT)], None, 9, ()),
    }
    found = answers(output)
    assert found.keys() == asked.keys()
    for name, (messages, *rest) in asked.items():
        system = "Be brief." if name == 1 else "Hi."
        text, _ = alone(nano_engine_bundle, [{"role": "system", "content": system}, *messages], *rest)
        assert found[name] == text, name


def test_pictures_are_read_shortly_before_they_are_needed(endless_bundle, folder, tmp_path):
    pictures, output = tmp_path / "pictures", tmp_path / "answers.jsonl"
    shutil.copytree(folder, pictures)
    process = start(endless_bundle, pictures, output, "--at-once", "1", "--max-new-tokens", "100")
    wait_for_lines(process, output, 1)
    for name in NAMES[6:]:
        (pictures / name).unlink()
    process.communicate()
    assert process.returncode == 1
    found = answers(output)
    assert [name for name in NAMES if found[name] is None] == NAMES[6:]


def test_memory_does_not_grow_with_the_folder(nano_engine_bundle, tmp_path):
    """Of 16 pictures of 27 MB each, a few are there at a time."""
    Image.new("RGB", (3000, 3000), "red").save(tmp_path / "large.png")
    used = []
    for count in (4, 16):
        pictures = tmp_path / str(count)
        pictures.mkdir()
        for i in range(count):
            os.link(tmp_path / "large.png", pictures / f"{i}.png")
        options = "--max-new-tokens", "1", "--max-pixels", "10000", "--at-once", "1"
        process = start(nano_engine_bundle, pictures, tmp_path / f"{count}.jsonl", *options)
        _, status, usage = os.wait4(process.pid, 0)
        process.communicate()
        assert status == 0
        assert len(answers(tmp_path / f"{count}.jsonl")) == count
        used.append(usage.ru_maxrss)
    assert used[1] - used[0] < 80_000  # KB


# Errors ---------------------------------------------------------------------------------------------------------------


def test_what_cannot_be_read_is_an_error_in_its_line(nano_engine_bundle, folder, tmp_path, capsys):
    pictures, output = tmp_path / "pictures", tmp_path / "answers.jsonl"
    pictures.mkdir()
    for name in ("a.png", "b.png", "c.png"):
        shutil.copy(folder / "00.png", pictures / name)
    (pictures / "b.png").write_text("no picture")
    os.mkfifo(pictures / "d.png")
    assert run(nano_engine_bundle, pictures, output, "--max-new-tokens", "4", "--quiet") == 1
    assert capsys.readouterr().err == (
        f"pascalvl: 2 of 4 have errors, which {output} tells: --retry-errors asks them again.\n"
    )
    errors = {row["id"]: row["error"] for row in rows(output) if "error" in row}
    assert errors.keys() == {"b.png", "d.png"}
    assert "b.png is not a picture that can be read" in errors["b.png"]
    before = output.read_bytes()
    assert run(nano_engine_bundle, pictures, output, "--max-new-tokens", "4") == 1
    assert output.read_bytes() == before
    shutil.copy(folder / "00.png", pictures / "b.png")
    assert run(nano_engine_bundle, pictures, output, "--max-new-tokens", "4", "--retry-errors") == 1
    found = answers(output)
    assert found["a.png"] == found["b.png"] == found["c.png"]
    assert found["d.png"] is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["answers.jsonl", "pictures"]


def test_a_prompt_that_is_too_long_stops_nobody(nano_engine_bundle, tmp_path):
    source, output = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    lines = [{"prompt": "word " * 2000}, {"prompt": "Hello!"}, {"prompt": "Hi!", "images": ["absent.png"]}]
    source.write_text("\n".join(map(json.dumps, lines)))
    assert run(nano_engine_bundle, source, output, "--max-new-tokens", "4", prompt=None) == 1
    found = {row["id"]: row for row in rows(output)}
    assert "but the context holds 512" in found[1]["error"]
    assert found[2]["answer"]
    assert "no picture at" in found[3]["error"]


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ("{", "line 2 of .*prompts.jsonl is no JSON"),
        (
            '{"prompt": "Hi", "image": "a.png"}',
            "line 2 of .*prompts.jsonl has an unknown field 'image': expected prompt,",
        ),
        ("{}", "line 2 of .* cannot be used: expected the field prompt to be a text, or messages, found None"),
        ('{"prompt": " "}', "line 2 of .* prompt to be a text"),
        ('{"prompt": "Hi", "images": "a.png"}', "line 2 of .* images to be a list of file names, found 'a.png'"),
        ('{"prompt": "Hi", "videos": [1]}', "line 2 of .* videos to be a list"),
        ('{"prompt": "Hi", "id": 1.5}', "line 2 of .* has the id 1.5: expected a text or a whole number"),
        ('{"prompt": "Hi", "id": 1}', "line 2 of .* has the id 1, as line 1 has"),
        ('{"prompt": "Hi", "temperature": -1}', "line 2 of .* temperature is out of range"),
        ('{"prompt": "Hi", "max_new_tokens": 0}', "line 2 of .* max_new_tokens is out of range"),
        ('{"prompt": "Hi", "stop": ""}', "line 2 of .* stop string is empty"),
        ('{"prompt": "Hi", "system": 3}', "line 2 of .* field system to be a text, found 3"),
        ('{"messages": [{"role": "bot"}]}', "line 2 of .* a role of system, user"),
        ('{"messages": [{"role": "user", "content": "Hi"}], "prompt": "Hi"}', "line 2 of .* no place beside messages"),
        ('{"messages": [{"role": "system", "content": "Hi"}], "system": "Hi"}', "line 2 of .* give one of them"),
        ('{"prompt": "\\ud83d', "line 2 of .* is no JSON"),
    ],
)
def test_lines_that_are_no_prompts(refused, tmp_path, line, match):
    """Known before the model is opened, which is not there."""
    source, output = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    source.write_text(f'{{"prompt": "Hi"}}\n{line}\n')
    refused(match, tmp_path / "engine", source, output, prompt=None)
    assert not output.exists()


def test_options_that_do_not_go_together(refused, folder, tmp_path, capsys):
    engine, output = tmp_path / "engine", tmp_path / "answers.jsonl"
    for option in (["--json", "-"], ["-i", "a.png"], ["--video", "a.mp4"]):
        refused(f"{option[0].replace('-i', '--image')}.* is for one prompt", engine, folder, output, *option)
    refused("asks for a prompt: give --prompt", engine, folder, output, prompt=None)
    refused("--fps is for videos", engine, folder, output, "--fps", "2")
    refused("--at-once is out of range: expected 1 to 8, found 0", engine, folder, output, "--at-once", "0")
    refused("max_new_tokens is out of range", engine, folder, output, "--max-new-tokens", "0")
    refused("temperature is out of range", engine, folder, output, "--temperature", "-1")
    refused("a folder of pictures or a .jsonl file .* found nothing", engine, tmp_path / "absent", output)
    refused("a folder of pictures or a .jsonl file .* found something", engine, folder / "notes.txt", output)
    (tmp_path / "empty").mkdir()
    refused("holds no pictures", engine, tmp_path / "empty", output)
    refused("no directory .*engine", engine, folder, output)
    assert not output.exists()
    for option in (["--output", "o"], ["--at-once", "2"], ["--retry-errors"]):
        assert main(["run", str(engine), "-p", "Hi", *option]) == 2
        assert f"{option[0]} is for many prompts: leave it out, or give --batch" in capsys.readouterr().err
    assert main(["run", str(engine), "-p", "Hi", "--batch", str(folder)]) == 2
    assert "give --output FILE.jsonl" in capsys.readouterr().err


@pytest.mark.parametrize(
    "content",
    ["thesis", "thesis\n", '{"id": "00.png"}\n', '{"id": "00.png", "prompt": "Hi"}', '["a"]\n', '{"answer": "x"}\n'],
)
def test_an_output_that_is_something_else_is_left_alone(refused, folder, tmp_path, content):
    output = tmp_path / "file"
    output.write_text(content)
    refused("choose another file", tmp_path / "engine", folder, output)
    assert output.read_text() == content


def test_outputs_that_cannot_be_written(refused, folder, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "absent" / "file", tmp_path / "pipe", tmp_path / ("n" * 256)):
        refused("cannot be written .*: choose another file", tmp_path / "engine", folder, path)
    source = tmp_path / "prompts.jsonl"
    source.write_text('{"prompt": "Hi"}')
    refused("is what is asked: give another file", tmp_path / "engine", source, source)
    assert source.read_text() == '{"prompt": "Hi"}'


# Ends and starts ------------------------------------------------------------------------------------------------------


def test_killed_in_the_middle_and_started_again(nano_engine_bundle, folder, tmp_path):
    output, expected = tmp_path / "answers.jsonl", tmp_path / "expected.jsonl"
    assert run(nano_engine_bundle, folder, expected) == 0
    process = start(nano_engine_bundle, folder, output, "--at-once", "2")
    wait_for_lines(process, output, 3)
    process.kill()
    process.communicate()
    done = rows(output)
    assert 3 <= len(done) < 12
    assert run(nano_engine_bundle, folder, output) == 0
    assert rows(output)[: len(done)] == done
    assert answers(output) == answers(expected)
    before = output.read_bytes()
    # Nothing is left to do, for which no model is opened.
    assert run(tmp_path / "engine", folder, output) == 0
    assert output.read_bytes() == before


def test_a_line_that_was_not_written_whole(nano_engine_bundle, folder, tmp_path):
    output, expected = tmp_path / "answers.jsonl", tmp_path / "expected.jsonl"
    assert run(nano_engine_bundle, folder, expected, "--max-new-tokens", "3") == 0
    whole = expected.read_bytes()
    lines = whole.splitlines(keepends=True)
    for cut in (1, 12, len(lines[11]) - 2, len(lines[11]) - 1):
        output.write_bytes(b"".join(lines[:11]) + lines[11][:cut])
        assert run(nano_engine_bundle, folder, output, "--max-new-tokens", "3") == 0
        assert answers(output) == answers(expected), cut


def test_another_input(refused, nano_engine_bundle, folder, tmp_path):
    pictures, output = tmp_path / "pictures", tmp_path / "answers.jsonl"
    pictures.mkdir()
    shutil.copy(folder / "00.png", pictures)
    assert run(nano_engine_bundle, pictures, output, "--max-new-tokens", "2") == 0
    before = output.read_bytes()
    shutil.copy(folder / "01.png", pictures)  # more than before is no other input
    assert run(nano_engine_bundle, pictures, output, "--max-new-tokens", "2") == 0
    assert output.read_bytes().startswith(before)
    (pictures / "00.png").unlink()
    refused("line 1 of .* answers '00.png', which is not asked", nano_engine_bundle, pictures, output)
    output.write_bytes(before + before)
    shutil.copy(folder / "00.png", pictures)
    refused("line 2 of .* answers '00.png' again", nano_engine_bundle, pictures, output)


@pytest.mark.parametrize(
    ("number", "code", "word"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
def test_interrupts(nano_engine_bundle, folder, tmp_path, number, code, word):
    output = tmp_path / "answers.jsonl"
    process = start(nano_engine_bundle, folder, output, "--at-once", "1")
    wait_for_lines(process, output, 2)
    process.send_signal(number)
    out, err = process.communicate(timeout=LONGEST_WAIT)
    done = len(rows(output))
    assert (process.returncode, out) == (code, "")
    assert err == (
        f"[{done} of 12 are in {output}; the same command goes on with the others]\n"
        f"pascalvl: {word}; nothing was left half-written\n"
    )


def test_on_a_terminal(endless_bundle, folder, tmp_path):
    output = tmp_path / "answers.jsonl"
    command = arguments(endless_bundle, folder, output, "--at-once", "1", "--max-new-tokens", "100")
    with Terminal(*command) as terminal:
        assert terminal.expect(r"answering .* 2/12 +[\d.]+ tokens/s +\d:\d\d:\d\d"), terminal.output
        terminal.press(CTRL_C)
        code, text = terminal.finish()
    done = len(rows(output))
    assert code == 130
    assert text.endswith(
        f"[{done} of 12 are in {output}; the same command goes on with the others]\n"
        "pascalvl: interrupted; nothing was left half-written\n"
    )
    assert terminal.output.rindex("\x1b[?25h") > terminal.output.rindex("\x1b[?25l")  # the cursor is there again
    with Terminal(*command, width=40) as terminal:
        code, text = terminal.finish()
    assert code == 0
    assert re.search(r"\n\d+ prompts in .* tokens/s\n$", text), text
    assert len(answers(output)) == 12


def test_two_processes_on_one_output(refused, endless_bundle, nano_engine_bundle, folder, tmp_path):
    output = tmp_path / "answers.jsonl"
    process = start(endless_bundle, folder, output, "--at-once", "1", "--context", "256")
    wait_for_lines(process, output, 1)
    refused("another process adds answers to .*: wait for its end", nano_engine_bundle, folder, output)
    assert process.poll() is None
    process.kill()
    process.communicate()
    assert run(nano_engine_bundle, folder, output) == 0
    assert len(answers(output)) == 12


def test_a_full_disk(nano_engine_bundle, folder, tmp_path):
    output = tmp_path / "answers.jsonl"
    limit = 700
    command = [*COMMAND, *map(str, arguments(nano_engine_bundle, folder, output, "--quiet"))]

    def small():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))

    result = subprocess.run(command, preexec_fn=small, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert re.fullmatch(
        r"pascalvl: error: .*answers.jsonl cannot be written \(.*\): make room, and .*\.\n", result.stderr
    )
    assert output.stat().st_size == limit
    assert run(nano_engine_bundle, folder, output) == 0
    assert len(answers(output)) == 12

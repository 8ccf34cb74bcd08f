"""Folders of prompts: what is read, in which order, and what is refused."""

import json
import re

import pytest
from PIL import Image

from pascalvl.plugins.errors import UserError
from pascalvl.runtime.prompt import PromptBuilder
from pascalvl.runtime.prompt_folder import PICTURE_PROMPT, PromptCase, read_prompts


def write_lines(folder, *lines):
    (folder / "prompts.jsonl").write_text("\n".join(lines), encoding="utf-8")


def message(text, *pictures):
    parts = [{"type": "image", "image": picture} for picture in pictures]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def picture(path):
    Image.new("RGB", (64, 64), "red").save(path)
    return path


def test_lines_then_texts_then_the_pictures_that_no_line_shows(tmp_path):
    for name in ("b.png", "a.JPG", "shown.png", "again.webp"):
        picture(tmp_path / name)
    (tmp_path / "inner").mkdir()
    picture(tmp_path / "inner" / "deep.png")
    (tmp_path / "z.txt").write_text("Last?\n")
    (tmp_path / "c.TXT").write_bytes(b"\xef\xbb\xbfFirst\r\nof two lines?\r\n")
    (tmp_path / "notes.md").write_text("not a prompt")
    write_lines(
        tmp_path,
        json.dumps({"prompt": "Which?", "images": ["shown.png", "./again.webp", "inner/deep.png"], "answer": "This."}),
        "",
        json.dumps({"prompt": "Two\u2028lines", "answer": None}, ensure_ascii=False) + "\r",
        "",
    )
    shown = [tmp_path / name for name in ("shown.png", "again.webp", "inner/deep.png")]
    assert read_prompts(tmp_path) == [
        PromptCase("prompts.jsonl:1", message("Which?", *shown), "This."),
        PromptCase("prompts.jsonl:3", message("Two\u2028lines")),
        PromptCase("c.TXT", message("First\nof two lines?")),
        PromptCase("z.txt", message("Last?")),
        PromptCase("a.JPG", message(PICTURE_PROMPT, tmp_path / "a.JPG")),
        PromptCase("b.png", message(PICTURE_PROMPT, tmp_path / "b.png")),
    ]


def test_the_messages_make_prompts(tmp_path, nano_checkpoint):
    from pascalvl.export.checkpoint import Checkpoint

    picture(tmp_path / "a.png")
    with Checkpoint(nano_checkpoint) as checkpoint:
        builder = PromptBuilder(nano_checkpoint, checkpoint.model_config())
    (case,) = read_prompts(tmp_path)
    assert len(builder.build(case.messages).visuals) == 1


@pytest.mark.parametrize(
    ("line", "phrase"),
    [
        ("{", "is no JSON"),
        ("[" * 100_000, "is no JSON"),
        ("[]", "is no JSON object but a list"),
        ("{}", "has no prompt, found None"),
        ('{"prompt": 3}', "has no prompt, found 3"),
        ('{"prompt": " "}', "has no text"),
        ('{"prompt": "Hi", "image": "a.png"}', "has an unknown field 'image'"),
        ('{"prompt": "Hi", "images": "a.png"}', "has images 'a.png'"),
        ('{"prompt": "Hi", "images": [1]}', "has images [1]"),
        ('{"prompt": "Hi", "images": ["none.png"]}', "shows a picture that is not there"),
        ('{"prompt": "Hi", "images": [""]}', "shows a picture that is not there"),
        ('{"prompt": "Hi", "answer": 7}', "has the answer 7"),
    ],
)
def test_lines_that_are_no_prompts(tmp_path, line, phrase):
    write_lines(tmp_path, '{"prompt": "Hi"}', line)
    with pytest.raises(UserError, match=re.escape(f"line 2 of {tmp_path / 'prompts.jsonl'} {phrase}")) as error:
        read_prompts(tmp_path)
    assert "\n" not in str(error.value)


def test_folders_without_prompts(tmp_path):
    with pytest.raises(UserError, match="no folder at"):
        read_prompts(tmp_path / "nowhere")
    with pytest.raises(UserError, match="holds no prompts"):
        read_prompts(tmp_path)
    (tmp_path / "a.txt").write_text(" \n")
    with pytest.raises(UserError, match="is no folder"):
        read_prompts(tmp_path / "a.txt")
    with pytest.raises(UserError, match=r"a\.txt holds no text"):
        read_prompts(tmp_path)
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="no text in UTF-8"):
        read_prompts(tmp_path)

"""Bundles: manifests that round-trip, alterations that are found, writes that happen wholly or not at all."""

import dataclasses
import errno
import hashlib
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pascalvl.plugins import bundle
from pascalvl.plugins.bundle import Manifest, atomic_directory
from pascalvl.plugins.errors import UserError
from pascalvl.plugins.kv_format import CacheConfig, KVFormat
from pascalvl.plugins.model_config import TOKEN_IDS, ModelConfig, TextConfig, VisionConfig
from tests.manifests import FILE_NAMES, OUT_OF_RANGE, SPECIAL, edit_manifest, integers, make_special, put

MODEL = ModelConfig(
    TextConfig(512, 64, 2, 4, 1, 16, 1024, (4, 2, 2), (1.0, 0.1, 1 / 3, 0.4, 0.5, 0.2, 0.7, 0.3), 1.0, (16, 12)),
    VisionConfig(2, 64, 4, 3, 16, 2, 2, 16, (0, 1), (1.0, 0.5, 0.2, 0.1)),
    image_token_id=1,
    video_token_id=2,
    vision_start_token_id=3,
    vision_end_token_id=4,
)
MANIFEST = Manifest(
    "model",
    {"name": "x", "sha256": "0"},
    MODEL,
    {"dtype": "float16", "shape": [512, 64]},
    {"dtype": "bfloat16", "shape": [16, 64]},
    {"decoder": {"opset": 17, "ir_version": 8, "plugin": "op 1", "ops": {"MatMul": 3}, "layer_ops": {"MatMul": 1}}},
    CacheConfig(KVFormat.F16),
)


@pytest.fixture
def written(tmp_path):
    tmp_path = tmp_path / "bundle"
    tmp_path.mkdir()
    for name in bundle.MODEL_FILES:
        (tmp_path / name).write_bytes(b"some")
    (tmp_path / "decoder.onnx").write_bytes(b"graph")
    (tmp_path / "decoder.onnx.data").write_bytes(bytes(1000))
    (tmp_path / bundle.EMBEDDINGS).write_bytes(bytes(2 * 512 * 64))
    (tmp_path / bundle.POSITIONS).write_bytes(bytes(2 * 16 * 64))
    MANIFEST.write(tmp_path)
    return tmp_path


def test_manifest_round_trips(written):
    manifest = Manifest.read(written, "model")
    assert dataclasses.replace(manifest, files={}) == MANIFEST
    assert set(manifest.files) == set(bundle.MODEL_FILES)
    hashed = []
    manifest.verify(written, hashed.append)
    assert sum(hashed) == 2 * 512 * 64 + 2 * 16 * 64 + 1005 + 8 * 4


@pytest.mark.parametrize(
    ("alter", "phrase"),
    [
        (lambda d: (d / "decoder.onnx").write_bytes(b"grapf"), "decoder.onnx was altered: expected SHA-256"),
        (lambda d: (d / "decoder.onnx.data").write_bytes(bytes(999)), "expected 1000 bytes, found 999"),
        (lambda d: (d / "decoder.onnx").unlink(), "lacks the file decoder.onnx"),
    ],
)
def test_altered_files_are_found(written, alter, phrase):
    alter(written)
    with pytest.raises(UserError, match=phrase):
        Manifest.read(written, "model").verify(written)


@pytest.fixture
def in_pieces(written, monkeypatch):
    """Of which the graph's weights have ten."""
    monkeypatch.setattr(bundle, "PIECE_BYTES", 100)
    return MANIFEST.write(written)


def test_pieces_of_files(written, in_pieces):
    assert len(in_pieces.files["decoder.onnx.data"]["sha256"]) == 10
    assert in_pieces.files["decoder.onnx"]["sha256"] == [hashlib.sha256(b"graph").hexdigest()]
    assert Manifest.read(written, "model") == in_pieces
    with (written / "decoder.onnx.data").open("r+b") as file:
        file.seek(731)
        file.write(b"x")
    phrase = "decoder.onnx.data was altered: expected SHA-256 .* found .* from byte 700 on; write the bundle again"
    with pytest.raises(UserError, match=phrase):
        in_pieces.verify(written)
    told = []
    in_pieces.verify(written, told.append, ["decoder.onnx.data"])
    assert sum(told) == sum(file["bytes"] for name, file in in_pieces.files.items() if name != "decoder.onnx.data")
    content = (written / "decoder.onnx.data").read_bytes()
    in_pieces.check_piece(written / "decoder.onnx.data", 6, content[600:700])
    with pytest.raises(UserError, match=phrase):
        in_pieces.check_piece(written / "decoder.onnx.data", 7, content[700:800])


@pytest.mark.parametrize("change", [lambda digests: digests.pop(), lambda digests: digests.append("0")])
def test_a_hash_for_each_piece(written, in_pieces, change):
    edit_manifest(written, lambda data: change(data["files"]["decoder.onnx.data"]["sha256"]))
    with pytest.raises(UserError, match="files without sizes or hashes"):
        Manifest.read(written, "model")


@pytest.mark.parametrize(
    ("change", "phrase"),
    [
        ({"kind": "engine"}, "is a bundle of kind 'engine'"),
        ({"version": 99}, "has bundle version 99"),
        ({"version": 7}, "has bundle version 7, this PascalVL reads version 8: write the bundle again"),
        ({"kv_cache": "k3v3"}, "unknown KV cache format 'k3v3'"),
        ({"model": {"text": {}}}, "lacks 'vocab_size'"),
        ({"colour": 1}, "cannot be used"),
        ({"files": {}}, "does not list the file embeddings.bin"),
        ({"source": "x"}, "cannot be used"),
        ({"graphs": {"decoder": {}}}, "cannot be used"),
        ({"graphs": {"decoder": {"ops": {}}}}, "cannot be used"),
        ({"backend": "onnxruntime"}, "cannot be used"),
        ({"backend": {"name": []}}, "cannot be used"),
        ({"embeddings": {"dtype": "int8", "shape": [512, 64]}}, "embeddings are .*'int8'"),
        ({"embeddings": {"dtype": "float16", "shape": [512, 64], "offset": 1}}, "embeddings are .*'offset'"),
        ({"embeddings": {"dtype": "float16", "shape": [511, 64]}}, "embeddings of shape"),
        ({"embeddings": {"dtype": "float32", "shape": [512, 64]}}, "embeddings.bin is of another size"),
        ({"position_embeddings": {"dtype": "int8", "shape": [16, 64]}}, "position_embeddings are .*'int8'"),
        ({"position_embeddings": {"dtype": "float16", "shape": [64, 16]}}, "position_embeddings of shape"),
        ({"position_embeddings": {"dtype": "float32", "shape": [16, 64]}}, "position_embeddings.bin is of another"),
        ({"model": {**MODEL.to_json(), "image_token_id": "1"}}, "image_token_id is '1'"),
        ({"files": {"decoder.onnx": {"bytes": "5"}}}, "cannot be used"),
    ],
)
def test_manifests_that_do_not_fit_are_refused(written, change, phrase):
    edit_manifest(written, lambda data: data.update(change))
    with pytest.raises(UserError, match=phrase):
        Manifest.read(written, "model")


def test_numbers_out_of_range(written):
    """In every field, in a sentence and at once."""
    original = (written / bundle.MANIFEST).read_text()
    fields = list(integers(json.loads(original)))
    assert ("version",) in fields
    assert ("model", "text", "mrope_section") in fields
    start = time.monotonic()
    for field in fields:
        free = {0} if field[-1] in TOKEN_IDS else {0, 2**31, 2**32, 10**9} if "graphs" in field else set()
        for value in (value for value in OUT_OF_RANGE if not isinstance(value, int) or value not in free):
            (written / bundle.MANIFEST).write_text(original)
            edit_manifest(written, lambda data, field=field, value=value: put(data, field, value))
            with pytest.raises(UserError) as error:
                Manifest.read(written, "model").verify(written)
            assert "\n" not in str(error.value), (field, value)
            assert len(str(error.value)) < 500 + len(str(written))
    assert time.monotonic() - start < 0.1 * len(fields) * len(OUT_OF_RANGE)


@pytest.mark.parametrize("kv", ["k8v4,rv=" + "9" * 5000, "f16" + ",layer.0=f16" * 10**5])
def test_formats_without_end(written, kv):
    edit_manifest(written, lambda data: data.update(kv_cache=kv))
    with pytest.raises(UserError, match=r"manifest.json cannot be used \(the KV cache .*…") as error:
        Manifest.read(written, "model")
    assert len(str(error.value)) < 500 + len(str(written))


@pytest.mark.parametrize(
    ("field", "text"), [("kv_cache", "f16,layer.0-9999=f32"), ("weights", "w8,layer.0-9999=w4,layer.1=w8")]
)
def test_formats_of_layers_that_the_model_has_not(written, field, text):
    edit_manifest(written, lambda data: data.update({field: text}))
    with pytest.raises(
        UserError, match=r"layer.9999 is out of range: this model has layers 0-1\): write the bundle again"
    ):
        Manifest.read(written, "model")


@pytest.mark.parametrize(
    "alter",
    [
        lambda text: text.replace('"hidden_size": 64', '"hidden_size": 65', 1),
        lambda text: text.replace('"sha256"', '"sha257"'),
        lambda text: re.sub(r',\s*"sha256": "[0-9a-f]{64}"\s*}\s*$', "}", text),
        lambda text: re.sub(r'"sha256": "[0-9a-f]{64}"\s*}\s*$', '"sha256": ["' + "0" * 10**6 + '"]}', text),
    ],
)
def test_an_altered_manifest_is_noticed(written, alter):
    path = written / bundle.MANIFEST
    text = path.read_text()
    path.write_text(json.dumps(json.loads(text), indent=4))  # only what it says counts
    Manifest.read(written, "model")
    path.write_text(alter(text))
    assert path.read_text() != text
    with pytest.raises(UserError, match=r"json cannot be used \(it was altered: expected SHA-256 .* found '") as error:
        Manifest.read(written, "model")
    assert len(str(error.value)) < 400 + len(str(written))


@pytest.mark.parametrize(("kind", "command"), [("model", "export"), ("engine", "build")])
def test_the_remedy_is_that_of_the_bundles_kind(written, kind, command):
    edit_manifest(written, lambda data: data.update(kind=kind))
    read = Manifest.read(written, "model", "engine")
    (written / bundle.EMBEDDINGS).unlink()
    with pytest.raises(UserError, match=f"write the bundle again with 'pascalvl {command}'\\.$"):
        read.verify(written)
    edit_manifest(written, lambda data: data["model"].update(image_token_id=-1))
    with pytest.raises(UserError, match=f"image_token_id .*write the bundle again with 'pascalvl {command}'\\.$"):
        Manifest.read(written, "model", "engine")
    (written / bundle.MANIFEST).write_text("{")
    with pytest.raises(UserError, match=r"with 'pascalvl export' or 'pascalvl build'"):
        Manifest.read(written, "model", "engine")


@pytest.mark.parametrize("name", bundle.MODEL_FILES)
def test_files_that_the_manifest_does_not_list(written, name):
    edit_manifest(written, lambda data: data["files"].pop(name))
    with pytest.raises(UserError, match=f"does not list the file {name}"):
        Manifest.read(written, "model")


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("text", {"num_hidden_layers": 0}),
        ("text", {"num_hidden_layers": 2**31 - 1}),
        ("text", {"vocab_size": -1}),
        ("text", {"num_key_value_heads": 0}),
        ("text", {"num_key_value_heads": 3}),
        ("text", {"mrope_section": [4, 2, 3]}),
        ("text", {"mrope_section": [8]}),
        ("text", {"rope_inv_freq": [1.0]}),
        ("text", {"rope_inv_freq": [0.0] * 8}),
        ("text", {"rope_attention_scaling": 0}),
        ("text", {"colour": 1}),
        ("vision", {"num_heads": 0}),
        ("vision", {"num_heads": 3}),
        ("vision", {"in_channels": 4}),
        ("vision", {"num_position_embeddings": 17}),
        ("vision", {"rope_inv_freq": []}),
        ("vision", {"deepstack_visual_indexes": []}),
        ("vision", {"deepstack_visual_indexes": [1, 0]}),
        ("vision", {"deepstack_visual_indexes": [1, 2]}),
        ("vision", {"deepstack_visual_indexes": [1, 1]}),
    ],
)
def test_models_that_cannot_be(part, change):
    data = json.loads(json.dumps(MODEL.to_json()))
    with pytest.raises((ValueError, TypeError), match=next(iter(change))):
        ModelConfig.from_json({**data, part: {**data[part], **change}})


def test_what_is_no_bundle_is_refused(tmp_path):
    with pytest.raises(UserError, match="no directory"):
        Manifest.read(tmp_path / "nowhere", "model")
    with pytest.raises(UserError, match="is not a bundle"):
        Manifest.read(tmp_path, "model")
    for text, phrase in (("[", "cannot be read"), ("[" * 100_000, "cannot be read"), ("[]", "found a list")):
        (tmp_path / bundle.MANIFEST).write_text(text)
        with pytest.raises(UserError, match=phrase):
            Manifest.read(tmp_path, "model")


@pytest.mark.parametrize("kind", SPECIAL)
def test_what_is_no_regular_file(written, kind):
    make_special(written / "decoder.onnx", kind)
    with pytest.raises(
        UserError, match=r"decoder.onnx was altered: it is no regular file; write the bundle again with"
    ):
        Manifest.read(written, "model").verify(written)
    make_special(written / bundle.MANIFEST, kind)
    with pytest.raises(
        UserError, match=r"manifest.json cannot be read \(it is no regular file\): write the bundle again"
    ):
        Manifest.read(written, "model")
    with pytest.raises(UserError, match="is no model bundle"), atomic_directory(written, "model"):
        pass


@pytest.mark.parametrize("name", FILE_NAMES)
def test_files_outside_the_bundle(written, name):
    edit_manifest(written, lambda data: data["files"].update({name: {"bytes": 1, "sha256": [""]}}))
    with pytest.raises(UserError, match="which is no name of a file in the bundle") as error:
        Manifest.read(written, "model")
    assert str(error.value).isprintable()


def test_json_has_a_largest_size(written):
    with (written / bundle.MANIFEST).open("r+b") as file:
        file.truncate((32 << 20) + 1)
    with pytest.raises(
        UserError, match=r"manifest.json cannot be read \(it has more than 32 MiB\): write the bundle again with"
    ):
        Manifest.read(written, "model")


def test_a_failed_write_leaves_the_earlier_bundle(tmp_path):
    def manifest(name):
        return json.dumps({"kind": "model", "name": name})

    target = tmp_path / "bundle"
    with atomic_directory(target, "model") as directory:
        (directory / bundle.MANIFEST).write_text(manifest("first"))

    def interrupted():
        with atomic_directory(target, "model") as directory:
            (directory / bundle.MANIFEST).write_text(manifest("second"))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [p.name for p in tmp_path.iterdir()] == ["bundle"]
    assert (target / bundle.MANIFEST).read_text() == manifest("first")
    with atomic_directory(target, "model") as directory:
        (directory / bundle.MANIFEST).write_text(manifest("third"))
    assert [p.name for p in tmp_path.iterdir()] == ["bundle"]
    assert (target / bundle.MANIFEST).read_text() == manifest("third")


def test_a_bundle_of_another_kind_is_not_replaced(tmp_path):
    (tmp_path / bundle.MANIFEST).write_text(json.dumps({"kind": "model"}))
    with pytest.raises(UserError, match="is no engine bundle"), atomic_directory(tmp_path, "engine"):
        pass
    assert (tmp_path / bundle.MANIFEST).exists()


@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_what_lies_beside_a_bundle_is_not_lost(when, written):
    """Notes, or the very bundle that is being built from."""

    def add():
        (written / "inside").mkdir()
        (written / "inside" / "precious").write_text("keep")

    def replace():
        with atomic_directory(written, "model"):
            if when == "meanwhile":
                add()

    if when == "before":
        add()
    with pytest.raises(UserError, match="holds 'inside' beside its model bundle"):
        replace()
    assert (written / "inside" / "precious").read_text() == "keep"
    Manifest.read(written, "model").verify(written)
    assert [path.name for path in written.parent.iterdir()] == [written.name]


def test_a_target_that_cannot_be_moved_leaves_nothing(written, monkeypatch):
    monkeypatch.setattr(bundle, "_exchange", lambda *_: False)
    rename = Path.rename

    def busy(self, target):
        if self == written:
            raise OSError(errno.EBUSY, "Device or resource busy")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", busy)
    with pytest.raises(OSError, match="busy"), atomic_directory(written, "model"):
        pass
    assert [path.name for path in written.parent.iterdir()] == [written.name]
    Manifest.read(written, "model").verify(written)


def write(directory, content):
    """A bundle that can be told from another, and is whole or not."""
    (directory / "data").write_text(content)
    (directory / bundle.MANIFEST).write_text(json.dumps({"kind": "model", "files": ["data"], "content": content}))


def content(target):
    """Of such a bundle, which is whole."""
    assert {path.name for path in target.iterdir()} == {"data", bundle.MANIFEST}
    assert (target / "data").read_text() == json.loads((target / bundle.MANIFEST).read_text())["content"]
    return (target / "data").read_text()


REPLACE = """
import os, shutil, signal, sys
from pathlib import Path
from pascalvl.plugins import bundle
from tests.plugins.test_bundle import write

rename, rmtree, renames = Path.rename, shutil.rmtree, 0

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

def die_after_renames(path, target):
    global renames
    try:
        rename(path, target)
    finally:
        renames += 1
        if f"after rename {renames}" == sys.argv[2]:
            die()

match sys.argv[2]:
    case "before the exchange":
        bundle._exchange = die
    case "after the exchange":
        shutil.rmtree = die
    case "in the removal of the old":
        shutil.rmtree = lambda path, **_: (Path(path, "data").unlink(), die())
    case after if after.startswith("after rename"):
        bundle._exchange = lambda *_: False
        Path.rename = die_after_renames
with bundle.atomic_directory(Path(sys.argv[1]), "model") as directory:
    write(directory, "second")
    if sys.argv[2] == "while it writes":
        die()
    if sys.argv[2] == "not at all":
        print("writing", flush=True)
        sys.stdin.readline()
"""


@pytest.mark.parametrize(
    ("when", "left"),
    [
        ("while it writes", "first"),
        ("before the exchange", "first"),
        ("after the exchange", "second"),
        ("in the removal of the old", "second"),
        ("after rename 1", "first"),  # which fails: the place is taken
        ("after rename 2", "first"),  # the old one is away, the new one is not yet there
        ("after rename 3", "second"),
    ],
)
def test_a_process_killed_at_any_step_leaves_one_bundle_whole(tmp_path, when, left):
    target = tmp_path / "bundle"
    with atomic_directory(target, "model") as directory:
        write(directory, "first")
    killed = subprocess.run([sys.executable, "-c", REPLACE, target, when], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 3  # a folder and its lock are left over

    def failing():
        with atomic_directory(target, "model"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        failing()
    assert content(target) == left
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
    with atomic_directory(target, "model") as directory:
        write(directory, "third")
    assert content(target) == "third"
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_the_exchange_is_one_step_where_the_file_system_has_it(tmp_path):
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    if not bundle._exchange(tmp_path / "one", tmp_path / "other"):
        pytest.skip("no RENAME_EXCHANGE here")
    assert (tmp_path / "one" / "other").exists()
    assert (tmp_path / "other" / "one").exists()
    with pytest.raises(FileNotFoundError):
        bundle._exchange(tmp_path / "one", tmp_path / "absent")


def test_a_process_killed_before_there_is_a_bundle(tmp_path):
    subprocess.run([sys.executable, "-c", REPLACE, tmp_path / "bundle", "while it writes"], check=False)
    (tmp_path / ".bundle.settings").mkdir()  # is somebody's
    assert len(list(tmp_path.iterdir())) == 3
    with atomic_directory(tmp_path / "bundle", "model") as directory:
        write(directory, "first")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".bundle.settings", "bundle"]


def test_processes_that_write_to_the_same_place_at_once(tmp_path):
    """Neither takes the other's files for left over; the last one's bundle stays."""
    command = [sys.executable, "-c", REPLACE, tmp_path / "bundle", "not at all"]
    other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert other.stdout.readline() == b"writing\n"
    for _ in range(2):
        with atomic_directory(tmp_path / "bundle", "model") as directory:
            write(directory, "first")
        assert content(tmp_path / "bundle") == "first"
        assert len(list(tmp_path.iterdir())) == 3
    other.communicate(b"\n")
    assert other.returncode == 0
    assert content(tmp_path / "bundle") == "second"
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


@pytest.mark.parametrize(
    ("number", "phrase"),
    [(errno.ENOSPC, "disk is full"), (errno.EDQUOT, "quota is used up"), (errno.EFBIG, "limit on the size of files")],
)
def test_an_output_without_room_is_one_sentence(tmp_path, number, phrase):
    def write():
        with atomic_directory(tmp_path / "bundle", "model") as directory:
            (directory / "weights").write_bytes(bytes(2_000_000))
            raise OSError(number, "No room", "input")

    with pytest.raises(
        UserError, match=rf"bundle needs more than the 2 MB that could be written \(No room\): .*{phrase}"
    ):
        write()
    assert not list(tmp_path.iterdir())


def test_a_mount_point_is_refused_at_once():
    with pytest.raises(UserError, match="/ is a mount point"), atomic_directory(Path("/"), "model"):
        pytest.fail("the work was begun")


def test_an_output_that_cannot_be_made_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write to"), atomic_directory(tmp_path / "file" / "bundle", "model"):
        pass


def test_unknown_kv_format_names_those_there_are():
    with pytest.raises(UserError, match="expected one of f32, f16"):
        KVFormat.parse("q8_0")

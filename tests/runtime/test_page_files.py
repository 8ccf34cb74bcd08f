"""Pages of the KV cache in a folder: to the bit, or not at all."""

import hashlib
import json
import math
import os
import random

import numpy as np
import pytest

from pascalvl.engines.engine import HostSession
from pascalvl.plugins.errors import UserError
from pascalvl.plugins.kv_format import PAGE_SLOTS
from pascalvl.runtime.page_files import PageFiles, check_folder, key_of
from tests.fuzz.mutators import damaged_bytes
from tests.runtime.test_kv_cache import engine_of

FORMATS = ("f32", "f16", "k8v4", "k4v4", "k8v8,layer.0=f16")
ENGINE = hashlib.sha256(b"engine").hexdigest()
TOKENS = 7


def host_session(kv):
    return HostSession(engine_of(kv), 2, 2)


def opened(folder, kv="f32", engine=ENGINE, most_bytes=1 << 30):
    return PageFiles(folder, engine, host_session(kv), most_bytes)


def random_rows(kv, draw):
    """Of a page, any bytes, NaNs among them."""
    page = host_session(kv).read(np.arange(1))
    return {name: np.frombuffer(draw.bytes(a.nbytes), a.dtype).reshape(a.shape) for name, a in page.items()}


def written(files, kv="f32", tokens=TOKENS, parent=None, seed=0):
    """The key, identities and rows of a page of random bytes."""
    draw = np.random.default_rng(seed)
    identities, rows, parent = draw.integers(-(2**62), 2**17, tokens), random_rows(kv, draw), parent or files.root
    key = key_of(parent, identities.tobytes())
    files.write(key, parent, identities, rows)
    return key, identities, rows


@pytest.mark.parametrize("tokens", [1, TOKENS, PAGE_SLOTS])
@pytest.mark.parametrize("kv", FORMATS)
def test_pages_come_back(kv, tokens, tmp_path):
    files = opened(tmp_path / "new" / "cache", kv)
    key, identities, rows = written(files, kv, tokens)
    found = opened(tmp_path / "new" / "cache", kv)
    (page,) = found.pages()
    assert (page.key, page.parent) == (key, files.root)
    np.testing.assert_array_equal(page.identities, identities)
    read = found.read(key)
    assert read.keys() == rows.keys()
    for name, array in rows.items():
        assert (read[name].dtype, read[name].shape) == (array.dtype, array.shape)
        assert read[name].tobytes() == array.tobytes()
    session = host_session(kv)
    session.write(np.array([1]), read)
    assert all(session.read(np.array([1]))[name].tobytes() == array.tobytes() for name, array in rows.items())


def test_pages_come_behind_their_parents(tmp_path):
    files = opened(tmp_path)
    first, _, _ = written(files, seed=1)
    others = [written(files, parent=first, seed=seed)[0] for seed in (2, 3)]
    last, _, _ = written(files, parent=others[0], seed=4)
    keys = [page.key for page in opened(tmp_path).pages()]
    assert keys[0] == first
    assert set(keys) == {first, *others, last}
    assert keys.index(others[0]) < keys.index(last)
    files.remove(others[0])
    assert {page.key for page in opened(tmp_path).pages()} == {first, others[1]}
    assert files.has(last)  # another process may be about to write what is before it


def test_engines_do_not_meet(tmp_path):
    """Another model, card or format reads nothing of this one's."""
    key, _, _ = written(opened(tmp_path, "k8v4"), "k8v4")
    other = opened(tmp_path, "k8v4", engine=ENGINE[::-1])
    assert not other.pages()
    assert other.read(key) is None
    assert opened(tmp_path, "k8v4").read(key)


def test_what_was_not_used_the_longest_goes_first(tmp_path):
    size = opened(tmp_path).page_bytes
    files = opened(tmp_path, most_bytes=4 * size)
    keys = [written(files, seed=seed)[0] for seed in range(3)]
    files.touch([keys[1], keys[2], keys[0]])
    keys.append(written(files, seed=3)[0])  # with what is around the rows, more than four
    assert [files.has(key) for key in keys] == [True, False, True, True]
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 4 * size
    other = opened(tmp_path, engine=ENGINE[::-1], most_bytes=2 * size)  # of all engines
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 2 * size
    assert not other.pages()


def test_two_processes_with_one_folder(tmp_path):
    """What one writes the other finds when it begins; what one removes is there no more for the other."""
    one, other = opened(tmp_path), opened(tmp_path)
    key, _, _ = written(one, seed=1)
    again, _, rows = written(other, seed=1)
    assert key == again
    assert [page.key for page in opened(tmp_path).pages()] == [key]
    assert one.read(key).keys() == rows.keys()
    opened(tmp_path, most_bytes=0)
    assert one.read(key) is None
    assert not one.has(key)


def test_what_a_killed_process_has_left_goes(tmp_path):
    partial, fresh, strange = (tmp_path / name for name in (".kv_cache.old", ".kv_cache.new", "holiday.png"))
    for path in (partial, fresh, strange):
        path.write_bytes(b"begun")
    os.utime(partial, (0, 0))
    os.utime(strange, (0, 0))
    opened(tmp_path, most_bytes=0)
    assert {path.name for path in tmp_path.iterdir()} == {fresh.name, strange.name}


# Damage ---------------------------------------------------------------------------------------------------------------


def signed(header, content):
    """A file whose checksum is right."""
    whole = (header if isinstance(header, bytes) else json.dumps(header).encode()) + b"\n" + content
    return whole + hashlib.sha256(whole).digest()


def altered_header(draw, header, content):
    """Another header, and the content that it tells of, so that the checks of the header alone can find it."""
    arrays, number = header["arrays"], draw.randrange(len(header["arrays"]))
    sizes = [np.dtype(dtype).itemsize * math.prod(shape) for _, dtype, shape in arrays]
    first = sum(sizes[:number])
    of_array = slice(first, first + sizes[number])
    name, dtype, shape = arrays[number]
    others = ["|O", "<i8", "<f4", ">i4", "|V4", "no type", "", None, 4, [["a", "<i4"]]]
    event = draw.choice(["removed", "renamed", "retyped", "reshaped", "twice", "swapped", "tokens", "key", "huge"])
    if event == "removed":
        del arrays[number]
        content = content[: of_array.start] + content[of_array.stop :]
    elif event == "renamed":
        arrays[number][0] = draw.choice([name + "0", "", name.upper(), "../" + name, None, 3, [name]])
    elif event == "retyped":
        arrays[number][1] = draw.choice([other for other in others if other != dtype])
    elif event == "reshaped":
        axis = draw.randrange(len(shape))
        size = draw.choice([shape[axis] + 1, 0, -1, 10**18, 2.5, None, "7", []])
        arrays[number][2] = draw.choice([[*shape[:axis], size, *shape[axis + 1 :]], [*shape, 1], shape[:-1], None])
    elif event == "twice":
        arrays.append([name, dtype, shape])
        content += content[of_array]
    elif event == "swapped":
        arrays.append(arrays.pop(0))
        content = content[sizes[0] :] + content[: sizes[0]]
    elif event == "tokens":
        header["tokens"] = draw.choice([-1, 0, TOKENS - 1, TOKENS + 1, 10**18, True, 7.0, "7", None, [7], {}])
    elif event == "key":
        key = draw.choice(list(header))
        if draw.random() < 0.5:
            del header[key]
        else:
            header[key] = draw.choice([None, [], {}, 0, "another", [[]], True, "00" * 32])
    else:
        return draw.choice(
            [b"[" * 100_000, b"9" * 10_000, b"{" * 2_000_000, b"\xff\xfe{", b'{"kind": NaN}', b"null"]
        ), content
    return header, content


def check_removal(folder, kv, path, content, key, caplog):
    """The folder can be opened, a warning tells why the page is not there, and it is written anew."""
    path.write_bytes(content)
    caplog.clear()
    files = opened(folder, kv)
    assert not files.pages() or files.read(key) is None
    assert not path.exists()
    (record,) = caplog.records
    assert record.getMessage().startswith(f"{path} is damaged (")
    assert record.getMessage().endswith("): it is removed, and computed again")


@pytest.mark.parametrize("kv", FORMATS)
def test_damaged_files_are_removed(kv, tmp_path, caplog):
    """What was flipped, cut off, put in or zeroed, wherever."""
    key, _, _ = written(opened(tmp_path, kv), kv)
    (path,) = tmp_path.iterdir()
    whole, draw = path.read_bytes(), random.Random(kv)
    for _ in range(200):
        damaged = damaged_bytes(draw, whole)
        if damaged != whole:
            check_removal(tmp_path, kv, path, damaged, key, caplog)


@pytest.mark.parametrize("kv", FORMATS)
def test_altered_headers_are_removed(kv, tmp_path, caplog):
    """Also where the checksum is right: arrays removed, renamed, retyped, of other shapes, of more tokens."""
    key, _, _ = written(opened(tmp_path, kv), kv)
    (path,) = tmp_path.iterdir()
    line, rest = path.read_bytes().split(b"\n", 1)
    content, draw = rest[: -hashlib.sha256().digest_size], random.Random(kv)
    assert signed(json.loads(line), content) == path.read_bytes()
    for _ in range(200):
        altered = signed(*altered_header(draw, json.loads(line), content))
        check_removal(tmp_path, kv, path, altered, key, caplog)


def test_identities_are_those_of_the_name(tmp_path, caplog):
    """Though the checksum is right, a page is not taken for another one's."""
    key, identities, _ = written(opened(tmp_path))
    (path,) = tmp_path.iterdir()
    line, rest = path.read_bytes().split(b"\n", 1)
    content = (identities + 1).tobytes() + rest[identities.nbytes : -hashlib.sha256().digest_size]
    check_removal(tmp_path, "f32", path, signed(line, content), key, caplog)


def test_what_is_no_file(tmp_path, caplog):
    key, _, _ = written(files := opened(tmp_path))
    (path,) = tmp_path.iterdir()
    path.unlink()
    os.mkfifo(path)
    assert files.read(key) is None
    assert "it is no regular file" in caplog.text
    assert not opened(tmp_path).pages()


def test_where_nothing_can_be_kept(tmp_path):
    (tmp_path / "file").write_bytes(b"mine")
    for folder, reason in (
        (tmp_path / "file", "Not a directory"),
        (tmp_path / "file" / "cache", "Not a directory"),
        (tmp_path / ("n" * 256), "File name too long"),
        (tmp_path / "null\0", "embedded null byte"),
    ):
        with pytest.raises(UserError, match=rf"cannot be kept in .* \({reason}\): choose another folder\."):
            check_folder(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    files = opened(tmp_path / "cache")
    (tmp_path / "cache").rmdir()
    with pytest.raises(UserError, match=r"\(No such file or directory\): choose another folder\."):
        written(files)


def test_the_folder_is_the_users_alone(tmp_path):
    opened(tmp_path / "cache")
    assert (tmp_path / "cache").stat().st_mode & 0o777 == 0o700

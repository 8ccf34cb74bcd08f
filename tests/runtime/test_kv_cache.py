"""What the cache keeps and where: against the definition of each policy, token by token."""

import hashlib
import json
import math
import os
import random
import re
from types import SimpleNamespace

import numpy as np
import pytest

from pascalvl.engines import Session
from pascalvl.engines.session import HostSession
from pascalvl.plugins.errors import UserError
from pascalvl.plugins.kv_format import CacheConfig
from pascalvl.plugins.model_config import TextConfig
from pascalvl.runtime.kv_cache import KVCache, Prefix, check_writable
from tests.fuzz.mutators import damaged_bytes

TEXT = TextConfig(16, 8, 2, 1, 1, 128, 1000, (24, 20, 20), (0.5,) * 64, 1.0, (128,) * 2)
LONGEST = 400


class TokenSession(Session):
    """Stores token numbers where a real one stores keys and values; ``seen`` collects what each token is shown."""

    def __init__(self, config, capacity):
        model = SimpleNamespace(text=TEXT, num_deepstack=1)
        super().__init__(SimpleNamespace(manifest=SimpleNamespace(model=model, kv_cache=config)), capacity)
        self.slots = np.full(self.capacity, -1)
        self.seen = {}

    nbytes = 0

    def prefill(self, tokens, placement):
        visible = self.visible(placement)[0]
        assert placement.visible is None or len(visible) == self.capacity
        past = np.arange(placement.past_length)
        for i, token in enumerate(tokens):
            shown = [self.slots[s] for s in past if i < visible[min(s, len(visible) - 1)]]
            self.seen[int(token)] = [*shown, *tokens[: i + 1]]
        stored = placement.slots >= 0
        self.slots[placement.slots[stored]] = tokens[stored]

    decode = prefill

    def read(self, slots):
        return {"tokens": self.slots[slots]}

    def write(self, slots, rows):
        self.slots[slots] = rows["tokens"][: len(slots)]

    _fetch = _put = None


class Conversation:
    """A cache at work; ``pinned`` are the numbers of tokens that were."""

    def __init__(self, kv, pinned=0):
        self.config = CacheConfig.parse(kv)
        self.session = TokenSession(self.config, self.config.slots(LONGEST, pinned))
        self.cache = KVCache(self.session, self.config, LONGEST)
        self.pinned = set()

    def append(self, count, pinned=None, interrupted=False):
        first = self.cache.length
        tokens = np.arange(first, first + count)
        pinned = np.zeros(count, bool) if pinned is None else pinned
        self.pinned = {token for token in self.pinned if token < first} | set(tokens[pinned].tolist())
        try:
            with self.cache.appending(tokens, pinned) as placement:
                if count == 1:
                    assert placement.visible is None  # decode sees all of its past
                self.session.prefill(tokens, placement)
                if interrupted:
                    raise KeyboardInterrupt
        except KeyboardInterrupt:
            return
        for token in tokens.tolist():
            assert sorted(self.session.seen[token]) == self.expected(token), token

    def expected(self, token):
        window = self.config.window
        if window is None:
            return list(range(token + 1))
        return [j for j in range(token + 1) if token - j < window.length or j < window.sinks or j in self.pinned]


@pytest.mark.parametrize("kv", ["f32", "k8v4,window=0+16", "k8v4,window=4+20", "k4v4,window=3+17,pin=image"])
@pytest.mark.parametrize("seed", range(6))
def test_tokens_see_what_the_policy_says(kv, seed):
    """Chunks and single tokens at random, truncations and interrupts between them."""
    draw = random.Random(seed)
    conversation = Conversation(kv, pinned=60)
    config = conversation.config
    most = min(config.window.length if config.window else 30, 30)
    for _ in range(60):
        event, count = draw.random(), draw.choice([1, 1, 1, draw.randint(2, most)])
        if event < 0.06:
            length = draw.randint(0, conversation.cache.length)
            left = conversation.cache.truncate(length)
            assert left in (0, length)
            assert conversation.cache.length == left
        elif event < 0.1:
            before = conversation.cache.length
            conversation.append(count, interrupted=True)
            assert conversation.cache.length == before
            assert conversation.cache.truncate(before) in (0, before)
        elif conversation.cache.length + count <= LONGEST:
            pinned = None
            if config.pin_images and count > 1 and len(conversation.pinned) < 30:
                pinned = np.array([draw.random() < 0.3 for _ in range(count)])
            conversation.append(count, pinned)
    assert conversation.cache.length > 0


def test_a_window_takes_no_more_slots_however_long_the_conversation():
    conversation = Conversation("k8v4,window=4+16")
    assert conversation.session.capacity == 4 + 15
    for _ in range(LONGEST // 8):
        conversation.append(7)
        conversation.append(1)
    assert conversation.cache.length == LONGEST


def test_truncation_keeps_all_or_nothing_of_a_window():
    conversation = Conversation("k8v4,window=4+16")
    conversation.append(12)
    assert conversation.cache.truncate(9) == 9
    for _ in range(3):
        conversation.append(10)
    assert conversation.cache.truncate(39) == 39
    assert conversation.cache.truncate(38) == 0  # would see tokens that are gone
    conversation.append(16)


def test_too_many_pinned_tokens():
    conversation = Conversation("k8v4,window=0+16,pin=image", pinned=8)
    for _ in range(4):
        conversation.append(2, np.ones(2, bool))
    for _ in range(7):
        conversation.append(2, np.ones(2, bool))
    with pytest.raises(UserError, match="has 23 slots, too few for what is pinned: give fewer pictures"):
        conversation.append(2, np.ones(2, bool))


def test_common_prefix():
    conversation = Conversation("f32")
    cache = conversation.cache
    assert cache.common_prefix(np.array([7, 8])) == 0
    with cache.appending(np.array([7, -5, -6, 9])):
        pass
    assert cache.common_prefix(np.array([7, -5, -6, 9, 1, 2])) == 4
    assert cache.common_prefix(np.array([7, -5, 3, 9])) == 2
    assert cache.common_prefix(np.array([1])) == 0
    cache.truncate(1)
    assert cache.common_prefix(np.array([7, -5, -6, 9])) == 1


def test_tokens_that_never_came():
    conversation = Conversation("f32")
    cache = conversation.cache
    with cache.appending(np.array([7, 8])):
        pass
    with pytest.raises(KeyboardInterrupt), cache.appending(np.array([9, 10])):
        raise KeyboardInterrupt
    assert cache.common_prefix(np.array([7, 8, 9, 10])) == 2
    with cache.appending(np.array([11, 12])):
        pass
    assert cache.common_prefix(np.array([7, 8, 9, 10])) == 2
    assert cache.common_prefix(np.array([7, 8, 11, 12])) == 4


@pytest.mark.parametrize("kv", ["k8v4", "k8v4,window=4+16"])
def test_a_prefix_comes_back(kv):
    conversation = Conversation(kv)
    conversation.append(14)
    prefix = conversation.cache.prefix(14)
    for _ in range(4):
        conversation.append(9)
    assert conversation.cache.restore(prefix, 12, np.zeros(12, bool))
    assert conversation.cache.length == 12
    conversation.append(1)
    conversation.append(7)


def test_a_prefix_that_a_window_would_have_dropped_is_not_taken():
    long, short = Conversation("k8v4"), Conversation("k8v4,window=4+16")
    long.append(30)
    prefix = long.cache.prefix(30)
    short.append(3)
    assert not short.cache.restore(prefix, 30, np.zeros(30, bool))
    assert short.cache.length == 3
    assert short.cache.restore(prefix, 19, np.zeros(19, bool))
    short.append(8)
    for _ in range(2):
        short.append(9)
    assert short.cache.prefix(37) is None


# Files ----------------------------------------------------------------------------------------------------------------

FORMATS = ("f32", "f16", "k8v4", "k4v4", "k8v8,layer.0=f16")
ENGINE = hashlib.sha256(b"engine").hexdigest()
TOKENS = 7


def host_session(kv):
    model = SimpleNamespace(text=TEXT, num_deepstack=1)
    return HostSession(
        SimpleNamespace(manifest=SimpleNamespace(model=model, kv_cache=CacheConfig.parse(kv))), 2 * TOKENS
    )


def saved(kv, path, tokens=TOKENS):
    """A session of ``kv`` and a prefix of random bytes that was in it, saved to ``path``."""
    session, draw = host_session(kv), np.random.default_rng(0)
    rows = session.read(np.arange(tokens))
    rows = {
        name: np.frombuffer(draw.bytes(array.nbytes), array.dtype).reshape(array.shape) for name, array in rows.items()
    }
    session.write(np.arange(tokens), rows)
    prefix = Prefix(draw.integers(-(2**62), 2**17, tokens), session.read(np.arange(tokens)))
    prefix.save(path, ENGINE)
    return session, prefix


@pytest.mark.parametrize("tokens", [0, 1, TOKENS])
@pytest.mark.parametrize("kv", FORMATS)
def test_saved_prefixes(kv, tokens, tmp_path):
    """To the bit, whatever was in the rows, NaNs among it."""
    session, prefix = saved(kv, tmp_path / "cache", tokens)
    assert [file.name for file in tmp_path.iterdir()] == ["cache"]
    found = Prefix.load(tmp_path / "cache", ENGINE, session)
    np.testing.assert_array_equal(found.identities, prefix.identities)
    assert found.rows.keys() == prefix.rows.keys()
    for name, array in prefix.rows.items():
        assert (found.rows[name].dtype, found.rows[name].shape) == (array.dtype, array.shape)
        assert found.rows[name].tobytes() == array.tobytes()
    session.write(np.arange(tokens), found.rows)


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
            header[key] = draw.choice([None, [], {}, 0, "another", [[]], True])
    else:
        return draw.choice(
            [b"[" * 100_000, b"9" * 10_000, b"{" * 2_000_000, b"\xff\xfe{", b'{"kind": NaN}', b"null"]
        ), content
    return header, content


def check_refusal(path, session):
    with pytest.raises(UserError) as error:
        Prefix.load(path, ENGINE, session)
    sentence = str(error.value)
    assert re.fullmatch(r"[^\n]*: choose another file, or remove it to have it written anew\.", sentence), sentence
    assert str(path) in sentence
    assert "pickle" not in sentence


@pytest.mark.parametrize("kv", FORMATS)
def test_damaged_files_are_refused(kv, tmp_path):
    """What was flipped, cut off, put in or zeroed, wherever."""
    path, draw = tmp_path / "cache", random.Random(kv)
    session, _ = saved(kv, path)
    whole = path.read_bytes()
    for _ in range(300):
        damaged = damaged_bytes(draw, whole)
        if damaged != whole:
            path.write_bytes(damaged)
            check_refusal(path, session)


@pytest.mark.parametrize("kv", FORMATS)
def test_altered_headers_are_refused(kv, tmp_path):
    """Also where the checksum is right: arrays removed, renamed, retyped, of other shapes, of more tokens."""
    path, draw = tmp_path / "cache", random.Random(kv)
    session, _ = saved(kv, path)
    line, rest = path.read_bytes().split(b"\n", 1)
    content = rest[: -hashlib.sha256().digest_size]
    assert signed(json.loads(line), content) == path.read_bytes()
    for _ in range(300):
        path.write_bytes(signed(*altered_header(draw, json.loads(line), content)))
        check_refusal(path, session)


def test_rows_of_zeros_are_refused(tmp_path):
    session, prefix = saved("k8v4", tmp_path / "cache")
    size = sum(array.nbytes for array in prefix.rows.values())
    whole = (tmp_path / "cache").read_bytes()
    end = len(whole) - hashlib.sha256().digest_size
    (tmp_path / "cache").write_bytes(whole[: end - size] + bytes(size) + whole[end:])
    with pytest.raises(UserError, match=r"\(its checksum is not that of its content\)"):
        Prefix.load(tmp_path / "cache", ENGINE, session)


def test_files_of_another_engine_or_cache(tmp_path):
    session, _ = saved("k8v4", tmp_path / "cache")
    with pytest.raises(UserError, match="was computed by another engine than this one: choose another file"):
        Prefix.load(tmp_path / "cache", ENGINE[::-1], session)
    for kv in ("k8v8", "f16", "k8v4,layer.1=f16"):
        with pytest.raises(UserError, match="other names, types or shapes than the engine's cache"):
            Prefix.load(tmp_path / "cache", ENGINE, host_session(kv))


def test_what_is_no_saved_cache(tmp_path):
    path, session = tmp_path / "cache", host_session("f32")
    with pytest.raises(UserError, match=r"is no saved KV cache \(No such file or directory\): choose another"):
        Prefix.load(path, ENGINE, session)
    with pytest.raises(UserError, match=r"is no saved KV cache \(it is no regular file\)"):
        Prefix.load(tmp_path, ENGINE, session)
    os.mkfifo(tmp_path / "pipe")
    for other in ("pipe", "/dev/zero"):
        with pytest.raises(UserError, match=r"is no saved KV cache \(it is no regular file\)"):
            Prefix.load(tmp_path / other, ENGINE, session)
    np.savez(tmp_path / "objects.npz", identities=np.array([{}, None]))
    for content in (b"", b"\n", bytes(3_000_000), (tmp_path / "objects.npz").read_bytes()):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"is no saved KV cache \(it does not begin as one\)"):
            Prefix.load(path, ENGINE, session)


def test_where_nothing_can_be_saved(tmp_path):
    """`check_writable` knows what `save` would meet, and changes nothing."""
    _, prefix = saved("f32", tmp_path / "cache")
    whole = (tmp_path / "cache").read_bytes()
    for path in (tmp_path / "cache", tmp_path / ("n" * 255)):
        check_writable(path)
    assert [file.name for file in tmp_path.iterdir()] == ["cache"]
    assert (tmp_path / "cache").read_bytes() == whole
    for path, reason in (
        (tmp_path / "none" / "cache", "No such file or directory"),
        (tmp_path / "cache" / "cache", "Not a directory"),
        (tmp_path / ("n" * 256), "File name too long"),
    ):
        for refusing in (check_writable, lambda path: prefix.save(path, ENGINE)):
            with pytest.raises(UserError, match=rf"cannot be saved to .* \({reason}\): choose another file\."):
                refusing(path)
    with pytest.raises(UserError, match=r"cannot be saved to .* \(embedded null byte\)"):
        prefix.save(tmp_path / "null\0", ENGINE)
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(UserError, match=r"cannot be saved to .* \(it is no regular file\)"):
            check_writable(path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["cache", "pipe"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_files_without_permission(tmp_path):
    _, prefix = saved("f32", tmp_path / "cache")
    (tmp_path / "cache").chmod(0o400)
    (tmp_path / "closed").mkdir(0o500)
    for path in (tmp_path / "cache", tmp_path / "closed" / "cache"):
        with pytest.raises(UserError, match=r"\(Permission denied\)"):
            check_writable(path)
    with pytest.raises(UserError, match=r"\(Permission denied\)"):
        prefix.save(tmp_path / "closed" / "cache", ENGINE)

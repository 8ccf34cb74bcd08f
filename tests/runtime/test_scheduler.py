"""Many sequences over one pool: pages, prefixes, turns and preemption, on a decoder whose tokens depend on all it sees.

That decoder keeps the identities of tokens in the place of keys and values, and chooses by a hash of what a sequence's
pages say its past is: a page that is shared, reused or given away wrongly changes an answer.
"""

import itertools
import sys
import tempfile
import zlib
from collections import deque
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pascalvl.plugins.bindings import Binding
from pascalvl.plugins.errors import UserError
from pascalvl.plugins.kv_format import PAGE_SLOTS, CacheConfig, pages_of
from pascalvl.plugins.prompt import Prompt
from pascalvl.runtime.generation import FinishReason, Generation, StopMatcher
from pascalvl.runtime.kv_pool import PagePool
from pascalvl.runtime.page_files import PageFiles
from pascalvl.runtime.prefixes import PrefixTree
from pascalvl.runtime.sampling import Sampler, SamplingParams
from pascalvl.runtime.scheduler import Limits, Scheduler
from pascalvl.runtime.sequence import TokenSequence

VOCAB = 50
LONGEST = 6 * PAGE_SLOTS
END = frozenset({0})
PAGE_BYTES = 8 * PAGE_SLOTS
ENGINE = "ab" * 32


class HashingSession:
    """A session of the decoder above."""

    def __init__(self, pages):
        self.pages, self.sequence_pages = pages, pages_of(LONGEST)
        self.model = SimpleNamespace(text=SimpleNamespace(hidden_size=1), num_deepstack=0)
        self.pool = np.full((pages, 1, PAGE_SLOTS), -7, np.int64)
        self.stored = [Binding("identities", np.dtype(np.int64), ("pages", 1, PAGE_SLOTS))]
        self.calls = []
        """By step, the numbers of new tokens of its sequences."""

    def choose(self, sequences, choices=None):
        self.calls.append([len(ids) for ids, _ in sequences])
        choices = choices or [None] * len(sequences)
        return [self._run(*each, choice) for each, choice in zip(sequences, choices, strict=True)]

    def _run(self, ids, placement, choice):
        past = self.pool[placement.pages].reshape(-1)[: placement.past_length]
        seen = np.concatenate([past, ids])
        pages, slots = np.divmod(placement.slots, PAGE_SLOTS)
        self.pool[placement.pages[pages], 0, slots] = ids
        allowed = range(VOCAB)
        if choice is not None and choice.mask is not None:
            allowed = np.flatnonzero(np.unpackbits(choice.mask.view(np.uint8), bitorder="little")).tolist()
        return next_token(seen, allowed), 1.0

    def shape_of(self, binding):
        return self.pool.shape

    def read(self, pages):
        return {"identities": self.pool[pages].copy()}

    def write(self, pages, rows):
        self.pool[pages] = rows["identities"][: len(pages)]

    def copy_page(self, page, to):
        self.pool[to] = self.pool[page]


class PlainSteps:
    """Feeds of that session."""

    def next_tokens(self, token_ids, positions, placements):
        return [(np.array([token]), placement) for token, placement in zip(token_ids, placements, strict=True)]

    def chunk(self, sequence, chunk, seen, placement):
        return sequence.identities[chunk], placement


def next_token(seen, allowed=range(VOCAB)):
    return allowed[zlib.crc32(np.ascontiguousarray(seen, np.int64).tobytes()) % len(allowed)]


def rule(answer):
    """Of a grammar that goes by a hash of the answer so far: tokens that have to follow, those of which one may, and
    whether none may."""
    key = zlib.crc32(bytes(answer) + b"rule")
    length = (0, 0, 1, 3, 10, 75)[key % 6]
    forced = [1 + (key + 5 * i) % (VOCAB - 1) for i in range(length)]
    return forced, [token for token in range(VOCAB) if (token + key) % 4], key % 101 == 0


class HashingMatcher:
    """Of that grammar."""

    def __init__(self):
        self._answer = []
        self.forced, self._allowed, self.is_complete = deque(), range(VOCAB), False

    def mask(self):
        bits = np.zeros(64, bool)
        bits[[self.forced[0]] if self.forced else self._allowed] = True
        return np.packbits(bits, bitorder="little").view(np.uint32)

    def accept(self, token):
        self._answer.append(token)
        if self.forced:
            assert self.forced.popleft() == token
        if not self.forced:
            forced, self._allowed, self.is_complete = rule(self._answer)
            self.forced = deque(() if self.is_complete else forced)


def written(prompt, limit, has_grammar=False):
    """The answer that a prompt has to get: tokens and whether the grammar forced each, and whether it is whole."""
    seen, answer, forced, allowed, is_complete = list(prompt), [], [], range(VOCAB), False
    while len(answer) < limit and not is_complete and (not answer or answer[-1][0] not in END):
        answer.append((forced.pop(0), True) if forced else (next_token(np.array(seen), allowed), False))
        seen.append(answer[-1][0])
        if has_grammar and not forced:
            forced, allowed, is_complete = rule(seen[len(prompt) :])
    return answer, is_complete or answer[-1][0] in END


def alone(prompt, limit, has_grammar=False):
    return [token for token, _ in written(prompt, limit, has_grammar)[0]]


def sequence(prompt, limit, has_grammar=False):
    ids = np.array(prompt, np.int64)
    sampler = Sampler(SamplingParams(temperature=0), ids, VOCAB, HashingMatcher() if has_grammar else None)
    text = SimpleNamespace(push=lambda token: f" {token}")
    none = np.zeros(len(ids), bool)
    return TokenSequence(Prompt(ids), none, sampler, limit, StopMatcher(()), END, text, Generation(len(ids)))


def scheduler(pages, folder=None, kv="f32", **limits):
    session = HashingSession(pages)
    files = folder and PageFiles(folder, ENGINE, session, 100 * (PAGE_BYTES + 1000))
    made = Scheduler(None, session, CacheConfig.parse(kv), LONGEST, PlainSteps(), Limits(**limits), files)
    return made, session


def run(made, most=10_000):
    """Until nothing is left to do."""
    for _ in range(most):
        if made.is_idle:
            return
        made.step()
    raise AssertionError("it does not come to an end")


def check_pages(made):
    """Each page is used by those who know of it, and by nobody else."""
    users = [0] * len(made.pool)
    for cache in (each.cache for each in made._running):
        for page in cache.pages:
            users[page] += 1
    for node in made.tree._in_pool:
        users[node.page] += 1
    assert users == [made.pool.users(page) for page in range(len(made.pool))]
    assert made.pool.free == users.count(0)
    check_tree(made.tree)


def check_tree(tree):
    """What is in the pool, on the host and in files is found from the root, pages of the pool before all others."""
    found = [tree._root]
    for node in found:
        assert all(child.is_there and child.parent is node for child in node.children.values())
        assert node is tree._root or node.page is not None or not node.is_before_others
        assert node.page is None or node.rows is None
        found += node.children.values()
    assert set(tree._in_pool) == {node for node in found if node.page is not None}
    assert set(tree._on_host) == {node for node in found if node.rows is not None}
    assert tree.host_bytes == PAGE_BYTES * len(tree._on_host)


prompts = st.builds(
    lambda group, shared, own, seed: [
        *(1 + (group * 7 + i) % (VOCAB - 1) for i in range(shared)),
        *(int(x) for x in np.random.default_rng(seed).integers(1, VOCAB, own)),
    ],
    st.integers(0, 2),
    st.integers(0, 300),
    st.integers(1, 200),
    st.integers(0, 3),
)
requests = st.tuples(
    prompts, st.integers(1, 120), st.integers(0, 12), st.one_of(st.none(), st.integers(0, 15)), st.booleans()
)
"""Prompt, at most 500 tokens, those of the answer at most, steps before it comes, and after which it is cancelled, and
whether it has a grammar."""


@settings(max_examples=150, deadline=None)
@given(
    st.lists(requests, min_size=1, max_size=12),
    st.integers(pages_of(620), 14),
    st.integers(1, 6),
    st.sampled_from([0, 3, 1000]),
    st.booleans(),
)
def test_any_arrivals_and_cancellations(arriving, pages, at_once, on_host, has_files):
    """Each sequence gets what it gets alone, or was cancelled; no page is lost or used by strangers; and no step takes
    more tokens of a prompt than it may while others write. With room on the host or without, and files or none."""
    with tempfile.TemporaryDirectory() as folder:
        files = Path(folder) if has_files else None
        limits = {"sequences": at_once, "chunk": 200, "chunk_beside": 30, "host_bytes": on_host * PAGE_BYTES}
        check_arrivals(*scheduler(pages, files, **limits), arriving)


def check_arrivals(made, session, arriving):
    sequences = [sequence(prompt, limit, has_grammar) for prompt, limit, _, _, has_grammar in arriving]
    for step in itertools.count():
        for each, (_, _, comes, _, _) in zip(sequences, arriving, strict=True):
            if comes == step:
                made.submit(each)
        for each, (_, _, comes, goes, _) in zip(sequences, arriving, strict=True):
            if goes is not None and comes + goes == step and not each.is_finished:
                made.cancel(each)
        session.calls.clear()
        made.step()
        check_pages(made)
        if len(session.calls) == 2:
            assert session.calls[1] == [min(session.calls[1][0], 30)]
        assert all(call == [1] * len(call) or len(call) == 1 for call in session.calls)
        if made.is_idle and step > 30:
            break
        assert step < 5000, "it does not come to an end"
    for each, (prompt, limit, _, goes, has_grammar) in zip(sequences, arriving, strict=True):
        answer, is_whole = written(prompt, limit, has_grammar)
        expected = [token for token, _ in answer]
        assert each.generation.token_ids == expected[: len(each.generation.token_ids)]
        if goes is None:
            assert each.is_finished
            assert each.generation.token_ids == expected
            assert each.generation.finish_reason is (FinishReason.STOP if is_whole else FinishReason.LENGTH)
    made.tree.save()
    check_pages(made)
    made.tree.clear()
    check_tree(made.tree)
    assert made.pool.free == len(made.pool)


def test_a_long_run_leaks_nothing():
    """100,000 tokens of prompts with random beginnings, through few pages."""
    made, _ = scheduler(12, sequences=4, chunk=256, host_bytes=20 * PAGE_BYTES)
    rng, done = np.random.default_rng(0), 0
    while done < 100_000:
        shared = [1 + i % 40 for i in range(int(rng.integers(0, 300)))]
        own = rng.integers(1, VOCAB, rng.integers(1, 200)).tolist()
        limit = int(rng.integers(1, 60))
        each = sequence([*shared, *own], limit)
        made.submit(each)
        if len(made._waiting) > 6:
            run(made)
            check_pages(made)
        done += len(shared) + len(own)
    run(made)
    assert len(made.tree) <= 12
    assert made.tree._root.children
    made.tree.clear()
    assert made.pool.free == 12


@pytest.mark.parametrize("lines", [*range(0, 1500, 60)])
def test_an_interrupt_between_any_two_lines(lines):
    """What the interrupted ones had is given back, and the others go on."""
    made, _ = scheduler(8, sequences=3, chunk=100, host_bytes=4 * PAGE_BYTES)
    prompts = [[1 + i % 40 for i in range(150)] + [number] * 30 for number in (1, 2, 3)]
    sequences = [sequence(prompt, 150, has_grammar=True) for prompt in prompts]
    left = lines

    def count(frame, event, _):
        nonlocal left
        if not frame.f_code.co_filename.endswith(("scheduler.py", "prefixes.py", "kv_pool.py", "kv_cache.py")):
            return None
        if frame.f_code.co_filename == __file__:
            return None
        left -= event == "line"
        if left < 0:
            raise KeyboardInterrupt
        return count

    def interrupted():
        before = sys.gettrace()
        sys.settrace(count)
        try:
            for each in sequences:
                made.submit(each)
            run(made)
        finally:
            sys.settrace(before)

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    made.recover()
    check_pages(made)
    for each in sequences:
        if not (each.is_finished or each in made._waiting or each in made._running):
            made.submit(each)  # that was never done
    made.cancel(sequences[0])
    run(made)
    check_pages(made)
    for each, prompt in zip(sequences[1:], prompts[1:], strict=True):
        assert each.generation.token_ids == alone(prompt, 150, has_grammar=True)


def test_forced_tokens_are_run_as_a_chunk():
    """With the token that was chosen before them: there is a step for each token that was chosen, and no other."""
    for prompt in ([number] * 40 for number in range(1, 9)):
        made, session = scheduler(12, chunk=64, chunk_beside=64)
        each = sequence(prompt, 120, has_grammar=True)
        made.submit(each)
        run(made)
        answer, _ = written(prompt, 120, has_grammar=True)
        assert each.generation.token_ids == [token for token, _ in answer]
        chosen = [at for at, (_, is_forced) in enumerate(answer) if not is_forced]
        runs = [after - at for at, after in itertools.pairwise(chosen)]
        pieces = [[64, length - 64] if length > 64 else [length] for length in runs]
        assert session.calls == [[40], *([piece] for run_of in pieces for piece in run_of)]


def test_few_forced_tokens_hold_up_nobody():
    """Where more answers are written than tokens are forced, these are run one by one with them."""
    made, session = scheduler(40, chunk_beside=512)
    sequences = [sequence([number] * 40, 120, has_grammar=True) for number in range(10, 18)]
    for each in sequences:
        made.submit(each)
    found = []
    while not made.is_idle:
        session.calls.clear()
        made.step()
        chunks = [call[0] - 1 for call in session.calls if len(call) == 1 and call[0] not in (1, 40)]
        assert all(forced >= len(made._running) for forced in chunks)
        found += chunks
    assert found
    for number, each in zip(range(10, 18), sequences, strict=True):
        assert each.generation.token_ids == alone([number] * 40, 120, has_grammar=True)


def test_a_conversation_goes_on_in_its_own_pages():
    made, session = scheduler(8)
    prompt = [1 + i % 40 for i in range(200)]
    first = sequence(prompt, 20)
    made.submit(first)
    run(made)
    copies = []
    session.copy_page = lambda page, to: copies.append(page)
    second = sequence([*prompt, *first.generation.token_ids, 5, 6, 7], 5)
    made.submit(second)
    assert second.generation.reused_tokens == 200 + len(first.generation.token_ids) - 1
    run(made)
    assert second.generation.token_ids == alone(second.prompt.token_ids, 5)
    assert not copies


def test_a_fork_takes_the_page_where_there_is_none_for_a_copy():
    made, session = scheduler(1)
    session.copy_page = None
    prompt = [1 + i % 40 for i in range(50)]
    for token in (1, 2):
        each = sequence([*prompt, token, token], 9)
        made.submit(each)
        run(made)
        assert each.generation.token_ids == alone(each.prompt.token_ids, 9)
    assert each.generation.reused_tokens == 50
    check_pages(made)


def test_a_fork_copies_the_page_that_differs():
    made, session = scheduler(8)
    prompt = [1 + i % 40 for i in range(200)]
    made.submit(sequence([*prompt, 1], 3))
    run(made)
    copies, copy_page = [], session.copy_page
    session.copy_page = lambda page, to: (copies.append(page), copy_page(page, to))
    forks = [sequence([*prompt, token, token], 9) for token in (2, 3)]
    for fork in forks:
        made.submit(fork)
    run(made)
    for fork in forks:
        assert fork.generation.reused_tokens == 200
        assert fork.generation.token_ids == alone(fork.prompt.token_ids, 9)
    assert len(copies) == 2


LONG = [1 + i % 40 for i in range(400)]


def answered(made, prompt, limit=5):
    """The sequence of a prompt, after it is run; the answer is right."""
    each = sequence(prompt, limit)
    made.submit(each)
    run(made)
    check_pages(made)
    assert each.generation.token_ids == alone(prompt, limit)
    return each.generation


@pytest.mark.parametrize("has_files", [False, True])
def test_pages_come_back_from_where_they_went(has_files, tmp_path):
    """From the host, or from files where that has room for one alone; a question of its own goes on from there."""
    room = 1 if has_files else 20
    made, session = scheduler(4, tmp_path / "cache" if has_files else None, host_bytes=room * PAGE_BYTES)
    answered(made, LONG)
    answered(made, [41] * 400)  # takes all pages
    assert made.tree.host_bytes == min(room, 4) * PAGE_BYTES
    assert len(list(tmp_path.glob("cache/*.kv"))) == 3 * has_files
    session.calls.clear()
    assert answered(made, [*LONG, 2, 3]).reused_tokens == 400
    assert session.calls[0] == [2]


def test_there_may_be_no_room_on_the_host():
    made, _ = scheduler(4, host_bytes=0)
    answered(made, LONG)
    answered(made, [41] * 400)
    assert made.tree.host_bytes == 0
    assert answered(made, LONG).reused_tokens == 0


def test_pages_outlive_the_process(tmp_path):
    """Once they are saved; what a longer conversation has all tokens of is there once."""
    made, _ = scheduler(8, tmp_path)
    first = answered(made, LONG)
    steps = []
    made.save(lambda done, of: steps.append((done, of)))
    assert steps == [(number, 4) for number in range(1, 5)]
    made, session = scheduler(8, tmp_path)
    whole = [*LONG, *first.token_ids, 7]
    assert answered(made, whole).reused_tokens == 404
    made.save()
    assert len(list(tmp_path.glob("*.kv"))) == 4
    made, session = scheduler(8, tmp_path)
    assert answered(made, whole).reused_tokens == 405
    assert session.calls[0] == [1]


def test_files_that_are_gone_or_damaged(tmp_path, caplog):
    """The rest is computed again, and is there again then."""
    made, _ = scheduler(8, tmp_path)
    answered(made, LONG)
    made.save()
    names = [tmp_path / f"{ENGINE[:16]}-{node.key.hex()}.kv" for node in made.tree.match(np.array(LONG)).path]
    made, _ = scheduler(8, tmp_path)
    content = bytearray(names[2].read_bytes())
    content[-100] ^= 1
    names[2].write_bytes(content)
    assert answered(made, LONG).reused_tokens == 2 * PAGE_SLOTS
    assert "its checksum is not that of its content" in caplog.text
    made.save()
    made, _ = scheduler(8, tmp_path)
    names[1].unlink()
    assert answered(made, LONG).reused_tokens == PAGE_SLOTS
    made.save()
    assert answered(scheduler(8, tmp_path)[0], LONG).reused_tokens == len(LONG) - 1


def test_a_full_disk_stops_nobody(tmp_path, caplog):
    """Told once; what would be written is forgotten."""
    made, _ = scheduler(4, tmp_path / "cache", host_bytes=PAGE_BYTES)
    (tmp_path / "cache").rmdir()
    for token in (1, 2, 3):
        answered(made, [token] * 400)
    assert caplog.text.count("cannot be kept in") == 1
    made, _ = scheduler(4, tmp_path / "cache")
    answered(made, LONG)
    (tmp_path / "cache").rmdir()
    with pytest.raises(UserError, match="cannot be kept in"):
        made.save()


@pytest.mark.parametrize("kv", ["f32", "f32,window=4+500"])
def test_what_is_kept_is_never_given_up(kv):
    """Though there is no room for it on the host, and others would go on in its last page."""
    made, _ = scheduler(6, kv=kv, host_bytes=0)
    answered_in_window(made, LONG)
    assert made.keep(np.array(LONG))
    for prompt in ([*LONG, 5, 6], [41] * 450, [42] * 450, [43] * 450):
        answered_in_window(made, prompt)
    assert answered_in_window(made, [*LONG, 9]).reused_tokens == len(LONG)
    assert not made.keep(np.array([*LONG, 44]))


def answered_in_window(made, prompt, limit=5):
    """As `answered`; tokens see the same as without a window, in which they all are."""
    each = sequence(prompt, limit)
    made.submit(each)
    run(made)
    assert each.generation.token_ids == alone(prompt, limit)
    return each.generation


def test_windows_share_what_begins_alike(tmp_path):
    """By copies: on the host, and in files."""
    options = {"kv": "f32,window=4+500", "host_bytes": 20 * PAGE_BYTES}
    made, _ = scheduler(12, tmp_path, **options)
    for token in (5, 6):
        each = answered_in_window(made, [*LONG, token, token])
    assert each.reused_tokens == len(LONG)
    answered_in_window(made, [41] * 450)
    answered_in_window(made, [42] * 450)
    assert answered_in_window(made, [*LONG, 7]).reused_tokens == len(LONG)
    made.save()
    made, _ = scheduler(12, tmp_path, **options)
    assert answered_in_window(made, [*LONG, 8]).reused_tokens == len(LONG)


def test_a_prompt_waits_for_one_that_begins_alike():
    """And finds its pages."""
    made, session = scheduler(12, chunk=100)
    system = [1 + i % 40 for i in range(300)]
    both = [sequence([*system, token], 4) for token in (2, 3)]
    for each in both:
        made.submit(each)
    run(made)
    assert [each.generation.reused_tokens for each in both] == [0, 300 // PAGE_SLOTS * PAGE_SLOTS]
    assert sum(sum(call) for call in session.calls if call != [1] * len(call)) < 301 + 1 + PAGE_SLOTS


def test_a_prompt_for_which_there_are_never_enough_pages():
    """It is refused, and the others go on."""
    made, _ = scheduler(2)
    long, short = sequence([3] * 400, 5), sequence([3] * 60, 5)
    made.submit(long)
    made.submit(short)
    run(made)
    assert "needs more pages" in str(long.error)
    assert short.generation.token_ids == alone([3] * 60, 5)


def test_prompts_take_turns():
    """A short one is answered while a long one is still computed."""
    made, _ = scheduler(12, chunk=50, chunk_beside=50)
    long, short = sequence(list(range(1, 600)), 1), sequence([3] * 60, 1)
    made.submit(long)
    made.submit(short)
    while not short.is_finished:
        made.step()
    assert not long.is_finished


def test_pages_are_counted():
    pool = PagePool(3)
    pages = pool.take(2)
    pool.share(pages[:1])
    pool.release(pages)
    assert pool.free == 2
    assert pool.used == pages[:1]
    with pytest.raises(ValueError, match="are free"):
        pool.take(3)
    for wrong in (pool.release, pool.share):
        with pytest.raises(ValueError, match="nobody uses"):
            wrong(pages[1:])


def test_what_was_not_asked_for_the_longest_goes_first():
    pool = PagePool(4)
    tree = PrefixTree(pool, HashingSession(4))
    texts = [np.full(PAGE_SLOTS * 2, token) for token in (1, 2)]
    for text in texts:
        pages = pool.take(2)
        tree.insert(text, pages)
        pool.release(pages)
    tree.match(texts[0])
    assert tree.make_room(1)
    assert [tree.match(text).tokens for text in texts] == [2 * PAGE_SLOTS, PAGE_SLOTS]
    assert tree.make_room(3)
    assert [tree.match(text).tokens for text in texts] == [0, PAGE_SLOTS]

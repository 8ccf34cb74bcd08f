"""Which tokens run in the next step: many prompts and answers over one pool of pages."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from pascalvl.engines import Engine, Session
from pascalvl.engines.engine import Features
from pascalvl.plugins.errors import UserError, panics
from pascalvl.plugins.kv_format import PAGE_SLOTS, CacheConfig, pages_of
from pascalvl.plugins.prompt import Visual
from pascalvl.runtime.kv_cache import KVCache, common_length
from pascalvl.runtime.kv_pool import PagePool
from pascalvl.runtime.page_files import PageFiles
from pascalvl.runtime.prefixes import Match, PageNode, PrefixTree
from pascalvl.runtime.sequence import TokenSequence
from pascalvl.runtime.steps import FeatureCache, Steps

log = logging.getLogger(__name__)

_TOKENS_AS_A_PAGE = 32
"""That are computed in a chunk while a page could be fetched instead."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """What one step takes.

    Attributes:
        sequences: that are at work, each with pages of its own.
        chunk: tokens of a prompt, while no answer is being written.
        chunk_beside: tokens of a prompt between two tokens of others' answers.
        feature_bytes: of the features of pictures that are kept.
        host_bytes: of pages that wait on the host, where the pool has no room for them.
    """

    sequences: int = 8
    chunk: int = 512
    chunk_beside: int = 64
    feature_bytes: int = 256 << 20
    host_bytes: int = 1 << 30


class Scheduler:
    """Runs sequences over one session: each step a token of every answer, and then a part of one prompt.

    Prompts are admitted in the order in which they came, when there are pages for them; where an answer finds no page
    for its next token, the sequence that was admitted last gives its pages back, and is computed again later. Prompts
    take turns, chunk by chunk. What a sequence gets does not depend on what runs beside it: decode steps treat each row
    for itself, and a prompt's chunks are its own. A prompt that begins as one that is just being computed waits for it.

    Args:
        engine: with which pictures are looked at.
        session: of it.
        config: what is kept of a sequence's tokens.
        longest: tokens of a sequence at most.
        steps: makes the feeds.
        limits: of a step.
        files: where pages go that are not forgotten then; None: all are.
    """

    def __init__(
        self,
        engine: Engine,
        session: Session,
        config: CacheConfig,
        longest: int,
        steps: Steps,
        limits: Limits,
        files: PageFiles | None = None,
    ) -> None:
        self._config, self._longest, self._steps, self._limits = config, longest, steps, limits
        self.pool = PagePool(session.pages)
        self.tree = PrefixTree(self.pool, session, limits.host_bytes, files)
        self._parked: list[KVCache] = []
        """With a window: conversations that may go on in their own pages, the latest last."""
        self.features = FeatureCache(limits.feature_bytes)
        self._waiting: deque[TokenSequence] = deque()
        self._running: list[TokenSequence] = []
        """In the order in which they were admitted."""
        self._turn: deque[TokenSequence] = deque()
        """Of prompts, the next first."""
        self._elsewhere: dict[TokenSequence, deque[tuple[int, PageNode]]] = {}
        """Pages of prompts that are fetched before the rest is computed, and the tokens that are there then."""
        self.use(engine, session)

    def use(self, engine: Engine, session: Session) -> None:
        """Go on with another engine of the same bundle, and a session of it that has all pages as they were."""
        self._engine, self.session = engine, session
        self.tree.session = session
        for cache in self._caches:
            cache.session = session

    def let_go(self) -> dict[str, np.ndarray]:
        """Copy all that pages hold to the host, for `use` to find in the next session; the present one, the engine and
        what was made of it are referred to no more."""
        rows = self.session.read(np.array(self.pool.used, np.int32))
        self._forget_features()
        for cache in self._caches:
            del cache.session
        del self._engine, self.session, self.tree.session
        return rows

    @property
    def _caches(self) -> list[KVCache]:
        return [*self._parked, *(_cache(sequence) for sequence in self._running)]

    def _forget_features(self) -> None:
        self.features.clear()
        for sequence in (*self._running, *self._waiting):
            sequence.features.clear()

    @property
    def is_idle(self) -> bool:
        return not self._waiting and not self._running

    @property
    def waiting(self) -> int:
        """Sequences that have no pages yet."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Sequences that have."""
        return len(self._running)

    def submit(self, sequence: TokenSequence) -> None:
        """Take a sequence, which `step` runs from now on; it is admitted at once if that is possible."""
        self._waiting.append(sequence)
        self._admit()

    def cancel(self, sequence: TokenSequence) -> None:
        """Run a sequence no more; what was computed of it is kept like that of one that has ended."""
        if sequence in self._waiting:
            self._waiting.remove(sequence)
        elif sequence in self._running:
            self._retire(sequence)

    def end_latest(self, error: Exception) -> bool:
        """End the sequence that was admitted last, for an error; returns whether there was one."""
        if not self._running:
            return False
        self._fail(self._running[-1], error)
        return True

    def recover(self) -> None:
        """Go on after an interrupt, which may have come between any two lines here: no page is lost."""
        lists = self._running, self._waiting, self._turn
        known = {id(sequence): sequence for each in lists for sequence in each if not sequence.is_finished}
        running = [each for each in known.values() if each.cache is not None]
        self._waiting = deque(each for each in known.values() if each.cache is None)
        self._running = sorted(running, key=lambda each: self._running.index(each) if each in self._running else -1)
        for each in self._running:  # with nothing to run: the token that came of the last step was not taken
            if each.computed >= each.length:
                _cache(each).truncate(each.length - 1)
        for cache in () if self._config.window else self._caches:
            cache.shrink()
        self._elsewhere = {each: self._elsewhere[each] for each in self._running if each in self._elsewhere}
        self._turn = deque(each for each in self._running if not each.is_decoding)
        self.pool.recount([self.tree.recover(), *(cache.pages for cache in self._caches)])

    def step(self) -> None:
        """Run what comes next; of sequences that it ends, `TokenSequence.is_finished` tells.

        Raises:
            MemoryError: what is computed in between does not fit in memory. Nothing has changed then, nor with an
                interrupt.
        """
        self._admit()
        if self._waiting and not self._running:
            refused = self._waiting.popleft()
            refused.error = UserError(
                f"a prompt of {refused.length} tokens needs more pages of the KV cache than there are "
                f"({len(self.pool)} of {PAGE_SLOTS} tokens): open the model with a longer context."
            )
        decoding = [sequence for sequence in self._running if sequence.is_decoding]
        if decoding:
            self._decode(decoding)
        if self._turn:
            self._prefill(self._turn[0], self._limits.chunk_beside if decoding else self._limits.chunk)

    def keep(self, identities: np.ndarray) -> bool:
        """Keep the beginning of sequences, which one that has ended had, until the end; returns whether that is
        possible: a window may have dropped some of it."""
        if self._config.window:
            common, parked = self._best_parked(identities)
            if parked is not None and common == len(identities):
                self._copy_to_host(parked, common, is_kept=True)
        return self.tree.keep(identities)

    def save(self, progress: Callable[[int, int], None] = lambda done, of: None) -> None:
        """Write what is kept to files, see `PrefixTree.save`; what a window has dropped some of is not."""
        for cache in self._parked:
            self._copy_to_host(cache, cache.length)
        self.tree.save(progress)

    @contextlib.contextmanager
    def borrowed(self, tokens: int, pinned: int) -> Iterator[KVCache]:
        """A cache for a sequence of so many tokens, whose pages come back at the end.

        Raises:
            UserError: other sequences have them.
        """
        count = pages_of(self._config.slots(tokens, pinned))
        if not self._make_room(count):
            raise UserError("there are no pages left beside the answers that are being written: let these end first.")
        pages = self.pool.take(count)
        try:
            yield KVCache(self.session, self._config, self._longest, np.array(pages, np.int32))
        finally:
            self.pool.release(pages)

    # Steps ------------------------------------------------------------------------------------------------------------

    def _decode(self, sequences: Sequence[TokenSequence]) -> None:
        ready = [sequence for sequence in sequences if self._has_pages(sequence, sequence.length)]
        ready = [sequence for sequence in ready if sequence.cache]  # a later one's pages may have been taken
        if not ready:
            return
        start = time.perf_counter()
        caches = [_cache(sequence) for sequence in ready]
        tokens = self._steps.next_tokens(
            [sequence.generation.token_ids[-1] for sequence in ready],
            [sequence.next_position() for sequence in ready],
            [cache.place(sequence.identities[-1:]) for sequence, cache in zip(ready, caches, strict=True)],
        )
        chosen = self.session.choose(tokens, [sequence.sampler.next() for sequence in ready])
        for cache in caches:
            cache.append()
        self._accept(ready, chosen)
        seconds = time.perf_counter() - start
        for sequence in ready:
            sequence.generation.decode_seconds += seconds

    def _prefill(self, sequence: TokenSequence, most: int) -> None:
        """Fetch pages of a prompt, look at its next picture, or run its next chunk."""
        if self._elsewhere.get(sequence):
            self._turn.rotate(-1)
            self._fetch(sequence, max(1, most // _TOKENS_AS_A_PAGE))
            return
        try:
            seen = self._seen(sequence)
        except (MemoryError, UserError) as error:
            self._fail(sequence, error)
            return
        if seen is None:
            return
        self._turn.rotate(-1)
        start = sequence.computed
        chunk = slice(start, min(start + most, sequence.length))
        if not self._has_pages(sequence, chunk.stop):
            return
        is_last = chunk.stop == sequence.length
        begun = time.perf_counter()
        with _cache(sequence).appending(sequence.identities[chunk], sequence.pinned[chunk]) as placement:
            tokens = [self._steps.chunk(sequence, chunk, seen, placement)]
            chosen = self.session.choose(tokens, [sequence.sampler.next()] if is_last else None)
        seconds = time.perf_counter() - begun
        if sequence.generation.token_ids:
            sequence.generation.decode_seconds += seconds
        else:
            sequence.generation.prefill_seconds += seconds
        if is_last:
            self._turn.remove(sequence)
            self._keep(sequence)
            self._accept([sequence], chosen)

    def _seen(self, sequence: TokenSequence) -> list[tuple[Visual, Features]] | None:
        """Features of what is still to be computed of a prompt's pictures; None: one was looked at now."""
        found = []
        for visual in sequence.unseen():
            features = sequence.features.get(id(visual)) or self.features.get(visual, sequence.cache_salt)
            if features is None:
                start = time.perf_counter()
                features = self._steps.encode(self._engine, visual.patches)
                sequence.generation.vision_seconds += time.perf_counter() - start
                nbytes = len(visual.token_indices) * self._bytes_of_features
                self.features.put(visual, features, nbytes, sequence.cache_salt)
                sequence.features[id(visual)] = features
                return None
            sequence.features[id(visual)] = features
            found.append((visual, features))
        return found

    @property
    def _bytes_of_features(self) -> int:
        """Of a token."""
        model = self.session.model
        return 4 * model.text.hidden_size * (1 + model.num_deepstack)

    def _accept(self, sequences: Sequence[TokenSequence], chosen: Sequence[tuple[int, float]]) -> None:
        for row, (sequence, (token, highest)) in enumerate(zip(sequences, chosen, strict=True)):
            try:
                with panics():
                    sequence.accept(token, highest, functools.partial(self._logits_of, row))
                    # As a chunk of its own it holds up the others for a step, and saves itself as many.
                    if sequence.forced >= len(self._running):
                        sequence.take_forced()
            except Exception as error:  # of its grammar or text, and nobody else's
                sequence.error = error
            if sequence.is_finished:
                self._retire(sequence)
            elif not sequence.is_decoding and sequence not in self._turn:
                self._turn.append(sequence)

    def _logits_of(self, row: int) -> np.ndarray:
        return self.session.logits()[row]

    # Pages ------------------------------------------------------------------------------------------------------------

    def _admit(self) -> None:
        """Give waiting sequences their pages, as long as there are some."""
        for sequence in list(self._waiting):
            if len(self._running) >= self._limits.sequences:
                return
            if self._config.window:
                is_ready = self._begin_in_window(sequence)
            else:
                match = self.tree.match(sequence.identities[:-1])
                if self._is_being_computed(sequence, match):
                    continue
                is_ready = self._begin(sequence, match)
            if not is_ready:
                return
            self._running.append(sequence)
            self._turn.append(sequence)
            self._waiting.remove(sequence)
            self._count_reused(sequence)

    def _is_being_computed(self, sequence: TokenSequence, match: Match) -> bool:
        """Whether another prompt, of which pages are computed now, has more in common with it than what is kept."""
        return any(
            common_length(other.identities, sequence.identities[:-1]) // PAGE_SLOTS * PAGE_SLOTS > match.tokens
            for other in self._turn
        )

    def _begin(self, sequence: TokenSequence, match: Match) -> bool:
        """Share the pages that are kept of a prompt's beginning, if there is room for the rest, which it takes as they
        are needed; returns whether there is."""
        promised = sum(pages_of(each.length) - len(_cache(each).pages) for each in self._running)
        self.pool.share(match.pages)
        missing = pages_of(sequence.length) - len(match.pages)
        if self.pool.free + self.tree.movable < missing + promised:
            self.pool.release(match.pages)
            return False
        last, tokens = self._last_page(match)
        self._give(sequence, match.pages if last is None else [*match.pages, last], tokens)
        self._elsewhere[sequence] = deque(match.elsewhere)
        return True

    def _last_page(self, match: Match) -> tuple[int | None, int]:
        """A page of the sequence's own for what it has of the one in the pool that a match ends in, None: there is
        none; and the tokens that it then has in all. The page itself if nobody else wants it, or else a copy if there
        is room."""
        tokens = len(match.pages) * PAGE_SLOTS
        if match.last is None or match.last.page is None:
            return None, tokens
        page = match.last.page
        if self.tree.claim(page, match.rest):
            return page, match.tokens
        self.pool.share([page])
        has_room = self._make_room(1)
        self.pool.release([page])
        if has_room:
            (copy,) = self.pool.take(1)
            self.session.copy_page(page, copy)
            return copy, match.tokens
        if self.tree.claim(page, match.rest, cut=True):
            return page, match.tokens
        return None, tokens

    def _fetch(self, sequence: TokenSequence, most: int) -> None:
        """Bring up to so many pages of a prompt that are elsewhere to the pool."""
        cache, elsewhere = _cache(sequence), self._elsewhere[sequence]
        begun = time.perf_counter()
        for _ in range(min(most, len(elsewhere))):
            end, node = elsewhere[0]
            is_whole = end % PAGE_SLOTS == 0
            if is_whole and node.page is not None:  # another sequence has brought it there
                self.pool.share([node.page])
                cache.grow([node.page])
            elif not self._has_pages(sequence, end):
                return
            elif node.page is not None:
                self.session.copy_page(node.page, cache.pages[-1])
            elif not self.tree.restore(node, cache.pages[-1], is_shared=is_whole):
                elsewhere.clear()
                break
            cache.begin(sequence.identities[:end], sequence.pinned[:end])
            elsewhere.popleft()
        sequence.generation.prefill_seconds += time.perf_counter() - begun
        self._count_reused(sequence)

    def _count_reused(self, sequence: TokenSequence) -> None:
        if not sequence.generation.token_ids:
            sequence.generation.reused_tokens = sequence.computed

    def _begin_in_window(self, sequence: TokenSequence) -> bool:
        """With a window, slots are used again, and pages are a sequence's own: it goes on where one has ended, or
        begins with copies; returns whether there are enough pages."""
        wanted = sequence.identities[:-1]
        pages = pages_of(self._config.slots(self._longest, int(sequence.pinned.sum())))
        common, parked = self._best_parked(wanted)
        if parked is not None and common and (common == parked.length or self.pool.free < pages):
            self._parked.remove(parked)
            parked.truncate(common)
            parked.grow(self.pool.take(min(max(0, pages - len(parked.pages)), self.pool.free)))
            sequence.cache = parked
        elif self._make_room(pages):
            if parked in self._parked and common > self.tree.match(wanted).tokens:
                self._copy_to_host(parked, common)
            self._give(sequence, self.pool.take(pages), 0)
        else:
            return False
        match, cache = self.tree.match(wanted), _cache(sequence)
        if match.tokens > cache.length and cache.keeps(sequence.pinned[: match.tokens]):
            tokens = cache.length
            for (end, node), page in zip(match.elsewhere, cache.pages, strict=False):
                if not self.tree.restore(node, page, is_shared=False):
                    break
                tokens = max(tokens, end)
            cache.begin(wanted[:tokens], sequence.pinned[:tokens])
        return True

    def _copy_to_host(self, cache: KVCache, tokens: int, is_kept: bool = False) -> None:
        """With a window: let others find a conversation's first tokens, unless it has dropped some of them."""
        if rows := cache.rows(tokens):
            self.tree.insert_rows(cache.identities[:tokens], rows, is_kept)

    def _best_parked(self, identities: np.ndarray) -> tuple[int, KVCache | None]:
        """With a window: the conversation that has most in common with a sequence's beginning, and how many tokens."""
        found = ((cache.common_prefix(identities), cache) for cache in self._parked)
        return max(found, key=lambda each: each[0], default=(0, None))

    def _give(self, sequence: TokenSequence, pages: list[int], tokens: int) -> None:
        sequence.cache = KVCache(self.session, self._config, self._longest, np.array(pages, np.int32))
        sequence.cache.begin(sequence.identities[:tokens], sequence.pinned[:tokens])

    def _has_pages(self, sequence: TokenSequence, tokens: int) -> bool:
        """Get a sequence pages for so many tokens; returns False where it was preempted itself."""
        if sequence.cache is None:
            return False
        if self._config.window:
            return True
        while (missing := pages_of(tokens) - len(sequence.cache.pages)) > 0:
            if self._make_room(missing):
                sequence.cache.grow(self.pool.take(missing))
                return True
            victim = self._running[-1]
            self._preempt(victim)
            if victim is sequence:
                return False
        return True

    def _make_room(self, pages: int) -> bool:
        """Give up what is kept of sequences that have ended until so many pages are free."""
        while self.pool.free < pages and self._parked:
            cache = self._parked.pop(0)
            self._copy_to_host(cache, cache.length)
            self.pool.release(cache.pages)
        return self.tree.make_room(pages)

    def _preempt(self, sequence: TokenSequence) -> None:
        """Take a sequence's pages; what they hold is found again as long as nobody needs them."""
        log.info("a sequence of %d tokens is computed again later: there are no pages left", sequence.length)
        self._waiting.appendleft(sequence)
        self._leave(sequence)

    def _retire(self, sequence: TokenSequence) -> None:
        self._leave(sequence)
        sequence.features.clear()

    def _leave(self, sequence: TokenSequence) -> None:
        self._running.remove(sequence)
        self._elsewhere.pop(sequence, None)
        if sequence in self._turn:
            self._turn.remove(sequence)
        cache, sequence.cache = _cache(sequence), None
        if self._config.window:
            self._parked.append(cache)
            return
        cache.truncate(cache.length)  # what an interrupt has left of a step counts for nothing
        self.tree.insert(sequence.identities[: cache.length], cache.pages)
        self.pool.release(cache.pages)

    def _keep(self, sequence: TokenSequence) -> None:
        """Let others find a prompt's pages that nothing is added to any more."""
        if self._config.window is None:
            full = sequence.computed // PAGE_SLOTS
            self.tree.insert(sequence.identities[: full * PAGE_SLOTS], _cache(sequence).pages[:full])

    def _fail(self, sequence: TokenSequence, error: Exception) -> None:
        sequence.error = error
        self._retire(sequence)


def _cache(sequence: TokenSequence) -> KVCache:
    assert sequence.cache is not None, "the sequence is not at work"
    return sequence.cache

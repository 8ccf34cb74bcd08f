"""What is kept of sequences that have ended, for later ones that begin the same: pages, in a tree.

A page is in the pool, or waits in the host's memory, or in a file; where room is wanted, it goes from one to the next.
"""

from __future__ import annotations

import dataclasses
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator

import numpy as np

from pascalvl.engines import Session
from pascalvl.plugins.errors import UserError
from pascalvl.plugins.kv_format import PAGE_SLOTS
from pascalvl.runtime.kv_cache import common_length
from pascalvl.runtime.kv_pool import PagePool
from pascalvl.runtime.page_files import PageFiles, Rows, key_of

log = logging.getLogger(__name__)


class PageNode:
    """A page, behind those of its parents."""

    __slots__ = ("children", "identities", "is_in_file", "is_kept", "key", "page", "parent", "rows")

    def __init__(self, parent: PageNode | None, identities: np.ndarray, key: bytes) -> None:
        self.parent, self.identities = parent, identities
        self.key = key
        """What its file is named by."""
        self.children: dict[bytes, PageNode] = {}
        self.page: int | None = None
        """In the pool; then those of its parents are, too."""
        self.rows: Rows | None = None
        """On the host; None: in the pool, or in a file alone."""
        self.is_in_file = self.is_kept = False

    @property
    def is_there(self) -> bool:
        return self.page is not None or self.rows is not None or self.is_in_file

    @property
    def is_before_others(self) -> bool:
        """Whether pages behind it are in the pool."""
        return any(child.page is not None for child in self.children.values())


@dataclasses.dataclass(frozen=True, eq=False)
class Match:
    """What is there of a sequence's first tokens."""

    path: list[PageNode]
    """Full pages, in order."""
    last: PageNode | None
    """One more page ..."""
    rest: int
    """... of whose tokens so many are the sequence's next: to be copied, for others may use it or its later slots,
    unless `PrefixTree.claim` gives it."""
    pages: list[int]
    """Those of the full ones that are in the pool."""
    elsewhere: list[tuple[int, PageNode]]
    """Those behind them, and the last, that are not; each with the tokens that the sequence has up to its end."""

    @property
    def tokens(self) -> int:
        """Of the sequence, that need not be computed."""
        return len(self.path) * PAGE_SLOTS + self.rest


class PrefixTree:
    """Pages by what they hold: a node is a page of up to `PAGE_SLOTS` tokens, its parents those before it.

    The tree is one user of each of its pages in the pool. Those that nobody else uses leave it when pages are wanted,
    the ones first that were not asked for the longest; never a page before those behind it.

    Args:
        pool: of the session.
        session: which has the pages; may be set to another one that has them as they were.
        host_bytes: of pages on the host; those that are to be kept for good may take more.
        files: where those go for which there is no room on the host; None: they are forgotten.
    """

    def __init__(self, pool: PagePool, session: Session, host_bytes: int = 0, files: PageFiles | None = None) -> None:
        self._pool, self.session, self._most_bytes, self._files = pool, session, host_bytes, files
        self._root = PageNode(None, np.zeros(0, np.int64), files.root if files else b"")
        # The least recently used first, children before parents.
        self._in_pool: OrderedDict[PageNode, None] = OrderedDict()
        self._on_host: OrderedDict[PageNode, None] = OrderedDict()
        self._bytes = 0
        self._by_page: dict[int, PageNode] = {}
        nodes = {self._root.key: self._root}
        for stored in files.pages() if files else ():
            parent = nodes[stored.parent]
            node = nodes[stored.key] = PageNode(parent, stored.identities, stored.key)
            parent.children[stored.identities.tobytes()] = node
            node.is_in_file = True

    def __len__(self) -> int:
        """Pages that are kept in the pool."""
        return len(self._in_pool)

    @property
    def movable(self) -> int:
        """Pages of the pool that nobody else uses, of which `make_room` makes free ones."""
        return sum(self._pool.users(page) == 1 for page in self._by_page)

    @property
    def host_bytes(self) -> int:
        """Of the pages that wait on the host."""
        return self._bytes

    def match(self, identities: np.ndarray) -> Match:
        """What is kept of the beginning of a sequence, int64 ``[n]``; of no page a user is added."""
        path = list(self._path(identities))
        node = path[-1] if path else self._root
        rest = identities[len(path) * PAGE_SLOTS :]
        best, longest = None, 0
        for child in node.children.values():
            if (common := common_length(child.identities, rest)) > longest:
                best, longest = child, common
        found = [*path, best] if best else path
        self._touch(found)
        pages = [each.page for each in path if each.page is not None]
        tokens = len(path) * PAGE_SLOTS + longest
        ends = ((min((number + 1) * PAGE_SLOTS, tokens), each) for number, each in enumerate(found))
        return Match(path, best, longest, pages, [(end, each) for end, each in ends if each.page is None])

    def claim(self, page: int, tokens: int, cut: bool = False) -> bool:
        """Hand over a page, if nobody else uses it and nothing is kept behind it: its sequence goes on there after so
        many tokens, and the tree's use of it becomes the caller's. Returns whether it did.

        Args:
            page: that a `Match` ends in.
            tokens: that the sequence has of it.
            cut: take it even if it holds others behind these, which are forgotten.
        """
        node = self._by_page[page]
        if node.is_kept or node.children or self._pool.users(page) > 1:
            return False
        if not (cut or len(node.identities) == tokens):
            return False
        self._leave_pool(node)
        if not node.is_there:
            self._forget(node)
        return True

    def restore(self, node: PageNode, page: int, is_shared: bool) -> bool:
        """Put what is elsewhere into a page of the pool that the caller has taken; returns whether it is still there.

        Args:
            node: of `Match.elsewhere`.
            page: where to.
            is_shared: the tree uses the page from then on, too.
        """
        rows = self._rows_of(node)
        if rows is None:
            return False
        self.session.write(np.array([page], np.int32), rows)
        if is_shared:
            self._enter_pool(node, page)
        return True

    def insert(self, identities: np.ndarray, pages: list[int]) -> None:
        """Keep pages of a sequence, whose tokens are ``identities``; what is there already stays as it is."""
        path = []
        for node, number in self._nodes_of(identities):
            if node.page is None:
                self._enter_pool(node, pages[number])
            path.append(node)
        self._touch(path)

    def insert_rows(self, identities: np.ndarray, rows: Rows, is_kept: bool = False) -> None:
        """Keep on the host what `Session.read` gave of a sequence's pages, until the end if they are to be kept."""
        path = []
        for node, number in self._nodes_of(identities):
            node.is_kept |= is_kept
            if not node.is_there:
                self._enter_host(node, {name: array[number : number + 1].copy() for name, array in rows.items()})
            path.append(node)
        self._touch(path)
        self._make_room_on_host()

    def keep(self, identities: np.ndarray) -> bool:
        """Never give up what a sequence begins with; returns whether all of it is there."""
        match = self.match(identities)
        if match.tokens < len(identities):
            return False
        for node in (*match.path, match.last):
            if node:
                node.is_kept = True
        return True

    def make_room(self, pages: int) -> bool:
        """Move pages to the host until so many are free; returns whether they are."""
        for node in list(self._in_pool) if self._pool.free < pages else ():
            self._evict_from(node, pages)
            if self._pool.free >= pages:
                break
        self._make_room_on_host()
        return self._pool.free >= pages

    def save(self, progress: Callable[[int, int], None] = lambda done, of: None) -> None:
        """Write all that is kept to files, as far as they may take so many bytes.

        Args:
            progress: called with numbers of pages, those that are done and all.

        Raises:
            UserError: that cannot be done.
        """
        if self._files is None:
            return
        nodes = [*self._on_host, *self._in_pool]
        nodes = nodes[max(0, len(nodes) - self._files.most_bytes // self._files.page_bytes) :]
        self._files.touch([node.key for node in nodes])
        for number, node in enumerate(reversed(nodes), 1):
            assert node.parent is not None
            if not self._files.has(node.key):
                self._files.write(node.key, node.parent.key, node.identities, self._read(node))
            node.is_in_file = True
            progress(number, len(nodes))
        self._files.touch([node.key for node in nodes])

    def recover(self) -> list[int]:
        """Go on from whatever an interrupt has left; returns the pages that are kept in the pool."""
        found = [self._root]
        for node in found:
            for key, child in list(node.children.items()):
                if child.is_there:
                    found.append(child)
                else:
                    del node.children[key]
        in_pool = {node for node in found if node.page is not None}
        for node in in_pool:
            node.rows = None
        on_host = {node for node in found if node.rows is not None}
        for order, there in ((self._in_pool, in_pool), (self._on_host, on_host)):
            for node in [node for node in order if node not in there]:
                del order[node]
            for node in found:
                if node in there:
                    order.setdefault(node)
        self._bytes = sum(_nbytes(node.rows) for node in on_host if node.rows)
        self._by_page = {node.page: node for node in self._in_pool if node.page is not None}
        return list(self._by_page)

    def clear(self) -> None:
        """Keep nothing but what is in files."""
        for node in list(self._in_pool):
            self._pool.release([self._leave_pool(node)])
        for node in list(self._on_host):
            self._leave_host(node)
        self.recover()

    # One page ---------------------------------------------------------------------------------------------------------

    def _nodes_of(self, identities: np.ndarray) -> Iterator[tuple[PageNode, int]]:
        """The pages of a sequence, with their numbers; nodes that are not there yet are made."""
        node = self._root
        for number in range(-(-len(identities) // PAGE_SLOTS)):
            part = identities[number * PAGE_SLOTS : (number + 1) * PAGE_SLOTS]
            child = node.children.get(part.tobytes())
            if child is None:
                others = [(each, common_length(each.identities, part)) for each in node.children.values()]
                if any(common == len(part) for _, common in others):
                    return  # the end of what another one has
                for each, common in others:
                    if common == len(each.identities):
                        self._give_up(each)
                child = PageNode(node, part.copy(), key_of(node.key, part.tobytes()))
                node.children[part.tobytes()] = child
            yield child, number
            node = child

    def _give_up(self, node: PageNode) -> None:
        """Forget a page, of which another one has all tokens, unless somebody uses it."""
        if node.is_kept or (node.page is not None and self._pool.users(node.page) > 1):
            return
        if node.page is not None:
            self._pool.release([self._leave_pool(node)])
        if node.is_in_file and self._files:
            self._files.remove(node.key)
        self._forget(node)

    def _evict_from(self, node: PageNode, pages: int) -> None:
        """Move a page to the host, and those before it that nothing else hangs on, until so many are free."""
        current: PageNode | None = node
        while current and current.page is not None and self._pool.free < pages:
            if current.is_before_others or self._pool.users(current.page) > 1:
                return
            if not current.is_in_file and (self._most_bytes or self._files or current.is_kept):
                self._enter_host(current, self._read(current))
            self._pool.release([self._leave_pool(current)])
            if not current.is_there:
                self._forget(current)
            current = current.parent

    def _make_room_on_host(self) -> None:
        """Write pages to files, or forget them, until those on the host are small enough."""
        for node in list(self._on_host) if self._bytes > self._most_bytes else ():
            if node.is_kept or (node.children and not self._files):
                continue
            self._write(node)
            self._leave_host(node)
            if not node.is_there:
                self._forget(node)
            if self._bytes <= self._most_bytes:
                return

    def _write(self, node: PageNode) -> None:
        """Write a page to its file, if there are files."""
        if self._files is None or node.is_in_file or node.rows is None:
            return
        assert node.parent is not None
        try:
            self._files.write(node.key, node.parent.key, node.identities, node.rows)
            node.is_in_file = True
        except UserError as error:
            log.warning("%s", error)
            self._files = None

    def _read(self, node: PageNode) -> Rows:
        """What a page holds; zeros behind its tokens."""
        if node.rows is not None:
            return node.rows
        rows = self.session.read(np.array([node.page], np.int32))
        for array in rows.values():
            array[:, :, len(node.identities) :] = 0
        return rows

    def _rows_of(self, node: PageNode) -> Rows | None:
        """Of a page that is on the host or in a file; None: it is there no more."""
        if node.rows is None and node.is_in_file and self._files:
            if rows := self._files.read(node.key):
                return rows
            self._forget(node)
        return node.rows

    def _enter_pool(self, node: PageNode, page: int) -> None:
        node.page = page
        self._pool.share([page])
        self._in_pool[node] = None
        self._by_page[page] = node
        self._leave_host(node)

    def _leave_pool(self, node: PageNode) -> int:
        """Returns the page, of which the tree is a user still."""
        assert node.page is not None
        page, node.page = node.page, None
        del self._in_pool[node]
        del self._by_page[page]
        return page

    def _enter_host(self, node: PageNode, rows: Rows) -> None:
        node.rows = rows
        self._on_host[node] = None
        self._bytes += _nbytes(rows)

    def _leave_host(self, node: PageNode) -> None:
        if node.rows is not None:
            self._bytes -= _nbytes(node.rows)
            node.rows = None
            del self._on_host[node]

    def _forget(self, node: PageNode) -> None:
        """Know no more of a page that is in the pool no more, and of those behind it."""
        assert node.parent is not None
        node.parent.children.pop(node.identities.tobytes(), None)
        lost = [node]
        for each in lost:
            lost += each.children.values()
            self._leave_host(each)
            each.is_in_file = False

    def _path(self, identities: np.ndarray) -> Iterator[PageNode]:
        """The full pages that a sequence begins with."""
        node = self._root
        for start in range(0, len(identities) - PAGE_SLOTS + 1, PAGE_SLOTS):
            child = node.children.get(identities[start : start + PAGE_SLOTS].tobytes())
            if child is None:
                return
            yield child
            node = child

    def _touch(self, path: list[PageNode]) -> None:
        """Note a use, of parents after their children: those are given up before."""
        for node in reversed(path):
            for order in (self._in_pool, self._on_host):
                if node in order:
                    order.move_to_end(node)


def _nbytes(rows: Rows) -> int:
    return sum(array.nbytes for array in rows.values())

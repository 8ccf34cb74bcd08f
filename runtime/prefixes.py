"""What is kept of sequences that have ended, for later ones that begin the same: pages of the pool, in a tree."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Iterator

import numpy as np

from pascalvl.plugins.kv_format import PAGE_SLOTS
from pascalvl.runtime.kv_cache import common_length
from pascalvl.runtime.kv_pool import PagePool


@dataclasses.dataclass(frozen=True)
class Match:
    """What is there of a sequence's first tokens."""

    pages: list[int]
    """Full ones, in order."""
    rest: int = 0
    """Tokens of one more page that are the sequence's next ..."""
    page: int | None = None
    """... and that page: to be copied, for others may use it or its later slots, unless `PrefixTree.claim` gives it."""

    @property
    def tokens(self) -> int:
        """Of the sequence, that need not be computed."""
        return len(self.pages) * PAGE_SLOTS + self.rest


class _Node:
    """A page, behind those of its parents."""

    __slots__ = ("children", "identities", "page", "parent")

    def __init__(self, parent: _Node | None, identities: np.ndarray, page: int) -> None:
        self.parent, self.identities, self.page = parent, identities, page
        self.children: dict[bytes, _Node] = {}

    @property
    def is_full(self) -> bool:
        return len(self.identities) == PAGE_SLOTS


class PrefixTree:
    """Pages by what they hold: a node is a page of up to `PAGE_SLOTS` tokens, its parents those before it.

    The tree is one user of each of its pages. Those that nobody else uses are given up when pages are wanted, the ones
    first that were not asked for the longest; never a page before those behind it.
    """

    def __init__(self, pool: PagePool) -> None:
        self._pool = pool
        self._root = _Node(None, np.zeros(0, np.int64), -1)
        self._nodes: OrderedDict[_Node, None] = OrderedDict()  # the least recently used first
        self._by_page: dict[int, _Node] = {}

    def __len__(self) -> int:
        """Pages that are kept."""
        return len(self._nodes)

    def match(self, identities: np.ndarray) -> Match:
        """What is kept of the beginning of a sequence, int64 ``[n]``; of no page a user is added."""
        path = list(self._path(identities))
        node = path[-1] if path else self._root
        self._touch(path)
        rest = identities[len(path) * PAGE_SLOTS :]
        best, longest = None, 0
        for child in node.children.values():
            if (common := common_length(child.identities, rest)) > longest:
                best, longest = child, common
        pages = [each.page for each in path]
        if best is None:
            return Match(pages)
        self._touch([*path, best])
        return Match(pages, longest, best.page)

    def claim(self, page: int, tokens: int, cut: bool = False) -> bool:
        """Hand over a page, if nobody else uses it and nothing is kept behind it: its sequence goes on there after so
        many tokens, and the tree's use of it becomes the caller's. Returns whether it did.

        Args:
            page: that a `Match` ends in.
            tokens: that the sequence has of it.
            cut: take it even if it holds others behind these, which are forgotten.
        """
        node = self._by_page[page]
        if node.children or self._pool.users(page) > 1 or not (cut or len(node.identities) == tokens):
            return False
        self._forget(node)
        return True

    def insert(self, identities: np.ndarray, pages: list[int]) -> None:
        """Keep pages of a sequence, whose tokens are ``identities``; what is there already stays as it is."""
        node, path = self._root, []
        for number, page in enumerate(pages):
            part = identities[number * PAGE_SLOTS : (number + 1) * PAGE_SLOTS]
            if not len(part):
                break
            child = node.children.get(part.tobytes())
            if child is None:
                child = node.children[part.tobytes()] = _Node(node, part.copy(), page)
                self._pool.share([page])
                self._nodes[child] = None
                self._by_page[page] = child
            path.append(child)
            node = child
        self._touch(path)

    def make_room(self, pages: int) -> bool:
        """Give up pages until so many are free; returns whether they are."""
        for node in list(self._nodes) if self._pool.free < pages else ():
            if not node.children and self._pool.users(node.page) == 1:
                self._drop_from(node, pages)
                if self._pool.free >= pages:
                    break
        return self._pool.free >= pages

    def recover(self) -> list[int]:
        """Go on from whatever an interrupt has left; returns the pages that are kept."""
        found, pages = [self._root], []
        for node in found:
            found += node.children.values()
        there = set(found[1:])
        for node in [node for node in self._nodes if node not in there]:
            del self._nodes[node]
        for node in found[1:]:
            self._nodes.setdefault(node)
            pages.append(node.page)
        self._by_page = {node.page: node for node in found[1:]}
        return pages

    def clear(self) -> None:
        """Keep nothing."""
        self._pool.release(node.page for node in self._nodes)
        self._nodes.clear()
        self._by_page.clear()
        self._root.children.clear()

    def _drop_from(self, node: _Node, pages: int) -> None:
        """Give up a page, and those before it that nothing else hangs on, until so many are free."""
        while self._pool.free < pages:
            self._forget(node)
            self._pool.release([node.page])
            parent = node.parent
            if parent is None or parent is self._root or parent.children or self._pool.users(parent.page) > 1:
                return
            node = parent

    def _forget(self, node: _Node) -> None:
        assert node.parent is not None
        del node.parent.children[node.identities.tobytes()]
        del self._nodes[node]
        del self._by_page[node.page]

    def _path(self, identities: np.ndarray) -> Iterator[_Node]:
        """The full pages that a sequence begins with."""
        node = self._root
        for start in range(0, len(identities) - PAGE_SLOTS + 1, PAGE_SLOTS):
            child = node.children.get(identities[start : start + PAGE_SLOTS].tobytes())
            if child is None:
                return
            yield child
            node = child

    def _touch(self, path: list[_Node]) -> None:
        """Note a use, of parents after their children: those are given up before."""
        for node in reversed(path):
            self._nodes.move_to_end(node)

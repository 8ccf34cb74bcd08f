"""Who uses which pages of a session's pool."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


class PagePool:
    """Counts the users of pages: sequences at work, and what is kept of those that have ended.

    Args:
        pages: of the session.
    """

    def __init__(self, pages: int) -> None:
        self._users = [0] * pages
        self._free = list(range(pages - 1, -1, -1))

    def __len__(self) -> int:
        return len(self._users)

    @property
    def free(self) -> int:
        """Pages that nobody uses."""
        return len(self._free)

    @property
    def used(self) -> list[int]:
        """Pages that somebody uses."""
        return [page for page, users in enumerate(self._users) if users]

    def users(self, page: int) -> int:
        """Of a page."""
        return self._users[page]

    def take(self, count: int) -> list[int]:
        """Pages that nobody used, with one user from now on; raises `ValueError` where there are not so many."""
        if count > len(self._free):
            raise ValueError(f"{count} pages are wanted, and {len(self._free)} are free")
        taken = [self._free.pop() for _ in range(count)]
        for page in taken:
            self._users[page] = 1
        return taken

    def share(self, pages: Sequence[int]) -> None:
        """Add a user to pages that have one already; raises `ValueError` for one that has none."""
        for page in pages:
            if not self._users[page]:
                raise ValueError(f"nobody uses page {page}")
            self._users[page] += 1

    def recount(self, users: Iterable[Iterable[int]]) -> None:
        """Begin anew with these users, each with its pages."""
        self._users = [0] * len(self._users)
        for pages in users:
            for page in pages:
                self._users[page] += 1
        self._free = [page for page, count in enumerate(self._users) if not count]

    def release(self, pages: Iterable[int]) -> None:
        """Take a user from pages; raises `ValueError` for one that has none."""
        for page in pages:
            if not self._users[page]:
                raise ValueError(f"nobody uses page {page}")
            self._users[page] -= 1
            if not self._users[page]:
                self._free.append(page)

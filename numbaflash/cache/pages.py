"""Pages of keys and values in host memory: reference-counted, so that forks share what neither of them changes.

A page holds `page_size` tokens of one layer, head by head: keys (kv_heads, page_size, head_dim), then values alike. One
head's stretch of a page is contiguous, which is the order in which a decode kernel reads it. What a page of codes holds
instead is said in `page_format.py`.
"""

from __future__ import annotations

import math
import threading
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["PagePool", "PageTable"]

# A cache line, and the widest vector load.
_ALIGNMENT = 64


class PagePool:
    """The pages of a cache and of all its forks.

    Memory is taken when a page is first used and given back when its last owner releases it. The counts are guarded by
    a lock, so forks may be used from different threads.

    Args:
        shape: Of a page: (2, kv_heads, page_size, head_dim), keys then values, or (bytes,) of codes.
        dtype: Storage dtype.
    """

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self.shape = shape
        self.dtype = dtype
        self.page_nbytes = math.prod(shape) * dtype.itemsize
        self._memory: dict[int, NDArray[Any]] = {}
        self._owners: dict[int, int] = {}
        self._next_page = 0
        # Re-entrant: a garbage collection inside the lock may release the pages of a dead cache.
        self._lock = threading.RLock()

    def acquire(self) -> int:
        """Return a new page with one owner, all zeros: memory that another cache gave back shows nothing of it."""
        memory = _aligned_zeros(self.shape, self.dtype)
        with self._lock:
            page = self._next_page
            self._next_page += 1
            self._memory[page] = memory
            self._owners[page] = 1
        return page

    def share(self, page: int) -> None:
        """Add an owner."""
        with self._lock:
            self._owners[page] += 1

    def release(self, page: int) -> None:
        """Take an owner away; the last one frees the page."""
        with self._lock:
            self._owners[page] -= 1
            if not self._owners[page]:
                del self._owners[page], self._memory[page]

    def is_shared(self, page: int) -> bool:
        """Say whether the page has more than one owner, so that a write to it must copy it first."""
        with self._lock:
            return self._owners[page] > 1

    def content(self, page: int) -> NDArray[Any]:
        """Return the page itself."""
        return self._memory[page]

    def address(self, page: int) -> int:
        """Return the address of the page."""
        return int(self._memory[page].ctypes.data)

    @property
    def nbytes(self) -> int:
        """Bytes of all pages that have an owner."""
        with self._lock:
            return len(self._memory) * self.page_nbytes

    @property
    def taken_nbytes(self) -> int:
        """Bytes of memory that it holds."""
        return self.nbytes


class PageTable:
    """Which page lies in which slot, for one of the owners of a pool's pages.

    Args:
        pool: Whose pages.
        slots: Length of the table; all are empty at first.

    Attributes:
        pool: Whose pages.
        addresses: (slots,) int64: of the pages, for compiled functions; it stays where it is.
    """

    def __init__(self, pool: PagePool, slots: int) -> None:
        self.pool = pool
        self.addresses = np.zeros(slots, np.int64)
        self._pages: list[int | None] = [None] * slots

    def __getitem__(self, slot: int) -> int | None:
        return self._pages[slot]

    def __setitem__(self, slot: int, page: int) -> None:
        """Put a page there, which now belongs to the table, and give back the one before.

        In this order Ctrl-C may come in between: a page is lost then until the pool goes, and none is used that is not
        the table's. The same page may be put there again.
        """
        before = self._pages[slot]
        self.addresses[slot] = self.pool.address(page)
        self._pages[slot] = page
        if before is not None and before != page:
            self.pool.release(before)

    def content(self, slot: int) -> NDArray[Any]:
        """Return the page of a slot that has one."""
        return self.pool.content(self._page(slot))

    def read(self, slot: int) -> NDArray[Any]:
        """Return a copy of the page of a slot that has one."""
        return self.content(slot).copy()

    def fill(self, slot: int, content: NDArray[Any]) -> None:
        """Put a new page there, with this content.

        Raises:
            MemoryError: There are no more pages; nothing has changed.
        """
        page = self.pool.acquire()
        self.pool.content(page)[:] = content
        self[slot] = page

    def fork(self) -> PageTable:
        """Return a twin that shares all pages."""
        twin = PageTable(self.pool, len(self._pages))
        twin._pages = list(self._pages)
        twin.addresses[:] = self.addresses
        for page in self._used():
            self.pool.share(page)
        return twin

    def release(self) -> None:
        """Give all pages back."""
        for page in self._used():
            self.pool.release(page)
        self._pages = [None] * len(self._pages)

    @property
    def nbytes(self) -> int:
        """Bytes of the pages."""
        return len(self._used()) * self.pool.page_nbytes

    def _page(self, slot: int) -> int:
        page = self._pages[slot]
        if page is None:
            raise LookupError(f"slot {slot} has no page")
        return page

    def _used(self) -> list[int]:
        return [page for page in self._pages if page is not None]


def _aligned_zeros(shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    nbytes = math.prod(shape) * dtype.itemsize
    raw = np.zeros(nbytes + _ALIGNMENT, np.uint8)
    offset = -raw.ctypes.data % _ALIGNMENT
    return raw[offset : offset + nbytes].view(dtype).reshape(shape)

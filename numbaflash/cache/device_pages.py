"""Pages in device memory: reference-counted, out of few large allocations.

A page goes by its address, a multiple of 256. Its content is `numbaflash.cuda.paged.PagedLayer`'s.
"""

from __future__ import annotations

import threading
from typing import Any

import numpy as np

from ..cuda.device import Buffer, Device, Event, Stream

__all__ = ["DevicePagePool"]

_ALIGNMENT = 256


class DevicePagePool:
    """The pages of a cache and of all its forks, on one device.

    Memory is taken in slabs, each as large as all before together, and given back when nothing refers to the pool any
    more. What streams queue on its pages is ordered: `begin` waits for what `end` has marked.

    Args:
        device: Where.
        page_nbytes: Bytes of a page.
        dtype: Of what they hold.
    """

    def __init__(self, device: Device, page_nbytes: int, dtype: np.dtype[Any]) -> None:
        self.device = device
        self.page_nbytes = page_nbytes
        self.dtype = dtype
        self._stride = -(-page_nbytes // _ALIGNMENT) * _ALIGNMENT
        self._expected = 0
        self._pages = 0
        self._slabs: list[Buffer] = []
        self._free: list[int] = []
        self._owners: dict[int, int] = {}
        self._last: Event | None = None
        # Re-entrant: a garbage collection inside the lock may release the pages of a dead cache.
        self._lock = threading.RLock()

    def expect(self, pages: int) -> None:
        """Say how many pages a cache may come to use (less than 0: no longer); slabs are not larger than that takes."""
        with self._lock:
            self._expected += pages

    def begin(self, stream: Stream) -> None:
        """Let a stream wait for the work on the pages that other streams have been given."""
        with self._lock:
            if self._last is not None:
                stream.wait(self._last)

    def end(self, stream: Stream) -> None:
        """Mark the work that a stream has been given."""
        with self._lock:
            self._last = stream.record()

    def acquire(self, count: int, stream: Stream) -> list[int]:
        """Return new pages with one owner each, all zeros in the order of `stream`.

        Raises:
            MemoryError: The device has not that much; nothing has changed.
        """
        with self._lock:
            missing = count - len(self._free)
            if missing > 0:
                self._grow(missing, stream)
            pages = [self._free.pop() for _ in range(count)]
            for page in pages:
                self.device.fill(page, self.page_nbytes, 0, stream)
                self._owners[page] = 1
            return pages

    def share(self, page: int) -> None:
        """Add an owner."""
        with self._lock:
            self._owners[page] += 1

    def release(self, page: int) -> None:
        """Take an owner away; the last one frees the page."""
        with self._lock:
            self._owners[page] -= 1
            if not self._owners[page]:
                del self._owners[page]
                self._free.append(page)

    def is_shared(self, page: int) -> bool:
        """Say whether the page has more than one owner, so that a write to it must copy it first."""
        with self._lock:
            return self._owners[page] > 1

    @property
    def nbytes(self) -> int:
        """Bytes of all pages that have an owner."""
        with self._lock:
            return len(self._owners) * self.page_nbytes

    @property
    def reserved_nbytes(self) -> int:
        """Bytes that are taken from the device."""
        with self._lock:
            return self._pages * self._stride

    def _grow(self, missing: int, stream: Stream) -> None:
        count = max(missing, min(self._pages, self._expected - self._pages))
        default = self.device.default_stream
        slab = self.device.allocate(count * self._stride, default)
        stream.wait(default.record())
        self._slabs.append(slab)
        self._pages += count
        self._free += [slab.address + i * self._stride for i in reversed(range(count))]

    def __del__(self) -> None:
        # Slabs are freed in the order of the default stream: after what other streams still do with them.
        if self._last is not None and self._slabs:
            self.device.default_stream.wait(self._last)

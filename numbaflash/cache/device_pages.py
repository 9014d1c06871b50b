"""Pages in device memory: reference-counted, out of few large allocations.

A page goes by its address, a multiple of 256. Its content is `numbaflash.cuda.paged_sequences.PagedLayer`'s.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..cuda.device import Buffer, Device, Event, Stream
from ..cuda.solve import Queue

__all__ = ["DevicePagePool", "DevicePageTable", "all_used_by"]

_ALIGNMENT = 256


class DevicePagePool:
    """The pages of a cache and of all its forks, on one device.

    Memory is taken in slabs, each as large as all before together, and given back when nothing refers to the pool any
    more. Who uses its pages does so in `used_by`, one at a time.

    Args:
        device: Where.
        page_nbytes: Bytes of a page.
        dtype: Of what they hold.
        alone: Entered by who uses the device, where it may be used by one thread at a time.

    Attributes:
        stride: Bytes from one page to the next.
    """

    def __init__(
        self,
        device: Device,
        page_nbytes: int,
        dtype: np.dtype[Any],
        alone: AbstractContextManager[Any] | None = None,
    ) -> None:
        self.device = device
        self.alone = nullcontext() if alone is None else alone
        self.page_nbytes = page_nbytes
        self.dtype = dtype
        self.stride = -(-page_nbytes // _ALIGNMENT) * _ALIGNMENT
        self._expected = 0
        self._pages = 0
        self._slabs: list[Buffer] = []
        self._free: list[int] = []
        self._owners: dict[int, int] = {}
        self._last: Event | None = None
        # Re-entrant: a garbage collection inside the lock may release the pages of a dead cache.
        self._lock = threading.RLock()
        self._users = threading.RLock()

    def expect(self, pages: int) -> None:
        """Say how many pages a cache may come to use (less than 0: no longer); slabs are not larger than that takes."""
        with self._lock:
            self._expected += pages

    def used_by(self, stream: Stream) -> AbstractContextManager[None]:
        """Let a stream be given work on the pages, in order behind what other streams were given before."""
        return all_used_by(stream, [self])

    def order(self, stream: Stream) -> None:
        """Let a stream wait for the work on the pages that others have been given."""
        if self._last is not None:
            stream.wait(self._last)

    def acquire(self, count: int, stream: Stream) -> list[int]:
        """Return new pages with one owner each, all zeros in the order of `stream`.

        Raises:
            MemoryError: The device has not that much; nothing has changed.
        """
        with self._lock:
            missing = count - len(self._free)
            if missing > 0:
                self._grow(missing, stream)
            pages = self._free[len(self._free) - count :]
            for page in pages:
                self.device.fill(page, self.page_nbytes, 0, stream)
            del self._free[len(self._free) - count :]
            self._owners |= dict.fromkeys(pages, 1)
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
    def taken_nbytes(self) -> int:
        """Bytes that are taken from the device."""
        with self._lock:
            return self._pages * self.stride

    def _grow(self, missing: int, stream: Stream) -> None:
        count = max(missing, min(self._pages, self._expected - self._pages))
        default = self.device.default_stream
        try:
            slab = self.device.allocate(count * self.stride, default)
        except MemoryError:
            if count == missing:
                raise
            count = missing
            slab = self.device.allocate(count * self.stride, default)
        stream.wait(default.record())
        self._slabs.append(slab)
        self._pages += count
        self._free += [slab.address + i * self.stride for i in reversed(range(count))]

    def __del__(self) -> None:
        # Slabs are freed in the order of the default stream: after what other streams still do with them.
        if self._slabs:
            with self.device.current():
                self.order(self.device.default_stream)


class DevicePageTable:
    """Which page lies in which slot, for one of the owners of a pool's pages; and the same in device memory.

    Args:
        pool: Whose pages.
        slots: Length of the table; all are empty at first.

    Attributes:
        pool: Whose pages.
    """

    def __init__(self, pool: DevicePagePool, slots: int) -> None:
        self.pool = pool
        self._pages = np.zeros(slots, np.int64)  # addresses; 0: none
        with pool.alone, pool.device.current():
            self._buffer = pool.device.allocate(self._pages.nbytes)
            self._allocated: Event | None = pool.device.default_stream.record()
        self._stale = True  # what the device has is not `_pages`
        pool.expect(slots)

    def __getitem__(self, slot: int) -> int:
        """Return the page of a slot; 0 where there is none."""
        return int(self._pages[slot])

    def __setitem__(self, slot: int, page: int) -> None:
        """Put a page there; who did so cares for its owners, and for those of the one before."""
        self._pages[slot] = page
        self._stale = True

    def placed(self, queue: Queue) -> int:
        """Return the address of the table as kernels that are queued now will see it."""
        if self._allocated is not None:
            queue.stream.wait(self._allocated)
            self._allocated = None
        if self._stale:
            queue.device.copy_in(self._buffer.address, self._pages, queue.stream)
            self._stale = False
        return self._buffer.address

    def fork(self) -> DevicePageTable:
        """Return a twin that shares all pages."""
        twin = DevicePageTable(self.pool, len(self._pages))
        for page in self._used():
            self.pool.share(page)
        twin._pages[:] = self._pages
        return twin

    def release(self) -> None:
        """Give all pages back."""
        for page in self._used():
            self.pool.release(page)
        self._pages[:] = 0
        with self.pool.device.current():  # the table is freed in the order of the default stream
            self.pool.order(self.pool.device.default_stream)
            self._buffer.close()
        self.pool.expect(-len(self._pages))

    def read(self, slot: int) -> NDArray[np.uint8]:
        """Return a copy of the page of a slot that has one."""
        device, content = self.pool.device, np.empty(self.pool.page_nbytes, np.uint8)
        with self.pool.used_by(device.default_stream):
            device.copy_out(content, self[slot], device.default_stream)
        return content

    def fill(self, slot: int, content: NDArray[np.uint8]) -> None:
        """Put a new page in an empty slot, with this content.

        Raises:
            MemoryError: There are no more pages; nothing has changed.
        """
        stream = self.pool.device.default_stream
        with self.pool.used_by(stream):
            (page,) = self.pool.acquire(1, stream)
            self.pool.device.copy_in(page, content, stream)
        self[slot] = page

    @property
    def nbytes(self) -> int:
        """Bytes of the pages."""
        return len(self._used()) * self.pool.page_nbytes

    def _used(self) -> list[int]:
        return [int(page) for page in self._pages if page]


@contextmanager
def all_used_by(stream: Stream, pools: Sequence[DevicePagePool]) -> Iterator[None]:
    """Let a stream be given work on the pages of several pools, each of which may be named more than once.

    Pools that are used together are waited for by one event: 64 would cost a step of decode 128 calls of the driver.
    """
    # In one order whoever asks, so that no two wait for each other.
    alike = sorted(dict.fromkeys(pools), key=id)
    with ExitStack() as stack:
        for pool in alike:
            stack.enter_context(pool._users)
        for alone in dict.fromkeys(pool.alone for pool in alike):
            stack.enter_context(alone)
        for device in dict.fromkeys(pool.device for pool in alike):
            stack.enter_context(device.current())
        for last in dict.fromkeys(pool._last for pool in alike):
            if last is not None:
                stream.wait(last)
        try:
            yield
        finally:
            if alike:
                last = stream.record()
                for pool in alike:
                    pool._last = last

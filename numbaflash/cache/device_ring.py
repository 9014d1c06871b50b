"""A layer's ring of tokens in device memory: its page table, which kernels read, and the host's account of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..cuda import paged
from ..cuda.device import Event
from ..cuda.paged import PagedLayer, PagedSequence
from ..cuda.solve import Queue
from .device_pages import DevicePagePool
from .layer import Layer
from .layout import RingLayout

__all__ = ["DeviceLayer", "DeviceRing", "changing"]


class _Change(NamedTuple):
    slot: int
    new: int
    old: int


class DeviceRing:
    """The tokens of one layer.

    New tokens come in three moves: `prepare` sees that the slots they go to have pages of their own, kernels write, and
    `commit` or `discard` says whether that has come about. Until then nothing that was there is lost.

    Args:
        layout: Which tokens are kept, and where.
        pool: Where pages come from.
        kind: What its pages hold.

    Attributes:
        length: Tokens seen.
        intact: Oldest position, sink tokens apart, that has not been overwritten.
        kind: What its pages hold.
    """

    def __init__(self, layout: RingLayout, pool: DevicePagePool, kind: PagedLayer) -> None:
        self.length = 0
        self.intact = layout.sink_tokens
        self.kind = kind
        self.pool = pool
        self._layout = layout
        self._pages = np.zeros(layout.slots, np.int64)  # addresses; 0: none
        self._changes: list[_Change] = []
        with pool.alone, pool.device.current():
            self._table = pool.device.allocate(self._pages.nbytes)
            self._allocated: Event | None = pool.device.default_stream.record()
        self._stale = True  # what the device has is not `_pages`
        pool.expect(layout.slots)

    def fork(self) -> DeviceRing:
        """Return a twin that shares all pages."""
        twin = DeviceRing(self._layout, self.pool, self.kind)
        twin.length, twin.intact = self.length, self.intact
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
            self._table.close()
        self.pool.expect(-self._layout.slots)

    @property
    def nbytes(self) -> int:
        """Bytes of the pages in use."""
        return len(self._used()) * self.pool.page_nbytes

    def sequence(self, start: int, queue: Queue) -> PagedSequence:
        """Return the ring as kernels that are queued now will see it, for queries from `start` on."""
        if self._allocated is not None:
            queue.stream.wait(self._allocated)
            self._allocated = None
        if self._stale:
            queue.device.copy_in(self._table.address, self._pages, queue.stream)
            self._stale = False
        return PagedSequence(self._table.address, self._layout, self.length, start)

    def prepare(self, tokens: int, queue: Queue) -> None:
        """See that every slot that the next tokens go to has a page which nobody else sees.

        Raises:
            MemoryError: There are no more pages; nothing has changed.
        """
        slots = [
            slot
            for slot in dict.fromkeys(self._slots_of_next(tokens))
            if not self._pages[slot] or self.pool.is_shared(int(self._pages[slot]))
        ]
        if not slots:
            return
        pages = self.pool.acquire(len(slots), queue.stream)
        self._changes = [_Change(slot, new, int(self._pages[slot])) for slot, new in zip(slots, pages, strict=True)]
        for change in self._changes:
            self._pages[change.slot] = change.new
            if change.old:
                queue.device.copy(change.new, change.old, self.pool.page_nbytes, queue.stream)
        self._stale = True

    def overwrite(self, tokens: int) -> None:
        """The kernel that writes the next tokens is queued: those that they fall on are lost, whatever comes."""
        self.intact = max(self.intact, self.length + tokens - self._layout.ring_tokens)

    def commit(self, tokens: int) -> None:
        """The tokens that `prepare` was told of are there."""
        for change in self._changes:
            if change.old:
                self.pool.release(change.old)
        self._changes = []
        self.overwrite(tokens)
        self.length += tokens

    def discard(self) -> None:
        """They are not: the ring is as before `prepare`."""
        for change in self._changes:
            self._pages[change.slot] = change.old
            self.pool.release(change.new)
            self._stale = True
        self._changes = []

    def write(self, keys: NDArray[Any], values: NDArray[Any]) -> None:
        """Append tokens, (T, Hkv, D) each, of any float dtype."""
        queue = Queue(self.pool.device, self.pool.device.default_stream)
        with self.pool.used_by(queue.stream), changing([self], len(keys), queue):
            sequence = self.sequence(self.length, queue)
            paged.step(queue, self.kind, [sequence], None, keys[None], values[None], None, None)

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Return copies of the tokens `start` to `stop`, all sink tokens or none: (2, tokens, Hkv, D)."""
        kind, size, device = self.kind, self._layout.page_size, self.pool.device
        tokens = np.empty((2, stop - start, kind.kv_heads, kind.head_dim), kind.dtype)
        page = np.empty((2, kind.kv_heads, size, paged.padded(kind.head_dim)), kind.dtype)
        with self.pool.used_by(device.default_stream):
            at = start
            while at < stop:
                behind = at if at < self._layout.sink_tokens else at - self._layout.sink_tokens
                count = min(size - behind % size, stop - at)
                (slot,) = self._layout.slots_between(at, at + 1)
                device.copy_out(page, int(self._pages[slot]), device.default_stream)
                rows = page[:, :, behind % size : behind % size + count, : kind.head_dim]
                tokens[:, at - start : at - start + count] = rows.swapaxes(1, 2)
                at += count
        return tokens

    def _slots_of_next(self, tokens: int) -> list[int]:
        start, stop, layout = self.length, self.length + tokens, self._layout
        sinks = layout.sink_tokens
        kept = max(start, stop - layout.ring_tokens, sinks)
        before = layout.slots_between(start, min(stop, sinks)) if start < sinks else []
        return before + (layout.slots_between(kept, stop) if stop > kept else [])

    def _used(self) -> list[int]:
        return [int(page) for page in self._pages if page]


@contextmanager
def changing(rings: Sequence[DeviceRing], tokens: int, queue: Queue) -> Iterator[None]:
    """Give rings the pages of new tokens; they have the tokens when the body succeeds, and are as before if not."""
    try:
        for ring in rings:
            ring.prepare(tokens, queue)
        yield
    except BaseException:
        for ring in rings:
            ring.discard()
        raise
    for ring in rings:
        ring.commit(tokens)


class DeviceLayer(Layer):
    """A layer whose tokens are all in a ring on a device."""

    ring: DeviceRing

    @property
    def intact(self) -> int:
        """Oldest position, sink tokens apart, that has not been overwritten."""
        return self.ring.intact

    @property
    def nbytes(self) -> int:
        """Bytes of the pages in use."""
        return self.ring.nbytes

    def fork(self) -> DeviceLayer:
        """Return a twin that shares all pages."""
        return DeviceLayer(self.index, self.layout, self.ring.fork())

    def release(self) -> None:
        """Give all pages back."""
        self.ring.release()

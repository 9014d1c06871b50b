"""A layer's ring of tokens in device memory: its page table, which kernels read, and the host's account of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from ..cuda import paged
from ..cuda.paged_sequences import PagedLayer, PagedSequence, padded
from ..cuda.solve import Queue
from ..device_arrays import AnyArray
from .device_pages import DevicePagePool, DevicePageTable
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
        table: Of its pages.
        kind: What they hold.

    Attributes:
        length: Tokens seen.
        intact: Oldest position, sink tokens apart, that has not been overwritten.
        kind: What its pages hold.
        pool: Where they come from.
    """

    def __init__(self, layout: RingLayout, table: DevicePageTable, kind: PagedLayer) -> None:
        self.length = 0
        self.intact = layout.sink_tokens
        self.kind = kind
        self.pool: DevicePagePool = table.pool
        self._layout = layout
        self._table = table
        self._changes: list[_Change] = []

    def fork(self) -> DeviceRing:
        """Return a twin that shares all pages."""
        twin = DeviceRing(self._layout, self._table.fork(), self.kind)
        twin.length, twin.intact = self.length, self.intact
        return twin

    def release(self) -> None:
        """Give all pages back."""
        self._table.release()

    @property
    def nbytes(self) -> int:
        """Bytes of the pages in use."""
        return self._table.nbytes

    def sequence(self, start: int, queue: Queue) -> PagedSequence:
        """Return the ring as kernels that are queued now will see it, for queries from `start` on."""
        return PagedSequence(self._table.placed(queue), self._layout, self.length, start)

    def prepare(self, tokens: int, queue: Queue) -> None:
        """See that every slot that the next tokens go to has a page which nobody else sees.

        Raises:
            MemoryError: There are no more pages; nothing has changed.
        """
        slots = [
            slot
            for slot in dict.fromkeys(self._slots_of_next(tokens))
            if not self._table[slot] or self.pool.is_shared(self._table[slot])
        ]
        if not slots:
            return
        pages = self.pool.acquire(len(slots), queue.stream)
        self._changes = [_Change(slot, new, self._table[slot]) for slot, new in zip(slots, pages, strict=True)]
        for change in self._changes:
            self._table[change.slot] = change.new
            if change.old:
                queue.device.copy(change.new, change.old, self.pool.page_nbytes, queue.stream)

    def overwrite(self, tokens: int) -> None:
        """The kernel that writes the next tokens is queued: those that they fall on are lost, whatever comes."""
        self.intact = max(self.intact, self.length + tokens - self._layout.ring_tokens)

    def commit(self, tokens: int) -> None:
        """The tokens that `prepare` was told of are there; Ctrl-C in between loses pages until the pool goes."""
        changes, self._changes = self._changes, []
        self.overwrite(tokens)
        self.length += tokens
        for change in changes:
            if change.old:
                self.pool.release(change.old)

    def discard(self) -> None:
        """They are not: the ring is as before `prepare`."""
        for change in self._changes:
            self._table[change.slot] = change.old
            self.pool.release(change.new)
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
        page = np.empty((2, kind.kv_heads, size, padded(kind.head_dim)), kind.dtype)
        with self.pool.used_by(device.default_stream):
            at = start
            while at < stop:
                behind = at if at < self._layout.sink_tokens else at - self._layout.sink_tokens
                count = min(size - behind % size, stop - at)
                (slot,) = self._layout.slots_between(at, at + 1)
                device.copy_out(page, self._table[slot], device.default_stream)
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


class _Changing(Protocol):
    """What has part in a change: it is made whole, or not at all."""

    def prepare(self, tokens: int, queue: Queue) -> None:
        """See that all is there that so many new tokens take.

        Raises:
            MemoryError: There are no more pages; nothing has changed.
        """

    def commit(self, tokens: int) -> None:
        """The tokens are there; it cannot fail."""

    def discard(self) -> None:
        """They are not, and all is as before `prepare`, which need not have been called."""


@contextmanager
def changing(parts: Sequence[_Changing], tokens: int, queue: Queue) -> Iterator[None]:
    """Give rings or layers the pages of new tokens; they have those if the body succeeds, and are as before if not."""
    try:
        for part in parts:
            part.prepare(tokens, queue)
        yield
    except BaseException:
        for part in parts:
            part.discard()
        raise
    for part in parts:
        part.commit(tokens)


class DeviceLayer(Layer):
    """A layer whose tokens are all in a ring on a device."""

    ring: DeviceRing

    @property
    def pools(self) -> list[DevicePagePool]:
        """Where its pages come from."""
        return [self.ring.pool]

    @classmethod
    def receive(
        cls,
        layers: Sequence[Self],  # noqa: ARG003 - those of codes care for theirs
        k: AnyArray,
        v: AnyArray,
        queue: Queue,  # noqa: ARG003 - likewise
    ) -> tuple[AnyArray, AnyArray]:
        """Return new tokens, (N, T, Hkv, D), as N layers take them; they are to be prepared next.

        Raises:
            ValueError: Some cannot be stored; no layer has changed.
        """
        return k, v

    @classmethod
    def fold_queries(
        cls,
        layers: Sequence[Self],  # noqa: ARG003 - those of codes have scales to fold
        q: AnyArray,
        queue: Queue,  # noqa: ARG003 - likewise
    ) -> AnyArray:
        """Return queries, (N, T, Hq, D), as they are to meet the keys of N layers."""
        return q

    def check_next(self) -> None:
        """See that everything is there that the next token sees.

        Raises:
            RuntimeError: A step that failed when its tokens were written already has overwritten some of it.
        """
        try:
            self.check_queries(self.length)
        except ValueError:
            raise RuntimeError(
                f"layer {self.index} has lost tokens of its window to a step that failed on the device"
            ) from None

    def sequence(self, start: int, queue: Queue) -> PagedSequence:
        """Return the layer as kernels that are queued now will see it, for queries from `start` on."""
        return self.ring.sequence(start, queue)

    def prepare(self, tokens: int, queue: Queue) -> None:
        """See that there are pages for the tokens received."""
        self.ring.prepare(tokens, queue)

    def commit(self, tokens: int) -> None:
        """The tokens are there."""
        self.ring.commit(tokens)

    def discard(self) -> None:
        """They are not."""
        self.ring.discard()

"""Shared memory: bounds, alignment, bytes that were never written or are still on their way, and races.

An access is stamped with its thread, the interval that the thread is in (`order` says which intervals happened before
which), and with whether its warp was converged: lanes of one converged warp run in step.
"""

# mypy: disable-error-code="no-any-return"
# Operators on NDArray[Any] are typed Any.

from __future__ import annotations

from typing import Any, NamedTuple

from numba import njit
from numpy.typing import NDArray

from .checks import (
    ALIGNMENT,
    BOUNDS,
    FRESH,
    IN_FLIGHT,
    OBSERVING,
    OK,
    OUTSIDE,
    PENDING,
    READ_AFTER_WRITE,
    READY,
    UNINITIALIZED,
    WEAK,
    WRITE_AFTER_READ,
    WRITE_AFTER_WRITE,
)
from .order import Clocks, ordered, ordered_after_some

Array = NDArray[Any]

# A stamp: interval << 16 | strong << 13 | several lanes << 12 | converged << 11 | thread; 0 is no access.
_CONVERGED, _SEVERAL, _STRONG = 1 << 11, 1 << 12, 1 << 13
_THREAD = (1 << 10) - 1
_INTERVAL = 16


class Shared(NamedTuple):
    """Shared memory of the blocks that run together, and its shadow.

    Attributes:
        data: Bytes; block b owns [b * stride, b * stride + limit).
        state: FRESH, READY, PENDING or OUTSIDE by granule.
        writer: Stamp of the last weak write by granule.
        strong_writer: Stamp of the last strong write since then. This, `other_writer` and `strong_reader` have no
            elements where the kernel has no strong accesses.
        other_writer: Stamp of a strong write by another warp that `strong_writer` need not come after.
        readers: (granules, slots) stamps of reads: the last of each warp, or in two slots the last of all and the last
            of another warp than that. Those two are enough where only barriers of the whole block order warps: of the
            readers since the last one, one is of another warp than whoever writes.
        strong_reader: Stamp of the last strong read by granule: it races with weak writes only.
        clocks: What happened before what.
        lowest: First address that exists.
        limit: First address that does not.
        stride: Bytes from one block to the next.
        lanes_per_block: Threads of a block, rounded up to whole warps.
        shift: log2 of the granule.
        initialized: Whether to report reads of FRESH bytes.
        races: Whether to report races.
    """

    data: Array
    state: Array
    writer: Array
    strong_writer: Array
    other_writer: Array
    readers: Array
    strong_reader: Array
    clocks: Clocks
    lowest: int
    limit: int
    stride: int
    lanes_per_block: int
    shift: int
    initialized: bool
    races: bool


@njit(cache=True)
def _settled(stamp: int, floor: int, thread: int, converged: bool) -> bool:
    """Whether an earlier access is ordered before one of `thread`, as far as is seen without its clock: nearly all."""
    if stamp >> _INTERVAL <= floor or stamp & (_THREAD | _SEVERAL) == thread:
        return True
    return converged and stamp & _CONVERGED != 0 and (stamp & _THREAD) >> 5 == thread >> 5


@njit(cache=True)
def _conflicts(clocks: Clocks, block: int, stamp: int, thread: int) -> bool:
    """Whether an earlier access that is not settled is not ordered before one that `thread` makes now."""
    other, interval = stamp & _THREAD, stamp >> _INTERVAL
    if other != thread:
        return not ordered(clocks, block, interval, other, thread, stamp & _STRONG != 0)
    return not ordered_after_some(clocks, block, interval, thread)


@njit(cache=True)
def _unordered(s: Shared, stamp: int, block: int, thread: int, floor: int, converged: bool) -> bool:
    """Whether an earlier access is not ordered before what `thread` does now."""
    return not _settled(stamp, floor, thread, converged) and _conflicts(s.clocks, block, stamp, thread)


@njit(cache=True)
def _racing_writer(s: Shared, granule: int, block: int, thread: int, floor: int, converged: bool, strong: bool) -> int:
    """Stamp of a write to a granule that races with what `thread` does now; 0 where there is none."""
    last = s.writer[granule]
    if _unordered(s, last, block, thread, floor, converged):
        return last
    if s.strong_writer.size > 0 and not strong:
        for last in (s.strong_writer[granule], s.other_writer[granule]):
            if _unordered(s, last, block, thread, floor, converged):
                return last
    return 0


@njit(cache=True)
def _racing_reader(s: Shared, granule: int, block: int, thread: int, floor: int, converged: bool, strong: bool) -> int:
    """The same for the reads of a granule, and a write now."""
    for slot in range(s.readers.shape[1]):
        last = s.readers[granule, slot]
        if _unordered(s, last, block, thread, floor, converged):
            return last
    if s.strong_reader.size > 0 and not strong:
        last = s.strong_reader[granule]
        if _unordered(s, last, block, thread, floor, converged):
            return last
    return 0


@njit(cache=True)
def _of_several_lanes(s: Shared, last: int, stamp: int, block: int) -> int:
    """The stamp of a read by a lane whose warp has read the granule already, in the same interval."""
    thread = stamp & _THREAD
    if last & (_THREAD | _SEVERAL) == thread or (s.clocks.mixed[0] and not _conflicts(s.clocks, block, last, thread)):
        return stamp
    return stamp & ~_CONVERGED | last & stamp & _CONVERGED | _SEVERAL


@njit(cache=True)
def _note_strong_write(s: Shared, granule: int, stamp: int, kind: int) -> None:
    """Stamps a strong write that races with nothing."""
    last = s.strong_writer[granule]
    if kind == OBSERVING or last == 0:
        s.other_writer[granule] = 0
    elif (last ^ stamp) & _THREAD >> 5 << 5:
        s.other_writer[granule] = last
    s.strong_writer[granule] = stamp


# In the loops below stands what nearly every access needs; a call that takes the tuple of arrays costs as much as the
# rest of an access.


@njit(cache=True)
def shared_read(
    s: Shared, lanes: Array, address: Array, converged: Array, size: int, strong: bool
) -> tuple[int, int, int]:
    """Checks one load from shared memory by all active lanes, and stamps it.

    A strong one (volatile, relaxed, acquire) does not race with atomics and strong stores.
    """
    own, floors = s.clocks.own, s.clocks.block_floor
    slot_by_warp = s.readers.shape[1] == s.lanes_per_block >> 5
    strong_ones = s.strong_writer.size > 0
    for i in range(lanes.size):
        at = address[i]
        if at < s.lowest or at + size > s.limit:
            return BOUNDS, i, -1
        if at & (size - 1):
            return ALIGNMENT, i, -1
        block = lanes[i] // s.lanes_per_block
        thread = lanes[i] - block * s.lanes_per_block
        warp, interval, floor = thread >> 5, own[block, thread], floors[block]
        stamp = interval << _INTERVAL | thread | (_CONVERGED if converged[i] else 0)
        slot = warp if slot_by_warp else 0
        first = block * s.stride + at >> s.shift
        for granule in range(first, first + max(size >> s.shift, 1)):
            state = s.state[granule]
            if state != READY:
                if state == PENDING:
                    return IN_FLIGHT, i, -1
                if state == OUTSIDE:
                    return BOUNDS, i, -1
                if s.initialized:
                    return UNINITIALIZED, i, -1
            if s.races:
                if (strong_ones and s.strong_writer[granule]) or not _settled(
                    s.writer[granule], floor, thread, converged[i]
                ):
                    racing = _racing_writer(s, granule, block, thread, floor, converged[i], strong)
                    if racing:
                        return READ_AFTER_WRITE, i, racing & _THREAD
                last = s.readers[granule, slot]
                if strong:
                    s.strong_reader[granule] = stamp | _STRONG
                elif last != stamp:
                    s.readers[granule, slot] = stamp
                    if last != 0 and (last & _THREAD) >> 5 != warp:
                        s.readers[granule, 1] = last
                    elif last >> _INTERVAL == interval:
                        s.readers[granule, slot] = _of_several_lanes(s, last, stamp, block)
    return OK, 0, 0


@njit(cache=True)
def shared_write(
    s: Shared,
    lanes: Array,
    address: Array,
    converged: Array,
    size: int,
    values: Array,
    state: int,
    kind: int,
) -> tuple[int, int, int]:
    """Checks one store to shared memory by all active lanes, stamps and does it.

    Args:
        s: The memory.
        lanes: Active lanes.
        address: Address of each.
        converged: Whether the warp of each is converged.
        size: Bytes of each.
        values: (n, size) bytes; (0, size) for an atomic, which is only checked.
        state: READY, or PENDING for a copy in flight.
        kind: WEAK, STRONG or OBSERVING; the latter two do not race with others of their kind.
    """
    own, floors = s.clocks.own, s.clocks.block_floor
    strong, strong_ones = kind != WEAK, s.strong_writer.size > 0
    for i in range(lanes.size):
        at = address[i]
        if at < s.lowest or at + size > s.limit:
            return BOUNDS, i, -1
        if at & (size - 1):
            return ALIGNMENT, i, -1
        block = lanes[i] // s.lanes_per_block
        thread = lanes[i] - block * s.lanes_per_block
        floor = floors[block]
        stamp = own[block, thread] << _INTERVAL | thread | (_CONVERGED if converged[i] else 0)
        if strong:
            stamp |= _STRONG
        start = block * s.stride + at
        first = start >> s.shift
        same = values.shape[0] > 0
        if same:
            for byte in range(size):
                same = same and s.data[start + byte] == values[i, byte]
        for granule in range(first, first + max(size >> s.shift, 1)):
            before = s.state[granule]
            if before == PENDING:
                return IN_FLIGHT, i, -1
            if before == OUTSIDE:
                return BOUNDS, i, -1
            if values.shape[0] == 0 and s.initialized and before == FRESH:
                return UNINITIALIZED, i, -1
            if s.races:
                if not same:
                    if (strong_ones and s.strong_writer[granule]) or not _settled(
                        s.writer[granule], floor, thread, converged[i]
                    ):
                        racing = _racing_writer(s, granule, block, thread, floor, converged[i], strong)
                        if racing:
                            return WRITE_AFTER_WRITE, i, racing & _THREAD
                    settled = not strong_ones or s.strong_reader[granule] == 0
                    for slot in range(s.readers.shape[1]):
                        settled = settled and _settled(s.readers[granule, slot], floor, thread, converged[i])
                    racing = 0 if settled else _racing_reader(s, granule, block, thread, floor, converged[i], strong)
                    if racing:
                        return WRITE_AFTER_READ, i, racing & _THREAD
                if strong:
                    _note_strong_write(s, granule, stamp, kind)
                else:
                    s.writer[granule] = stamp
                    if strong_ones:
                        s.strong_writer[granule] = s.other_writer[granule] = 0
            s.state[granule] = state
        if values.shape[0] > 0:
            for byte in range(size):
                s.data[start + byte] = values[i, byte]
    return OK, 0, 0


@njit(cache=True)
def complete_copy(s: Shared, lanes: Array, address: Array, converged: Array, size: int) -> None:
    """Makes the bytes of a finished asynchronous copy readable: written by the thread that waited for it."""
    own = s.clocks.own
    for i in range(lanes.size):
        block = lanes[i] // s.lanes_per_block
        thread = lanes[i] - block * s.lanes_per_block
        stamp = own[block, thread] << _INTERVAL | thread | (_CONVERGED if converged[i] else 0)
        first = block * s.stride + address[i] >> s.shift
        for granule in range(first, first + max(size >> s.shift, 1)):
            s.state[granule] = READY
            s.writer[granule] = stamp

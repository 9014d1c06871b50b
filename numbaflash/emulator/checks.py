"""What hardware does not check: bounds, alignment, uninitialised and in-flight bytes, races.

Compiled with Numba, one pass over the active lanes per memory instruction. Each function returns (code, lane position,
other party); the code is 0 or one of those in `FAULTS`.

Shadow state is kept per granule: as many bytes as the narrowest access of the kernel to that space. Accesses are
aligned, so each covers whole granules.

An access to shared memory is stamped with its thread, the interval that the thread is in (`order` says which intervals
happened before which), and with whether its warp was converged: lanes of one converged warp run in step. One to global
memory is stamped with its block, and where the kernel has fences with the interval of the block (`grid_order`).
"""

# mypy: disable-error-code="no-any-return"
# Operators on NDArray[Any] are typed Any.

from __future__ import annotations

from typing import Any, NamedTuple

from numba import njit
from numpy.typing import NDArray

from .grid_order import GridClocks, ordered_blocks
from .order import Clocks, ordered, ordered_after_some

Array = NDArray[Any]

OK, BOUNDS, ALIGNMENT, UNINITIALIZED, IN_FLIGHT, READ_AFTER_WRITE, WRITE_AFTER_WRITE, WRITE_AFTER_READ = range(8)
FAULTS = {
    BOUNDS: "bounds",
    ALIGNMENT: "alignment",
    UNINITIALIZED: "uninitialized",
    IN_FLIGHT: "in-flight",
    READ_AFTER_WRITE: "race",
    WRITE_AFTER_WRITE: "race",
    WRITE_AFTER_READ: "race",
}

# States of a granule of shared or local memory.
FRESH, READY, PENDING = 0, 1, 2

# A stamp: interval << 16 | atomic << 13 | several lanes << 12 | converged << 11 | thread; 0 is no access.
_CONVERGED, _SEVERAL, _ATOMIC = 1 << 11, 1 << 12, 1 << 13
_THREAD = (1 << 10) - 1
_INTERVAL = 16


class Shared(NamedTuple):
    """Shared memory of the blocks that run together, and its shadow.

    Attributes:
        data: Bytes; block b owns [b * stride, b * stride + limit).
        state: FRESH, READY or PENDING by granule.
        writer: Stamp of the last write by granule.
        reader: Stamp of the last read by granule.
        other_reader: Stamp of the last read by another warp than `reader`'s.
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
    reader: Array
    other_reader: Array
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
        return not ordered(clocks, block, interval, other, thread)
    return not ordered_after_some(clocks, block, interval, thread)


@njit(cache=True)
def shared_read(
    s: Shared, lanes: Array, address: Array, converged: Array, size: int, strong: bool
) -> tuple[int, int, int]:
    """Checks one load from shared memory by all active lanes, and stamps it.

    A strong one (volatile, relaxed, acquire) does not race with atomics and strong stores, and leaves no stamp.
    """
    own, floors, mixed = s.clocks.own, s.clocks.block_floor, s.clocks.mixed[0] != 0
    for i in range(lanes.size):
        at = address[i]
        if at < s.lowest or at + size > s.limit:
            return BOUNDS, i, -1
        if at & (size - 1):
            return ALIGNMENT, i, -1
        block = lanes[i] // s.lanes_per_block
        thread = lanes[i] - block * s.lanes_per_block
        interval, floor = own[block, thread], floors[block]
        stamp = interval << _INTERVAL | thread | (_CONVERGED if converged[i] else 0)
        first = block * s.stride + at >> s.shift
        for granule in range(first, first + max(size >> s.shift, 1)):
            state = s.state[granule]
            if state == PENDING:
                return IN_FLIGHT, i, -1
            if s.initialized and state == FRESH:
                return UNINITIALIZED, i, -1
            if s.races:
                written = s.writer[granule]
                unsettled = not (strong and written & _ATOMIC) and not _settled(written, floor, thread, converged[i])
                if unsettled and _conflicts(s.clocks, block, written, thread):
                    return READ_AFTER_WRITE, i, written & _THREAD
                last = s.reader[granule]
                if last != stamp and not strong:
                    if last != 0 and (last & _THREAD) >> 5 != thread >> 5:
                        s.other_reader[granule] = last
                        s.reader[granule] = stamp
                    elif (
                        last >> _INTERVAL == interval
                        and last & (_THREAD | _SEVERAL) != thread
                        and (not mixed or _conflicts(s.clocks, block, last, thread))
                    ):
                        both = last & stamp & _CONVERGED
                        s.reader[granule] = stamp & ~_CONVERGED | both | _SEVERAL
                    else:
                        s.reader[granule] = stamp
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
    strong: bool,
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
        strong: Whether it is atomic, volatile, relaxed or release: it does not race with others of its kind.
    """
    own, floors = s.clocks.own, s.clocks.block_floor
    for i in range(lanes.size):
        at = address[i]
        if at < s.lowest or at + size > s.limit:
            return BOUNDS, i, -1
        if at & (size - 1):
            return ALIGNMENT, i, -1
        block = lanes[i] // s.lanes_per_block
        thread = lanes[i] - block * s.lanes_per_block
        interval, floor = own[block, thread], floors[block]
        stamp = interval << _INTERVAL | thread | (_CONVERGED if converged[i] else 0)
        if strong:
            stamp |= _ATOMIC
        start = block * s.stride + at
        first = start >> s.shift
        same = values.shape[0] > 0
        if same:
            for byte in range(size):
                same = same and s.data[start + byte] == values[i, byte]
        for granule in range(first, first + max(size >> s.shift, 1)):
            if s.state[granule] == PENDING:
                return IN_FLIGHT, i, -1
            if values.shape[0] == 0 and s.initialized and s.state[granule] == FRESH:
                return UNINITIALIZED, i, -1
            if s.races:
                last = s.writer[granule]
                if not (strong and last & _ATOMIC):
                    unsettled = not same and not _settled(last, floor, thread, converged[i])
                    if unsettled and _conflicts(s.clocks, block, last, thread):
                        return WRITE_AFTER_WRITE, i, last & _THREAD
                    for reader in (s.reader[granule], s.other_reader[granule]):
                        unsettled = not same and not _settled(reader, floor, thread, converged[i])
                        if unsettled and _conflicts(s.clocks, block, reader, thread):
                            return WRITE_AFTER_READ, i, reader & _THREAD
                s.writer[granule] = stamp
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


@njit(cache=True)
def local_access(
    state: Array, lanes: Array, address: Array, size: int, limit: int, write: bool, initialized: bool
) -> tuple[int, int, int]:
    """Checks one access to local memory, a private array per lane, and marks what it writes."""
    for i in range(lanes.size):
        at = address[i]
        if at < 0 or at + size > limit:
            return BOUNDS, i, -1
        if at & (size - 1):
            return ALIGNMENT, i, -1
        for byte in range(at, at + size):
            if write:
                state[lanes[i], byte] = READY
            elif initialized and state[lanes[i], byte] == FRESH:
                return UNINITIALIZED, i, -1
    return OK, 0, 0


class Global(NamedTuple):
    """Global memory during one launch, and its shadow.

    Attributes:
        data: Bytes; the address of byte 0 is `base`.
        valid: 1 for each byte that belongs to an allocation.
        writer: Number + 1 of the block that wrote a granule last in this launch, negative for a strong write.
        reader: Number + 1 of a block that read it; -1 where several did.
        written: Interval of that write; this and what follows up to `clocks` has no elements in kernels without fences.
        read: Interval of that read.
        row: Row of `readers` for a granule that several blocks read, from 1.
        readers: (rows, blocks) intervals in which blocks read; row 0 has the number of rows taken. Where no row is
            left, it is not followed who read, and such a read races with nothing.
        clocks: Which intervals of blocks happened before which.
        shift: log2 of the granule.
        base: Address of the first byte.
        races: Whether to report races between blocks.
    """

    data: Array
    valid: Array
    writer: Array
    reader: Array
    written: Array
    read: Array
    row: Array
    readers: Array
    clocks: GridClocks
    shift: int
    base: int
    races: bool


@njit(cache=True)
def _add_reader(s: Global, granule: int, block: int, interval: int) -> None:
    """Notes one of several blocks that read a granule."""
    row = s.row[granule]
    if row == 0 and s.readers[0, 0] + 1 < s.readers.shape[0]:
        s.readers[0, 0] += 1
        row = s.row[granule] = s.readers[0, 0]
    if row > 0:
        s.readers[row, block] = interval


@njit(cache=True)
def _unordered_reader(s: Global, granule: int, block: int) -> int:
    """A block that read a granule, not ordered before what `block` does now; -1 where there is none."""
    reader = s.reader[granule] - 1
    if reader >= 0:
        ordered = reader == block or ordered_blocks(s.clocks, block, reader, s.read[granule])
        return -1 if ordered else reader
    row = s.row[granule]
    for other in range(s.readers.shape[1] if row > 0 else 0):
        interval = s.readers[row, other]
        if interval > 0 and other != block and not ordered_blocks(s.clocks, block, other, interval):
            return other
    return -1


@njit(cache=True)
def global_read(
    s: Global, blocks: Array, address: Array, size: int, alignment: int, strong: bool, read_only: bool
) -> tuple[int, int, int]:
    """Checks one load from global memory, and stamps it; `blocks` are the block numbers of the lanes.

    A strong one (volatile, relaxed, acquire) does not race with atomics and strong stores, and leaves no stamp.
    """
    fences = s.written.size > 0
    for i in range(address.size):
        at = address[i] - s.base
        if at < 0 or at + size > s.data.size or not s.valid[at] or not s.valid[at + size - 1]:
            return BOUNDS, i, -1
        if at & (alignment - 1):
            return ALIGNMENT, i, -1
        if not s.races:
            continue
        block = blocks[i]
        mark = block + 1
        for granule in range(at >> s.shift, (at + size - 1 >> s.shift) + 1):
            last = s.writer[granule]
            if last != 0 and abs(last) != mark and not (strong and last < 0):
                other = abs(last) - 1
                if not (fences and ordered_blocks(s.clocks, block, other, s.written[granule])):
                    return READ_AFTER_WRITE, i, other
            if last != 0 and read_only:
                return READ_AFTER_WRITE, i, abs(last) - 1
            if strong:
                continue
            reader = s.reader[granule]
            if not fences:
                s.reader[granule] = mark if reader == 0 or reader == mark else -1
            elif reader >= 0 and _unordered_reader(s, granule, block) < 0:
                s.reader[granule], s.read[granule] = mark, s.clocks.own[block]
            else:
                if reader > 0:
                    _add_reader(s, granule, reader - 1, s.read[granule])
                _add_reader(s, granule, block, s.clocks.own[block])
                s.reader[granule] = -1
    return OK, 0, 0


@njit(cache=True)
def global_write(
    s: Global, blocks: Array, address: Array, size: int, values: Array, strong: bool
) -> tuple[int, int, int]:
    """Checks one store to global memory, stamps and does it; `values` and `strong` as in `shared_write`."""
    fences = s.written.size > 0
    for i in range(address.size):
        at = address[i] - s.base
        if at < 0 or at + size > s.data.size or not s.valid[at] or not s.valid[at + size - 1]:
            return BOUNDS, i, -1
        if at & (size - 1):
            return ALIGNMENT, i, -1
        if s.races:
            block = blocks[i]
            mark = block + 1
            same = values.shape[0] > 0
            if same:
                for byte in range(size):
                    same = same and s.data[at + byte] == values[i, byte]
            first = at >> s.shift
            for granule in range(first, first + max(size >> s.shift, 1)):
                last = s.writer[granule]
                if last != 0 and abs(last) != mark and not same and not (strong and last < 0):
                    other = abs(last) - 1
                    if not (fences and ordered_blocks(s.clocks, block, other, s.written[granule])):
                        return WRITE_AFTER_WRITE, i, other
                reader = s.reader[granule]
                if reader != 0 and reader != mark and not same:
                    if not fences:
                        return WRITE_AFTER_READ, i, max(reader - 1, -1)
                    other = _unordered_reader(s, granule, block)
                    if other >= 0:
                        return WRITE_AFTER_READ, i, other
                    s.reader[granule] = 0  # those reads are ordered before this write
                    if s.row[granule] > 0:
                        s.readers[s.row[granule]] = 0
                s.writer[granule] = -mark if strong else mark
                if fences:
                    s.written[granule] = s.clocks.own[block]
        if values.shape[0] > 0:
            for byte in range(size):
                s.data[at + byte] = values[i, byte]
    return OK, 0, 0

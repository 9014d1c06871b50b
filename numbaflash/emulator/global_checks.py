"""Global memory during one launch: bounds, alignment, and races between the blocks.

An access is stamped with its block, and where the kernel has fences with the interval of the block (`grid_order` says
which intervals happened before which).
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
    OBSERVING,
    OK,
    READ_AFTER_WRITE,
    WEAK,
    WRITE_AFTER_READ,
    WRITE_AFTER_WRITE,
)
from .grid_order import GridClocks, ordered_blocks

Array = NDArray[Any]

_NOBODY, _SEVERAL = 0, -1


class Global(NamedTuple):
    """Global memory and its shadow. A block goes by its mark, which is its number + 1.

    Attributes:
        data: Bytes; the address of byte 0 is `base`.
        valid: 1 for each byte that belongs to an allocation.
        writer: Mark of the block with the last weak write to a granule in this launch.
        strong_writer: Mark of the block with the last strong write since then. This, `other_writer` and `strong_reader`
            have no elements where the kernel has no strong accesses.
        other_writer: Mark of another block with a strong write that `strong_writer` need not come after.
        reader: Mark of a block that read it; -1 where several did.
        strong_reader: Mark of the last block that read it by a strong load: that races with weak writes only.
        written: Interval of `writer`; this and what follows up to `clocks` has no elements in kernels without fences.
        strong_written: Interval of `strong_writer`.
        other_written: Interval of `other_writer`.
        read: Interval of `reader`.
        strong_read: Interval of `strong_reader`.
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
    strong_writer: Array
    other_writer: Array
    reader: Array
    strong_reader: Array
    written: Array
    strong_written: Array
    other_written: Array
    read: Array
    strong_read: Array
    row: Array
    readers: Array
    clocks: GridClocks
    shift: int
    base: int
    races: bool


@njit(cache=True)
def _unordered(s: Global, mark: int, intervals: Array, granule: int, block: int, strong: bool) -> bool:
    """Whether the access of a block, strong or not, is not ordered before what `block` does now."""
    if mark == _NOBODY or mark == block + 1:
        return False
    return intervals.size == 0 or not ordered_blocks(s.clocks, block, mark - 1, intervals[granule], strong)


@njit(cache=True)
def _racing_writer(s: Global, granule: int, block: int, strong: bool) -> int:
    """Mark of a block whose write races with what `block` does now."""
    if _unordered(s, s.writer[granule], s.written, granule, block, False):
        return s.writer[granule]
    if s.strong_writer.size > 0 and not strong:
        if _unordered(s, s.strong_writer[granule], s.strong_written, granule, block, True):
            return s.strong_writer[granule]
        if _unordered(s, s.other_writer[granule], s.other_written, granule, block, True):
            return s.other_writer[granule]
    return _NOBODY


@njit(cache=True)
def _racing_reader(s: Global, granule: int, block: int, strong: bool) -> int:
    """The same for reads, and a write now; -1 where it is not known which of several blocks."""
    reader = s.reader[granule]
    if reader == _SEVERAL:
        if s.read.size == 0:
            return _SEVERAL
        row = s.row[granule]
        for other in range(s.readers.shape[1] if row > 0 else 0):
            interval = s.readers[row, other]
            if interval > 0 and other != block and not ordered_blocks(s.clocks, block, other, interval, False):
                return other + 1
    elif _unordered(s, reader, s.read, granule, block, False):
        return reader
    if s.strong_reader.size > 0 and not strong:
        last = s.strong_reader[granule]
        if _unordered(s, last, s.strong_read, granule, block, True):
            return last
    return _NOBODY


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
def _note_read(s: Global, granule: int, block: int, strong: bool) -> None:
    """Stamps a read that is strong, or may be ordered before a write of another block."""
    mark, fences = block + 1, s.read.size > 0
    if strong:
        s.strong_reader[granule] = mark
        if fences:
            s.strong_read[granule] = s.clocks.own[block]
        return
    reader = s.reader[granule]
    if reader != _SEVERAL and not _unordered(s, reader, s.read, granule, block, False):
        s.reader[granule], s.read[granule] = mark, s.clocks.own[block]
    else:
        if reader != _SEVERAL:
            _add_reader(s, granule, reader - 1, s.read[granule])
        _add_reader(s, granule, block, s.clocks.own[block])
        s.reader[granule] = _SEVERAL


@njit(cache=True)
def _note_write(s: Global, granule: int, block: int, kind: int) -> None:
    """Stamps a write that is strong, or may be ordered before what another block does."""
    mark, fences = block + 1, s.written.size > 0
    if kind == WEAK:
        s.writer[granule] = mark
        if fences:
            s.written[granule] = s.clocks.own[block]
        if s.strong_writer.size > 0:
            s.strong_writer[granule] = s.other_writer[granule] = _NOBODY
        return
    last = s.strong_writer[granule]
    if kind == OBSERVING or last == _NOBODY:
        s.other_writer[granule] = _NOBODY
    elif last != mark:
        s.other_writer[granule] = last
        if fences:
            s.other_written[granule] = s.strong_written[granule]
    s.strong_writer[granule] = mark
    if fences:
        s.strong_written[granule] = s.clocks.own[block]


@njit(cache=True)
def _forget_readers(s: Global, granule: int) -> None:
    """Reads that are all ordered before a write are of no interest after it."""
    s.reader[granule] = _NOBODY
    if s.row[granule] > 0:
        s.readers[s.row[granule]] = 0


# In the loops below stands what nearly every access needs; a call that takes the tuple of arrays costs as much as the
# rest of an access.


@njit(cache=True)
def global_read(
    s: Global, blocks: Array, address: Array, size: int, alignment: int, strong: bool, read_only: bool
) -> tuple[int, int, int]:
    """Checks one load from global memory, and stamps it; `blocks` are the block numbers of the lanes.

    A strong one (volatile, relaxed, acquire) does not race with atomics and strong stores.
    """
    fences, strong_ones = s.written.size > 0, s.strong_writer.size > 0
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
            writer = s.writer[granule]
            if (strong_ones and s.strong_writer[granule]) or writer not in (_NOBODY, mark):
                racing = _racing_writer(s, granule, block, strong)
                if racing:
                    return READ_AFTER_WRITE, i, racing - 1
            if read_only and strong_ones and writer == _NOBODY:
                writer = s.strong_writer[granule]
            if read_only and writer != _NOBODY:
                return READ_AFTER_WRITE, i, writer - 1
            if fences or strong:
                _note_read(s, granule, block, strong)
            elif s.reader[granule] != mark:
                s.reader[granule] = mark if s.reader[granule] == _NOBODY else _SEVERAL
    return OK, 0, 0


@njit(cache=True)
def global_write(s: Global, blocks: Array, address: Array, size: int, values: Array, kind: int) -> tuple[int, int, int]:
    """Checks one store to global memory, stamps and does it; `values` and `kind` as in `shared_write`."""
    strong = kind != WEAK
    fences, strong_ones = s.written.size > 0, s.strong_writer.size > 0
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
                if not same:
                    if strong_ones or s.writer[granule] not in (_NOBODY, mark):
                        racing = _racing_writer(s, granule, block, strong)
                        if racing:
                            return WRITE_AFTER_WRITE, i, racing - 1
                    if s.reader[granule] not in (_NOBODY, mark) or strong_ones:
                        racing = _racing_reader(s, granule, block, strong)
                        if racing:
                            return WRITE_AFTER_READ, i, max(racing - 1, -1)
                    if fences:
                        _forget_readers(s, granule)
                if fences or strong_ones:
                    _note_write(s, granule, block, kind)
                else:
                    s.writer[granule] = mark
        if values.shape[0] > 0:
            for byte in range(size):
                s.data[at + byte] = values[i, byte]
    return OK, 0, 0

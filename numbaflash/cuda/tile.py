"""Tiles in shared memory and fragments in registers: where they lie, and how bytes get from one to the other.

A shared tile is an array of rows, each a whole number of 16-byte chunks. ldmatrix reads one chunk of eight successive
rows at a time; were the chunks in order, those eight would lie in the same banks wherever the row's length is a
multiple of 128 bytes. So a row's chunks are permuted by an XOR with the row's number ("swizzled"), and the eight always
cover all 32 banks. Stepping along a row is then an XOR with a constant on the lane's address, stepping down by
multiples of eight rows an added constant.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, ClassVar

from llvmlite import ir

from . import ptx
from .ptx import B32, B64, constant, device_intrinsic

__all__ = ["CHUNK", "Registers", "RowCopy", "Rows", "SharedTile", "at_chunk", "column_offset", "row_offset", "step"]

CHUNK = 16
"""Bytes that one lane moves at once: of cp.async and of a row of ldmatrix."""


@dataclass(frozen=True)
class SharedTile:
    """A tile of rows in shared memory.

    Attributes:
        offset: Bytes from the start of shared memory; a multiple of 128.
        rows: Rows.
        columns: Elements of a row that hold data.
        itemsize: Bytes of an element.
    """

    offset: int
    rows: int
    columns: int
    itemsize: int

    @property
    def pitch(self) -> int:
        """Bytes from one row to the next.

        Whole groups of 4 chunks, so that 4 or more lanes share a row when copying; of 8 for 32-bit elements, whose
        columns are read one by one (`float32_products`): then all of 8 successive rows lie in different banks.
        """
        group = 4 * CHUNK if self.itemsize == 2 else 8 * CHUNK
        return -(-self.columns * self.itemsize // group) * group

    @property
    def nbytes(self) -> int:
        """Bytes of the tile."""
        return self.rows * self.pitch

    @property
    def end(self) -> int:
        """Offset of what comes after the tile."""
        return self.offset + self.nbytes

    @property
    def swizzle(self) -> tuple[int, int]:
        """(mask, shift): chunk c of row r lies at chunk c ^ ((r >> shift) & mask).

        With 2^n dividing the chunks of a row, 8 / 2^n successive rows already lie in different banks; only the next
        ones need another order.
        """
        bits = min(3, _twos(self.pitch // CHUNK))
        return (1 << bits) - 1, 3 - bits


def _twos(n: int) -> int:
    return (n & -n).bit_length() - 1


def at_chunk(tile: SharedTile) -> Any:
    """Return a device function (start of shared memory, row, chunk) -> address of that chunk of the tile."""
    mask, shift = tile.swizzle

    def emit(_context: Any, builder: ir.IRBuilder, _signature: Any, values: Any) -> ir.Value:
        start, row, chunk = values
        moved = builder.xor(chunk, builder.and_(builder.lshr(row, constant(B32, shift)), constant(B32, mask)))
        down = builder.add(builder.mul(row, constant(B32, tile.pitch)), constant(B32, tile.offset))
        return builder.add(start, builder.add(down, builder.mul(moved, constant(B32, CHUNK))))

    return device_intrinsic(emit, [B32.numba] * 3, B32.numba)


def step(builder: ir.IRBuilder, tile: SharedTile, address: ir.Value, row: int, chunk: int) -> tuple[ir.Value, int]:
    """Return (address, immediate offset) of what lies `row` rows down and `chunk` chunks along from `address`.

    `row` must be a multiple of 8, `chunk` of the chunks that lanes differ by (2 for fragments).
    """
    mask, _ = tile.swizzle
    swizzled = chunk & mask
    if swizzled:
        address = builder.xor(address, constant(B32, swizzled * CHUNK))
    return address, row * tile.pitch + (chunk - swizzled) * CHUNK


class Rows(Enum):
    """Which rows of a tile a copy finds in global memory; what it does not find becomes zeros."""

    ALL = "all"
    SOME = "as many as there are"
    ALL_OR_NONE = "all, or none"


@dataclass(frozen=True)
class RowCopy:
    """The asynchronous copy of one tile from global memory, shared among the block's threads.

    Thread t copies chunk `t % lanes` of rows `t // lanes` + i * rows_at_once, the last ones first: tiles are visited
    from last to first as well, so one pointer walks down through all of them by one step and needs nothing but that.

    Its arguments, as device values: the thread's address in the tile, its address in global memory of the tile's last
    step, bytes of a step (`rows_at_once` rows), the thread's chunk, and how many rows there are from the thread's own
    on. Its result: the address after the last step, where the tile before begins.

    Attributes:
        tile: Destination.
        threads: Threads of the block.
        rows: Which rows there are.
    """

    tile: SharedTile
    threads: int
    rows: Rows

    ARGUMENTS: ClassVar = [B32.numba, B64.numba, B64.numba, B32.numba, B32.numba]

    @property
    def lanes(self) -> int:
        """Lanes that share a row: a power of two, up to 256 successive bytes."""
        return min(16, 1 << _twos(self.tile.pitch // CHUNK))

    @property
    def rows_at_once(self) -> int:
        """Rows that the block's threads copy in one step."""
        return self.threads // self.lanes

    def emit(self, builder: ir.IRBuilder, arguments: Sequence[ir.Value]) -> ir.Value:
        """Emit the copy as one group; return the source address after it."""
        shared, source, row_step, chunk, rows_left = arguments
        tile = self.tile
        if tile.rows % self.rows_at_once:
            raise ValueError(f"tile must have a multiple of {self.rows_at_once} rows, got {tile.rows}")
        if self.rows_at_once % 8:  # rows 8 apart have the same swizzle, so that an added constant leads down
            raise ValueError(f"threads must copy a multiple of 8 rows at once, got {self.rows_at_once}")
        chunks = tile.columns * tile.itemsize // CHUNK
        full, nothing = constant(B32, CHUNK), constant(B32, 0)
        for row in reversed(range(0, tile.rows, self.rows_at_once)):
            nbytes = full
            if self.rows is not Rows.ALL:
                least = row if self.rows is Rows.SOME else 0
                nbytes = builder.select(builder.icmp_signed(">", rows_left, constant(B32, least)), full, nothing)
            for column in range(0, tile.pitch // CHUNK, self.lanes):
                filled = nbytes
                if column + self.lanes > chunks:
                    inside = builder.icmp_signed("<", chunk, constant(B32, chunks - column))
                    filled = builder.select(inside, nbytes, nothing)
                along = column * CHUNK
                ptx.cp_async_16.emit(builder, shared, source, filled, row * tile.pitch + along, along)
            source = builder.sub(source, row_step)
        ptx.cp_async_commit.emit(builder)
        return source

    def function(self) -> Any:
        """Return a device function that does nothing but the copy."""

        def emit(_context: Any, builder: ir.IRBuilder, _signature: Any, values: Any) -> ir.Value:
            return self.emit(builder, values)

        return device_intrinsic(emit, self.ARGUMENTS, B64.numba)


def row_offset(row: int) -> int:
    """Return how far below a lane's first row of a warp tile its row number `row` lies."""
    return 16 * (row // 2) + 8 * (row % 2)


def column_offset(column: int) -> int:
    """Return how far right of a lane's first column of a warp tile its column number `column` lies."""
    return 8 * (column // 2) + column % 2


class Registers:
    """A local array while one sequence of instructions is emitted: elements are values, not memory.

    Read and written by index; `store` puts back what changed. LLVM makes registers of such arrays, for all their
    indices are constants.
    """

    def __init__(self, context: Any, builder: ir.IRBuilder, kind: Any, value: ir.Value) -> None:
        self._builder = builder
        self._data = context.make_array(kind)(context, builder, value).data
        self._values: dict[int, ir.Value] = {}
        self._changed: set[int] = set()

    def __getitem__(self, index: int) -> ir.Value:
        if index not in self._values:
            self._values[index] = self._builder.load(self._at(index))
        return self._values[index]

    def __setitem__(self, index: int, value: ir.Value) -> None:
        self._values[index] = value
        self._changed.add(index)

    def store(self) -> None:
        """Write the changed elements back to the array."""
        for index in sorted(self._changed):
            self._builder.store(self._values[index], self._at(index))

    def _at(self, index: int) -> ir.Value:
        return self._builder.gep(self._data, [constant(B32, index)], inbounds=True)

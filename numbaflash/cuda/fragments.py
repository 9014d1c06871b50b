"""Fragments of results in float32 on their way to global memory and back, and what is done to their rows as a whole.

The four lanes of a row hold 8 successive floats of it, 8 bytes each: a whole sector. So they go straight from registers
to a row-major matrix, with nothing lost. Of each 16x8 tile a lane holds two floats of its row and of the one 8 below
(`products`).
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import cuda
from numba.cuda import types

from . import ptx
from .products import element
from .ptx import B64, constant, device_intrinsic
from .tile import Registers, SharedTile, at_chunk, row_offset

__all__ = ["load_fragments", "scale_fragments", "store_fragments", "total_rows", "value_fragment"]


def load_fragments(rows: int, columns: int) -> Any:
    """Return a device function that loads a warp's tile into a register array.

    Its arguments: the address of the lane's first element, bytes from row to row, and the array.

    Args:
        rows: Rows of which a lane holds elements.
        columns: Columns of the warp's tile, a multiple of 8.
    """

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, values: Any) -> None:
        target = Registers(context, builder, signature.args[2], values[2])
        for row in range(rows):
            address = _row(builder, values, row)
            for tile in range(columns // 8):
                pair = ptx.load_global_2f32.emit(builder, address, 32 * tile)
                for i in range(2):
                    target[element(columns // 8, row, 2 * tile + i)] = pair[i]
        target.store()

    return device_intrinsic(emit, [B64.numba, B64.numba, None], types.void)


def store_fragments(rows: int, columns: int) -> Any:
    """Return a device function that stores what one of `load_fragments` loads, with the same arguments."""

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, values: Any) -> None:
        source = Registers(context, builder, signature.args[2], values[2])
        for row in range(rows):
            address = _row(builder, values, row)
            for tile in range(columns // 8):
                pair = (source[element(columns // 8, row, 2 * tile + i)] for i in range(2))
                ptx.store_global_2f32.emit(builder, address, *pair, 32 * tile)

    return device_intrinsic(emit, [B64.numba, B64.numba, None], types.void)


def _row(builder: ir.IRBuilder, values: Any, row: int) -> ir.Value:
    return builder.add(values[0], builder.mul(values[1], constant(B64, row_offset(row))))


def scale_fragments(rows: int, columns: int) -> Any:
    """Return a device function (array, factors) that multiplies each row by its factor."""

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, values: Any) -> None:
        array, factors = (Registers(context, builder, signature.args[i], values[i]) for i in range(2))
        for row in range(rows):
            for column in range(columns // 4):
                index = element(columns // 8, row, column)
                array[index] = builder.fmul(array[index], factors[row])
        array.store()

    return device_intrinsic(emit, [None, None], types.void)


def total_rows(rows: int) -> Any:
    """Return a device function (sums) that makes each lane's share of a row's sum the whole sum, in all its lanes."""

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, values: Any) -> None:
        sums = Registers(context, builder, signature.args[0], values[0])
        for row in range(rows):
            for mask in (1, 2):
                sums[row] = builder.fadd(sums[row], ptx.shuffle_xor.emit(builder, sums[row], mask))
        sums.store()

    return device_intrinsic(emit, [None], types.void)


def value_fragment(tile: SharedTile) -> Any:
    """Return a device function (start of shared memory, lane) -> the lane's address in V's tile for the products."""
    chunk, WIDE = at_chunk(tile), tile.itemsize == 4

    @cuda.jit(device=True, inline="always")  # a call would make Numba ask for a GPU
    def address(shared, lane):
        if WIDE:
            return chunk(shared, 2 * (lane & 3), lane >> 4) + 4 * ((lane >> 2) & 3)
        return chunk(shared, lane & 15, lane >> 4)

    return address

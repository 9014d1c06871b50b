"""What follows the last key: sums over a row's lanes, the sink, the log-sum-exp, and O's way to global memory.

A 16-bit O leaves through shared memory, so that each lane stores 16 successive bytes and a row's sectors are written
whole.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import cuda, int32
from numba.cuda import types

from . import ptx
from .products import WarpTile
from .ptx import B32, B64, F32, constant, device_intrinsic
from .softmax import LN_2
from .tile import CHUNK, Registers, RowCopy, Rows, SharedTile, at_chunk, row_offset, step

__all__ = ["finish_rows", "stage_output", "store_fragments", "store_rows", "write_tile"]


def finish_rows(warp: WarpTile, *, sinks: bool, lse: bool) -> Any:
    """Return a device function that divides O by the row sums and writes the log-sum-exp.

    A row that has seen nothing becomes zeros, with a log-sum-exp of -inf, or of its sink logit.

    Its arguments: the row maxima in log2 units, the lane's share of the row sums, O, the sink logit * log2(e), the
    address of the log-sum-exp of the lane's first row, and how many rows there are from that one on.
    """

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, values: Any) -> None:
        row_max, row_sum, out = (Registers(context, builder, signature.args[i], values[i]) for i in range(3))
        sink, lse_address, rows_left = values[3:]
        zero, one = constant(F32, 0.0), constant(F32, 1.0)
        lane = ptx.lane_id.emit(builder)
        leads = builder.icmp_signed("==", builder.and_(lane, constant(B32, 3)), constant(B32, 0))
        for row in range(warp.rows):
            top, total, factor = row_max[row], row_sum[row], one
            for mask in (1, 2):
                total = builder.fadd(total, ptx.shuffle_xor.emit(builder, total, mask))
            if sinks:
                top = ptx.maximum.emit(builder, row_max[row], sink)
                factor = ptx.exp2.emit(builder, builder.fsub(row_max[row], top))
                total = builder.fma(total, factor, ptx.exp2.emit(builder, builder.fsub(sink, top)))
            # Only a sum of nothing is 0: the largest weight is 1 or more.
            empty = builder.fcmp_ordered("==", total, zero)
            scale = builder.select(empty, zero, builder.fmul(factor, ptx.reciprocal.emit(builder, total)))
            for column in range(warp.value_dim // 4):
                index = warp.output(row, column)
                out[index] = builder.fmul(out[index], scale)
            if lse:
                natural = builder.fmul(builder.fadd(top, ptx.log2.emit(builder, total)), constant(F32, LN_2))
                exists = builder.icmp_signed(">", rows_left, constant(B32, row_offset(row)))
                address = builder.add(lse_address, constant(B64, 4 * row_offset(row)))
                ptx.store_global_f32_if.emit(
                    builder, builder.zext(builder.and_(leads, exists), B32.llvm), address, natural
                )
        out.store()

    return device_intrinsic(emit, [None, None, None, F32.numba, B64.numba, B32.numba], types.void)


def stage_output(warp: WarpTile, tile: SharedTile) -> Any:
    """Return a device function (lane's address in the warp's first row of O's tile, O) that rounds O into the tile."""
    pack = ptx.pack_bf16 if warp.bfloat16 else ptx.pack_f16

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, values: Any) -> None:
        out = Registers(context, builder, signature.args[1], values[1])
        for row in range(warp.rows):
            for chunk in range(tile.columns // 8):
                address, offset = step(builder, tile, values[0], row_offset(row), chunk)
                pair = pack.emit(builder, *(out[warp.output(row, 2 * chunk + i)] for i in range(2)))
                ptx.store_shared_b32.emit(builder, address, pair, offset)

    return device_intrinsic(emit, [B32.numba, None], types.void)


def store_fragments(warp: WarpTile, columns: int) -> Any:
    """Return a device function that stores a float32 O as it is: the 8 bytes of a row's four lanes are a whole sector.

    Its arguments: the address of the lane's first element in global memory, bytes between two rows there, O, and how
    many rows there are from the lane's first one on.
    """

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, values: Any) -> None:
        target, row_bytes, array, rows_left = values
        out = Registers(context, builder, signature.args[2], array)
        for row in range(warp.rows):
            exists = builder.zext(builder.icmp_signed(">", rows_left, constant(B32, row_offset(row))), B32.llvm)
            address = builder.add(target, builder.mul(row_bytes, constant(B64, row_offset(row))))
            for tile in range(columns // 8):
                pair = (out[warp.output(row, 2 * tile + i)] for i in range(2))
                ptx.store_global_2f32_if.emit(builder, exists, address, *pair, 32 * tile)

    return device_intrinsic(emit, [B64.numba, B64.numba, None, B32.numba], types.void)


def store_rows(tile: SharedTile, threads: int) -> Any:
    """Return a device function that stores O's tile in global memory, shared among the block's threads as by `RowCopy`.

    Its arguments: the thread's address in the tile, its address in global memory of the tile's first step, bytes
    between two rows there, the thread's chunk, and how many rows there are from the thread's own on.
    """
    copy = RowCopy(tile, threads, Rows.SOME)

    def emit(_context: Any, builder: ir.IRBuilder, _signature: Any, values: Any) -> None:
        shared, target, row_bytes, chunk, rows_left = values
        chunks = tile.columns * tile.itemsize // CHUNK
        row_step = builder.mul(row_bytes, constant(B64, copy.rows_at_once))
        for row in range(0, tile.rows, copy.rows_at_once):
            exists = builder.icmp_signed(">", rows_left, constant(B32, row))
            for column in range(0, tile.pitch // CHUNK, copy.lanes):
                inside = exists
                if column + copy.lanes > chunks:
                    inside = builder.and_(exists, builder.icmp_signed("<", chunk, constant(B32, chunks - column)))
                along = column * CHUNK
                ptx.move_16_if.emit(
                    builder, builder.zext(inside, B32.llvm), shared, target, row * tile.pitch + along, along
                )
            target = builder.add(target, row_step)

    return device_intrinsic(emit, [B32.numba, B64.numba, B64.numba, B32.numba, B32.numba], types.void)


def write_tile(warp: WarpTile, tile: SharedTile, threads: int) -> Any:
    """Return a device function that stores a block's tile of O in global memory, by way of `tile` if of 16 bits.

    All threads of the block call it, when nobody reads or writes the place of `tile` any more.

    Its arguments: the start of shared memory, O, the address of the tile's first row in global memory, bytes from row
    to row there, and how many rows there are.
    """
    WARP_ROWS = 16 * warp.row_tiles
    if tile.itemsize == 4:
        store = store_fragments(warp, tile.columns)

        @cuda.jit(device=True, inline="always")  # a call would make Numba ask for a GPU
        def write(shared, O, target, row_bytes, rows):  # noqa: ARG001
            thread = ptx.thread_x()
            row = (thread >> 5) * WARP_ROWS + ((thread & 31) >> 2)
            store(target + row * row_bytes + 8 * (thread & 3), row_bytes, O, int32(rows - row))

        return write
    stage, store, chunk, LANES = (
        stage_output(warp, tile), store_rows(tile, threads), at_chunk(tile), RowCopy(tile, threads, Rows.SOME).lanes
    )  # fmt: skip

    @cuda.jit(device=True, inline="always")
    def write_staged(shared, O, target, row_bytes, rows):
        thread = ptx.thread_x()
        stage(chunk(shared, (thread >> 5) * WARP_ROWS + ((thread & 31) >> 2), 0) + 4 * (thread & 3), O)
        cuda.syncthreads()
        row, column = thread // LANES, thread % LANES
        store(
            chunk(shared, row, column), target + row * row_bytes + column * CHUNK, row_bytes, column, int32(rows - row)
        )

    return write_staged

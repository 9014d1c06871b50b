"""The online softmax on fragments ("Online normalizer calculation for softmax", Milakov and Gimelshein, 2018).

Row maxima live in log2 units: m = max(s) * scale * log2(e), so that a weight is one multiply-add and one exp2. A row
that has seen no key yet has the lowest finite float as its maximum: then no operation below meets inf - inf, and none
needs a test.

Maxima are lazy (the idea of FlashAttention-4): O and the row sums are rescaled only when a score exceeds its row's
maximum by more than 2^8 in weight; until then the old maximum serves as well, for what is a maximum only keeps weights
within range: float16 holds 2^8 with the precision that it has for 1. Whether any row of the warp needs it is one vote
on what each lane has seen, so the lanes of a row exchange nothing in the blocks that change nothing.
"""

from __future__ import annotations

import math
from typing import Any

from llvmlite import ir
from numba.cuda import types

from . import ptx
from .products import WarpTile, update_maxima
from .ptx import B32, F32, constant, device_intrinsic
from .tile import Registers

__all__ = ["LN_2", "LOG2_E", "NOTHING_SEEN", "lane_maxima", "outgrown", "raise_maxima"]

LOG2_E = math.log2(math.e)
LN_2 = math.log(2.0)
NOTHING_SEEN = -3.4028234663852886e38
SLACK = 8.0
"""log2 of the largest weight: a sum of 2^16 keys then stays far inside float32, and float16 ends at 2^16."""


def lane_maxima(warp: WarpTile) -> Any:
    """Return a device function (scores, maxima): the largest score of each row among those that the lane holds."""

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, values: Any) -> None:
        scores = Registers(context, builder, signature.args[0], values[0])
        maxima = Registers(context, builder, signature.args[1], values[1])
        for pair in range(warp.keys // 16):
            update_maxima(builder, warp, scores, maxima, pair)
        maxima.store()

    return device_intrinsic(emit, [None, None], types.void)


def outgrown(warp: WarpTile) -> Any:
    """Return a device function (maxima, scale, row_max) -> 1 where a row's weights would exceed 2^SLACK, else 0."""

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, values: Any) -> ir.Value:
        maxima = Registers(context, builder, signature.args[0], values[0])
        row_max = Registers(context, builder, signature.args[2], values[2])
        any_row = None
        for row in range(warp.rows):
            reduced = builder.fma(maxima[row], values[1], constant(F32, -SLACK))
            exceeds = builder.fcmp_ordered(">", reduced, row_max[row])
            any_row = exceeds if any_row is None else builder.or_(any_row, exceeds)
        return builder.zext(any_row, B32.llvm)

    return device_intrinsic(emit, [None, F32.numba, None], B32.numba)


def raise_maxima(warp: WarpTile) -> Any:
    """Return a device function (maxima, scale, row_max, row_sum, out): new row maxima, all sums rescaled to them."""

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, values: Any) -> None:
        maxima, row_max, row_sum, out = (
            Registers(context, builder, signature.args[i], values[i]) for i in (0, 2, 3, 4)
        )
        for row in range(warp.rows):
            top = maxima[row]
            for mask in (1, 2):
                top = ptx.maximum.emit(builder, top, ptx.shuffle_xor.emit(builder, top, mask))
            old = row_max[row]
            row_max[row] = ptx.maximum.emit(builder, old, builder.fmul(top, values[1]))
            factor = ptx.exp2.emit(builder, builder.fsub(old, row_max[row]))
            row_sum[row] = builder.fmul(row_sum[row], factor)
            for column in range(warp.value_dim // 4):
                index = warp.output(row, column)
                out[index] = builder.fmul(out[index], factor)
        row_max.store()
        row_sum.store()
        out.store()

    return device_intrinsic(emit, [None, F32.numba, None, None, None], types.void)

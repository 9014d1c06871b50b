"""A warp as groups of lanes side by side: sums within a group, and online softmaxes of groups merged into one."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.cuda import types

from . import ptx
from .ptx import F32, device_intrinsic
from .tile import Registers

__all__ = ["merge_lane_groups", "sum_lanes"]


def sum_lanes(lanes: int) -> Any:
    """Return a device function (x) -> the sum of x over a group of `lanes` lanes; all 32 lanes call it.

    Every lane gets the same bits.
    """

    def emit(_context: Any, builder: ir.IRBuilder, _signature: Any, values: Any) -> ir.Value:
        total = values[0]
        mask = 1
        while mask < lanes:
            total = builder.fadd(total, ptx.shuffle_xor.emit(builder, total, mask))
            mask *= 2
        return total

    return device_intrinsic(emit, [F32.numba], F32.numba)


def merge_lane_groups(lanes: int, rows: int, elements: int) -> Any:
    """Return a device function (maxima, sums, out) that merges the groups' softmaxes; all 32 lanes call it.

    Afterwards all groups hold the same: the row maxima in log2 units, the sums of weights, and `elements` of O a row.
    """

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, values: Any) -> None:
        maxima, sums, out = (Registers(context, builder, signature.args[i], values[i]) for i in range(3))
        for row in range(rows):
            mask = lanes
            while mask < 32:
                other = ptx.shuffle_xor.emit(builder, maxima[row], mask)
                top = ptx.maximum.emit(builder, maxima[row], other)
                faded = ptx.exp2.emit(builder, builder.fsub(maxima[row], top))
                maxima[row] = top
                for array, index in ((sums, row), *((out, row * elements + i) for i in range(elements))):
                    own = builder.fmul(array[index], faded)
                    array[index] = builder.fadd(own, ptx.shuffle_xor.emit(builder, own, mask))
                mask *= 2
        for array in (maxima, sums, out):
            array.store()

    return device_intrinsic(emit, [None, None, None], types.void)

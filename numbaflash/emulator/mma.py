"""mma.sync and ldmatrix: how fragments lie in registers (PTX ISA, "Matrix Fragments for mma"), and the products.

In a warp, lane = 4 * g + t. Rows of A are g and g + 8, columns of B are g, and C holds columns 2t and 2t + 1. Products
are exact in float32 (f16, bf16, tf32), and are added to C one after the other in the order of k; hardware adds groups
of them at once with truncation, so the last bits differ.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from .floatmath import narrow, widen

Array = NDArray[Any]


class Fragments:
    """Decodes the registers of A and B to rows of numbers, and remembers the last ones: they are used many times."""

    def __init__(self) -> None:
        self._kept: dict[tuple[Any, ...], tuple[Any, Array]] = {}

    def decode(self, kind: str, registers: tuple[Array, ...]) -> Array:
        """(lanes, registers * elements) float32 or int32 values, register by register."""
        key = (kind, *map(id, registers))
        found = self._kept.get(key)
        if found is not None:
            return found[1]
        packed = np.stack(registers, axis=1)
        values: Array
        match kind:
            case "f16" | "bf16":
                values = widen(packed.view("u2"), kind)
            case "tf32":
                values = (packed & np.uint32(0xFFFFE000)).view("f4")
            case _:
                values = packed.view("i1" if kind == "s8" else "u1").astype("i4")
        if len(self._kept) >= 16:
            self._kept.pop(next(iter(self._kept)))
        self._kept[key] = (registers, values)  # the registers are kept alive, so that their ids stay theirs
        return values


@njit(cache=True)
def _multiply(a: Array, b: Array, c: Array, out: Array, per: int) -> None:
    """Computes D = A B + C for every warp.

    Args:
        a: (lanes, 2 * halves * per): element e of register r of lane (g, t) is A[g + 8 * (r % 2), k] with
            k = (r // 2) * 4 * per + t * per + e.
        b: (lanes, halves * per): the same of B[k, g] with k = r * 4 * per + t * per + e.
        c: (4, lanes): registers of C.
        out: (4, lanes): registers of D.
        per: Elements in a register.
    """
    depth = b.shape[1] * 4
    rows = np.empty((16, depth), a.dtype)
    columns = np.empty((depth, 8), a.dtype)
    total = np.empty((16, 8), out.dtype)
    for first in range(0, a.shape[0], 32):
        for lane in range(32):
            g, t = lane >> 2, lane & 3
            for r in range(a.shape[1] // per):
                for e in range(per):
                    rows[g + 8 * (r & 1), (r >> 1) * 4 * per + t * per + e] = a[first + lane, r * per + e]
            for r in range(b.shape[1] // per):
                for e in range(per):
                    columns[r * 4 * per + t * per + e, g] = b[first + lane, r * per + e]
            for e in range(4):
                total[g + 8 * (e >> 1), 2 * t + (e & 1)] = c[e, first + lane]
        for i in range(16):
            for k in range(depth):
                for j in range(8):
                    total[i, j] += rows[i, k] * columns[k, j]
        for lane in range(32):
            g, t = lane >> 2, lane & 3
            for e in range(4):
                out[e, first + lane] = total[g + 8 * (e >> 1), 2 * t + (e & 1)]


def multiply(fragments: Fragments, kind: str, a: tuple[Array, ...], b: tuple[Array, ...], c: Array) -> Array:
    """D = A B + C for float inputs: (4, lanes) float32 in and out."""
    out = np.empty(c.shape, "f4")
    per = 1 if kind == "tf32" else 2
    _multiply(fragments.decode(kind, a), fragments.decode(kind, b), c, out, per)
    return out


def multiply_f16(fragments: Fragments, kind: str, a: tuple[Array, ...], b: tuple[Array, ...], c: Array) -> Array:
    """D = A B + C with f16 pairs for C and D: (2, lanes) 32-bit registers."""
    pairs = widen(np.ascontiguousarray(c).view("u2").reshape(2, -1, 2), kind)
    wide = multiply(fragments, kind, a, b, np.ascontiguousarray(pairs.transpose(0, 2, 1)).reshape(4, -1))
    bits = narrow(wide, "f16").reshape(2, 2, -1).transpose(0, 2, 1)
    return np.ascontiguousarray(bits).view("u4").reshape(2, -1)


def multiply_s32(
    fragments: Fragments, kinds: str, a: tuple[Array, ...], b: tuple[Array, ...], c: Array, saturated: bool
) -> Array:
    """D = A B + C for 8-bit integers: (4, lanes) int32, wrapped or clamped."""
    left, right = kinds.split(".")
    out = np.empty(c.shape, "i8" if saturated else "i4")
    _multiply(fragments.decode(left, a), fragments.decode(right, b), c, out, 4)
    return np.clip(out, -(2**31), 2**31 - 1).astype("i4") if saturated else out


def matrices_to_registers(rows: Array, transposed: bool) -> Array:
    """ldmatrix: (warps, count, 8 rows, 16 bytes) -> (count, lanes) 32-bit registers."""
    warps, count = rows.shape[:2]
    if transposed:
        halves = rows.view("u2").transpose(0, 1, 3, 2)
        words = np.ascontiguousarray(halves).view("u4")
    else:
        words = rows.view("u4")
    return np.ascontiguousarray(words.reshape(warps, count, 32).transpose(1, 0, 2)).reshape(count, -1)


def registers_to_matrices(registers: list[Array], transposed: bool) -> Array:
    """stmatrix: registers of whole warps -> (warps, count, 8 rows, 16 bytes)."""
    words = np.stack([r.reshape(-1, 8, 4) for r in registers], axis=1)
    if transposed:
        halves = words.view("u2").transpose(0, 1, 3, 2)
        return np.ascontiguousarray(halves).view("u1").reshape(-1, len(registers), 8, 16)
    return words.view("u1").reshape(-1, len(registers), 8, 16)

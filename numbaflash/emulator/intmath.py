"""Integer functions of the PTX ISA on NumPy arrays, for what NumPy has no operator."""

# mypy: disable-error-code="no-any-return"
# Operators on NDArray[Any] are typed Any.

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def _unsigned(a: Array) -> Array:
    return a.view(f"u{a.dtype.itemsize}") if a.dtype.kind == "i" else a


def saturate(wide: Array, dtype: Any) -> Array:
    """Clamps to the range of an integer type, and converts."""
    wide = np.asarray(wide)
    have, want = np.iinfo(wide.dtype), np.iinfo(dtype)
    low, high = max(int(have.min), int(want.min)), min(int(have.max), int(want.max))
    return np.clip(wide, wide.dtype.type(low), wide.dtype.type(high)).astype(dtype)


def add_carry(a: Array, b: Array, carry: Any) -> tuple[Array, Array]:
    """The sum a + b + carry, and the carry out."""
    partial = a + b
    total = partial + np.asarray(carry).astype(a.dtype)
    return total, (partial < a) | (total < partial)


def sub_carry(a: Array, b: Array, borrow: Any) -> tuple[Array, Array]:
    """The difference a - b - borrow, and the borrow out."""
    borrow = np.asarray(borrow).astype(a.dtype)
    partial = a - b
    return partial - borrow, (a < b) | (partial < borrow)


def multiply_high(a: Array, b: Array) -> Array:
    """The upper half of a product, as unsigned bits."""
    size = a.dtype.itemsize
    if size < 8:
        wide = np.dtype(f"{a.dtype.kind}{2 * size}")
        product = a.astype(wide) * np.asarray(b).astype(wide)
        return (product.view(f"u{2 * size}") >> np.array(8 * size, f"u{2 * size}")).astype(f"u{size}")
    x, y = np.broadcast_arrays(a.view("u8"), np.asarray(b).view("u8"))
    low, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    x0, x1, y0, y1 = x & low, x >> half, y & low, y >> half
    middle = x1 * y0 + (x0 * y0 >> half)
    high = x1 * y1 + (middle >> half) + (x0 * y1 + (middle & low) >> half)
    if a.dtype.kind == "i":  # the unsigned product of a - 2^64 is too large by the other factor, shifted up
        high = high - np.where(a < 0, y, 0).astype("u8") - np.where(np.asarray(b) < 0, x, 0).astype("u8")
    return high


def multiply_24(a: Array, b: Array, high: bool) -> Array:
    """Bits 0-31, or 16-47, of the product of the low 24 bits."""
    shift = np.asarray(40, "i8")
    if a.dtype.kind == "i":
        x, y = (np.asarray(v).astype("i8") << shift >> shift for v in (a, b))
    else:
        x, y = (np.asarray(v).astype("i8") & 0xFFFFFF for v in (a, b))
    product = x * y
    return (product >> 16 if high else product).astype("u4")


def divide(a: Array, b: Array) -> Array:
    """Quotient truncated towards zero; all ones where the divisor is zero (unspecified by the ISA)."""
    zero = np.equal(b, 0)
    divisor = np.where(zero, 1, b).astype(a.dtype)
    if a.dtype.kind == "u":
        quotient = a // divisor
    else:
        quotient = a // divisor
        quotient = quotient + ((a % divisor != 0) & ((a < 0) != (divisor < 0)))
    return np.where(zero, np.array(-1).astype(a.dtype), quotient.astype(a.dtype))


def remainder(a: Array, b: Array) -> Array:
    """Remainder with the sign of the dividend; the dividend where the divisor is zero (unspecified by the ISA)."""
    zero = np.equal(b, 0)
    divisor = np.where(zero, 1, b).astype(a.dtype)
    return np.where(zero, a, np.fmod(a, divisor))


def popcount(a: Array) -> Array:
    """Number of one bits, 32-bit."""
    return np.bitwise_count(a).astype("u4")


def leading_zeros(a: Array) -> Array:
    """Number of leading zero bits, 32-bit."""
    smeared = a
    for step in (1, 2, 4, 8, 16, 32)[: 5 if a.dtype.itemsize == 4 else 6]:
        smeared = smeared | smeared >> np.array(step, a.dtype)
    return np.bitwise_count(~smeared).astype("u4")


def reverse_bits(a: Array) -> Array:
    """The bits in opposite order."""
    for shift, mask in ((1, 0x5555555555555555), (2, 0x3333333333333333), (4, 0x0F0F0F0F0F0F0F0F)):
        keep = np.array(mask & ((1 << 8 * a.dtype.itemsize) - 1), a.dtype)
        step = np.array(shift, a.dtype)
        a = (a >> step & keep) | (a & keep) << step
    return a.byteswap()


def find_bit(a: Array, shift: bool) -> Array:
    """Position of the highest bit that differs from the sign, all ones where there is none."""
    width = 8 * a.dtype.itemsize
    magnitude = _unsigned(np.where(a < 0, ~a, a)) if a.dtype.kind == "i" else a
    zeros = leading_zeros(magnitude)
    found = zeros if shift else np.uint32(width - 1) - zeros
    return np.where(zeros == width, np.uint32(0xFFFFFFFF), found)


def shift_left(a: Array, amount: Array) -> Array:
    """The bits of a moved up; 0 from the width on."""
    return a << np.minimum(amount, np.uint32(255)).astype(a.dtype)


def shift_right(a: Array, amount: Array) -> Array:
    """The bits of a moved down; 0, or the sign, from the width on."""
    return a >> np.minimum(amount, np.uint32(127)).astype(a.dtype)


def _ones(count: Array, dtype: Any) -> Array:
    """A mask of the low `count` bits."""
    width = 8 * np.dtype(dtype).itemsize
    some = np.array(1, dtype) << np.minimum(count, width - 1).astype(dtype)
    return np.where(count >= width, ~np.array(0, dtype), some - np.array(1, dtype))


def extract_field(a: Array, position: Array, length: Array) -> Array:
    """`length` bits from bit `position`, sign-extended for signed types; fields past the end see the sign or zero."""
    width = 8 * a.dtype.itemsize
    position, length = position & np.uint32(255), length & np.uint32(255)
    value = _unsigned(shift_right(a, position)) & _ones(length, f"u{a.dtype.itemsize}")
    if a.dtype.kind == "u":
        return value
    top = np.minimum(position.astype("i4") + length.astype("i4") - 1, width - 1)
    negative = (_unsigned(a) >> np.maximum(top, 0).astype(f"u{a.dtype.itemsize}") & np.uint8(1)) != 0
    filled = value | ~_ones(length, f"u{a.dtype.itemsize}")
    return np.where(length == 0, 0, np.where(negative, filled, value)).astype(f"u{a.dtype.itemsize}").view(a.dtype)


def insert_field(a: Array, b: Array, position: Array, length: Array) -> Array:
    """The bits of b, with `length` of them from bit `position` on replaced by the low bits of a."""
    dtype = np.asarray(b).dtype
    position, length = position & np.uint32(255), length & np.uint32(255)
    mask = shift_left(_ones(length, dtype), position)
    return (b & ~mask) | (shift_left(np.asarray(a), position) & mask)


def bit_mask(position: Array, length: Array, wrap: bool) -> Array:
    """A mask of `length` bits from bit `position` on."""
    if wrap:
        position, length = position & np.uint32(31), length & np.uint32(31)
    return shift_left(_ones(length, "u4"), position)


def extend_field(a: Array, count: Array, wrap: bool) -> Array:
    """The low `count` bits, sign- or zero-extended."""
    if wrap:
        count = count & np.uint32(31)
    return extract_field(a, np.zeros_like(count), np.minimum(count, np.uint32(32)))


def _bytes(a: Array, signed: bool) -> Array:
    parts = np.ascontiguousarray(a).reshape(-1, 1).view("i1" if signed else "u1")
    return parts.astype("i4")


def dp4a(a: Array, b: Array, signed: tuple[bool, bool]) -> Array:
    """Dot product of four bytes."""
    return (_bytes(a, signed[0]) * _bytes(b, signed[1])).sum(axis=1, dtype="i4").view("u4")


def dp2a(a: Array, b: Array, signed: tuple[bool, bool], high: bool) -> Array:
    """Dot product of two 16-bit halves with two bytes of b, the upper ones where `high`."""
    halves = np.ascontiguousarray(a).reshape(-1, 1).view("i2" if signed[0] else "u2").astype("i4")
    chosen = _bytes(b, signed[1])[:, 2:] if high else _bytes(b, signed[1])[:, :2]
    return (halves * chosen).sum(axis=1, dtype="i4").view("u4")


def lop3(a: Array, b: Array, c: Array, table: int) -> Array:
    """The function whose value for bits (a, b, c) is bit 4a + 2b + c of the table."""
    total = np.zeros_like(a)
    for row in range(8):
        if table >> row & 1:
            total = total | (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
    return total


def funnel_shift(a: Array, b: Array, amount: Array, left: bool, wrap: bool) -> Array:
    """The upper word of (b:a) << amount, or the lower word of (b:a) >> amount."""
    amount = (amount & np.uint32(31) if wrap else np.minimum(amount, np.uint32(32))).astype("u8")
    pair = np.asarray(b).astype("u8") << np.uint64(32) | np.asarray(a).astype("u8")
    return (pair << amount >> np.uint64(32) if left else pair >> amount).astype("u4")


def permute(a: Array, b: Array, selector: Array, mode: str) -> Array:
    """prmt: picks four bytes of (b:a) by the selector's nibbles, or by one of the fixed modes."""
    pair = np.asarray(b).astype("u8") << np.uint64(32) | np.asarray(a).astype("u8")
    total = np.zeros(pair.shape, "u8")
    for place in range(4):
        if mode == "default":
            nibble = np.asarray(selector).astype("u8") >> np.uint64(4 * place) & np.uint64(15)
            byte = pair >> (nibble & np.uint64(7)) * np.uint64(8) & np.uint64(255)
            byte = np.where(nibble & np.uint64(8), (byte >> np.uint64(7)) * np.uint64(255), byte)
        else:
            chosen = np.array(_PERMUTE[mode], "u8")[:, place][np.asarray(selector) & np.uint32(3)]
            byte = pair >> chosen * np.uint64(8) & np.uint64(255)
        total = total | byte << np.uint64(8 * place)
    return total.astype("u4")


def pack(parts: list[Array], dtype: Any, g: Any) -> Array:
    """Registers side by side in a wider one, the first lowest."""
    return np.ascontiguousarray(np.stack([np.broadcast_to(x, g.n) for x in parts], axis=1)).view(dtype).reshape(-1)


def unpack(a: Array, dtype: Any, count: int, g: Any) -> Array:
    """A register cut into `count` narrower ones: (count, lanes)."""
    parts = np.ascontiguousarray(np.broadcast_to(a, g.n)).reshape(-1, 1).view(dtype)
    return np.ascontiguousarray(parts.reshape(-1, count).T)


# Bytes 0 to 3 of the result by selector 0 to 3 (PTX ISA, prmt, table of modes).
_PERMUTE = {
    "f4e": ((0, 1, 2, 3), (1, 2, 3, 4), (2, 3, 4, 5), (3, 4, 5, 6)),
    "b4e": ((0, 7, 6, 5), (1, 0, 7, 6), (2, 1, 0, 7), (3, 2, 1, 0)),
    "rc8": ((0, 0, 0, 0), (1, 1, 1, 1), (2, 2, 2, 2), (3, 3, 3, 3)),
    "ecl": ((0, 1, 2, 3), (1, 1, 2, 3), (2, 2, 2, 3), (3, 3, 3, 3)),
    "ecr": ((0, 0, 0, 0), (0, 1, 1, 1), (0, 1, 2, 2), (0, 1, 2, 3)),
    "rc16": ((0, 1, 0, 1), (2, 3, 2, 3), (0, 1, 0, 1), (2, 3, 2, 3)),
}

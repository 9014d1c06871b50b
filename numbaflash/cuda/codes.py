"""Codes of quantized keys and values: how pages of them lie, how lanes share a row, and how a code becomes a float.

A code c of n bits goes into the upper bits of a float's mantissa: that float is x = 1 + c / 2^n, for a shift and one
logical operation, where a conversion would take the slowest pipe. So an element, scale * c + offset, is a x + b with

    a = 2^n scale,  b = offset - a,

and whatever is said of codes, scales and offsets elsewhere is done here with x, a and b. No precision is lost: x is
exact, and |b| is of the size of the elements' range.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from llvmlite import ir
from numba import cuda
from numba.cuda import types

from . import ptx
from .ptx import B32, B64, F32, constant, device_intrinsic
from .row_elements import PIECE, RowShare
from .tile import Registers

__all__ = [
    "CodeFormat",
    "CodeShare",
    "expand_codes",
    "first_element",
    "load_channel_factors",
    "load_codes",
    "load_token_factors",
    "place_of_piece",
]

_LANE_BYTES = 8
_ONE = 0x3F800000
_MANTISSA_BITS = 23


@dataclass(frozen=True)
class CodeFormat:
    """What kernels know of a page of codes; `numbaflash.cpu.Codes` says what its fields mean.

    Attributes:
        bits: Of a code, 8 or 4.
        key_group: Elements of a key that share a scale; 0: each channel has one for all tokens of the page.
        value_group: Elements of a value that share a scale.
        symmetric: There are no offsets.
        page_size: Tokens of a page.
        codes_nbytes: Bytes of the codes of one head's keys, or values; scales follow, then offsets.
        key_nbytes: Bytes of one head's keys with their scales; the heads' keys follow each other.
        value_nbytes: Bytes of one head's values with their scales; they follow the keys of all heads.
    """

    bits: int
    key_group: int
    value_group: int
    symmetric: bool
    page_size: int
    codes_nbytes: int
    key_nbytes: int
    value_nbytes: int

    @classmethod
    def of(cls, pages: object) -> CodeFormat:
        """Return what kernels know of pages, given a `numbaflash.cache.page_format.PageFormat`."""
        return cls(**{field.name: getattr(pages, field.name) for field in fields(cls)})


@dataclass(frozen=True)
class CodeShare:
    """What a lane has of a row of codes: 8 bytes of it.

    That is a piece of 8 elements where codes have 8 bits. Where they have 4, it is one of the first 16 elements of a
    block of 32, and the one 16 further on.

    Attributes:
        head_dim: Elements of a row, a multiple of 32.
        bits: Of a code.
    """

    head_dim: int
    bits: int

    @property
    def elements(self) -> int:
        """Elements of a lane."""
        return 8 * _LANE_BYTES // self.bits

    @property
    def holders(self) -> int:
        """Lanes that have elements."""
        return self.head_dim // self.elements

    @property
    def lanes(self) -> int:
        """Lanes that share the row: a power of two, so that a warp has whole rows, and adds them up by butterflies."""
        return 1 << (self.holders - 1).bit_length()

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return self.head_dim * self.bits // 8

    @property
    def floats(self) -> RowShare:
        """The lane's share of the same row in floats, from its first element on."""
        return RowShare(2 * self.elements // PIECE, PIECE, 2)


def first_element(share: CodeShare) -> Any:
    """Return a device function (lane) -> the first of its elements."""
    BLOCKED = share.bits == 4

    @cuda.jit(device=True, inline="always")  # a call would make Numba ask for a GPU
    def first(lane):
        return lane // 2 * 32 + lane % 2 * PIECE if BLOCKED else lane * PIECE

    return first


def place_of_piece(share: CodeShare) -> Any:
    """Return a device function (first element of a piece) -> the lane that has the piece, and where among its own."""
    BLOCKED = share.bits == 4

    @cuda.jit(device=True, inline="always")
    def place(element):
        if BLOCKED:
            return element // 32 * 2 + element // PIECE % 2, element % 32 // 16 * PIECE
        return element // PIECE, element * 0

    return place


def load_codes(share: CodeShare, rows: Sequence[int]) -> Any:
    """Return a device function (address of the lane's codes, array) that loads those of some rows from there on.

    A row's are two words; the address is aligned to 8 bytes.
    """

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, values: Any) -> None:
        target = Registers(context, builder, signature.args[1], values[1])
        for i, row in enumerate(rows):
            words = ptx.load_global_2b32.emit(builder, values[0], row * share.row_bytes)
            target[2 * i], target[2 * i + 1] = words
        target.store()

    return device_intrinsic(emit, [B64.numba, None], types.void)


def expand_codes(share: CodeShare) -> Any:
    """Return a device function (first word, second word, array) that writes x of a lane's elements of one token."""
    bits = share.bits
    mask, top = constant(B32, ((1 << bits) - 1) << (_MANTISSA_BITS - bits)), _MANTISSA_BITS - bits

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, values: Any) -> None:
        target = Registers(context, builder, signature.args[2], values[2])
        for byte in range(_LANE_BYTES):
            word, lowest = values[byte // 4], 8 * (byte % 4)
            for index, at in ((byte, lowest),) if bits == 8 else ((byte, lowest), (byte + PIECE, lowest + 4)):
                move, distance = (builder.shl, top - at) if at < top else (builder.lshr, at - top)
                x = builder.or_(builder.and_(move(word, constant(B32, distance)), mask), constant(B32, _ONE))
                target[index] = builder.bitcast(x, F32.llvm)
        target.store()

    return device_intrinsic(emit, [B32.numba, B32.numba, None], types.void)


def load_token_factors(pages: CodeFormat, rows: Sequence[int], successive: int, groups: int) -> Any:
    """Return a device function (address of the first row's scale, a, b) that loads a and b of a group of some rows.

    Args:
        pages: What holds them.
        rows: From the first one on.
        successive: 1, 2, 4 or 8: so many rows at a time follow each other, and begin at a multiple of that.
        groups: Of a row.
    """
    pieces = [(2 * row, successive) for row in rows[::successive]]
    return _load_factors(pages, pieces, 2 * groups * pages.page_size)


def load_channel_factors(pages: CodeFormat, head_dim: int, share: RowShare) -> Any:
    """Return a device function (address of the first one's scale, a, b) that loads those of a lane's channels."""
    pieces = [(2 * share.chunk * share.lanes * i, share.chunk) for i in range(share.chunks_each)]
    return _load_factors(pages, pieces, 2 * head_dim)


def _load_factors(pages: CodeFormat, pieces: Sequence[tuple[int, int]], offsets_behind: int) -> Any:
    """The function that loads float16 numbers, so many at each of some offsets, and offsets so many bytes behind."""

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, values: Any) -> None:
        a, b = (Registers(context, builder, signature.args[i], values[i]) for i in (1, 2))

        def load(behind: int) -> list[ir.Value]:
            return [number for at, count in pieces for number in _load_halves(builder, values[0], behind + at, count)]

        scales, offsets = load(0), [] if pages.symmetric else load(offsets_behind)
        for i, scale in enumerate(scales):
            a[i] = builder.fmul(scale, constant(F32, float(1 << pages.bits)))
            # A symmetric offset is -2^(bits - 1) scales, half of a.
            b[i] = builder.fsub(offsets[i], a[i]) if offsets else builder.fmul(a[i], constant(F32, -1.5))
        a.store()
        b.store()

    return device_intrinsic(emit, [B64.numba, None, None], types.void)


def _load_halves(builder: ir.IRBuilder, address: ir.Value, at: int, count: int) -> list[ir.Value]:
    """Emit the load of 1, 2, 4 or 8 successive float16, widened."""
    if count == 1:
        return [ptx.f16_to_f32.emit(builder, ptx.load_global_b16.emit(builder, _moved(builder, address, at)))]
    if count == 2:
        words = [ptx.load_global_b32.emit(builder, _moved(builder, address, at))]
    else:
        words = (ptx.load_global_2b32 if count == 4 else ptx.load_global_4b32).emit(builder, address, at)
    return [number for word in words for number in ptx.unpack_f16.emit(builder, word)]


def _moved(builder: ir.IRBuilder, address: ir.Value, at: int) -> ir.Value:
    return builder.add(address, constant(B64, at))

"""Rows of arrays in global memory and float registers: vector loads and stores, with the conversions of each dtype.

A row is shared by lanes: each has every `lanes`-th chunk of it, and in its registers the elements of its chunks, one
chunk behind the other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llvmlite import ir
from numba.cuda import types

from . import ptx
from .ptx import B32, B64, F32, device_intrinsic
from .tile import CHUNK, Registers

__all__ = ["IN_ORDER", "PIECE", "RowShare", "halved", "itemsize", "load_elements", "round_elements", "store_elements"]


def itemsize(dtype: str) -> int:
    """Return the bytes of an element."""
    return 4 if dtype == "float32" else 2


@dataclass(frozen=True)
class RowShare:
    """What a lane has of a row.

    Attributes:
        chunks: Chunks of the row.
        chunk: Successive elements of a chunk.
        lanes: Lanes that share the row.
    """

    chunks: int
    chunk: int
    lanes: int

    @classmethod
    def of(cls, columns: int, dtype: str) -> RowShare:
        """Return how lanes of a warp share a row of a dtype, a chunk being 16 bytes.

        The lanes are a power of two, so that a warp has whole rows, and sums over them by butterflies.
        """
        chunk = CHUNK // itemsize(dtype)
        chunks = columns // chunk
        return cls(chunks, chunk, min(32, 1 << (chunks - 1).bit_length()))

    @property
    def chunks_each(self) -> int:
        """Chunks of a lane."""
        return -(-self.chunks // self.lanes)

    @property
    def elements(self) -> int:
        """Elements of a lane."""
        return self.chunks_each * self.chunk

    @property
    def even(self) -> bool:
        """Every lane has as many chunks as the others, so that none need ask whether its own exist."""
        return self.chunks == self.lanes * self.chunks_each


PIECE = 8
"""Successive elements of a row that a thread has where it does not share the row with a group of lanes."""
IN_ORDER = RowShare(1, PIECE, 1)
"""A thread's piece."""


def halved(columns: int) -> RowShare:
    """Return a thread's piece of a float32 row that has the second halves of all pieces behind the first ones.

    In order, a piece would be two accesses, each of which leaves out every other 16 bytes of what the warp touches.
    """
    return RowShare(2 * columns // PIECE, PIECE // 2, columns // PIECE)


def load_elements(share: RowShare, dtype: str) -> Any:
    """Return a device function (address of the lane's first chunk, array) that loads a lane's share, widened to float.

    Chunks are aligned to their size, or to 16 bytes where they are larger.
    """
    per_chunk = share.chunk * itemsize(dtype)

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, values: Any) -> None:
        address, array = values
        target = Registers(context, builder, signature.args[1], array)
        for chunk in range(share.chunks_each):
            words: list[ir.Value] = []
            while 4 * len(words) < per_chunk:
                wide = per_chunk - 4 * len(words) >= CHUNK
                load = ptx.load_global_4b32 if wide else ptx.load_global_2b32
                words += load.emit(builder, address, chunk * share.lanes * per_chunk + 4 * len(words))
            for i, element in enumerate(_widened(builder, words, dtype)):
                target[chunk * share.chunk + i] = element
        target.store()

    return device_intrinsic(emit, [B64.numba, None], types.void)


def store_elements(share: RowShare, dtype: str) -> Any:
    """Return a device function (address, array) that stores what `load_elements` loads, rounded to the dtype."""
    per_chunk = share.chunk * itemsize(dtype)

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, values: Any) -> None:
        address, array = values
        source = Registers(context, builder, signature.args[1], array)
        for chunk in range(share.chunks_each):
            words = _rounded(builder, [source[chunk * share.chunk + i] for i in range(share.chunk)], dtype)
            at = chunk * share.lanes * per_chunk
            while words:
                store, count = (ptx.store_global_4b32, 4) if len(words) >= 4 else (ptx.store_global_2b32, 2)
                store.emit(builder, address, *words[:count], at)
                words, at = words[count:], at + 4 * count

    return device_intrinsic(emit, [B64.numba, None], types.void)


def round_elements(share: RowShare, dtype: str) -> Any:
    """Return a device function (array) that rounds a lane's share to a dtype, in place."""

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, values: Any) -> None:
        array = Registers(context, builder, signature.args[0], values[0])
        words = _rounded(builder, [array[i] for i in range(share.elements)], dtype)
        for i, element in enumerate(_widened(builder, words, dtype)):
            array[i] = element
        array.store()

    return device_intrinsic(emit, [None], types.void)


def _widened(builder: ir.IRBuilder, words: list[ir.Value], dtype: str) -> list[ir.Value]:
    if dtype == "float32":
        return [builder.bitcast(word, F32.llvm) for word in words]
    unpack = ptx.unpack_bf16 if dtype == "bfloat16" else ptx.unpack_f16
    return [element for word in words for element in unpack.emit(builder, word)]


def _rounded(builder: ir.IRBuilder, elements: list[ir.Value], dtype: str) -> list[ir.Value]:
    if dtype == "float32":
        return [builder.bitcast(element, B32.llvm) for element in elements]
    pack = ptx.pack_bf16 if dtype == "bfloat16" else ptx.pack_f16
    return [pack.emit(builder, *elements[i : i + 2]) for i in range(0, len(elements), 2)]

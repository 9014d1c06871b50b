"""Rounds keys and values to another dtype and back, where a step has more of a token than its page will hold."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import cuda, float32, int32, int64
from numba.cuda import types

from numbaflash.device_arrays import DeviceArray

from . import ptx
from .row_elements import IN_ORDER, PIECE, itemsize, load_elements, round_elements, store_elements

__all__ = ["RoundRows"]


@dataclass(frozen=True)
class RoundRows:
    """The kernel, and how it is launched: a thread for each piece of a row of a (batch, tokens, heads, dim) array.

    Rows are multiples of 8 elements and begin at multiples of 16 bytes; the target is contiguous.

    Attributes:
        dtype: Of the array and of the target.
        through: What it is rounded to.
    """

    dtype: str
    through: str

    threads = 256
    blocks = 4
    shared_bytes = 0

    @property
    def signature(self) -> Any:
        """Numba's signature of the kernel."""
        return types.void(*[int64] * 6, *[int32] * 3)

    def grid(self, source: DeviceArray) -> int:
        """Return the blocks of a launch."""
        return -(-int(np.prod(source.shape)) // PIECE // self.threads)

    def arguments(self, source: DeviceArray, target: DeviceArray) -> list[np.generic]:
        """Return the kernel's arguments."""
        _, tokens, heads, length = source.shape
        pieces = int(np.prod(source.shape)) // PIECE
        return [
            *map(np.int64, (source.address, *source.strides[:3], target.address, pieces)),
            *map(np.int32, (tokens, heads, length // PIECE)),
        ]

    def kernel(self) -> Callable[..., None]:
        """Return the kernel, for Numba to compile with `signature`."""
        THREADS, PIECE_BYTES = self.threads, PIECE * itemsize(self.dtype)
        load, round_piece, store = (
            load_elements(IN_ORDER, self.dtype), round_elements(IN_ORDER, self.through),
            store_elements(IN_ORDER, self.dtype),
        )  # fmt: skip

        def round_rows(source, from_batch, from_token, from_head, target, count, tokens, heads, row_pieces):
            piece = int64(ptx.block_x()) * THREADS + ptx.thread_x()
            if piece < count:
                row = piece // row_pieces
                batch, token, head = row // (int64(tokens) * heads), row // heads % tokens, row % heads
                origin = source + batch * from_batch + token * from_token + head * from_head
                values = cuda.local.array(PIECE, float32)
                load(origin + (piece - row * row_pieces) * PIECE_BYTES, values)
                round_piece(values)
                store(target + piece * PIECE_BYTES, values)

        return round_rows

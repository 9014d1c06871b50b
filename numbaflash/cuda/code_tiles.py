"""Tiles of keys and values in shared memory as float16, made of codes: loaded into registers, computed, and stored.

What is loaded is under way while the tensor cores work on the tile before; the block's threads hold it as codes, in a
quarter or half of the registers that the elements would take.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from llvmlite import ir
from numba import cuda, float32, int32, int64
from numba.cuda import types

from . import ptx
from .codes import (
    CodeFormat,
    CodeShare,
    expand_codes,
    first_element,
    load_channel_factors,
    load_codes,
    load_token_factors,
    place_of_piece,
)
from .paged_keys import RECORD_AT
from .ptx import B32, constant, device_intrinsic
from .row_elements import IN_ORDER, PIECE
from .tile import Registers, SharedTile, at_chunk

__all__ = ["CodeTiles", "TileMoves", "store_piece"]


class TileMoves(NamedTuple):
    """Device functions that bring a tile of keys, or of values, to shared memory.

    `load` takes the address of the record, the number of the tile's first key, the KV head and how many of them there
    are, and arrays of `words` integers and twice `factors` floats; `store` the start of shared memory and those arrays.
    All threads of the block call both; `store` may wait for all.
    """

    load: Any
    store: Any
    words: int
    factors: int


@dataclass(frozen=True)
class CodeTiles:
    """How the threads of a block share a tile: groups of lanes have rows, each some successive ones, again and again.

    Attributes:
        pages: What codes are read from; of as many tokens as a tile, or more.
        head_dim: Elements of a row.
        threads: Of the block.
        tokens: Of a tile.
    """

    pages: CodeFormat
    head_dim: int
    threads: int
    tokens: int

    @property
    def factors_nbytes(self) -> int:
        """Bytes of shared memory that the factors of channels take."""
        return 2 * 4 * self._factors_pitch if self.pages.key_group == 0 else 0

    def keys(self, tile: SharedTile, factors_offset: int) -> TileMoves:
        """Return what moves keys to a tile; factors of channels are exchanged in shared memory, from an offset on."""
        if self.pages.key_group:
            return self._moves(tile, self.pages.key_group, values=False)
        return self._moves_by_channel(tile, factors_offset // 4)

    def values(self, tile: SharedTile) -> TileMoves:
        """Return what moves values to a tile."""
        return self._moves(tile, self.pages.value_group, values=True)

    @property
    def _share(self) -> CodeShare:
        return CodeShare(self.head_dim, self.pages.bits)

    @property
    def _groups(self) -> int:
        return self.threads // self._share.lanes

    @property
    def _successive(self) -> int:
        """Successive rows of a group: their scales are one load."""
        return min(8, self.tokens // self._groups)

    @property
    def _rows(self) -> list[int]:
        """Rows of a group, from its first one on."""
        at_once = self._successive * self._groups
        return [row + i for row in range(0, self.tokens, at_once) for i in range(self._successive)]

    @property
    def _factors_pitch(self) -> int:
        """Floats of a factor of all channels. A lane's lie at the same distance from the next lane's, in two halves."""
        share = self._share
        return (share.elements + share.elements // PIECE - 1) * share.holders

    def _load_rows(self, *, values: bool) -> Any:
        """Return a device function (record, number, kv_head, kv_heads, words) that loads a lane's codes.

        It returns the address of the head's codes in the page, and the group's first row there. Lanes that have nothing
        load what the last one has: an array that were not written might need registers all through the loop.
        """
        share, pages, N = self._share, self.pages, self._successive
        PAGE, KEY_BYTES, VALUE_BYTES, VALUES, LANES, HOLDERS, ROW_BYTES = (
            pages.page_size, pages.key_nbytes, pages.value_nbytes, values, share.lanes, share.holders, share.row_bytes
        )  # fmt: skip
        load_words = load_codes(share, self._rows)

        @cuda.jit(device=True, inline="always")  # a call would make Numba ask for a GPU
        def load(record, number, kv_head, kv_heads, words):
            page = ptx.load_global_b32(record + RECORD_AT.first_page) + number // PAGE
            table = ptx.load_global_b64(record + RECORD_AT.code_table)
            slots = ptx.load_global_b32(record + RECORD_AT.code_slots)
            codes = ptx.load_global_b64(table + 8 * int64(page % slots))
            if VALUES:
                codes += kv_heads * int64(KEY_BYTES) + kv_head * int64(VALUE_BYTES)
            else:
                codes += kv_head * int64(KEY_BYTES)
            row = ptx.thread_x() // LANES * N + number % PAGE
            load_words(codes + row * ROW_BYTES + min(ptx.thread_x() & (LANES - 1), HOLDERS - 1) * 8, words)
            return codes, row

        return load

    def _moves(self, tile: SharedTile, group: int, *, values: bool) -> TileMoves:
        share, pages, rows = self._share, self.pages, self._rows
        LANES, HOLDERS, CODES_BYTES, PAGE, GROUP = (
            share.lanes, share.holders, pages.codes_nbytes, pages.page_size, group
        )  # fmt: skip
        load_rows, first_of = self._load_rows(values=values), first_element(share)
        load_scales = load_token_factors(pages, rows, self._successive, self.head_dim // group)

        @cuda.jit(device=True, inline="always")
        def load(record, number, kv_head, kv_heads, words, a, b):
            codes, row = load_rows(record, number, kv_head, kv_heads, words)
            own = min(ptx.thread_x() & (LANES - 1), HOLDERS - 1)
            load_scales(codes + CODES_BYTES + 2 * (first_of(own) // GROUP * PAGE + row), a, b)

        return TileMoves(load, self._write(tile, by_channel=False), 2 * len(rows), len(rows))

    def _moves_by_channel(self, tile: SharedTile, factors_at: int) -> TileMoves:
        """As `_moves`; each factor is loaded by one thread, and passed on."""
        share, pages = self._share, self.pages
        LANES, HOLDERS, CODES_BYTES, E = share.lanes, share.holders, pages.codes_nbytes, share.elements
        PIECES, AT, PITCH = self.head_dim // PIECE, factors_at, self._factors_pitch
        load_rows, place_of = self._load_rows(values=False), place_of_piece(share)
        load_piece = load_channel_factors(pages, self.head_dim, IN_ORDER)
        write = self._write(tile, by_channel=True)

        @cuda.jit(device=True, inline="always")
        def load(record, number, kv_head, kv_heads, words, a, b):
            codes, _ = load_rows(record, number, kv_head, kv_heads, words)
            for i in range(PIECE):
                a[i] = b[i] = float32(0)
            if ptx.thread_x() < PIECES:
                load_piece(codes + CODES_BYTES + ptx.thread_x() * (2 * PIECE), a, b)

        @cuda.jit(device=True, inline="always")
        def store(shared, words, a, b):
            floats = cuda.shared.array(0, float32)
            if ptx.thread_x() < PIECES:
                holder, first = place_of(ptx.thread_x() * PIECE)
                for i in range(PIECE):
                    at = AT + (first + first // PIECE + i) * HOLDERS + holder
                    floats[at], floats[at + PITCH] = a[i], b[i]
            cuda.syncthreads()
            own_a, own_b = cuda.local.array(E, float32), cuda.local.array(E, float32)
            own = min(ptx.thread_x() & (LANES - 1), HOLDERS - 1)
            for i in range(E):
                at = AT + (i + i // PIECE) * HOLDERS + own
                own_a[i], own_b[i] = floats[at], floats[at + PITCH]
            write(shared, words, own_a, own_b)

        return TileMoves(load, store, 2 * len(self._rows), PIECE)

    def _write(self, tile: SharedTile, *, by_channel: bool) -> Any:
        """Return a device function (shared, words, a, b) that computes a lane's elements and writes them to the tile.

        Its factors are of the lane's channels, or of its rows.
        """
        share, chunk = self._share, at_chunk(tile)
        E, LANES, HOLDERS, ROWS, GROUPS, N, BY_CHANNEL, ONE = (
            share.elements, share.lanes, share.holders, len(self._rows), self._groups, self._successive, by_channel,
            share.elements == PIECE,
        )  # fmt: skip
        expand, first_of, store_one, store_two = expand_codes(share), first_element(share), store_piece, _store_pieces

        @cuda.jit(device=True, inline="always")
        def write(shared, words, a, b):
            X = cuda.local.array(E, float32)
            own, first_row = ptx.thread_x() & (LANES - 1), ptx.thread_x() // LANES * N
            if own < HOLDERS:
                at = first_of(own) // PIECE
                # Were all lanes to write their first pieces at once, only every other pair of chunks would be written.
                turned = (own >> 2) & 1
                for i in range(ROWS):
                    row = int32(first_row + i // N * (N * GROUPS) + i % N)
                    expand(words[2 * i], words[2 * i + 1], X)
                    for j in range(E):
                        factor = j if BY_CHANNEL else i
                        X[j] = X[j] * a[factor] + b[factor]
                    if ONE:
                        store_one(chunk(shared, row, int32(at)), X)
                    else:
                        one, other = at + 2 * turned, at + 2 - 2 * turned
                        store_two(chunk(shared, row, int32(one)), chunk(shared, row, int32(other)), int32(turned), X)

        return write


def _packed(context: Any, builder: ir.IRBuilder, kind: Any, value: ir.Value, first: int) -> list[ir.Value]:
    """8 floats of an array from `first` on, rounded to float16: 4 words."""
    array = Registers(context, builder, kind, value)
    return [ptx.pack_f16.emit(builder, array[i], array[i + 1]) for i in range(first, first + PIECE, 2)]


def _emit_piece(context: Any, builder: ir.IRBuilder, signature: Any, values: Any) -> None:
    ptx.store_shared_4b32.emit(builder, values[0], *_packed(context, builder, signature.args[1], values[1], 0))


def _emit_pieces(context: Any, builder: ir.IRBuilder, signature: Any, values: Any) -> None:
    one, other, turned, array = values
    first, second = (_packed(context, builder, signature.args[3], array, at) for at in (0, PIECE))
    swap = builder.icmp_signed("!=", turned, constant(B32, 0))
    for address, unturned, instead in ((one, first, second), (other, second, first)):
        words = [builder.select(swap, b, a) for a, b in zip(unturned, instead, strict=True)]
        ptx.store_shared_4b32.emit(builder, address, *words)


store_piece = device_intrinsic(_emit_piece, [B32.numba, None], types.void)
"""A device function (address, array) that stores 8 floats in shared memory as float16."""
_store_pieces = device_intrinsic(_emit_pieces, [B32.numba, B32.numba, B32.numba, None], types.void)

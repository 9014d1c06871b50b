"""Where a kernel finds the keys and values that a block of query rows sees: in pages, through a table, and in the step.

A launch serves sequences of any lengths. Queries that see the same pages have a record: all of a sequence's, or, where
pages hold codes, those that stand in one page. Each share of their keys that a block computes is an item of a work
list; both lie in device memory as the structures below say. A step's own tokens are not in the pages yet: they are read
from the caller's arrays.

The keys that a row block sees are numbered without gaps: the sink tokens first, then the window of its oldest row, up
to the position of its newest, or to where the launch ends to look. Where there are codes, their pages' keys come before
these, and the window does not reach beyond the queries' own page.
"""

from __future__ import annotations

from collections import namedtuple
from typing import Any, NamedTuple

import numpy as np
from numba import cuda, int32, int64

from . import ptx

__all__ = [
    "ITEM",
    "ITEM_AT",
    "ITEM_BYTES",
    "RECORD",
    "RECORD_AT",
    "RECORD_BYTES",
    "Listing",
    "Rows",
    "key_address",
    "key_position",
    "list_keys",
    "sees_key",
]

RECORD = np.dtype(
    [
        ("table", np.int64),  # address of the page table: addresses of pages, the sink tokens' first, then the ring's
        ("start", np.int32),  # position of the first query
        ("length", np.int32),  # tokens in the pages
        ("window", np.int32),  # newest tokens that a query sees, its own included
        ("sink_tokens", np.int32),
        ("sink_slots", np.int32),
        ("ring_slots", np.int32),
        ("kept_from", np.int32),  # oldest token of the step, sink tokens apart, that goes into pages
        ("first_partial", np.int32),  # of the sequence's splits
        ("splits", np.int32),
        ("page_shift", np.int32),  # log2 of the tokens of a page
        ("end", np.int32),  # position behind the last key that is looked at
        ("own", np.int32),  # number of the result about the keys behind it (`own_keys`), -1 where there are none
        ("entry", np.int32),  # of q, k, v and out, which is the sequence's
        ("first_query", np.int32),  # of its tokens there
        ("queries", np.int32),  # tokens from there on
        ("code_slots", np.int32),  # of the page table of codes
        ("code_table", np.int64),  # address of that: addresses of pages, page p's in slot p % code_slots
        ("first_page", np.int32),  # of codes that the first query sees, by its number behind the sink tokens
        ("own_page", np.int32),  # that the queries stand in, behind all pages of codes that they see
    ]
)
"""Queries of a launch that see the same pages. That of the first ones of sequence n is number n."""

ITEM = np.dtype([("sequence", np.int32), ("first", np.int32), ("end", np.int32), ("partial", np.int32)])
"""Keys `first` to `end` of record `sequence`, by number; `partial` is where the result goes, -1 where it is whole. An
item without keys, which only fills a grid, has a `partial` that nobody reads."""


def _offsets(structure: np.dtype[Any]) -> Any:
    """Return where each element begins, in bytes, by its name: constants in a kernel."""
    assert structure.fields
    offsets = {name: field[1] for name, field in structure.fields.items()}
    return namedtuple("Offsets", offsets)(**offsets)


RECORD_AT, RECORD_BYTES = _offsets(RECORD), RECORD.itemsize
ITEM_AT, ITEM_BYTES = _offsets(ITEM), ITEM.itemsize


class Rows(NamedTuple):
    """Query rows of a block: all of one KV head, those of a token side by side."""

    first_token: Any
    last_token: Any


class Listing(NamedTuple):
    """The numbered keys of a row block, on the device; positions are int32."""

    table: Any
    start: Any
    length: Any
    window: Any
    sink_tokens: Any
    sink_slots: Any
    ring_slots: Any
    sinks: Any  # how many sink tokens are listed
    first: Any  # position of the first key behind them
    first_page: Any  # of the ring, that this key is in
    first_slot: Any  # of that page
    count: Any
    page_shift: Any


def list_keys() -> Any:
    """Return a device function (address of a `RECORD`, `Rows`) -> `Listing`."""

    @cuda.jit(device=True, inline="always")  # a call would make Numba ask for a GPU
    def listing(record, rows):
        page_shift = ptx.load_global_b32(record + RECORD_AT.page_shift)
        start, length = ptx.load_global_b32(record + RECORD_AT.start), ptx.load_global_b32(record + RECORD_AT.length)
        window = ptx.load_global_b32(record + RECORD_AT.window)
        sink_tokens = ptx.load_global_b32(record + RECORD_AT.sink_tokens)
        sink_slots = ptx.load_global_b32(record + RECORD_AT.sink_slots)
        ring_slots = ptx.load_global_b32(record + RECORD_AT.ring_slots)
        end = min(int32(start + rows.last_token + 1), ptx.load_global_b32(record + RECORD_AT.end))
        sinks = min(sink_tokens, end)
        own_page = ptx.load_global_b32(record + RECORD_AT.own_page)  # 0 where pages hold floats
        first = max(int32(sink_tokens + (own_page << page_shift)), int32(start + rows.first_token - window + 1))
        first_page = int32((first - sink_tokens) >> page_shift)
        return Listing(
            ptx.load_global_b64(record + RECORD_AT.table), start, length, window, sink_tokens, sink_slots, ring_slots,
            sinks, first, first_page, first_page % ring_slots, int32(sinks + max(end - first, int32(0))), page_shift,
        )  # fmt: skip

    return listing


def key_position() -> Any:
    """Return a device function (listing, number) -> position of a listed key."""

    @cuda.jit(device=True, inline="always")
    def position(listing, number):
        return number if number < listing.sinks else number - listing.sinks + listing.first

    return position


def sees_key(*, masked: bool) -> Any:
    """Return a device function (listing, token, behind, position) -> whether a query sees a listed key.

    `token` counts from the first query, and so does `behind`: it is how far the key at `position` lies behind that.

    Args:
        masked: Not every row sees every key; where it does the answer is always yes.
    """
    MASKED = masked

    @cuda.jit(device=True, inline="always")
    def sees(listing, token, behind, position):
        if not MASKED:
            return True
        return behind <= token and (behind > token - listing.window or position < listing.sink_tokens)

    return sees


def key_address(row_bytes: int) -> Any:
    """Return a device function (listing, position, kv_head) -> address of a key that lies in a page.

    Args:
        row_bytes: Of a key, and of a value.
    """

    @cuda.jit(device=True, inline="always")
    def address(listing, position, kv_head):
        page_shift = listing.page_shift
        token = position if position < listing.sink_tokens else position - listing.sink_tokens
        slot = token >> page_shift
        if position >= listing.sink_tokens:
            slot += listing.first_slot - listing.first_page
            if slot >= listing.ring_slots:
                slot -= listing.ring_slots
            slot += listing.sink_slots
        page = ptx.load_global_b64(listing.table + 8 * int64(slot))
        return page + ((kv_head << page_shift) + (token & ((1 << page_shift) - 1))) * int64(row_bytes)

    return address

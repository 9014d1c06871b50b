"""The ring of pages, compiled: which runs of tokens are visible, and tokens into pages and out of them.

These are a few additions for each page, but they run once for each layer and token; in Python they took longer than the
attention of a short sequence.
"""

from __future__ import annotations

from .jit import kernel, native
from .record import Record, record_at
from .runs import (
    COUNT,
    K_ADDRESS,
    K_HEAD_STRIDE,
    K_TOKEN_STRIDE,
    RUN_FIELDS,
    START,
    V_ADDRESS,
    V_HEAD_STRIDE,
    V_TOKEN_STRIDE,
)
from .vector import copy_bytes, load_int, store_int

__all__ = ["RingRecord", "gather_tokens", "list_rings", "list_stretches", "ring_at", "scatter_tokens", "store_run"]

_ROW = 8 * RUN_FIELDS


class RingRecord(
    Record,
    integers=(
        *("pages", "page_size", "sink_tokens", "sink_slots", "ring_slots", "kv_heads", "row_bytes"),
        *("window", "ring_tokens", "length"),
    ),
):
    """A layer's ring, as the functions below see it; see `cache.layout.RingLayout`.

    `pages` is the address of the page table: for each slot, sinks first, the address of its page's keys. A page holds
    (kv_heads, page_size) rows of keys, then as many rows of values. `length` is that of the tokens seen.
    """


ring_at = record_at(RingRecord.dtype)
_LENGTH = RingRecord.offset_of("length")


@native
def _stretch_end(page_size, behind, position, stop):
    """The end of the tokens from `position` on that lie in one page; `behind` is the first position of any page."""
    return min(behind + ((position - behind) // page_size + 1) * page_size, stop)


@native
def _keys_at(ring, position):
    """Address of the first head's key at a position."""
    if position < ring.sink_tokens:
        slot, inside = position // ring.page_size, position % ring.page_size
    else:
        token = position - ring.sink_tokens
        slot, inside = ring.sink_slots + token // ring.page_size % ring.ring_slots, token % ring.page_size
    return load_int(ring.pages + 8 * slot) + inside * ring.row_bytes


@native
def _next_stretch(ring, position, stop):
    """The end of the tokens from `position` on that lie side by side in a page."""
    if position < ring.sink_tokens:
        return _stretch_end(ring.page_size, 0, position, min(stop, ring.sink_tokens))
    return _stretch_end(ring.page_size, ring.sink_tokens, position, stop)


@native
def store_run(row, keys, values, start, count, k_token, k_head, v_token, v_head):
    """Write a row of `KVRuns.table`."""
    store_int(row + 8 * K_ADDRESS, keys)
    store_int(row + 8 * V_ADDRESS, values)
    store_int(row + 8 * START, start)
    store_int(row + 8 * COUNT, count)
    store_int(row + 8 * K_TOKEN_STRIDE, k_token)
    store_int(row + 8 * K_HEAD_STRIDE, k_head)
    store_int(row + 8 * V_TOKEN_STRIDE, v_token)
    store_int(row + 8 * V_HEAD_STRIDE, v_head)


@native
def list_stretches(ring, position, stop, row):
    """Write a run for each stretch from `position` to `stop`; the address behind the last one."""
    head_stride = ring.page_size * ring.row_bytes
    while position < stop:
        end = _next_stretch(ring, position, stop)
        keys = _keys_at(ring, position)
        values = keys + ring.kv_heads * head_stride
        store_run(row, keys, values, position, end - position, ring.row_bytes, head_stride, ring.row_bytes, head_stride)
        row += _ROW
        position = end
    return row


@kernel
def list_rings(
    rings,
    sequences,
    queries,
    new,
    keys,
    k_sequence,
    k_token,
    k_head,
    values,
    v_sequence,
    v_token,
    v_head,
    sides,
    bounds,
    table,
):
    """Write what the last `queries` tokens of each ring see: rows of `Visibility`, and `KVRuns.bounds` and `table`.

    Args:
        rings: Address of the addresses of
        sequences: so many RingRecords.
        queries: Tokens of each whose queries they are.
        new: How many tokens of each are in no ring yet; all of them queries.
        keys: Address of the first new token's first key,
        k_sequence: bytes from there to the next sequence's,
        k_token: to the next token's,
        k_head: and to the next head's.
        values: Of the values,
        v_sequence: likewise,
        v_token: likewise,
        v_head: likewise.
        sides: Address of `Visibility.rows`.
        bounds: Address of `KVRuns.bounds`.
        table: Address of `KVRuns.table`; a ring takes a row for each of its slots and three more at most.

    Returns:
        The number of rows.
    """
    row = table
    store_int(bounds, 0)
    for n in range(sequences):
        ring = ring_at(load_int(rings + 8 * n))
        length = ring.length
        start = length + new - queries
        store_int(sides + 8 * n, start)
        store_int(sides + 8 * (sequences + n), ring.window - 1)
        store_int(sides + 8 * (2 * sequences + n), 0)
        store_int(sides + 8 * (3 * sequences + n), ring.sink_tokens)
        row = list_stretches(ring, 0, min(ring.sink_tokens, length), row)
        row = list_stretches(ring, max(ring.sink_tokens, start - ring.window + 1), length, row)
        if new > 0:
            k, v = keys + n * k_sequence, values + n * v_sequence
            store_run(row, k, v, length, new, k_token, k_head, v_token, v_head)
            row += _ROW
        store_int(bounds + 8 * (n + 1), (row - table) // _ROW)
    return (row - table) // _ROW


@native
def _copy_tokens(ring, start, stop, keys, k_token, k_head, values, v_token, v_head, into_pages):
    """Copy the tokens `start` to `stop`, whose first one lies at `keys` and `values`, into the pages or out of them."""
    position = start
    head_stride = ring.page_size * ring.row_bytes
    while position < stop:
        end = _next_stretch(ring, position, stop)
        k_page = _keys_at(ring, position)
        v_page = k_page + ring.kv_heads * head_stride
        for token in range(position, end):
            k, v = keys + (token - start) * k_token, values + (token - start) * v_token
            for head in range(ring.kv_heads):
                at = head * head_stride + (token - position) * ring.row_bytes
                if into_pages:
                    copy_bytes(k_page + at, k + head * k_head, ring.row_bytes)
                    copy_bytes(v_page + at, v + head * v_head, ring.row_bytes)
                else:
                    copy_bytes(k + head * k_head, k_page + at, ring.row_bytes)
                    copy_bytes(v + head * v_head, v_page + at, ring.row_bytes)
        position = end


@kernel
def scatter_tokens(rings, sequences, tokens, keys, k_sequence, k_token, k_head, values, v_sequence, v_token, v_head):
    """Append `tokens` tokens to each ring: write them to their places in the pages, and count them in.

    Those that so many tokens at once would overwrite themselves are left out. Arguments are those of `list_rings`; a
    head's row is contiguous.
    """
    for n in range(sequences):
        address = load_int(rings + 8 * n)
        ring = ring_at(address)
        start, k, v = ring.length, keys + n * k_sequence, values + n * v_sequence
        stop = start + tokens
        _copy_tokens(ring, start, min(stop, ring.sink_tokens), k, k_token, k_head, v, v_token, v_head, True)
        kept = max(start, stop - ring.ring_tokens, ring.sink_tokens)
        k, v = k + (kept - start) * k_token, v + (kept - start) * v_token
        _copy_tokens(ring, kept, stop, k, k_token, k_head, v, v_token, v_head, True)
        store_int(address + _LENGTH, stop)


@kernel
def gather_tokens(ring_address, start, stop, keys, k_token, k_head, values, v_token, v_head):
    """Copy the tokens `start` to `stop` out of the pages, the first one to `keys` and `values`."""
    _copy_tokens(ring_at(ring_address), start, stop, keys, k_token, k_head, values, v_token, v_head, False)

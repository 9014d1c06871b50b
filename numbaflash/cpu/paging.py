"""The ring of pages, compiled: which runs of tokens are visible, and tokens into pages and out of them.

These are a few additions for each page, but they run once for each layer and token; in Python they took longer than the
attention of a short sequence.
"""

from __future__ import annotations

import numpy as np

from .intrinsics import instruction
from .jit import kernel, native
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
from .task import record_at
from .vector import copy_bytes, load_int, store_int

__all__ = ["RING", "gather_tokens", "list_runs", "list_stretches", "ring_at", "scatter_tokens", "store_run"]

# A layer's ring, as the functions below see it; see `cache.layout.RingLayout`. `pages` is the address of the page
# table: for each slot, sinks first, the address of its page's keys. A page holds (kv_heads, page_size) rows of keys,
# then as many rows of values.
RING = np.dtype(
    [
        (name, np.int64)
        for name in ("pages", "page_size", "sink_tokens", "sink_slots", "ring_slots", "kv_heads", "row_bytes")
    ]
)

ring_at = instruction(*record_at(RING))


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
        row += 8 * RUN_FIELDS
        position = end
    return row


@kernel
def list_runs(ring_address, start, stop, table):
    """Write the sink tokens, and the tokens from `start`, which is none of them, to `stop`, as rows of `KVRuns.table`.

    Returns:
        The number of rows: at most two more than the ring has slots.
    """
    ring = ring_at(ring_address)
    row = list_stretches(ring, 0, min(ring.sink_tokens, stop), table)
    return (list_stretches(ring, start, stop, row) - table) // (8 * RUN_FIELDS)


@native
def _copy_tokens(ring, start, stop, keys, k_token, k_head, values, v_token, v_head, into_pages):
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
def scatter_tokens(ring_address, start, stop, keys, k_token, k_head, values, v_token, v_head):
    """Write the tokens `start` to `stop`, whose first one lies at `keys` and `values`, to their places in the pages.

    Strides are in bytes; a head's row is contiguous.
    """
    _copy_tokens(ring_at(ring_address), start, stop, keys, k_token, k_head, values, v_token, v_head, True)


@kernel
def gather_tokens(ring_address, start, stop, keys, k_token, k_head, values, v_token, v_head):
    """The reverse of `scatter_tokens`."""
    _copy_tokens(ring_at(ring_address), start, stop, keys, k_token, k_head, values, v_token, v_head, False)

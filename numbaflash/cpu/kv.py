"""Laying a tile of a sequence's keys and values side by side, wherever its runs lie."""

from __future__ import annotations

from typing import NamedTuple

from ..problem import MAX_HEAD_DIM
from .codes import is_quantized
from .emit import FLOAT32
from .jit import native
from .micro import TILE_ROWS
from .panel import query_position
from .rows import CACHE_LINE, clear, padded, widen_rows
from .runs import K_TOKEN_STRIDE, START, V_TOKEN_STRIDE
from .unpack import unpack_tokens
from .vector import load_int, prefetch, store_float
from .walk import key_at, run_end, run_field, runs_end, skip_runs, value_at

__all__ = [
    "TILE_BYTES",
    "TILE_KEYS",
    "Tile",
    "load_tile",
    "next_tile",
    "prefetch_tile",
    "tiles_end",
]

# Keys of a prefill tile. Tiles start at multiples of it, whatever the runs and however the sequence was cut into steps.
TILE_KEYS = 128

# Memory for a tile: keys, values, and whether they exist.
TILE_BYTES = 4 * TILE_KEYS * (2 * MAX_HEAD_DIM + 1)


class Tile(NamedTuple):
    """Keys and values at `position` to `position + TILE_KEYS`, as float32 rows.

    The first key that exists is `first`, the last is before `last`; if any between them is `missing`, the floats at
    `exists` tell which. Up to `last`, and on to a multiple of TILE_ROWS, there are zeros where there is no token. Its
    tokens lie in run `run` and on.
    """

    position: int
    run: int
    keys: int
    key_row: int
    values: int
    value_row: int
    exists: int
    first: int
    last: int
    missing: bool


@native
def next_tile(task, sequence, row, position):
    """Position of the tile after the one at `position` (-1: of the first) that query rows from `row` on may see."""
    left, sinks = load_int(task.left + 8 * sequence), load_int(task.sinks + 8 * sequence)
    following = 0 if position < 0 else position + TILE_KEYS
    if following < sinks:
        return following
    return max(following, max(query_position(task, sequence, row) - left, 0) // TILE_KEYS * TILE_KEYS)


@native
def tiles_end(task, sequence, row):
    """The position behind the last key that query rows up to `row` may see."""
    visible = query_position(task, sequence, row) + load_int(task.right + 8 * sequence) + 1
    return min(visible, runs_end(task, sequence))


@native
def load_tile(task, sequence, kv_head, run, position, memory):
    """Lay the tile at `position`, whose tokens lie in run `run` or later, side by side in `memory` (TILE_BYTES).

    The rows are copied even where they are float32 already: tokens of many heads lie a power of two apart, and would
    meet in a few sets of the L1 cache.
    """
    stop = load_int(task.bounds + 8 * sequence + 8)
    run = first_run = skip_runs(task, sequence, run, position)
    end = position + TILE_KEYS
    k_row, v_row = 4 * padded(task.head_dim), 4 * padded(task.value_dim)
    keys, values = memory, memory + 4 * TILE_KEYS * MAX_HEAD_DIM
    exists = values + 4 * TILE_KEYS * MAX_HEAD_DIM
    first, last, missing = TILE_KEYS, 0, False
    while run < stop and run_field(task, run, START) < end:
        low = max(run_field(task, run, START) - position, 0)
        high = min(run_end(task, run) - position, TILE_KEYS)
        if low < high:
            missing = missing or (last > 0 and low > last)
            _leave_out(keys, k_row, values, v_row, exists, last, low)
            k_token, v_token = run_field(task, run, K_TOKEN_STRIDE), run_field(task, run, V_TOKEN_STRIDE)
            k, v = key_at(task, run, kv_head, position + low), value_at(task, run, kv_head, position + low)
            to, at = keys + low * k_row, values + low * v_row
            if is_quantized(task, run):
                unpack_tokens(task, run, kv_head, position + low, high - low, to, k_row, at, v_row)
            else:
                widen_rows(to, k_row, k, k_token, high - low, task.head_dim, task.kv_dtype)
                widen_rows(at, v_row, v, v_token, high - low, task.value_dim, task.kv_dtype)
            for n in range(low, high):
                store_float(exists + 4 * n, 1.0)
            first, last = min(first, low), high
        run += 1
    _leave_out(keys, k_row, values, v_row, exists, last, (last + TILE_ROWS - 1) // TILE_ROWS * TILE_ROWS)
    return Tile(position, first_run, keys, k_row, values, v_row, exists, first, last, missing)


@native
def prefetch_tile(task, sequence, kv_head, run, position, part, parts):
    """Bring one of `parts` equal parts of the tile at `position` closer, while another tile is computed with."""
    size = 4 if task.kv_dtype == FLOAT32 else 2
    stop = load_int(task.bounds + 8 * sequence + 8)
    low, high = position + part * TILE_KEYS // parts, position + (part + 1) * TILE_KEYS // parts
    run = skip_runs(task, sequence, run, low)
    while run < stop and low < high:
        low, end = max(low, run_field(task, run, START)), min(high, run_end(task, run))
        k, v = key_at(task, run, kv_head, low), value_at(task, run, kv_head, low)
        for _ in range(low, end):
            for line in range(0, size * task.head_dim, CACHE_LINE):
                prefetch(k + line)
            for line in range(0, size * task.value_dim, CACHE_LINE):
                prefetch(v + line)
            k += run_field(task, run, K_TOKEN_STRIDE)
            v += run_field(task, run, V_TOKEN_STRIDE)
        low = max(low, end)
        run += 1


@native
def _leave_out(keys, k_row, values, v_row, exists, low, high):
    for n in range(low, high):
        clear(keys + n * k_row, k_row)
        clear(values + n * v_row, v_row)
        store_float(exists + 4 * n, 0.0)

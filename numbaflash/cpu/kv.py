"""Walking the runs of a sequence, and laying a tile of its keys and values side by side."""

from __future__ import annotations

from typing import NamedTuple

from ..problem import MAX_HEAD_DIM
from .emit import FLOAT32
from .jit import native
from .panel import query_position
from .rows import clear, padded, widen_row
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
from .vector import load_int, prefetch, store_float

__all__ = [
    "TILE_BYTES",
    "TILE_KEYS",
    "Tile",
    "key_at",
    "load_tile",
    "next_tile",
    "prefetch_tile",
    "run_end",
    "run_field",
    "runs_end",
    "skip_runs",
    "tiles_end",
    "value_at",
]

# Keys of a prefill tile. Tiles start at multiples of it, whatever the runs and however the sequence was cut into steps.
TILE_KEYS = 128

# Memory for a tile: keys, values, and whether they exist.
TILE_BYTES = 4 * TILE_KEYS * (2 * MAX_HEAD_DIM + 1)

CACHE_LINE = 64


class Tile(NamedTuple):
    """Keys and values at `position` to `position + TILE_KEYS`, as float32 rows, with zeros where there is no token.

    The first key that exists is `first`, the last is before `last`; if any between them is `missing`, the floats at
    `exists` tell which. Its tokens lie in run `run` and on.
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
def run_field(task, run, field):
    """A column of the run table."""
    return load_int(task.runs + (run * RUN_FIELDS + field) * 8)


@native
def run_end(task, run):
    """The position behind a run's last token."""
    return run_field(task, run, START) + run_field(task, run, COUNT)


@native
def runs_end(task, sequence):
    """The position behind the last token of a sequence, 0 where it has none."""
    first, last = load_int(task.bounds + 8 * sequence), load_int(task.bounds + 8 * sequence + 8)
    return run_end(task, last - 1) if first < last else 0


@native
def skip_runs(task, sequence, run, position):
    """The first run from `run` on that reaches beyond `position`."""
    last = load_int(task.bounds + 8 * sequence + 8)
    while run < last and run_end(task, run) <= position:
        run += 1
    return run


@native
def _token_at(task, run, kv_head, position, address, token_stride, head_stride):
    inside = position - run_field(task, run, START)
    at = run_field(task, run, address) + kv_head * run_field(task, run, head_stride)
    return at + inside * run_field(task, run, token_stride)


@native
def key_at(task, run, kv_head, position):
    """Address of the key at a position of a run."""
    return _token_at(task, run, kv_head, position, K_ADDRESS, K_TOKEN_STRIDE, K_HEAD_STRIDE)


@native
def value_at(task, run, kv_head, position):
    """Address of the value at a position of a run."""
    return _token_at(task, run, kv_head, position, V_ADDRESS, V_TOKEN_STRIDE, V_HEAD_STRIDE)


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
            for n in range(low, high):
                widen_row(keys + n * k_row, k, task.head_dim, task.kv_dtype)
                widen_row(values + n * v_row, v, task.value_dim, task.kv_dtype)
                store_float(exists + 4 * n, 1.0)
                k += k_token
                v += v_token
            first, last = min(first, low), high
        run += 1
    _leave_out(keys, k_row, values, v_row, exists, last, TILE_KEYS)
    return Tile(position, first_run, keys, k_row, values, v_row, exists, first, last, missing)


@native
def prefetch_tile(task, sequence, kv_head, run, position, part, parts):
    """Bring one of `parts` equal parts of the tile at `position` closer, while another tile is computed with."""
    size = 4 if task.kv_dtype == FLOAT32 else 2
    stop = load_int(task.bounds + 8 * sequence + 8)
    for n in range(part * TILE_KEYS // parts, (part + 1) * TILE_KEYS // parts):
        run = skip_runs(task, sequence, run, position + n)
        if run < stop and run_field(task, run, START) <= position + n:
            k, v = key_at(task, run, kv_head, position + n), value_at(task, run, kv_head, position + n)
            for line in range(0, size * task.head_dim, CACHE_LINE):
                prefetch(k + line)
            for line in range(0, size * task.value_dim, CACHE_LINE):
                prefetch(v + line)


@native
def _leave_out(keys, k_row, values, v_row, exists, low, high):
    for n in range(low, high):
        clear(keys + n * k_row, k_row)
        clear(values + n * v_row, v_row)
        store_float(exists + 4 * n, 0.0)

"""Walking the runs of a sequence, and laying a tile of its keys and values side by side."""

from __future__ import annotations

from .emit import FLOAT32
from .jit import native
from .micro import TILE_ROWS
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
from .vector import load_int, store_float

__all__ = ["TILE_KEYS", "load_tile", "run_end", "run_field", "runs_end", "skip_runs"]

# Keys of a prefill tile. Tiles start at multiples of it, whatever the runs and however the sequence was cut into steps.
TILE_KEYS = 64


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
def load_tile(task, sequence, kv_head, run, position, keys, values, exists):
    """Find the keys and values at `position` to `position + TILE_KEYS`, as float32.

    One float32 run that holds the whole tile is used where it lies; else the tile is gathered (and widened) into
    `keys` and `values`, with zeros where there is no token, and `exists` tells 1.0 or 0.0 for each.

    Returns:
        Address and token stride of the keys, of the values, the tile's first existing key, the end of its last, and
        whether any between them is missing.
    """
    stop = load_int(task.bounds + 8 * sequence + 8)
    end = position + TILE_KEYS
    direct = task.kv_dtype == FLOAT32 and task.value_dim % TILE_ROWS == 0
    if run < stop and direct and run_field(task, run, START) <= position and run_end(task, run) >= end:
        inside = position - run_field(task, run, START)
        k_token, v_token = run_field(task, run, K_TOKEN_STRIDE), run_field(task, run, V_TOKEN_STRIDE)
        k = run_field(task, run, K_ADDRESS) + kv_head * run_field(task, run, K_HEAD_STRIDE) + inside * k_token
        v = run_field(task, run, V_ADDRESS) + kv_head * run_field(task, run, V_HEAD_STRIDE) + inside * v_token
        return k, k_token, v, v_token, 0, TILE_KEYS, False

    k_row, v_row = 4 * padded(task.head_dim), 4 * padded(task.value_dim)
    first, last, missing = TILE_KEYS, 0, False
    at = 0
    while run < stop and run_field(task, run, START) < end:
        start, count = run_field(task, run, START), run_field(task, run, COUNT)
        k_token, v_token = run_field(task, run, K_TOKEN_STRIDE), run_field(task, run, V_TOKEN_STRIDE)
        k = run_field(task, run, K_ADDRESS) + kv_head * run_field(task, run, K_HEAD_STRIDE) - start * k_token
        v = run_field(task, run, V_ADDRESS) + kv_head * run_field(task, run, V_HEAD_STRIDE) - start * v_token
        low, high = max(start, position) - position, min(start + count, end) - position
        if low < high:
            missing = missing or (at > first and low > at)
            _leave_out(keys, k_row, values, v_row, exists, at, low)
            for n in range(low, high):
                widen_row(keys + n * k_row, k + (position + n) * k_token, task.head_dim, task.kv_dtype)
                widen_row(values + n * v_row, v + (position + n) * v_token, task.value_dim, task.kv_dtype)
                store_float(exists + 4 * n, 1.0)
            first, last, at = min(first, low), high, high
        run += 1
    _leave_out(keys, k_row, values, v_row, exists, at, TILE_KEYS)
    return keys, k_row, values, v_row, first, last, missing


@native
def _leave_out(keys, k_row, values, v_row, exists, low, high):
    for n in range(low, high):
        clear(keys + n * k_row, k_row)
        clear(values + n * v_row, v_row)
        store_float(exists + 4 * n, 0.0)

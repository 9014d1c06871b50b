"""Walking the runs of a sequence, and laying a tile of its keys and values side by side."""

from __future__ import annotations

from .emit import FLOAT32
from .jit import native
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
    "TILE_KEYS",
    "key_at",
    "load_tile",
    "prefetch_tile",
    "run_end",
    "run_field",
    "runs_end",
    "skip_runs",
    "value_at",
]

# Keys of a prefill tile. Tiles start at multiples of it, whatever the runs and however the sequence was cut into steps.
TILE_KEYS = 128

CACHE_LINE = 64


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
def token_at(task, run, kv_head, position, address, token_stride, head_stride):
    """Address of a key or a value, by the columns of the run table that tell it."""
    inside = position - run_field(task, run, START)
    at = run_field(task, run, address) + kv_head * run_field(task, run, head_stride)
    return at + inside * run_field(task, run, token_stride)


@native
def key_at(task, run, kv_head, position):
    return token_at(task, run, kv_head, position, K_ADDRESS, K_TOKEN_STRIDE, K_HEAD_STRIDE)


@native
def value_at(task, run, kv_head, position):
    return token_at(task, run, kv_head, position, V_ADDRESS, V_TOKEN_STRIDE, V_HEAD_STRIDE)


@native
def load_tile(task, sequence, kv_head, run, position, keys, values, exists):
    """Lay the keys and values at `position` to `position + TILE_KEYS` side by side, as float32 rows of whole vectors.

    Zeros stand where there is no token; `exists` gets 1.0 or 0.0 for each. The rows are copied even where they are
    float32 already: tokens of many heads lie a power of two apart, and would meet in a few sets of the L1 cache.

    Returns:
        The tile's first existing key, the end of its last, and whether any between them is missing.
    """
    stop = load_int(task.bounds + 8 * sequence + 8)
    end = position + TILE_KEYS
    k_row, v_row = 4 * padded(task.head_dim), 4 * padded(task.value_dim)
    first, last, missing = TILE_KEYS, 0, False
    at = 0
    while run < stop and run_field(task, run, START) < end:
        low = max(run_field(task, run, START) - position, 0)
        high = min(run_end(task, run) - position, TILE_KEYS)
        if low < high:
            missing = missing or (at > first and low > at)
            _leave_out(keys, k_row, values, v_row, exists, at, low)
            k_token, v_token = run_field(task, run, K_TOKEN_STRIDE), run_field(task, run, V_TOKEN_STRIDE)
            k, v = key_at(task, run, kv_head, position + low), value_at(task, run, kv_head, position + low)
            for n in range(low, high):
                widen_row(keys + n * k_row, k, task.head_dim, task.kv_dtype)
                widen_row(values + n * v_row, v, task.value_dim, task.kv_dtype)
                store_float(exists + 4 * n, 1.0)
                k += k_token
                v += v_token
            first, last, at = min(first, low), high, high
        run += 1
    _leave_out(keys, k_row, values, v_row, exists, at, TILE_KEYS)
    return first, last, missing


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

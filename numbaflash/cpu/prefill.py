"""FlashAttention-2 forward ("FlashAttention-2", Algorithm 1) for many query rows.

A work item is a tile of query rows of one KV head. Its Q^T, O^T, m and l stay with one thread while the K/V tiles that
any of its rows sees pass by, in ascending order. Memory is that of the tiles, whatever the sequence lengths.

How the rows are cut into items, panels or calls never changes their bits: K/V tiles lie at multiples of TILE_KEYS, a
row's arithmetic is its lane's, and a tile in which a row sees nothing leaves it as it was.
"""

from __future__ import annotations

import numpy as np

from ..problem import MAX_HEAD_DIM
from .jit import kernel, native
from .kv import TILE_KEYS, load_tile, prefetch_tile, runs_end, skip_runs
from .micro import PANEL_VECTORS, TILE_ROWS
from .panel import (
    PANEL_ROWS,
    VECTOR_BYTES,
    apply_scoring,
    finish_panel,
    is_finite,
    load_queries,
    mask_panel,
    query_position,
    score_panel,
    softmax_panel,
    weigh_panel,
)
from .rows import padded
from .task import NO_BIAS, report_item, take_item, task_at
from .vector import LANES, load_int, splat, store

__all__ = ["MAX_ITEM_ROWS", "PREFILL_SCRATCH", "prefill"]

# Rows of a work item: the more, the fewer times K and V are read and widened. With 192, Q^T and O^T of head_dim 128 take
# 192 KiB, well inside the L2 cache.
MAX_ITEM_ROWS = 768

# Where things lie in a thread's scratch memory.
_PANEL_BYTES = 4 * PANEL_ROWS
_QUERIES = 0
_OUT = _QUERIES + 4 * MAX_ITEM_ROWS * MAX_HEAD_DIM
_KEYS = _OUT + 4 * MAX_ITEM_ROWS * MAX_HEAD_DIM
_VALUES = _KEYS + 4 * TILE_KEYS * MAX_HEAD_DIM
_SCORES = _VALUES + 4 * TILE_KEYS * MAX_HEAD_DIM
_STAGING = _SCORES + _PANEL_BYTES * TILE_KEYS
_MAXIMA = _STAGING + _PANEL_BYTES * MAX_HEAD_DIM
_SUMS = _MAXIMA + 4 * MAX_ITEM_ROWS
_FACTORS = _SUMS + 4 * MAX_ITEM_ROWS
_LANES = _FACTORS + _PANEL_BYTES
_EXISTS = _LANES + 2 * _PANEL_BYTES
PREFILL_SCRATCH = _EXISTS + 4 * TILE_KEYS


@kernel
def prefill(task_address, scratch):
    """Take work items until there are none; any number of threads may run this at once, each with its own scratch."""
    task = task_at(task_address)
    pairs = task.sequences * task.kv_heads
    tiles = task.items // max(pairs, 1)
    while True:
        item = take_item(task_address)
        if item >= task.items:
            break
        # Under a causal mask the last rows see the most keys: heaviest first keeps all threads busy to the end.
        tile, pair = tiles - 1 - item // pairs, item % pairs
        sequence, kv_head = pair // task.kv_heads, pair % task.kv_heads
        row = tile * task.rows_per_item
        rows = min(task.rows_per_item, task.q_tokens * task.group - row)
        if not attend_rows(task, sequence, kv_head, row, rows, scratch, False):
            # Somewhere a NaN or an infinity came in: again, and see to it that it stays with the rows that see it.
            attend_rows(task, sequence, kv_head, row, rows, scratch, True)
        report_item(task_address)


@native
def attend_rows(task, sequence, kv_head, row, rows, scratch, exact):
    """Compute the outputs of `rows` rows; False, and nothing written, if they are not finite and not `exact`."""
    for r in range(0, rows, PANEL_ROWS):
        load_panel(task, sequence, kv_head, row, rows, r, scratch)

    left, right = load_int(task.left + 8 * sequence), load_int(task.right + 8 * sequence)
    sinks = load_int(task.sinks + 8 * sequence)
    begin = max(query_position(task, sequence, row) - left, 0) // TILE_KEYS * TILE_KEYS
    end = min(query_position(task, sequence, row + rows - 1) + right + 1, runs_end(task, sequence))
    run = load_int(task.bounds + 8 * sequence)
    panels = (rows + PANEL_ROWS - 1) // PANEL_ROWS
    position = 0 if sinks > 0 else begin
    while position < end:
        following = position + TILE_KEYS
        if following >= sinks:
            following = max(following, begin)
        run = skip_runs(task, sequence, run, position)
        tile = load_tile(task, sequence, kv_head, run, position, scratch + _KEYS, scratch + _VALUES, scratch + _EXISTS)
        for r in range(0, rows, PANEL_ROWS):
            attend_tile(task, sequence, kv_head, row, rows, r, position, tile, scratch, exact)
            prefetch_tile(task, sequence, kv_head, run, following, r // PANEL_ROWS, panels)
        position = following

    if not exact:
        for r in range(0, rows, PANEL_ROWS):
            out = scratch + _OUT + 4 * r * MAX_HEAD_DIM
            if not is_finite(out, out + task.value_dim * panel_vectors(rows, r) * VECTOR_BYTES):
                return False
    for r in range(0, rows, PANEL_ROWS):
        here = 4 * r * MAX_HEAD_DIM
        finish_panel(
            task,
            sequence,
            kv_head,
            row + r,
            min(rows - r, PANEL_ROWS),
            panel_vectors(rows, r),
            scratch + _OUT + here,
            scratch + _MAXIMA + 4 * r,
            scratch + _SUMS + 4 * r,
            scratch + _STAGING,
        )
    return True


@native
def panel_vectors(rows, r):
    """Vectors that the panel at row r of an item needs."""
    return min((rows - r + LANES - 1) // LANES, PANEL_VECTORS)


@native
def load_panel(task, sequence, kv_head, row, rows, r, scratch):
    """Q^T in, O = 0, m = -inf, l = 0."""
    vectors = panel_vectors(rows, r)
    here = 4 * r * MAX_HEAD_DIM
    load_queries(
        task,
        sequence,
        kv_head,
        row + r,
        min(rows - r, PANEL_ROWS),
        vectors,
        scratch + _QUERIES + here,
        scratch + _STAGING,
    )
    out = scratch + _OUT + here
    for at in range(out, out + padded(task.value_dim) * vectors * VECTOR_BYTES, VECTOR_BYTES):
        store(at, splat(np.float32(0)))
    for at in range(4 * r, 4 * r + vectors * VECTOR_BYTES, VECTOR_BYTES):
        store(scratch + _MAXIMA + at, splat(np.float32(-np.inf)))
        store(scratch + _SUMS + at, splat(np.float32(0)))


@native
def attend_tile(task, sequence, kv_head, row, rows, r, position, tile, scratch, exact):
    """Let the panel at row r of an item attend to the K/V tile at `position`."""
    first, last, missing = tile
    key_row, value_row = 4 * padded(task.head_dim), 4 * padded(task.value_dim)
    row, vectors, rows = row + r, panel_vectors(rows, r), min(rows - r, PANEL_ROWS)
    first_row = query_position(task, sequence, row) - position
    last_row = query_position(task, sequence, row + rows - 1) - position
    left, right = load_int(task.left + 8 * sequence), load_int(task.right + 8 * sequence)
    low = first if load_int(task.sinks + 8 * sequence) > position else max(first, first_row - left)
    high = min(last, last_row + right + 1)
    low = low // TILE_ROWS * TILE_ROWS
    count = high - low
    if count <= 0:
        return
    scores = scratch + _SCORES
    keys, values = scratch + _KEYS + low * key_row, scratch + _VALUES + low * value_row
    score_panel(task, vectors, scratch + _QUERIES + 4 * r * MAX_HEAD_DIM, keys, key_row, count, scores)
    if task.softcap != 0 or task.alibi_slopes != 0 or task.bias_dtype != NO_BIAS:
        apply_scoring(task, sequence, kv_head, row, rows, vectors, position + low, count, scores, scratch + _LANES)
    incomplete = missing or low < first
    if incomplete or low < last_row - left or high > first_row + right + 1:
        exists = scratch + _EXISTS + 4 * low if incomplete else 0
        mask_panel(task, sequence, row, rows, vectors, position + low, count, scores, exists, scratch + _LANES)
    factors = scratch + _FACTORS
    softmax_panel(vectors, count, scores, scratch + _MAXIMA + 4 * r, scratch + _SUMS + 4 * r, factors)
    out = scratch + _OUT + 4 * r * MAX_HEAD_DIM
    weigh_panel(vectors, values, value_row, task.value_dim, scores, count, out, factors, exact)

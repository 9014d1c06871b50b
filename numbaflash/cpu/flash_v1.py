"""FlashAttention-1 forward ("FlashAttention", Algorithm 1): the outer loop is over K/V blocks, the inner over Q blocks.

For each K/V block all rows' O, l and m are read and written back, so O is kept normalized in between. A work item is a
KV head of a sequence. The state of all rows lies in the workspace: by panel O^T (value_dim x PANEL_ROWS), m and l.
"""

from __future__ import annotations

import numpy as np

from ..problem import MAX_HEAD_DIM
from .jit import kernel, native
from .kv import TILE_BYTES, TILE_KEYS, load_tile, next_tile, tiles_end
from .panel import PANEL_BYTES, PANEL_ROWS, is_finite, load_queries, panel_of, weigh_panel, write_panel
from .rows import VECTOR_BYTES, clear, padded
from .scoring import ROW_BYTES, score_tile
from .softmax import normalize_panel, softmax_panel, start_softmax
from .task import report_item, take_item, task_at
from .vector import div, equal, load, load_int, mul, splat, store, where

__all__ = ["V1_SCRATCH", "flash_v1"]

# Where things lie in a thread's scratch memory.
_QUERIES = 0
_TILE = _QUERIES + PANEL_BYTES * MAX_HEAD_DIM
_SCORES = _TILE + TILE_BYTES
_STAGING = _SCORES + PANEL_BYTES * TILE_KEYS
_FACTORS = _STAGING + PANEL_BYTES * MAX_HEAD_DIM
_ROW_MEMORY = _FACTORS + PANEL_BYTES
V1_SCRATCH = _ROW_MEMORY + ROW_BYTES


@kernel
def flash_v1(task_address, scratch):
    """Take work items until there are none; any number of threads may run this at once, each with its own scratch."""
    task = task_at(task_address)
    while True:
        item = take_item(task_address)
        if item >= task.items:
            break
        sequence, kv_head = item // task.kv_heads, item % task.kv_heads
        # Where a NaN or an infinity came in: again, and see to it that it stays with the rows that see it.
        for exact in (False, True):
            if attend_head(task, sequence, kv_head, item, scratch, exact):
                break
        report_item(task_address)


@native
def attend_head(task, sequence, kv_head, item, scratch, exact):
    """Compute all rows of a head; False, and nothing written, if they are not finite nor `exact`."""
    rows = task.q_tokens * task.group
    panels = (rows + PANEL_ROWS - 1) // PANEL_ROWS
    state_bytes = PANEL_BYTES * (padded(task.value_dim) + 2)
    states = task.workspace + item * panels * state_bytes
    for i in range(panels):
        out = states + i * state_bytes
        maxima = out + PANEL_BYTES * padded(task.value_dim)
        clear(out, PANEL_BYTES * padded(task.value_dim))
        start_softmax(panel_of(sequence, kv_head, i * PANEL_ROWS, rows), maxima, maxima + PANEL_BYTES)

    run = load_int(task.bounds + 8 * sequence)
    position = next_tile(task, sequence, 0, -1)
    stop = tiles_end(task, sequence, rows - 1)
    while position < stop:
        tile = load_tile(task, sequence, kv_head, run, position, scratch + _TILE)
        run, position = tile.run, next_tile(task, sequence, 0, position)
        for i in range(panels):
            panel = panel_of(sequence, kv_head, i * PANEL_ROWS, rows)
            attend_block(task, panel, tile, states + i * state_bytes, scratch, exact)

    for i in range(panels):
        panel, out = panel_of(sequence, kv_head, i * PANEL_ROWS, rows), states + i * state_bytes
        if not exact and not is_finite(out, out + task.value_dim * panel.vectors * VECTOR_BYTES):
            return False
    for i in range(panels):
        panel, out = panel_of(sequence, kv_head, i * PANEL_ROWS, rows), states + i * state_bytes
        maxima = out + PANEL_BYTES * padded(task.value_dim)
        factors = scratch + _FACTORS
        normalize_panel(task, panel, maxima, maxima + PANEL_BYTES, factors)
        for lane in range(0, panel.vectors * VECTOR_BYTES, VECTOR_BYTES):  # O is divided by l already
            store(factors + lane, mul(load(factors + lane), load(maxima + PANEL_BYTES + lane)))
        write_panel(task, panel, out, factors, scratch + _STAGING)
    return True


@native
def attend_block(task, panel, tile, out, scratch, exact):
    """Read a panel's O, m and l, let it attend to a K/V block, and write them back (Algorithm 1, lines 8 to 13)."""
    scores, factors = scratch + _SCORES, scratch + _FACTORS
    maxima = out + PANEL_BYTES * padded(task.value_dim)
    sums = maxima + PANEL_BYTES
    load_queries(task, panel, scratch + _QUERIES, scratch + _STAGING)
    low, count = score_tile(task, panel, scratch + _QUERIES, tile, scores, scratch + _ROW_MEMORY)
    if count == 0:
        return
    scores += low * panel.vectors * VECTOR_BYTES
    values = tile.values + low * tile.value_row

    # O = (old l * 2^(old m - m) * O + P V) / l; softmax_panel leaves the power of two in `factors`.
    lanes_row = panel.vectors * VECTOR_BYTES
    old_sums = scratch + _ROW_MEMORY
    for lane in range(0, lanes_row, VECTOR_BYTES):
        store(old_sums + lane, load(sums + lane))
    softmax_panel(panel, count, scores, maxima, sums, factors)
    for lane in range(0, lanes_row, VECTOR_BYTES):
        store(factors + lane, mul(load(factors + lane), load(old_sums + lane)))
    weigh_panel(task, panel, values, tile.value_row, scores, count, out, factors, exact)
    for lane in range(0, lanes_row, VECTOR_BYTES):
        total = load(sums + lane)
        nothing_seen = equal(total, splat(np.float32(0)))
        inverse = div(splat(np.float32(1)), where(nothing_seen, splat(np.float32(1)), total))
        for d in range(task.value_dim):
            at = out + d * lanes_row + lane
            store(at, mul(load(at), inverse))

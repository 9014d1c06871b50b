"""Standard attention ("FlashAttention", Algorithm 0): S = Q K^T and P = softmax(S) are written out in full.

Three kernels, each over all panels of all KV heads: scores, softmax, values. S lies in the workspace by panel, as S^T
(keys x PANEL_ROWS) over all tiles of keys, and P takes its place.
"""

from __future__ import annotations

import numpy as np

from ..problem import MAX_HEAD_DIM
from .functions import NEG_INF
from .jit import kernel, native
from .kv import TILE_BYTES, TILE_KEYS, load_tile
from .panel import PANEL_BYTES, PANEL_ROWS, is_finite, load_queries, panel_of, weigh_panel, write_panel
from .rows import VECTOR_BYTES, clear, padded
from .scoring import ROW_BYTES, score_tile
from .softmax import normalize_panel, softmax_panel, start_softmax
from .task import report_item, take_item, task_at
from .vector import load, load_int, mul, splat, store
from .walk import runs_end

__all__ = ["STANDARD_SCRATCH", "standard_scores", "standard_softmax", "standard_values"]

# Where things lie in a thread's scratch memory.
_QUERIES = 0
_OUT = _QUERIES + PANEL_BYTES * MAX_HEAD_DIM
_TILE = _OUT + PANEL_BYTES * MAX_HEAD_DIM
_STAGING = _TILE + TILE_BYTES
_MAXIMA = _STAGING + PANEL_BYTES * MAX_HEAD_DIM
_SUMS = _MAXIMA + PANEL_BYTES
_FACTORS = _SUMS + PANEL_BYTES
_ROW_MEMORY = _FACTORS + PANEL_BYTES
STANDARD_SCRATCH = _ROW_MEMORY + ROW_BYTES


@native
def panel_of_item(task, item):
    """The panel that an item is about, and the address of its S."""
    rows = task.q_tokens * task.group
    panels = (rows + PANEL_ROWS - 1) // PANEL_ROWS
    pair, row = item // panels, item % panels * PANEL_ROWS
    panel = panel_of(pair // task.kv_heads, pair % task.kv_heads, row, rows)
    return panel, task.workspace + item * padded_keys(task) * PANEL_BYTES


@native
def padded_keys(task):
    """Keys of the longest sequence, in whole tiles."""
    longest = 0
    for sequence in range(task.sequences):
        longest = max(longest, runs_end(task, sequence))
    return (longest + TILE_KEYS - 1) // TILE_KEYS * TILE_KEYS


@kernel
def standard_scores(task_address, scratch):
    """S = Q K^T, with all options; -inf where a row does not see a key."""
    task = task_at(task_address)
    while True:
        item = take_item(task_address)
        if item >= task.items:
            break
        panel, scores = panel_of_item(task, item)
        lanes_row = panel.vectors * VECTOR_BYTES
        load_queries(task, panel, scratch + _QUERIES, scratch + _STAGING)
        run = load_int(task.bounds + 8 * panel.sequence)
        for position in range(0, runs_end(task, panel.sequence), TILE_KEYS):
            tile = load_tile(task, panel.sequence, panel.kv_head, run, position, scratch + _TILE)
            run = tile.run
            at = scores + position * lanes_row
            low, count = score_tile(task, panel, scratch + _QUERIES, tile, at, scratch + _ROW_MEMORY)
            if count == 0:
                low = 0
            forbid_keys(at, at + low * lanes_row)
            forbid_keys(at + (low + count) * lanes_row, at + TILE_KEYS * lanes_row)
        report_item(task_address)


@native
def forbid_keys(start, end):
    """Set the scores from address `start` to `end`, whole vectors, to -inf."""
    for at in range(start, end, VECTOR_BYTES):
        store(at, splat(NEG_INF))


@kernel
def standard_softmax(task_address, scratch):
    """P = softmax(S), row by row of S."""
    task = task_at(task_address)
    while True:
        item = take_item(task_address)
        if item >= task.items:
            break
        panel, scores = panel_of_item(task, item)
        lanes_row = panel.vectors * VECTOR_BYTES
        keys = (runs_end(task, panel.sequence) + TILE_KEYS - 1) // TILE_KEYS * TILE_KEYS
        start_softmax(panel, scratch + _MAXIMA, scratch + _SUMS)
        softmax_panel(panel, keys, scores, scratch + _MAXIMA, scratch + _SUMS, scratch + _FACTORS)
        normalize_panel(task, panel, scratch + _MAXIMA, scratch + _SUMS, scratch + _FACTORS)
        for lane in range(0, lanes_row, VECTOR_BYTES):
            factor = load(scratch + _FACTORS + lane)
            for at in range(scores + lane, scores + lane + keys * lanes_row, lanes_row):
                store(at, mul(load(at), factor))
        report_item(task_address)


@kernel
def standard_values(task_address, scratch):
    """O = P V."""
    task = task_at(task_address)
    ones = scratch + _FACTORS
    for lane in range(0, PANEL_BYTES, VECTOR_BYTES):
        store(ones + lane, splat(np.float32(1)))
    while True:
        item = take_item(task_address)
        if item >= task.items:
            break
        panel, weights = panel_of_item(task, item)
        out = scratch + _OUT
        # Where a NaN or an infinity came in: again, and see to it that it stays with the rows that see it.
        for exact in (False, True):
            weigh_all(task, panel, weights, ones, scratch, exact)
            if is_finite(out, out + task.value_dim * panel.vectors * VECTOR_BYTES):
                break
        write_panel(task, panel, out, ones, scratch + _STAGING)
        report_item(task_address)


@native
def weigh_all(task, panel, weights, ones, scratch, exact):
    """O = P V for a panel, all keys."""
    clear(scratch + _OUT, padded(task.value_dim) * panel.vectors * VECTOR_BYTES)
    run = load_int(task.bounds + 8 * panel.sequence)
    for position in range(0, runs_end(task, panel.sequence), TILE_KEYS):
        tile = load_tile(task, panel.sequence, panel.kv_head, run, position, scratch + _TILE)
        run = tile.run
        p = weights + position * panel.vectors * VECTOR_BYTES
        weigh_panel(task, panel, tile.values, tile.value_row, p, tile.last, scratch + _OUT, ones, exact)

"""FlashAttention-2 forward ("FlashAttention-2", Algorithm 1) for many query rows.

A work item is a stretch of query rows of one KV head. Its Q^T, O^T, m and l stay with one thread while the K/V tiles
that any of its rows sees pass by, in ascending order. Memory is that of the tiles, whatever the sequence lengths.

How the rows are cut into items, panels or calls never changes their bits: K/V tiles lie at multiples of TILE_KEYS, a
row's arithmetic is its lane's, and a tile in which a row sees nothing leaves it as it was.
"""

from __future__ import annotations

from ..problem import MAX_HEAD_DIM
from .jit import kernel, piece
from .kv import TILE_BYTES, TILE_KEYS, load_tile, next_tile, prefetch_tile, tiles_end
from .panel import PANEL_BYTES, PANEL_ROWS, is_finite, load_queries, panel_of, query_rows, weigh_panel, write_panel
from .rows import VECTOR_BYTES, clear, padded
from .scoring import ROW_BYTES, score_tile
from .softmax import normalize_panel, softmax_panel, start_softmax
from .task import report_item, take_item, task_at
from .vector import load_int

__all__ = ["MAX_ITEM_ROWS", "PREFILL_SCRATCH", "prefill"]

# Rows of a work item: the more, the fewer times K and V are read and widened. 768 instead of 192 is worth 7 %; Q^T and
# O^T of head_dim 128 then take 768 KiB of the L2 cache.
MAX_ITEM_ROWS = 768

# Where things lie in a thread's scratch memory.
_QUERIES = 0
_OUT = _QUERIES + 4 * MAX_ITEM_ROWS * MAX_HEAD_DIM
_TILE = _OUT + 4 * MAX_ITEM_ROWS * MAX_HEAD_DIM
_SCORES = _TILE + TILE_BYTES
_STAGING = _SCORES + PANEL_BYTES * TILE_KEYS
_MAXIMA = _STAGING + PANEL_BYTES * MAX_HEAD_DIM
_SUMS = _MAXIMA + 4 * MAX_ITEM_ROWS
_FACTORS = _SUMS + 4 * MAX_ITEM_ROWS
_ROW_MEMORY = _FACTORS + PANEL_BYTES
PREFILL_SCRATCH = _ROW_MEMORY + ROW_BYTES


@kernel
def prefill(task_address, scratch):
    """Take work items until there are none; any number of threads may run this at once, each with its own scratch."""
    task = task_at(task_address)
    pairs = task.sequences * task.kv_heads
    stretches = (task.q_tokens * task.group + task.rows_per_item - 1) // task.rows_per_item
    while True:
        item = take_item(task_address)
        if item >= task.items:
            break
        # Under a causal mask the last rows see the most keys: heaviest first keeps all threads busy to the end.
        stretch, pair = stretches - 1 - item // pairs, item % pairs
        sequence, kv_head = pair // task.kv_heads, pair % task.kv_heads
        row = stretch * task.rows_per_item
        end = min(row + task.rows_per_item, query_rows(task, sequence))
        # Where a NaN or an infinity came in: again, and see to it that it stays with the rows that see it.
        for exact in (False, True):
            if row >= end or attend_rows(task, sequence, kv_head, row, end, scratch, exact):
                break
        report_item(task_address)


@piece
def attend_rows(task, sequence, kv_head, begin, end, scratch, exact):
    """Compute the outputs of rows `begin` to `end`; False, and nothing written, if they are not finite nor `exact`."""
    run = load_int(task.bounds + 8 * sequence)
    position = next_tile(task, sequence, begin, -1)
    prefetch_tile(task, sequence, kv_head, run, position, 0, 1)
    for row in range(begin, end, PANEL_ROWS):
        panel, r = panel_of(sequence, kv_head, row, end), 4 * (row - begin)
        load_queries(task, panel, scratch + _QUERIES + r * MAX_HEAD_DIM, scratch + _STAGING)
        clear(scratch + _OUT + r * MAX_HEAD_DIM, padded(task.value_dim) * panel.vectors * VECTOR_BYTES)
        start_softmax(panel, scratch + _MAXIMA + r, scratch + _SUMS + r)

    stop = tiles_end(task, sequence, end - 1)
    panels = (end - begin + PANEL_ROWS - 1) // PANEL_ROWS
    while position < stop:
        tile = load_tile(task, sequence, kv_head, run, position, scratch + _TILE)
        run, position = tile.run, next_tile(task, sequence, begin, position)
        for i in range(panels):
            row = begin + i * PANEL_ROWS
            panel, r = panel_of(sequence, kv_head, row, end), 4 * (row - begin)
            attend_tile(task, panel, r, tile, scratch, exact)
            prefetch_tile(task, sequence, kv_head, run, position, i, panels)

    for row in range(begin, end, PANEL_ROWS):
        panel, out = panel_of(sequence, kv_head, row, end), scratch + _OUT + 4 * (row - begin) * MAX_HEAD_DIM
        if not exact and not is_finite(out, out + task.value_dim * panel.vectors * VECTOR_BYTES):
            return False
    for row in range(begin, end, PANEL_ROWS):
        panel, r = panel_of(sequence, kv_head, row, end), 4 * (row - begin)
        factors = scratch + _FACTORS
        normalize_panel(task, panel, scratch + _MAXIMA + r, scratch + _SUMS + r, factors)
        write_panel(task, panel, scratch + _OUT + r * MAX_HEAD_DIM, factors, scratch + _STAGING)
    return True


@piece
def attend_tile(task, panel, r, tile, scratch, exact):
    """Let a panel, whose m and l are at offset r, attend to a K/V tile."""
    scores, factors = scratch + _SCORES, scratch + _FACTORS
    queries, out = scratch + _QUERIES + r * MAX_HEAD_DIM, scratch + _OUT + r * MAX_HEAD_DIM
    low, count = score_tile(task, panel, queries, tile, scores, scratch + _ROW_MEMORY)
    if count > 0:
        scores += low * panel.vectors * VECTOR_BYTES
        softmax_panel(panel, count, scores, scratch + _MAXIMA + r, scratch + _SUMS + r, factors)
        weigh_panel(task, panel, tile.values + low * tile.value_row, tile.value_row, scores, count, out, factors, exact)

"""From q.k to the score in base 2: softcap, ALiBi, bias, and which keys a row sees.

Each option is a step of its own over a tile of scores; a call without it pays one branch a tile.
"""

from __future__ import annotations

import numpy as np

from .bias import BIAS_BYTES, add_panel_bias
from .functions import LOG2E, NEG_INF, tanh
from .jit import native
from .micro import TILE_ROWS
from .panel import PANEL_BYTES, query_head, query_position, score_panel
from .rows import VECTOR_BYTES
from .task import NO_BIAS
from .vector import (
    LANES,
    absolute,
    both,
    fma,
    less_equal,
    load,
    load_float,
    load_int,
    mul,
    splat,
    store,
    store_float,
    sub,
    where,
)

__all__ = ["ROW_BYTES", "cap_scores", "score_tile"]

# Memory for two numbers of each row of a panel, or for its bias.
ROW_BYTES = max(2 * PANEL_BYTES, BIAS_BYTES)


@native
def score_tile(task, panel, queries, tile, scores, row_memory):
    """Compute the scores of a panel for those keys of a tile that any of its rows sees.

    Returns:
        The tile's first key that is scored, and how many are; key n's scores are at row n of `scores`.
    """
    first_row = query_position(task, panel.sequence, panel.row) - tile.position
    last_row = query_position(task, panel.sequence, panel.row + panel.rows - 1) - tile.position
    left, right = load_int(task.left + 8 * panel.sequence), load_int(task.right + 8 * panel.sequence)
    low = max(tile.first, first_row - left)
    if load_int(task.sinks + 8 * panel.sequence) > tile.position:
        low = tile.first
    low = low // TILE_ROWS * TILE_ROWS
    high = min(tile.last, last_row + right + 1)
    count = max(high - low, 0)
    if count == 0:
        return low, count

    at = scores + low * panel.vectors * VECTOR_BYTES
    position = tile.position + low
    score_panel(task, panel, queries, tile.keys + low * tile.key_row, tile.key_row, count, at)
    if task.softcap != 0:
        cap_scores(task, at, at + count * panel.vectors * VECTOR_BYTES)
    if task.alibi_slopes != 0:
        _add_alibi(task, panel, position, count, at, row_memory)
    if task.bias_dtype != NO_BIAS:
        add_panel_bias(task, panel, position, count, at, row_memory)
    incomplete = tile.missing or low < tile.first
    if incomplete or low < last_row - left or high > first_row + right + 1:
        _mask(task, panel, position, count, at, tile.exists + 4 * low if incomplete else 0, row_memory)
    return low, count


@native
def cap_scores(task, start, end):
    """Cap scores: softcap * tanh(s), in base 2, for the scores from address `start` to `end`, whole vectors."""
    cap = splat(task.softcap * LOG2E)
    for at in range(start, end, VECTOR_BYTES):
        store(at, mul(cap, tanh(load(at))))


@native
def _add_alibi(task, panel, position, count, scores, row_memory):
    lanes_row = panel.vectors * VECTOR_BYTES
    slopes, places = row_memory, row_memory + PANEL_BYTES
    for r in range(panel.vectors * LANES):
        row = panel.row + min(r, panel.rows - 1)
        head = panel.sequence * task.q_heads + query_head(task, panel.kv_head, row)
        store_float(slopes + 4 * r, -load_float(task.alibi_slopes + 4 * head) * LOG2E)
        store_float(places + 4 * r, np.float32(query_position(task, panel.sequence, row) - position))
    for n in range(count):
        for lane in range(0, lanes_row, VECTOR_BYTES):
            at = scores + n * lanes_row + lane
            distance = absolute(sub(load(places + lane), splat(np.float32(n))))
            store(at, fma(load(slopes + lane), distance, load(at)))


@native
def _mask(task, panel, position, count, scores, exists, row_memory):
    """Set the scores of keys that a row does not see to -inf; keys whose `exists` is 0 nobody sees."""
    lanes_row = panel.vectors * VECTOR_BYTES
    lowest, highest = row_memory, row_memory + PANEL_BYTES
    left, right = load_int(task.left + 8 * panel.sequence), load_int(task.right + 8 * panel.sequence)
    sinks = load_int(task.sinks + 8 * panel.sequence) - position
    for r in range(panel.vectors * LANES):
        here = query_position(task, panel.sequence, panel.row + min(r, panel.rows - 1)) - position
        store_float(lowest + 4 * r, np.float32(min(max(here - left, -1), count)))
        store_float(highest + 4 * r, np.float32(min(max(here + right, -1), count)))
    # What the last row's window reaches back to and the first row's reaches up to, every row sees.
    seen_from = query_position(task, panel.sequence, panel.row + panel.rows - 1) - position - left
    seen_to = query_position(task, panel.sequence, panel.row) - position + right
    forbidden = splat(NEG_INF)
    for n in range(count):
        if exists == 0 and seen_from <= n <= seen_to:
            continue
        key = splat(np.float32(n))
        key_exists = exists == 0 or load_float(exists + 4 * n) != 0
        for lane in range(0, lanes_row, VECTOR_BYTES):
            at = scores + n * lanes_row + lane
            if key_exists:
                seen = less_equal(key, load(highest + lane))
                if n >= sinks:
                    seen = both(seen, less_equal(load(lowest + lane), key))
                store(at, where(seen, load(at), forbidden))
            else:
                store(at, forbidden)

"""A panel: up to PANEL_ROWS query rows of one KV head, transposed, so that each lane of a vector is a row.

A row is a (token, query head) pair; the group of query heads that shares a KV head fills a panel together, token by
token. Q^T (head_dim x lanes), scores S^T (keys x lanes) and outputs O^T (value_dim x lanes) are all laid out so. What a
lane computes depends on its own row alone.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .functions import LOG2E
from .jit import native
from .micro import (
    PANEL_VECTORS,
    TILE_ROWS,
    accumulate_panel,
    accumulate_panel_skipping_zeros,
    multiply_panel,
    transpose_block,
)
from .rows import VECTOR_BYTES, clear, narrow_row, padded, widen_row
from .vector import LANES, fma, horizontal_sum, load, load_float, load_int, mul, splat, store

__all__ = [
    "PANEL_BYTES",
    "PANEL_ROWS",
    "Panel",
    "is_finite",
    "load_queries",
    "lse_at",
    "out_at",
    "panel_of",
    "query_at",
    "query_factor",
    "query_head",
    "query_position",
    "query_rows",
    "query_token",
    "score_panel",
    "weigh_panel",
    "write_panel",
]

PANEL_ROWS = PANEL_VECTORS * LANES
PANEL_BYTES = 4 * PANEL_ROWS


class Panel(NamedTuple):
    """Rows `row` to `row + rows` of a sequence and KV head, in `vectors` vectors; lanes past the last row are idle."""

    sequence: int
    kv_head: int
    row: int
    rows: int
    vectors: int


@native
def panel_of(sequence, kv_head, row, end):
    """The panel that starts at `row`, of rows that go to `end`."""
    rows = min(end - row, PANEL_ROWS)
    return Panel(sequence, kv_head, row, rows, (rows + LANES - 1) // LANES)


@native
def query_rows(task, sequence):
    """Rows of a sequence."""
    if task.q_bounds == 0:
        return task.q_tokens * task.group
    bounds = task.q_bounds + 8 * sequence
    return (load_int(bounds + 8) - load_int(bounds)) * task.group


@native
def query_token(task, row):
    """The token that a row belongs to."""
    return np.int64(np.uint64(row) // np.uint64(task.group))  # where signs count, a division takes three times as long


@native
def _stored_token(task, sequence, row):
    """Where the token of a row lies, in tokens from the start of its sequence, or of the packed batch."""
    return query_token(task, row) + (load_int(task.q_bounds + 8 * sequence) if task.q_bounds != 0 else 0)


@native
def query_head(task, kv_head, row):
    """The query head that a row belongs to."""
    return kv_head * task.group + np.int64(np.uint64(row) % np.uint64(task.group))


@native
def query_position(task, sequence, row):
    """Position of the token that a row belongs to."""
    return load_int(task.q_start + 8 * sequence) + query_token(task, row)


@native
def query_at(task, sequence, kv_head, row):
    """Address of a row of Q."""
    token, head = _stored_token(task, sequence, row), query_head(task, kv_head, row)
    return task.q + sequence * task.q_batch + token * task.q_token + head * task.q_head


@native
def out_at(task, sequence, kv_head, row):
    """Address of a row of O."""
    token, head = _stored_token(task, sequence, row), query_head(task, kv_head, row)
    return task.out + sequence * task.out_batch + token * task.out_token + head * task.out_head


@native
def lse_at(task, sequence, kv_head, row):
    """Address of a row's log-sum-exp."""
    token, head = _stored_token(task, sequence, row), query_head(task, kv_head, row)
    return task.lse + sequence * task.lse_batch + head * task.lse_head + token * task.lse_token


@native
def query_factor(task):
    """What a query is multiplied by, so that q.k is the score in base 2, or the argument of the softcap's tanh."""
    if task.softcap != 0:
        return task.scale / task.softcap
    return task.scale * LOG2E


@native
def load_queries(task, panel, queries, staging):
    """Write Q^T, times `query_factor`; idle lanes are 0. `staging` is room for the rows as they come."""
    lanes_row, dim_row = panel.vectors * VECTOR_BYTES, 4 * padded(task.head_dim)
    for r in range(panel.vectors * LANES):
        if r < panel.rows:
            source = query_at(task, panel.sequence, panel.kv_head, panel.row + r)
            widen_row(staging + r * dim_row, source, task.head_dim, task.q_dtype)
        else:
            clear(staging + r * dim_row, dim_row)
    for v in range(panel.vectors):
        for d in range(0, padded(task.head_dim), LANES):
            source = staging + v * LANES * dim_row + 4 * d
            transpose_block(source, dim_row, queries + d * lanes_row + v * VECTOR_BYTES, lanes_row)
    factor = splat(query_factor(task))
    for at in range(queries, queries + task.head_dim * lanes_row, VECTOR_BYTES):
        store(at, mul(load(at), factor))


@native
def score_panel(task, panel, queries, keys, key_row, count, scores):
    """S^T = K Q^T for `count` keys, rounded up to a multiple of TILE_ROWS."""
    lanes_row = panel.vectors * VECTOR_BYTES
    for n in range(0, count, TILE_ROWS):
        at, to = keys + n * key_row, scores + n * lanes_row
        multiply_panel(panel.vectors, at, key_row, 4, queries, lanes_row, task.head_dim, to, lanes_row)


@native
def weigh_panel(task, panel, values, value_row, weights, count, out, factors, exact):
    """O^T = O^T * factors + V^T P^T; with `exact`, a weight of 0 takes nothing from a value that is NaN or infinite."""
    lanes_row = panel.vectors * VECTOR_BYTES
    for d in range(0, task.value_dim, TILE_ROWS):
        v, o = values + 4 * d, out + d * lanes_row
        if exact:
            for lane in range(0, lanes_row, VECTOR_BYTES):
                accumulate_panel_skipping_zeros(
                    v, 4, value_row, weights + lane, lanes_row, count, o + lane, lanes_row, factors + lane
                )
        else:
            accumulate_panel(panel.vectors, v, 4, value_row, weights, lanes_row, count, o, lanes_row, factors)


@native
def write_panel(task, panel, out, factors, staging):
    """Write the rows of O, times the rows' factors, in the output's dtype."""
    lanes_row, dim_row = panel.vectors * VECTOR_BYTES, 4 * padded(task.value_dim)
    for v in range(panel.vectors):
        for d in range(0, padded(task.value_dim), LANES):
            source = out + d * lanes_row + v * VECTOR_BYTES
            transpose_block(source, lanes_row, staging + v * LANES * dim_row + 4 * d, dim_row)
    for r in range(panel.rows):
        to = out_at(task, panel.sequence, panel.kv_head, panel.row + r)
        narrow_row(to, staging + r * dim_row, task.value_dim, task.q_dtype, load_float(factors + 4 * r))


@native
def is_finite(start, end):
    """Whether all float32 from address `start` to `end`, whole vectors, are finite."""
    zero = splat(np.float32(0))
    total = zero
    for at in range(start, end, VECTOR_BYTES):
        total = fma(load(at), zero, total)
    return horizontal_sum(total) == 0

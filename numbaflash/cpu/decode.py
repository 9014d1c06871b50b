"""Split-KV decode ("FlashDecoding"): few query tokens, many keys, bound by reading K and V once.

Threads take items (`decode_items.py`) and attend to their keys (`decode_split.py`). Whoever finishes the last split of
a head merges them, in order, by their m and l.
"""

from __future__ import annotations

import numpy as np

from .decode_items import item_at, plan_items, splits_of, unit_of
from .decode_split import DECODE_SCRATCH, MAXIMA, OUT, SUMS, attend_item
from .functions import NEG_INF, exp2
from .jit import kernel, native
from .panel import lse_at, out_at, query_head
from .rows import VECTOR_BYTES, clear, narrow_row, padded
from .softmax import normalize_row
from .task import report_item, take_item, task_at
from .vector import LANES, atomic_add, fma, horizontal_max, load, load_float, splat, store, store_float

__all__ = ["DECODE_SCRATCH", "decode", "partial_bytes", "plan_decode"]


@kernel
def plan_decode(task_address, threads):
    """Fill in items, rows_per_item, heads_per_item, splits and kv_tokens, for so many threads."""
    plan_items(task_at(task_address), threads)


@kernel
def decode(task_address, scratch):
    """Take work items until there are none; any number of threads may run this at once, each with its own scratch."""
    task = task_at(task_address)
    while True:
        number = take_item(task_address)
        if number >= task.items:
            break
        split, item = item_at(task, number)
        if item.rows > 0:
            attend_item(task, task_address, item, scratch)
            for head in range(item.heads):
                _finish_head(task, item, split, head, scratch)
        report_item(task_address)


@native
def _finish_head(task, item, split, head, scratch):
    """Write the rows of an item's n-th head, or keep them until its other splits are done."""
    unit, splits, first = unit_of(task, item, head), splits_of(task, item.sequence), head * item.padded_rows
    out, maxima = scratch + OUT + first * 4 * padded(task.value_dim), scratch + MAXIMA + 4 * first
    sums = scratch + SUMS + 4 * first
    if splits > 1:
        _save_split(task, unit, split, item.rows, out, maxima, sums)
        if atomic_add(task.splits_done + 8 * unit, 1) < splits - 1:
            return
        _merge_splits(task, unit, splits, item.rows, out, maxima, sums)
    _write_rows(task, item, item.kv_head + head, out, maxima, sums)


def partial_bytes(value_dim: int) -> int:
    """Bytes that one row of one split leaves in the workspace: O, m and l."""
    return 4 * (-(-value_dim // LANES) * LANES) + 8


@native
def _partial_at(task, unit, split):
    """Address of what one split of one unit left: O row by row, then the rows' m, then their l."""
    row_bytes = 4 * padded(task.value_dim) + 8
    return task.workspace + (unit * task.splits + split) * task.rows_per_item * row_bytes


@native
def _save_split(task, unit, split, rows, out, maxima, sums):
    out_bytes = rows * 4 * padded(task.value_dim)
    to = _partial_at(task, unit, split)
    for at in range(0, out_bytes, VECTOR_BYTES):
        store(to + at, load(out + at))
    to += out_bytes
    for r in range(rows):
        store_float(to + 4 * r, load_float(maxima + 4 * r))
        store_float(to + 4 * (rows + r), load_float(sums + 4 * r))


@native
def _merge_splits(task, unit, splits, rows, out, maxima, sums):
    """O, m and l over all splits: each split counts 2^(its m - the largest m)."""
    out_row = 4 * padded(task.value_dim)
    for r in range(rows):
        top = NEG_INF
        for split in range(splits):
            top = max(top, load_float(_partial_at(task, unit, split) + rows * out_row + 4 * r))
        base = np.float32(0) if top == NEG_INF else top
        to = out + r * out_row
        clear(to, out_row)
        total = np.float32(0)
        for split in range(splits):
            partial = _partial_at(task, unit, split)
            m = load_float(partial + rows * out_row + 4 * r)
            factor = exp2(splat(m - base))
            total += horizontal_max(factor) * load_float(partial + rows * out_row + 4 * (rows + r))
            for at in range(0, out_row, VECTOR_BYTES):
                store(to + at, fma(factor, load(partial + r * out_row + at), load(to + at)))
        store_float(maxima + 4 * r, top)
        store_float(sums + 4 * r, total)


@native
def _write_rows(task, item, kv_head, out, maxima, sums):
    """Divide O by l, let the sink logit join, and write the rows' outputs and log-sum-exps."""
    out_row = 4 * padded(task.value_dim)
    for r in range(item.rows):
        row = item.row + r
        m, total = load_float(maxima + 4 * r), load_float(sums + 4 * r)
        factor, log_sum = normalize_row(task, query_head(task, kv_head, row), m, total)
        to = out_at(task, item.sequence, kv_head, row)
        narrow_row(to, out + r * out_row, task.value_dim, task.q_dtype, factor)
        store_float(lse_at(task, item.sequence, kv_head, row), log_sum)

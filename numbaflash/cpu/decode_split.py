"""One item of decode: scores, softmax, and O before it is divided, all in scratch memory.

Keys and values are read once, in the dtype and the place in which they are.
"""

from __future__ import annotations

import numpy as np

from ..problem import MAX_HEAD_DIM
from .bias import add_row_bias
from .codes import CODES_SCRATCH, SHIFTS_ROW, add_shifts, is_quantized, score_quantized, weigh_quantized
from .decode_items import MAX_ROWS, SPLIT_KEYS, untaken_keys
from .emit import FLOAT32
from .functions import LOG2E, NEG_INF, exp2
from .jit import native, piece
from .kv import TILE_KEYS
from .micro import ROWS_TOGETHER, score_keys, weigh_values
from .panel import is_finite, query_at, query_factor, query_head, query_position
from .rows import VECTOR_BYTES, clear, padded, widen_row
from .runs import K_TOKEN_STRIDE, START, V_TOKEN_STRIDE
from .scoring import cap_scores
from .task import NO_BIAS
from .vector import (
    LANES,
    absolute,
    add,
    fma,
    horizontal_max,
    horizontal_sum,
    lane_numbers,
    load,
    load_float,
    load_int,
    maximum,
    mul,
    splat,
    store,
    store_float,
    sub,
)
from .walk import key_at, run_end, run_field, skip_runs, value_at

__all__ = ["DECODE_SCRATCH", "MAXIMA", "OUT", "SUMS", "attend_item"]

# Where things lie in a thread's scratch memory. A row of scores has room for a vector more: `score_keys` overruns.
_SCORE_ROW = 4 * (SPLIT_KEYS + LANES)
_QUERIES = 0
OUT = _QUERIES + 4 * MAX_ROWS * MAX_HEAD_DIM
_TILE = OUT + 4 * MAX_ROWS * MAX_HEAD_DIM
_SCORES = _TILE + max(4 * TILE_KEYS * MAX_HEAD_DIM, CODES_SCRATCH)
MAXIMA = _SCORES + MAX_ROWS * _SCORE_ROW
SUMS = MAXIMA + 4 * MAX_ROWS
_SHIFTS = SUMS + 4 * MAX_ROWS
DECODE_SCRATCH = _SHIFTS + MAX_ROWS * SHIFTS_ROW

# Where an item has several heads, all of them go through so many keys before the next ones, and rows are asked for so
# few keys ahead: those of the next tile would have to wait in the L1 cache for the other heads (a tenth slower).
_SHARED_TILE_KEYS, _SHARED_AHEAD_KEYS = 32, 4


@piece
def attend_item(task, task_address, item, scratch):
    """Leave O (not divided by l), m and l in scratch memory, `padded_rows` for each head."""
    _load_query_rows(task, item, scratch + _QUERIES)
    _score(task, item, scratch)
    for head in range(item.heads):
        kv_head, first = item.kv_head + head, head * item.padded_rows
        for r in range(item.rows):
            at = scratch + _SCORES + (first + r) * _SCORE_ROW
            _score_options(task, item, kv_head, item.row + r, at, scratch + _TILE)
            _mask_row(task, item, item.row + r, at)
            m, total = _softmax_row(at, item.keys)
            store_float(scratch + MAXIMA + 4 * (first + r), m)
            store_float(scratch + SUMS + 4 * (first + r), total)
        for r in range(first + item.rows, first + item.padded_rows):
            clear(scratch + _SCORES + r * _SCORE_ROW, 4 * padded(item.keys))

    out_bytes = item.heads * item.padded_rows * 4 * padded(task.value_dim)
    # Where a NaN or an infinity came in: again, and let a weight of 0 take nothing from its value.
    for exact in (False, True):
        clear(scratch + OUT, out_bytes)
        _weigh(task, task_address, item, scratch, exact)
        if is_finite(scratch + OUT, scratch + OUT + out_bytes):
            break


@native
def _load_query_rows(task, item, queries):
    key_row = 4 * padded(task.head_dim)
    factor = splat(query_factor(task))
    for head in range(item.heads):
        first = queries + head * item.padded_rows * key_row
        for r in range(item.rows):
            to = first + r * key_row
            widen_row(to, query_at(task, item.sequence, item.kv_head + head, item.row + r), task.head_dim, task.q_dtype)
            for at in range(to, to + key_row, VECTOR_BYTES):
                store(at, mul(load(at), factor))
        clear(first + item.rows * key_row, (item.padded_rows - item.rows) * key_row)


@piece
def _score(task, item, scratch):
    """Scores of all keys, all rows; -inf where there is no token, and to a whole vector."""
    scores, queries, tile = scratch + _SCORES, scratch + _QUERIES, scratch + _TILE
    rows = item.heads * item.padded_rows
    query_row = 4 * padded(task.head_dim)
    tile_keys = TILE_KEYS if item.heads == 1 else _SHARED_TILE_KEYS
    stop = load_int(task.bounds + 8 * item.sequence + 8)
    first_run = skip_runs(task, item.sequence, load_int(task.bounds + 8 * item.sequence), item.begin)
    run = first_run
    at = 0
    while run < stop and at < item.keys:
        low = max(run_field(task, run, START) - item.begin, at)
        high = min(run_end(task, run) - item.begin, item.keys)
        stride = run_field(task, run, K_TOKEN_STRIDE)
        if low < high:
            _forbid(scores, rows, at, low)
        if low < high and is_quantized(task, run):
            following = value_at(task, first_run, item.kv_head, item.begin)
            if run + 1 < stop and high < item.keys:
                following = key_at(task, run + 1, item.kv_head, run_field(task, run + 1, START))
            ahead = following - key_at(task, run, item.kv_head, item.begin + low)
            score_quantized(
                task,
                run,
                item.kv_head,
                item.begin + low,
                high - low,
                ahead,
                rows,
                queries,
                query_row,
                scores + 4 * low,
                _SCORE_ROW,
                tile,
            )
            low = at = high
        while low < high:
            n = min(high - low, tile_keys)
            for head in range(item.heads):
                kv_head, first = item.kv_head + head, head * item.padded_rows
                keys = key_at(task, run, kv_head, item.begin + low)
                if item.heads > 1:
                    following = keys + _SHARED_AHEAD_KEYS * stride
                elif low + n < high:
                    following = keys + n * stride
                elif run + 1 < stop and high < item.keys:
                    following = key_at(task, run + 1, kv_head, run_field(task, run + 1, START))
                else:
                    following = value_at(task, first_run, kv_head, item.begin)
                ahead, key_row, dtype = following - keys, stride, task.kv_dtype
                if task.head_dim % LANES != 0:
                    for i in range(n):
                        widen_row(tile + i * query_row, keys + i * stride, task.head_dim, task.kv_dtype)
                    keys, ahead, key_row, dtype = tile, 0, query_row, FLOAT32
                steps = query_row // VECTOR_BYTES
                r, last = first, first + item.padded_rows
                while r < last:
                    together = min(last - r, ROWS_TOGETHER)
                    q, to = queries + r * query_row, scores + r * _SCORE_ROW + 4 * low
                    score_keys(dtype, together, keys, key_row, n, ahead, q, query_row, steps, to, _SCORE_ROW)
                    r += together
            low += n
            at = low
        run += 1
    _forbid(scores, rows, at, padded(item.keys))


@native
def _forbid(scores, rows, low, high):
    """Set scores to -inf."""
    for r in range(rows):
        for n in range(low, high):
            store_float(scores + r * _SCORE_ROW + 4 * n, NEG_INF)


@native
def _score_options(task, item, kv_head, row, scores, memory):
    """Softcap, ALiBi and bias on a row's scores; `memory` is a vector's."""
    if task.softcap != 0:
        cap_scores(task, scores, scores + 4 * item.keys)
    if task.alibi_slopes != 0:
        head = item.sequence * task.q_heads + query_head(task, kv_head, row)
        slopes = splat(-load_float(task.alibi_slopes + 4 * head) * LOG2E)
        distances = sub(splat(np.float32(query_position(task, item.sequence, row) - item.begin)), lane_numbers())
        for at in range(scores, scores + 4 * item.keys, VECTOR_BYTES):
            store(at, fma(slopes, absolute(distances), load(at)))
            distances = sub(distances, splat(np.float32(LANES)))
    if task.bias_dtype != NO_BIAS:
        add_row_bias(task, item.sequence, kv_head, row, item.begin, item.keys, scores, memory)


@native
def _mask_row(task, item, row, scores):
    """Forbid what a row does not see, and what the options may have put behind the last key."""
    here = query_position(task, item.sequence, row) - item.begin
    low = here - load_int(task.left + 8 * item.sequence)
    high = here + load_int(task.right + 8 * item.sequence) + 1
    _forbid(scores, 1, max(load_int(task.sinks + 8 * item.sequence) - item.begin, 0), min(low, item.keys))
    _forbid(scores, 1, min(max(high, 0), item.keys), padded(item.keys))


@native
def _softmax_row(scores, count):
    """Turn a row's scores of base 2 into weights 2^(s - m); returns m and the weights' sum."""
    forbidden = splat(np.float32(-np.inf))
    top = forbidden
    for at in range(scores, scores + 4 * count, VECTOR_BYTES):
        top = maximum(top, load(at))
    m = horizontal_max(top)
    base = splat(np.float32(0) if m == NEG_INF else m)
    total = splat(np.float32(0))
    for at in range(scores, scores + 4 * count, VECTOR_BYTES):
        weight = exp2(sub(load(at), base))
        store(at, weight)
        total = add(total, weight)
    return m, horizontal_sum(total)


@piece
def _weigh(task, task_address, item, scratch, exact):
    """O += P V over the keys; with `exact`, a weight of 0 takes nothing from a NaN or an infinity."""
    weights, out, tile, shifts = scratch + _SCORES, scratch + OUT, scratch + _TILE, scratch + _SHIFTS
    rows = item.heads * item.padded_rows
    out_row = 4 * padded(task.value_dim)
    steps = out_row // VECTOR_BYTES
    tile_keys = TILE_KEYS if item.heads == 1 else _SHARED_TILE_KEYS
    if task.codes != 0:
        clear(shifts, rows * SHIFTS_ROW)
    stop = load_int(task.bounds + 8 * item.sequence + 8)
    run = skip_runs(task, item.sequence, load_int(task.bounds + 8 * item.sequence), item.begin)
    at = 0
    while run < stop and at < item.keys:
        low = max(run_field(task, run, START) - item.begin, at)
        high = min(run_end(task, run) - item.begin, item.keys)
        stride = run_field(task, run, V_TOKEN_STRIDE)
        if low < high and is_quantized(task, run):
            if run + 1 < stop and high < item.keys:
                following = value_at(task, run + 1, item.kv_head, run_field(task, run + 1, START))
            else:
                following = untaken_keys(task, task_address)
            ahead = following - value_at(task, run, item.kv_head, item.begin + low)
            weigh_quantized(
                task,
                run,
                item.kv_head,
                item.begin + low,
                high - low,
                ahead,
                rows,
                weights + 4 * low,
                _SCORE_ROW,
                out,
                out_row,
                shifts,
                tile,
            )
            low = at = high
        while low < high:
            n = min(high - low, tile_keys)
            for head in range(item.heads):
                kv_head, first = item.kv_head + head, head * item.padded_rows
                values = value_at(task, run, kv_head, item.begin + low)
                following = values
                if item.heads > 1:
                    following = values + _SHARED_AHEAD_KEYS * stride
                elif low + n < high:
                    following = values + n * stride
                elif run + 1 < stop and high < item.keys:
                    following = value_at(task, run + 1, kv_head, run_field(task, run + 1, START))
                ahead, value_row, dtype = following - values, stride, task.kv_dtype
                if task.value_dim % LANES != 0:
                    for i in range(n):
                        widen_row(tile + i * out_row, values + i * stride, task.value_dim, task.kv_dtype)
                    values, ahead, value_row, dtype = tile, 0, out_row, FLOAT32
                r, last = first, first + item.padded_rows
                while r < last:
                    together = 1 if exact else min(last - r, ROWS_TOGETHER)
                    p, to = weights + r * _SCORE_ROW + 4 * low, out + r * out_row
                    if exact:
                        for i in range(n):
                            if load_float(p + 4 * i) != 0:
                                v = values + i * value_row
                                weigh_values(dtype, 1, v, value_row, 0, p + 4 * i, 0, 1, to, out_row, steps)
                    else:
                        weigh_values(dtype, together, values, value_row, ahead, p, _SCORE_ROW, n, to, out_row, steps)
                    r += together
            low += n
            at = low
        run += 1
    if task.codes != 0:
        add_shifts(task, rows, shifts, out, out_row)

"""Split-KV decode ("FlashDecoding"): few query tokens, many keys, bound by reading K and V once.

A work item is one split of the keys of one KV head: positions s * SPLIT_KEYS to (s + 1) * SPLIT_KEYS, whatever the
number of threads. All rows (tokens x query heads of the group) go through it together, so K and V are read once, in
the dtype and the place in which they are. Whoever finishes the last split of a head merges them, in order, by their m
and l.
"""

from __future__ import annotations

import numpy as np

from ..problem import MAX_HEAD_DIM
from .codes import SHIFTS_ROW, add_shifts, is_quantized, score_quantized, weigh_quantized
from .emit import FLOAT32
from .functions import LOG2E, exp2
from .jit import kernel, native
from .kv import TILE_KEYS
from .micro import ROWS_PER_SCORE, score_keys, weigh_values
from .panel import is_finite, lse_at, out_at, query_at, query_factor, query_head, query_position, query_rows
from .rows import VECTOR_BYTES, clear, narrow_row, padded, widen_row
from .runs import COUNT, K_TOKEN_STRIDE, START, V_TOKEN_STRIDE
from .scoring import NEG_INF, add_bias, bias_at, cap_scores
from .softmax import normalize_row
from .task import NO_BIAS, next_item, report_item, take_item, task_at
from .vector import (
    LANES,
    absolute,
    add,
    atomic_add,
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
from .walk import key_at, run_end, run_field, runs_end, skip_runs, value_at

__all__ = ["DECODE_SCRATCH", "decode", "partial_bytes", "plan_decode"]

# Keys of a split: enough that merging costs nothing beside reading them, few enough that one KV head of a 4096 token
# sequence still makes 8 items.
SPLIT_KEYS = 512
MAX_DECODE_ROWS = 64

# Where things lie in a thread's scratch memory. A row of scores has room for a vector more: `score_keys` overruns.
_SCORE_ROW = 4 * (SPLIT_KEYS + LANES)
_QUERIES = 0
_OUT = _QUERIES + 4 * MAX_DECODE_ROWS * MAX_HEAD_DIM
_TILE = _OUT + 4 * MAX_DECODE_ROWS * MAX_HEAD_DIM
_SCORES = _TILE + 4 * TILE_KEYS * MAX_HEAD_DIM
_MAXIMA = _SCORES + MAX_DECODE_ROWS * _SCORE_ROW
_SUMS = _MAXIMA + 4 * MAX_DECODE_ROWS
_SHIFTS = _SUMS + 4 * MAX_DECODE_ROWS
DECODE_SCRATCH = _SHIFTS + MAX_DECODE_ROWS * SHIFTS_ROW


@native
def key_range(task, sequence):
    """Positions that any query of a sequence may see: (first behind the sinks, end)."""
    first = max(load_int(task.q_start + 8 * sequence) - load_int(task.left + 8 * sequence), 0)
    last_query = query_position(task, sequence, query_rows(task, sequence) - 1)
    return first, min(last_query + load_int(task.right + 8 * sequence) + 1, runs_end(task, sequence))


@native
def count_splits(task, sequence):
    """Splits that hold sink tokens, the first split of the window, and the number of both together (at least 1)."""
    first, end = key_range(task, sequence)
    sinks = max(min(load_int(task.sinks + 8 * sequence), end), 0)
    sink_splits = (sinks + SPLIT_KEYS - 1) // SPLIT_KEYS
    window = max(first // SPLIT_KEYS, sink_splits)
    return sink_splits, window, max(sink_splits + max((end + SPLIT_KEYS - 1) // SPLIT_KEYS - window, 0), 1)


@native
def split_number(task, sequence, split):
    """Which SPLIT_KEYS positions of a sequence are its n-th split."""
    sink_splits, window, _ = count_splits(task, sequence)
    return split if split < sink_splits else window + split - sink_splits


@native
def locate(task, item):
    """The split, unit, sequence, KV head and first row of an item."""
    blocks = (task.q_tokens * task.group + task.rows_per_item - 1) // task.rows_per_item
    units = task.sequences * task.kv_heads * blocks
    # Heads before splits: where the heads of a token lie side by side, they are read together.
    split, unit = item // units, item % units
    pair, row = unit // blocks, unit % blocks * task.rows_per_item
    return split, unit, pair // task.kv_heads, pair % task.kv_heads, row


@native
def untaken_keys(task, task_address):
    """Where the first keys lie of the next item that nobody has taken; 0 where there is none."""
    item = next_item(task_address)
    if item >= task.items:
        return 0
    split, _, sequence, kv_head, _ = locate(task, item)
    position = split_number(task, sequence, split) * SPLIT_KEYS
    run = skip_runs(task, sequence, load_int(task.bounds + 8 * sequence), position)
    if run >= load_int(task.bounds + 8 * sequence + 8):
        return 0
    return key_at(task, run, kv_head, max(position, run_field(task, run, START)))


@kernel
def plan_decode(task_address):
    """Fill in rows_per_item, splits and kv_tokens; return the number of items."""
    task = task_at(task_address)
    rows = task.q_tokens * task.group
    task.kv_tokens = 0
    for run in range(load_int(task.bounds), load_int(task.bounds + 8 * task.sequences)):
        task.kv_tokens += run_field(task, run, COUNT)
    splits = 1
    for sequence in range(task.sequences):
        splits = max(splits, count_splits(task, sequence)[2])
    task.splits = splits
    task.rows_per_item = min(rows, MAX_DECODE_ROWS)
    blocks = (rows + task.rows_per_item - 1) // task.rows_per_item
    return task.sequences * task.kv_heads * blocks * splits


@kernel
def decode(task_address, scratch):
    """Take work items until there are none; any number of threads may run this at once, each with its own scratch."""
    task = task_at(task_address)
    while True:
        item = take_item(task_address)
        if item >= task.items:
            break
        split, unit, sequence, kv_head, row = locate(task, item)
        rows = min(task.rows_per_item, query_rows(task, sequence) - row)
        splits = count_splits(task, sequence)[2]
        if split < splits and rows > 0:
            attend_split(task, task_address, sequence, kv_head, row, rows, split_number(task, sequence, split), scratch)
            if splits == 1:
                write_rows(task, sequence, kv_head, row, rows, scratch)
            else:
                save_split(task, unit, split, rows, scratch)
                if atomic_add(task.splits_done + 8 * unit, 1) == splits - 1:
                    merge_splits(task, unit, splits, rows, scratch)
                    write_rows(task, sequence, kv_head, row, rows, scratch)
        report_item(task_address)


@native
def attend_split(task, task_address, sequence, kv_head, row, rows, split, scratch):
    """Leave O (not divided by l), m and l of one split's keys in scratch memory."""
    key_row, out_row = 4 * padded(task.head_dim), 4 * padded(task.value_dim)
    all_rows = rows if rows == 1 else (rows + ROWS_PER_SCORE - 1) // ROWS_PER_SCORE * ROWS_PER_SCORE
    load_query_rows(task, sequence, kv_head, row, rows, all_rows, scratch + _QUERIES, key_row)

    first, end = key_range(task, sequence)
    begin = split * SPLIT_KEYS
    end = min(end, begin + SPLIT_KEYS)
    if begin >= load_int(task.sinks + 8 * sequence):
        begin = max(begin, first)
    count = max(end - begin, 0)

    scores = scratch + _SCORES
    score_split(task, sequence, kv_head, all_rows, begin, count, scratch)
    for r in range(rows):
        at = scores + r * _SCORE_ROW
        score_options(task, sequence, kv_head, row + r, begin, count, at)
        mask_row(task, sequence, row + r, begin, count, at)
        m, total = softmax_row(at, count)
        store_float(scratch + _MAXIMA + 4 * r, m)
        store_float(scratch + _SUMS + 4 * r, total)
    for r in range(rows, all_rows):
        clear(scores + r * _SCORE_ROW, 4 * padded(count))

    out = scratch + _OUT
    clear(out, all_rows * out_row)
    weigh_split(task, task_address, sequence, kv_head, all_rows, begin, count, scratch, False)
    if not is_finite(out, out + rows * out_row):
        # Somewhere a NaN or an infinity came in: again, and let a weight of 0 take nothing from its value.
        clear(out, all_rows * out_row)
        weigh_split(task, task_address, sequence, kv_head, rows, begin, count, scratch, True)


@native
def load_query_rows(task, sequence, kv_head, row, rows, all_rows, queries, key_row):
    factor = splat(query_factor(task))
    for r in range(rows):
        to = queries + r * key_row
        widen_row(to, query_at(task, sequence, kv_head, row + r), task.head_dim, task.q_dtype)
        for at in range(to, to + key_row, VECTOR_BYTES):
            store(at, mul(load(at), factor))
    clear(queries + rows * key_row, (all_rows - rows) * key_row)


@native
def score_split(task, sequence, kv_head, rows, begin, count, scratch):
    """Scores of `count` positions from `begin` on, all rows; -inf where there is no token, and to a whole vector."""
    scores, queries, tile = scratch + _SCORES, scratch + _QUERIES, scratch + _TILE
    query_row = 4 * padded(task.head_dim)
    together = 1 if rows == 1 else ROWS_PER_SCORE
    stop = load_int(task.bounds + 8 * sequence + 8)
    first_run = skip_runs(task, sequence, load_int(task.bounds + 8 * sequence), begin)
    run = first_run
    at = 0
    while run < stop and at < count:
        low = max(run_field(task, run, START) - begin, at)
        high = min(run_end(task, run) - begin, count)
        stride = run_field(task, run, K_TOKEN_STRIDE)
        if low < high:
            forbid(scores, rows, at, low)
        if low < high and is_quantized(task, run):
            following = value_at(task, first_run, kv_head, begin)
            if run + 1 < stop and high < count:
                following = key_at(task, run + 1, kv_head, run_field(task, run + 1, START))
            ahead = following - key_at(task, run, kv_head, begin + low)
            score_quantized(
                task,
                run,
                kv_head,
                begin + low,
                high - low,
                ahead,
                rows,
                together,
                queries,
                query_row,
                scores + 4 * low,
                _SCORE_ROW,
                tile,
            )
            low = at = high
        while low < high:
            n = min(high - low, TILE_KEYS)
            keys = key_at(task, run, kv_head, begin + low)
            if low + n < high:
                following = keys + n * stride
            elif run + 1 < stop and high < count:
                following = key_at(task, run + 1, kv_head, run_field(task, run + 1, START))
            else:
                following = value_at(task, first_run, kv_head, begin)
            ahead, key_row, dtype = following - keys, stride, task.kv_dtype
            if task.head_dim % LANES != 0:
                for i in range(n):
                    widen_row(tile + i * query_row, keys + i * stride, task.head_dim, task.kv_dtype)
                keys, ahead, key_row, dtype = tile, 0, query_row, FLOAT32
            for r in range(0, rows, together):
                q, to = queries + r * query_row, scores + r * _SCORE_ROW + 4 * low
                score_keys(
                    dtype, together, keys, key_row, n, ahead, q, query_row, query_row // VECTOR_BYTES, to, _SCORE_ROW
                )
            low += n
            at = low
        run += 1
    forbid(scores, rows, at, padded(count))


@native
def forbid(scores, rows, low, high):
    """Set scores to -inf."""
    for r in range(rows):
        for n in range(low, high):
            store_float(scores + r * _SCORE_ROW + 4 * n, NEG_INF)


@native
def score_options(task, sequence, kv_head, row, begin, count, scores):
    """Softcap, ALiBi and bias on a row's scores of `count` positions from `begin` on."""
    if task.softcap != 0:
        cap_scores(task, scores, scores + 4 * count)
    if task.alibi_slopes != 0:
        head = sequence * task.q_heads + query_head(task, kv_head, row)
        slopes = splat(-load_float(task.alibi_slopes + 4 * head) * LOG2E)
        distances = sub(splat(np.float32(query_position(task, sequence, row) - begin)), lane_numbers())
        for at in range(scores, scores + 4 * count, VECTOR_BYTES):
            store(at, fma(slopes, absolute(distances), load(at)))
            distances = sub(distances, splat(np.float32(LANES)))
    if task.bias_dtype != NO_BIAS:
        add_bias(task, bias_at(task, sequence, kv_head, row, begin), count, scores, 4)


@native
def mask_row(task, sequence, row, begin, count, scores):
    """Forbid what a row does not see, and what the options may have put behind the last key."""
    here = query_position(task, sequence, row) - begin
    low = here - load_int(task.left + 8 * sequence)
    high = here + load_int(task.right + 8 * sequence) + 1
    forbid(scores, 1, max(load_int(task.sinks + 8 * sequence) - begin, 0), min(low, count))
    forbid(scores, 1, min(max(high, 0), count), padded(count))


@native
def softmax_row(scores, count):
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


@native
def weigh_split(task, task_address, sequence, kv_head, rows, begin, count, scratch, exact):
    """O += P V over the positions of a split; with `exact`, a weight of 0 takes nothing from a NaN or an infinity."""
    weights, out, tile, shifts = scratch + _SCORES, scratch + _OUT, scratch + _TILE, scratch + _SHIFTS
    out_row = 4 * padded(task.value_dim)
    steps = out_row // VECTOR_BYTES
    together = 1 if exact or rows == 1 else ROWS_PER_SCORE
    if task.codes != 0:
        clear(shifts, rows * SHIFTS_ROW)
    stop = load_int(task.bounds + 8 * sequence + 8)
    run = skip_runs(task, sequence, load_int(task.bounds + 8 * sequence), begin)
    at = 0
    while run < stop and at < count:
        low = max(run_field(task, run, START) - begin, at)
        high = min(run_end(task, run) - begin, count)
        stride = run_field(task, run, V_TOKEN_STRIDE)
        if low < high and is_quantized(task, run):
            if run + 1 < stop and high < count:
                following = value_at(task, run + 1, kv_head, run_field(task, run + 1, START))
            else:
                following = untaken_keys(task, task_address)
            ahead = following - value_at(task, run, kv_head, begin + low)
            weigh_quantized(
                task,
                run,
                kv_head,
                begin + low,
                high - low,
                ahead,
                rows,
                exact,
                weights + 4 * low,
                _SCORE_ROW,
                out,
                out_row,
                shifts,
                tile,
            )
            low = at = high
        while low < high:
            n = min(high - low, TILE_KEYS)
            values = value_at(task, run, kv_head, begin + low)
            following = values
            if low + n < high:
                following = values + n * stride
            elif run + 1 < stop and high < count:
                following = value_at(task, run + 1, kv_head, run_field(task, run + 1, START))
            ahead, value_row, dtype = following - values, stride, task.kv_dtype
            if task.value_dim % LANES != 0:
                for i in range(n):
                    widen_row(tile + i * out_row, values + i * stride, task.value_dim, task.kv_dtype)
                values, ahead, value_row, dtype = tile, 0, out_row, FLOAT32
            for r in range(0, rows, together):
                p, to = weights + r * _SCORE_ROW + 4 * low, out + r * out_row
                if exact:
                    for i in range(n):
                        if load_float(p + 4 * i) != 0:
                            v = values + i * value_row
                            weigh_values(dtype, 1, v, value_row, 0, p + 4 * i, 0, 1, to, out_row, steps)
                else:
                    weigh_values(dtype, together, values, value_row, ahead, p, _SCORE_ROW, n, to, out_row, steps)
            low += n
            at = low
        run += 1
    if task.codes != 0:
        add_shifts(task, rows, shifts, out, out_row)


def partial_bytes(value_dim: int) -> int:
    """Bytes that one row of one split leaves in the workspace: O, m and l."""
    return 4 * (-(-value_dim // LANES) * LANES) + 8


@native
def partial_at(task, unit, split):
    """Address of what one split of one unit left: O row by row, then the rows' m, then their l."""
    row_bytes = 4 * padded(task.value_dim) + 8
    return task.workspace + (unit * task.splits + split) * task.rows_per_item * row_bytes


@native
def save_split(task, unit, split, rows, scratch):
    out_row = 4 * padded(task.value_dim)
    to = partial_at(task, unit, split)
    for at in range(0, rows * out_row, VECTOR_BYTES):
        store(to + at, load(scratch + _OUT + at))
    to += rows * out_row
    for r in range(rows):
        store_float(to + 4 * r, load_float(scratch + _MAXIMA + 4 * r))
        store_float(to + 4 * (rows + r), load_float(scratch + _SUMS + 4 * r))


@native
def merge_splits(task, unit, splits, rows, scratch):
    """O, m and l over all splits, in scratch memory: each split counts 2^(its m - the largest m)."""
    out_row = 4 * padded(task.value_dim)
    for r in range(rows):
        top = NEG_INF
        for split in range(splits):
            top = max(top, load_float(partial_at(task, unit, split) + rows * out_row + 4 * r))
        base = np.float32(0) if top == NEG_INF else top
        out = scratch + _OUT + r * out_row
        clear(out, out_row)
        total = np.float32(0)
        for split in range(splits):
            partial = partial_at(task, unit, split)
            m = load_float(partial + rows * out_row + 4 * r)
            factor = exp2(splat(m - base))
            total += horizontal_max(factor) * load_float(partial + rows * out_row + 4 * (rows + r))
            for at in range(0, out_row, VECTOR_BYTES):
                store(out + at, fma(factor, load(partial + r * out_row + at), load(out + at)))
        store_float(scratch + _MAXIMA + 4 * r, top)
        store_float(scratch + _SUMS + 4 * r, total)


@native
def write_rows(task, sequence, kv_head, row, rows, scratch):
    """Divide O by l, let the sink logit join, and write the rows' outputs and log-sum-exps."""
    out_row = 4 * padded(task.value_dim)
    for r in range(rows):
        m, total = load_float(scratch + _MAXIMA + 4 * r), load_float(scratch + _SUMS + 4 * r)
        factor, log_sum = normalize_row(task, query_head(task, kv_head, row + r), m, total)
        to = out_at(task, sequence, kv_head, row + r)
        narrow_row(to, scratch + _OUT + r * out_row, task.value_dim, task.q_dtype, factor)
        store_float(lse_at(task, sequence, kv_head, row + r), log_sum)

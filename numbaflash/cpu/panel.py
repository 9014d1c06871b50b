"""A panel: up to PANEL_ROWS query rows of one KV head, transposed, so that each lane of a vector is a row.

A row is a (token, query head) pair; the group of query heads that shares a KV head fills a panel together, token by
token. Scores S (keys x rows) and outputs O (value_dim x rows) lie in the same way. What a lane computes depends on its
own row alone.
"""

from __future__ import annotations

import math

import numpy as np

from .functions import LN2, LOG2E, exp2, tanh
from .jit import native
from .micro import (
    PANEL_VECTORS,
    TILE_ROWS,
    accumulate_panel,
    accumulate_panel_skipping_zeros,
    multiply_panel,
    transpose_block,
)
from .rows import clear, load_element, narrow_row, padded, widen_row
from .task import BOOL_BIAS, NO_BIAS
from .vector import (
    LANES,
    absolute,
    add,
    both,
    equal,
    fma,
    horizontal_sum,
    less_equal,
    load,
    load_byte,
    load_float,
    load_int,
    maximum,
    mul,
    splat,
    store,
    store_float,
    sub,
    where,
)

__all__ = [
    "PANEL_ROWS",
    "VECTOR_BYTES",
    "finish_panel",
    "is_finite",
    "load_queries",
    "score_panel",
    "softmax_panel",
    "weigh_panel",
]

VECTOR_BYTES = 4 * LANES
PANEL_ROWS = PANEL_VECTORS * LANES
NEG_INF = np.float32(-np.inf)


@native
def query_position(task, sequence, row):
    """Position of the token that a row belongs to."""
    return load_int(task.q_start + 8 * sequence) + row // task.group


@native
def load_queries(task, sequence, kv_head, row, rows, vectors, panel, staging):
    """Write Q^T (head_dim x lanes) of `rows` rows from `row` on, times the factor that makes scores of base 2."""
    dim, dim_row = task.head_dim, 4 * padded(task.head_dim)
    for r in range(vectors * LANES):
        at = staging + r * dim_row
        if r < rows:
            token, head = (row + r) // task.group, kv_head * task.group + (row + r) % task.group
            source = task.q + sequence * task.q_batch + token * task.q_token + head * task.q_head
            widen_row(at, source, dim, task.q_dtype)
        else:
            clear(at, dim_row)
    lanes_row = vectors * VECTOR_BYTES
    for v in range(vectors):
        for d in range(0, padded(dim), LANES):
            transpose_block(
                staging + v * LANES * dim_row + 4 * d, dim_row, panel + d * lanes_row + v * VECTOR_BYTES, lanes_row
            )
    factor = splat(query_factor(task))
    for at in range(panel, panel + dim * lanes_row, VECTOR_BYTES):
        store(at, mul(load(at), factor))


@native
def query_factor(task):
    """What a query is multiplied by, so that q.k is the score in base 2, or the argument of the softcap's tanh."""
    if task.softcap != 0:
        return task.scale / task.softcap
    return task.scale * LOG2E


@native
def score_panel(task, vectors, queries, keys, key_row, count, scores):
    """S = K Q^T for `count` keys, rounded up to a multiple of TILE_ROWS."""
    lanes_row = vectors * VECTOR_BYTES
    for n in range(0, count, TILE_ROWS):
        at = keys + n * key_row
        multiply_panel(vectors, at, key_row, 4, queries, lanes_row, task.head_dim, scores + n * lanes_row, lanes_row)


@native
def apply_scoring(task, sequence, kv_head, row, rows, vectors, position, count, scores, lanes):
    """Softcap, ALiBi and bias on the scores of `count` keys from `position` on; the result is of base 2."""
    lanes_row = vectors * VECTOR_BYTES
    if task.softcap != 0:
        cap = splat(task.softcap * LOG2E)
        for at in range(scores, scores + count * lanes_row, VECTOR_BYTES):
            store(at, mul(cap, tanh(load(at))))
    if task.alibi_slopes != 0:
        slopes, distances = lanes, lanes + 4 * PANEL_ROWS
        for r in range(vectors * LANES):
            q_row = row + min(r, rows - 1)
            head = kv_head * task.group + q_row % task.group
            slope = load_float(task.alibi_slopes + 4 * (sequence * task.q_heads + head))
            store_float(slopes + 4 * r, -slope * LOG2E)
            store_float(distances + 4 * r, np.float32(query_position(task, sequence, q_row) - position))
        for n in range(count):
            for v in range(vectors):
                at = scores + n * lanes_row + v * VECTOR_BYTES
                distance = absolute(sub(load(distances + v * VECTOR_BYTES), splat(n)))
                store(at, fma(load(slopes + v * VECTOR_BYTES), distance, load(at)))
    if task.bias_dtype != NO_BIAS:
        for r in range(rows):
            token, head = (row + r) // task.group, kv_head * task.group + (row + r) % task.group
            bias = task.bias + sequence * task.bias_batch + head * task.bias_head + token * task.bias_row
            add_bias(task, bias + position * task.bias_key, count, scores + 4 * r, lanes_row)


@native
def add_bias(task, bias, count, scores, score_stride):
    """Add `count` elements of one row's bias to its scores of base 2; -inf and False forbid the key, be it NaN."""
    for n in range(count):
        at = bias + n * task.bias_key
        to = scores + n * score_stride
        if task.bias_dtype == BOOL_BIAS:
            if load_byte(at) == 0:
                store_float(to, NEG_INF)
        else:
            value = load_element(at, task.bias_dtype)
            store_float(to, NEG_INF if value == NEG_INF else load_float(to) + value * LOG2E)


@native
def mask_panel(task, sequence, row, rows, vectors, position, count, scores, exists, lanes):
    """Set the scores of keys that a row does not see to -inf; keys whose `exists` is 0 nobody sees."""
    lanes_row = vectors * VECTOR_BYTES
    lowest, highest = lanes, lanes + 4 * PANEL_ROWS
    left, right = load_int(task.left + 8 * sequence), load_int(task.right + 8 * sequence)
    sinks = load_int(task.sinks + 8 * sequence) - position
    for r in range(vectors * LANES):
        here = query_position(task, sequence, row + min(r, rows - 1)) - position
        store_float(lowest + 4 * r, np.float32(min(max(here - left, -1), count)))
        store_float(highest + 4 * r, np.float32(min(max(here + right, -1), count)))
    forbidden = splat(NEG_INF)
    for n in range(count):
        key = splat(np.float32(n))
        key_exists = exists == 0 or load_float(exists + 4 * n) != 0
        for v in range(vectors):
            at = scores + n * lanes_row + v * VECTOR_BYTES
            if not key_exists:
                store(at, forbidden)
                continue
            seen = less_equal(key, load(highest + v * VECTOR_BYTES))
            if n >= sinks:
                seen = both(seen, less_equal(load(lowest + v * VECTOR_BYTES), key))
            store(at, where(seen, load(at), forbidden))


@native
def softmax_panel(vectors, count, scores, maxima, sums, factors):
    """One step of the online softmax (FlashAttention-2, Algorithm 1, lines 9 and 10), in base 2.

    S becomes P = 2^(S - m), m and l are brought up to date, and `factors` gets what O is to be multiplied by. A row
    that sees no key of the tile keeps its m and l, and gets a factor of exactly 1.
    """
    lanes_row = vectors * VECTOR_BYTES
    forbidden, zero = splat(NEG_INF), splat(np.float32(0))
    for lane in range(0, lanes_row, VECTOR_BYTES):
        old = load(maxima + lane)
        start, end = scores + lane, scores + lane + count * lanes_row
        new = column_maximum(start, end, lanes_row, old)
        base = where(equal(new, forbidden), zero, new)
        total = zero
        for at in range(start, end, lanes_row):
            p = exp2(sub(load(at), base))
            store(at, p)
            total = add(total, p)
        factor = exp2(sub(old, base))
        store(factors + lane, factor)
        store(maxima + lane, new)
        store(sums + lane, fma(load(sums + lane), factor, total))


@native
def column_maximum(start, end, stride, old):
    """The maximum of `old` and the vectors from `start` to `end`, by four chains to hide the latency of each step."""
    a = b = c = d = old
    at = start
    while at + 3 * stride < end:
        a = maximum(a, load(at))
        b = maximum(b, load(at + stride))
        c = maximum(c, load(at + 2 * stride))
        d = maximum(d, load(at + 3 * stride))
        at += 4 * stride
    while at < end:
        a = maximum(a, load(at))
        at += stride
    return maximum(maximum(a, b), maximum(c, d))


@native
def weigh_panel(vectors, values, value_row, value_dim, weights, count, out, factors, exact):
    """O = O * factors + V^T P; with `exact`, a weight of 0 takes nothing from a value that is NaN or infinite."""
    lanes_row = vectors * VECTOR_BYTES
    for d in range(0, value_dim, TILE_ROWS):
        v, o = values + 4 * d, out + d * lanes_row
        if exact:
            for lane in range(0, lanes_row, VECTOR_BYTES):
                accumulate_panel_skipping_zeros(
                    v, 4, value_row, weights + lane, lanes_row, count, o + lane, lanes_row, factors + lane
                )
        else:
            accumulate_panel(vectors, v, 4, value_row, weights, lanes_row, count, o, lanes_row, factors)


@native
def is_finite(start, end):
    """Whether all float32 from address `start` to `end`, whole vectors, are finite."""
    zero = splat(np.float32(0))
    total = zero
    for at in range(start, end, VECTOR_BYTES):
        total = fma(load(at), zero, total)
    return horizontal_sum(total) == 0


@native
def finish_panel(task, sequence, kv_head, row, rows, vectors, out, maxima, sums, staging):
    """Divide O by l, let the sink logit join, and write the rows' outputs and log-sum-exps."""
    dim, dim_row = task.value_dim, 4 * padded(task.value_dim)
    lanes_row = vectors * VECTOR_BYTES
    for v in range(vectors):
        for d in range(0, padded(dim), LANES):
            transpose_block(
                out + d * lanes_row + v * VECTOR_BYTES, lanes_row, staging + v * LANES * dim_row + 4 * d, dim_row
            )
    for r in range(rows):
        token, head = (row + r) // task.group, kv_head * task.group + (row + r) % task.group
        m, total = load_float(maxima + 4 * r), load_float(sums + 4 * r)
        factor, log_sum = normalize(task, head, m, total)
        to = task.out + sequence * task.out_batch + token * task.out_token + head * task.out_head
        narrow_row(to, staging + r * dim_row, dim, task.q_dtype, factor)
        if task.lse != 0:
            store_float(task.lse + sequence * task.lse_batch + head * task.lse_head + token * task.lse_token, log_sum)


@native
def normalize(task, head, m, total):
    """What a row's unnormalised output is multiplied by, and its natural log-sum-exp, from its m and l of base 2."""
    top = np.float64(m)
    scaled = np.float64(total)
    if task.sink_logits != 0:
        logit = np.float64(load_float(task.sink_logits + 4 * head)) / LN2
        # A NaN in m or l stays: it fails the comparison.
        higher = logit if logit > top else top
        if higher == -np.inf:
            return np.float32(0), NEG_INF
        sink = 2.0 ** (logit - higher)
        rescale = 0.0 if top == -np.inf else 2.0 ** (top - higher)
        whole = scaled * rescale + sink
        return np.float32(rescale / whole), np.float32((higher + math.log2(whole)) * LN2)
    if scaled == 0:
        return np.float32(0), NEG_INF
    return np.float32(1.0 / scaled), np.float32((top + math.log2(scaled)) * LN2)

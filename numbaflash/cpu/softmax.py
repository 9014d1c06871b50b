"""The softmax of a panel's columns, in base 2, all at once or tile by tile; m is the maximum, l the sum of weights."""

from __future__ import annotations

import math

import numpy as np

from .functions import LN2, NEG_INF, exp2
from .jit import native
from .panel import lse_at, query_head
from .rows import VECTOR_BYTES
from .vector import add, equal, fma, load, load_float, maximum, splat, store, store_float, sub, where

__all__ = ["normalize_panel", "normalize_row", "softmax_panel", "start_softmax"]


@native
def start_softmax(panel, maxima, sums):
    """Set m to -inf and l to 0."""
    for lane in range(0, panel.vectors * VECTOR_BYTES, VECTOR_BYTES):
        store(maxima + lane, splat(NEG_INF))
        store(sums + lane, splat(np.float32(0)))


@native
def softmax_panel(panel, count, scores, maxima, sums, factors):
    """One step of the online softmax (FlashAttention-2, Algorithm 1, lines 9 and 10) over `count` keys.

    S becomes P = 2^(S - m), m and l are brought up to date, and `factors` gets 2^(old m - m), what O is to be
    multiplied by. A row that sees none of the keys keeps its m and l, and gets a factor of exactly 1.
    """
    lanes_row = panel.vectors * VECTOR_BYTES
    zero = splat(np.float32(0))
    for lane in range(0, lanes_row, VECTOR_BYTES):
        start, end = scores + lane, scores + lane + count * lanes_row
        old = load(maxima + lane)
        new = _column_maximum(start, end, lanes_row, old)
        base = where(equal(new, splat(NEG_INF)), zero, new)
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
def _column_maximum(start, end, stride, old):
    """The maximum of `old` and the vectors from `start` to `end`; four chains hide the latency of each step."""
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
def normalize_panel(task, panel, maxima, sums, factors):
    """Let the sink logits join, write the rows' log-sum-exps, and 1 / l to `factors`."""
    for r in range(panel.rows):
        head = query_head(task, panel.kv_head, panel.row + r)
        factor, log_sum = normalize_row(task, head, load_float(maxima + 4 * r), load_float(sums + 4 * r))
        store_float(factors + 4 * r, factor)
        store_float(lse_at(task, panel.sequence, panel.kv_head, panel.row + r), log_sum)


@native
def normalize_row(task, head, m, total):
    """What a row's sum of weighted values is multiplied by, and its natural log-sum-exp."""
    top, weights = np.float64(m), np.float64(total)
    if task.sink_logits != 0:
        # A virtual key without a value. A NaN in m fails the comparison, and stays.
        logit = np.float64(load_float(task.sink_logits + 4 * head)) / LN2
        higher = logit if logit > top else top
        if higher == -np.inf:
            return np.float32(0), NEG_INF
        rescale = 0.0 if top == -np.inf else 2.0 ** (top - higher)
        weights = weights * rescale + 2.0 ** (logit - higher)
        return np.float32(rescale / weights), np.float32((higher + math.log2(weights)) * LN2)
    if weights == 0:
        return np.float32(0), NEG_INF
    return np.float32(1.0 / weights), np.float32((top + math.log2(weights)) * LN2)

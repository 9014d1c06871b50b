"""Queries and weights as 16-bit words, to be multiplied with codes in integers.

A row of float32 becomes words times a factor, its largest number MAX_WORD. What rounding leaves of each number, its
rest, is not lost. For float32 queries rests are a row of words of their own, of _REST_BITS more bits, whose sums are
added. For those of 16 bits the rests' sum is multiplied with the middle code, so that what is missing of each is its
product with a code's distance from the middle. Both roundings, of numbers and of codes, being as good as random, that
error is p * m / MAX_WORD of the one that codes bring with them, where p is the largest number over the root mean square
of all (of 256, 16 at most) and m the root mean square of those distances (74 where codes are spread evenly over 8 bits,
5 over 4): below 4 %, and below 0.3 %.
"""

from __future__ import annotations

import numpy as np

from ..problem import MAX_HEAD_DIM
from .emit import FLOAT32
from .jit import native
from .micro_codes import MAX_WORD, STEP_BYTES, store_words, word_of_element
from .rows import VECTOR_BYTES
from .vector import (
    LANES,
    absolute,
    add,
    fma,
    horizontal_max,
    horizontal_sum,
    lane_numbers,
    less,
    load,
    load_float,
    maximum,
    mul,
    splat,
    store,
    store_float,
    sub,
    where,
)

__all__ = [
    "FACTOR",
    "LACK",
    "MAX_PAGE",
    "REST_UNIT",
    "ROUNDED_ROW",
    "SHIFT",
    "WORDS_ROW",
    "has_rests",
    "round_queries",
    "round_weights",
]

MAX_PAGE = 256  # tokens

# Bytes of a row of words: a query's, whose last step may be incomplete, or one for each token of a page.
WORDS_ROW = 2 * (max(MAX_PAGE, MAX_HEAD_DIM) + 2 * STEP_BYTES)

# What is known of a row, at these bytes: two vectors whose lanes are to be put together (the largest numbers and then
# the rests; the shifts), what a word of 1 stands for, and, of a query, what its sums of words lack if there are no
# words of rests, and the sum of its shifts.
_TOPS = _RESTS = 0
_SHIFTS = _TOPS + VECTOR_BYTES
FACTOR = _SHIFTS + VECTOR_BYTES
LACK = FACTOR + 4
SHIFT = LACK + 4
ROUNDED_ROW = 3 * VECTOR_BYTES

_REST_BITS = 15
REST_UNIT = np.float32(2.0**-_REST_BITS)  # what a rest's word of 1 stands for, in words
_SMALLEST_FACTOR = np.float32(1e-30)  # what is below counts nothing beside a score, or a weight, of 1
_TO_WHOLE = np.float32(1.5 * 2**23)  # added and taken away again, it rounds what is below 2^22 to a whole number


@native
def has_rests(task):
    """Whether rests are words of their own; they lie as many rows behind the rows of words as those are."""
    return task.q_dtype == FLOAT32


@native
def round_queries(task, rows, elements, queries, query_row, scales, offsets, words, rounded):
    """Round a part of queries, of `elements` elements, to words; channels' scales go into them.

    Their shift is the product with the offsets of the channels or, where scales are the tokens', the sum of the
    elements. Rows go through each phase together: what puts lanes together waits for every instruction before it, and
    several rows can wait at once.
    """
    by_channel = task.key_group == 0
    for i in range(rows):
        top, shift = splat(np.float32(0)), splat(np.float32(0))
        for at in range(0, 4 * elements, VECTOR_BYTES):
            q = load(queries + i * query_row + at)
            if by_channel:
                shift = fma(q, load(offsets + at), shift)
                q = mul(q, load(scales + at))
            else:
                shift = add(shift, q)
            top = maximum(absolute(q), top)
        store(rounded + i * ROUNDED_ROW + _TOPS, top)
        store(rounded + i * ROUNDED_ROW + _SHIFTS, shift)
    _find_factors(rows, rounded)
    to_rests = rows * WORDS_ROW if has_rests(task) else 0
    for i in range(rows):
        at = rounded + i * ROUNDED_ROW
        inverse, rests = _inverse_factor(at), splat(np.float32(0))
        for d in range(0, elements, LANES):
            q = load(queries + i * query_row + 4 * d)
            if by_channel:
                q = mul(q, load(scales + 4 * d))
            to = words + i * WORDS_ROW + 2 * word_of_element(d, task.code_bits)
            rests = add(rests, _round(mul(q, inverse), to, to_rests))
        store(at + _RESTS, rests)
    for i in range(rows):
        at = rounded + i * ROUNDED_ROW
        if to_rests == 0:
            store_float(at + LACK, horizontal_sum(load(at + _RESTS)) * _middle_code(task))
        store_float(at + SHIFT, horizontal_sum(load(at + _SHIFTS)))


@native
def round_weights(task, rows, count, weights, row, scales, offsets, words, shifts, shifts_row, rounded):
    """Round rows of weights, times the scales of their tokens, to words, and zeros behind them.

    What they make of offsets, and what the words lack, is added to the lanes at `shifts`.
    """
    zero = splat(np.float32(0))
    for i in range(rows):
        top, shift = zero, load(shifts + i * shifts_row)
        for n in range(0, count, LANES):
            weight, exists = load(weights + i * row + 4 * n), less(lane_numbers(), splat(np.float32(count - n)))
            shift = where(exists, fma(weight, load(offsets + 4 * n), shift), shift)
            top = maximum(where(exists, absolute(mul(weight, load(scales + 4 * n))), zero), top)
        store(shifts + i * shifts_row, shift)
        store(rounded + i * ROUNDED_ROW + _TOPS, top)
    _find_factors(rows, rounded)
    to_rests = rows * WORDS_ROW if has_rests(task) else 0
    for i in range(rows):
        at = rounded + i * ROUNDED_ROW
        inverse, rests = _inverse_factor(at), zero
        for n in range(0, count, LANES):
            exists = less(lane_numbers(), splat(np.float32(count - n)))
            weight = where(exists, mul(load(weights + i * row + 4 * n), load(scales + 4 * n)), zero)
            rests = add(rests, _round(mul(weight, inverse), words + i * WORDS_ROW + 2 * n, to_rests))
        if to_rests == 0:
            lack = mul(rests, splat(load_float(at + FACTOR) * _middle_code(task)))
            store(shifts + i * shifts_row, add(load(shifts + i * shifts_row), lack))


@native
def _find_factors(rows, rounded):
    """Find what a word of 1 stands for in each row, from its largest numbers; NaN where one is infinite."""
    for i in range(rows):
        at = rounded + i * ROUNDED_ROW
        top = horizontal_max(load(at + _TOPS))
        factor = np.float32(np.nan) if top == np.inf else top * np.float32(1 / MAX_WORD)
        store_float(at + FACTOR, np.float32(0) if factor < _SMALLEST_FACTOR else factor)


@native
def _inverse_factor(rounded):
    factor = load_float(rounded + FACTOR)
    return splat(np.float32(0) if factor == 0 else 1 / factor)


@native
def _round(numbers, words, to_rests):
    """Store a vector as words, and its rests as words `to_rests` bytes further unless that is 0; returns the rests."""
    numbers = maximum(numbers, splat(np.float32(-MAX_WORD)))  # a NaN would be no whole number
    whole = _nearest_whole(numbers)
    rests = sub(numbers, whole)
    store_words(words, whole)
    if to_rests != 0:
        store_words(words + to_rests, _nearest_whole(mul(rests, splat(1 / REST_UNIT))))
    return rests


@native
def _nearest_whole(numbers):
    return sub(add(numbers, splat(_TO_WHOLE)), splat(_TO_WHOLE))


@native
def _middle_code(task):
    return np.float32(8.0 if task.code_bits == 4 else 128.0)

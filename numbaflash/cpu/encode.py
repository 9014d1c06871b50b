"""Quantizing, compiled: tokens of floats into rows of codes, once scales and offsets are chosen."""

from __future__ import annotations

import numpy as np

from .jit import kernel, native
from .micro import transpose_block
from .micro_codes import BLOCK, store_codes
from .vector import (
    LANES,
    add,
    fma,
    load,
    load_float,
    load_float16,
    maximum,
    minimum,
    mul,
    splat,
    store,
    store_float,
    sub,
)

__all__ = ["encode", "transpose", "widen"]

_HALF = BLOCK // 2
# A float32 of this size has no bits left behind the point: what is added to it is rounded to nearest even.
_NO_FRACTIONS = np.float32(1 << 23)


@kernel
def widen(halves, count, floats):
    """Write `count` float16, a multiple of BLOCK, as float32; both are addresses."""
    for i in range(0, count, LANES):
        store(floats + 4 * i, load_float16(halves + 2 * i))


@kernel
def transpose(source, rows, columns, target):
    """Write (rows, columns) float32 as (columns, rows); columns are a multiple of BLOCK."""
    whole = rows // LANES * LANES
    for row in range(0, whole, LANES):
        for column in range(0, columns, LANES):
            at, to = source + 4 * (row * columns + column), target + 4 * (column * rows + row)
            transpose_block(at, 4 * columns, to, 4 * rows)
    for row in range(whole, rows):
        for column in range(columns):
            store_float(target + 4 * (column * rows + row), load_float(source + 4 * (row * columns + column)))


@kernel
def encode(x, pages, tokens, heads, head_dim, group, inverses, offsets, bits, codes, page_bytes, head_bytes):
    """Write the codes nearest to x; `runs.Codes` says how the codes of a row lie.

    Args:
        x: Address of (pages, tokens, heads, head_dim) float32.
        pages: Of x.
        tokens: Of a page.
        heads: Of a token.
        head_dim: A multiple of BLOCK.
        group: Elements of a token that share a scale, a multiple of BLOCK; 0: a page's tokens do, channel by channel.
        inverses: Address of 1 / scale, float32, (pages, tokens, heads, groups) or (pages, heads, head_dim); where one
            is 0, codes are 0.
        offsets: Of the offsets, alike.
        bits: 8 or 4.
        codes: Of the first page's first head's codes, one row behind the other,
        page_bytes: from there to the next page's,
        head_bytes: and to the next head's.
    """
    for page in range(pages):
        for token in range(tokens):
            for head in range(heads):
                row = (page * tokens + token) * heads + head
                first = (page * heads + head) * head_dim if group == 0 else row * (head_dim // group)
                to = codes + page * page_bytes + head * head_bytes + token * (head_dim * bits // 8)
                _encode_row(
                    x + 4 * row * head_dim, head_dim, group, inverses + 4 * first, offsets + 4 * first, bits, to
                )


@native
def _encode_row(x, head_dim, group, inverses, offsets, bits, to):
    top = splat(np.float32((1 << bits) - 1))
    sixteen = splat(np.float32(16))
    for block in range(0, head_dim, BLOCK):
        for i in range(block, block + _HALF, LANES):
            low = _codes(x, i, group, inverses, offsets, top)
            high = _codes(x, i + _HALF, group, inverses, offsets, top)
            if bits == 8:
                store_codes(to + i, low)
                store_codes(to + i + _HALF, high)
            else:
                store_codes(to + i - block // 2, fma(high, sixteen, low))


@native
def _codes(x, element, group, inverses, offsets, top):
    """The codes of LANES elements from `element` on."""
    if group == 0:
        inverse, offset = load(inverses + 4 * element), load(offsets + 4 * element)
    else:
        at = 4 * (element // group)
        inverse, offset = splat(load_float(inverses + at)), splat(load_float(offsets + at))
    steps = mul(sub(load(x + 4 * element), offset), inverse)
    inside = minimum(maximum(steps, splat(np.float32(0))), top)
    return sub(add(inside, splat(_NO_FRACTIONS)), splat(_NO_FRACTIONS))

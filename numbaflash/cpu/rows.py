"""Rows of head_dim elements: widened to padded float32, or narrowed to the dtype of an output."""

from __future__ import annotations

from .emit import BFLOAT16, FLOAT16, FLOAT32
from .jit import native
from .vector import (
    LANES,
    load,
    load_bfloat16,
    load_float,
    load_float16,
    load_one_bfloat16,
    load_one_bool,
    load_one_float16,
    mul,
    splat,
    store,
    store_bfloat16,
    store_float,
    store_float16,
    store_one_bfloat16,
    store_one_float16,
)

__all__ = ["CACHE_LINE", "VECTOR_BYTES", "clear", "load_element", "narrow_row", "padded", "widen_row", "widen_rows"]

VECTOR_BYTES = 4 * LANES
CACHE_LINE = 64


@native
def padded(dim):
    """`dim` rounded up to whole vectors."""
    return (dim + LANES - 1) // LANES * LANES


@native
def clear(target, nbytes):
    """Zero `nbytes` bytes, a multiple of a vector's."""
    for at in range(target, target + nbytes, VECTOR_BYTES):
        store(at, splat(0.0))


@native
def load_element(source, dtype):
    """One element as float32."""
    if dtype == FLOAT32:
        return load_float(source)
    if dtype == FLOAT16:
        return load_one_float16(source)
    if dtype == BFLOAT16:
        return load_one_bfloat16(source)
    return load_one_bool(source)


@native
def widen_row(target, source, dim, dtype):
    """Write `dim` elements of `dtype` as float32, and zeros up to whole vectors."""
    widen_rows(target, 0, source, 0, 1, dim, dtype)


@native
def widen_rows(target, target_row, source, source_row, count, dim, dtype):
    """Do what `widen_row` does to `count` rows: a function call for each takes as long as the row, if it is short."""
    whole = dim // LANES * LANES
    size = 4 if dtype == FLOAT32 else 2
    for _ in range(count):
        if dtype == FLOAT32:
            for i in range(0, whole, LANES):
                store(target + 4 * i, load(source + 4 * i))
        elif dtype == FLOAT16:
            for i in range(0, whole, LANES):
                store(target + 4 * i, load_float16(source + 2 * i))
        else:
            for i in range(0, whole, LANES):
                store(target + 4 * i, load_bfloat16(source + 2 * i))
        if whole < dim:
            store(target + 4 * whole, splat(0.0))
            for i in range(whole, dim):
                store_float(target + 4 * i, load_element(source + size * i, dtype))
        target += target_row
        source += source_row


@native
def narrow_row(target, source, dim, dtype, factor):
    """Write `dim` float32 elements times `factor` as `dtype`, rounded to nearest even."""
    whole = dim // LANES * LANES
    factors = splat(factor)
    if dtype == FLOAT32:
        for i in range(0, whole, LANES):
            store(target + 4 * i, mul(load(source + 4 * i), factors))
    elif dtype == FLOAT16:
        for i in range(0, whole, LANES):
            store_float16(target + 2 * i, mul(load(source + 4 * i), factors))
    else:
        for i in range(0, whole, LANES):
            store_bfloat16(target + 2 * i, mul(load(source + 4 * i), factors))
    for i in range(whole, dim):
        value = load_float(source + 4 * i) * factor
        if dtype == FLOAT32:
            store_float(target + 4 * i, value)
        elif dtype == FLOAT16:
            store_one_float16(target + 2 * i, value)
        elif dtype == BFLOAT16:
            store_one_bfloat16(target + 2 * i, value)

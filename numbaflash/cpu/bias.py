"""Adding the bias to scores: a panel's, whose lanes are query rows, or one row's, whose lanes are keys.

It is read by vectors of keys, whatever its dtype, and turned over for a panel. Keys that do not lie side by side, or
fill no vector, are read one by one: nothing is read but what the scores belong to.
"""

from __future__ import annotations

import numpy as np

from .emit import BOOL, FLOAT32
from .functions import LOG2E, NEG_INF
from .jit import native, piece
from .micro import transpose_block, transpose_rows, widen_vector
from .panel import PANEL_ROWS, query_head, query_token
from .rows import VECTOR_BYTES, load_element
from .vector import LANES, equal, fma, load, load_int, maximum, splat, store, store_float, store_int, where

__all__ = ["BIAS_BYTES", "add_panel_bias", "add_row_bias"]

# The lowest bias that is finite in base 2. Masks made of the lowest float32 are lower, and count as this: where all
# keys of a row have it, they are equals, not forbidden.
_LOWEST = np.nextafter(np.finfo(np.float32).min / LOG2E, np.float32(0))

# Memory for a block of LANES rows and keys, and for an address for each row of a panel.
_BLOCK_BYTES = LANES * VECTOR_BYTES
BIAS_BYTES = _BLOCK_BYTES + 8 * PANEL_ROWS


@piece
def add_panel_bias(task, panel, position, count, scores, memory):
    """Add the bias of `count` keys from `position` on to a panel's scores of base 2; `memory` is BIAS_BYTES.

    -inf and False forbid the key, be its score NaN.
    """
    block, rows = memory, memory + _BLOCK_BYTES
    lanes_row = panel.vectors * VECTOR_BYTES
    _locate_rows(task, panel, position, rows)
    side_by_side = _are_keys_side_by_side(task)
    for v in range(panel.vectors):
        for n in range(0, count, LANES):
            keys, first, offset = min(count - n, LANES), rows + 8 * v * LANES, n * task.bias_key
            if keys == LANES and side_by_side:
                transpose_rows(task.bias_dtype, first, offset, block)
            else:
                for r in range(LANES):
                    _gather_keys(task, load_int(first + 8 * r) + offset, keys, block + r * VECTOR_BYTES)
                transpose_block(block, VECTOR_BYTES, block, VECTOR_BYTES)
            for key in range(keys):
                at = scores + (n + key) * lanes_row + v * VECTOR_BYTES
                store(at, _biased(load(at), load(block + key * VECTOR_BYTES)))


@piece
def add_row_bias(task, sequence, kv_head, row, position, count, scores, memory):
    """Add the bias to one row's scores of base 2, as `add_panel_bias` does; both they and `memory` are whole vectors.

    Scores behind the last key become anything.
    """
    bias = _bias_at(task, sequence, kv_head, row, position)
    side_by_side = _are_keys_side_by_side(task)
    for n in range(0, count, LANES):
        keys = min(count - n, LANES)
        if keys == LANES and side_by_side:
            widen_vector(task.bias_dtype, bias + n * task.bias_key, memory)
        else:
            _gather_keys(task, bias + n * task.bias_key, keys, memory)
        store(scores + 4 * n, _biased(load(scores + 4 * n), load(memory)))


@native
def _biased(score, bias):
    """Score + bias, in base 2."""
    sum_of_both = fma(maximum(splat(_LOWEST), bias), splat(LOG2E), score)
    return where(equal(bias, splat(NEG_INF)), splat(NEG_INF), sum_of_both)


@piece
def _locate_rows(task, panel, position, rows):
    """Write where the bias lies of each row of a panel; idle lanes repeat the last row."""
    at = _bias_at(task, panel.sequence, panel.kv_head, panel.row, position)
    head = panel.row % task.group
    for r in range(panel.vectors * LANES):
        store_int(rows + 8 * r, at)
        if r < panel.rows - 1:
            head += 1
            at += task.bias_head
            if head == task.group:
                head = 0
                at += task.bias_row - task.group * task.bias_head


@native
def _bias_at(task, sequence, kv_head, row, position):
    """Address of the bias of a row's score with the key at `position`."""
    token, head = query_token(task, row), query_head(task, kv_head, row)
    row_bias = task.bias + sequence * task.bias_batch + head * task.bias_head + token * task.bias_row
    return row_bias + position * task.bias_key


@native
def _are_keys_side_by_side(task):
    if task.bias_dtype == FLOAT32:
        return task.bias_key == 4
    return task.bias_key == (1 if task.bias_dtype == BOOL else 2)


@native
def _gather_keys(task, source, keys, target):
    """Write the bias of `keys` keys as float32, one by one."""
    for key in range(keys):
        store_float(target + 4 * key, load_element(source + key * task.bias_key, task.bias_dtype))

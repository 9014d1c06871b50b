"""Quantized keys and values as float32 rows, for prefill."""

from __future__ import annotations

import numpy as np

from .codes import key_parameters, offsets_of, value_parameters
from .jit import native
from .micro_codes import BLOCK, load_codes, load_high_codes, load_low_codes
from .runs import K_TOKEN_STRIDE, V_TOKEN_STRIDE
from .vector import LANES, fma, load_float16, load_one_float16, mul, splat, store
from .walk import key_at, run_field, value_at

__all__ = ["unpack_tokens"]


@native
def unpack_tokens(task, run, kv_head, position, count, keys, k_row, values, v_row):
    """Write `count` keys and values of a quantized run from `position` on as float32 rows."""
    k, k_stride = key_at(task, run, kv_head, position), run_field(task, run, K_TOKEN_STRIDE)
    v, v_stride = value_at(task, run, kv_head, position), run_field(task, run, V_TOKEN_STRIDE)
    k_parameters = key_parameters(task, run, kv_head, position)
    v_parameters = value_parameters(task, run, kv_head, position)
    for n in range(count):
        if task.key_group == 0:
            _unpack_by_channels(task, k + n * k_stride, k_parameters, keys + n * k_row)
        else:
            _unpack_by_groups(
                task, k + n * k_stride, k_parameters + 2 * n, task.key_group, task.head_dim, keys + n * k_row
            )
        _unpack_by_groups(
            task, v + n * v_stride, v_parameters + 2 * n, task.value_group, task.value_dim, values + n * v_row
        )


@native
def _unpack_by_channels(task, codes, scales, target):
    for d in range(0, task.head_dim, LANES):
        at = scales + 2 * d
        scale = load_float16(at)
        offset = offsets_of(task, scale, at, 2 * task.head_dim)
        store(target + 4 * d, fma(_codes_at(task, codes, d), scale, offset))


@native
def _unpack_by_groups(task, codes, scales, group_size, dim, target):
    between = 2 * task.page_size
    for group in range(dim // group_size):
        at = scales + group * between
        one = splat(load_one_float16(at))
        offset = _offset_of_group(task, one, at + dim // group_size * between)
        for d in range(group * group_size, (group + 1) * group_size, LANES):
            store(target + 4 * d, fma(_codes_at(task, codes, d), one, offset))


@native
def _offset_of_group(task, scales, offset_at):
    if task.symmetric != 0:
        return mul(scales, splat(np.float32(-8.0 if task.code_bits == 4 else -128.0)))
    return splat(load_one_float16(offset_at))


@native
def _codes_at(task, codes, element):
    """The LANES codes of a row from `element` on."""
    if task.code_bits == 8:
        return load_codes(codes + element)
    inside = element % BLOCK
    at = codes + element // BLOCK * (BLOCK // 2) + inside % (BLOCK // 2)
    return load_low_codes(at) if inside < BLOCK // 2 else load_high_codes(at)

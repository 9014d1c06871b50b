"""From q.k to the score of a pair on CUDA cores, one number at a time: scale, softcap and ALiBi, in log2 units."""

from __future__ import annotations

from typing import Any

from numba import cuda, float32

from . import ptx
from .decode_variant import DecodeVariant
from .softmax import LOG2_E

__all__ = ["score_row"]


def score_row(variant: DecodeVariant) -> Any:
    """Return a device function that gives a query row's token, and its score of a key.

    Its arguments: q.k, the row, how far the key is behind the first query, KV head, group, the slopes' address, the
    sequence's number there, and `q_heads`, factor and cap as the kernels are launched with them.
    """
    SOFTCAP, ALIBI, LOG2 = variant.softcap, variant.alibi, float32(LOG2_E)

    @cuda.jit(device=True, inline="always")  # a call would make Numba ask for a GPU
    def score(dot, row, behind, kv_head, group, slopes, sequence, q_heads, factor, cap):
        token = row // group
        if SOFTCAP:
            power = ptx.exp2(dot * factor)
            result = cap - float32(2) * cap * ptx.reciprocal(power + float32(1))
        else:
            result = dot * factor
        if ALIBI:
            head = kv_head * group + row - token * group
            slope = ptx.load_global_f32(slopes + 4 * (sequence * q_heads + head)) * LOG2
            result -= slope * float32(token - behind)
        return token, result

    return score

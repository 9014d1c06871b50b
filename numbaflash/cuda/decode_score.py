"""From q.k to the score of a pair in decode, one number at a time: scale, softcap and ALiBi, in log2 units."""

from __future__ import annotations

from typing import Any

from numba import cuda, float32

from . import ptx
from .decode_variant import DecodeVariant
from .softmax import LOG2_E

__all__ = ["score_of"]


def score_of(variant: DecodeVariant) -> Any:
    """Return a device function (q.k, factor, cap, address of the head's slope, distance) -> score.

    Factor and cap are as in `scoring.score_pairs`, the distance is in tokens. Without ALiBi the last two are not used.
    """
    SOFTCAP, ALIBI, LOG2 = variant.softcap, variant.alibi, float32(LOG2_E)

    @cuda.jit(device=True, inline="always")  # a call would make Numba ask for a GPU
    def score_one(dot, factor, cap, slope, distance):
        if SOFTCAP:
            power = ptx.exp2(dot * factor)
            score = cap - float32(2) * cap * ptx.reciprocal(power + float32(1))
        else:
            score = dot * factor
        if ALIBI:
            score -= ptx.load_global_f32(slope) * LOG2 * float32(distance)
        return score

    return score_one

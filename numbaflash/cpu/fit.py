"""Compiled loops of the quantizers: codes from scales and offsets, and better scales and offsets from codes.

Groups lie side by side, (batch, size, groups): the inner loops run over groups and become vector code, and no sum is
reassociated. An element is scale * code + offset, codes being 0 to `top`.
"""

from __future__ import annotations

import numpy as np

from .jit import kernel

__all__ = ["all_finite", "encode", "half_quadratic"]

_LANES = 64  # groups that are worked on together; their state fits into L1
_LARGEST_GROUP = 256  # tokens of a page, or elements of a token


@kernel
def all_finite(halves):
    """Say whether no float16 among these bits, (n,) uint16, is NaN or infinite."""
    exponent = np.uint16(0x7C00)
    found = False
    for bits in halves:
        found |= bits & exponent == exponent
    return not found


@kernel
def encode(x, scales, offsets, top, codes, errors):
    """Write the codes nearest to `x`, and the largest error in each group.

    Args:
        x: (batch, size, groups) float32.
        scales: (batch, groups) float32; where one is 0, the offset is all there is.
        offsets: (batch, groups) float32.
        top: Largest code, a float32.
        codes: (batch, size, groups) uint8, written.
        errors: (batch, groups) float32, the sum of squared errors, written.
    """
    inverse = np.empty(_LANES, np.float32)
    for b in range(x.shape[0]):
        for first in range(0, x.shape[2], _LANES):
            lanes = min(_LANES, x.shape[2] - first)
            for g in range(lanes):
                scale = scales[b, first + g]
                inverse[g] = np.float32(1) / scale if scale > 0 else np.float32(0)
                errors[b, first + g] = np.float32(0)
            for i in range(x.shape[1]):
                for g in range(lanes):
                    value, scale, offset = x[b, i, first + g], scales[b, first + g], offsets[b, first + g]
                    code = np.rint((value - offset) * inverse[g])
                    code = min(max(code, np.float32(0)), top)
                    codes[b, i, first + g] = np.uint8(code)
                    error = value - (scale * code + offset)
                    errors[b, first + g] += error * error


@kernel
def half_quadratic(x, scales, offsets, top, middle, symmetric, rounds):
    """Improve scales and offsets, (batch, groups) float32 in place, by half-quadratic splitting (HQQ).

    Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning Models" (2023): minimise |x - dequantized|^p
    by turns: e takes up the errors that are outliers (its shrinkage operator), then the offset is the least-squares fit
    of x - e to the codes, or the scale where there are no offsets. p is 1/2, and errors are measured in steps of the
    first scale.

    Args:
        x: (batch, size, groups) float32.
        scales: First guess, positive where a group is not constant.
        offsets: First guess.
        top: Largest code, a float32.
        middle: Where codes are symmetric, the code of 0, else 0; offsets are then -middle * scale.
        symmetric: Whether scales are fitted, else offsets.
        rounds: Turns.
    """
    zero = np.float32(0)
    state = np.empty((6, _LANES), np.float32)
    inverse, count_c, count_t, count_cc, count_ct, step = state[0], state[1], state[2], state[3], state[4], state[5]
    size = np.float32(x.shape[1])
    for b in range(x.shape[0]):
        for first in range(0, x.shape[2], _LANES):
            lanes = min(_LANES, x.shape[2] - first)
            step[:lanes] = scales[b, first : first + lanes]
            # HQQ's own schedule: a tenth of a step's |e|^(p - 1) at first, five percent less each turn.
            strength = np.float32(0.1)
            for _ in range(rounds):
                for g in range(lanes):
                    scale = scales[b, first + g]
                    inverse[g] = np.float32(1) / scale if scale > 0 else zero
                    count_c[g] = count_t[g] = count_cc[g] = count_ct[g] = zero
                for i in range(x.shape[1]):
                    for g in range(lanes):
                        value, scale, offset = x[b, i, first + g], scales[b, first + g], offsets[b, first + g]
                        code = min(max(np.rint((value - offset) * inverse[g]), zero), top)
                        error = value - (scale * code + offset)
                        size_of_error = max(abs(error) / max(step[g], np.float32(1e-30)), np.float32(1e-6))
                        kept = max(size_of_error - strength / np.sqrt(size_of_error), zero) / size_of_error
                        target = value - error * kept
                        code -= middle
                        count_c[g] += code
                        count_t[g] += target
                        count_cc[g] += code * code
                        count_ct[g] += code * target
                for g in range(lanes):
                    scale = scales[b, first + g]
                    if symmetric:
                        slope = count_ct[g] / max(count_cc[g], np.float32(1e-30))
                        scale = slope if slope > 0 else scale
                    scales[b, first + g] = scale
                    offsets[b, first + g] = -middle * scale if symmetric else (count_t[g] - scale * count_c[g]) / size
                strength *= np.float32(0.95)

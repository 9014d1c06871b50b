"""Compiled loops of the quantizers: how good scales and offsets are, and better ones.

Groups lie side by side, (batch, size, groups): the inner loops run over groups and become vector code, and no sum is
reassociated. They index slices, by the loop's own variable: an index that is computed could be negative, which Python
counts from the end, and what could count from the end is no vector load. An element is scale * code + offset, codes
being 0 to `top`.
"""

from __future__ import annotations

import numpy as np

from .jit import kernel
from .vector import LANES, add, horizontal_sum, load_float16, splat, sub

__all__ = ["all_finite", "half_quadratic", "squared_errors"]

_LANES = 64  # groups that are worked on together; their state fits into L1


@kernel
def all_finite(keys, values, count):
    """Say whether none of `count` float16, whole vectors of them, at two addresses each is NaN or infinite."""
    differences = splat(np.float32(0))
    for at in range(0, 2 * count, 2 * LANES):
        k, v = load_float16(keys + at), load_float16(values + at)
        # 0 from itself; NaN from what is not finite.
        differences = add(differences, add(sub(k, k), sub(v, v)))
    return horizontal_sum(differences) == 0


@kernel
def squared_errors(x, scales, offsets, top, errors):
    """Write the squared error of each group, each element having the code that is nearest.

    Args:
        x: (batch, size, groups) float32.
        scales: (batch, groups) float32; where one is 0, the offset is all there is.
        offsets: (batch, groups) float32.
        top: Largest code, a float32.
        errors: (batch, groups) float32, written.
    """
    zero = np.float32(0)
    state = np.empty((2, _LANES), np.float32)
    inverse, total = state[0], state[1]
    for b in range(x.shape[0]):
        for first in range(0, x.shape[2], _LANES):
            lanes = min(_LANES, x.shape[2] - first)
            scale, offset = scales[b, first : first + lanes], offsets[b, first : first + lanes]
            for g in range(lanes):
                inverse[g] = np.float32(1) / scale[g] if scale[g] > 0 else zero
                total[g] = zero
            for i in range(x.shape[1]):
                values = x[b, i, first : first + lanes]
                for g in range(lanes):
                    code = min(max(np.rint((values[g] - offset[g]) * inverse[g]), zero), top)
                    error = values[g] - (scale[g] * code + offset[g])
                    total[g] += error * error
            errors[b, first : first + lanes] = total[:lanes]


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
            scale, offset = scales[b, first : first + lanes], offsets[b, first : first + lanes]
            step[:lanes] = np.maximum(scale, np.float32(1e-30))
            # HQQ's own schedule: a tenth of a step's |e|^(p - 1) at first, five percent less each turn.
            strength = np.float32(0.1)
            for _ in range(rounds):
                for g in range(lanes):
                    inverse[g] = np.float32(1) / scale[g] if scale[g] > 0 else zero
                    count_c[g] = count_t[g] = count_cc[g] = count_ct[g] = zero
                for i in range(x.shape[1]):
                    values = x[b, i, first : first + lanes]
                    for g in range(lanes):
                        code = min(max(np.rint((values[g] - offset[g]) * inverse[g]), zero), top)
                        error = values[g] - (scale[g] * code + offset[g])
                        size_of_error = max(abs(error) / step[g], np.float32(1e-6))
                        kept = max(size_of_error - strength / np.sqrt(size_of_error), zero) / size_of_error
                        target = values[g] - error * kept
                        code -= middle
                        count_c[g] += code
                        count_t[g] += target
                        count_cc[g] += code * code
                        count_ct[g] += code * target
                for g in range(lanes):
                    if symmetric:
                        slope = count_ct[g] / max(count_cc[g], np.float32(1e-30))
                        scale[g] = slope if slope > 0 else scale[g]
                    offset[g] = -middle * scale[g] if symmetric else (count_t[g] - scale[g] * count_c[g]) / size
                strength *= np.float32(0.95)

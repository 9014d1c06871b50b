"""exp2 and tanh of a vector, to float32's accuracy; both keep NaN."""

from __future__ import annotations

import numpy as np

from .jit import native
from .vector import absolute, add, div, fma, less, minimum, mul, power_of_two, splat, sub, where

__all__ = ["LN2", "LOG2E", "NEG_INF", "exp2", "tanh"]

LOG2E = np.float32(1.4426950408889634)
LN2 = 0.6931471805599453
NEG_INF = np.float32(-np.inf)

# Adding 1.5 * 2^23 rounds to an integer n, which is then in the sum's lowest bits; with 127 more it is n + 127, the
# exponent of 2^n.
_ROUND = np.float32(12582912.0 + 127.0)
_HIGHEST = np.float32(127)
# Smaller weights are left out: their products with values may be subnormal, for which Intel's cores stop at every
# multiply-add. With all weights kept and scores that spread over 100 nats, a prefill took 14 times as long.
_LOWEST = np.float32(-100)

# 2^x = 1 + x (a0 + a1 x + ... + a4 x^4) on [-1/2, 1/2]: the minimax polynomial of the relative error (Remez), 9.2e-8;
# with float32's roundings at most 2.2 ulp.
_EXP2_0, _EXP2_1, _EXP2_2, _EXP2_3, _EXP2_4 = map(
    np.float32, (0.693146977599, 0.240222420854, 0.0555073374347, 0.00967151263994, 0.00132647271401)
)
# tanh(x) = x + x z (b0 + b1 z + ... + b4 z^4), z = x^2, on |x| <= 0.625, likewise: 4.4e-9.
_TANH_0, _TANH_1, _TANH_2, _TANH_3, _TANH_4 = map(
    np.float32, (-0.33333281942, 0.133314421975, -0.0537397150508, 0.0206390871791, -0.00570498695913)
)
_TANH_SMALL = np.float32(0.625)
_ZERO, _ONE, _TWO = np.float32(0), np.float32(1), np.float32(2)


@native
def exp2(x):
    """2^x for x < 127.5; 0 below -100, exactly 1 at 0."""
    shifted = add(x, splat(_ROUND))
    fraction = sub(x, sub(shifted, splat(_ROUND)))
    p = fma(splat(_EXP2_4), fraction, splat(_EXP2_3))
    p = fma(p, fraction, splat(_EXP2_2))
    p = fma(p, fraction, splat(_EXP2_1))
    p = fma(p, fraction, splat(_EXP2_0))
    p = fma(p, fraction, splat(_ONE))
    return where(less(x, splat(_LOWEST)), splat(_ZERO), mul(p, power_of_two(shifted)))


@native
def tanh(x):
    """The hyperbolic tangent."""
    z = mul(x, x)
    p = fma(splat(_TANH_4), z, splat(_TANH_3))
    p = fma(p, z, splat(_TANH_2))
    p = fma(p, z, splat(_TANH_1))
    p = fma(p, z, splat(_TANH_0))
    near_zero = fma(mul(x, z), p, x)
    size = absolute(x)
    power = exp2(minimum(splat(_HIGHEST), mul(size, splat(_TWO * LOG2E))))
    far = sub(splat(_ONE), div(splat(_TWO), add(power, splat(_ONE))))
    far = where(less(x, splat(_ZERO)), sub(splat(_ZERO), far), far)
    return where(less(size, splat(_TANH_SMALL)), near_zero, far)

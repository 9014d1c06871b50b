"""What floating-point instructions must give: exact fractions rounded once, and values of the 16-bit formats."""

from __future__ import annotations

import math
from fractions import Fraction

import ml_dtypes
import numpy as np
from emulator.harness import Array, rounded

SMALLEST_NORMAL = {"f32": 2.0**-126, "f16": 2.0**-14}
NUMPY_HALF = {"f16": np.dtype("f2"), "bf16": np.dtype(ml_dtypes.bfloat16)}


def exact(name: str, values: list[float], format_name: str, mode: str) -> float:
    """add, sub, mul, fma, div, sqrt, rcp of doubles, rounded once; special values as IEEE 754 has them."""
    if name == "sub":
        return exact("add", [values[0], -values[1]], format_name, mode)
    if name == "rcp":
        return exact("div", [1.0, values[0]], format_name, mode)
    with np.errstate(all="ignore"):
        a, *rest = (np.float64(x) for x in values)
        plain = {
            "add": lambda: a + rest[0],
            "mul": lambda: a * rest[0],
            "fma": lambda: np.float64(a * rest[0]) + rest[1],
            "div": lambda: a / rest[0],
            "sqrt": lambda: np.sqrt(a),
        }[name]()
    if not all(map(math.isfinite, values)) or (name == "div" and values[1] == 0) or (name == "sqrt" and a <= 0):
        if name == "fma" and math.isfinite(values[0]) and math.isfinite(values[1]):
            return float(rest[1])  # a finite product that overflows float64 is no infinity
        return float(plain)
    numbers = [Fraction(x) for x in values]
    if name == "sqrt":
        return square_root(numbers[0], format_name, mode)
    result = {
        "add": lambda x, y: x + y,
        "mul": lambda x, y: x * y,
        "fma": lambda x, y, z: x * y + z,
        "div": lambda x, y: x / y,
    }[name](*numbers)
    if result != 0:
        return rounded(result, format_name, mode)
    if name in ("mul", "div"):
        return math.copysign(0.0, math.copysign(1, values[0]) * math.copysign(1, values[1]))
    left = math.copysign(1, values[0]) * (math.copysign(1, values[1]) if name == "fma" else 1)
    right = math.copysign(1, values[-1])
    return math.copysign(0.0, left) if left == right else (-0.0 if mode == "rm" else 0.0)


def square_root(value: Fraction, format_name: str, mode: str) -> float:
    """By integer square root with enough bits, and a sticky bit for the rest."""
    shift = 400
    scaled = value.numerator * (1 << 2 * shift + 2200) // value.denominator
    root = math.isqrt(scaled)
    sticky = root * root != scaled or scaled * value.denominator != value.numerator << 2 * shift + 2200
    return rounded(Fraction(2 * root + sticky, 1 << shift + 1100 + 1), format_name, mode)


def flushed(x: float, format_name: str) -> float:
    return math.copysign(0.0, x) if abs(x) < SMALLEST_NORMAL[format_name] else x


def expected(name: str, inputs: list[Array], format_name: str, mode: str, flags: set[str]) -> Array:
    results = []
    for row in zip(*inputs, strict=True):
        values = [float(x) for x in row]
        if "ftz" in flags:
            values = [flushed(x, format_name) for x in values]
        result = exact(name, values, format_name, mode)
        if "ftz" in flags:
            result = flushed(result, format_name)
        if "sat" in flags:
            result = min(max(result, 0.0), 1.0) + 0.0 if not math.isnan(result) else 0.0
        if "relu" in flags:
            result = result if math.isnan(result) or result > 0 else 0.0
        results.append(result)
    return np.array(results)


def half_values(kind: str) -> Array:
    """Edge values of f16 or bf16 as bits."""
    top = 0x7C00 if kind == "f16" else 0x7F80
    one = 0x3C00 if kind == "f16" else 0x3F80
    edges = [
        0,
        1,
        2,
        3,
        one,
        one + 1,
        one - 1,
        one + 0x155,
        top - 1,
        top,
        top | 0x40,
        0x0400,
        0x03FF,
        0x0080,
        0x007F,
        0x4248,
    ]
    return np.array([*edges, *(x | 0x8000 for x in edges)], "u2")


def half_to_float(bits: Array, kind: str) -> Array:
    return bits.view(NUMPY_HALF[kind]).astype("f8")


def float_to_half(values: Array, kind: str) -> Array:
    """Bits of values that the format holds exactly; NaN is the canonical 0x7FFF."""
    bits = np.where(np.isnan(values), 0, values).astype("f4").astype(NUMPY_HALF[kind]).view("u2")
    return np.where(np.isnan(values), 0x7FFF, bits).astype("u2")

"""Floating-point instructions in every rounding mode, a row each, against exact fractions rounded once."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from emulator.harness import FORMATS, Array, execute, floats, grid, rounded, same

DTYPE = {"f32": "f4", "f64": "f8"}
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


@pytest.mark.parametrize("mode", ["", "rn", "rz", "rm", "rp"])
@pytest.mark.parametrize("kind", ["f32", "f64"])
@pytest.mark.parametrize("name", ["add", "sub", "mul"])
def test_sums_and_products_round_once(name: str, kind: str, mode: str) -> None:
    dtype = DTYPE[kind]
    a, b = grid(floats(dtype), floats(dtype))
    (found,) = execute(f"{name}{'.' if mode else ''}{mode}.{kind} %d, %a, %b;", [dtype], a, b)
    same(found, expected(name, [a, b], kind, mode or "rn", set()).astype(dtype))


@pytest.mark.parametrize("flags", ["ftz", "sat", "ftz.sat"])
@pytest.mark.parametrize("mode", ["rn", "rz", "rp"])
@pytest.mark.parametrize("name", ["add", "sub", "mul"])
def test_flushed_and_saturated_arithmetic(name: str, mode: str, flags: str) -> None:
    a, b = grid(floats("f4"), floats("f4"))
    (found,) = execute(f"{name}.{mode}.{flags}.f32 %d, %a, %b;", ["f4"], a, b)
    same(found, expected(name, [a, b], "f32", mode, set(flags.split("."))).astype("f4"))


@pytest.mark.parametrize("mode", ["rn", "rz", "rm", "rp"])
@pytest.mark.parametrize(("opcode", "kind"), [("fma", "f32"), ("fma", "f64"), ("mad", "f32"), ("mad", "f64")])
def test_fused_multiply_add_rounds_once(opcode: str, kind: str, mode: str) -> None:
    dtype = DTYPE[kind]
    values = floats(dtype)
    a, b, c = grid(values[::2], values[::3], values[::3])
    rng = np.random.default_rng(7)  # sums that cancel to the last bits
    x, y = (rng.standard_normal(200).astype(dtype) for _ in range(2))
    a, b, c = (np.concatenate(pair) for pair in ((a, x), (b, y), (c, -(x * y))))
    (found,) = execute(f"{opcode}.{mode}.{kind} %d, %a, %b, %c;", [dtype], a, b, c)
    same(found, expected("fma", [a, b, c], kind, mode, set()).astype(dtype))


@pytest.mark.parametrize("flags", ["ftz", "sat", "ftz.sat"])
def test_flushed_and_saturated_fused_multiply_add(flags: str) -> None:
    values = floats("f4")[::3]
    a, b, c = grid(values, values, values)
    (found,) = execute(f"fma.rn.{flags}.f32 %d, %a, %b, %c;", ["f4"], a, b, c)
    same(found, expected("fma", [a, b, c], "f32", "rn", set(flags.split("."))).astype("f4"))


def normal_results(name: str, kind: str, *inputs: Array) -> Array:
    """Where directed division and roots of float64 are exact here: their residual must not underflow."""
    if kind == "f32":
        return np.ones(inputs[0].shape, bool)
    with np.errstate(all="ignore"):
        ok = np.logical_and.reduce([(np.abs(x) > 1e-200) | (x == 0) | ~np.isfinite(x) for x in inputs])
        value = inputs[0] / inputs[1] if name == "div" else inputs[0]
        return ok & ((np.abs(value) > 1e-200) | (value == 0) | np.isnan(value))


@pytest.mark.parametrize("mode", ["rn", "rz", "rm", "rp"])
@pytest.mark.parametrize("kind", ["f32", "f64"])
def test_division_reciprocal_and_root_round_once(kind: str, mode: str) -> None:
    dtype = DTYPE[kind]
    a, b = grid(floats(dtype), floats(dtype))
    keep = normal_results("div", kind, a, b)
    (found,) = execute(f"div.{mode}.{kind} %d, %a, %b;", [dtype], a, b)
    same(found[keep], expected("div", [a[keep], b[keep]], kind, mode, set()).astype(dtype))
    x = np.concatenate([floats(dtype), np.random.default_rng(1).random(100).astype(dtype)])
    x = x[normal_results("sqrt", kind, x)]
    reciprocal, root = execute(f"rcp.{mode}.{kind} %d, %a; sqrt.{mode}.{kind} %e, %a;", [dtype, dtype], x)
    same(root, expected("sqrt", [x], kind, mode, set()).astype(dtype))
    keep = normal_results("div", kind, np.ones_like(x), x)
    same(reciprocal[keep], expected("rcp", [x[keep]], kind, mode, set()).astype(dtype))


APPROXIMATIONS: list[tuple[str, Callable[[Array], Array], float]] = [
    ("rcp.approx.f32", lambda x: 1 / x, 2e-7),
    ("rcp.approx.ftz.f32", lambda x: 1 / x, 2e-7),
    ("sqrt.approx.f32", np.sqrt, 2e-7),
    ("sqrt.approx.ftz.f32", np.sqrt, 2e-7),
    ("rsqrt.approx.f32", lambda x: 1 / np.sqrt(x), 3e-7),
    ("ex2.approx.ftz.f32", np.exp2, 3e-7),
    ("ex2.approx.f32", np.exp2, 3e-7),
    ("lg2.approx.f32", np.log2, 3e-7),
    ("sin.approx.f32", np.sin, 3e-7),
    ("cos.approx.f32", np.cos, 3e-7),
    ("tanh.approx.f32", np.tanh, 3e-7),
]


@pytest.mark.parametrize(
    ("opcode", "oracle", "tolerance"), APPROXIMATIONS, ids=lambda x: x if isinstance(x, str) else ""
)
def test_approximation_is_as_near_as_float32_can_be(
    opcode: str, oracle: Callable[[Array], Array], tolerance: float
) -> None:
    x = np.linspace(0.01, 20, 500).astype("f4")
    (found,) = execute(f"{opcode} %d, %a;", ["f4"], x)
    np.testing.assert_allclose(found, oracle(x.astype("f8")), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("opcode", "values"),
    [
        ("rcp.approx.ftz.f32", [(0.0, math.inf), (-0.0, -math.inf), (math.inf, 0.0), (1e-40, math.inf), (1.5e38, 0.0)]),
        ("rsqrt.approx.ftz.f32", [(0.0, math.inf), (-1.0, math.nan), (math.inf, 0.0), (1e-40, math.inf)]),
        (
            "ex2.approx.ftz.f32",
            [(-math.inf, 0.0), (math.inf, math.inf), (128.0, math.inf), (-127.0, 0.0), (math.nan, math.nan)],
        ),
        ("ex2.approx.f32", [(-127.0, 2.0**-127), (-math.inf, 0.0), (1e-45, 1.0)]),
        ("lg2.approx.ftz.f32", [(0.0, -math.inf), (1e-40, -math.inf), (-1.0, math.nan), (math.inf, math.inf)]),
        ("tanh.approx.f32", [(math.inf, 1.0), (-math.inf, -1.0), (0.0, 0.0), (math.nan, math.nan)]),
        ("sqrt.approx.ftz.f32", [(-0.0, -0.0), (1e-40, 0.0), (math.inf, math.inf), (-1.0, math.nan)]),
    ],
)
def test_approximation_at_the_edges(opcode: str, values: list[tuple[float, float]]) -> None:
    (found,) = execute(f"{opcode} %d, %a;", ["f4"], np.array([x for x, _ in values], "f4"))
    same(found, np.array([y for _, y in values], "f4"))


def test_approximate_division_of_huge_divisors_gives_zero() -> None:
    a = np.array([1.0, math.inf, -1.0, 6.0], "f4")
    b = np.array([1.5e38, 1.5e38, 1.5e38, 3.0], "f4")
    same(execute("div.approx.f32 %d, %a, %b;", ["f4"], a, b)[0], np.array([0.0, math.nan, -0.0, 2.0], "f4"))
    same(execute("div.full.f32 %d, %a, %b;", ["f4"], a, b)[0], a / b)


@pytest.mark.parametrize("kind", ["f32", "f64"])
@pytest.mark.parametrize("name", ["min", "max"])
def test_extremes_prefer_numbers_and_order_zeros(name: str, kind: str) -> None:
    dtype = DTYPE[kind]
    a, b = grid(floats(dtype), floats(dtype))

    def pick(x: float, y: float, nan: bool) -> float:
        if math.isnan(x) or math.isnan(y):
            return math.nan if nan or (math.isnan(x) and math.isnan(y)) else (y if math.isnan(x) else x)
        key = lambda v: (v, math.copysign(1, v))  # noqa: E731  -0 is below +0
        return (min if name == "min" else max)(x, y, key=key)

    pairs = list(zip(a.tolist(), b.tolist(), strict=True))
    (found,) = execute(f"{name}.{kind} %d, %a, %b;", [dtype], a, b)
    same(found, np.array([pick(x, y, False) for x, y in pairs], dtype))
    if kind == "f32":
        (found,) = execute(f"{name}.NaN.f32 %d, %a, %b;", [dtype], a, b)
        same(found, np.array([pick(x, y, True) for x, y in pairs], dtype))
        (found,) = execute(f"{name}.ftz.f32 %d, %a, %b;", [dtype], a, b)
        small = [(flushed(x, "f32"), flushed(y, "f32")) for x, y in pairs]
        same(found, np.array([pick(x, y, False) for x, y in small], dtype))
        (found,) = execute(f"{name}.xorsign.abs.f32 %d, %a, %b;", [dtype], a, b)
        sign = np.signbit(a) ^ np.signbit(b)
        magnitude = np.array([abs(pick(abs(x), abs(y), False)) for x, y in pairs], dtype)
        same(found, np.where(sign, -magnitude, magnitude))


@pytest.mark.parametrize("kind", ["f32", "f64"])
def test_sign_operations_and_properties(kind: str) -> None:
    dtype = DTYPE[kind]
    a, b = grid(floats(dtype), floats(dtype))
    same(execute(f"abs.{kind} %d, %a; neg.{kind} %e, %a;", [dtype, dtype], a)[1], -a)
    same(execute(f"abs.{kind} %d, %a;", [dtype], a)[0], np.abs(a))
    same(execute(f"copysign.{kind} %d, %a, %b;", [dtype], a, b)[0], np.copysign(b, a))
    tiny = np.finfo(dtype).tiny
    properties = {
        "finite": np.isfinite(a),
        "infinite": np.isinf(a),
        "number": ~np.isnan(a),
        "notanumber": np.isnan(a),
        "normal": np.isfinite(a) & (np.abs(a) >= tiny),
        "subnormal": (np.abs(a) < tiny) & (a != 0),
    }
    for name, holds in properties.items():
        same(execute(f"testp.{name}.{kind} %d, %a;", ["b1"], a)[0], holds)


ORDERED = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}


@pytest.mark.parametrize("kind", ["f32", "f64"])
@pytest.mark.parametrize("name", [*ORDERED, *(f"{x}u" for x in ORDERED), "num", "nan"])
def test_float_comparison_with_nan(name: str, kind: str) -> None:
    dtype = DTYPE[kind]
    a, b = grid(floats(dtype), floats(dtype))
    nan = np.isnan(a) | np.isnan(b)
    if name in ("num", "nan"):
        holds = nan if name == "nan" else ~nan
    else:
        plain = np.array([eval(f"x {ORDERED[name[:2]]} y", {"x": x, "y": y}) for x, y in zip(a, b, strict=True)])
        holds = np.where(nan, name.endswith("u"), plain)
    same(execute(f"setp.{name}.{kind} %d, %a, %b;", ["b1"], a, b)[0], holds.astype(bool))


def test_flushed_comparison_sees_subnormals_as_zero() -> None:
    a, b = np.array([1e-40, -1e-40, 1.0], "f4"), np.zeros(3, "f4")
    same(execute("setp.eq.ftz.f32 %d, %a, %b;", ["b1"], a, b)[0], np.array([True, True, False]))


# ---- 16-bit formats


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


HALF_ROWS = [
    ("add.f16", "sm_80"),
    ("add.rn.f16", "sm_80"),
    ("add.ftz.f16", "sm_80"),
    ("add.sat.f16", "sm_80"),
    ("sub.f16", "sm_80"),
    ("mul.f16", "sm_80"),
    ("mul.ftz.sat.f16", "sm_80"),
    ("fma.rn.f16", "sm_80"),
    ("fma.rn.ftz.f16", "sm_80"),
    ("fma.rn.sat.f16", "sm_80"),
    ("fma.rn.relu.f16", "sm_80"),
    ("fma.rn.bf16", "sm_80"),
    ("fma.rn.relu.bf16", "sm_80"),
    ("add.bf16", "sm_90"),
    ("sub.rn.bf16", "sm_90"),
    ("mul.bf16", "sm_90"),
]


@pytest.mark.parametrize("packed", [False, True], ids=["single", "packed"])
@pytest.mark.parametrize(("opcode", "target"), HALF_ROWS)
def test_half_precision_arithmetic_rounds_once(opcode: str, target: str, packed: bool) -> None:
    name, *flags, kind = opcode.split(".")
    values = half_values(kind)
    inputs = grid(*[values[::2] if name == "fma" else values] * (3 if name == "fma" else 2))
    wide = [half_to_float(x, kind) for x in inputs]
    wanted = float_to_half(expected(name, wide, kind, "rn", set(flags)), kind)
    registers = "%a, %b, %c" if name == "fma" else "%a, %b"
    if packed:
        both = [np.stack([x, x[::-1]], axis=1).reshape(-1).view("u4") for x in inputs]
        (found,) = execute(f"{opcode}x2 %d, {registers};", ["u4"], *both, target=target)
        same(found.view("u2").reshape(-1, 2), np.stack([wanted, wanted[::-1]], axis=1))
    else:
        same(execute(f"{opcode} %d, {registers};", ["u2"], *inputs, target=target)[0], wanted)


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_half_precision_extremes_signs_and_comparisons(kind: str) -> None:
    a, b = grid(half_values(kind), half_values(kind))
    x, y = half_to_float(a, kind), half_to_float(b, kind)
    nan = np.isnan(x) | np.isnan(y)
    lower = np.where(np.isnan(x), y, np.where(np.isnan(y), x, np.minimum(x, y)))
    lower = np.where((x == 0) & (y == 0), np.where(np.signbit(x) | np.signbit(y), -0.0, 0.0), lower)
    same(execute(f"min.{kind} %d, %a, %b;", ["u2"], a, b)[0], float_to_half(lower, kind))
    same(execute(f"min.NaN.{kind} %d, %a, %b;", ["u2"], a, b)[0], float_to_half(np.where(nan, np.nan, lower), kind))
    same(execute(f"neg.{kind} %d, %a; abs.{kind} %e, %a;", ["u2", "u2"], a)[0], a ^ np.uint16(0x8000))
    same(execute(f"abs.{kind} %d, %a;", ["u2"], a)[0], a & np.uint16(0x7FFF))
    same(execute(f"setp.lt.{kind} %d, %a, %b;", ["b1"], a, b, target="sm_90")[0], (x < y) & ~nan)


@pytest.mark.parametrize("opcode", ["ex2.approx.f16", "ex2.approx.ftz.bf16", "tanh.approx.f16", "tanh.approx.bf16"])
def test_half_precision_approximations(opcode: str) -> None:
    kind = opcode.rsplit(".", 1)[1]
    values = np.linspace(-8, 8, 200).astype(NUMPY_HALF[kind])
    (found,) = execute(f"{opcode} %d, %a;", ["u2"], values.view("u2"), target="sm_90")
    oracle = (np.exp2 if opcode.startswith("ex2") else np.tanh)(values.astype("f8"))
    np.testing.assert_allclose(half_to_float(found, kind), oracle, rtol=2.0 ** -FORMATS[kind][0] * 1.01)


def ulps(found: Array, wanted: Array) -> Any:
    return np.abs(found.view("i4").astype("i8") - wanted.view("i4").astype("i8")).max()


def test_exp2_matches_numpy_within_an_ulp() -> None:
    x = np.linspace(-120, 120, 4001).astype("f4")
    (found,) = execute("ex2.approx.f32 %d, %a;", ["f4"], x)
    assert ulps(found, np.exp2(x.astype("f8")).astype("f4")) <= 1

"""Floating-point instructions in every rounding mode, a row each, against exact fractions rounded once."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from emulator.float_oracle import (
    NUMPY_HALF,
    SMALLEST_NORMAL,
    expected,
    float_to_half,
    flushed,
    half_to_float,
    half_values,
)
from emulator.harness import FORMATS, Array, execute, floats, grid, same

DTYPE = {"f32": "f4", "f64": "f8"}


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
@pytest.mark.parametrize("name", ["fma", "mad"])
def test_flushed_and_saturated_fused_multiply_add(name: str, flags: str) -> None:
    values = floats("f4")[::3]
    a, b, c = grid(values, values, values)
    (found,) = execute(f"{name}.rn.{flags}.f32 %d, %a, %b, %c;", ["f4"], a, b, c)
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
    ("sin.approx.ftz.f32", np.sin, 3e-7),
    ("cos.approx.ftz.f32", np.cos, 3e-7),
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


@pytest.mark.parametrize("mode", ["rn", "rz", "approx", "full"])
def test_flushed_division_has_no_subnormals(mode: str) -> None:
    a = np.array([1e-40, 1.0, 3e-38, 6.0, -1e-40], "f4")
    b = np.array([1.0, 1e-40, 4.0, 3.0, 2.0], "f4")
    same(execute(f"div.{mode}.ftz.f32 %d, %a, %b;", ["f4"], a, b)[0], np.array([0, math.inf, 0, 2, -0.0], "f4"))


@pytest.mark.parametrize("opcode", ["rcp.approx.ftz.f64", "rsqrt.approx.ftz.f64", "rsqrt.approx.f64"])
def test_approximations_of_float64(opcode: str) -> None:
    x = np.concatenate([np.linspace(0.01, 20, 200), [1e-300, 1e300, 0.0, math.inf, math.nan]])
    with np.errstate(all="ignore"):
        wanted = 1 / x if opcode.startswith("rcp") else 1 / np.sqrt(x)
    np.testing.assert_allclose(execute(f"{opcode} %d, %a;", ["f8"], x)[0], wanted, rtol=2.0**-20)
    tiny = np.array([2.0**-1023, -(2.0**-1023)])
    (found,) = execute(f"{opcode} %d, %a;", ["f8"], tiny)
    wanted = [math.inf, -math.inf] if "ftz" in opcode else [2.0**511.5, math.nan]
    np.testing.assert_allclose(found, wanted, rtol=2.0**-20)


@pytest.mark.parametrize("kind", ["f32", "f64"])
def test_selection_by_a_predicate_or_a_sign(kind: str) -> None:
    dtype = DTYPE[kind]
    a, b, c = grid(floats(dtype), floats(dtype)[::3], np.array([-1.0, -0.0, 0.0, 1e-40, -1e-40, math.nan], "f4"))
    same(execute(f"slct.{kind}.f32 %d, %a, %b, %c;", [dtype], a, b, c)[0], np.where(c >= 0, a, b))
    flushed_c = np.where(np.abs(c) < SMALLEST_NORMAL["f32"], 0, c)
    same(execute(f"slct.ftz.{kind}.f32 %d, %a, %b, %c;", [dtype], a, b, c)[0], np.where(flushed_c >= 0, a, b))
    same(execute(f"slct.{kind}.s32 %d, %a, %b, %c;", [dtype], a, b, c.view("i4"))[0], np.where(c.view("i4") >= 0, a, b))
    same(execute(f"selp.{kind} %d, %a, %b, %c;", [dtype], a, b, c > 0)[0], np.where(c > 0, a, b))


@pytest.mark.parametrize("bits", [16, 32, 64])
def test_selection_of_bits_and_integers_by_the_sign_of_a_float(bits: int) -> None:
    dtype = f"u{bits // 8}"
    a, b, c = grid(np.arange(3, dtype=dtype), np.arange(5, 9, dtype=dtype), np.array([-1.0, -0.0, -1e-40, 2.0], "f4"))
    for kind in "bsu":
        same(execute(f"slct.{kind}{bits}.f32 %d, %a, %b, %c;", [dtype], a, b, c)[0], np.where(c >= 0, a, b))
        text = f"slct.ftz.{kind}{bits}.f32 %d, %a, %b, %c;"
        same(execute(text, [dtype], a, b, c)[0], np.where((c >= 0) | (c > -1e-38), a, b))


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
    if kind == "f32":
        small = np.where(np.abs(a) < SMALLEST_NORMAL[kind], np.copysign(np.float32(0), a), a)
        same(execute("neg.ftz.f32 %d, %a;", [dtype], a)[0], -small)
        same(execute("abs.ftz.f32 %d, %a;", [dtype], a)[0], np.abs(small))
    same(execute(f"mov.{kind} %d, %a;", [dtype], a)[0], a)
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


ORDERED = ["eq", "ne", "lt", "le", "gt", "ge"]


COMPARISONS = [*ORDERED, *(f"{x}u" for x in ORDERED), "num", "nan"]


@pytest.mark.parametrize("kind", ["f32", "f64"])
@pytest.mark.parametrize("name", COMPARISONS)
def test_float_comparison_with_nan(name: str, kind: str) -> None:
    a, b = grid(floats(DTYPE[kind]), floats(DTYPE[kind]))
    holds = holding(name, a, b)
    same(execute(f"setp.{name}.{kind} %d, %a, %b;", ["b1"], a, b)[0], holds)
    for target, dtype, one in SET:
        (found,) = execute(f"set.{name}.{target}.{kind} %d, %a, %b;", [dtype], a, b)
        same(found, np.where(holds, one, 0).astype(dtype))


SET = [("u32", "u4", 2**32 - 1), ("s32", "i4", -1), ("f32", "f4", 1), ("f16", "u2", 0x3C00), ("bf16", "u2", 0x3F80)]
COMBINE = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


@pytest.mark.parametrize("kind", ["f32", "f64", "f16", "bf16"])
@pytest.mark.parametrize("combine", COMBINE)
def test_float_comparison_combined_with_a_predicate(combine: str, kind: str) -> None:
    half = kind in NUMPY_HALF
    values = half_values(kind) if half else floats(DTYPE[kind])
    a, b, c = grid(values, values[::3], np.array([False, True]))
    x, y = (half_to_float(z, kind) if half else z for z in (a, b))
    d, e = execute(f"setp.lt.{combine}.{kind} %d|%e, %a, %b, %c;", ["b1", "b1"], a, b, c, target="sm_90")
    same(d, COMBINE[combine](x < y, c))
    same(e, COMBINE[combine](~(x < y), c))
    for target, dtype, one in SET:
        (found,) = execute(f"set.lt.{combine}.{target}.{kind} %d, %a, %b, %c;", [dtype], a, b, c, target="sm_90")
        same(found, np.where(COMBINE[combine](x < y, c), one, 0).astype(dtype))


def test_flushed_comparison_sees_subnormals_as_zero() -> None:
    a, b = np.array([1e-40, -1e-40, 1.0], "f4"), np.zeros(3, "f4")
    same(execute("setp.eq.ftz.f32 %d, %a, %b;", ["b1"], a, b)[0], np.array([True, True, False]))
    for target, dtype, one in SET:
        (found,) = execute(f"set.eq.ftz.{target}.f32 %d, %a, %b;", [dtype], a, b)
        same(found, np.array([one, one, 0], dtype))


# ---- 16-bit formats


HALF_ROWS = [
    ("add.f16", "sm_80"),
    ("add.rn.f16", "sm_80"),
    ("add.ftz.f16", "sm_80"),
    ("add.sat.f16", "sm_80"),
    ("sub.f16", "sm_80"),
    ("sub.rn.f16", "sm_80"),
    ("sub.ftz.f16", "sm_80"),
    ("sub.sat.f16", "sm_80"),
    ("mul.rn.f16", "sm_80"),
    ("mul.f16", "sm_80"),
    ("mul.ftz.sat.f16", "sm_80"),
    ("fma.rn.f16", "sm_80"),
    ("fma.rn.ftz.f16", "sm_80"),
    ("fma.rn.sat.f16", "sm_80"),
    ("fma.rn.relu.f16", "sm_80"),
    ("fma.rn.bf16", "sm_80"),
    ("fma.rn.relu.bf16", "sm_80"),
    ("add.bf16", "sm_90"),
    ("add.rn.bf16", "sm_90"),
    ("sub.bf16", "sm_90"),
    ("sub.rn.bf16", "sm_90"),
    ("mul.bf16", "sm_90"),
    ("mul.rn.bf16", "sm_90"),
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


def extreme(name: str, x: Array, y: Array) -> Array:
    """min or max: the number where one is NaN, and -0 below +0."""
    picked = np.where(np.isnan(x), y, np.where(np.isnan(y), x, (np.minimum if name == "min" else np.maximum)(x, y)))
    negative = (np.logical_or if name == "min" else np.logical_and)(np.signbit(x), np.signbit(y))
    return np.where((x == 0) & (y == 0), np.where(negative, -0.0, 0.0), picked)


def execute_half(opcode: str, operands: str, packed: bool, *inputs: Array) -> Array:
    """Runs an instruction of one or of two 16-bit floats; of two, the upper ones in reverse order."""
    if not packed:
        return execute(f"{opcode} {operands};", ["u2"], *inputs, target="sm_90")[0]
    both = [np.stack([x, x[::-1]], axis=1).reshape(-1).view("u4") for x in inputs]
    (found,) = execute(f"{opcode}x2 {operands};", ["u4"], *both, target="sm_90")
    low, high = found.view("u2").reshape(-1, 2).T
    same(np.ascontiguousarray(high), np.ascontiguousarray(low[::-1]))
    return np.ascontiguousarray(low)


@pytest.mark.parametrize("packed", [False, True], ids=["single", "packed"])
@pytest.mark.parametrize("kind", ["f16", "bf16"])
@pytest.mark.parametrize("name", ["min", "max"])
def test_half_precision_extremes(name: str, kind: str, packed: bool) -> None:
    a, b = grid(half_values(kind), half_values(kind))
    x, y = half_to_float(a, kind), half_to_float(b, kind)
    nan = np.isnan(x) | np.isnan(y)
    picked = extreme(name, x, y)
    same(execute_half(f"{name}.{kind}", "%d, %a, %b", packed, a, b), float_to_half(picked, kind))
    found = execute_half(f"{name}.NaN.{kind}", "%d, %a, %b", packed, a, b)
    same(found, float_to_half(np.where(nan, np.nan, picked), kind))
    found = execute_half(f"{name}.xorsign.abs.{kind}", "%d, %a, %b", packed, a, b)
    signed = np.copysign(extreme(name, np.abs(x), np.abs(y)), np.copysign(1, x) * np.copysign(1, y))
    same(found, float_to_half(signed, kind))
    if kind == "f16":
        small = [np.where(np.abs(z) < SMALLEST_NORMAL[kind], np.copysign(0.0, z), z) for z in (x, y)]
        found = execute_half(f"{name}.ftz.{kind}", "%d, %a, %b", packed, a, b)
        same(found, float_to_half(extreme(name, *small), kind))


@pytest.mark.parametrize("packed", [False, True], ids=["single", "packed"])
@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_half_precision_signs_and_moves(kind: str, packed: bool) -> None:
    a = half_values(kind)
    same(execute_half(f"neg.{kind}", "%d, %a", packed, a), a ^ np.uint16(0x8000))
    same(execute_half(f"abs.{kind}", "%d, %a", packed, a), a & np.uint16(0x7FFF))
    same(execute_half(f"mov.{kind}", "%d, %a", packed, a), a)


def holding(name: str, x: Array, y: Array) -> Array:
    """Where a comparison of floats holds."""
    nan = np.isnan(x) | np.isnan(y)
    if name in ("num", "nan"):
        return nan if name == "nan" else ~nan
    plain = getattr(operator, name[:2])(x, y)
    return np.where(nan, name.endswith("u"), plain).astype(bool)


@pytest.mark.parametrize("kind", ["f16", "bf16"])
@pytest.mark.parametrize("name", COMPARISONS)
def test_half_precision_comparison_with_nan(name: str, kind: str) -> None:
    a, b = grid(half_values(kind), half_values(kind))
    holds = holding(name, half_to_float(a, kind), half_to_float(b, kind))
    same(execute(f"setp.{name}.{kind} %d, %a, %b;", ["b1"], a, b, target="sm_90")[0], holds)
    for target, dtype, one in SET:
        (found,) = execute(f"set.{name}.{target}.{kind} %d, %a, %b;", [dtype], a, b, target="sm_90")
        same(found, np.where(holds, one, 0).astype(dtype))


@pytest.mark.parametrize("packed", [False, True], ids=["single", "packed"])
@pytest.mark.parametrize(
    "opcode", ["ex2.approx.f16", "ex2.approx.ftz.f16", "ex2.approx.ftz.bf16", "tanh.approx.f16", "tanh.approx.bf16"]
)
def test_half_precision_approximations(opcode: str, packed: bool) -> None:
    kind = opcode.rsplit(".", 1)[1]
    values = np.linspace(-8, 8, 200).astype(NUMPY_HALF[kind])
    found = execute_half(opcode, "%d, %a", packed, values.view("u2"))
    oracle = (np.exp2 if opcode.startswith("ex2") else np.tanh)(values.astype("f8"))
    np.testing.assert_allclose(half_to_float(found, kind), oracle, rtol=2.0 ** -FORMATS[kind][0] * 1.01)


def test_flushed_half_precision_exponential_has_no_subnormal_results() -> None:
    values = np.array([-14, -14.5, -20, 1], "f2")
    (found,) = execute("ex2.approx.ftz.f16 %d, %a;", ["u2"], values.view("u2"))
    np.testing.assert_array_equal(found.view("f2"), [2.0**-14, 0, 0, 2])


def ulps(found: Array, wanted: Array) -> Any:
    return np.abs(found.view("i4").astype("i8") - wanted.view("i4").astype("i8")).max()


def test_exp2_matches_numpy_within_an_ulp() -> None:
    x = np.linspace(-120, 120, 4001).astype("f4")
    (found,) = execute("ex2.approx.f32 %d, %a;", ["f4"], x)
    assert ulps(found, np.exp2(x.astype("f8")).astype("f4")) <= 1


def test_every_float_instruction_and_modifier_has_a_row(whole_file: Any) -> None:
    assert whole_file.missing("floating") + whole_file.missing("integer", "data", integers=False) == []

"""cvt between all types in all roundings, against exact fractions and integers."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from emulator.harness import Array, execute, floats, integers, rounded, same, signed

INTEGERS = ["u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64"]
HALF = {"f16": np.dtype("f2"), "bf16": np.dtype(ml_dtypes.bfloat16)}


def dtype_of(kind: str) -> str:
    if kind[0] in "us":
        return f"{'i' if kind[0] == 's' else 'u'}{int(kind[1:]) // 8}"
    return {"f32": "f4", "f64": "f8", "f16": "u2", "bf16": "u2"}[kind]


def limits(kind: str) -> tuple[int, int]:
    bits = int(kind[1:])
    return (-(1 << bits - 1), (1 << bits - 1) - 1) if kind[0] == "s" else (0, (1 << bits) - 1)


def as_integers(values: list[int], dtype: str) -> Array:
    bits = 8 * int(dtype[1])
    return np.array([x & (1 << bits) - 1 for x in values], f"u{dtype[1]}").view(dtype)


def half_bits(values: list[float], kind: str) -> Array:
    array = np.array(values, "f4")
    return np.where(np.isnan(array), 0x7FFF, array.astype(HALF[kind]).view("u2")).astype("u2")


@pytest.mark.parametrize("source", INTEGERS)
@pytest.mark.parametrize("target", INTEGERS)
def test_integer_conversion_wraps_and_saturates(target: str, source: str) -> None:
    a = integers(dtype_of(source))
    low, high = limits(target)
    bits = int(target[1:])
    wide = [int(x) for x in a]
    wrapped = [signed(x, bits) if target[0] == "s" else x & (1 << bits) - 1 for x in wide]
    same(execute(f"cvt.{target}.{source} %d, %a;", [dtype_of(target)], a)[0], as_integers(wrapped, dtype_of(target)))
    clamped = [min(max(x, low), high) for x in wide]
    same(
        execute(f"cvt.sat.{target}.{source} %d, %a;", [dtype_of(target)], a)[0], as_integers(clamped, dtype_of(target))
    )


def test_conversion_extends_into_a_wider_register() -> None:
    a = integers("u4")
    (found,) = execute("cvt.s8.u32 %d, %a;", ["i4"], a)
    same(found, np.array([signed(int(x), 8) for x in a], "i4"))
    (found,) = execute("cvt.u16.u32 %d, %a;", ["u4"], a)
    same(found, a & np.uint32(0xFFFF))


ROUND_INTEGER = {
    "rni": lambda x: round(x),
    "rzi": lambda x: math.trunc(x),
    "rmi": lambda x: math.floor(x),
    "rpi": lambda x: math.ceil(x),
}


def interesting_floats(dtype: str) -> Array:
    halves = np.array(
        [0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 0.49, 0.51, 127.5, 255.5, -128.5, 32767.5, 2**31, 2**32, 2**63, 2**64]
    )
    near = np.array(
        [2.0**31 - 1, 2.0**32 - 1, -(2.0**31), -(2.0**63), 2.0**53, 2.0**63 - 1024, 1e19, -1e19, 1e300, -1e300]
    )
    with np.errstate(over="ignore"):
        return np.concatenate([floats(dtype), halves.astype(dtype), near.astype(dtype)])


@pytest.mark.parametrize("mode", ROUND_INTEGER)
@pytest.mark.parametrize("source", ["f32", "f64"])
@pytest.mark.parametrize("target", INTEGERS)
def test_float_to_integer_rounds_and_clamps(target: str, source: str, mode: str) -> None:
    a = interesting_floats(dtype_of(source))
    low, high = limits(target)
    nan = 1 << int(target[1:]) - 1 if source == "f64" or target[1:] == "64" else 0
    wanted = []
    for x in a.tolist():
        if math.isnan(x):
            wanted.append(nan)
        elif math.isinf(x):
            wanted.append(high if x > 0 else low)
        else:
            wanted.append(min(max(ROUND_INTEGER[mode](Fraction(x)), low), high))
    (found,) = execute(f"cvt.{mode}.{target}.{source} %d, %a;", [dtype_of(target)], a)
    same(found, as_integers(wanted, dtype_of(target)))
    same(execute(f"cvt.{mode}.sat.{target}.{source} %d, %a;", [dtype_of(target)], a)[0], found)  # it always clamps
    if source == "f32":
        (flushed,) = execute(f"cvt.{mode}.ftz.{target}.f32 %d, %a;", [dtype_of(target)], a)
        same(flushed, np.where(np.abs(a) < 2.0**-126, np.array(0, found.dtype), found))


@pytest.mark.parametrize("mode", ["rn", "rz", "rm", "rp"])
@pytest.mark.parametrize("source", INTEGERS)
@pytest.mark.parametrize("target", ["f32", "f64", "f16", "bf16"])
def test_integer_to_float_rounds_once(target: str, source: str, mode: str) -> None:
    rng = np.random.default_rng(3)
    dtype = dtype_of(source)
    info = np.iinfo(dtype)
    a = np.concatenate([integers(dtype), rng.integers(info.min, info.max, 100, dtype, endpoint=True)])
    wanted = [rounded(Fraction(int(x)), target, mode) for x in a]
    (found,) = execute(f"cvt.{mode}.{target}.{source} %d, %a;", [dtype_of(target)], a, target="sm_90")
    same(found, half_bits(wanted, target) if target in HALF else np.array(wanted, dtype_of(target)))
    if target in ("f16", "f32"):
        (found,) = execute(f"cvt.{mode}.sat.{target}.{source} %d, %a;", [dtype_of(target)], a)
        clamped = np.array([min(max(x, 0.0), 1.0) for x in wanted])
        same(found, half_bits(clamped, target) if target in HALF else clamped.astype("f4"))


def narrowed(a: Array, target: str, mode: str) -> list[float]:
    return [rounded(Fraction(x), target, mode) if math.isfinite(x) and x != 0 else x for x in (float(y) for y in a)]


NARROWING = [("f64", "f32"), ("f32", "f16"), ("f32", "bf16"), ("f64", "f16"), ("f64", "bf16")]


@pytest.mark.parametrize("mode", ["rn", "rz", "rm", "rp"])
@pytest.mark.parametrize(("source", "target"), NARROWING)
def test_narrowing_rounds_once(source: str, target: str, mode: str) -> None:
    rng = np.random.default_rng(5)
    scale = np.exp2(rng.integers(-30, 20, 300))
    a = np.concatenate([floats(dtype_of(source)), (rng.standard_normal(300) * scale).astype(dtype_of(source))])
    if target in HALF:  # ties, and their neighbours
        ties = (1 + (2 * np.arange(20) + 1) * 2.0 ** (-11 if target == "f16" else -8)).astype(dtype_of(source))
        a = np.concatenate([a, ties, np.nextafter(ties, 2, dtype=ties.dtype), np.nextafter(ties, 0, dtype=ties.dtype)])
    (found,) = execute(f"cvt.{mode}.{target}.{source} %d, %a;", [dtype_of(target)], a, target="sm_90")
    wanted = narrowed(a, target, mode)
    same(found, half_bits(wanted, target) if target in HALF else np.array(wanted, dtype_of(target)))


@pytest.mark.parametrize(("source", "target"), [("f16", "f32"), ("bf16", "f32"), ("f16", "f64")])
def test_widening_is_exact(source: str, target: str) -> None:
    bits = np.arange(0, 65536, 7, dtype="u2")
    (found,) = execute(f"cvt.{target}.{source} %d, %a;", [dtype_of(target)], bits, target="sm_90")
    exact = bits.view(HALF[source]).astype(dtype_of(target))
    same(found, exact)
    if target == "f32":
        (found,) = execute(f"cvt.sat.f32.{source} %d, %a;", ["f4"], bits, target="sm_90")
        same(found, unit(exact))
    if (source, target) == ("f16", "f32"):  # no f16 is so small as to be flushed
        same(execute("cvt.ftz.f32.f16 %d, %a;", ["f4"], bits)[0], exact)


@pytest.mark.parametrize(("mode", "oracle"), [("rni", np.rint), ("rzi", np.trunc), ("rmi", np.floor), ("rpi", np.ceil)])
@pytest.mark.parametrize("kind", ["f32", "f64"])
def test_rounding_to_integral_floats(kind: str, mode: str, oracle: np.ufunc) -> None:
    a = interesting_floats(dtype_of(kind))
    same(execute(f"cvt.{mode}.{kind}.{kind} %d, %a;", [dtype_of(kind)], a)[0], oracle(a))
    same(execute(f"cvt.{kind}.{kind} %d, %a;", [dtype_of(kind)], a)[0], a)


def unit(a: Array) -> Array:
    """Clamped to [0, 1], NaN to 0."""
    return np.where(a > 0, np.minimum(a, a.dtype.type(1)), a.dtype.type(0))


def test_flush_and_saturation_of_float_conversions() -> None:
    a = floats("f8")
    with np.errstate(over="ignore"):
        single = a.astype("f4")
    tiny = np.float32(2.0**-126)
    flushed = np.where(np.abs(single) < tiny, np.copysign(np.float32(0), single), single)
    same(execute("cvt.rn.ftz.f32.f64 %d, %a;", ["f4"], a)[0], flushed)
    same(execute("cvt.rn.sat.f32.f64 %d, %a;", ["f4"], a)[0], unit(single))
    same(execute("cvt.sat.f32.f32 %d, %a;", ["f4"], single)[0], unit(single))
    same(execute("cvt.ftz.f32.f32 %d, %a;", ["f4"], single)[0], flushed)
    same(execute("cvt.ftz.f64.f32 %d, %a;", ["f8"], single)[0], flushed.astype("f8"))
    same(execute("cvt.f64.f32 %d, %a;", ["f8"], single)[0], single.astype("f8"))
    same(execute("cvt.rp.ftz.f16.f32 %d, %a;", ["u2"], single)[0], half_bits(narrowed(flushed, "f16", "rp"), "f16"))
    for source, values in (("f32", single), ("f64", a)):
        wanted = half_bits(narrowed(unit(values), "f16", "rz"), "f16")
        same(execute(f"cvt.rz.sat.f16.{source} %d, %a;", ["u2"], values)[0], wanted)


@pytest.mark.parametrize("mode", ["rn", "rz"])
@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_packed_conversion_puts_its_first_source_on_top(kind: str, mode: str) -> None:
    a = floats("f4")
    b = a[::-1].copy()
    (found,) = execute(f"cvt.{mode}.{kind}x2.f32 %d, %a, %b;", ["u4"], a, b)
    same((found >> np.uint32(16)).astype("u2"), half_bits(narrowed(a, kind, mode), kind))
    same(found.astype("u2"), half_bits(narrowed(b, kind, mode), kind))


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_rectified_conversion_drops_negative_values(kind: str) -> None:
    a = np.array([-1.0, -0.0, 2.0, math.nan], "f4")
    wanted = half_bits([0.0, 0.0, 2.0, math.nan], kind)
    same(execute(f"cvt.rn.relu.{kind}.f32 %d, %a;", ["u2"], a)[0], wanted)
    (found,) = execute(f"cvt.rn.relu.{kind}x2.f32 %d, %a, %a;", ["u4"], a)
    same(found.astype("u2"), wanted)
    same((found >> np.uint32(16)).astype("u2"), wanted)


@pytest.mark.parametrize(("mode", "relu"), [("rna", False), ("rn", False), ("rz", False), ("rn", True), ("rz", True)])
def test_tf32_keeps_ten_bits_of_fraction(mode: str, relu: bool) -> None:
    a = floats("f4")
    (found,) = execute(f"cvt.{mode}{'.relu' if relu else ''}.tf32.f32 %d, %a;", ["u4"], a)
    wanted = np.array(narrowed(np.where(relu & ~(a > 0) & ~np.isnan(a), np.float32(0), a), "tf32", mode), "f4")
    same(found, np.where(np.isnan(a), 0x7FFFFFFF, wanted.view("u4")).astype("u4"))


def test_every_conversion_and_modifier_has_a_row(whole_file: Any) -> None:
    assert whole_file.missing("convert") == []

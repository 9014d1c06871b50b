"""Floating-point functions of the PTX ISA on NumPy arrays, exact in every rounding mode.

f16 and bf16 values are handled as their bits (unsigned 16-bit arrays, 32-bit for packed pairs). Directed rounding of
the narrow formats goes through float64 rounded to odd, which makes the second rounding innocuous (Boldo and Melquiond,
"Emulation of FMA and correctly rounded sums", IEEE TC 57(4), 2008); float64 uses the sign of the exact residual.
"""

# mypy: disable-error-code="no-any-return"
# Operators on NDArray[Any] are typed Any.

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import types, vectorize
from numba.extending import intrinsic
from numpy.typing import NDArray

Array = NDArray[Any]


@intrinsic
def _llvm_fma(_context: Any, a: Any, b: Any, c: Any) -> Any:
    def generate(_target: Any, builder: ir.IRBuilder, _signature: Any, args: Any) -> Any:
        return builder.fma(*args)

    return a(a, b, c) if a in (types.float32, types.float64) and a == b == c else None, generate


@vectorize(  # type: ignore[no-untyped-call, untyped-decorator]  # Numba has no types
    ["float32(float32, float32, float32)", "float64(float64, float64, float64)"], cache=True
)
def fma(a: Any, b: Any, c: Any) -> Any:
    """One rounding, to nearest even, of a * b + c."""
    return _llvm_fma(a, b, c)  # type: ignore[call-arg]  # Numba passes the context


class Format(NamedTuple):
    """Significand bits, smallest normal exponent, largest finite value."""

    precision: int
    emin: int
    largest: float


FORMATS = {
    "f16": Format(11, -14, 65504.0),
    "bf16": Format(8, -126, float(np.ldexp(255, 120))),
    "tf32": Format(11, -126, float(np.ldexp(2047, 117))),
    "f32": Format(24, -126, float(np.finfo("f4").max)),
}
_TINY = {"f4": np.float32(2.0**-126), "f8": np.float64(2.0**-1022)}
_CANONICAL_NAN = np.uint16(0x7FFF)


def flush(x: Array) -> Array:
    """Subnormals to zero of the same sign (.ftz); NaN stays NaN, since NaN * False is NaN."""
    return x * (np.abs(x) >= (_TINY["f4"] if x.dtype.itemsize == 4 else _TINY["f8"]))


def saturate_unit(x: Array) -> Array:
    """Clamps to [0, 1]; NaN gives +0 (.sat)."""
    return np.where(x > 0, np.minimum(x, x.dtype.type(1)), x.dtype.type(0))


def rectify(x: Array) -> Array:
    """Negative values to +0, NaN stays (.relu)."""
    return np.where((x > 0) | np.isnan(x), x, x.dtype.type(0))


# ---- 16-bit formats


def widen(bits: Array, kind: str) -> Array:
    """The float32 values of f16 or bf16 bits."""
    bits = np.asarray(bits)
    if kind == "f16":
        return bits.view("f2").astype("f4")
    return (bits.astype("u4") << np.uint32(16)).view("f4")


def narrow(x: Array, kind: str, mode: str = "rn") -> Array:
    """float32 or float64 -> f16 or bf16 bits; NaN becomes the canonical one."""
    if mode == "rn" and kind == "f16":
        bits = x.astype("f2").view("u2")
    elif mode == "rn" and x.dtype == np.float32:
        word = x.view("u4")
        bits = (word + np.uint32(0x7FFF) + (word >> np.uint32(16) & np.uint32(1)) >> np.uint32(16)).astype("u2")
    else:
        rounded = round_to(x.astype("f8"), kind, mode)
        if kind == "f16":
            bits = rounded.astype("f2").view("u2")
        else:
            bits = (rounded.astype("f4").view("u4") >> np.uint32(16)).astype("u2")
    nan = np.isnan(x)
    return np.where(nan, _CANONICAL_NAN, bits) if nan.any() else bits


def halves(a: Array) -> Array:
    """Packed pairs as an (n, 2) array: low half first."""
    return np.ascontiguousarray(a).reshape(-1, 1).view("u2")


def join(pairs: Array) -> Array:
    """An (n, 2) array as packed pairs."""
    return np.ascontiguousarray(pairs).view("u4").reshape(-1)


# ---- rounding


def round_to(x: Array, kind: str, mode: str) -> Array:
    """Rounds float64 to the values of a narrower format.

    Args:
        x: float64; exact, or rounded to odd.
        kind: A name in `FORMATS`.
        mode: rn (nearest even), rna (nearest, ties away), rz, rm, rp.
    """
    precision, emin, largest = FORMATS[kind]
    exponent = np.maximum(np.frexp(x)[1] - 1, emin)
    scaled = np.ldexp(x, precision - 1 - exponent)
    y = np.ldexp(_ROUND[mode](scaled), exponent - precision + 1)
    over = np.abs(y) > largest
    if over.any():
        keep = {"rn": False, "rna": False, "rz": True, "rm": x > 0, "rp": x < 0}[mode]
        limit = np.where(keep & np.isfinite(x), largest, np.inf)
        y = np.where(over, np.copysign(limit, x), y)
    return y


def _half_away(x: Array) -> Array:
    return np.copysign(np.floor(np.abs(x) + 0.5), x)


_ROUND: dict[str, Any] = {"rn": np.rint, "rna": _half_away, "rz": np.trunc, "rm": np.floor, "rp": np.ceil}
INTEGER_ROUND = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def _to_odd(value: Array, error: Array) -> Array:
    """Rounds `value + error` (float64, `value` the nearest) to odd."""
    bits = value.view("i8")
    even = (error != 0) & (bits & 1 == 0) & np.isfinite(value)
    away = (error > 0) == (value > 0)
    return np.where(even, bits + np.where(away, 1, -1), bits).view("f8")


def _two_sum(a: Array, b: Array) -> tuple[Array, Array]:
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part)


def _exact(name: str, operands: list[Array]) -> tuple[Array, Array]:
    """The float64 result of an operation to nearest, and a number with the sign of exact minus result.

    The residual is computed on operands scaled to exponents around 0, where nothing of it underflows.
    """
    a = operands[0]
    fraction, exponent = np.frexp(a)
    match name:
        case "add":
            return _two_sum(a, operands[1])
        case "mul":
            factor, shift = np.frexp(operands[1])
            result = a * operands[1]
            return result, fma(fraction, factor, -np.ldexp(result, -(exponent + shift)))
        case "fma":
            return _exact_fma(*operands)
        case "div":
            divisor, shift = np.frexp(operands[1])
            result = a / operands[1]
            return result, fma(-np.ldexp(result, shift - exponent), divisor, fraction) * np.sign(divisor)
        case "sqrt":
            odd = exponent & 1
            result = np.sqrt(a)
            root = np.ldexp(result, -((exponent - odd) >> 1))
            return result, fma(-root, root, np.ldexp(fraction, odd))
    raise AssertionError(name)


def _exact_fma(a: Array, b: Array, c: Array) -> tuple[Array, Array]:
    result = fma(a, b, c)
    (x, x_exponent), (y, y_exponent), (z, z_exponent) = np.frexp(a), np.frexp(b), np.frexp(c)
    product_exponent = x_exponent + y_exponent
    top = np.where(c == 0, product_exponent, np.where((a == 0) | (b == 0), z_exponent, 0))
    top = np.where((c != 0) & (a != 0) & (b != 0), np.maximum(product_exponent, z_exponent), top)
    # what lies 300 bits below decides by its sign alone
    x = np.ldexp(x, np.maximum(product_exponent - top, -300))
    z = np.ldexp(z, np.maximum(z_exponent - top, -300))
    product = x * y
    total, low = _two_sum(product, z)
    rest, last = _two_sum(low, fma(x, y, -product))
    residual = (total - np.ldexp(result, -top)) + rest
    return result, np.where(residual == 0, last, residual)


def _directed(result: Array, residual: Array, overflow: Array, mode: str) -> Array:
    """Moves the nearest float64 to the neighbour that a mode wants; `overflow` marks infinities that are none."""
    residual = np.where(overflow, -result, residual)
    down = (residual < 0) & (result > 0 if mode == "rz" else mode == "rm")
    up = (residual > 0) & (result < 0 if mode == "rz" else mode == "rp")
    return np.where(down, np.nextafter(result, -np.inf), np.where(up, np.nextafter(result, np.inf), result))


def _rounded(name: str, operands: list[Array], kind: str, mode: str) -> Array:
    """An operation in float64, rounded once to a format; float64 values out."""
    wide = [np.atleast_1d(x.astype("f8")) for x in operands]
    result, residual = _exact(name, wide)
    residual = np.where(np.isnan(residual), 0.0, residual)  # an operand or the result is not finite
    if mode == "rm" and name in ("fma", "add"):  # an exact zero sum is -0 there
        left = wide[0] * wide[1] if name == "fma" else wide[0]
        opposite = np.signbit(left) != np.signbit(wide[-1])
        result = np.where((result == 0) & opposite, -0.0, result)
    if kind == "f64":
        finite = np.logical_and.reduce([np.isfinite(x) for x in wide])
        overflow = np.isinf(result) & finite & (wide[-1] != 0 if name == "div" else True)
        return result if mode == "rn" else _directed(result, residual, overflow, mode)
    return round_to(_to_odd(result, residual), kind, mode)


def arithmetic(name: str, kind: str, mode: str, flags: tuple[bool, bool, bool], *operands: Any) -> Array:
    """add, sub, mul, fma, div, sqrt of any format.

    Args:
        name: The operation.
        kind: PTX type.
        mode: rn, rz, rm or rp.
        flags: (.ftz, .sat, .relu).
        operands: Arrays or scalars in the type's NumPy form.
    """
    ftz, sat, relu = flags
    if kind.endswith("x2"):
        parts = [halves(x) for x in operands]
        return join(arithmetic(name, kind[:-2], mode, flags, *parts))
    narrow_kind = kind in ("f16", "bf16")
    values = [widen(x, kind) if narrow_kind else np.asarray(x) for x in operands]
    if ftz:
        values = [_flush_narrow(x, kind) for x in values]
    if name == "sub":
        values[1] = -values[1]
        name = "add"
    shape = np.broadcast_shapes(*(x.shape for x in values))
    result = _rounded(name, [np.broadcast_to(x, shape) for x in values], kind, mode).reshape(shape)
    result = result.astype("f8" if kind == "f64" else "f4")
    if ftz:
        result = _flush_narrow(result, kind)
    if sat:
        result = saturate_unit(result)
    if relu:
        result = rectify(result)
    return narrow(result, kind) if narrow_kind else result


def _flush_narrow(x: Array, kind: str) -> Array:
    smallest = x.dtype.type(2.0 ** FORMATS[kind].emin)
    return x * (np.abs(x) >= smallest)


def approximate_divide(a: Array, b: Array) -> Array:
    """div.approx.f32: like a * (1 / b), which is 0 for huge b (PTX ISA, div)."""
    quotient = a / b
    magnitude = np.abs(b)
    huge = (magnitude > np.float32(2.0**126)) & np.isfinite(b)
    return np.where(huge, np.where(np.isinf(a), np.float32(np.nan), np.copysign(np.float32(0), quotient)), quotient)


def extreme(name: str, a: Any, b: Any, nan: bool = False, xorsign: bool = False) -> Array:
    """min, max: the number where one is NaN (or NaN where `nan`), and -0 < +0."""
    a, b = np.asarray(a), np.asarray(b)
    sign = None
    if xorsign:
        sign = np.signbit(a) ^ np.signbit(b)
        a, b = np.abs(a), np.abs(b)
    chosen = (np.fmin if name == "min" else np.fmax)(a, b)
    word = f"u{a.dtype.itemsize}"
    ties = a.view(word) | b.view(word) if name == "min" else a.view(word) & b.view(word)
    result = np.where(a == b, ties.view(a.dtype), chosen)
    if nan:
        result = np.where(np.isnan(a) | np.isnan(b), a.dtype.type(np.nan), result)
    if sign is not None:
        result = np.where(sign, -np.abs(result), np.abs(result))
    return result


def narrow_extreme(name: str, kind: str, flags: tuple[bool, bool, bool], a: Any, b: Any) -> Array:
    """min, max of f16 and bf16, single or packed; flags are (.ftz, .NaN, .xorsign.abs)."""
    if kind.endswith("x2"):
        return join(narrow_extreme(name, kind[:-2], flags, halves(a), halves(b)))
    x, y = widen(a, kind), widen(b, kind)
    if flags[0]:
        x, y = _flush_narrow(x, kind), _flush_narrow(y, kind)
    return narrow(extreme(name, x, y, flags[1], flags[2]), kind)


def narrow_map(name: str, kind: str, ftz: bool, a: Any) -> Array:
    """ex2, tanh, and the like of f16 and bf16, single or packed."""
    if kind.endswith("x2"):
        return join(narrow_map(name, kind[:-2], ftz, halves(a)))
    x = widen(a, kind)
    x = _flush_narrow(x, kind) if ftz else x
    y = _MAPS[name](x)
    return narrow(_flush_narrow(y, kind) if ftz else y, kind)


_MAPS = {"ex2": np.exp2, "tanh": np.tanh}


# ---- comparison

_COMPARE = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}


def compare(name: str, a: Array, b: Array) -> Array:
    """The comparisons of floats: ordered ones are false, unordered ones (equ ...) true where one is NaN."""
    if name == "num":
        return ~(np.isnan(a) | np.isnan(b))
    if name == "nan":
        return np.isnan(a) | np.isnan(b)
    if name in _COMPARE:
        found = _COMPARE[name](a, b)
        return found & ~(np.isnan(a) | np.isnan(b)) if name == "ne" else found
    return _COMPARE[name[:2]](a, b) | np.isnan(a) | np.isnan(b)


# ---- conversion


def to_integer(x: Array, dtype: str, mode: str, wide_nan: bool) -> Array:
    """Float to integer: rounded, clamped to the type's range; NaN gives 0, or the top bit alone where `wide_nan`."""
    info = np.iinfo(dtype)
    rounded = INTEGER_ROUND[mode](x.astype("f8"))
    low, high = float(info.min), float(info.max)
    inside = (rounded >= low) & ((rounded < high) | ((rounded == high) & (info.bits < 64)))
    clamped = np.where(rounded > 0, info.max, info.min).astype(dtype)
    nan = np.array(1 << info.bits - 1 if wide_nan else 0, f"u{info.bits // 8}").view(dtype)
    safe = np.where(inside, rounded, 0.0)
    return np.where(np.isnan(x), nan, np.where(inside, safe.astype(dtype), clamped)).astype(dtype)


def from_integer(a: Array, kind: str, mode: str) -> Array:
    """Integer to f32 or f64 values in any rounding mode."""
    a = np.asarray(a)
    out = "f8" if kind == "f64" else "f4"
    if mode == "rn" and kind in ("f32", "f64"):
        return a.astype(out)
    if a.dtype.itemsize < 8:
        exact, error = a.astype("f8"), np.zeros(a.shape)
    else:  # the float64 nearest to a 64-bit integer, and what it misses
        high = (a >> np.array(32, a.dtype)).astype("f8") * 2.0**32
        low = (a & np.array(0xFFFFFFFF, a.dtype)).astype("f8")
        exact, error = _two_sum(high, low)
    if kind == "f64":
        return exact if mode == "rn" else _directed(exact, error, np.isinf(exact), mode)
    return round_to(_to_odd(exact, error), kind, mode).astype(out)


def convert_float(x: Array, kind: str, mode: str) -> Array:
    """float32 or float64 values to the values of a narrower format, still in their own NumPy type."""
    return round_to(x.astype("f8"), kind, mode)


def round_f32(x: Array, mode: str) -> Array:
    """float64 -> float32."""
    return x.astype("f4") if mode == "rn" else round_to(x, "f32", mode).astype("f4")


def tf32(x: Array, mode: str) -> Array:
    """float32 -> bits of tf32: 10 bits of fraction, the rest zero."""
    rounded = round_to(x.astype("f8"), "tf32", mode).astype("f4").view("u4")
    return np.where(np.isnan(x), np.uint32(0x7FFFFFFF), rounded)


def sign_bits(name: str, kind: str, a: Any) -> Array:
    """The sign operations abs and neg of the 16-bit formats, on their bits."""
    mask = 0x80008000 if kind.endswith("x2") else 0x8000
    a = np.asarray(a)
    return a & a.dtype.type(~mask & (2 ** (8 * a.dtype.itemsize) - 1)) if name == "abs" else a ^ a.dtype.type(mask)


def classify(name: str, x: Array) -> Array:
    """Whether numbers are finite, normal and so on, by the names of testp."""
    tiny = _TINY[x.dtype.str[1:]]
    match name:
        case "finite":
            return np.isfinite(x)
        case "infinite":
            return np.isinf(x)
        case "number":
            return ~np.isnan(x)
        case "notanumber":
            return np.isnan(x)
        case "normal":
            return np.isfinite(x) & (np.abs(x) >= tiny)
    return (np.abs(x) < tiny) & (x != 0)

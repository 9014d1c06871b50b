"""cvt: conversions between integers and floats of all sizes (PTX ISA, "cvt")."""

from __future__ import annotations

from ..ir import SIZES
from .emit import Emit, op
from .kinds import HALF, numpy_type

_INTEGERS = tuple(f"{sign}{bits}" for sign in "us" for bits in (8, 16, 32, 64))
_SCALARS = ("f16", "bf16", "f32", "f64")
_PACKED = ("f16x2", "bf16x2")
_SATURATED = ("f16", "f32")
_ROUNDINGS = ("rn", "rz", "rm", "rp")
_INTEGER_ROUNDINGS = ("rni", "rzi", "rmi", "rpi")


@op("cvt")
def convert(e: Emit) -> None:
    """Picks the kind of conversion by the two types."""
    source = e.type(*_INTEGERS, *_SCALARS)
    target = e.type(*_INTEGERS, *_SCALARS, *_PACKED, "tf32")
    e.code.pipe = "xu" if source[0] not in "us" or target[0] not in "us" else "alu"
    if "bf16" in (target, source) and (target, source) != ("bf16", "f32"):
        e.needs(90)
    if target in (*_PACKED, "bf16", "tf32"):
        e.needs(80)
    if target in _PACKED:
        _pack(e, target, source)
    elif target == "tf32":
        _tf32(e, source)
    elif target in _INTEGERS and source in _INTEGERS:
        _integers(e, target, source)
    elif target in _INTEGERS:
        _to_integer(e, target, source)
    elif source in _INTEGERS:
        _from_integer(e, target, source)
    else:
        _floats(e, target, source)


def _integers(e: Emit, target: str, source: str) -> None:
    saturated = e.flag("sat")
    e.finish(2)
    value = e.source(e.operands[1], source)
    wanted = numpy_type(target)
    if saturated and _needs_clamp(target, source):
        e.result(e.operands[0], f"saturate({value}, {wanted})", target, extend=True)
    elif wanted == numpy_type(source):
        e.result(e.operands[0], value, target, extend=True)
    else:
        e.result(e.operands[0], f"{value}.astype({wanted})", target, extend=True)


def _needs_clamp(target: str, source: str) -> bool:
    """Whether a value of the source type can lie outside of the target type."""
    if source[0] == "s" and target[0] == "u":
        return True
    spare = SIZES[target] - SIZES[source]
    return spare < 0 or (spare == 0 and source[0] != target[0])


def _float_source(e: Emit, source: str, ftz: bool) -> str:
    value = e.source(e.operands[1], source)
    if source in HALF:
        return f"widen({value}, {source!r})"
    return f"flush({value})" if ftz else value


def _to_integer(e: Emit, target: str, source: str) -> None:
    mode = e.one_of(*_INTEGER_ROUNDINGS)
    ftz = source == "f32" and e.flag("ftz")
    e.flag("sat")  # float to integer always clamps
    e.finish(2)
    wide_nan = source == "f64" or SIZES[target] == 8
    value = f"to_integer({_float_source(e, source, ftz)}, {numpy_type(target)}, {mode!r}, {wide_nan})"
    e.result(e.operands[0], value, target, extend=True)


def _from_integer(e: Emit, target: str, source: str) -> None:
    mode = e.one_of(*_ROUNDINGS)
    saturated = target in _SATURATED and e.flag("sat")
    e.finish(2)
    a = e.source(e.operands[1], source)
    value = f"from_integer({a}, {target!r}, {mode!r})"
    value = f"saturate_unit({value})" if saturated else value
    e.result(e.operands[0], f"narrow({value}, {target!r})" if target in HALF else value, target)


def _floats(e: Emit, target: str, source: str) -> None:
    """Between floats: widening is exact; narrowing takes a rounding; same size may round to an integer."""
    narrowing = SIZES[target] < SIZES[source] or (target != source and SIZES[target] == SIZES[source])
    mode = "none"
    if narrowing:
        mode = e.one_of(*_ROUNDINGS)
    elif target == source:
        mode = e.one_of(*_INTEGER_ROUNDINGS, default="none")
    ftz = "f32" in (target, source) and "bf16" not in (target, source) and e.flag("ftz")
    saturated = target in _SATURATED and e.flag("sat")
    relu = source == "f32" and target in HALF and e.flag("relu")
    e.finish(2)
    value = _float_source(e, source, ftz and source == "f32")
    if mode in _INTEGER_ROUNDINGS:
        value = f"INTEGER_ROUND[{mode!r}]({value})"
    if target == "f64":
        value = value if source == "f64" else f"{value}.astype(f8)"
    elif target == "f32" and source == "f64":
        value = f"round_f32({value}, {mode!r})"
    if ftz and target == "f32":
        value = f"flush({value})"
    if target in HALF:
        if saturated:
            value = f"saturate_unit({value})"
        if relu:
            value = f"rectify({value})"
        rounding = "" if mode in ("rn", "none", *_INTEGER_ROUNDINGS) else f", {mode!r}"
        value = f"narrow({value}, {target!r}{rounding})"
    elif saturated:
        value = f"saturate_unit({value})"
    e.result(e.operands[0], value, target)


def _pack(e: Emit, target: str, source: str) -> None:
    """cvt.rn.f16x2.f32 d, a, b: a becomes the upper half, b the lower."""
    if source != "f32":
        e.unsupported(f"type .{source}")
    mode = e.one_of("rn", "rz")
    relu = e.flag("relu")
    e.finish(3)
    upper, lower = (e.source(x, "f32") for x in e.operands[1:])
    if relu:
        upper, lower = f"rectify({upper})", f"rectify({lower})"
    kind = target[:-2]
    rounding = "" if mode == "rn" else f", {mode!r}"
    parts = ", ".join(f"narrow({x}, {kind!r}{rounding})" for x in (lower, upper))
    e.result(e.operands[0], f"pack([{parts}], u4, g)", "b32")


def _tf32(e: Emit, source: str) -> None:
    if source != "f32":
        e.unsupported(f"type .{source}")
    mode = e.one_of("rna", "rn", "rz")
    relu = mode != "rna" and e.flag("relu")
    e.finish(2)
    a = e.source(e.operands[1], "f32")
    e.result(e.operands[0], f"tf32({f'rectify({a})' if relu else a}, {mode!r})", "b32")

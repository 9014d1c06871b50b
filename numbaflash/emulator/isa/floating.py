"""Floating-point arithmetic (PTX ISA, "Floating Point", "Half Precision Floating Point").

The approximate instructions are computed as well as NumPy can: they differ from hardware in the last bits.
"""

from __future__ import annotations

from ..ir import SIZES
from .emit import Emit, float_op, op
from .kinds import FLOAT, HALF

_ROUNDINGS = ("rn", "rz", "rm", "rp")


@op("fma")
@float_op("add", "sub", "mul", "mad")
def arithmetic(e: Emit) -> None:
    """add, sub, mul, fma, mad."""
    name = "fma" if e.op == "mad" else e.op
    kind = e.type(*(("f32", "f64") if e.op == "mad" else FLOAT))
    ftz = kind in ("f32", "f16", "f16x2") and e.flag("ftz")
    sat = kind in ("f32", "f16", "f16x2") and e.flag("sat")
    relu = name == "fma" and kind in HALF and e.flag("relu")
    needs_mode = name == "fma"
    modes = ("rn",) if kind in HALF else _ROUNDINGS
    mode = e.one_of(*modes) if needs_mode else e.one_of(*modes, default="rn")
    if kind.startswith("bf16"):
        e.needs(80 if name == "fma" else 90)
    e.code.pipe = "fp64" if kind == "f64" else "fma"
    e.finish(4 if name == "fma" else 3)
    sources = [e.source(x, kind) for x in e.operands[1:]]
    if mode == "rn" and not (sat or relu) and kind in ("f32", "f64"):
        if ftz:
            sources = [f"flush({x})" for x in sources]
        sign = {"add": " + ", "sub": " - ", "mul": " * "}
        value = f"fma({', '.join(sources)})" if name == "fma" else sign[name].join(sources)
        value = f"flush({value})" if ftz else value
    else:
        value = f"arithmetic({name!r}, {kind!r}, {mode!r}, {(ftz, sat, relu)}, {', '.join(sources)})"
    e.result(e.operands[0], value, kind)


@float_op("div", "rem")
def division(e: Emit) -> None:
    """div: .approx, .full, or rounded."""
    if e.op == "rem":
        e.unsupported("the floating-point form")
    kind = e.type("f32", "f64")
    ftz = kind == "f32" and e.flag("ftz")
    mode = e.one_of(*_ROUNDINGS, *(("approx", "full") if kind == "f32" else ()))
    e.code.pipe = "fp64" if kind == "f64" else "mufu"
    e.finish(3)
    a, b = (e.source(x, kind) for x in e.operands[1:])
    if mode in _ROUNDINGS and mode != "rn":
        e.result(e.operands[0], f"arithmetic('div', {kind!r}, {mode!r}, {(ftz, False, False)}, {a}, {b})", kind)
        return
    if ftz:
        a, b = f"flush({a})", f"flush({b})"
    value = f"approximate_divide({a}, {b})" if mode == "approx" else f"{a} / {b}"
    e.result(e.operands[0], f"flush({value})" if ftz else value, kind)


@float_op("abs", "neg")
def sign_operation(e: Emit) -> None:
    """abs, neg."""
    kind = e.type(*FLOAT)
    ftz = kind == "f32" and e.flag("ftz")
    e.finish(2)
    a = e.source(e.operands[1], kind)
    if kind in HALF:
        e.result(e.operands[0], f"sign_bits({e.op!r}, {kind!r}, {a})", kind)
        return
    value = f"absolute({a})" if e.op == "abs" else f"-{a}"
    e.result(e.operands[0], f"flush({value})" if ftz else value, kind)


@float_op("min", "max")
def float_extreme(e: Emit) -> None:
    """min, max: .NaN, .xorsign.abs."""
    kind = e.type(*FLOAT)
    ftz = kind in ("f32", "f16", "f16x2") and e.flag("ftz")
    if kind in HALF:
        e.needs(80)
    nan = kind != "f64" and e.flag("NaN")
    xorsign = kind != "f64" and e.flag("xorsign")
    if xorsign:
        e.one_of("abs")
    e.code.pipe = "fp64" if kind == "f64" else "alu"
    e.finish(3)
    a, b = (e.source(x, kind) for x in e.operands[1:])
    if kind in HALF:
        value = f"narrow_extreme({e.op!r}, {kind!r}, {(ftz, nan, xorsign)}, {a}, {b})"
    else:
        if ftz:
            a, b = f"flush({a})", f"flush({b})"
        value = f"extreme({e.op!r}, {a}, {b}" + (f", {nan}, {xorsign})" if nan or xorsign else ")")
    e.result(e.operands[0], value, kind)


@op("rcp", "sqrt", "rsqrt")
def root_or_reciprocal(e: Emit) -> None:
    """rcp, sqrt, rsqrt: .approx, or rounded (not rsqrt)."""
    kind = e.type("f32", "f64")
    approximate = kind == "f32" or e.op != "sqrt"
    modes = (*(_ROUNDINGS if e.op != "rsqrt" else ()), *(("approx",) if approximate else ()))
    mode = e.one_of(*modes)
    if kind == "f64" and e.op == "rcp" and mode == "approx":
        ftz = bool(e.one_of("ftz"))
    else:
        ftz = (kind == "f32" or mode == "approx") and e.flag("ftz")
    e.code.pipe = "mufu" if mode == "approx" or kind == "f32" else "fp64"
    e.finish(2)
    a = e.source(e.operands[1], kind)
    if mode in _ROUNDINGS and mode != "rn":
        name, sources = ("sqrt", a) if e.op == "sqrt" else ("div", f"{_one(e, kind)}, {a}")
        e.result(e.operands[0], f"arithmetic({name!r}, {kind!r}, {mode!r}, {(ftz, False, False)}, {sources})", kind)
        return
    a = f"flush({a})" if ftz else a
    one = _one(e, kind)
    value = {"rcp": f"{one} / {a}", "sqrt": f"sqrt({a})", "rsqrt": f"{one} / sqrt({a})"}[e.op]
    e.result(e.operands[0], f"flush({value})" if ftz else value, kind)


def _one(e: Emit, kind: str) -> str:
    return e.integer(1, f"f{SIZES[kind]}")


@op("sin", "cos", "lg2", "ex2", "tanh")
def approximation(e: Emit) -> None:
    """sin, cos, lg2, ex2, tanh: .approx."""
    halves = HALF if e.op in ("ex2", "tanh") else ()
    kind = e.type("f32", *halves)
    if kind.startswith("bf16"):
        e.needs(90)
    if e.op == "tanh":
        ftz = False
    elif kind.startswith("bf16"):
        ftz = bool(e.one_of("ftz"))
    else:
        ftz = e.flag("ftz")
    e.one_of("approx")
    e.code.pipe = "mufu"
    e.finish(2)
    a = e.source(e.operands[1], kind)
    if kind in HALF:
        e.result(e.operands[0], f"narrow_map({e.op!r}, {kind!r}, {ftz}, {a})", kind)
        return
    name = {"sin": "sin", "cos": "cos", "lg2": "log2", "ex2": "exp2", "tanh": "tanh"}[e.op]
    value = f"{name}(flush({a}))" if ftz else f"{name}({a})"
    e.result(e.operands[0], f"flush({value})" if ftz else value, kind)


@op("testp")
def test_property(e: Emit) -> None:
    """Whether a number is finite, normal, and so on."""
    kind = e.type("f32", "f64")
    name = e.one_of("finite", "infinite", "number", "notanumber", "normal", "subnormal")
    e.finish(2)
    e.result(e.operands[0], f"classify({name!r}, {e.source(e.operands[1], kind)})", "pred")


@op("copysign")
def copy_sign(e: Emit) -> None:
    """copysign: the sign of a with the magnitude of b."""
    kind = e.type("f32", "f64")
    e.finish(3)
    a, b = (e.source(x, kind) for x in e.operands[1:])
    e.result(e.operands[0], f"copysign({b}, {a})", kind)

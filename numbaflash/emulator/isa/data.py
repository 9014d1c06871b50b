"""Moves, comparisons, selection and byte permutation (PTX ISA, "Data Movement", "Comparison and Selection")."""

from __future__ import annotations

from ..ir import SIZES, Reg, Symbol, Vector
from .emit import Emit, op
from .kinds import FLOAT, HALF, INT

_BITS = ("b16", "b32", "b64")
_COMPARISONS = ("eq", "ne", "lt", "le", "gt", "ge")


@op("mov")
def move(e: Emit) -> None:
    """mov: registers, constants, addresses; packs and unpacks vectors."""
    kind = e.type("pred", *_BITS, *INT, *FLOAT)
    e.finish(2)
    target, source = e.operands
    if isinstance(source, Vector):
        count = len(source.items)
        part = _part(e, kind, count)
        parts = [e.source(item, part) for item in source.items]
        e.result(target, f"pack([{', '.join(parts)}], u{SIZES[kind]}, g)", f"b{SIZES[kind] * 8}")
    elif isinstance(target, Vector):
        part = _part(e, kind, len(target.items))
        name = e.temporary()
        e.line(f"{name} = unpack({e.source(source, f'b{SIZES[kind] * 8}')}, u{SIZES[part]}, {len(target.items)}, g)")
        if e.instruction.guard is not None:
            e.unsupported("the guarded form with a vector")
        for position, item in enumerate(target.items):
            e.result(item, f"{name}[{position}]", part)
    elif isinstance(source, Symbol):
        if e.symbol(source.name)[0] == "param":
            e.unsupported("the address of a parameter")
        e.result(target, e.symbol_address(source, f"u{SIZES[kind]}"), f"u{SIZES[kind] * 8}")
    else:
        e.result(target, e.source(source, kind), kind)


def _part(e: Emit, kind: str, count: int) -> str:
    size = SIZES[kind] * 8 // count
    if kind not in _BITS or count not in (2, 4) or size < 16:
        e.unsupported(f"a vector of {count}")
    return f"b{size}"


@op("setp", "set")
def compare(e: Emit) -> None:
    """setp, set: compare, and combine with a predicate."""
    kind = e.type("b16", "b32", "b64", *INT, "f16", "bf16", "f32", "f64")
    target = "pred" if e.op == "setp" else e.type("u32", "s32", "f32", "f16", "bf16")
    ftz = kind == "f32" and e.flag("ftz")
    combine = e.one_of("and", "or", "xor", default="none")
    name = _comparison(e, kind)
    if kind == "bf16":
        e.needs(90)
    e.finish(3 if combine == "none" else 4)
    a, b = (e.source(x, kind) for x in e.operands[1:3])
    if kind in HALF:
        a, b = f"widen({a}, {kind!r})", f"widen({b}, {kind!r})"
    if ftz:
        a, b = f"flush({a})", f"flush({b})"
    sign = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
    plain = kind not in FLOAT or (name in sign and name != "ne")
    found = f"({a} {sign[name]} {b})" if plain else f"compare({name!r}, {a}, {b})"
    first, second = e.pair(e.operands[0])
    inverse = f"~{found}"
    if combine != "none":
        c = e.source(e.operands[3], "pred")
        mark = {"and": "&", "or": "|", "xor": "^"}[combine]
        found, inverse = f"{found} {mark} ({c})", f"~{found} {mark} ({c})"
    if e.op == "setp":
        if second != Reg("_"):
            both = e.temporary(), e.temporary()
            e.line(f"{both[0]}, {both[1]} = {found}, {inverse}")
            found, inverse = both
            e.result(second, inverse, "pred")
        e.result(first, found, "pred")
    elif target in ("u32", "s32"):
        e.result(first, f"-({found}).astype(i4)", "s32")
    elif target == "f32":
        e.result(first, f"({found}).astype(f4)", "f32")
    else:
        e.result(first, f"narrow(({found}).astype(f4), {target!r})", target)


def _comparison(e: Emit, kind: str) -> str:
    if kind in FLOAT:
        unordered = tuple(f"{name}u" for name in _COMPARISONS)
        return e.one_of(*_COMPARISONS, *unordered, "num", "nan")
    if kind[0] == "b":
        return e.one_of("eq", "ne")
    aliases = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}
    name = e.one_of(*_COMPARISONS, *(aliases if kind[0] == "u" else ()))
    return aliases.get(name, name)


@op("selp")
def select(e: Emit) -> None:
    """selp: a where p, else b."""
    kind = e.type(*_BITS, *INT, "f32", "f64")
    e.finish(4)
    a, b = (e.source(x, kind) for x in e.operands[1:3])
    e.result(e.operands[0], f"where({e.source(e.operands[3], 'pred')}, {a}, {b})", kind)


@op("slct")
def select_by_sign(e: Emit) -> None:
    """slct: a where c >= 0, else b."""
    sign = e.type("s32", "f32")
    kind = e.type(*_BITS, *INT, "f32", "f64")
    ftz = sign == "f32" and e.flag("ftz")
    e.finish(4)
    a, b = (e.source(x, kind) for x in e.operands[1:3])
    c = e.source(e.operands[3], sign)
    e.result(e.operands[0], f"where(({f'flush({c})' if ftz else c}) >= 0, {a}, {b})", kind)


@op("prmt")
def permute(e: Emit) -> None:
    """prmt: byte permutation."""
    mode = e.one_of("f4e", "b4e", "rc8", "ecl", "ecr", "rc16", default="default")
    e.type("b32")
    e.finish(4)
    a, b, selector = (e.source(x, "u32") for x in e.operands[1:])
    e.result(e.operands[0], f"permute({a}, {b}, {selector}, {mode!r})", "b32")

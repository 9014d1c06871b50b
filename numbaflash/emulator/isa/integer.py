"""Integer arithmetic, logic, shifts and bit fields (PTX ISA, "Integer Arithmetic", "Logic and Shift")."""

from __future__ import annotations

from ..ir import SIZES
from .emit import Emit, op
from .kinds import INT, bits

_WIDE = ("u32", "s32", "u64", "s64")
"""What carries run through."""
CARRY = "%carry"
"""The condition code register CC.CF, kept like any other register."""


@op("add", "sub")
def add(e: Emit) -> None:
    """add, sub: wrap, .sat (s32) or .cc."""
    kind = e.type(*INT)
    sign = "+" if e.op == "add" else "-"
    if kind in _WIDE and e.flag("cc"):
        _carry(e, kind, carry_in=False, carry_out=True)
    elif kind == "s32" and e.flag("sat"):
        e.finish(3)
        a, b = e.source(e.operands[1], kind), e.source(e.operands[2], kind)
        e.result(e.operands[0], f"saturate({a}.astype(i8) {sign} {b}, i4)", kind)
    else:
        e.finish(3)
        a, b = (e.source(x, bits(kind)) for x in e.operands[1:])
        e.result(e.operands[0], f"{a} {sign} {b}", bits(kind))


@op("addc", "subc")
def add_with_carry(e: Emit) -> None:
    """addc, subc: add and subtract with carry in."""
    kind = e.type(*_WIDE)
    _carry(e, kind, carry_in=True, carry_out=e.flag("cc"))


def _carry(e: Emit, kind: str, carry_in: bool, carry_out: bool) -> None:
    e.finish(3)
    e.code.pure = False
    a, b = (e.source(x, bits(kind)) for x in e.operands[1:])
    _carried(e, f"{e.op[:3]}_carry({a}, {b}, {_carry_in(e, carry_in)})", bits(kind), carry_out)


def _carry_in(e: Emit, used: bool) -> str:
    number = e.names.number[CARRY]
    if used:
        e.code.reads.append(number)
    return f"v{number}" if used else "False"


def _carried(e: Emit, call: str, kind: str, carry_out: bool) -> None:
    total, carry = e.temporary(), e.temporary()
    e.line(f"{total}, {carry} = {call}")
    e.result(e.operands[0], f"g.wide({total})", kind)
    if carry_out:
        number = e.names.number[CARRY]
        e.code.writes.append(number)
        e.line(f"v{number} = g.wide({carry})")


@op("mul", "mad")
def multiply(e: Emit) -> None:
    """mul, mad: .lo, .hi, .wide."""
    kind = e.type(*INT)
    part = e.one_of("lo", "hi", *(("wide",) if SIZES[kind] < 8 else ()))
    carry_out = e.op == "mad" and part != "wide" and kind in _WIDE and e.flag("cc")
    saturated = e.op == "mad" and part == "hi" and kind == "s32" and e.flag("sat")
    e.code.pipe = "imad"
    e.finish(4 if e.op == "mad" else 3)
    product, wide = _product(e, kind, part)
    if e.op == "mul":
        e.result(e.operands[0], product, wide)
    elif carry_out:
        e.code.pure = False
        _carried(e, f"add_carry({product}, {e.source(e.operands[3], wide)}, False)", wide, True)
    elif saturated:
        c = e.source(e.operands[3], "s32")
        e.result(e.operands[0], f"saturate({product}.view(i4).astype(i8) + {c}, i4)", "s32")
    else:
        e.result(e.operands[0], f"{product} + {e.source(e.operands[3], wide)}", wide)


@op("madc")
def multiply_with_carry(e: Emit) -> None:
    """madc: multiply-add with carry in."""
    kind = e.type(*_WIDE)
    part = e.one_of("lo", "hi")
    carry_out = e.flag("cc")
    e.code.pipe, e.code.pure = "imad", False
    e.finish(4)
    product, wide = _product(e, kind, part)
    _carried(e, f"add_carry({product}, {e.source(e.operands[3], wide)}, {_carry_in(e, True)})", wide, carry_out)


def _product(e: Emit, kind: str, part: str) -> tuple[str, str]:
    """The low, high or whole product, as unsigned bits, and its PTX type."""
    size = SIZES[kind]
    if part == "lo":
        a, b = (e.source(x, bits(kind)) for x in e.operands[1:3])
        return f"({a} * {b})", bits(kind)
    a, b = (e.source(x, kind) for x in e.operands[1:3])
    if part == "hi":
        return f"multiply_high({a}, {b})", bits(kind)
    wide = f"{kind[0]}{size * 16}"
    product = f"({a}.astype({'i' if kind[0] == 's' else 'u'}{size * 2}) * {b})"
    return f"{product}.view(u{size * 2})" if kind[0] == "s" else product, bits(wide)


@op("mul24", "mad24")
def multiply_24(e: Emit) -> None:
    """mul24, mad24: products of the low 24 bits."""
    kind = e.type("u32", "s32")
    part = e.one_of("lo", "hi")
    e.code.pipe = "imad"
    e.finish(4 if e.op == "mad24" else 3)
    a, b = (e.source(x, kind) for x in e.operands[1:3])
    product = f"multiply_24({a}, {b}, {part == 'hi'})"
    if e.op == "mad24":
        product = f"{product} + {e.source(e.operands[3], 'u32')}"
    e.result(e.operands[0], product, "u32")


@op("sad")
def sum_of_difference(e: Emit) -> None:
    """sad: c + abs(a - b)."""
    kind = e.type(*INT)
    e.finish(4)
    a, b = (e.source(x, kind) for x in e.operands[1:3])
    c = e.source(e.operands[3], bits(kind))
    unsigned = f"u{SIZES[kind]}"
    e.result(e.operands[0], f"{c} + (maximum({a}, {b}) - minimum({a}, {b})).view({unsigned})", bits(kind))


@op("div", "rem")
def divide(e: Emit) -> None:
    """div, rem: truncated towards zero."""
    kind = e.type(*INT)
    e.finish(3)
    a, b = (e.source(x, kind) for x in e.operands[1:])
    e.result(e.operands[0], f"{'divide' if e.op == 'div' else 'remainder'}({a}, {b})", kind)


@op("abs", "neg")
def absolute(e: Emit) -> None:
    """abs, neg."""
    kind = e.type("s16", "s32", "s64")
    e.finish(2)
    a = e.source(e.operands[1], kind)
    e.result(e.operands[0], f"absolute({a})" if e.op == "abs" else f"-{a}", kind)


@op("min", "max")
def extreme(e: Emit) -> None:
    """min, max."""
    kind = e.type(*INT)
    relu = e.op == "max" and kind == "s32" and e.flag("relu")
    e.finish(3)
    a, b = (e.source(x, kind) for x in e.operands[1:])
    value = f"{e.op}imum({a}, {b})"
    e.result(e.operands[0], f"maximum({value}, {e.integer(0, 'i4')})" if relu else value, kind)


@op("popc", "clz", "brev")
def bit_count(e: Emit) -> None:
    """popc, clz (32-bit results), brev."""
    kind = e.type("b32", "b64")
    e.finish(2)
    a = e.source(e.operands[1], kind)
    name = {"popc": "popcount", "clz": "leading_zeros", "brev": "reverse_bits"}[e.op]
    e.result(e.operands[0], f"{name}({a})", kind if e.op == "brev" else "b32")


@op("bfind")
def find_bit(e: Emit) -> None:
    """bfind: position of the most significant non-sign bit, or .shiftamt to bring it to the top."""
    kind = e.type("u32", "s32", "u64", "s64")
    shift = e.flag("shiftamt")
    e.finish(2)
    e.result(e.operands[0], f"find_bit({e.source(e.operands[1], kind)}, {shift})", "u32")


@op("bfe")
def extract_field(e: Emit) -> None:
    """bfe: extract a bit field."""
    kind = e.type("u32", "s32", "u64", "s64")
    e.finish(4)
    a = e.source(e.operands[1], kind)
    position, length = (e.source(x, "u32") for x in e.operands[2:])
    e.result(e.operands[0], f"extract_field({a}, {position}, {length})", kind)


@op("bfi")
def insert_field(e: Emit) -> None:
    """bfi: insert the low bits of a into b."""
    kind = e.type("b32", "b64")
    e.finish(5)
    a, b = (e.source(x, kind) for x in e.operands[1:3])
    position, length = (e.source(x, "u32") for x in e.operands[3:])
    e.result(e.operands[0], f"insert_field({a}, {b}, {position}, {length})", kind)


@op("bmsk")
def bit_mask(e: Emit) -> None:
    """bmsk: a mask of b bits from bit a, wrapped or clamped."""
    e.type("b32")
    wrap = e.one_of("clamp", "wrap") == "wrap"
    e.finish(3)
    a, b = (e.source(x, "u32") for x in e.operands[1:])
    e.result(e.operands[0], f"bit_mask({a}, {b}, {wrap})", "b32")


@op("szext")
def sign_extend_field(e: Emit) -> None:
    """szext: sign- or zero-extend from b bits."""
    kind = e.type("u32", "s32")
    wrap = e.one_of("clamp", "wrap") == "wrap"
    e.finish(3)
    a, b = e.source(e.operands[1], kind), e.source(e.operands[2], "u32")
    e.result(e.operands[0], f"extend_field({a}, {b}, {wrap})", kind)


@op("dp4a", "dp2a")
def dot_product(e: Emit) -> None:
    """dp4a, dp2a: dot product of bytes, plus c."""
    kind_b = e.type("u32", "s32")
    kind_a = e.type("u32", "s32")
    high = e.op == "dp2a" and e.one_of("lo", "hi") == "hi"
    e.code.pipe = "imad"
    e.finish(4)
    a, b = e.source(e.operands[1], "u32"), e.source(e.operands[2], "u32")
    signed = kind_a == "s32", kind_b == "s32"
    total = f"{e.op}({a}, {b}, {signed}, {high})" if e.op == "dp2a" else f"dp4a({a}, {b}, {signed})"
    e.result(e.operands[0], f"{total} + {e.source(e.operands[3], 'u32')}", "u32")


@op("and", "or", "xor")
def logic(e: Emit) -> None:
    """and, or, xor."""
    kind = e.type("pred", "b16", "b32", "b64")
    e.finish(3)
    a, b = (e.source(x, kind) for x in e.operands[1:])
    e.result(e.operands[0], f"{a} {dict(zip(('and', 'or', 'xor'), '&|^', strict=True))[e.op]} {b}", kind)


@op("not")
def invert(e: Emit) -> None:
    """Bitwise complement."""
    kind = e.type("pred", "b16", "b32", "b64")
    e.finish(2)
    e.result(e.operands[0], f"~{e.source(e.operands[1], kind)}", kind)


@op("cnot")
def logical_not(e: Emit) -> None:
    """cnot: 1 where a is 0."""
    kind = e.type("b16", "b32", "b64")
    e.finish(2)
    e.result(e.operands[0], f"({e.source(e.operands[1], kind)} == 0).astype(u{SIZES[kind]})", kind)


@op("lop3")
def three_way_logic(e: Emit) -> None:
    """lop3: any function of three inputs by its truth table."""
    e.type("b32")
    combine = e.one_of("and", "or", default="none")
    e.finish(5 if combine == "none" else 6)
    a, b, c = (e.source(x, "b32") for x in e.operands[1:4])
    table = e.literal(4)
    value = f"lop3({a}, {b}, {c}, {table})"
    first, second = e.pair(e.operands[0])
    if combine == "none":
        e.result(first, value, "b32")
        return
    name = e.temporary()
    e.line(f"{name} = {value}")
    e.result(first, name, "b32")
    q = e.source(e.operands[5], "pred")
    e.result(second, f"({name} != 0) {'&' if combine == 'and' else '|'} {q}", "pred")


@op("shl", "shr")
def shift(e: Emit) -> None:
    """shl, shr: amounts past the width give zero, or the sign."""
    kind = e.type(*(("b16", "b32", "b64") if e.op == "shl" else ("b16", "b32", "b64", *INT)))
    e.finish(3)
    a, amount = e.source(e.operands[1], kind), e.source(e.operands[2], "u32")
    e.result(e.operands[0], f"shift_{'left' if e.op == 'shl' else 'right'}({a}, {amount})", kind)


@op("shf")
def funnel_shift(e: Emit) -> None:
    """shf: shift the pair (b:a)."""
    e.type("b32")
    left = e.one_of("l", "r") == "l"
    wrap = e.one_of("clamp", "wrap") == "wrap"
    e.finish(4)
    a, b, amount = (e.source(x, "u32") for x in e.operands[1:])
    e.result(e.operands[0], f"funnel_shift({a}, {b}, {amount}, {left}, {wrap})", "b32")

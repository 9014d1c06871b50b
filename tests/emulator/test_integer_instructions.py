"""Integer, logic, shift, comparison and selection instructions, a row each, against Python's integers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from emulator.harness import execute, grid, integers, same, signed

Oracle = Callable[..., int]


def clamp(value: int, bits: int, is_signed: bool) -> int:
    low, high = (-(1 << bits - 1), (1 << bits - 1) - 1) if is_signed else (0, (1 << bits) - 1)
    return min(max(value, low), high)


def quotient(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def field(a: int, position: int, length: int, bits: int, is_signed: bool) -> int:
    """bfe, bit by bit as the ISA's pseudocode has it."""
    position, length = position & 255, length & 255
    word = a & (1 << bits) - 1
    sign = 0
    if is_signed and length:
        sign = word >> min(position + length - 1, bits - 1) & 1
    result = 0
    for i in range(bits):
        inside = i < length and position + i < bits
        result |= ((word >> position + i & 1) if inside else sign) << i
    return result


def inserted(a: int, b: int, position: int, length: int, bits: int) -> int:
    position, length = position & 255, length & 255
    result = b
    for i in range(length):
        if position + i < bits:
            result = result & ~(1 << position + i) | (a >> i & 1) << position + i
    return result


def nibbles(a: int, b: int, selector: int) -> int:
    """prmt without a mode."""
    source = (b << 32 | a).to_bytes(8, "little")
    result = 0
    for i in range(4):
        nibble = selector >> 4 * i & 15
        byte = source[nibble & 7]
        if nibble & 8:
            byte = 255 if byte & 128 else 0
        result |= byte << 8 * i
    return result


def bytes_of(a: int, is_signed: bool, size: int = 1) -> list[int]:
    parts = [a >> 8 * size * i & (1 << 8 * size) - 1 for i in range(4 // size)]
    return [signed(x, 8 * size) if is_signed else x for x in parts]


def top_bit(a: int) -> int:
    if a < 0:
        a = ~a
    return a.bit_length() - 1 if a else 0xFFFFFFFF


U32, S32, U64, S64, U16, S16 = ["u4"], ["i4"], ["u8"], ["i8"], ["u2"], ["i2"]

TWO_OPERANDS: list[tuple[str, str, str, Oracle]] = [
    ("add.u16", "u2", "u2", lambda a, b: a + b),
    ("add.s32", "i4", "i4", lambda a, b: a + b),
    ("add.u32", "u4", "u4", lambda a, b: a + b),
    ("add.s64", "i8", "i8", lambda a, b: a + b),
    ("add.sat.s32", "i4", "i4", lambda a, b: clamp(a + b, 32, True)),
    ("sub.s16", "i2", "i2", lambda a, b: a - b),
    ("sub.u32", "u4", "u4", lambda a, b: a - b),
    ("sub.u64", "u8", "u8", lambda a, b: a - b),
    ("sub.sat.s32", "i4", "i4", lambda a, b: clamp(a - b, 32, True)),
    ("mul.lo.u16", "u2", "u2", lambda a, b: a * b),
    ("mul.lo.s32", "i4", "i4", lambda a, b: a * b),
    ("mul.lo.s64", "i8", "i8", lambda a, b: a * b),
    ("mul.hi.s16", "i2", "i2", lambda a, b: a * b >> 16),
    ("mul.hi.u16", "u2", "u2", lambda a, b: a * b >> 16),
    ("mul.hi.u32", "u4", "u4", lambda a, b: a * b >> 32),
    ("mul.hi.s32", "i4", "i4", lambda a, b: a * b >> 32),
    ("mul.hi.u64", "u8", "u8", lambda a, b: a * b >> 64),
    ("mul.hi.s64", "i8", "i8", lambda a, b: a * b >> 64),
    ("mul.wide.s16", "i2", "i4", lambda a, b: a * b),
    ("mul.wide.u16", "u2", "u4", lambda a, b: a * b),
    ("mul.wide.s32", "i4", "i8", lambda a, b: a * b),
    ("mul.wide.u32", "u4", "u8", lambda a, b: a * b),
    ("mul24.lo.u32", "u4", "u4", lambda a, b: (a & 0xFFFFFF) * (b & 0xFFFFFF)),
    ("mul24.hi.u32", "u4", "u4", lambda a, b: (a & 0xFFFFFF) * (b & 0xFFFFFF) >> 16),
    ("mul24.lo.s32", "i4", "i4", lambda a, b: signed(a, 24) * signed(b, 24)),
    ("mul24.hi.s32", "i4", "i4", lambda a, b: signed(a, 24) * signed(b, 24) >> 16),
    ("min.s32", "i4", "i4", min),
    ("min.u64", "u8", "u8", min),
    ("max.u16", "u2", "u2", max),
    ("max.s64", "i8", "i8", max),
    ("and.b16", "u2", "u2", lambda a, b: a & b),
    ("and.b32", "u4", "u4", lambda a, b: a & b),
    ("or.b64", "u8", "u8", lambda a, b: a | b),
    ("xor.b32", "u4", "u4", lambda a, b: a ^ b),
]


def wrapped(values: list[int], dtype: str) -> np.ndarray:
    bits = 8 * int(dtype[1])
    return np.array([x & (1 << bits) - 1 for x in values], f"u{dtype[1]}").view(dtype)


@pytest.mark.parametrize(
    ("opcode", "source", "target", "oracle"), TWO_OPERANDS, ids=lambda x: x if isinstance(x, str) else ""
)
def test_two_operand_instruction_matches_exact_integers(opcode: str, source: str, target: str, oracle: Oracle) -> None:
    a, b = grid(integers(source), integers(source))
    (found,) = execute(f"{opcode} %d, %a, %b;", [target], a, b)
    same(found, wrapped([oracle(int(x), int(y)) for x, y in zip(a, b, strict=True)], target))


@pytest.mark.parametrize("kind", ["u16", "s16", "u32", "s32", "u64", "s64"])
def test_division_truncates_towards_zero(kind: str) -> None:
    dtype = f"{'i' if kind[0] == 's' else 'u'}{int(kind[1:]) // 8}"
    values = integers(dtype)
    a, b = grid(values, values[values != 0])
    found = execute(f"div.{kind} %d, %a, %b; rem.{kind} %e, %a, %b;", [dtype, dtype], a, b)
    pairs = [(int(x), int(y)) for x, y in zip(a, b, strict=True)]
    same(found[0], wrapped([quotient(x, y) for x, y in pairs], dtype))
    same(found[1], wrapped([x - quotient(x, y) * y for x, y in pairs], dtype))


ONE_OPERAND: list[tuple[str, str, str, Oracle]] = [
    ("abs.s16", "i2", "i2", abs),
    ("abs.s32", "i4", "i4", abs),
    ("abs.s64", "i8", "i8", abs),
    ("neg.s32", "i4", "i4", lambda a: -a),
    ("neg.s64", "i8", "i8", lambda a: -a),
    ("not.b16", "u2", "u2", lambda a: ~a),
    ("not.b32", "u4", "u4", lambda a: ~a),
    ("not.b64", "u8", "u8", lambda a: ~a),
    ("cnot.b32", "u4", "u4", lambda a: int(a == 0)),
    ("popc.b32", "u4", "u4", lambda a: a.bit_count()),
    ("popc.b64", "u8", "u4", lambda a: a.bit_count()),
    ("clz.b32", "u4", "u4", lambda a: 32 - a.bit_length()),
    ("clz.b64", "u8", "u4", lambda a: 64 - a.bit_length()),
    ("brev.b32", "u4", "u4", lambda a: int(f"{a:032b}"[::-1], 2)),
    ("brev.b64", "u8", "u8", lambda a: int(f"{a:064b}"[::-1], 2)),
    ("bfind.u32", "u4", "u4", lambda a: top_bit(a)),
    ("bfind.s32", "i4", "u4", lambda a: top_bit(a)),
    ("bfind.u64", "u8", "u4", lambda a: top_bit(a)),
    ("bfind.s64", "i8", "u4", lambda a: top_bit(a)),
    ("bfind.shiftamt.u32", "u4", "u4", lambda a: 31 - top_bit(a) if a else 0xFFFFFFFF),
    ("mov.b32", "u4", "u4", lambda a: a),
    ("mov.u64", "u8", "u8", lambda a: a),
]


@pytest.mark.parametrize(
    ("opcode", "source", "target", "oracle"), ONE_OPERAND, ids=lambda x: x if isinstance(x, str) else ""
)
def test_one_operand_instruction_matches_exact_integers(opcode: str, source: str, target: str, oracle: Oracle) -> None:
    a = integers(source)
    (found,) = execute(f"{opcode} %d, %a;", [target], a)
    same(found, wrapped([oracle(int(x)) for x in a], target))


THREE_OPERANDS: list[tuple[str, list[str], str, Oracle]] = [
    ("mad.lo.s32", ["i4", "i4", "i4"], "i4", lambda a, b, c: a * b + c),
    ("mad.lo.u64", ["u8", "u8", "u8"], "u8", lambda a, b, c: a * b + c),
    ("mad.hi.u32", ["u4", "u4", "u4"], "u4", lambda a, b, c: (a * b >> 32) + c),
    ("mad.hi.s32", ["i4", "i4", "i4"], "i4", lambda a, b, c: (a * b >> 32) + c),
    ("mad.hi.sat.s32", ["i4", "i4", "i4"], "i4", lambda a, b, c: clamp((a * b >> 32) + c, 32, True)),
    ("mad.wide.u32", ["u4", "u4", "u8"], "u8", lambda a, b, c: a * b + c),
    ("mad.wide.s32", ["i4", "i4", "i8"], "i8", lambda a, b, c: a * b + c),
    ("mad.wide.s16", ["i2", "i2", "i4"], "i4", lambda a, b, c: a * b + c),
    ("mad24.lo.u32", ["u4", "u4", "u4"], "u4", lambda a, b, c: (a & 0xFFFFFF) * (b & 0xFFFFFF) + c),
    ("sad.s32", ["i4", "i4", "u4"], "u4", lambda a, b, c: c + abs(a - b)),
    ("sad.u16", ["u2", "u2", "u2"], "u2", lambda a, b, c: c + abs(a - b)),
    ("bfe.u32", ["u4", "u4", "u4"], "u4", lambda a, b, c: field(a, b, c, 32, False)),
    ("bfe.s32", ["i4", "u4", "u4"], "i4", lambda a, b, c: field(a, b, c, 32, True)),
    ("bfe.u64", ["u8", "u4", "u4"], "u8", lambda a, b, c: field(a, b, c, 64, False)),
    ("bfe.s64", ["i8", "u4", "u4"], "i8", lambda a, b, c: field(a, b, c, 64, True)),
    ("prmt.b32", ["u4", "u4", "u4"], "u4", nibbles),
    ("shf.l.wrap.b32", ["u4", "u4", "u4"], "u4", lambda a, b, c: (b << 32 | a) << (c & 31) >> 32),
    ("shf.r.wrap.b32", ["u4", "u4", "u4"], "u4", lambda a, b, c: (b << 32 | a) >> (c & 31)),
    ("shf.l.clamp.b32", ["u4", "u4", "u4"], "u4", lambda a, b, c: (b << 32 | a) << min(c, 32) >> 32),
    ("shf.r.clamp.b32", ["u4", "u4", "u4"], "u4", lambda a, b, c: (b << 32 | a) >> min(c, 32)),
    (
        "dp4a.s32.s32",
        ["u4", "u4", "u4"],
        "u4",
        lambda a, b, c: c + sum(x * y for x, y in zip(bytes_of(a, True), bytes_of(b, True), strict=True)),
    ),
    (
        "dp4a.u32.s32",
        ["u4", "u4", "u4"],
        "u4",
        lambda a, b, c: c + sum(x * y for x, y in zip(bytes_of(a, False), bytes_of(b, True), strict=True)),
    ),
    (
        "dp2a.lo.s32.u32",
        ["u4", "u4", "u4"],
        "u4",
        lambda a, b, c: c + sum(x * y for x, y in zip(bytes_of(a, True, 2), bytes_of(b, False)[:2], strict=True)),
    ),
    (
        "dp2a.hi.u32.s32",
        ["u4", "u4", "u4"],
        "u4",
        lambda a, b, c: c + sum(x * y for x, y in zip(bytes_of(a, False, 2), bytes_of(b, True)[2:], strict=True)),
    ),
    ("slct.u32.s32", ["u4", "u4", "i4"], "u4", lambda a, b, c: a if c >= 0 else b),
]


@pytest.mark.parametrize(
    ("opcode", "sources", "target", "oracle"), THREE_OPERANDS, ids=lambda x: x if isinstance(x, str) else ""
)
def test_three_operand_instruction_matches_exact_integers(
    opcode: str, sources: list[str], target: str, oracle: Oracle
) -> None:
    a, b, c = grid(*(integers(x)[::2] if i else integers(x) for i, x in enumerate(sources)))
    (found,) = execute(f"{opcode} %d, %a, %b, %c;", [target], a, b, c)
    same(found, wrapped([oracle(int(x), int(y), int(z)) for x, y, z in zip(a, b, c, strict=True)], target))


@pytest.mark.parametrize("bits", [32, 64])
def test_bit_field_insert_replaces_only_the_field(bits: int) -> None:
    dtype = f"u{bits // 8}"
    a, b, c, f = grid(integers(dtype)[::4], integers(dtype)[::5], integers("u4")[::2], integers("u4")[::2])
    (found,) = execute(f"bfi.b{bits} %d, %a, %b, %c, %f;", [dtype], a, b, c, f)
    rows = zip(a, b, c, f, strict=True)
    same(found, wrapped([inserted(*(int(x) for x in row), bits) for row in rows], dtype))


@pytest.mark.parametrize("mode", ["wrap", "clamp"])
def test_bit_mask_and_field_extension(mode: str) -> None:
    a, b = grid(integers("u4"), integers("u4"))

    def amount(x: int) -> int:
        return x & 31 if mode == "wrap" else min(x, 32)

    (mask,) = execute(f"bmsk.{mode}.b32 %d, %a, %b;", ["u4"], a, b)
    pairs = [(int(x), int(y)) for x, y in zip(a, b, strict=True)]
    same(mask, wrapped([((1 << amount(y)) - 1) << amount(x) for x, y in pairs], "u4"))
    (extended,) = execute(f"szext.{mode}.s32 %d, %a, %b;", ["i4"], a, b)
    same(extended, wrapped([signed(x, amount(y)) if amount(y) else 0 for x, y in pairs], "i4"))


@pytest.mark.parametrize("kind", ["b16", "b32", "b64", "u16", "s16", "u32", "s32", "u64", "s64"])
def test_shifts_past_the_width_give_zero_or_the_sign(kind: str) -> None:
    bits = int(kind[1:])
    dtype = f"{'i' if kind[0] == 's' else 'u'}{bits // 8}"
    a, b = grid(integers(dtype), integers("u4"))
    (right,) = execute(f"shr.{kind} %d, %a, %b;", [dtype], a, b)
    same(right, wrapped([int(x) >> min(int(y), 64) for x, y in zip(a, b, strict=True)], dtype))
    (left,) = execute(f"shl.b{bits} %d, %a, %b;", [dtype], a, b)
    same(left, wrapped([int(x) << min(int(y), 64) for x, y in zip(a, b, strict=True)], dtype))


@pytest.mark.parametrize("table", [0x00, 0x01, 0x80, 0xE8, 0x96, 0xF8, 0xC0, 0x2A, 0xFF])
def test_lop3_computes_its_truth_table(table: int) -> None:
    a, b, c = (np.random.default_rng(table + i).integers(0, 2**32, 64, dtype="u4") for i in range(3))
    (found,) = execute(f"lop3.b32 %d, %a, %b, %c, {table};", ["u4"], a, b, c)
    expected = np.zeros_like(a)
    for bit in range(32):
        index = (a >> bit & 1) * 4 + (b >> bit & 1) * 2 + (c >> bit & 1)
        expected |= (table >> index & 1).astype("u4") << np.uint32(bit)
    same(found, expected)


@pytest.mark.parametrize("bits", [32, 64])
def test_carries_chain_to_wide_sums_and_differences(bits: int) -> None:
    dtype = f"u{bits // 8}"
    a, b, c = grid(integers(dtype), integers(dtype)[::3], integers(dtype)[::3])
    top = 1 << bits
    for sign, name in ((1, "add"), (-1, "sub")):
        text = f"{name}.cc.u{bits} %d, %a, %b; {name}c.u{bits} %e, %b, %c;"
        low, high = execute(text, [dtype, dtype], a, b, c)
        wide = [int(x) + int(y) * top + sign * (int(y) + int(z) * top) for x, y, z in zip(a, b, c, strict=True)]
        same(low, wrapped(wide, dtype))
        same(high, wrapped([x >> bits for x in wide], dtype))


def test_multiply_add_with_carry_gives_the_wide_product() -> None:
    a, b, c = grid(integers("u4"), integers("u4")[::2], integers("u4")[::3])
    low, high = execute("mad.lo.cc.u32 %d, %a, %b, %c; madc.hi.u32 %e, %a, %b, 0;", ["u4", "u4"], a, b, c)
    wide = [int(x) * int(y) + int(z) for x, y, z in zip(a, b, c, strict=True)]
    same(low, wrapped(wide, "u4"))
    same(high, wrapped([x >> 32 for x in wide], "u4"))


MODES = {"f4e": lambda s: [s, s + 1, s + 2, s + 3], "b4e": lambda s: [s, (s - 1) % 8, (s - 2) % 8, (s - 3) % 8]}
MODES |= {"rc8": lambda s: [s] * 4, "rc16": lambda s: [s % 2 * 2, s % 2 * 2 + 1] * 2}
MODES |= {"ecl": lambda s: [max(i, s) for i in range(4)], "ecr": lambda s: [min(i, s) for i in range(4)]}


@pytest.mark.parametrize("mode", MODES)
def test_byte_permutation_modes(mode: str) -> None:
    a, b, c = grid(np.array([0x33221100], "u4"), np.array([0x77665544], "u4"), np.arange(8, dtype="u4"))
    (found,) = execute(f"prmt.b32.{mode} %d, %a, %b, %c;", ["u4"], a, b, c)
    same(found, wrapped([sum(byte * 0x11 << 8 * i for i, byte in enumerate(MODES[mode](int(s) & 3))) for s in c], "u4"))


COMPARE = {"eq": "__eq__", "ne": "__ne__", "lt": "__lt__", "le": "__le__", "gt": "__gt__", "ge": "__ge__"}
COMPARE |= {"lo": "__lt__", "ls": "__le__", "hi": "__gt__", "hs": "__ge__"}


@pytest.mark.parametrize("kind", ["u16", "s16", "u32", "s32", "u64", "s64"])
@pytest.mark.parametrize("name", COMPARE)
def test_integer_comparison(kind: str, name: str) -> None:
    if kind[0] == "s" and name in ("lo", "ls", "hi", "hs"):
        name = "eq"
    dtype = f"{'i' if kind[0] == 's' else 'u'}{int(kind[1:]) // 8}"
    a, b = grid(integers(dtype), integers(dtype))
    (found,) = execute(f"setp.{name}.{kind} %d, %a, %b;", ["b1"], a, b)
    same(found, np.array([getattr(int(x), COMPARE[name])(int(y)) for x, y in zip(a, b, strict=True)]))


@pytest.mark.parametrize(
    ("combine", "oracle"), [("and", np.logical_and), ("or", np.logical_or), ("xor", np.logical_xor)]
)
def test_comparison_combined_with_a_predicate_sets_both_destinations(combine: str, oracle: np.ufunc) -> None:
    a, b, c = grid(integers("u4"), integers("u4"), np.array([False, True]))
    d, e = execute(f"setp.lt.{combine}.u32 %d|%e, %a, %b, %c;", ["b1", "b1"], a, b, c)
    same(d, oracle(a < b, c))
    same(e, oracle(~(a < b), c))
    (negated,) = execute(f"setp.lt.{combine}.u32 %d, %a, %b, !%c;", ["b1"], a, b, c)
    same(negated, oracle(a < b, ~c))


def test_set_gives_all_ones_or_a_float_one() -> None:
    a, b = grid(integers("i4"), integers("i4"))
    same(execute("set.ge.u32.s32 %d, %a, %b;", ["u4"], a, b)[0], np.where(a >= b, 0xFFFFFFFF, 0).astype("u4"))
    same(execute("set.ge.f32.s32 %d, %a, %b;", ["f4"], a, b)[0], (a >= b).astype("f4"))


@pytest.mark.parametrize(("op", "oracle"), [("and", np.logical_and), ("or", np.logical_or), ("xor", np.logical_xor)])
def test_predicate_logic(op: str, oracle: np.ufunc) -> None:
    a, b = grid(np.array([False, True]), np.array([False, True]))
    same(execute(f"{op}.pred %d, %a, %b; not.pred %e, %a;", ["b1", "b1"], a, b)[0], oracle(a, b))


@pytest.mark.parametrize("dtype", ["u2", "u4", "u8", "f4", "f8"])
def test_selection_and_guards_pick_by_the_predicate(dtype: str) -> None:
    a, b, c = grid(np.arange(5).astype(dtype), np.arange(5, 9).astype(dtype), np.array([False, True]))
    kind = {"u2": "b16", "u4": "b32", "u8": "b64", "f4": "f32", "f8": "f64"}[dtype]
    expected = np.where(c, a, b)
    same(execute(f"selp.{kind} %d, %a, %b, %c;", [dtype], a, b, c)[0], expected)
    same(execute(f"mov.{kind} %d, %b; @%c mov.{kind} %d, %a;", [dtype], a, b, c)[0], expected)
    same(execute(f"mov.{kind} %d, %a; @!%c mov.{kind} %d, %b;", [dtype], a, b, c)[0], expected)


def test_vectors_pack_and_unpack_from_the_low_end() -> None:
    a, b = grid(integers("u4"), integers("u4"))
    same(execute("mov.b64 %d, {%a, %b};", ["u8"], a, b)[0], b.astype("u8") << np.uint64(32) | a)
    d, e = execute(".reg .b64 %w; mov.b64 %w, {%b, %a}; mov.b64 {%d, %e}, %w;", ["u4", "u4"], a, b)
    same(d, b)
    same(e, a)
    low, high = execute("mov.b32 {%d, %e}, %a;", ["u2", "u2"], a)
    same(low, a.astype("u2"))
    same(high, (a >> np.uint32(16)).astype("u2"))


def test_constants_are_wrapped_to_the_type() -> None:
    a = integers("u4")
    same(execute("add.s32 %d, %a, -1;", ["u4"], a)[0], a - np.uint32(1))
    same(execute("and.b32 %d, %a, -2147483648;", ["u4"], a)[0], a & np.uint32(0x80000000))
    same(execute("mov.u32 %d, 0xFFFFFFFF;", ["u4"], a)[0], np.full_like(a, 0xFFFFFFFF))
    same(execute("add.u32 %d, 5, 6;", ["u4"], a)[0], np.full_like(a, 11))

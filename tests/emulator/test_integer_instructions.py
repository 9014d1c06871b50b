"""Integer, logic, shift, comparison and selection instructions, a row each, against Python's integers."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from emulator.harness import Array, execute, grid, integers, same, signed

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


def dot(a: list[int], b: list[int]) -> int:
    return sum(x * y for x, y in zip(a, b, strict=True))


def top_bit(a: int) -> int:
    if a < 0:
        a = ~a
    return a.bit_length() - 1 if a else 0xFFFFFFFF


def shift_to_top(a: int, bits: int) -> int:
    found = top_bit(a)
    return found if found == 0xFFFFFFFF else bits - 1 - found


KINDS = ("u16", "s16", "u32", "s32", "u64", "s64")
BITS = ("b16", "b32", "b64")


def size_of(kind: str) -> int:
    """Bits of a type."""
    return int(kind[1:])


def dtype_of(kind: str, wider: int = 1) -> str:
    """NumPy's name of a type, or of one that is wider."""
    return f"{'i' if kind[0] == 's' else 'u'}{size_of(kind) * wider // 8}"


def two_operands() -> Iterator[tuple[str, str, str, Oracle]]:
    for kind in KINDS:
        bits, dtype = size_of(kind), dtype_of(kind)
        yield f"add.{kind}", dtype, dtype, operator.add
        yield f"sub.{kind}", dtype, dtype, operator.sub
        yield f"mul.lo.{kind}", dtype, dtype, operator.mul
        yield f"mul.hi.{kind}", dtype, dtype, lambda a, b, bits=bits: a * b >> bits
        if bits < 64:
            yield f"mul.wide.{kind}", dtype, dtype_of(kind, 2), operator.mul
        yield f"min.{kind}", dtype, dtype, min
        yield f"max.{kind}", dtype, dtype, max
    for kind in BITS:
        dtype = dtype_of(kind)
        yield f"and.{kind}", dtype, dtype, operator.and_
        yield f"or.{kind}", dtype, dtype, operator.or_
        yield f"xor.{kind}", dtype, dtype, operator.xor
    yield "add.sat.s32", "i4", "i4", lambda a, b: clamp(a + b, 32, True)
    yield "sub.sat.s32", "i4", "i4", lambda a, b: clamp(a - b, 32, True)
    yield "max.relu.s32", "i4", "i4", lambda a, b: max(a, b, 0)
    for part, shift in (("lo", 0), ("hi", 16)):
        yield f"mul24.{part}.u32", "u4", "u4", lambda a, b, s=shift: (a & 0xFFFFFF) * (b & 0xFFFFFF) >> s
        yield f"mul24.{part}.s32", "i4", "i4", lambda a, b, s=shift: signed(a, 24) * signed(b, 24) >> s


def wrapped(values: list[int], dtype: str) -> np.ndarray:
    bits = 8 * int(dtype[1])
    return np.array([x & (1 << bits) - 1 for x in values], f"u{dtype[1]}").view(dtype)


@pytest.mark.parametrize(
    ("opcode", "source", "target", "oracle"), list(two_operands()), ids=lambda x: x if isinstance(x, str) else ""
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


def one_operand() -> Iterator[tuple[str, str, str, Oracle]]:
    for kind in ("s16", "s32", "s64"):
        yield f"abs.{kind}", dtype_of(kind), dtype_of(kind), abs
        yield f"neg.{kind}", dtype_of(kind), dtype_of(kind), operator.neg
    for kind in BITS:
        yield f"not.{kind}", dtype_of(kind), dtype_of(kind), operator.invert
        yield f"cnot.{kind}", dtype_of(kind), dtype_of(kind), lambda a: int(a == 0)
    for kind in BITS[1:]:
        bits, dtype = size_of(kind), dtype_of(kind)
        yield f"popc.{kind}", dtype, "u4", int.bit_count
        yield f"clz.{kind}", dtype, "u4", lambda a, bits=bits: bits - a.bit_length()
        yield f"brev.{kind}", dtype, dtype, lambda a, bits=bits: int(f"{a:0{bits}b}"[::-1], 2)
    for kind in KINDS[2:]:
        bits, dtype = size_of(kind), dtype_of(kind)
        yield f"bfind.{kind}", dtype, "u4", top_bit
        yield f"bfind.shiftamt.{kind}", dtype, "u4", lambda a, bits=bits: shift_to_top(a, bits)
    for kind in (*BITS, *KINDS):
        yield f"mov.{kind}", dtype_of(kind), dtype_of(kind), lambda a: a


@pytest.mark.parametrize(
    ("opcode", "source", "target", "oracle"), list(one_operand()), ids=lambda x: x if isinstance(x, str) else ""
)
def test_one_operand_instruction_matches_exact_integers(opcode: str, source: str, target: str, oracle: Oracle) -> None:
    a = integers(source)
    (found,) = execute(f"{opcode} %d, %a;", [target], a)
    same(found, wrapped([oracle(int(x)) for x in a], target))


def three_operands() -> Iterator[tuple[str, list[str], str, Oracle]]:
    for kind in KINDS:
        bits, dtype = size_of(kind), dtype_of(kind)
        yield f"mad.lo.{kind}", [dtype] * 3, dtype, lambda a, b, c: a * b + c
        yield f"mad.hi.{kind}", [dtype] * 3, dtype, lambda a, b, c, bits=bits: (a * b >> bits) + c
        if bits < 64:
            wide = dtype_of(kind, 2)
            yield f"mad.wide.{kind}", [dtype, dtype, wide], wide, lambda a, b, c: a * b + c
        unsigned = dtype_of(f"u{bits}")
        yield f"sad.{kind}", [dtype, dtype, unsigned], unsigned, lambda a, b, c: c + abs(a - b)
    yield "mad.hi.sat.s32", ["i4"] * 3, "i4", lambda a, b, c: clamp((a * b >> 32) + c, 32, True)
    for part, shift in (("lo", 0), ("hi", 16)):
        yield (
            *(f"mad24.{part}.u32", ["u4"] * 3, "u4"),
            lambda a, b, c, s=shift: ((a & 0xFFFFFF) * (b & 0xFFFFFF) >> s) + c,
        )
        yield f"mad24.{part}.s32", ["i4"] * 3, "i4", lambda a, b, c, s=shift: (signed(a, 24) * signed(b, 24) >> s) + c
    for kind in KINDS[2:]:
        bits, dtype, is_signed = size_of(kind), dtype_of(kind), kind[0] == "s"
        yield (
            *(f"bfe.{kind}", [dtype, "u4", "u4"], dtype),
            lambda a, b, c, bits=bits, is_signed=is_signed: field(a, b, c, bits, is_signed),
        )
    yield "prmt.b32", ["u4"] * 3, "u4", nibbles
    for limit, amount in (("wrap", lambda c: c & 31), ("clamp", lambda c: min(c, 32))):
        yield f"shf.l.{limit}.b32", ["u4"] * 3, "u4", lambda a, b, c, n=amount: (b << 32 | a) << n(c) >> 32
        yield f"shf.r.{limit}.b32", ["u4"] * 3, "u4", lambda a, b, c, n=amount: (b << 32 | a) >> n(c)
    for x in ("u32", "s32"):
        for y in ("u32", "s32"):
            signs = x[0] == "s", y[0] == "s"
            yield (
                f"dp4a.{x}.{y}",
                ["u4"] * 3,
                "u4",
                lambda a, b, c, s=signs: c + dot(bytes_of(a, s[0]), bytes_of(b, s[1])),
            )
            for part, place in (("lo", slice(0, 2)), ("hi", slice(2, 4))):
                yield (
                    *(f"dp2a.{part}.{x}.{y}", ["u4"] * 3, "u4"),
                    lambda a, b, c, s=signs, place=place: c + dot(bytes_of(a, s[0], 2), bytes_of(b, s[1])[place]),
                )
    for kind in (*BITS, *KINDS):
        yield f"slct.{kind}.s32", [dtype_of(kind)] * 2 + ["i4"], dtype_of(kind), lambda a, b, c: a if c >= 0 else b


@pytest.mark.parametrize(
    ("opcode", "sources", "target", "oracle"), list(three_operands()), ids=lambda x: x if isinstance(x, str) else ""
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
    (plain,) = execute(f"szext.{mode}.u32 %d, %a, %b;", ["u4"], a, b)
    same(plain, wrapped([x & (1 << amount(y)) - 1 for x, y in pairs], "u4"))
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
    for combine, oracle in (("and", np.logical_and), ("or", np.logical_or)):
        q = np.arange(64) % 2 == 0
        text = f"lop3.{combine}.b32 %d|%p, %a, %b, %c, {table}, %f; selp.u32 %e, 1, 0, %p;"
        found, holds = execute(f".reg .pred %p; {text}", ["u4", "u4"], a, b, c, q)
        same(found, expected)
        same(holds, oracle(expected != 0, q).astype("u4"))


@pytest.mark.parametrize("kind", KINDS[2:])
def test_carries_chain_to_wide_sums_and_differences(kind: str) -> None:
    """Numbers of three words: (a, b, c) and (b, c, a), the first the lowest."""
    bits, dtype = size_of(kind), f"u{size_of(kind) // 8}"
    a, b, c = grid(integers(dtype), integers(dtype)[::3], integers(dtype)[::3])
    for sign, name in ((1, "add"), (-1, "sub")):
        text = f"{name}.cc.{kind} %f, %a, %b; {name}c.cc.{kind} %d, %b, %c; {name}c.{kind} %e, %c, %a;"
        middle, high = execute(f".reg .b{bits} %f; {text}", [dtype, dtype], a, b, c)
        wide = [
            join([x, y, z], bits) + sign * join([y, z, x], bits)
            for x, y, z in zip(a.tolist(), b.tolist(), c.tolist(), strict=True)
        ]
        same(middle, wrapped([x >> bits for x in wide], dtype))
        same(high, wrapped([x >> 2 * bits for x in wide], dtype))
        (low,) = execute(f"{name}.cc.{kind} %d, %a, %b;", [dtype], a, b)
        same(low, wrapped(wide, dtype))


def join(words: list[int], bits: int) -> int:
    return sum(word << bits * i for i, word in enumerate(words))


@pytest.mark.parametrize("kind", KINDS[2:])
def test_multiply_add_with_carry_gives_the_wide_product(kind: str) -> None:
    """The middle word of (b, a) * b + (c, c), and the highest."""
    bits, dtype = size_of(kind), dtype_of(kind)
    a, b, c = grid(integers(dtype), integers(dtype)[::2], integers(dtype)[::3])
    top = 1 << bits
    triples = list(zip(a.tolist(), b.tolist(), c.tolist(), strict=True))
    text = f"mad.lo.cc.{kind} %d, %a, %b, %c; madc.hi.{kind} %e, %a, %b, 0;"
    low, high = execute(text, [dtype, dtype], a, b, c)
    same(low, wrapped([x * y + z for x, y, z in triples], dtype))
    same(high, wrapped([(x * y >> bits) + ((x * y % top + z % top) >> bits) for x, y, z in triples], dtype))
    text = f"mad.hi.cc.{kind} %f, %a, %b, %c; madc.lo.cc.{kind} %d, %a, %b, %c; madc.hi.cc.{kind} %e, %b, %c, %a;"
    text += f" addc.{kind} %e, 0, 0;"
    middle, carry = execute(f".reg .b{bits} %f; {text}", [dtype, dtype], a, b, c)
    wanted = []
    for x, y, z in triples:
        first = (x * y >> bits) % top + z % top >> bits
        second = x * y % top + z % top + first
        third = (y * z >> bits) % top + x % top + (second >> bits)
        wanted.append((second, third >> bits))
    same(middle, wrapped([x for x, _ in wanted], dtype))
    same(carry, wrapped([x for _, x in wanted], dtype))
    (plain,) = execute(f"add.cc.{kind} %d, %a, %b; madc.lo.{kind} %d, %a, %b, %c;", [dtype], a, b, c)
    same(plain, wrapped([x * y + z + (x % top + y % top >> bits) for x, y, z in triples], dtype))


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


SET = [("u32", "u4", 2**32 - 1), ("s32", "i4", -1), ("f32", "f4", 1), ("f16", "u2", 0x3C00), ("bf16", "u2", 0x3F80)]
COMBINE = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


def check_set(modifiers: str, operands: str, holds: Array, *inputs: Array) -> None:
    """`set` gives all ones, or a one in a floating-point type."""
    for target, dtype, one in SET:
        (found,) = execute(f"set.{modifiers.format(target)} {operands};", [dtype], *inputs)
        same(found, np.where(holds, one, 0).astype(dtype))


def comparisons(kind: str) -> list[str]:
    if kind[0] == "b":
        return ["eq", "ne"]
    return list(COMPARE) if kind[0] == "u" else list(COMPARE)[:6]


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind in (*BITS, *KINDS) for name in comparisons(kind)])
def test_integer_comparison(kind: str, name: str) -> None:
    dtype = dtype_of(kind)
    a, b = grid(integers(dtype), integers(dtype))
    holds = np.array([getattr(int(x), COMPARE[name])(int(y)) for x, y in zip(a, b, strict=True)])
    (found,) = execute(f"setp.{name}.{kind} %d, %a, %b;", ["b1"], a, b)
    same(found, holds)
    check_set(f"{name}.{{}}.{kind}", "%d, %a, %b", holds, a, b)


@pytest.mark.parametrize("kind", [*BITS, *KINDS])
@pytest.mark.parametrize("combine", COMBINE)
def test_comparison_combined_with_a_predicate_sets_both_destinations(combine: str, kind: str) -> None:
    dtype, oracle = dtype_of(kind), COMBINE[combine]
    a, b, c = grid(integers(dtype)[::2], integers(dtype)[::2], np.array([False, True]))
    d, e = execute(f"setp.ne.{combine}.{kind} %d|%e, %a, %b, %c;", ["b1", "b1"], a, b, c)
    same(d, oracle(a != b, c))
    same(e, oracle(a == b, c))
    (negated,) = execute(f"setp.eq.{combine}.{kind} %d, %a, %b, !%c;", ["b1"], a, b, c)
    same(negated, oracle(a == b, ~c))
    check_set(f"eq.{combine}.{{}}.{kind}", "%d, %a, %b, %c", oracle(a == b, c), a, b, c)


@pytest.mark.parametrize(("op", "oracle"), [("and", np.logical_and), ("or", np.logical_or), ("xor", np.logical_xor)])
def test_predicate_logic(op: str, oracle: np.ufunc) -> None:
    a, b = grid(np.array([False, True]), np.array([False, True]))
    both, inverse = execute(f"{op}.pred %d, %a, %b; not.pred %e, %a;", ["b1", "b1"], a, b)
    same(both, oracle(a, b))
    same(inverse, ~a)
    same(execute("mov.pred %d, %a;", ["b1"], a)[0], a)


@pytest.mark.parametrize("kind", [*BITS, *KINDS, "f32", "f64"])
def test_selection_and_guards_pick_by_the_predicate(kind: str) -> None:
    dtype = f"f{size_of(kind) // 8}" if kind[0] == "f" else dtype_of(kind)
    a, b, c = grid(np.arange(5).astype(dtype), np.arange(5, 9).astype(dtype), np.array([False, True]))
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


def test_every_integer_instruction_and_modifier_has_a_row(whole_file: Any) -> None:
    assert whole_file.missing("integer", "data", floats=False) == []

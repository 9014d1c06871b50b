"""Random straight-line programs of integer and float instructions give what NumPy gives, bit by bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from emulator.harness import Array, entry, floats, integers, same
from hypothesis import given, settings
from hypothesis import strategies as st

from numbaflash import emulator

N = 4
"""Registers of a program; every instruction overwrites one."""
LANES = 64
MASK = np.uint32(31)

INTEGER: list[tuple[str, int, Callable[..., Array]]] = [
    ("add.u32", 2, lambda a, b: a + b),
    ("sub.s32", 2, lambda a, b: a - b),
    ("mul.lo.u32", 2, lambda a, b: a * b),
    ("mul.hi.u32", 2, lambda a, b: (a.astype("u8") * b >> np.uint64(32)).astype("u4")),
    ("mad.lo.s32", 3, lambda a, b, c: a * b + c),
    ("and.b32", 2, lambda a, b: a & b),
    ("or.b32", 2, lambda a, b: a | b),
    ("xor.b32", 2, lambda a, b: a ^ b),
    ("not.b32", 1, lambda a: ~a),
    ("min.s32", 2, lambda a, b: np.minimum(a.view("i4"), b.view("i4")).view("u4")),
    ("max.u32", 2, lambda a, b: np.maximum(a, b)),
    ("popc.b32", 1, lambda a: np.bitwise_count(a).astype("u4")),
    ("shf.l.wrap.b32", 3, lambda a, b, c: np.where(c & MASK, b << (c & MASK) | a >> (-c & MASK), b)),
    ("neg.s32", 1, lambda a: -a),
]

FLOAT: list[tuple[str, int, Callable[..., Array]]] = [
    ("add.f32", 2, lambda a, b: a + b),
    ("sub.rn.f32", 2, lambda a, b: a - b),
    ("mul.f32", 2, lambda a, b: a * b),
    ("div.rn.f32", 2, lambda a, b: a / b),
    ("sqrt.rn.f32", 1, np.sqrt),
    ("abs.f32", 1, np.abs),
    ("neg.f32", 1, lambda a: -a),
    ("cvt.rni.f32.f32", 1, np.rint),
]


def programs(table: list[Any]) -> st.SearchStrategy[list[tuple[int, int, list[int], bool, bool]]]:
    """Instructions as (row, destination, sources, guarded, negated)."""
    register = st.integers(0, N - 1)
    step = st.tuples(
        st.integers(0, len(table) - 1),
        register,
        st.lists(register, min_size=3, max_size=3),
        st.booleans(),
        st.booleans(),
    )
    return st.lists(step, min_size=1, max_size=25)


def check(table: list[Any], program: Any, values: list[Array], kind: str) -> None:
    guard = np.arange(LANES) % 3 == 0
    lines, registers = [], list(values)
    with np.errstate(all="ignore"):
        for row, target, sources, guarded, negated in program:
            opcode, count, oracle = table[row]
            used = sources[:count]
            prefix = ("@!%p " if negated else "@%p ") if guarded else ""
            lines.append(f"{prefix}{opcode} %v{target}, {', '.join(f'%v{x}' for x in used)};")
            result = oracle(*(registers[x] for x in used))
            registers[target] = np.where(guard != negated, result, registers[target]) if guarded else result
    size = LANES * 4
    load = "".join(f"ld.global.b32 %v{i}, [%y+{size * i}];" for i in range(N))
    store = "".join(f"st.global.b32 [%y+{size * i}], %v{i};" for i in range(N))
    text = entry(
        "mov.u32 %t, %tid.x; ld.param.u64 %x, [p0]; mad.wide.u32 %y, %t, 4, %x;"
        f"rem.u32 %u, %t, 3; setp.eq.u32 %p, %u, 0; {load}\n" + "\n".join(lines) + "\n" + store,
        1,
        f".reg .b32 %t, %u; .reg .b64 %x, %y; .reg .pred %p; .reg .{kind} %v<{N}>;",
    )
    memory = np.concatenate(values)
    emulator.launch(text, 1, LANES, memory)
    same(memory, np.concatenate(registers))


@settings(max_examples=150)
@given(programs(INTEGER), st.integers(0, 2**32 - 1))
def test_integer_programs(program: Any, seed: int) -> None:
    rng = np.random.default_rng(seed)
    values = [
        np.where(rng.random(LANES) < 0.3, rng.choice(integers("u4"), LANES), rng.integers(0, 2**32, LANES, dtype="u4"))
        for _ in range(N)
    ]
    check(INTEGER, program, values, "b32")


@settings(max_examples=150)
@given(programs(FLOAT), st.integers(0, 2**32 - 1))
def test_float_programs(program: Any, seed: int) -> None:
    rng = np.random.default_rng(seed)
    values = [
        np.where(rng.random(LANES) < 0.3, rng.choice(floats("f4"), LANES), rng.standard_normal(LANES).astype("f4"))
        for _ in range(N)
    ]
    check(FLOAT, program, values, "f32")

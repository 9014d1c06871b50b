"""Matrix instructions (PTX ISA, "Warp Level Matrix Multiply-Accumulate Instructions")."""

from __future__ import annotations

from ..ir import Operand, Vector
from .emit import Emit, here, op


@op("ldmatrix")
def load_matrix(e: Emit) -> None:
    """ldmatrix: m8n8, x1, x2, x4, .trans, b16."""
    e.needs(75)
    e.type("b16")
    _matrix_modifiers(e)
    count, transposed = int(e.one_of("x1", "x2", "x4")[1:]), e.flag("trans")
    e.finish(2)
    targets = _registers(e, e.operands[0], count)
    _, address = e.address(e.operands[1], "shared")
    e.effect("lsu", "warp")
    site = e.site("ldmatrix", "shared", 16)
    name = e.temporary()
    e.line(f"{name} = m.load_matrix(g, {site}, {address}, {count}, {transposed})")
    for position, target in enumerate(targets):
        e.result(target, f"{name}[{position}]", "b32")


@op("stmatrix")
def store_matrix(e: Emit) -> None:
    """stmatrix: m8n8, x1, x2, x4, .trans, b16."""
    e.needs(90)
    e.type("b16")
    _matrix_modifiers(e)
    count, transposed = int(e.one_of("x1", "x2", "x4")[1:]), e.flag("trans")
    e.finish(2)
    sources = [e.source(x, "b32") for x in _registers(e, e.operands[1], count)]
    _, address = e.address(e.operands[0], "shared")
    e.effect("lsu", "warp")
    site = e.site("stmatrix", "shared", 16)
    e.line(f"m.store_matrix(g, {site}, {address}, [{', '.join(sources)}], {transposed})")


def _matrix_modifiers(e: Emit) -> None:
    e.one_of("sync")
    e.one_of("aligned")
    e.one_of("m8n8")
    e.one_of("shared", "shared::cta")


def _registers(e: Emit, operand: Operand, count: int) -> tuple[Operand, ...]:
    if not isinstance(operand, Vector) or len(operand.items) != count:
        e.bad_operand(operand)
    return operand.items


# Registers of A and B per lane, by input type and shape: 32 bits each.
_SHAPES = {
    "f16": {"m16n8k8": (2, 1), "m16n8k16": (4, 2)},
    "bf16": {"m16n8k8": (2, 1), "m16n8k16": (4, 2)},
    "tf32": {"m16n8k4": (2, 1), "m16n8k8": (4, 2)},
    "s8": {"m16n8k16": (2, 1), "m16n8k32": (4, 2)},
    "u8": {"m16n8k16": (2, 1), "m16n8k32": (4, 2)},
}
_INPUTS = {"f16": ("f16",), "f32": ("f16", "bf16", "tf32"), "s32": ("s8", "u8")}
"""Input types by the type of the accumulator."""


@op("mma")
def multiply_accumulate(e: Emit) -> None:
    """mma.sync: f16, bf16, tf32 and 8-bit integer inputs."""
    e.needs(80)
    accumulator = e.type(*_INPUTS)
    right = e.type(*_INPUTS[accumulator])
    left = e.type(*(_INPUTS["s32"] if accumulator == "s32" else (right,)))
    out = e.type(accumulator)
    e.one_of("sync")
    e.one_of("aligned")
    shape = e.one_of(*_SHAPES[left])
    e.one_of("row")
    e.one_of("col")
    saturated = out == "s32" and e.flag("satfinite")
    e.finish(4)
    count_a, count_b = _SHAPES[left][shape]
    count_c = 2 if out == "f16" else 4
    kind = {"f32": "f32", "s32": "s32", "f16": "b32"}[out]
    targets = _registers(e, e.operands[0], count_c)
    a = [e.source(x, "b32") for x in _registers(e, e.operands[1], count_a)]
    b = [e.source(x, "b32") for x in _registers(e, e.operands[2], count_b)]
    c = [e.source(x, kind) for x in _registers(e, e.operands[3], count_c)]
    e.effect("tensor", "warp")
    name = e.temporary()
    types = left if out != "s32" else f"{left}.{right}"
    extra = f", {saturated}" if out == "s32" else ""
    e.line(
        f"{name} = m.mma_{out}(g, {here(e)}, {types!r}, ({', '.join(a)},), ({', '.join(b)},), ({', '.join(c)},){extra})"
    )
    for position, target in enumerate(targets):
        e.result(target, f"{name}[{position}]", kind)

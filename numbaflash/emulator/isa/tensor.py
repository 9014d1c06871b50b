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
    if e.one_of("shared", "shared::cta", default="generic") == "generic":
        e.unsupported("leaving out .shared")


def _registers(e: Emit, operand: Operand, count: int) -> tuple[Operand, ...]:
    if not isinstance(operand, Vector) or len(operand.items) != count:
        e.bad_operand(operand)
    return operand.items


# Registers of A, B and C (or D) per lane, by shape and input type: 32 bits each.
_SHAPES = {
    ("m16n8k8", "f16"): (2, 1),
    ("m16n8k16", "f16"): (4, 2),
    ("m16n8k8", "bf16"): (2, 1),
    ("m16n8k16", "bf16"): (4, 2),
    ("m16n8k4", "tf32"): (2, 1),
    ("m16n8k8", "tf32"): (4, 2),
    ("m16n8k16", "s8"): (2, 1),
    ("m16n8k32", "s8"): (4, 2),
}


@op("mma")
def multiply_accumulate(e: Emit) -> None:
    """mma.sync: f16, bf16, tf32 and 8-bit integer inputs."""
    e.needs(80)
    e.one_of("sync")
    e.one_of("aligned")
    shape = e.one_of("m16n8k4", "m16n8k8", "m16n8k16", "m16n8k32")
    e.one_of("row")
    e.one_of("col")
    saturated = e.flag("satfinite")
    if len(e.mods) != 4:
        e.unsupported(f"{len(e.mods)} types")
    out, left, right, accumulator = e.mods
    e.mods.clear()
    family = "s8" if left in ("s8", "u8") and right in ("s8", "u8") else left
    if (shape, family) not in _SHAPES or (family != "s8" and left != right):
        e.unsupported(f"{shape} with .{left}.{right}")
    wanted = ("s32",) if family == "s8" else ("f32", "f16") if family == "f16" else ("f32",)
    if out not in wanted or out != accumulator or (saturated and family != "s8"):
        e.unsupported(f"accumulator .{out} with .{accumulator}")
    e.finish(4)
    count_a, count_b = _SHAPES[shape, family]
    count_c = 2 if out == "f16" else 4
    kind = {"f32": "f32", "s32": "s32", "f16": "b32"}[out]
    targets = _registers(e, e.operands[0], count_c)
    a = [e.source(x, "b32") for x in _registers(e, e.operands[1], count_a)]
    b = [e.source(x, "b32") for x in _registers(e, e.operands[2], count_b)]
    c = [e.source(x, kind) for x in _registers(e, e.operands[3], count_c)]
    e.effect("tensor", "warp")
    name = e.temporary()
    types = left if family != "s8" else f"{left}.{right}"
    extra = f", {saturated}" if family == "s8" else ""
    e.line(
        f"{name} = m.mma_{out}(g, {here(e)}, {types!r}, ({', '.join(a)},), ({', '.join(b)},), ({', '.join(c)},){extra})"
    )
    for position, target in enumerate(targets):
        e.result(target, f"{name}[{position}]", kind)

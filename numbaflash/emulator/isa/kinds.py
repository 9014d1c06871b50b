"""PTX's types ("kinds" here, as `type` is Python's), and the NumPy types that registers of them are computed in."""

from __future__ import annotations

from ..ir import SIZES

INT = ("u16", "u32", "u64", "s16", "s32", "s64")
HALF = ("f16", "f16x2", "bf16", "bf16x2")
FLOAT = (*HALF, "f32", "f64")


def storage(kind: str) -> str:
    """The NumPy type in which a register of a PTX type is kept: but for these, unsigned integers of its size."""
    return {"pred": "b1", "f32": "f4", "f64": "f8"}.get(kind) or f"u{SIZES[kind]}"


def numpy_type(kind: str) -> str:
    """The NumPy type in which an instruction of a PTX type computes; 16-bit floats are handled as bits."""
    return f"i{SIZES[kind]}" if kind[0] == "s" else storage(kind)


def bits(kind: str) -> str:
    """The unsigned type of the same width: wrap-around arithmetic is the same there."""
    return f"u{SIZES[kind] * 8}"

"""Runs one PTX instruction over arrays, and the exact oracle for what it must give: Python integers and fractions."""

from __future__ import annotations

import inspect
import math
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from numbaflash import emulator

Array = NDArray[Any]
_BLOCK = 128
_REGISTER = {"u1": "b16", "u2": "b16", "u4": "b32", "i4": "b32", "u8": "b64", "i8": "b64", "f4": "f32", "f8": "f64"}
_REGISTER.update({"i1": "b16", "i2": "b16", "b1": "pred"})
_LOAD = {"u1": "u8", "i1": "s8", "b1": "u8"}


def source_line(kernel: Any, text: str, occurrence: int = 0) -> str:
    """``file:line`` of the n-th line of a kernel's Python source that contains a text."""
    function = getattr(kernel, "py_func", kernel)
    lines, first = inspect.getsourcelines(function)
    found = [first + i for i, line in enumerate(lines) if text in line][occurrence]
    return f"{inspect.getsourcefile(function)}:{found}"


def kind(array: Array) -> str:
    return array.dtype.str[1:]


def entry(body: str, params: int, registers: str = "", target: str = "sm_80", before: str = "") -> str:
    """A kernel `k` of 64-bit parameters p0, p1, ... around instructions."""
    names = ",\n".join(f"    .param .u64 p{i}" for i in range(params))
    return f""".version 8.0
.target {target}
.address_size 64
{before}
.visible .entry k(
{names}
)
{{
{registers}
{body}
    ret;
}}
"""


def instruction_kernel(instruction: str, outputs: list[str], inputs: list[str], target: str = "sm_80") -> str:
    """A kernel that loads %a, %b, ... of its thread, executes the text, and stores %d, %e, ..."""
    registers = ["    .reg .pred %in;", "    .reg .b32 %i, %n, %t, %u;", "    .reg .b64 %x, %y;"]
    body = [
        "    mov.u32 %i, %ctaid.x;",
        "    mov.u32 %n, %ntid.x;",
        "    mov.u32 %t, %tid.x;",
        "    mad.lo.u32 %i, %i, %n, %t;",
        f"    ld.param.u64 %x, [p{len(outputs) + len(inputs)}];",
        "    cvt.u32.u64 %u, %x;",
        "    setp.ge.u32 %in, %i, %u;",
        "    @%in bra done;",
    ]
    for position, dtype in enumerate(inputs):
        name = "abcfgh"[position]
        size = int(dtype[1])
        body += [f"    ld.param.u64 %x, [p{len(outputs) + position}];", f"    mad.wide.u32 %y, %i, {size}, %x;"]
        registers.append(f"    .reg .{_REGISTER[dtype]} %{name};")
        if dtype == "b1":
            registers.append(f"    .reg .b16 %{name}byte;")
            body += [f"    ld.global.u8 %{name}byte, [%y];", f"    setp.ne.u16 %{name}, %{name}byte, 0;"]
        else:
            body.append(f"    ld.global.{_LOAD.get(dtype, _REGISTER[dtype])} %{name}, [%y];")
    body.append(instruction)
    for position, dtype in enumerate(outputs):
        name = "de"[position]
        size = int(dtype[1])
        registers.append(f"    .reg .{_REGISTER[dtype]} %{name};")
        body += [f"    ld.param.u64 %x, [p{position}];", f"    mad.wide.u32 %y, %i, {size}, %x;"]
        if dtype == "b1":
            registers.append(f"    .reg .b16 %{name}byte;")
            body += [f"    selp.u16 %{name}byte, 1, 0, %{name};", f"    st.global.u8 [%y], %{name}byte;"]
        else:
            body.append(f"    st.global.{_LOAD.get(dtype, _REGISTER[dtype])} [%y], %{name};")
    body.append("done:")
    return entry("\n".join(body), len(outputs) + len(inputs) + 1, "\n".join(registers), target)


def execute(instruction: str, outputs: list[str], *inputs: Array, target: str = "sm_80") -> list[Array]:
    """Runs an instruction once per element of its inputs."""
    ptx = instruction_kernel(instruction, outputs, [kind(x) for x in inputs], target)
    count = inputs[0].size
    found = [np.zeros(count, dtype) for dtype in outputs]
    emulator.launch(ptx, -(-count // _BLOCK), _BLOCK, *found, *inputs, count)
    return found


def grid(*lists: Any) -> list[Array]:
    """All combinations of the elements of arrays."""
    axes = np.meshgrid(*lists, indexing="ij")
    return [np.ascontiguousarray(x.reshape(-1)) for x in axes]


# ---- integers

EDGES = [0, 1, 2, 3, 5, 15, 16, 31, 32, 33, 63, 64, 65, 255, 256, 1000, 0x7FFF, 0x8000, 0xFFFF, 0x12345678]


def integers(dtype: str) -> Array:
    """Edge values of an integer type."""
    bits = 8 * int(dtype[1])
    top = 1 << bits
    values = [*EDGES, top // 2 - 1, top // 2, top // 2 + 1, top - 1, top - 2, top // 3, 0xDEADBEEFCAFEF00D]
    return np.array(sorted({x % top for x in values}), f"u{dtype[1]}").view(dtype)


def signed(value: int, bits: int) -> int:
    """The two's complement reading of the low bits."""
    value &= (1 << bits) - 1
    return value - (1 << bits) if value >> (bits - 1) else value


# ---- floats

FORMATS = {"f16": (11, 5), "bf16": (8, 8), "tf32": (11, 8), "f32": (24, 8), "f64": (53, 11)}
"""Significand bits (the hidden one included) and exponent bits."""


def rounded(value: Fraction, format_name: str, mode: str) -> float:
    """The value of a format that a rounding mode picks for an exact number."""
    precision, exponent_bits = FORMATS[format_name]
    bias = (1 << (exponent_bits - 1)) - 1
    if value == 0:
        return 0.0
    magnitude = abs(value)
    exponent = magnitude.numerator.bit_length() - magnitude.denominator.bit_length()
    if Fraction(2) ** exponent > magnitude:
        exponent -= 1
    exponent = max(exponent, 1 - bias)
    unit = Fraction(2) ** (exponent - precision + 1)
    low = math.floor(value / unit)
    rest = value / unit - low
    half = Fraction(1, 2)
    up = {
        "rn": rest > half or (rest == half and low % 2 == 1),
        "rna": rest > half or (rest == half and low >= 0),
        "rz": value < 0 and rest > 0,
        "rm": False,
        "rp": rest > 0,
    }[mode]
    result = (low + up) * unit
    largest = (2 - Fraction(2) ** (1 - precision)) * Fraction(2) ** bias
    if abs(result) > largest:
        finite = {"rn": False, "rna": False, "rz": True, "rm": value > 0, "rp": value < 0}[mode]
        return (1 if value > 0 else -1) * (float(largest) if finite else math.inf)
    return math.copysign(float(result), 1 if value > 0 else -1)


def floats(dtype: str) -> Array:
    """Edge values of f32 or f64."""
    info = np.finfo(dtype)
    special = [
        0.0,
        1.0,
        1.5,
        2.0,
        3.0,
        0.1,
        1.0 + info.eps,
        1e-3,
        12345.678,
        info.max,
        info.tiny,
        info.smallest_subnormal,
    ]
    special += [
        info.tiny - info.smallest_subnormal,
        float(info.max) / 3,
        1e30,
        1e-30,
        math.inf,
        math.pi,
        65504.0,
        65520.0,
    ]
    return np.array([*special, *(-x for x in special), math.nan], dtype)


def same(found: Array, expected: Array) -> None:
    """Equal bit by bit, all NaNs being one."""
    assert found.shape == expected.shape
    if found.dtype.kind != "f":
        np.testing.assert_array_equal(found, expected)
        return
    word = f"u{found.dtype.itemsize}"
    expected = expected.astype(found.dtype)
    nan = np.isnan(expected)
    np.testing.assert_array_equal(np.isnan(found), nan)
    wrong = (found.view(word) != expected.view(word)) & ~nan
    assert not wrong.any(), (np.flatnonzero(wrong)[:5], found[wrong][:5], expected[wrong][:5])

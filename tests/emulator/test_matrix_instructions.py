"""ldmatrix, stmatrix and mma, against fragments laid out by the ISA's formulas and products by NumPy."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from emulator.harness import Array, entry, same

from numbaflash import emulator

LANES = np.arange(32)
GROUP, THREAD = LANES >> 2, LANES & 3


def matrix_kernel(instruction: str, inputs: int, outputs: int, kind: str = "b32") -> str:
    """Loads `inputs` registers %a0.. of each lane, executes, stores `outputs` registers %d0.. of a type."""
    loads = "".join(f"ld.global.b32 %a{i}, [%x+{4 * i}];" for i in range(inputs))
    stores = "".join(f"st.global.{kind} [%y+{4 * i}], %d{i};" for i in range(outputs))
    registers = (
        f".reg .b32 %a<{max(inputs, 1)}>, %t, %s; .reg .{kind} %d<{max(outputs, 1)}>; .reg .b64 %x, %y, %in, %out;"
    )
    return entry(
        f"mov.u32 %t, %tid.x; ld.param.u64 %in, [p0]; ld.param.u64 %out, [p1];"
        f"mad.wide.u32 %x, %t, {4 * inputs}, %in; mad.wide.u32 %y, %t, {4 * outputs}, %out;"
        f"{loads}\n{instruction}\n{stores}",
        2,
        registers,
        target="sm_90",
    )


@pytest.mark.parametrize("space", ["shared", "shared::cta"])
@pytest.mark.parametrize("transposed", [False, True], ids=["straight", "transposed"])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_ldmatrix_gives_each_lane_its_pair(count: int, transposed: bool, space: str) -> None:
    """Thread i stores 32 bytes of shared memory first; the rows are read in a scrambled order."""
    matrices = np.random.default_rng(count).integers(0, 65536, (4, 8, 8), dtype="u2")
    order = np.random.default_rng(1).permutation(32)
    source = np.zeros((32, 5), "u4")
    source[:, :4] = matrices.reshape(32, 8).view("u4")
    source[:, 4] = order * 16  # lane i gives the address of row i, which lies there
    rows = ", ".join(f"%d{i}" for i in range(count))
    text = matrix_kernel(
        f"mov.u32 %s, tile; add.u32 %a4, %a4, %s; st.shared.v4.b32 [%a4], {{%a0, %a1, %a2, %a3}}; bar.warp.sync -1;"
        f"ldmatrix.sync.aligned.m8n8.x{count}{'.trans' if transposed else ''}.{space}.b16 {{{rows}}}, [%a4];",
        5,
        count,
    ).replace(".reg .b32 %a", ".shared .align 16 .b8 tile[512]; .reg .b32 %a")
    out = np.zeros((32, count), "u4")
    emulator.launch(text, 1, 32, source, out)
    for i in range(count):
        matrix = matrices[i].T if transposed else matrices[i]
        pair = np.stack([matrix[GROUP, 2 * THREAD], matrix[GROUP, 2 * THREAD + 1]], axis=1)
        same(out[:, i], np.ascontiguousarray(pair).view("u4")[:, 0])


@pytest.mark.parametrize("space", ["shared", "shared::cta"])
@pytest.mark.parametrize("transposed", [False, True], ids=["straight", "transposed"])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_stmatrix_is_the_inverse_of_ldmatrix(count: int, transposed: bool, space: str) -> None:
    source = np.random.default_rng(count).integers(0, 2**32, (32, count), dtype="u4")
    registers = ", ".join(f"%a{i}" for i in range(count))
    trans = ".trans" if transposed else ""
    back = ", ".join(f"%d{i}" for i in range(count))
    text = matrix_kernel(
        f"mov.u32 %s, tile; mad.lo.u32 %s, %t, 16, %s;"
        f"stmatrix.sync.aligned.m8n8.x{count}{trans}.{space}.b16 [%s], {{{registers}}}; bar.warp.sync -1;"
        f"ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 {{{back}}}, [%s];",
        count,
        count,
    ).replace(".reg .b32 %a", ".shared .align 16 .b8 tile[512]; .reg .b32 %a")
    out = np.zeros((32, count), "u4")
    emulator.launch(text, 1, 32, source, out)
    same(out, source)


def fragment(matrix: Array, per: int, halves: int, rows_of_a: bool) -> Array:
    """Registers of A (16 x k) or of B (k x 8, given as 8 x k): (32, registers), by the ISA's formulas for the index."""
    registers = []
    for half in range(halves):
        for row in (0, 8) if rows_of_a else (0,):
            column = half * 4 * per + THREAD[:, None] * per + np.arange(per)
            registers.append(np.ascontiguousarray(matrix[GROUP[:, None] + row, column]).view("u4").reshape(32))
    return np.stack(registers, axis=1)


def accumulator(matrix: Array) -> Array:
    """C or D (16 x 8) as (32, 4)."""
    return np.stack([matrix[GROUP + 8 * (i >> 1), 2 * THREAD + (i & 1)] for i in range(4)], axis=1)


FLOAT_MMA = [
    ("m16n8k8", "f16", np.dtype("f2"), 8),
    ("m16n8k16", "f16", np.dtype("f2"), 16),
    ("m16n8k8", "bf16", np.dtype(ml_dtypes.bfloat16), 8),
    ("m16n8k16", "bf16", np.dtype(ml_dtypes.bfloat16), 16),
    ("m16n8k4", "tf32", np.dtype("f4"), 4),
    ("m16n8k8", "tf32", np.dtype("f4"), 8),
]


def registers(first: int, count: int, name: str = "a") -> str:
    return ", ".join(f"%{name}{i}" for i in range(first, first + count))


@pytest.mark.parametrize(("shape", "kind", "dtype", "depth"), FLOAT_MMA)
def test_float_mma_multiplies_and_accumulates(shape: str, kind: str, dtype: np.dtype, depth: int) -> None:
    rng = np.random.default_rng(depth)
    a = rng.standard_normal((16, depth)).astype("f4").astype(dtype)
    b = rng.standard_normal((8, depth)).astype("f4").astype(dtype)
    c = rng.standard_normal((16, 8)).astype("f4")
    per = 1 if kind == "tf32" else 2
    halves = depth // (4 * per)
    na, nb = 2 * halves, halves
    source = np.concatenate(
        [fragment(a, per, halves, True), fragment(b, per, halves, False), accumulator(c).view("u4")], axis=1
    )
    moves = "".join(f"mov.b32 %d{i}, %a{na + nb + i};" for i in range(4))
    text = matrix_kernel(
        f"{moves} mma.sync.aligned.{shape}.row.col.f32.{kind}.{kind}.f32 {{{registers(0, 4, 'd')}}},"
        f"{{{registers(0, na)}}}, {{{registers(na, nb)}}}, {{{registers(0, 4, 'd')}}};",
        na + nb + 4,
        4,
        "f32",
    )
    out = np.zeros((32, 4), "f4")
    emulator.launch(text, 1, 32, np.ascontiguousarray(source), out)
    if kind == "tf32":  # the low 13 bits of the inputs are not looked at
        a, b = ((x.view("u4") & np.uint32(0xFFFFE000)).view("f4") for x in (a, b))
    exact = a.astype("f8") @ b.astype("f8").T + c
    np.testing.assert_allclose(out, accumulator(exact), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("depth", [8, 16])
def test_half_accumulators_are_rounded_pairs(depth: int) -> None:
    rng = np.random.default_rng(9)
    a, b, c = (rng.standard_normal(s).astype("f2") for s in ((16, depth), (8, depth), (16, 8)))
    pairs = np.ascontiguousarray(accumulator(c)).view("u4")
    halves = depth // 8
    source = np.concatenate([fragment(a, 2, halves, True), fragment(b, 2, halves, False), pairs], axis=1)
    text = matrix_kernel(
        f"mma.sync.aligned.m16n8k{depth}.row.col.f16.f16.f16.f16 {{%d0, %d1}}, {{{registers(0, 2 * halves)}}},"
        f"{{{registers(2 * halves, halves)}}}, {{{registers(3 * halves, 2)}}};",
        3 * halves + 2,
        2,
    )
    out = np.zeros((32, 2), "u4")
    emulator.launch(text, 1, 32, np.ascontiguousarray(source), out)
    exact = a.astype("f8") @ b.astype("f8").T + c.astype("f8")
    np.testing.assert_allclose(out.view("f2"), accumulator(exact), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("saturated", [False, True], ids=["wrapped", "satfinite"])
@pytest.mark.parametrize(("left", "right"), [("s8", "s8"), ("u8", "u8"), ("s8", "u8"), ("u8", "s8")])
@pytest.mark.parametrize(("shape", "depth"), [("m16n8k16", 16), ("m16n8k32", 32)])
def test_integer_mma_is_exact(shape: str, depth: int, left: str, right: str, saturated: bool) -> None:
    rng = np.random.default_rng(depth)
    a = rng.integers(0, 256, (16, depth), dtype="u1").view("i1" if left == "s8" else "u1")
    b = rng.integers(0, 256, (8, depth), dtype="u1").view("i1" if right == "s8" else "u1")
    c = rng.integers(-(2**31), 2**31, (16, 8)).astype("i4")
    c[0] = 2**31 - 1
    c[1] = -(2**31)
    halves = depth // 16
    source = np.concatenate(
        [fragment(a, 4, halves, True), fragment(b, 4, halves, False), accumulator(c).view("u4")], axis=1
    )
    na, nb = 2 * halves, halves
    text = matrix_kernel(
        f"mma.sync.aligned.{shape}.row.col{'.satfinite' if saturated else ''}.s32.{left}.{right}.s32"
        f" {{{registers(0, 4, 'd')}}}, {{{registers(0, na)}}}, {{{registers(na, nb)}}}, {{{registers(na + nb, 4)}}};",
        na + nb + 4,
        4,
    )
    out = np.zeros((32, 4), "u4")
    emulator.launch(text, 1, 32, np.ascontiguousarray(source), out)
    exact = a.astype("i8") @ b.astype("i8").T + c
    wanted = np.clip(exact, -(2**31), 2**31 - 1) if saturated else exact
    same(out.view("i4"), accumulator(wanted.astype("i4")))


def test_every_matrix_instruction_and_modifier_has_a_row(whole_file: Any) -> None:
    assert whole_file.missing("tensor") == []

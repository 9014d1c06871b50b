"""A matrix product as kernels for tensor cores are written: cp.async in two stages, ldmatrix, mma.

C (M, N) float32 = A (M, K) float16 times the transpose of B (N, K) float16; M and N multiples of 64, K of 32.
"""

# ruff: noqa: ARG001  the arguments of an intrinsic are its types; Numba passes the values to the generator

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from llvmlite import ir
from numba import cuda, float32, int32
from numba.cuda import types
from numba.cuda.compiler import compile_ptx
from numba.cuda.extending import intrinsic

_I32, _F32, _I64 = ir.IntType(32), ir.FloatType(), ir.IntType(64)
ROW_BYTES = 80
"""Bytes from row to row of a tile: 64 of data, and 16 so that eight rows lie in different banks."""
STAGE = 2 * 64 * ROW_BYTES
SHARED = 2 * STAGE


def _assembly(text: str, constraints: str, results: list[Any], arguments: list[Any], signature: Any) -> Any:
    """An intrinsic around one instruction."""
    count = len(results)

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        kind = ir.LiteralStructType(results) if count else ir.VoidType()
        block = ir.InlineAsm(ir.FunctionType(kind, arguments), text, constraints, side_effect=True)
        call = builder.call(block, args)
        if not count:
            return context.get_dummy_value()
        return context.make_tuple(builder, sig.return_type, [builder.extract_value(call, i) for i in range(count)])

    return signature, generate


@intrinsic
def mma(_context, a0, a1, a2, a3, b0, b1, c0, c1, c2, c3):  # type: ignore[no-untyped-def]
    text = "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9}, {$10,$11,$12,$13};"
    signature = types.UniTuple(types.float32, 4)(*[types.int32] * 6, *[types.float32] * 4)
    return _assembly(text, "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f", [_F32] * 4, [_I32] * 6 + [_F32] * 4, signature)


@intrinsic
def ldmatrix(_context, address):  # type: ignore[no-untyped-def]
    text = "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {$0,$1,$2,$3}, [$4];"
    signature = types.UniTuple(types.int32, 4)(types.int32)
    return _assembly(text, "=r,=r,=r,=r,r,~{memory}", [_I32] * 4, [_I32], signature)


@intrinsic
def copy_16(_context, target, source):  # type: ignore[no-untyped-def]
    text = "cp.async.cg.shared.global [$0], [$1], 16;"
    return _assembly(text, "r,l,~{memory}", [], [_I32, _I64], types.void(types.int32, types.int64))


@intrinsic
def commit(_context):  # type: ignore[no-untyped-def]
    return _assembly("cp.async.commit_group;", "~{memory}", [], [], types.void())


@intrinsic
def wait_all_but_one(_context):  # type: ignore[no-untyped-def]
    return _assembly("cp.async.wait_group 1;", "~{memory}", [], [], types.void())


@intrinsic
def address_of(_context, array):  # type: ignore[no-untyped-def]
    """The address of an array in its own state space."""
    signature = types.int64(array)

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        data = context.make_array(sig.args[0])(context, builder, args[0]).data
        return builder.ptrtoint(data, _I64)

    return signature, generate


@intrinsic
def shared_address(_context, array):  # type: ignore[no-untyped-def]
    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        data = context.make_array(sig.args[0])(context, builder, args[0]).data
        return builder.ptrtoint(builder.addrspacecast(data, ir.PointerType(data.type.pointee, 3)), _I32)

    return types.int32(array), generate


@cuda.jit(device=True, inline="always")
def load_stage(stage, a, b, row_bytes):  # type: ignore[no-untyped-def]
    """Each of 128 threads copies two 16-byte pieces of A's tile and of B's."""
    thread = int32(cuda.threadIdx.x)
    for i in range(2):
        row = (thread >> 2) + int32(32 * i)
        piece = (thread & 3) * 16
        copy_16(stage + row * ROW_BYTES + piece, a + row * row_bytes + piece)
        copy_16(stage + int32(64 * ROW_BYTES) + row * ROW_BYTES + piece, b + row * row_bytes + piece)


def product(a, b, c):  # type: ignore[no-untyped-def]
    memory = cuda.shared.array(0, int32)
    base = shared_address(memory)
    depth = a.shape[1]
    row_bytes = depth * 2
    thread = int32(cuda.threadIdx.x)
    lane, warp = thread & 31, thread >> 5
    first_row, first_column = int32(cuda.blockIdx.y) * 64, int32(cuda.blockIdx.x) * 64
    a_address = address_of(a) + first_row * row_bytes
    b_address = address_of(b) + first_column * row_bytes
    total = cuda.local.array(32, float32)
    for i in range(32):
        total[i] = float32(0)
    load_stage(base, a_address, b_address, row_bytes)
    commit()
    steps = int32(depth // 32)
    for step in range(steps):
        if step + 1 < steps:
            load_stage(
                base + ((step + 1) & 1) * STAGE, a_address + (step + 1) * 64, b_address + (step + 1) * 64, row_bytes
            )
        commit()
        wait_all_but_one()
        cuda.syncthreads()
        stage = base + int32(step & 1) * STAGE
        for k in range(2):
            a0, a1, a2, a3 = ldmatrix(stage + (warp * 16 + (lane & 15)) * ROW_BYTES + k * 32 + (lane >> 4) * 16)
            for n in range(4):
                row = n * 16 + (lane & 7) + ((lane >> 4) << 3)
                b0, b1, b2, b3 = ldmatrix(
                    stage + int32(64 * ROW_BYTES) + row * ROW_BYTES + k * 32 + ((lane >> 3) & 1) * 16
                )
                o = n * 8
                total[o], total[o + 1], total[o + 2], total[o + 3] = mma(
                    a0, a1, a2, a3, b0, b1, total[o], total[o + 1], total[o + 2], total[o + 3]
                )
                total[o + 4], total[o + 5], total[o + 6], total[o + 7] = mma(
                    a0, a1, a2, a3, b2, b3, total[o + 4], total[o + 5], total[o + 6], total[o + 7]
                )
        cuda.syncthreads()
    for n in range(8):
        for e in range(4):
            row = first_row + warp * 16 + (lane >> 2) + 8 * (e >> 1)
            c[row, first_column + n * 8 + (lane & 3) * 2 + (e & 1)] = total[n * 4 + e]


@functools.cache
def ptx() -> str:
    signature = (types.float16[:, ::1], types.float16[:, ::1], float32[:, ::1])
    return compile_ptx(product, signature, cc=(8, 0), lineinfo=True)[0]


def operands(m: int, n: int, k: int, seed: int = 0) -> tuple[Any, Any, Any]:
    rng = np.random.default_rng(seed)
    a = rng.standard_normal((m, k)).astype("f2")
    b = rng.standard_normal((n, k)).astype("f2")
    return a, b, np.zeros((m, n), "f4")

"""LLVM IR for what the vector instructions and micro-kernels are made of; values here are IR, not Python numbers.

float16 and bfloat16 live in memory as 16-bit integers; they become float32 on the way in and are rounded to nearest
even on the way out, by instructions where the CPU has them, else by integer arithmetic.
"""

from __future__ import annotations

import math

from llvmlite import ir
from numba.core import cgutils

from .target import TARGET

LANES = TARGET.lanes

# Codes of the storage dtypes, for run-time dispatch. A BOOL is a mask's, and stands for what it adds to a score.
FLOAT32, FLOAT16, BFLOAT16, BOOL = range(4)

F32 = ir.FloatType()
I8 = ir.IntType(8)
I16 = ir.IntType(16)
I32 = ir.IntType(32)
I64 = ir.IntType(64)
VECTOR = ir.VectorType(F32, LANES)


def constant(value: float, like: ir.Type) -> ir.Constant:
    """A scalar, or a vector with `value` in each lane."""
    return ir.Constant(like, [value] * like.count if isinstance(like, ir.VectorType) else value)


def reshape_type(element: ir.Type, like: ir.Type) -> ir.Type:
    """`element`, or a vector of as many as `like` has."""
    return ir.VectorType(element, like.count) if isinstance(like, ir.VectorType) else element


def load_at(builder: ir.IRBuilder, address: ir.Value, value_type: ir.Type, align: int = 4) -> ir.Value:
    """Load `value_type` from an integer address."""
    loaded = builder.load(builder.inttoptr(address, value_type.as_pointer()))
    loaded.align = align
    return loaded


def store_at(builder: ir.IRBuilder, address: ir.Value, value: ir.Value, align: int = 4) -> None:
    """Store a value at an integer address."""
    builder.store(value, builder.inttoptr(address, value.type.as_pointer())).align = align


def offset(builder: ir.IRBuilder, address: ir.Value, nbytes: int) -> ir.Value:
    """The address `nbytes` further."""
    return builder.add(address, ir.Constant(I64, nbytes)) if nbytes else address


def broadcast(builder: ir.IRBuilder, scalar: ir.Value) -> ir.Value:
    """A vector with `scalar` in each lane."""
    undefined = ir.Constant(ir.VectorType(scalar.type, LANES), ir.Undefined)
    first = builder.insert_element(undefined, scalar, ir.Constant(I32, 0))
    return shuffle(builder, first, undefined, [0] * LANES)


def shuffle(builder: ir.IRBuilder, a: ir.Value, b: ir.Value, lanes: list[int]) -> ir.Value:
    """Pick lanes of the concatenation of a and b."""
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(I32, len(lanes)), lanes))


def multiply_add(builder: ir.IRBuilder, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
    """A * b + c, with one rounding where the CPU has such an instruction."""
    if not TARGET.has_fma:
        return builder.fadd(builder.fmul(a, b), c)
    kind = ir.FunctionType(a.type, [a.type] * 3)
    name = "llvm.fma.f32" if a.type == F32 else f"llvm.fma.v{a.type.count}f32"
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), [a, b, c])


def widen(builder: ir.IRBuilder, stored: ir.Value, dtype: int) -> ir.Value:
    """float32 from the bits of a bfloat16, or of a float16 (as i16 or a vector of them); exact."""
    bits32 = reshape_type(I32, stored.type)
    f32 = reshape_type(F32, stored.type)
    if dtype == BFLOAT16:
        return builder.bitcast(builder.shl(builder.zext(stored, bits32), constant(16, bits32)), f32)
    if TARGET.has_float16:
        return builder.fpext(builder.bitcast(stored, reshape_type(ir.HalfType(), stored.type)), f32)
    # Exponent and mantissa moved to float32's places are the value times 2^-112, subnormals included.
    bits = builder.zext(stored, bits32)
    magnitude = builder.shl(builder.and_(bits, constant(0x7FFF, bits32)), constant(13, bits32))
    finite = builder.bitcast(builder.fmul(builder.bitcast(magnitude, f32), constant(2.0**112, f32)), bits32)
    special = builder.icmp_unsigned(">=", magnitude, constant(0x0F800000, bits32))
    magnitude = builder.select(special, builder.or_(magnitude, constant(0x7F800000, bits32)), finite)
    sign = builder.shl(builder.and_(bits, constant(0x8000, bits32)), constant(16, bits32))
    return builder.bitcast(builder.or_(magnitude, sign), f32)


def narrow(builder: ir.IRBuilder, value: ir.Value, dtype: int) -> ir.Value:
    """The bits of the nearest bfloat16 or float16, ties to even."""
    bits32 = reshape_type(I32, value.type)
    bits16 = reshape_type(I16, value.type)
    bits = builder.bitcast(value, bits32)
    is_nan = builder.fcmp_unordered("uno", value, value)
    if dtype == BFLOAT16:
        odd = builder.and_(builder.lshr(bits, constant(16, bits32)), constant(1, bits32))
        rounded = builder.add(bits, builder.add(odd, constant(0x7FFF, bits32)))
        rounded = builder.select(is_nan, builder.or_(bits, constant(0x400000, bits32)), rounded)
        return builder.trunc(builder.lshr(rounded, constant(16, bits32)), bits16)
    if TARGET.has_float16:
        return builder.bitcast(builder.fptrunc(value, reshape_type(ir.HalfType(), value.type)), bits16)
    magnitude = builder.and_(bits, constant(0x7FFFFFFF, bits32))
    sign = builder.lshr(builder.and_(bits, constant(0x80000000, bits32)), constant(16, bits32))
    # Below 2^-14: adding 0.5 leaves the float16 subnormal, rounded, in the lowest bits of the sum.
    sum_bits = builder.bitcast(builder.fadd(builder.bitcast(magnitude, value.type), constant(0.5, value.type)), bits32)
    subnormal = builder.sub(sum_bits, constant(0x3F000000, bits32))
    odd = builder.and_(builder.lshr(magnitude, constant(13, bits32)), constant(1, bits32))
    rebased = builder.add(magnitude, builder.add(odd, constant(((15 - 127) << 23) + 0xFFF, bits32)))
    normal = builder.lshr(rebased, constant(13, bits32))
    result = builder.select(builder.icmp_unsigned("<", magnitude, constant(113 << 23, bits32)), subnormal, normal)
    too_large = builder.icmp_unsigned(">=", magnitude, constant(143 << 23, bits32))
    result = builder.select(too_large, constant(0x7C00, bits32), result)
    result = builder.select(is_nan, constant(0x7E00, bits32), result)
    return builder.trunc(builder.or_(result, sign), bits16)


def load_widened(builder: ir.IRBuilder, address: ir.Value, dtype: int, lanes: int = LANES) -> ir.Value:
    """Load one or `lanes` elements as float32; True is 0, and False is -inf."""

    def load(element: ir.Type, align: int) -> ir.Value:
        return load_at(builder, address, element if lanes == 1 else ir.VectorType(element, lanes), align)

    if dtype == FLOAT32:
        return load(F32, 4)
    if dtype == BOOL:
        stored = load(I8, 1)
        f32 = reshape_type(F32, stored.type)
        may = builder.icmp_unsigned("!=", stored, constant(0, stored.type))
        return builder.select(may, constant(0.0, f32), constant(-math.inf, f32))
    return widen(builder, load(I16, 2), dtype)


def store_narrowed(builder: ir.IRBuilder, address: ir.Value, value: ir.Value, dtype: int) -> None:
    """Store a float32 scalar or vector as float32, float16 or bfloat16."""
    if dtype == FLOAT32:
        store_at(builder, address, value)
    else:
        store_at(builder, address, narrow(builder, value, dtype), align=2)


def prefetch(builder: ir.IRBuilder, address: ir.Value, level: int = 1) -> None:
    """Bring a cache line closer, to the caches of this level and above; any address will do."""
    pointer = ir.IntType(8).as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [pointer, I32, I32, I32])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    read, keep, data = ir.Constant(I32, 0), ir.Constant(I32, 4 - level), ir.Constant(I32, 1)
    builder.call(function, [builder.inttoptr(address, pointer), read, keep, data])

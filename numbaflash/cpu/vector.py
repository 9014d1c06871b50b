"""One vector register of float32 as a Numba value, and one vector instruction as one function.

`FloatVector` has LANES elements, `Mask` one truth value for each of them. All arithmetic is strict IEEE: nothing is
reassociated, and NaN and infinities keep their meaning. Memory is addressed by int64 addresses in bytes.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import models, register_model

from . import emit
from .emit import BFLOAT16, BOOL, FLOAT16, FLOAT32, I32, I64, LANES, VECTOR
from .intrinsics import Emitter, instruction
from .target import TARGET

__all__ = [
    "LANES",
    "absolute",
    "add",
    "atomic_add",
    "atomic_load",
    "both",
    "compare_and_swap",
    "copy_bytes",
    "div",
    "either",
    "equal",
    "fma",
    "horizontal_max",
    "horizontal_sum",
    "lane_numbers",
    "less",
    "less_equal",
    "load",
    "load_bfloat16",
    "load_float",
    "load_float16",
    "load_int",
    "load_one_bfloat16",
    "load_one_bool",
    "load_one_float16",
    "maximum",
    "minimum",
    "mul",
    "pause",
    "power_of_two",
    "prefetch",
    "splat",
    "store",
    "store_bfloat16",
    "store_float",
    "store_float16",
    "store_int",
    "store_one_bfloat16",
    "store_one_float16",
    "sub",
    "where",
]


class FloatVectorType(types.Type):
    """LANES float32 values in a register."""

    def __init__(self) -> None:
        super().__init__(name=f"float32x{LANES}")


class MaskType(types.Type):
    """LANES truth values."""

    def __init__(self) -> None:
        super().__init__(name=f"mask{LANES}")


FloatVector = FloatVectorType()
Mask = MaskType()


@register_model(FloatVectorType)
class _FloatVectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, numba_type: types.Type) -> None:
        super().__init__(manager, numba_type, VECTOR)


@register_model(MaskType)
class _MaskModel(models.PrimitiveModel):
    def __init__(self, manager: Any, numba_type: types.Type) -> None:
        super().__init__(manager, numba_type, ir.VectorType(ir.IntType(1), LANES))


# ---- arithmetic -------------------------------------------------------------------------------------------------


def _larger(builder: ir.IRBuilder, a: ir.Value, b: ir.Value) -> ir.Value:
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)


def _smaller(builder: ir.IRBuilder, a: ir.Value, b: ir.Value) -> ir.Value:
    return builder.select(builder.fcmp_ordered("<", a, b), a, b)


def _absolute(builder: ir.IRBuilder, a: ir.Value) -> ir.Value:
    bits = ir.VectorType(I32, LANES)
    return builder.bitcast(builder.and_(builder.bitcast(a, bits), emit.constant(0x7FFFFFFF, bits)), VECTOR)


def _power_of_two(builder: ir.IRBuilder, a: ir.Value) -> ir.Value:
    bits = ir.VectorType(I32, LANES)
    return builder.bitcast(builder.shl(builder.bitcast(a, bits), emit.constant(23, bits)), VECTOR)


_ONE, _TWO, _THREE = (FloatVector,), (FloatVector,) * 2, (FloatVector,) * 3

add = instruction(FloatVector, _TWO, lambda builder, a, b: builder.fadd(a, b))
sub = instruction(FloatVector, _TWO, lambda builder, a, b: builder.fsub(a, b))
mul = instruction(FloatVector, _TWO, lambda builder, a, b: builder.fmul(a, b))
div = instruction(FloatVector, _TWO, lambda builder, a, b: builder.fdiv(a, b))
fma = instruction(FloatVector, _THREE, emit.multiply_add)
maximum = instruction(FloatVector, _TWO, _larger)  # a where a > b, else b: a NaN in b stays
minimum = instruction(FloatVector, _TWO, _smaller)  # a where a < b, else b: a NaN in b stays
absolute = instruction(FloatVector, _ONE, _absolute)
power_of_two = instruction(FloatVector, _ONE, _power_of_two)  # 2^n from n + 127 in each lane's lowest bits; n = -127: 0

less = instruction(Mask, _TWO, lambda builder, a, b: builder.fcmp_ordered("<", a, b))
less_equal = instruction(Mask, _TWO, lambda builder, a, b: builder.fcmp_ordered("<=", a, b))
equal = instruction(Mask, _TWO, lambda builder, a, b: builder.fcmp_ordered("==", a, b))
both = instruction(Mask, (Mask, Mask), lambda builder, a, b: builder.and_(a, b))
either = instruction(Mask, (Mask, Mask), lambda builder, a, b: builder.or_(a, b))
where = instruction(FloatVector, (Mask, *_TWO), lambda builder, mask, a, b: builder.select(mask, a, b))

splat = instruction(FloatVector, (types.float32,), emit.broadcast)
lane_numbers = instruction(FloatVector, (), lambda _: ir.Constant(VECTOR, [float(i) for i in range(LANES)]))


def _fold(builder: ir.IRBuilder, value: ir.Value, combine: Emitter) -> ir.Value:
    distance = LANES // 2
    while distance:
        lanes = [(lane + distance) % LANES for lane in range(LANES)]
        value = combine(builder, value, emit.shuffle(builder, value, value, lanes))
        distance //= 2
    return builder.extract_element(value, ir.Constant(I32, 0))


horizontal_max = instruction(types.float32, _ONE, lambda builder, a: _fold(builder, a, _larger))
horizontal_sum = instruction(types.float32, _ONE, lambda builder, a: _fold(builder, a, lambda b, x, y: b.fadd(x, y)))


# ---- memory -----------------------------------------------------------------------------------------------------


def _vector_load(dtype: int) -> Any:
    return instruction(FloatVector, (types.int64,), lambda builder, address: emit.load_widened(builder, address, dtype))


def _vector_store(dtype: int) -> Any:
    def emitter(builder: ir.IRBuilder, address: ir.Value, value: ir.Value) -> None:
        emit.store_narrowed(builder, address, value, dtype)

    return instruction(types.void, (types.int64, FloatVector), emitter)


def _scalar_load(dtype: int) -> Any:
    return instruction(
        types.float32, (types.int64,), lambda builder, address: emit.load_widened(builder, address, dtype, lanes=1)
    )


def _scalar_store(dtype: int) -> Any:
    def emitter(builder: ir.IRBuilder, address: ir.Value, value: ir.Value) -> None:
        emit.store_narrowed(builder, address, value, dtype)

    return instruction(types.void, (types.int64, types.float32), emitter)


# float16 and bfloat16 become float32 in the register, and are rounded to nearest even on the way back; True becomes 0,
# and False -inf.
load, load_float16, load_bfloat16 = map(_vector_load, (FLOAT32, FLOAT16, BFLOAT16))
store, store_float16, store_bfloat16 = map(_vector_store, (FLOAT32, FLOAT16, BFLOAT16))
load_float, load_one_float16, load_one_bfloat16, load_one_bool = map(_scalar_load, (FLOAT32, FLOAT16, BFLOAT16, BOOL))
store_float, store_one_float16, store_one_bfloat16 = map(_scalar_store, (FLOAT32, FLOAT16, BFLOAT16))


def _atomic_add(builder: ir.IRBuilder, address: ir.Value, value: ir.Value) -> ir.Value:
    return builder.atomic_rmw("add", builder.inttoptr(address, I64.as_pointer()), value, "acq_rel")


def _atomic_load(builder: ir.IRBuilder, address: ir.Value) -> ir.Value:
    return builder.load_atomic(builder.inttoptr(address, I64.as_pointer()), "acquire", 8)


def _compare_and_swap(builder: ir.IRBuilder, address: ir.Value, expected: ir.Value, wanted: ir.Value) -> ir.Value:
    pair = builder.cmpxchg(builder.inttoptr(address, I64.as_pointer()), expected, wanted, "acq_rel", "acquire")
    return builder.extract_value(pair, 1)


def _pause(builder: ir.IRBuilder) -> None:
    name, operands = ("llvm.x86.sse2.pause", []) if TARGET.is_x86 else ("llvm.aarch64.hint", [ir.Constant(I32, 1)])
    kind = ir.FunctionType(ir.VoidType(), [operand.type for operand in operands])
    builder.call(cgutils.get_or_insert_function(builder.module, kind, name), operands)


def _copy_bytes(builder: ir.IRBuilder, target: ir.Value, source: ir.Value, nbytes: ir.Value) -> None:
    pointer = ir.IntType(8).as_pointer()
    cgutils.raw_memcpy(
        builder, builder.inttoptr(target, pointer), builder.inttoptr(source, pointer), nbytes, ir.Constant(I64, 1)
    )


def _store_int(builder: ir.IRBuilder, address: ir.Value, value: ir.Value) -> None:
    emit.store_at(builder, address, value, 8)


load_int = instruction(types.int64, (types.int64,), lambda builder, address: emit.load_at(builder, address, I64, 8))
store_int = instruction(types.void, (types.int64, types.int64), _store_int)
copy_bytes = instruction(types.void, (types.int64,) * 3, _copy_bytes)  # target, source, nbytes
prefetch = instruction(types.void, (types.int64,), emit.prefetch)
atomic_add = instruction(types.int64, (types.int64, types.int64), _atomic_add)  # returns the value before
# Writes the last operand where the second one is found, and says whether it was.
compare_and_swap = instruction(types.boolean, (types.int64,) * 3, _compare_and_swap)
pause = instruction(types.void, (), _pause)  # tells the core that this is a spin loop
atomic_load = instruction(types.int64, (types.int64,), _atomic_load)

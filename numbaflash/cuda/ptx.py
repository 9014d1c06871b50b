"""One PTX instruction, one name: all that the kernels say to the GPU which Numba cannot say by itself.

Each function below is a stub. Its decorator holds the instruction, its annotations say which registers go in and come
out, its docstring is the contract: who must call it, what must be aligned, what it touches. Call it from a kernel like
any device function, or emit it while another intrinsic is generated: `mma_f16.emit(builder, a0, ...)`.

PTX ISA: https://docs.nvidia.com/cuda/parallel-thread-execution/
"""

# The body of a stub is the PTX in its decorator.
# mypy: disable-error-code="empty-body"

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, get_args, get_type_hints

from llvmlite import ir
from numba.cuda import types
from numba.cuda.extending import intrinsic

__all__ = [
    "B16",
    "B32",
    "B64",
    "F32",
    "absolute",
    "add_bias",
    "bf16_to_f32",
    "block_x",
    "block_y",
    "block_z",
    "blocks_z",
    "constant",
    "cp_async_16",
    "cp_async_commit",
    "cp_async_wait",
    "device_intrinsic",
    "exp2",
    "f16_to_f32",
    "keep_where_byte",
    "lane_id",
    "ldmatrix_x4",
    "ldmatrix_x4_trans",
    "load_global_2b32",
    "load_global_2f32",
    "load_global_4b32",
    "load_global_b16",
    "load_global_b32",
    "load_global_b64",
    "load_global_f32",
    "load_shared_b32",
    "log2",
    "maximum",
    "mma_bf16",
    "mma_f16",
    "mma_tf32",
    "move_16_if",
    "multiply_add_wide",
    "pack_bf16",
    "pack_f16",
    "reciprocal",
    "shared_memory",
    "shuffle_xor",
    "store_global_2b32",
    "store_global_2f32",
    "store_global_2f32_if",
    "store_global_4b32",
    "store_global_b16",
    "store_global_b32",
    "store_global_f32",
    "store_global_f32_if",
    "store_shared_4b32",
    "store_shared_b32",
    "thread_x",
    "unpack_bf16",
    "unpack_f16",
    "vote_any",
]


class B16:
    """A 16-bit register."""

    numba, llvm, constraint = types.int16, ir.IntType(16), "h"


class B32:
    """A 32-bit register: bits, an integer, or an address in shared memory."""

    numba, llvm, constraint = types.int32, ir.IntType(32), "r"


class B64:
    """A 64-bit register: an address in global memory."""

    numba, llvm, constraint = types.int64, ir.IntType(64), "l"


class F32:
    """A float register."""

    numba, llvm, constraint = types.float32, ir.FloatType(), "f"


class Immediate:
    """A number in the instruction itself; only `emit` can give it (as an int), a kernel's call has 0 there."""


def constant(kind: Any, value: float) -> ir.Constant:
    """Return `value` as an LLVM constant of register kind `kind`."""
    return ir.Constant(kind.llvm, value)


def device_intrinsic(emit: Callable[..., Any], arguments: list[Any], result: Any) -> Any:
    """Return a function for kernels that emits its own LLVM IR.

    Args:
        emit: Called as emit(context, builder, signature, values) to generate the code of one call.
        arguments: A Numba type for each argument, or None where the caller's own type is taken (an array).
        result: Numba type of the result.
    """

    def typed(_typing_context: Any, *given: Any) -> Any:
        signature = result(*(own or kind for own, kind in zip(arguments, given, strict=True)))

        def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            value = emit(context, builder, signature, values)
            return context.get_dummy_value() if value is None else value

        return signature, generate

    # Numba binds calls by the signature; *given would arrive as one tuple. (mypy knows no such attribute of functions.)
    names = ["typing_context", *(f"a{i}" for i in range(len(arguments)))]
    typed.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in names]
    )
    typed.__name__ = getattr(emit, "__name__", "typed")
    return intrinsic(typed)


def _instruction(text: str, *, touches: str = "") -> Callable[[Callable[..., Any]], Any]:
    """Make an intrinsic of a stub.

    `touches` names the state beyond its registers that the instruction depends on or changes: "memory", or "warp" for
    what all lanes take part in. The compiler then neither drops, repeats nor reorders it among its like. "nothing" asks
    for that alone, for a pure function whose place matters. Without it the instruction is a pure function.
    """

    def decorate(stub: Callable[..., Any]) -> Any:
        hints = get_type_hints(stub)
        returned = hints.pop("return")
        results = [] if returned is type(None) else list(get_args(returned) or [returned])
        operands = list(hints.values())
        if len(results) == 1:
            llvm_result, numba_result = results[0].llvm, results[0].numba
        elif results:
            llvm_result = ir.LiteralStructType([kind.llvm for kind in results])
            numba_result = types.UniTuple(results[0].numba, len(results))
        else:
            llvm_result, numba_result = ir.VoidType(), types.void
        registers = [kind for kind in operands if kind is not Immediate]
        constraints = ",".join(
            [f"={kind.constraint}" for kind in results]
            + [kind.constraint for kind in registers]
            + (["~{memory}"] if touches == "memory" else [])
        )
        function = ir.FunctionType(llvm_result, [kind.llvm for kind in registers])

        def emit(builder: ir.IRBuilder, *values: Any) -> Any:
            given = dict(zip(hints, values, strict=True))
            filled = text
            for name, kind in hints.items():
                if kind is Immediate:
                    filled = filled.replace(f"<{name}>", str(given.pop(name)))
            assembly = ir.InlineAsm(function, filled, constraints, side_effect=bool(touches))
            value = builder.call(assembly, list(given.values()))
            return [builder.extract_value(value, i) for i in range(len(results))] if len(results) > 1 else value

        def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            remaining = iter(values)
            value = emit(builder, *(0 if kind is Immediate else next(remaining) for kind in operands))
            if len(results) > 1:
                return context.make_tuple(builder, signature.return_type, value)
            return value if results else None

        generate.__name__ = stub.__name__
        callable_ = device_intrinsic(generate, [kind.numba for kind in registers], numba_result)
        callable_.emit = emit
        callable_.__doc__ = stub.__doc__
        return callable_

    return decorate


# ---- tensor cores -----------------------------------------------------------------------------------------------


@_instruction(
    "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, "
    "{$10, $11, $12, $13};"
)
def mma_f16(
    a0: B32, a1: B32, a2: B32, a3: B32, b0: B32, b1: B32, c0: F32, c1: F32, c2: F32, c3: F32
) -> tuple[F32, F32, F32, F32]:
    """Return A B + C for A 16x16 and B 16x8 in float16; all 32 lanes call it, each with its fragments."""


@_instruction(
    "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, "
    "{$10, $11, $12, $13};"
)
def mma_bf16(
    a0: B32, a1: B32, a2: B32, a3: B32, b0: B32, b1: B32, c0: F32, c1: F32, c2: F32, c3: F32
) -> tuple[F32, F32, F32, F32]:
    """Return A B + C for A 16x16 and B 16x8 in bfloat16; all 32 lanes call it, each with its fragments."""


@_instruction(
    "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, "
    "{$10, $11, $12, $13};"
)
def mma_tf32(
    a0: B32, a1: B32, a2: B32, a3: B32, b0: B32, b1: B32, c0: F32, c1: F32, c2: F32, c3: F32
) -> tuple[F32, F32, F32, F32]:
    """Return A B + C for A 16x8 and B 8x8 in TF32; all 32 lanes call it, each with its fragments."""


@_instruction("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {$0, $1, $2, $3}, [$4+<offset>];", touches="memory")
def ldmatrix_x4(address: B32, offset: Immediate) -> tuple[B32, B32, B32, B32]:
    """Load four 8x8 tiles of 16-bit elements; all 32 lanes call it.

    Lane 8 i + r gives the address of row r of tile i, 16-byte aligned; lane 4 r + c gets elements 2 c and 2 c + 1 of
    row r of each tile.
    """


@_instruction("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {$0, $1, $2, $3}, [$4+<offset>];", touches="memory")
def ldmatrix_x4_trans(address: B32, offset: Immediate) -> tuple[B32, B32, B32, B32]:
    """Load four 8x8 tiles, transposed: as `ldmatrix_x4`, but lane 4 r + c gets column r of rows 2 c and 2 c + 1."""


# ---- global to shared memory, asynchronously --------------------------------------------------------------------


@_instruction(
    "cp.async.cg.shared.global [$0+<shared_offset>], [$1+<global_offset>], 16, $2;",
    touches="memory",
)
def cp_async_16(shared: B32, global_: B64, nbytes: B32, shared_offset: Immediate, global_offset: Immediate) -> None:
    """Copy `nbytes` (0 to 16) bytes past L1 and fill up to 16 with zeros; both addresses 16-byte aligned."""


@_instruction("cp.async.commit_group;", touches="memory")
def cp_async_commit() -> None:
    """Close the group of the copies that this thread has started since the last one."""


@_instruction("cp.async.wait_group 0;", touches="memory")
def cp_async_wait() -> None:
    """Wait for all groups of this thread; a barrier must follow before other threads' copies may be read."""


# ---- memory -----------------------------------------------------------------------------------------------------


@_instruction("ld.shared.b32 $0, [$1+<offset>];", touches="memory")
def load_shared_b32(address: B32, offset: Immediate) -> B32:
    """Load 4 bytes, 4-byte aligned."""


@_instruction("st.shared.b32 [$0+<offset>], $1;", touches="memory")
def store_shared_b32(address: B32, value: B32, offset: Immediate) -> None:
    """Store 4 bytes, 4-byte aligned."""


@_instruction("st.shared.v4.b32 [$0], {$1, $2, $3, $4};", touches="memory")
def store_shared_4b32(address: B32, a: B32, b: B32, c: B32, d: B32) -> None:
    """Store 16 bytes, 16-byte aligned."""


@_instruction(
    "{ .reg .pred p; .reg .b32 %move<4>; setp.ne.b32 p, $0, 0; @p ld.shared.v4.b32 {%move0, %move1, %move2, %move3}, "
    "[$1+<shared_offset>]; @p st.global.v4.b32 [$2+<global_offset>], {%move0, %move1, %move2, %move3}; }",
    touches="memory",
)
def move_16_if(condition: B32, shared: B32, global_: B64, shared_offset: Immediate, global_offset: Immediate) -> None:
    """Move 16 bytes from shared to global memory where `condition` is not 0; both addresses 16-byte aligned."""


@_instruction("{ .reg .pred p; setp.ne.b32 p, $0, 0; @p st.global.v2.f32 [$1+<offset>], {$2, $3}; }", touches="memory")
def store_global_2f32_if(condition: B32, address: B64, x: F32, y: F32, offset: Immediate) -> None:
    """Store two floats where `condition` is not 0; 8-byte aligned."""


@_instruction("{ .reg .pred p; setp.ne.b32 p, $0, 0; @p st.global.f32 [$1], $2; }", touches="memory")
def store_global_f32_if(condition: B32, address: B64, value: F32) -> None:
    """Store a float where `condition` is not 0; 4-byte aligned."""


@_instruction("st.global.v2.f32 [$0+<offset>], {$1, $2};", touches="memory")
def store_global_2f32(address: B64, x: F32, y: F32, offset: Immediate) -> None:
    """Store two floats; 8-byte aligned."""


@_instruction("st.global.f32 [$0], $1;", touches="memory")
def store_global_f32(address: B64, value: F32) -> None:
    """Store a float; 4-byte aligned."""


@_instruction("st.global.b16 [$0], $1;", touches="memory")
def store_global_b16(address: B64, value: B16) -> None:
    """Store 16 bits; 2-byte aligned."""


@_instruction("st.global.b32 [$0], $1;", touches="memory")
def store_global_b32(address: B64, value: B32) -> None:
    """Store 32 bits; 4-byte aligned."""


@_instruction("ld.global.v2.f32 {$0, $1}, [$2+<offset>];", touches="memory")
def load_global_2f32(address: B64, offset: Immediate) -> tuple[F32, F32]:
    """Load two floats, 8-byte aligned."""


@_instruction("ld.global.v4.b32 {$0, $1, $2, $3}, [$4+<offset>];", touches="memory")
def load_global_4b32(address: B64, offset: Immediate) -> tuple[B32, B32, B32, B32]:
    """Load 16 bytes, 16-byte aligned."""


@_instruction("ld.global.v2.b32 {$0, $1}, [$2+<offset>];", touches="memory")
def load_global_2b32(address: B64, offset: Immediate) -> tuple[B32, B32]:
    """Load 8 bytes, 8-byte aligned."""


@_instruction("st.global.v4.b32 [$0+<offset>], {$1, $2, $3, $4};", touches="memory")
def store_global_4b32(address: B64, a: B32, b: B32, c: B32, d: B32, offset: Immediate) -> None:
    """Store 16 bytes, 16-byte aligned."""


@_instruction("st.global.v2.b32 [$0+<offset>], {$1, $2};", touches="memory")
def store_global_2b32(address: B64, a: B32, b: B32, offset: Immediate) -> None:
    """Store 8 bytes, 8-byte aligned."""


@_instruction("ld.global.b64 $0, [$1];", touches="memory")
def load_global_b64(address: B64) -> B64:
    """Load 8 bytes, 8-byte aligned."""


@_instruction("ld.global.f32 $0, [$1];", touches="memory")
def load_global_f32(address: B64) -> F32:
    """Load a float, 4-byte aligned."""


@_instruction("ld.global.b32 $0, [$1];", touches="memory")
def load_global_b32(address: B64) -> B32:
    """Load 4 bytes, 4-byte aligned."""


@_instruction("ld.global.b16 $0, [$1];", touches="memory")
def load_global_b16(address: B64) -> B16:
    """Load 2 bytes, 2-byte aligned."""


@_instruction(
    "{ .reg .b32 byte; .reg .pred set; ld.global.u8 byte, [$1]; setp.ne.b32 set, byte, 0; "
    "selp.f32 $0, $2, 0fFF800000, set; }",
    touches="memory",
)
def keep_where_byte(address: B64, x: F32) -> F32:
    """Return x where the byte at `address` is not 0, else -inf."""


# The constants: minus infinity; the lowest bias that is finite in base 2, as which masks made of the lowest float32
# count; log2(e).
@_instruction(
    "{ .reg .pred hides; .reg .f32 sum; setp.eq.f32 hides, $1, 0fFF800000; max.NaN.f32 sum, $1, 0fFF317216; "
    "fma.rn.f32 sum, sum, 0f3FB8AA3B, $2; selp.f32 $0, 0fFF800000, sum, hides; }",
    touches="nothing",
)
def add_bias(bias: F32, score: F32) -> F32:
    """Return score + bias * log2(e), and -inf where `bias` is -inf, be the score NaN.

    Emitted where it stands, so that no load waits for it in a register.
    """


# ---- arithmetic -------------------------------------------------------------------------------------------------


@_instruction("mad.wide.s32 $0, $1, $2, $3;")
def multiply_add_wide(x: B32, y: B32, z: B64) -> B64:
    """Return x * y + z, the product in 64 bits."""


@_instruction("ex2.approx.ftz.f32 $0, $1;")
def exp2(x: F32) -> F32:
    """Two to the power x, within 2 units in the last place; minus infinity gives 0."""


@_instruction("lg2.approx.ftz.f32 $0, $1;")
def log2(x: F32) -> F32:
    """The logarithm of x to base 2, with an absolute error of 2^-22; 0 gives minus infinity."""


@_instruction("rcp.approx.ftz.f32 $0, $1;")
def reciprocal(x: F32) -> F32:
    """Return 1 / x within 1 unit in the last place."""


@_instruction("abs.f32 $0, $1;")
def absolute(x: F32) -> F32:
    """Return |x|."""


@_instruction("max.f32 $0, $1, $2;")
def maximum(x: F32, y: F32) -> F32:
    """Return the larger one; a NaN loses."""


@_instruction("cvt.rn.f16x2.f32 $0, $2, $1;")
def pack_f16(low: F32, high: F32) -> B32:
    """Round two floats to float16, the first into the low half."""


@_instruction("cvt.rn.bf16x2.f32 $0, $2, $1;")
def pack_bf16(low: F32, high: F32) -> B32:
    """Round two floats to bfloat16, the first into the low half."""


@_instruction("{ .reg .b16 low, high; mov.b32 {low, high}, $2; cvt.f32.f16 $0, low; cvt.f32.f16 $1, high; }")
def unpack_f16(pair: B32) -> tuple[F32, F32]:
    """Widen two float16, the one in the low half first."""


@_instruction("{ shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000; }")
def unpack_bf16(pair: B32) -> tuple[F32, F32]:
    """Widen two bfloat16, the one in the low half first."""


@_instruction("cvt.f32.f16 $0, $1;")
def f16_to_f32(x: B16) -> F32:
    """Widen a float16."""


@_instruction("{ .reg .b16 zero; mov.b16 zero, 0; mov.b32 $0, {zero, $1}; }")
def bf16_to_f32(x: B16) -> F32:
    """Widen a bfloat16: its 16 bits are the upper half of a float's."""


# ---- the warp ---------------------------------------------------------------------------------------------------


@_instruction(
    "{ .reg .pred any, mine; setp.ne.b32 mine, $1, 0; vote.sync.any.pred any, mine, 0xffffffff; "
    "selp.b32 $0, 1, 0, any; }",
    touches="warp",
)
def vote_any(mine: B32) -> B32:
    """Return 1 where `mine` is not 0 in any lane, else 0; all 32 lanes call it."""


@_instruction("shfl.sync.bfly.b32 $0, $1, <mask>, 31, 0xffffffff;", touches="warp")
def shuffle_xor(x: F32, mask: Immediate) -> F32:
    """Return the `x` of lane `lane ^ mask`; all 32 lanes call it."""


@_instruction("mov.u32 $0, %<register>;", touches="warp")
def special_register(register: Immediate) -> B32:
    """Return a special register, read anew at each call: what is read again need not be kept meanwhile."""


@_instruction("mov.u32 $0, %laneid;")
def lane_id() -> B32:
    """Return the thread's lane in its warp, 0 to 31."""


def read_anew(register: str) -> Any:
    """Return a device function () -> that special register, by `special_register`."""

    def emit(_context: Any, builder: Any, _signature: Any, _values: Any) -> ir.Value:
        return special_register.emit(builder, register)

    return device_intrinsic(emit, [], B32.numba)


block_x, block_y, block_z, blocks_z, thread_x = (
    read_anew(register) for register in ("ctaid.x", "ctaid.y", "ctaid.z", "nctaid.z", "tid.x")
)


def _shared_memory(context: Any, builder: Any, signature: Any, values: Any) -> ir.Value:
    """Return the 32-bit address of a shared array, as ldmatrix and cp.async want it."""
    data = context.make_array(signature.args[0])(context, builder, values[0]).data
    shared = builder.addrspacecast(data, ir.PointerType(data.type.pointee, 3)) if data.type.addrspace != 3 else data
    return builder.ptrtoint(shared, B32.llvm)


shared_memory = device_intrinsic(_shared_memory, [None], B32.numba)

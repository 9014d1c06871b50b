"""Turning emitted LLVM IR into a function that compiled code can call."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import reduce
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

__all__ = ["Emitter", "choice", "function_at", "instruction"]

_SELECTOR_BITS = 6

_LLVM = {
    types.void: ir.VoidType(),
    types.int32: ir.IntType(32),
    types.uint32: ir.IntType(32),
    types.int64: ir.IntType(64),
}

# Emits IR from a builder and the operands' values; returns the result's value, or None for nothing.
Emitter = Callable[..., ir.Value | None]


def instruction(result: types.Type, operands: tuple[types.Type, ...], emitter: Emitter) -> Any:
    """A function of `operands` in compiled code, made of what `emitter(builder, *operands)` emits."""
    signature = result(*operands)

    def codegen(context: Any, builder: ir.IRBuilder, _: Any, args: Any) -> ir.Value:
        value = emitter(builder, *args)
        return context.get_dummy_value() if value is None else value

    def typed(*_: types.Type) -> Any:
        return signature, codegen

    # Numba matches arguments with parameters by name, and knows no *args here: the typing context, then the operands.
    names = ["typing_context", *(f"operand{i}" for i in range(len(operands)))]
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [inspect.Parameter(name, kind) for name in names]
    typed.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # functions may have one
    return intrinsic(typed)


def function_at(result: types.Type, operands: tuple[types.Type, ...]) -> Any:
    """A function of an address and `operands`, that calls the C function which is there."""
    kind = ir.FunctionType(_LLVM[result], [_LLVM[operand] for operand in operands])

    def emitter(builder: ir.IRBuilder, address: ir.Value, *values: ir.Value) -> ir.Value | None:
        value = builder.call(builder.inttoptr(address, kind.as_pointer()), values)
        return None if result == types.void else value

    return instruction(result, (types.int64, *operands), emitter)


def choice(emitters: Mapping[tuple[int, ...], Emitter], operands: int) -> Any:
    """A function without a result, whose first arguments say what code it runs; all are int64.

    It is one function for Numba, which compiles functions that call each other anew for each level of them.

    Args:
        emitters: By those first arguments, each from 0 to 63; others run nothing.
        operands: How many arguments follow, the emitters' operands.
    """
    selectors = len(next(iter(emitters)))

    def emitter(builder: ir.IRBuilder, *values: ir.Value) -> None:
        wanted = values[0]
        for value in values[1:selectors]:
            wanted = builder.or_(builder.shl(wanted, wanted.type(_SELECTOR_BITS)), value)
        after = builder.append_basic_block("after")
        switch = builder.switch(wanted, after)
        for which, emit in emitters.items():
            block = builder.append_basic_block("case")
            switch.add_case(reduce(lambda number, one: number << _SELECTOR_BITS | one, which), block)
            builder.position_at_end(block)
            emit(builder, *values[selectors:])
            builder.branch(after)
        builder.position_at_end(after)

    return instruction(types.void, (types.int64,) * (selectors + operands), emitter)

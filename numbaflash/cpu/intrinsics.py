"""Turning emitted LLVM IR into a function that compiled code can call."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

__all__ = ["Emitter", "instruction"]

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

"""One call, as the kernels see it: a record of addresses, strides and options that all threads share."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
from llvmlite import ir
from numba import from_dtype, types
from numpy.typing import NDArray

from .intrinsics import Emitter, instruction
from .jit import native
from .vector import atomic_add

__all__ = [
    "BOOL_BIAS",
    "ITEMS_DONE",
    "NO_BIAS",
    "TASK",
    "make_task",
    "record_at",
    "report_item",
    "take_item",
    "task_at",
]

# What bias_dtype says beside the codes of the dtypes.
BOOL_BIAS = 3
NO_BIAS = -1

# Addresses and strides are in bytes; an address of 0 means that the call has no such array.
_INTEGERS = (
    # The work: items are taken by adding to next_item, and reported by adding to items_done.
    *("next_item", "items_done", "items", "rows_per_item", "splits"),
    *("sequences", "q_tokens", "q_heads", "kv_heads", "group", "head_dim", "value_dim"),
    # q_bounds: where sequences have different numbers of tokens, and lie one behind the other (q_batch is 0 then).
    *("q", "q_batch", "q_token", "q_head", "q_dtype", "q_bounds"),
    *("out", "out_batch", "out_token", "out_head"),
    *("lse", "lse_batch", "lse_head", "lse_token"),
    # KVRuns and Visibility.
    *("runs", "bounds", "kv_dtype", "q_start", "left", "right", "sinks"),
    # Codes.
    *("codes", "code_bits", "key_group", "value_group", "symmetric", "page_size"),
    # Scoring.
    *("alibi_slopes", "sink_logits"),
    *("bias", "bias_batch", "bias_head", "bias_row", "bias_key", "bias_dtype"),
    # What an algorithm keeps between items, in its own layout; and, in decode, how many splits of a unit are done.
    *("workspace", "splits_done"),
)
TASK = np.dtype([(name, np.int64) for name in _INTEGERS] + [("scale", np.float32), ("softcap", np.float32)])

_ZEROS = dict.fromkeys(_INTEGERS, 0)
_PACKED = struct.Struct(f"={len(_INTEGERS)}q2f")
NEXT_ITEM, ITEMS_DONE = (8 * _INTEGERS.index(name) for name in ("next_item", "items_done"))


def make_task(*, scale: float = 0.0, softcap: float = 0.0, **integers: int) -> NDArray[Any]:
    """One TASK record; fields that are not named are 0."""
    values = {**_ZEROS, **integers}  # in the order of the record
    if len(values) > len(_ZEROS):
        raise TypeError(f"a task has no field {', '.join(integers.keys() - _ZEROS.keys())}")
    return np.frombuffer(bytearray(_PACKED.pack(*values.values(), scale, softcap)), TASK)


def record_at(dtype: np.dtype[Any]) -> tuple[types.Type, tuple[types.Type, ...], Emitter]:
    """What `instruction` takes to make a function from an address to the record that lies there."""

    def emitter(builder: ir.IRBuilder, address: ir.Value) -> ir.Value:
        return builder.inttoptr(address, ir.ArrayType(ir.IntType(8), dtype.itemsize).as_pointer())

    return from_dtype(dtype), (types.int64,), emitter


task_at = instruction(*record_at(TASK))


@native
def take_item(task_address):
    """The number of a work item that nobody has taken; `items` or more where there is none left."""
    return atomic_add(task_address + NEXT_ITEM, 1)


@native
def report_item(task_address):
    """Tell that a work item is done, and what it wrote can be read."""
    atomic_add(task_address + ITEMS_DONE, 1)

"""Atomic read-modify-write operations, one lane after the other."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from .floatmath import arithmetic

Array = NDArray[Any]
_NAMES = ("exch", "cas", "add", "inc", "dec", "min", "max", "and", "or", "xor")
_EXCH, _CAS, _ADD, _INC, _DEC, _MIN, _MAX, _AND, _OR, _XOR = range(len(_NAMES))


@njit(cache=True)
def _simple(memory: Array, index: Array, operation: int, a: Array, b: Array, old: Array) -> None:
    """exch, cas, add, min, max for any type of element."""
    for i in range(index.size):
        before = memory[index[i]]
        old[i] = before
        if operation == _EXCH:
            memory[index[i]] = a[i]
        elif operation == _CAS:
            if before == a[i]:
                memory[index[i]] = b[i]
        elif operation == _ADD:
            memory[index[i]] = before + a[i]
        elif operation == _MIN:
            memory[index[i]] = min(before, a[i])
        else:
            memory[index[i]] = max(before, a[i])


@njit(cache=True)
def _integer(memory: Array, index: Array, operation: int, a: Array, old: Array) -> None:
    """inc, dec, and, or, xor for unsigned integers."""
    for i in range(index.size):
        before = memory[index[i]]
        old[i] = before
        if operation == _INC:
            memory[index[i]] = 0 if before >= a[i] else before + 1
        elif operation == _DEC:
            memory[index[i]] = a[i] if before == 0 or before > a[i] else before - 1
        elif operation == _AND:
            memory[index[i]] = before & a[i]
        elif operation == _OR:
            memory[index[i]] = before | a[i]
        else:
            memory[index[i]] = before ^ a[i]


def atomic(data: Array, at: Array, name: str, kind: str, values: tuple[Array, ...]) -> Array:
    """Does one operation per lane, in order.

    Args:
        data: Bytes of the memory.
        at: Where each lane's element starts in it.
        name: exch, cas, add, inc, dec, min, max, and, or, xor.
        kind: PTX type.
        values: Operands in the NumPy form of the type.

    Returns:
        What each lane found, in the same form.
    """
    first = np.ascontiguousarray(np.broadcast_to(values[0], at.shape))
    memory = data.view(first.dtype)
    index = at // first.dtype.itemsize
    old = np.empty(at.shape, first.dtype)
    if "f16" in kind:
        for i, place in enumerate(index):
            old[i] = memory[place]
            total = arithmetic("add", kind, "rn", (False, False, False), memory[place : place + 1], first[i : i + 1])
            memory[place] = total[0]
        return old
    operation = _NAMES.index(name)
    if operation in (_INC, _DEC, _AND, _OR, _XOR):
        _integer(memory, index, operation, first, old)
    else:
        second = np.ascontiguousarray(np.broadcast_to(values[-1], at.shape))
        _simple(memory, index, operation, first, second, old)
    return old

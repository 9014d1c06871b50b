"""Arguments of a launch: arrays placed in global memory, scalars packed into the parameter bank."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import EmulatorError, Place
from .ir import SIZES, Variable
from .memory import ALIGNMENT, BASE, GlobalMemory
from .program import Program, readable

Array = NDArray[Any]


def pack(program: Program, values: Sequence[int | float | np.generic]) -> Array:
    """The parameter bank for one scalar per parameter.

    Raises:
        EmulatorError: The count is wrong, or a value does not fit its parameter.
    """
    if len(values) != len(program.params):
        raise EmulatorError(
            f"{len(values)} arguments for a kernel of {len(program.params)} parameters",
            kind="argument",
            place=Place(readable(program.name)),
        )
    size = max((offset + param.size for param, offset in program.params), default=0)
    bank = np.zeros(max(size, 1), np.uint8)
    for position, ((param, offset), value) in enumerate(zip(program.params, values, strict=True)):
        bank[offset : offset + param.size] = np.frombuffer(_encode(param, value, position, program.name), np.uint8)
    return bank


def _encode(param: Variable, value: Any, position: int, kernel: str) -> bytes:
    """The bytes of one argument."""

    def wrong(accepted: str) -> EmulatorError:
        return EmulatorError(
            f"argument {position} is {value!r} ({type(value).__name__}); the kernel takes {accepted}",
            kind="argument",
            place=Place(readable(kernel)),
        )

    if param.size != SIZES[param.type]:
        raise wrong(f"a structure of {param.size} bytes, which cannot be passed")
    if isinstance(value, np.generic) and value.dtype.itemsize == param.size and value.dtype.kind in "iufb":
        floating = param.type[0] == "f"
        if (value.dtype.kind == "f") != floating and param.type[0] != "b":
            raise wrong(f"a .{param.type}")
        return value.tobytes()
    if isinstance(value, np.generic):
        value = value.item()
    if param.type in ("f32", "f64"):
        if not isinstance(value, int | float):
            raise wrong(f"a number (.{param.type})")
        return np.array(value, f"f{param.size}").tobytes()
    if not isinstance(value, int):
        raise wrong(f"an integer (.{param.type})")
    bits = 8 * param.size
    if not -(1 << bits - 1) <= value < 1 << bits:
        raise wrong(f"an integer of {bits} bits")
    return (value & (1 << bits) - 1).to_bytes(param.size, "little")


class Arguments:
    """NumPy arrays placed in global memory for a launch, and taken back from it."""

    def __init__(self, memory: GlobalMemory) -> None:
        self.memory = memory
        self._ranges: list[tuple[int, int, int]] = []
        self._arrays: list[Array] = []

    def place(self, arrays: list[Array]) -> None:
        """Copies in; arrays that overlap keep their distance, and views the offset into their buffer."""
        spans = sorted((*np.lib.array_utils.byte_bounds(x), _origin(x)) for x in arrays if x.size)
        merged: list[tuple[int, int, int]] = []
        for low, high, origin in spans:
            if merged and low < merged[-1][1]:
                merged[-1] = (merged[-1][0], max(high, merged[-1][1]), merged[-1][2])
            else:
                merged.append((low, high, origin))
        for low, high, origin in merged:
            address = self.memory.allocate(high - low, (low - origin) % ALIGNMENT)
            self._ranges.append((low, high, address))
        for array in arrays:
            if array.size:
                self._window(array)[...] = array
                self._arrays.append(array)

    def address(self, array: Array) -> int:
        """Where an array lies."""
        if not array.size:
            return BASE
        low, _ = np.lib.array_utils.byte_bounds(array)
        start = int(array.__array_interface__["data"][0])
        begin, _, address = next(x for x in self._ranges if x[0] <= low < x[1])
        return address + start - begin

    def _window(self, array: Array) -> Array:
        """The array's elements in global memory."""
        low, high = np.lib.array_utils.byte_bounds(array)
        offset = array.__array_interface__["data"][0] - low
        window = self.memory.view(self.address(array) - offset, high - low)
        return np.ndarray(array.shape, array.dtype, window, offset, array.strides)

    def take_back(self) -> None:
        """Copies what the kernel wrote into the arrays."""
        for array in self._arrays:
            window = self._window(array)
            if array.flags.writeable:
                array[...] = window
            elif window.tobytes() != array.tobytes():
                raise EmulatorError("the kernel wrote to an array that is read-only", kind="argument")


def _origin(array: Array) -> int:
    """The address at which the buffer of a view starts."""
    base = array
    while isinstance(base.base, np.ndarray):
        base = base.base
    return int(np.lib.array_utils.byte_bounds(base)[0])


_CODES = {
    "b": "bool",
    "a": "int8",
    "h": "uint8",
    "s": "int16",
    "t": "uint16",
    "i": "int32",
    "j": "uint32",
    "x": "int64",
    "y": "uint64",
    "f": "float32",
    "d": "float64",
    "Dh": "float16",
}
_MANGLED_ARRAY = re.compile(r"5ArrayI(\w\w?)Li(\d)E1([CFA])7")


def leaves(args: Sequence[Any]) -> list[Any]:
    """The arrays and scalars of arguments: tuples hold several, a complex number is two floats."""
    found: list[Any] = []
    for value in args:
        if isinstance(value, tuple):
            found += leaves(value)
        elif isinstance(value, complex | np.complexfloating):
            found += [value.real, value.imag]
        else:
            found.append(value)
    return found


def flatten(program: Program, args: Sequence[Any], placed: Arguments) -> list[Any]:
    """Arguments -> one scalar per parameter.

    In the Numba ABI an array is (meminfo, parent, item count, item size, data, shape, strides), and tuples are their
    members; a kernel that has as many parameters as there are arguments gets the addresses of arrays instead.
    """
    args = leaves(args)
    if len(args) == len(program.params):
        return [placed.address(x) if isinstance(x, np.ndarray) else x for x in args]
    declared = _MANGLED_ARRAY.findall(program.name)
    arrays = [x for x in args if isinstance(x, np.ndarray)]
    if declared and len(declared) == len(arrays):
        for position, (array, (code, ndim, layout)) in enumerate(zip(arrays, declared, strict=True)):
            _compare(position, array, _CODES.get(code), int(ndim), layout, program.name)
    values: list[Any] = []
    for value in args:
        if isinstance(value, np.ndarray):
            values += [0, 0, value.size, value.itemsize, placed.address(value), *value.shape, *value.strides]
        else:
            values.append(value)
    return values


def _compare(position: int, array: Array, dtype: str | None, ndim: int, layout: str, kernel: str) -> None:
    """Holds an array against the type that the mangled name of the kernel declares."""
    contiguous = {"C": array.flags.c_contiguous, "F": array.flags.f_contiguous, "A": True}[layout]
    if array.ndim != ndim or not contiguous or (dtype is not None and array.dtype != np.dtype(dtype)):
        raise EmulatorError(
            f"array {position} is {array.dtype} with {array.ndim} dimensions and strides {array.strides}; the kernel "
            f"was compiled for {dtype or 'another type'} with {ndim} dimensions, layout {layout}",
            kind="argument",
            place=Place(readable(kernel)),
        )

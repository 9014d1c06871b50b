"""Records of integers that compiled functions find at an address, and Python by their names."""

from __future__ import annotations

import ctypes
import struct
from typing import Any, ClassVar, Self

import numpy as np
from llvmlite import ir
from numba import from_dtype, types
from numpy.typing import NDArray

from .intrinsics import instruction

__all__ = ["Record", "address_of", "address_of_array", "record_at"]

_address, _first_byte = ctypes.addressof, ctypes.c_char.from_buffer
_pointer_at = ctypes.c_void_p.from_address
_OBJECT_HEAD = object.__basicsize__


class Record:
    """Memory of one record, whose integers are had and set by their names; fields that are not given are 0.

    One costs a few microseconds less than NumPy's structured arrays do, and a copy of one costs one microsecond; there
    is one for each call.

    Args:
        fields: By name.

    Attributes:
        address: Of the record, for as long as this object lives.
    """

    __slots__ = ("_integers", "_memory", "address")

    dtype: ClassVar[np.dtype[Any]]
    _packed: ClassVar[struct.Struct]
    _zeros: ClassVar[dict[str, float]]
    _places: ClassVar[dict[str, int]]

    def __init_subclass__(cls, integers: tuple[str, ...], floats: tuple[str, ...] = ()) -> None:
        """Lay a kind of records out: int64, and behind them an even number of float32."""
        super().__init_subclass__()
        cls.dtype = np.dtype([(name, np.int64) for name in integers] + [(name, np.float32) for name in floats])
        cls._packed = struct.Struct(f"={len(integers)}q{len(floats)}f")
        cls._zeros = dict.fromkeys((*integers, *floats), 0)
        cls._places = {name: place for place, name in enumerate(integers)}

    def __init__(self, **fields: float) -> None:
        values = {**self._zeros, **fields}  # in the order of the record
        if len(values) > len(self._zeros):
            raise TypeError(f"{type(self).__name__} has no field {', '.join(fields.keys() - self._zeros.keys())}")
        self._hold(self._packed.pack(*values.values()))

    def __getitem__(self, name: str) -> int:
        return self._integers[self._places[name]]

    def __setitem__(self, name: str, value: int) -> None:
        self._integers[self._places[name]] = value

    def set_from(self, name: str, *values: int) -> None:
        """Set the integer of that name, and those that follow it."""
        struct.pack_into(f"={len(values)}q", self._memory, self.offset_of(name), *values)

    def copy(self) -> Self:
        """Return a record of its own that holds the same."""
        twin = object.__new__(type(self))
        twin._hold(self._memory)
        return twin

    @classmethod
    def offset_of(cls, name: str) -> int:
        """Bytes from the record's address to an integer."""
        return 8 * cls._places[name]

    def _hold(self, content: bytes | bytearray) -> None:
        self._memory = memory = bytearray(content)
        self._integers = memoryview(memory).cast("q")
        self.address = address_of(memory)


def address_of(memory: Any) -> int:
    """Return the address of memory of our own, that may be written and lies in one piece; 0 where it has no items.

    NumPy takes three times as long to tell it.
    """
    return _address(_first_byte(memory)) if len(memory) else 0


def address_of_array(array: NDArray[Any]) -> int:
    """Return the address of an array's first element, in a quarter of the microsecond that `array.ctypes` takes.

    It stands right behind the object's head, as every extension reads it there: NumPy's C API, `PyArrayObject_fields`.
    """
    address: int = _pointer_at(id(array) + _OBJECT_HEAD).value or 0
    return address


def record_at(dtype: np.dtype[Any]) -> Any:
    """Make a compiled function from an address to the record that lies there."""

    def emitter(builder: ir.IRBuilder, address: ir.Value) -> ir.Value:
        return builder.inttoptr(address, ir.ArrayType(ir.IntType(8), dtype.itemsize).as_pointer())

    return instruction(from_dtype(dtype), (types.int64,), emitter)

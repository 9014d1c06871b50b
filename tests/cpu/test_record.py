"""Records of integers, and where arrays lie."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from numbaflash.cpu.record import Record, address_of, address_of_array


class Three(Record, integers=("a", "b", "c"), floats=("x", "y")):
    """A record to test with."""


def fields_at(address: int) -> Any:
    memory = (ctypes.c_byte * Three.dtype.itemsize).from_address(address)
    return np.frombuffer(memory, Three.dtype)[0]


def test_a_record_lies_at_its_address() -> None:
    record = Three(a=1, c=-3, x=0.5)
    record["b"] = 1 << 40
    assert fields_at(record.address).tolist() == (1, 1 << 40, -3, 0.5, 0.0)


def test_integers_that_follow_each_other_are_set_from_the_first_one_on() -> None:
    record = Three(a=1)
    record.set_from("b", 5, -6)
    assert [record[name] for name in "abc"] == [1, 5, -6]


def test_a_copy_has_memory_of_its_own() -> None:
    record = Three(a=1, y=0.25)
    copy = record.copy()
    copy["a"] = 2
    assert fields_at(record.address).tolist() == (1, 0, 0, 0.0, 0.25)
    assert fields_at(copy.address).tolist() == (2, 0, 0, 0.0, 0.25)


def test_a_field_that_there_is_not_is_named() -> None:
    with pytest.raises(TypeError, match="Three has no field d"):
        Three(d=1)


def arrays() -> list[NDArray[Any]]:
    whole = np.arange(24.0).reshape(2, 3, 4)
    read_only = whole.copy()
    read_only.flags.writeable = False
    return [whole, whole[1:, ::2, 1:], whole[::-1], read_only, np.broadcast_to(whole[0, 0], (5, 4)), np.array(1.0)]


@pytest.mark.parametrize("array", arrays(), ids=["whole", "part", "backwards", "read-only", "broadcast", "scalar"])
def test_the_address_of_an_array_is_that_of_its_first_element(array: NDArray[Any]) -> None:
    assert address_of_array(array) == array.ctypes.data


def test_memory_of_our_own_has_the_address_that_numpy_sees() -> None:
    memory = bytearray(16)
    assert address_of(memory) == np.frombuffer(memory, np.uint8).ctypes.data
    assert address_of(bytearray()) == 0

"""Global memory: one arena of bytes, with allocations apart from each other so that overruns show."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import EmulatorError

Array = NDArray[Any]
BASE = 1 << 36
"""Address of the first byte of global memory."""
ALIGNMENT = 256
"""What an allocation is aligned to, as by cudaMalloc, and no more than that."""
_POISON = 0xFF


class GlobalMemory:
    """Allocations by address.

    Attributes:
        data: All bytes; the address of byte 0 is `BASE`.
        valid: 1 for each byte that belongs to an allocation.
    """

    def __init__(self, capacity: int = 1 << 16, limit: int = 1 << 36) -> None:
        """Makes an arena.

        Args:
            capacity: Bytes at the start; it grows.
            limit: Bytes that it may grow to.
        """
        self._limit = limit
        self.data = np.full(capacity, _POISON, np.uint8)
        self.valid = np.zeros(capacity, np.uint8)
        self._sizes: dict[int, int] = {}
        self._free: list[tuple[int, int]] = [(0, capacity)]

    def allocate(self, nbytes: int, offset: int = 0) -> int:
        """Reserves bytes, filled with poison (NaN in every float type).

        Args:
            nbytes: How many; 0 is allowed.
            offset: Bytes past an aligned address, for views that do not start at the start of their buffer.

        Returns:
            The address: `offset` past a multiple of `ALIGNMENT` that is none of twice that.

        Raises:
            MemoryError: The arena would grow over its limit.
        """
        room = -(-(offset + nbytes + 1) // ALIGNMENT) * ALIGNMENT + ALIGNMENT
        room += room % (2 * ALIGNMENT)
        for position, (start, size) in enumerate(self._free):
            if size >= room:
                self._free[position] = (start + room, size - room)
                break
        else:
            start = self._grow(room)
        begin = start + ALIGNMENT + offset
        self._sizes[BASE + begin] = nbytes
        self.data[begin : begin + nbytes] = _POISON
        self.valid[begin : begin + nbytes] = 1
        return BASE + begin

    def _grow(self, room: int) -> int:
        start = self.data.size
        if start + room > self._limit:
            raise MemoryError(f"{room} bytes more than the {start} of {self._limit} in use")
        size = min(max(room, start), self._limit - start)
        self.data = np.concatenate([self.data, np.full(size, _POISON, np.uint8)])
        self.valid = np.concatenate([self.valid, np.zeros(size, np.uint8)])
        self._free.append((start + room, size - room))
        return start

    def free(self, address: int) -> None:
        """Gives an allocation back; its bytes are out of bounds from then on."""
        nbytes = self._sizes.pop(address, None)
        if nbytes is None:
            raise EmulatorError(f"free of {address:#x}, which is no allocation", kind="argument")
        begin = address - BASE
        self.valid[begin : begin + nbytes] = 0
        start = begin // ALIGNMENT * ALIGNMENT
        start -= start % (2 * ALIGNMENT)
        room = -(-(begin - start + nbytes + 1) // (2 * ALIGNMENT)) * (2 * ALIGNMENT)
        self._release(start, room)

    def _release(self, start: int, room: int) -> None:
        """Puts a range back, joined with its free neighbours."""
        merged: list[tuple[int, int]] = []
        for begin, size in sorted([*self._free, (start, room)]):
            if merged and merged[-1][0] + merged[-1][1] == begin:
                merged[-1] = (merged[-1][0], merged[-1][1] + size)
            else:
                merged.append((begin, size))
        self._free = merged

    def view(self, address: int, nbytes: int) -> Array:
        """The bytes at an address, which must lie in allocations."""
        begin = address - BASE
        inside = begin >= 0 and begin + nbytes <= self.data.size
        if not inside or not self.valid[begin : begin + nbytes].all():
            raise EmulatorError(f"{nbytes} bytes at {address:#x} are not allocated", kind="bounds")
        return self.data[begin : begin + nbytes]

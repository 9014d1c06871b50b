"""Memory that the engine uses again for every launch."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

_ALIGNMENT: Final = 64
_ELEMENT: Final = 4  # bytes of the largest; kernels are as fast from there as from a cache line's start


class Scratch:
    """Memory that is used again for every launch: tensors off the wire lie anywhere, kernels want aligned elements."""

    def __init__(self) -> None:
        self._memory = np.empty(0, np.uint8)
        self._used = 0

    def clear(self) -> None:
        """Give up everything handed out before."""
        self._used = 0

    def align(self, payload: memoryview) -> NDArray[np.uint8]:
        """Return a payload as it lies, or copied to an aligned address where its elements are not aligned."""
        given = np.frombuffer(payload, np.uint8)
        if given.ctypes.data % _ELEMENT == 0:
            return given
        memory = self._take(len(payload))
        memory[:] = given
        return memory

    def stack(self, arrays: list[NDArray[Any]]) -> NDArray[Any]:
        """Copy arrays of one shape and dtype next to each other, on an aligned address."""
        first = arrays[0]
        stacked = self._take(len(arrays) * first.nbytes).view(first.dtype).reshape(len(arrays), *first.shape)
        return np.stack(arrays, out=stacked)

    def _take(self, nbytes: int) -> NDArray[np.uint8]:
        if self._used + nbytes > len(self._memory):
            self._grow(nbytes)
        start = self._used
        self._used += nbytes + -nbytes % _ALIGNMENT
        return self._memory[start : start + nbytes]

    def _grow(self, nbytes: int) -> None:
        # What was handed out keeps the old memory alive.
        raw = np.empty(2 * (len(self._memory) + nbytes) + _ALIGNMENT, np.uint8)
        offset = -raw.ctypes.data % _ALIGNMENT
        self._memory = raw[offset : len(raw) - _ALIGNMENT + offset]
        self._used = 0

"""The threads that execute one instruction together, and how their values lie in arrays."""

# mypy: disable-error-code="no-any-return"
# Operators on NDArray[Any] are typed Any.

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
WARP = 32


class Group:
    """Some lanes of the blocks that run together, in ascending order.

    A register of the group is an array with one element per active lane. In the register file every lane has a place.

    Attributes:
        lanes: Numbers of the active lanes.
        n: How many they are.
        full: Whether they are all lanes there are.
        whole: Whether each of their warps has all of its 32 lanes here.
    """

    def __init__(self, lanes: Array, total: int, alive: Array) -> None:
        self.lanes = lanes
        self.n = lanes.size
        self.full = self.n == total
        self._alive = alive
        if self.full:
            self.whole = True
        else:
            warps = lanes // WARP
            ends = warps[WARP - 1 :: WARP]
            self.whole = self.n % WARP == 0 and bool(np.array_equal(warps[::WARP], ends))

    def take(self, array: Array) -> Array:
        """The active lanes' elements of an array over all lanes."""
        return array if self.full else array[self.lanes]

    def put(self, array: Array, values: Array) -> Array:
        """An array over all lanes with the active lanes' elements replaced."""
        if self.full:
            return values
        changed = array.copy()
        changed[self.lanes] = values
        return changed

    def fill(self, value: Any) -> Array:
        """One value for every lane."""
        return np.full(self.n, value)

    def wide(self, value: Array) -> Array:
        """An array, or one value for every lane."""
        return value if value.shape == (self.n,) else np.broadcast_to(value, self.n).copy()

    def zero(self, dtype: Any) -> Array:
        """Zeros for every lane."""
        return np.zeros(self.n, dtype)

    @cached_property
    def converged(self) -> Array:
        """Per lane: whether all living lanes of its warp are here."""
        if self.whole:
            return np.ones(self.n, np.bool_)
        here = np.bincount(self.lanes // WARP, minlength=self._alive.size // WARP)
        living = self._alive.reshape(-1, WARP).sum(axis=1)
        return (here == living)[self.lanes // WARP]

    @cached_property
    def warps(self) -> Array:
        """Numbers of the warps that have a lane here."""
        return self.lanes[::WARP] // WARP if self.whole else np.unique(self.lanes // WARP)

    @cached_property
    def slots(self) -> Array:
        """Place of each lane in a (warps here, 32) array."""
        if self.whole:
            return np.arange(self.n)
        return np.searchsorted(self.warps, self.lanes // WARP) * WARP + self.lanes % WARP

    def spread(self, values: Array) -> Array:
        """The values as a (warps here, 32) array; zero in lanes that are not here."""
        values = np.broadcast_to(values, self.n)
        if self.whole:
            return values.reshape(-1, WARP)
        wide = np.zeros(self.warps.size * WARP, values.dtype)
        wide[self.slots] = values
        return wide.reshape(-1, WARP)

    def gather(self, wide: Array) -> Array:
        """The active lanes' elements of a (warps here, 32) array."""
        flat = np.ascontiguousarray(wide).reshape(-1)
        return flat if self.whole else flat[self.slots]

    @cached_property
    def present(self) -> Array:
        """(warps here, 32): which lanes are here."""
        return self.spread(np.ones(self.n, np.bool_))

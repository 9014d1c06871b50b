"""What hardware does not check, by number: the codes that the compiled checks hand back, and local memory.

The checks are compiled with Numba: one pass over the active lanes per memory instruction, in `shared_checks` and
`global_checks`. Each function returns (code, lane position, other party); the code is 0 or one of those in `FAULTS`.

Shadow state is kept per granule: as many bytes as the narrowest access of the kernel to that space. Accesses are
aligned, so each covers whole granules.
"""

from __future__ import annotations

from typing import Any

from numba import njit
from numpy.typing import NDArray

Array = NDArray[Any]

OK, BOUNDS, ALIGNMENT, UNINITIALIZED, IN_FLIGHT, READ_AFTER_WRITE, WRITE_AFTER_WRITE, WRITE_AFTER_READ = range(8)
FAULTS = {
    BOUNDS: "bounds",
    ALIGNMENT: "alignment",
    UNINITIALIZED: "uninitialized",
    IN_FLIGHT: "in-flight",
    READ_AFTER_WRITE: "race",
    WRITE_AFTER_WRITE: "race",
    WRITE_AFTER_READ: "race",
}

# States of a granule of shared or local memory; OUTSIDE lies between variables.
FRESH, READY, PENDING, OUTSIDE = 0, 1, 2, 3

# How an access orders itself with others to its place: not at all; as strong ones do (volatile, relaxed, acquire,
# release, and atomics whose result nobody reads); as an atomic that learns what stood there, and so comes after it.
WEAK, STRONG, OBSERVING = 0, 1, 2


@njit(cache=True)
def local_access(
    state: Array, lanes: Array, address: Array, size: int, limit: int, write: bool, initialized: bool
) -> tuple[int, int, int]:
    """Checks one access to local memory, a private array per lane, and marks what it writes."""
    for i in range(lanes.size):
        at = address[i]
        if at < 0 or at + size > limit:
            return BOUNDS, i, -1
        if at & (size - 1):
            return ALIGNMENT, i, -1
        for byte in range(at, at + size):
            if write:
                state[lanes[i], byte] = READY
            elif initialized and state[lanes[i], byte] == FRESH:
                return UNINITIALIZED, i, -1
    return OK, 0, 0

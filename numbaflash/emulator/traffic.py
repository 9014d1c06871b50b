"""What the memory of the hardware would take for an access: wavefronts of shared memory, sectors of global memory."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

Array = NDArray[Any]


@njit(cache=True)
def bank_wavefronts(lanes: Array, address: Array, size: int) -> tuple[int, int]:
    """Wavefronts that a shared-memory access takes, and the fewest that accesses of its width could take.

    32 banks of 4 bytes; one wavefront serves one word of each bank. Lanes go together by 32 (up to 4 bytes each), 16
    (8 bytes) or 8 (16 bytes); lanes that want the same word share it.
    """
    group = 32 if size <= 4 else 128 // size
    words = max(size // 4, 1)
    seen = np.empty((32, 32), np.int64)
    filled = np.zeros(32, np.int64)
    total = ideal = 0
    i = 0
    while i < lanes.size:
        unit = lanes[i] // group
        filled[:] = 0
        worst = 1
        while i < lanes.size and lanes[i] // group == unit:
            word = address[i] >> 2
            for k in range(word, word + words):
                bank = k & 31
                found = False
                for j in range(filled[bank]):
                    found = found or seen[bank, j] == k
                if not found:
                    seen[bank, filled[bank]] = k
                    filled[bank] += 1
                    worst = max(worst, filled[bank])
            i += 1
        total += worst
        ideal += 1
    return total, ideal


@njit(cache=True)
def sector_traffic(lanes: Array, address: Array, size: int) -> tuple[int, int, int]:
    """Requests (one per warp), 32-byte sectors that they touch, and distinct bytes that they want."""
    sectors = np.empty(1024, np.int64)
    masks = np.empty(1024, np.int64)
    requests = count = wanted = 0
    i = 0
    while i < lanes.size:
        warp = lanes[i] >> 5
        filled = 0
        while i < lanes.size and lanes[i] >> 5 == warp:
            done = 0
            while done < size:
                at = address[i] + done
                inside = min(32 - (at & 31), size - done)
                mask = ((1 << inside) - 1) << (at & 31)
                j = filled - 1
                while j >= 0 and sectors[j] != at >> 5:
                    j -= 1
                if j < 0:
                    sectors[filled] = at >> 5
                    masks[filled] = mask
                    filled += 1
                else:
                    masks[j] |= mask
                done += inside
            i += 1
        requests += 1
        count += filled
        for j in range(filled):
            left = masks[j]
            while left:
                left &= left - 1
                wanted += 1
    return requests, count, wanted

"""Which accesses of a block happen before what other blocks of the launch do.

The model of `order`, with blocks in place of threads: a fence of device scope ends an interval of its block, and what
the block did up to there reaches another block by a strong write after the fence, a strong read over there of what that
wrote (or of what atomics made of it), and a fence after that read. Both fences are needed. Fences, flags and atomics of
a narrower scope do not count.

The threads of a block are not told apart: fence, flag and data may be of different threads. So a block that lacks the
barrier between them is not reported.
"""

# mypy: disable-error-code="no-any-return"
# Operators on NDArray[Any] are typed Any.

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

Array = NDArray[Any]


class GridClocks(NamedTuple):
    """What the compiled checks read; without elements where the kernel has no fence, so that nothing is ordered.

    Attributes:
        own: (blocks,) interval in which a block is, from 1.
        seen: (blocks, blocks) last interval of block u that happened before what block b does now.
    """

    own: Array
    seen: Array


@njit(cache=True)
def ordered_blocks(clocks: GridClocks, block: int, other: int, interval: int, strong: bool) -> bool:
    """Whether an access of another block in an interval happened before what `block` does now.

    A strong one may be the write itself that published the interval before it.
    """
    known = clocks.seen[block, other]
    return known > 0 and interval <= known + strong


class GridOrder:
    """The clocks of the blocks of a launch, and what moves them.

    Attributes:
        clocks: For the compiled checks.
    """

    def __init__(self, blocks: int) -> None:
        """Makes the clocks of so many blocks; of none where there is nothing to follow."""
        self.clocks = GridClocks(np.ones(blocks, np.int32), np.zeros((blocks, blocks), np.int32))
        self._fenced = np.zeros(blocks, np.int32)
        """Interval that a block's last fence ended."""
        self._released: dict[int, Array] = {}
        """By address: the clock that whoever reads the value there can acquire."""
        self._observed: dict[int, Array] = {}
        """By block: what it has read of such clocks, and acquires at its next fence."""

    def fence(self, blocks: Array) -> None:
        """Acquires what the blocks have read of released clocks; their next strong writes release all up to here."""
        own, seen = self.clocks
        for block in np.unique(blocks).tolist() if own.size else ():
            told = self._observed.pop(block, None)
            if told is not None:
                seen[block] = np.maximum(seen[block], told)
            self._fenced[block] = own[block]
            own[block] += 1

    def load(self, blocks: Array, address: Array) -> None:
        """Strong loads: what was released there can be acquired."""
        for block, at in self._pairs(blocks, address):
            self._observe(block, at)

    def store(self, blocks: Array, address: Array) -> None:
        """Strong stores: they release what the block's last fence ended, and nothing of what stood there before."""
        for block, at in self._pairs(blocks, address):
            self._released.pop(at, None)
            self._release(block, at)

    def update(self, blocks: Array, address: Array, wrote: Array) -> None:
        """Atomics, one lane after the other: what was released there stays so, and more is added where they wrote."""
        pairs = self._pairs(blocks, address)
        writers = set(self._pairs(blocks[wrote], address[wrote]))
        for pair in pairs:
            self._observe(*pair)
            if pair in writers:
                self._release(*pair)

    def _pairs(self, blocks: Array, address: Array) -> Iterable[tuple[int, int]]:
        """Each block and address once, in the order of lanes."""
        return dict.fromkeys(zip(blocks.tolist(), address.tolist(), strict=True)) if self.clocks.own.size else ()

    def _observe(self, block: int, address: int) -> None:
        told, known = self._released.get(address), self._observed.get(block)
        if told is not None and told is not known:
            self._observed[block] = told if known is None else np.maximum(known, told)

    def _release(self, block: int, address: int) -> None:
        if not self._fenced[block]:
            return
        told = self.clocks.seen[block].copy()
        told[block] = self._fenced[block]
        before = self._released.get(address)
        self._released[address] = told if before is None else np.maximum(told, before)

"""Which accesses of a block's threads happen before which others (PTX ISA, "Memory Consistency Model").

Every thread counts intervals, and a vector clock says which intervals of the others happened before what it does now
(Flanagan and Freund, "FastTrack", PLDI 2009). What orders threads:

- a barrier: all that its threads did before it, before all that those which waited do after it;
- `bar.warp.sync`: the same for the lanes of its mask;
- a release pattern observed by an acquire pattern: a fence followed by a strong write, and a strong read of what that
  wrote, or of what atomics made of it, followed by a fence.

Lanes of a converged warp run in step: a fence that they execute together is one for all of them. A fence covers what
the thread knows when it writes the flag, so it may also stand before the barrier that gathers the warp.

Barriers of a whole block are by far the most frequent, and cost little: they raise a floor below which everything is
ordered, and leave the clocks alone.
"""

# mypy: disable-error-code="no-any-return"
# Operators on NDArray[Any] are typed Any.

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from .group import WARP, Group

Array = NDArray[Any]


class Clocks(NamedTuple):
    """What the compiled checks read; a thread is counted within its block, whole warps of them.

    Attributes:
        own: (blocks, threads) interval in which a thread is, from 1.
        block_floor: (blocks,) intervals up to this one happened before all that the block does now.
        warp_floor: (blocks, warps) the same among the lanes of a warp.
        seen: (blocks, threads, threads) last interval of thread u that happened before what thread t does now.
        mixed: (1,) whether `seen` holds anything yet.
    """

    own: Array
    block_floor: Array
    warp_floor: Array
    seen: Array
    mixed: Array


@njit(cache=True)
def ordered(clocks: Clocks, block: int, interval: int, other: int, thread: int, strong: bool) -> bool:
    """Whether an access of another thread in an interval happened before what `thread` does now.

    A strong one may be the write itself that published the interval before it.
    """
    if interval <= clocks.block_floor[block]:
        return True
    if other >> 5 == thread >> 5 and interval <= clocks.warp_floor[block, thread >> 5]:
        return True
    known = clocks.seen[block, thread, other] if clocks.mixed[0] else 0
    return known > 0 and interval <= known + strong


@njit(cache=True)
def ordered_after_some(clocks: Clocks, block: int, interval: int, thread: int) -> bool:
    """The same for an interval of one or several lanes of the thread's own warp, not known which."""
    first = thread >> 5 << 5
    for other in range(first, first + 32):
        if other != thread and ordered(clocks, block, interval, other, thread, False):
            return True
    return False


class Order:
    """The clocks of the blocks that run together, and what moves them.

    Attributes:
        clocks: For the compiled checks.
    """

    def __init__(self, blocks: int, threads: int) -> None:
        self.clocks = Clocks(
            own=np.ones((blocks, threads), np.int64),
            block_floor=np.zeros(blocks, np.int64),
            warp_floor=np.zeros((blocks, threads // WARP), np.int64),
            seen=np.zeros((blocks, threads, threads), np.int32),  # untouched pages cost nothing
            mixed=np.zeros(1, np.uint8),
        )
        self._threads = threads
        self._fenced = np.zeros((blocks, threads), np.int64)
        """Interval that a thread's last fence ended."""
        self._fence = np.zeros((blocks, threads), np.int64)
        """Number of that fence where the whole warp executed it, 0 where not."""
        self._fences = 0
        self._released: list[dict[int, Array]] = [{} for _ in range(blocks)]
        """By address: the clock that whoever reads the value there can acquire."""
        self._added: list[dict[tuple[int, int], int]] = [{} for _ in range(blocks)]
        """By address and thread: the interval in which the thread last added to that clock; spinning adds nothing."""
        self._observed: dict[int, Array] = {}
        """By lane: what it has read of such clocks, and acquires at its next fence."""

    # ---- barriers

    def join_blocks(self) -> None:
        """A barrier of every block, by all of its threads."""
        clocks = self.clocks
        clocks.block_floor[:] = clocks.own.max(axis=1)
        clocks.own[:] = clocks.block_floor[:, None] + 1
        for released, added in zip(self._released, self._added, strict=True):
            released.clear()
            added.clear()

    def join_block(self, block: int) -> None:
        """A barrier of one block, by all of its threads."""
        clocks = self.clocks
        clocks.block_floor[block] = clocks.own[block].max()
        clocks.own[block] = clocks.block_floor[block] + 1
        self._released[block].clear()
        self._added[block].clear()

    def arrive(self, block: int, threads: Array) -> Array:
        """What some threads and those before them did up to now, as a clock; they start a new interval.

        They skip one, which no write publishes.
        """
        clocks = self.clocks
        told = clocks.seen[block, threads].max(axis=0) if clocks.mixed[0] else np.zeros(self._threads, np.int32)
        lanes = told.reshape(-1, WARP)
        warps = np.unique(threads // WARP)
        lanes[warps] = np.maximum(lanes[warps], clocks.warp_floor[block, warps, None])
        told[threads] = clocks.own[block, threads]
        clocks.own[block, threads] += 2
        return told

    def depart(self, block: int, threads: Array, told: Array) -> None:
        """Lets some threads go on after all that a clock says."""
        self.clocks.seen[block, threads] = np.maximum(self.clocks.seen[block, threads], told)
        self.clocks.mixed[0] = 1

    def join_lanes(self, g: Group, mask: Array) -> None:
        """bar.warp.sync, by the lanes of each mask."""
        mask = np.broadcast_to(mask, g.n)
        wide = g.spread(mask)
        if g.converged.all() and ((wide == wide.max(axis=1, keepdims=True)) | ~g.present).all():
            self._join_warps(g.warps)
            return
        for key in np.unique(np.stack([g.lanes // WARP, mask], axis=1), axis=0):
            chosen = g.lanes[(g.lanes // WARP == key[0]) & (mask == key[1])]
            block, threads = int(chosen[0]) // self._threads, chosen % self._threads
            self.depart(block, threads, self.arrive(block, threads))

    def _join_warps(self, warps: Array) -> None:
        clocks = self.clocks
        own = clocks.own.reshape(-1, WARP)
        floor = own[warps].max(axis=1)
        clocks.warp_floor.reshape(-1)[warps] = floor
        own[warps] = floor[:, None] + 1
        if clocks.mixed[0]:
            seen = clocks.seen.reshape(-1, WARP, self._threads)
            seen[warps] = seen[warps].max(axis=1, keepdims=True)

    # ---- fences and flags

    def fence(self, g: Group) -> None:
        """Acquires what the lanes have read of released clocks; their next strong writes release all up to here."""
        self._fences += 1
        own, fenced = self.clocks.own.reshape(-1), self._fenced.reshape(-1)
        if self._observed:
            self._acquire(g)
        fenced[g.lanes] = own[g.lanes]
        own[g.lanes] += 1
        self._fence.reshape(-1)[g.lanes] = np.where(g.converged, self._fences, 0)

    def _acquire(self, g: Group) -> None:
        in_step = {int(lane) // WARP for lane in g.lanes[g.converged]}
        here = set(g.lanes.tolist())
        for lane in [lane for lane in self._observed if lane in here]:
            told = self._observed.pop(lane)
            first = lane // WARP * WARP
            lanes = range(first, first + WARP) if lane // WARP in in_step else [lane]
            self.depart(lane // self._threads, np.array(lanes) % self._threads, told)

    def load(self, g: Group, address: Array) -> None:
        """Strong loads: what was released there can be acquired."""
        for lane, at in zip(g.lanes.tolist(), address.tolist(), strict=True):
            self._observe(lane, at)

    def store(self, g: Group, address: Array) -> None:
        """Strong stores: they release what the thread's last fence ended, and nothing of what stood there before."""
        for lane, at in zip(g.lanes.tolist(), address.tolist(), strict=True):
            block = lane // self._threads
            if self._released[block].pop(at, None) is not None:
                self._added[block].clear()
            self._release(lane, at)

    def update(self, g: Group, address: Array, wrote: Array) -> None:
        """Atomics, one lane after the other: what was released there stays so, and more is added where they wrote."""
        for lane, at, changed in zip(g.lanes.tolist(), address.tolist(), wrote.tolist(), strict=True):
            self._observe(lane, at)
            if changed:
                self._release(lane, at)

    def _observe(self, lane: int, address: int) -> None:
        told = self._released[lane // self._threads].get(address)
        if told is not None:
            known = self._observed.get(lane)
            self._observed[lane] = told if known is None else np.maximum(known, told)

    def _release(self, lane: int, address: int) -> None:
        block, thread = divmod(lane, self._threads)
        clocks = self.clocks
        if self._fenced[block, thread] <= clocks.block_floor[block]:  # no fence, or a barrier has said all that since
            return
        interval = int(clocks.own[block, thread])
        if self._added[block].get((address, thread)) == interval:
            return
        self._added[block][address, thread] = interval
        told = clocks.seen[block, thread].copy()
        warp = slice(thread // WARP * WARP, thread // WARP * WARP + WARP)
        told[warp] = np.maximum(told[warp], clocks.warp_floor[block, thread // WARP])
        number = self._fence[block, thread]
        mates = (self._fence[block, warp] == number) & (number > 0)
        told[warp] = np.where(mates, np.maximum(told[warp], self._fenced[block, warp]), told[warp])
        told[thread] = self._fenced[block, thread]
        before = self._released[block].get(address)
        self._released[block][address] = told if before is None else np.maximum(told, before)

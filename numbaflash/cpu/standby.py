"""A helper between two tasks: for a moment it stands by, and begins what a caller offers without waking up or Python.

To wake a thread takes its caller some 15 us on a virtual machine, and 35 until the thread runs; a token attends to a
thousand keys in 100.

Each helper has a box, which says where it is: asleep, standing by, offered the task at an address, or at work on it. A
caller offers by putting its task's address into the box of one who stands by. When all items are done it takes back
what was not begun, and waits for those who are still leaving: behind that nobody reads the task's memory.
"""

from __future__ import annotations

import time
from typing import Any

from numba import types

from .intrinsics import function_at
from .jit import kernel, native
from .task import ITEMS_DONE, NEXT_ITEM, task_at
from .vector import atomic_load, compare_and_swap, load_int, pause, store_int

__all__ = [
    "BOX_BYTES",
    "LEAST_SCRATCH",
    "STAND_BY_NS",
    "await_items",
    "count_asleep",
    "offer",
    "stand_by",
    "work_together",
]

BOX_BYTES = 64  # a cache line
_SCRATCH_BYTES = 8  # where a box says how much scratch memory its helper has

LEAST_SCRATCH = 64  # that a helper has: the clock writes there

# What a box says; else it holds the address of a task, and one more than that while its helper is at work on it.
_ASLEEP, _STANDING_BY = 0, 1

# What Python and NumPy take between two calls of a loop, and a helper waits for the caller's last item.
STAND_BY_NS = 150_000
_STRETCH_NS = 10_000_000  # until a helper looks at last what else there is to do
# Two looks at the clock that are so far apart show that somebody else had the CPU, such as a thread of OpenMP that
# stands by as well: the two would take turns, of milliseconds. The helper sleeps between tasks then, for so long.
_LOST_NS, _GIVE_WAY_NS = 50_000, 20_000_000
_PAUSES = 16  # of some 40 to 140 cycles, between two looks at the clock
_SPINS = 2000  # about 50 us
_NAP_MICROSECONDS = 50

_usleep: Any = types.ExternalFunction("usleep", types.int32(types.uint32))
_clock_gettime: Any = types.ExternalFunction("clock_gettime", types.int32(types.int32, types.int64))
_CLOCK = time.CLOCK_MONOTONIC


_call_kernel = function_at(types.void, (types.int64, types.int64))


@native
def _nanoseconds(room):
    """The time; `room` is the address of 16 bytes."""
    _clock_gettime(_CLOCK, room)
    return load_int(room) * 1_000_000_000 + load_int(room + 8)


@kernel
def stand_by(box, scratch, scratch_bytes):
    """Do what is offered; return when for some time nothing was.

    Args:
        box: Address of this helper's.
        scratch: Address of its scratch memory.
        scratch_bytes: Of that, LEAST_SCRATCH or more.

    Returns:
        When its last task was done, in nanoseconds; later where it is not to stand by until then.
    """
    store_int(box + _SCRATCH_BYTES, scratch_bytes)
    begin = since = looked = _nanoseconds(scratch)
    gives_way = False
    compare_and_swap(box, _ASLEEP, _STANDING_BY)
    while True:
        for _ in range(_PAUSES):
            found = atomic_load(box)
            if found != _STANDING_BY:
                break
            pause()
        before, looked = looked, _nanoseconds(scratch)
        gives_way |= looked - before > _LOST_NS
        if found != _STANDING_BY:
            if compare_and_swap(box, found, found + 1):
                _call_kernel(task_at(found).entry, found, scratch)
                compare_and_swap(box, found + 1, _STANDING_BY)
                since = looked = _nanoseconds(scratch)
            continue
        is_over = gives_way or looked - since > STAND_BY_NS or looked - begin > _STRETCH_NS
        if is_over and compare_and_swap(box, _STANDING_BY, _ASLEEP):
            return looked + _GIVE_WAY_NS if gives_way else since


@kernel
def count_asleep(boxes, helpers, wanted, scratch_bytes):
    """How many helpers are to be woken up, so that `wanted` do a task that wants so much memory.

    One who stands by with too little memory gets more where it looks for what else there is to do.
    """
    ready, at_work = 0, 0
    for box in range(boxes, boxes + helpers * BOX_BYTES, BOX_BYTES):
        found = atomic_load(box)
        if _is_ready(box, found, scratch_bytes):
            ready += 1
        elif found > _STANDING_BY:
            at_work += 1
    return max(min(wanted - ready, helpers - ready - at_work), 0)


@kernel
def work_together(task_address, scratch, boxes, helpers, wanted):
    """Do a task with up to `wanted` helpers, and return when nobody reads it any more.

    Its items cannot be taken before: between the first of them and the last there is no Python, where a signal may
    raise anything anywhere.
    """
    store_int(task_address + NEXT_ITEM, load_int(task_address + ITEMS_DONE))
    offer(boxes, helpers, wanted, task_address)
    _call_kernel(task_at(task_address).entry, task_address, scratch)
    await_items(task_address, boxes, helpers)


@kernel
def offer(boxes, helpers, wanted, task_address):
    """Offer a task to `wanted` helpers, if so many stand by."""
    given = 0
    for box in range(boxes, boxes + helpers * BOX_BYTES, BOX_BYTES):
        if given == wanted:
            break
        found = atomic_load(box)
        if _is_ready(box, found, task_at(task_address).scratch_bytes) and compare_and_swap(box, found, task_address):
            given += 1


@kernel
def await_items(task_address, boxes, helpers):
    """Return when all items of a task are done, and no helper to whom it was offered reads it any more."""
    spins = 0
    while atomic_load(task_address + ITEMS_DONE) < task_at(task_address).items:
        spins = _wait(spins)
    for box in range(boxes, boxes + helpers * BOX_BYTES, BOX_BYTES):
        if atomic_load(box) == task_address:
            compare_and_swap(box, task_address, _STANDING_BY)
        while atomic_load(box) == task_address + 1:
            spins = _wait(spins)


@native
def _is_ready(box, found, scratch_bytes):
    """Whether a helper whose box says that stands by, with so much memory."""
    return found == _STANDING_BY and load_int(box + _SCRATCH_BYTES) >= scratch_bytes


@native
def _wait(spins):
    if spins < _SPINS:
        pause()
    else:
        _usleep(_NAP_MICROSECONDS)
    return spins + 1

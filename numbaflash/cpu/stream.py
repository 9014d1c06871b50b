"""Reading memory on all cores and doing nothing else: what decode's share of the bandwidth is measured against."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .jit import kernel
from .pool import run, thread_count
from .task import Task, report_item, take_item, task_at
from .vector import LANES, add, horizontal_sum, load, splat, store_float

__all__ = ["read_memory"]

_ITEM_BYTES = 1 << 18
_STEP = 16 * LANES  # four vectors


def read_memory(array: NDArray[Any]) -> None:
    """Read a contiguous array once, with as many threads as attention uses; a tail under 256 KiB is left out."""
    items = array.nbytes // _ITEM_BYTES
    sums = np.empty(items, np.float32)
    task = Task(items=items, q=array.ctypes.data, out=sums.ctypes.data)
    run(_stream, task, 0, min(thread_count(), items) - 1, (array, sums))


@kernel
def _stream(task_address, _):
    task = task_at(task_address)
    while True:
        item = take_item(task_address)
        if item >= task.items:
            break
        zero = splat(np.float32(0))
        a, b, c, d = zero, zero, zero, zero
        start = task.q + item * _ITEM_BYTES
        for at in range(start, start + _ITEM_BYTES, _STEP):
            a = add(a, load(at))
            b = add(b, load(at + 4 * LANES))
            c = add(c, load(at + 8 * LANES))
            d = add(d, load(at + 12 * LANES))
        store_float(task.out + 4 * item, horizontal_sum(add(add(a, b), add(c, d))))
        report_item(task_address)

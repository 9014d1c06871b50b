"""Runs the PTX that Numba compiles on a CPU, with checks that a GPU does not make."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .counts import GlobalAccess, Report, SharedAccess
from .errors import EmulatorError, Place
from .launch import MAX_STEPS, Arguments, Kernel, flatten, load, ptx_of
from .machine import Checks
from .memory import GlobalMemory

__all__ = [
    "Checks",
    "EmulatorError",
    "GlobalAccess",
    "GlobalMemory",
    "Kernel",
    "Place",
    "Report",
    "SharedAccess",
    "launch",
    "load",
]


def launch(
    kernel: Any,
    grid: int | Sequence[int],
    block: int | Sequence[int],
    *args: Any,
    shared: int = 0,
    entry: str | None = None,
    cc: tuple[int, int] = (8, 0),
    checks: Checks | None = None,
    max_steps: int = MAX_STEPS,
) -> Report:
    """Runs a kernel.

    Args:
        kernel: A ``@cuda.jit`` function, the result of ``cuda.compile_ptx``, or PTX text.
        grid: Blocks, one to three numbers.
        block: Threads of a block, one to three numbers.
        *args: NumPy arrays, changed in place, and scalars.
        shared: Bytes of dynamic shared memory.
        entry: Name of the kernel, where the text has several.
        cc: Compute capability that a ``@cuda.jit`` function is compiled for.
        checks: Which checks to make; all by default.
        max_steps: Basic blocks that may run before the launch counts as hanging.

    Returns:
        What the launch would have cost the hardware.

    Raises:
        EmulatorError: The kernel cannot be run, or did what it must not; arrays then hold what they held before.
    """
    loaded = load(ptx_of(kernel, args, cc), entry)
    arrays = [x for x in args if isinstance(x, np.ndarray)]
    memory = GlobalMemory()
    placed = Arguments(memory)
    placed.place(arrays)
    values = flatten(loaded.translation.program, args, placed)
    report = loaded.run(memory, grid, block, *values, shared=shared, checks=checks, max_steps=max_steps)
    placed.take_back()
    return report

"""Runs the PTX that Numba compiles on a CPU, with checks that a GPU does not make."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .counts import GlobalAccess, Report, SharedAccess
from .errors import EmulatorError, Place
from .launch import Arguments, flatten, pack, ptx_of, run_program, translator
from .machine import Checks
from .memory import GlobalMemory

__all__ = ["Checks", "EmulatorError", "GlobalAccess", "GlobalMemory", "Place", "Report", "SharedAccess", "launch"]


def launch(
    kernel: Any,
    grid: int | Sequence[int],
    block: int | Sequence[int],
    *args: Any,
    shared: int = 0,
    entry: str | None = None,
    cc: tuple[int, int] = (8, 0),
    checks: Checks | None = None,
    max_steps: int = 10_000_000,
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
    translation = translator(ptx_of(kernel, args, cc), entry)
    memory = GlobalMemory(sum(x.nbytes + 2048 for x in args if isinstance(x, np.ndarray)) // 512 * 512 + (1 << 12))
    placed = Arguments(memory)
    placed.place([x for x in args if isinstance(x, np.ndarray)])
    params = pack(translation.program, flatten(translation.program, args, placed))
    report = run_program(translation, grid, block, params, memory, shared, checks or Checks(), max_steps)
    placed.take_back()
    return report

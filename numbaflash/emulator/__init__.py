"""The PTX machine: runs the code that Numba compiles for a GPU on a CPU, with checks that a GPU does not make.

    import numpy as np
    from numba import cuda
    from numbaflash import emulator

    @cuda.jit
    def double(x, out):
        i = cuda.grid(1)
        if i < x.size:
            out[i] = 2 * x[i]

    x = np.arange(1000, dtype=np.float32)
    out = np.zeros_like(x)
    report = emulator.launch(double, 4, 256, x, out)       # kernel, grid, block, arguments

It needs no GPU and no driver. Kernels come as `@cuda.jit` functions, as the result of `cuda.compile_ptx`, or as PTX
text for sm_70 to sm_90a. Arrays are changed in place. `load` and `GlobalMemory` run kernels on memory that stays.

**Checked**, each with kernel, block, thread, PTX line, and the Python line where the kernel was compiled with
`lineinfo=True`; the one error is `EmulatorError`, and its `kind` says which check spoke:

- bounds and alignment of every access to global, shared and local memory. Arrays lie 256-byte aligned and no more, as
  cudaMalloc has it, static shared arrays aligned as they declare and no more, and all of them with room between them;
- reads of shared and local memory that was never written, and of `cp.async` data that was not waited for;
- races in shared memory: between warps that nothing orders, and between lanes of a warp that was not converged at one
  of the accesses. Barriers order (named ones and `syncwarp` included), and so do fences with atomic, volatile, release
  or acquire accesses to a flag or a lock. Writes of the value that is there already are no race;
- races in global memory between blocks of a launch. A fence and an atomic (or a volatile, release or acquire access) of
  device scope on one side, and one and a fence on the other, order them. In kernels with fences this is followed in
  grids of up to 8192 blocks. A plain load of what other blocks change by atomics races with them, also as the first
  guess of a loop of compare-and-swap: let it be volatile, or an atomic that adds nothing;
- barriers that not all threads reach, or that warps reach at different places; matrix instructions and other
  collectives that a part of the warp reaches; shuffles from lanes that are not active; endless loops.

**Counted**, in the `Report`: instructions by pipe, shared-memory wavefronts and bank conflicts by access, 32-byte
sectors and their efficiency by access to global memory, bytes of each space.

**Not implemented is an error**: an opcode, modifier or type that is not known names its line; nothing is guessed. That
is so for wgmma, TMA (`cp.async.bulk`), mbarriers, clusters, textures, `vprintf`, recursion, function pointers, and for
Numba's own operators on float16 and bfloat16: they call CUDA C++ that is not in the PTX.

**Not modelled**:

- time: caches, latencies, occupancy, and what `%clock` and `%globaltimer` would read (0);
- memory ordering: memory is sequentially consistent. Races are looked for, weak orders are not tried. Global races
  between threads of one block are not looked for: a fence orders for its whole block, even where a barrier is missing
  between it and the thread that writes the data or the flag. Nor is intra-warp order other than by convergence;
- the order of blocks and warps: lowest program counter first, blocks in chunks, one after the other. Blocks that wait
  for each other can do so in grids of up to 262,144 threads: on a GPU, too, no more than fit it run together;
- the order of rounding inside an `mma` (here one product after the other in float32; hardware truncates sums of
  several), and the last bits of approximate instructions (`ex2.approx`, `rcp.approx` ..., here correctly rounded);
- NaN payloads of float32 and float64 results;
- registers: how many a kernel needs, and what it spills, is for ptxas to say.

How it works: a kernel's calls are inlined (`program`), each run of instructions becomes a Python function of about one
NumPy call per instruction, made when it is first needed (`translate`, tables in `isa`), over all threads of many blocks
at once (`machine`); threads that diverge meet again because the lowest program counter goes first (`schedule`). Checks
and matrix products are compiled by Numba for the CPU, and cached on disk (`shared_checks`, `global_checks`, `mma`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .arguments import Arguments, flatten, leaves
from .counts import GlobalAccess, Report, SharedAccess
from .errors import EmulatorError, Place
from .launch import MAX_STEPS, Kernel, load, ptx_of
from .memory import GlobalMemory
from .threads import Checks

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
        *args: NumPy arrays, changed in place, scalars, and tuples of them.
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
    arrays = [x for x in leaves(args) if isinstance(x, np.ndarray)]
    memory = GlobalMemory()
    placed = Arguments(memory)
    placed.place(arrays)
    values = flatten(loaded.translation.program, args, placed)
    report = loaded.run(memory, grid, block, *values, shared=shared, checks=checks, max_steps=max_steps)
    placed.take_back()
    return report

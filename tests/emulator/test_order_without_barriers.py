"""Kernels that are ordered by other things than barriers: right ones are not reported, and are without that order."""

from __future__ import annotations

import numpy as np
import pytest
from emulator.bug_reports import caught, edited, stands
from emulator.harness import source_line
from numba import cuda, float32, int32

from numbaflash import emulator
from numbaflash.emulator.launch import ptx_of

# Kernels have no annotations: Numba types their arguments itself.


@cuda.jit
def warp_lockstep(x, out):  # type: ignore[no-untyped-def]
    """One converged warp passes values through shared memory without a barrier."""
    buffer = cuda.shared.array(32, float32)
    t = cuda.threadIdx.x
    buffer[t] = x[t]
    out[t] = buffer[31 - t]


def test_converged_warp_needs_no_barrier() -> None:
    x, out = np.arange(32, dtype="f4"), np.zeros(32, "f4")
    emulator.launch(warp_lockstep, 1, 32, x, out)
    assert (out == x[::-1]).all()


@cuda.jit
def same_value(flags):  # type: ignore[no-untyped-def]
    flags[0] = 1


def test_writing_the_same_value_is_no_race() -> None:
    flags = np.zeros(1, "i4")
    emulator.launch(same_value, 8, 64, flags)
    assert flags[0] == 1


@cuda.jit(lineinfo=True)
def last_block_sums(x, partial, counter, out):  # type: ignore[no-untyped-def]
    """Blocks publish partial sums by a fence and a counter; the last one adds them up."""
    last = cuda.shared.array(1, int32)
    t, b = cuda.threadIdx.x, cuda.blockIdx.x
    if t == 0:
        total = float32(0)
        for i in range(64):
            total += x[b * 64 + i]
        partial[b] = total
        cuda.threadfence()
        last[0] = cuda.atomic.add(counter, 0, 1) == cuda.gridDim.x - 1
    cuda.syncthreads()
    if last[0] and t == 0:
        cuda.threadfence()
        total = float32(0)
        for i in range(cuda.gridDim.x):
            total += partial[i]
        out[0] = total


def test_blocks_ordered_by_a_fence_and_an_atomic_do_not_race() -> None:
    x = np.arange(640, dtype="f4")
    out = np.zeros(1, "f4")
    emulator.launch(last_block_sums, 10, 32, x, np.zeros(10, "f4"), np.zeros(1, "i4"), out)
    assert out[0] == x.sum()


@pytest.mark.parametrize("which", [0, 1], ids=["before counting", "after counting"])
def test_the_same_without_one_of_its_fences_is_a_race(which: int) -> None:
    args = (np.arange(640, dtype="f4"), np.zeros(10, "f4"), np.zeros(1, "i4"), np.zeros(1, "f4"))
    ptx = edited(ptx_of(last_block_sums, args, (8, 0)), r"membar\.gl;|fence\.\S+;", "", which)
    error = caught(lambda: emulator.launch(ptx, 10, 32, *args))
    assert error.kind == "global-race"
    stands(error, ptx, r"ld\.global", source_line(last_block_sums, "total += partial[i]"), 64)  # 64 of x come first
    assert error.place.block == (9, 0, 0)
    assert "a write by block (0, 0, 0)" in error.reason


@cuda.jit
def spin_lock(lock, total):  # type: ignore[no-untyped-def]
    """One thread of each block takes a lock, changes a number, and releases it."""
    if cuda.threadIdx.x == 0:
        while cuda.atomic.cas(lock, 0, 0, 1) != 0:
            pass
        cuda.threadfence()
        total[0] += 1
        cuda.threadfence()
        cuda.atomic.exch(lock, 0, 0)


def test_spin_lock_makes_progress_and_orders_the_blocks() -> None:
    total = np.zeros(1, "i4")
    emulator.launch(spin_lock, 6, 32, np.zeros(1, "i4"), total)
    assert total[0] == 6


@cuda.jit(lineinfo=True)
def cleared_then_added(x, out, sync):  # type: ignore[no-untyped-def]
    total = cuda.shared.array(1, int32)
    t = cuda.threadIdx.x
    if t == 0:
        total[0] = 0
    if sync:
        cuda.syncthreads()
    cuda.atomic.add(total, 0, x[t])
    cuda.syncthreads()
    if t == 0:
        out[0] = total[0]


def test_missing_barrier_between_clearing_a_sum_and_adding_to_it() -> None:
    """The thread that clears it adds to it as well, which must not hide its store."""
    args = (np.arange(64, dtype="i4"), np.zeros(1, "i4"))
    emulator.launch(cleared_then_added, 1, 64, *args, True)
    assert args[1][0] == 63 * 32
    error = caught(lambda: emulator.launch(cleared_then_added, 1, 64, *args, False))
    assert error.kind == "shared-race"
    ptx = ptx_of(cleared_then_added, (*args, False), (8, 0))
    stands(error, ptx, r"atom\.shared", source_line(cleared_then_added, "cuda.atomic.add"))
    assert "what thread 0 wrote" in error.reason


@cuda.jit(lineinfo=True)
def cleared_by_a_block(total):  # type: ignore[no-untyped-def]
    if cuda.blockIdx.x == 0:
        total[0] = 1
    cuda.atomic.add(total, 0, 1)


def test_sum_of_all_blocks_that_one_of_them_sets() -> None:
    total = np.zeros(1, "i4")
    error = caught(lambda: emulator.launch(cleared_by_a_block, 4, 1, total))
    assert error.kind == "global-race"
    ptx = ptx_of(cleared_by_a_block, (total,), (8, 0))
    stands(error, ptx, r"atom\.global", source_line(cleared_by_a_block, "cuda.atomic.add"))
    assert error.place.block == (1, 0, 0)

"""Bugs put into right kernels, one at a time: each is reported, by the right check and at the right line."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from emulator import tensor_product
from emulator.harness import source_line
from numba import cuda, float32, int32

from numbaflash import emulator
from numbaflash.emulator import EmulatorError
from numbaflash.emulator.launch import ptx_of


def line_of(ptx: str, pattern: str, occurrence: int = 0) -> int:
    """Number of the line with the n-th match."""
    return [i for i, text in enumerate(ptx.splitlines(), 1) if re.search(pattern, text)][occurrence]


def edited(ptx: str, pattern: str, replacement: str, occurrence: int = 0) -> str:
    """The text with the n-th match replaced; lines keep their numbers."""
    found = list(re.finditer(pattern, ptx))[occurrence]
    return ptx[: found.start()] + replacement + ptx[found.end() :]


def stands(error: EmulatorError, ptx: str, pattern: str, source: str, occurrence: int = 0) -> None:
    """The error names the n-th PTX line with a match, and a line of the Python source."""
    assert error.place.line == line_of(ptx, pattern, occurrence)
    assert error.place.source == source


def caught(run: Callable[[], Any]) -> EmulatorError:
    with pytest.raises(EmulatorError) as found:
        run()
    return found.value


# ---- the tensor-core product

SIZES = (128, 64, 128)
COPY = r"cp\.async\.cg"
INLINED = source_line(tensor_product.product, "def product")
"""Numba's line info puts device functions that it inlines at the first line of the kernel."""


def multiply(ptx: str, arrays: tuple[Any, Any, Any] | None = None) -> Any:
    a, b, c = arrays or tensor_product.operands(*SIZES)
    emulator.launch(ptx, (b.shape[0] // 64, a.shape[0] // 64), 128, a, b, c, shared=tensor_product.SHARED)
    return a, b, c


def test_the_right_product_is_not_reported() -> None:
    a, b, c = multiply(tensor_product.ptx())
    np.testing.assert_allclose(c, a.astype("f8") @ b.astype("f8").T, rtol=1e-4, atol=1e-4)


def test_missing_barrier_before_the_tiles_are_read() -> None:
    ptx = edited(tensor_product.ptx(), r"bar\.sync\s+0;", "", 0)
    error = caught(lambda: multiply(ptx))
    assert error.kind == "shared-race"
    stands(error, ptx, r"ldmatrix", source_line(tensor_product.product, "ldmatrix(stage + (warp"))
    assert error.place.thread is not None
    assert error.place.block == (0, 0, 0)


def test_missing_barrier_before_the_tiles_are_overwritten() -> None:
    ptx = edited(tensor_product.ptx(), r"bar\.sync\s+0;", "", 1)
    error = caught(lambda: multiply(ptx))
    assert error.kind == "shared-race"
    stands(error, ptx, COPY, INLINED, 4)


def test_missing_wait_for_the_copies() -> None:
    ptx = edited(tensor_product.ptx(), r"cp\.async\.wait_group 1;", "")
    error = caught(lambda: multiply(ptx))
    assert error.kind == "in-flight"
    stands(error, ptx, r"ldmatrix", source_line(tensor_product.product, "ldmatrix(stage + (warp"))


def test_waiting_for_one_group_too_few() -> None:
    ptx = tensor_product.ptx().replace("cp.async.wait_group 1;", "cp.async.wait_group 2;")
    error = caught(lambda: multiply(ptx))
    assert error.kind == "in-flight"
    stands(error, ptx, r"ldmatrix", source_line(tensor_product.product, "ldmatrix(stage + (warp"))


def test_shortened_array() -> None:
    a, b, c = tensor_product.operands(*SIZES)
    short = a[:-1].copy()
    run = lambda: emulator.launch(tensor_product.ptx(), (1, 2), 128, short, b, c, shared=tensor_product.SHARED)  # noqa: E731
    error = caught(run)
    assert error.kind == "bounds"
    stands(error, tensor_product.ptx(), COPY, INLINED, 2)
    assert error.place.block == (0, 1, 0)
    assert error.place.thread == (124, 0, 0)
    assert not c.any()


def test_misaligned_copy() -> None:
    a, b, c = tensor_product.operands(*SIZES)
    raw = np.zeros(a.nbytes + 16, "u1")
    shifted = raw[8 : 8 + a.nbytes].view("f2").reshape(a.shape)
    shifted[:] = a
    error = caught(lambda: multiply(tensor_product.ptx(), (shifted, b, c)))
    assert error.kind == "alignment"
    stands(error, tensor_product.ptx(), COPY, INLINED)
    assert error.place.thread == (0, 0, 0)


def test_too_little_shared_memory() -> None:
    a, b, c = tensor_product.operands(*SIZES)
    size = tensor_product.SHARED - 32
    error = caught(lambda: emulator.launch(tensor_product.ptx(), (1, 2), 128, a, b, c, shared=size))
    assert error.kind == "bounds"
    assert "the block has 20448 bytes of shared memory" in error.reason
    stands(error, tensor_product.ptx(), COPY, INLINED, 7)
    assert error.place.thread == (127, 0, 0)


# ---- kernels of Numba


@cuda.jit(lineinfo=True)
def two_arrays(x, out, shift):  # type: ignore[no-untyped-def]
    first = cuda.shared.array(64, float32)
    second = cuda.shared.array(64, float32)
    t = cuda.threadIdx.x
    second[t] = x[t]
    cuda.syncthreads()
    first[t + shift] = second[t]
    cuda.syncthreads()
    out[t] = first[t + shift] + second[t]


@pytest.mark.parametrize(("shift", "thread"), [(1, 63), (8, 56)])
def test_index_past_one_shared_array_does_not_reach_the_next(shift: int, thread: int) -> None:
    x, out = np.arange(64, dtype="f4"), np.zeros(64, "f4")
    emulator.launch(two_arrays, 1, 64, x, out, 0)
    assert (out == 2 * x).all()
    error = caught(lambda: emulator.launch(two_arrays, 1, 64, x, out, shift))
    assert error.kind == "bounds"
    assert "has 256 bytes from" in error.reason
    assert error.place.thread == (thread, 0, 0)
    ptx = ptx_of(two_arrays, (x, out, shift), (8, 0))
    stands(error, ptx, r"st\.shared", source_line(two_arrays, "first[t + shift] = "), 1)


@cuda.jit(lineinfo=True)
def reverse(x, out, sync):  # type: ignore[no-untyped-def]
    buffer = cuda.shared.array(128, float32)
    t = cuda.threadIdx.x
    buffer[t] = x[cuda.grid(1)]
    if sync:
        cuda.syncthreads()
    out[cuda.grid(1)] = buffer[127 - t]


def test_two_warps_race_on_shared_memory() -> None:
    x, out = np.arange(128, dtype="f4"), np.zeros(128, "f4")
    emulator.launch(reverse, 1, 128, x, out, True)
    assert (out == x[::-1]).all()
    error = caught(lambda: emulator.launch(reverse, 1, 128, x, out, False))
    assert error.kind == "shared-race"
    ptx = ptx_of(reverse, (x, out, False), (8, 0))
    stands(error, ptx, r"ld\.shared", source_line(reverse, "out[cuda.grid(1)] = "))
    assert error.place.thread == (0, 0, 0)
    assert "thread 127" in error.reason


@cuda.jit(lineinfo=True)
def divergent(out):  # type: ignore[no-untyped-def]
    t = cuda.threadIdx.x
    if t < 48:
        cuda.syncthreads()
    out[t] = t


def test_barrier_that_half_a_warp_skips() -> None:
    error = caught(lambda: emulator.launch(divergent, 1, 128, np.zeros(128, "i4")))
    assert error.kind == "barrier"
    ptx = ptx_of(divergent, (np.zeros(128, "i4"),), (8, 0))
    stands(error, ptx, r"bar\.sync", source_line(divergent, "syncthreads"))
    assert error.place.thread == (32, 0, 0)


@cuda.jit(lineinfo=True)
def early_exit(out, n):  # type: ignore[no-untyped-def]
    t = cuda.threadIdx.x
    if t >= n:
        return
    out[t] = 1
    cuda.syncthreads()
    out[t] += 1


@pytest.mark.parametrize("n", [40, 64])
def test_barrier_after_some_threads_have_left(n: int) -> None:
    args = (np.zeros(128, "i4"), np.int32(n))
    error = caught(lambda: emulator.launch(early_exit, 1, 128, *args))
    assert error.kind == "barrier"
    stands(error, ptx_of(early_exit, args, (8, 0)), r"bar\.sync", source_line(early_exit, "syncthreads"))
    assert f"{n} of 128 threads came" in error.reason


@cuda.jit(lineinfo=True)
def two_barriers(out):  # type: ignore[no-untyped-def]
    t = cuda.threadIdx.x
    if t < 32:
        out[t] = 1
        cuda.syncthreads()
        out[t] += 1
    else:
        out[t] = 2
        cuda.syncthreads()
        out[t] += 2


def test_warps_that_wait_at_different_barriers() -> None:
    out = np.zeros(64, "i4")
    error = caught(lambda: emulator.launch(two_barriers, 1, 64, out))
    assert error.kind == "barrier"
    ptx = ptx_of(two_barriers, (out,), (8, 0))
    stands(error, ptx, r"bar\.sync", source_line(two_barriers, "syncthreads", 1), 1)
    assert f"the barrier of PTX line {line_of(ptx, 'bar.sync')}" in error.reason
    assert error.place.thread == (32, 0, 0)


@cuda.jit(lineinfo=True)
def uninitialized(out, n):  # type: ignore[no-untyped-def]
    buffer = cuda.shared.array(64, float32)
    t = cuda.threadIdx.x
    if t < n:
        buffer[t] = t
    cuda.syncthreads()
    out[t] = buffer[t]


def test_reading_shared_memory_that_was_not_written() -> None:
    out = np.zeros(64, "f4")
    emulator.launch(uninitialized, 1, 64, out, 64)
    error = caught(lambda: emulator.launch(uninitialized, 1, 64, out, 50))
    assert error.kind == "uninitialized"
    assert error.place.thread == (50, 0, 0)
    ptx = ptx_of(uninitialized, (out, 50), (8, 0))
    stands(error, ptx, r"ld\.shared", source_line(uninitialized, "out[t] = buffer[t]"))
    emulator.launch(uninitialized, 1, 64, out, 50, checks=emulator.Checks(uninitialized=False))


@cuda.jit(lineinfo=True)
def local_places(out, indices):  # type: ignore[no-untyped-def]
    scratch = cuda.local.array(8, int32)
    t = cuda.threadIdx.x
    for i in range(4):
        scratch[indices[t] + i] = i
    for i in range(4):
        out[t] += scratch[indices[t + 1] + i]


def test_reading_local_memory_that_was_not_written() -> None:
    """Numba clears local arrays; without that, thread 20 reads before what it wrote."""
    indices, out = np.zeros(33, "i4"), np.zeros(32, "i4")
    ptx = re.sub(r"st\.local\.v4\S+ .*;", "", ptx_of(local_places, (out, indices), (8, 0)))
    emulator.launch(ptx, 1, 32, out, indices)
    indices[20] = 3
    error = caught(lambda: emulator.launch(ptx, 1, 32, out, indices))
    assert error.kind == "uninitialized"
    assert error.place.thread == (20, 0, 0)
    assert "local" in error.reason
    stands(error, ptx, r"ld\.local", source_line(local_places, "out[t] += "))


def test_indexing_past_a_local_array() -> None:
    indices = np.full(33, 5, "i4")
    out = np.zeros(32, "i4")
    error = caught(lambda: emulator.launch(local_places, 1, 32, out, indices))
    assert error.kind == "bounds"
    ptx = ptx_of(local_places, (out, indices), (8, 0))
    stands(error, ptx, r"st\.local\.u32", source_line(local_places, "scratch[indices[t] + i] = i"), 3)
    assert error.place.thread == (0, 0, 0)


@cuda.jit(lineinfo=True)
def write_place(out, places):  # type: ignore[no-untyped-def]
    if cuda.threadIdx.x == 0:
        out[places[cuda.blockIdx.x]] = cuda.blockIdx.x


def test_two_blocks_write_one_place() -> None:
    out, places = np.zeros(8, "i4"), np.arange(8, dtype="i4")
    emulator.launch(write_place, 8, 32, out, places)
    places[6] = 2
    error = caught(lambda: emulator.launch(write_place, 8, 32, out, places))
    assert error.kind == "global-race"
    assert error.place.block == (6, 0, 0)
    assert "block (2, 0, 0)" in error.reason
    ptx = ptx_of(write_place, (out, places), (8, 0))
    stands(error, ptx, r"st\.global", source_line(write_place, "out[places"))


@cuda.jit(lineinfo=True)
def read_neighbour(out):  # type: ignore[no-untyped-def]
    i = cuda.grid(1)
    if i > 0:
        out[i] = out[i - 1] + 1


def test_block_reads_what_another_writes() -> None:
    """Blocks go in order here: block 0 overwrites what block 1, in step with it, has read."""
    out = np.zeros(128, "i4")
    error = caught(lambda: emulator.launch(read_neighbour, 4, 32, out))
    assert error.kind == "global-race"
    ptx = ptx_of(read_neighbour, (out,), (8, 0))
    stands(error, ptx, r"st\.global", source_line(read_neighbour, "out[i] = "))
    assert error.place.block == (0, 0, 0)
    assert error.place.thread == (31, 0, 0)
    assert "what block (1, 0, 0) reads" in error.reason


def test_races_between_blocks_are_seen_across_chunks() -> None:
    """Block 0 and block 4095 never run together."""
    places = np.arange(4096, dtype="i4")
    places[-1] = 0
    out = np.zeros(4096, "i4")
    error = caught(lambda: emulator.launch(write_place, 4096, 32, out, places))
    assert error.kind == "global-race"
    assert error.place.block == (4095, 0, 0)
    stands(error, ptx_of(write_place, (out, places), (8, 0)), r"st\.global", source_line(write_place, "out[places"))


@cuda.jit(lineinfo=True)
def partial_shuffle(out, n):  # type: ignore[no-untyped-def]
    t = cuda.threadIdx.x
    value = t
    if t < n:
        value = cuda.shfl_xor_sync(0xFFFFFFFF, value, 1)
    out[t] = value


def test_shuffle_that_not_all_members_reach() -> None:
    emulator.launch(partial_shuffle, 1, 32, np.zeros(32, "i4"), 32)
    error = caught(lambda: emulator.launch(partial_shuffle, 1, 32, np.zeros(32, "i4"), 16))
    assert error.kind == "collective"
    ptx = ptx_of(partial_shuffle, (np.zeros(32, "i4"), 16), (8, 0))
    stands(error, ptx, r"shfl\.sync", source_line(partial_shuffle, "shfl_xor_sync"))


@cuda.jit(lineinfo=True)
def inactive_source(out):  # type: ignore[no-untyped-def]
    t = cuda.threadIdx.x
    if t < 16:
        out[t] = cuda.shfl_sync(0xFFFF, t, 20)


def test_shuffle_from_an_inactive_lane() -> None:
    error = caught(lambda: emulator.launch(inactive_source, 1, 32, np.zeros(32, "i4")))
    assert error.kind == "shuffle"
    assert "not active" in error.reason
    ptx = ptx_of(inactive_source, (np.zeros(32, "i4"),), (8, 0))
    stands(error, ptx, r"shfl\.sync", source_line(inactive_source, "shfl_sync"))


@cuda.jit(lineinfo=True)
def not_a_member(out):  # type: ignore[no-untyped-def]
    out[cuda.threadIdx.x] = cuda.ballot_sync(0xFFFF, True)


def test_vote_by_a_lane_outside_of_the_mask() -> None:
    error = caught(lambda: emulator.launch(not_a_member, 1, 32, np.zeros(32, "i4")))
    assert error.kind == "collective"
    assert error.place.thread == (16, 0, 0)
    ptx = ptx_of(not_a_member, (np.zeros(32, "i4"),), (8, 0))
    stands(error, ptx, r"vote\.sync", source_line(not_a_member, "ballot_sync"))


def test_matrix_instruction_in_half_a_warp() -> None:
    ptx = tensor_product.ptx()
    error = caught(
        lambda: emulator.launch(ptx, (1, 2), 112, *tensor_product.operands(*SIZES), shared=tensor_product.SHARED)
    )
    assert error.kind == "collective"  # before anything is read: who is missing matters more than what it left out
    stands(error, ptx, r"ldmatrix", source_line(tensor_product.product, "ldmatrix(stage + (warp"))
    assert error.place.thread == (96, 0, 0)


@cuda.jit(lineinfo=True)
def endless(out):  # type: ignore[no-untyped-def]
    while out[0] == 0:
        out[1] += 1


def test_kernel_that_never_ends() -> None:
    error = caught(lambda: emulator.launch(endless, 1, 1, np.zeros(2, "i4"), max_steps=1000))
    assert error.kind == "hang"
    ptx = ptx_of(endless, (np.zeros(2, "i4"),), (8, 0))
    stands(error, ptx, r"bra\.uni", source_line(endless, "while"))
    assert error.place.thread == (0, 0, 0)


# ---- right kernels that look dangerous


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

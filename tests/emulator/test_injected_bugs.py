"""Bugs in kernels of Numba, one in each: it is reported, by the right check and at the right line."""

from __future__ import annotations

import re

import numpy as np
import pytest
from emulator.bug_reports import caught, line_of, stands
from emulator.harness import source_line
from numba import cuda, float32, int32

from numbaflash import emulator
from numbaflash.emulator.launch import ptx_of

# Kernels have no annotations: Numba types their arguments itself.


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

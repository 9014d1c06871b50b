"""Order between the blocks of a launch: flags, fences, counters and barriers of the whole grid in global memory.

Each right kernel runs and is silent; each way to get it wrong is a race, at the line of the access that loses.
"""

from __future__ import annotations

import re

import numpy as np
import pytest
from emulator.harness import entry, source_line
from numba import cuda

from numbaflash import emulator
from numbaflash.emulator import EmulatorError
from numbaflash.emulator.launch import ptx_of

REGISTERS = ".reg .b32 %c, %d, %f, %one; .reg .b64 %data, %flag, %out; .reg .pred %p;"


def message(publish: str, poll: str, *, fence: str = "") -> int:
    """Block 0 writes 42 and publishes it, block 1 polls and reads; what that found."""
    body = f"""
    ld.param.u64 %data, [p0];
    ld.param.u64 %flag, [p1];
    ld.param.u64 %out, [p2];
    mov.u32 %c, %ctaid.x;
    mov.u32 %one, 1;
    setp.ne.u32 %p, %c, 0;
    @%p bra poll;
    st.global.u32 [%data], 42;
    {fence}
    {publish}
    bra done;
poll:
    {poll}
    setp.eq.u32 %p, %f, 0;
    @%p bra poll;
    ld.global.u32 %d, [%data];
    st.global.u32 [%out], %d;
done:
    """
    data, flag, out = (np.zeros(1, "u4") for _ in range(3))
    emulator.launch(entry(body, 3, REGISTERS, target="sm_90"), 2, 1, data, flag, out, max_steps=20000)
    return int(out[0])


ACQUIRES = [
    "ld.acquire.gpu.global.u32 %f, [%flag];",
    "atom.acq_rel.sys.global.or.b32 %f, [%flag], 0;",
    "ld.volatile.global.u32 %f, [%flag]; membar.gl;",
    "atom.cas.b32 %f, [%flag], 1, 1; fence.sc.gpu;",
]
RELEASES = [
    "st.release.gpu.global.u32 [%flag], %one;",
    "red.release.gpu.global.add.u32 [%flag], 1;",
    "membar.sys; st.volatile.global.u32 [%flag], 1;",
    "fence.acq_rel.gpu; atom.exch.b32 %f, [%flag], 1;",
]


@pytest.mark.parametrize("acquire", ACQUIRES)
@pytest.mark.parametrize("release", RELEASES)
def test_every_release_pattern_synchronizes_with_every_acquire_pattern(release: str, acquire: str) -> None:
    assert message(release, acquire) == 42


@pytest.mark.parametrize(
    ("release", "acquire"),
    [
        ("st.relaxed.gpu.global.u32 [%flag], %one;", ACQUIRES[0]),
        ("st.volatile.global.u32 [%flag], 1; membar.gl;", ACQUIRES[0]),
        ("membar.cta; st.volatile.global.u32 [%flag], 1;", ACQUIRES[0]),
        ("fence.acq_rel.cluster; st.volatile.global.u32 [%flag], 1;", ACQUIRES[0]),
        (RELEASES[0], "ld.relaxed.gpu.global.u32 %f, [%flag];"),
        (RELEASES[0], "membar.gl; ld.volatile.global.u32 %f, [%flag];"),
        (RELEASES[0], "ld.volatile.global.u32 %f, [%flag]; membar.cta;"),
    ],
    ids=[
        *("no release", "fence after the flag", "release in the block", "release in the cluster"),
        *("no acquire", "fence before the flag", "acquire in the block"),
    ],
)
def test_half_a_pattern_does_not_synchronize(release: str, acquire: str) -> None:
    with pytest.raises(EmulatorError, match=r"races with a write by block \(0, 0, 0\)") as found:
        message(release, acquire)
    assert found.value.kind == "global-race"
    assert found.value.place.ptx == "ld.global.u32 %d, [%data];"
    assert found.value.place.block == (1, 0, 0)


@pytest.mark.parametrize(
    ("release", "acquire"),
    [
        ("membar.gl; st.global.u32 [%flag], 1;", ACQUIRES[0]),
        (RELEASES[0], "ld.global.u32 %f, [%flag]; membar.gl;"),
        ("st.release.cta.global.u32 [%flag], %one;", ACQUIRES[0]),
        (RELEASES[0], "ld.acquire.cta.global.u32 %f, [%flag];"),
    ],
    ids=["plain store", "plain load", "store for the block", "load for the block"],
)
def test_flag_that_is_not_strong_between_blocks_is_a_race_itself(release: str, acquire: str) -> None:
    with pytest.raises(EmulatorError) as found:
        message(release, acquire)
    assert found.value.kind == "global-race"
    assert "[%flag]" in (found.value.place.ptx or "")


def test_release_covers_what_stands_before_its_fence() -> None:
    """The data are written between the fence and the flag; a fence earlier on does not help."""
    with pytest.raises(EmulatorError) as found:
        message("st.global.u32 [%data], 43; st.volatile.global.u32 [%flag], 1;", ACQUIRES[0], fence="membar.gl;")
    assert found.value.place.ptx == "ld.global.u32 %d, [%data];"


@cuda.jit(lineinfo=True)
def rotate(values, arrived, phases):  # type: ignore[no-untyped-def]
    """The blocks read what all of them hold, and write the sum for their own, in turns: a barrier of the grid each."""
    block, blocks = cuda.blockIdx.x, cuda.gridDim.x
    total = 0
    for phase in range(phases):
        if phase % 2 == 0:
            total = block
            for i in range(blocks):
                total += values[i]
        else:
            values[block] = total
        cuda.threadfence()
        cuda.atomic.add(arrived, 0, 1)
        while cuda.atomic.add(arrived, 0, 0) < blocks * (phase + 1):
            pass
        cuda.threadfence()


def test_barrier_of_the_grid_orders_many_readers_and_the_next_writer() -> None:
    values = np.arange(1, 7, dtype="i8")
    emulator.launch(rotate, 6, 1, values, np.zeros(1, "i8"), 4)
    first = 21 + np.arange(6)
    np.testing.assert_array_equal(values, first.sum() + np.arange(6))


@pytest.mark.parametrize("fence", [0, 1], ids=["before arriving", "after waiting"])
def test_barrier_of_the_grid_without_one_of_its_fences_is_a_race(fence: int) -> None:
    args = (np.arange(1, 7, dtype="i8"), np.zeros(1, "i8"), 4)
    ptx = ptx_of(rotate, args, (8, 0))
    start, end = list(re.finditer(r"membar\.gl;", ptx))[fence].span()  # the compiler puts blocks = 0 behind these
    with pytest.raises(EmulatorError, match=r"overwrites, unordered, what block \(\d, 0, 0\) reads") as found:
        emulator.launch(ptx[:start] + ptx[end:], 6, 1, *args)
    assert found.value.kind == "global-race"
    assert found.value.place.source == source_line(rotate, "values[block] = total")


@cuda.jit(lineinfo=True)
def everyone(values, arrived, out):  # type: ignore[no-untyped-def]
    """The leaders of all blocks meet, and each block reads what the next one wrote."""
    block, blocks = cuda.blockIdx.x, cuda.gridDim.x
    if cuda.threadIdx.x == 0:
        values[block] = block
        cuda.threadfence()
        cuda.atomic.add(arrived, 0, 1)
        while cuda.atomic.add(arrived, 0, 0) < blocks:
            pass
        cuda.threadfence()
    cuda.syncthreads()
    if cuda.threadIdx.x == 1:
        out[block] = values[(block + 1) % blocks]


def test_all_blocks_that_a_gpu_holds_at_a_time_can_wait_for_each_other() -> None:
    """As many threads as 64 multiprocessors hold: more than run together where blocks need not wait."""
    blocks, out = 128, np.zeros(128, "i4")
    emulator.launch(everyone, blocks, 1024, np.zeros(blocks, "i4"), np.zeros(1, "i4"), out, max_steps=10000)
    assert out.tolist() == [*range(1, blocks), 0]


@cuda.jit(lineinfo=True)
def some_publish(total, flag, out):  # type: ignore[no-untyped-def]
    """Blocks 0 to 2 add to a number; only block 2, the last, says so."""
    block = cuda.blockIdx.x
    if block < 3:
        cuda.atomic.add(total, 0, 1)
    if block == 2:
        cuda.threadfence()
        cuda.atomic.exch(flag, 0, 1)
    if block == 3:
        while cuda.atomic.add(flag, 0, 0) == 0:
            pass
        cuda.threadfence()
        out[0] = total[0]


def test_atomics_of_a_block_that_does_not_publish_them_are_a_race() -> None:
    with pytest.raises(EmulatorError, match=r"races with a write by block \(1, 0, 0\)") as found:
        emulator.launch(some_publish, 4, 1, *(np.zeros(1, "i4") for _ in range(3)))
    assert found.value.place.source == source_line(some_publish, "out[0] = total[0]")
    assert found.value.place.block == (3, 0, 0)


def test_flag_that_was_acquired_may_be_cleared_by_a_plain_store() -> None:
    assert message("membar.gl; st.volatile.global.u32 [%flag], 1;", f"{ACQUIRES[2]} st.global.u32 [%flag], %f;") == 42
    clear = "setp.eq.u32 %p, %f, 0; @%p bra poll; st.global.u32 [%flag], 0;"
    assert message("membar.gl; st.volatile.global.u32 [%flag], 1;", f"{ACQUIRES[2]} {clear} mov.u32 %f, 1;") == 42


def test_flag_that_is_cleared_by_a_plain_store_while_another_block_reads_it_is_a_race() -> None:
    body = """
    ld.param.u64 %flag, [p0];
    mov.u32 %c, %ctaid.x;
    setp.ne.u32 %p, %c, 0;
    @%p bra clear;
    ld.volatile.global.u32 %f, [%flag];
    bra done;
clear:
    st.global.u32 [%flag], 9;
done:
    """
    for target in (body, body.replace("bra done;", "membar.gl; bra done;")):
        with pytest.raises(EmulatorError, match=r"overwrites, unordered, what block \(0, 0, 0\) reads") as found:
            emulator.launch(entry(target, 1, REGISTERS), 2, 1, np.zeros(1, "u4"))
        assert found.value.place.ptx == "st.global.u32 [%flag], 9;"

"""Order in shared memory without barriers of the block: flags, locks, fences and the acquire and release forms.

Each right kernel runs and is silent; each way to get it wrong is a race, at the line of the access that loses.
"""

from __future__ import annotations

import re

import numpy as np
import pytest
from emulator.harness import entry, source_line
from numba import cuda, float32, int32

from numbaflash import emulator
from numbaflash.emulator import EmulatorError
from numbaflash.emulator.launch import ptx_of


@cuda.jit(lineinfo=True)
def hand_over(x, out):  # type: ignore[no-untyped-def]
    """Warp 0 fills a buffer and sets a flag; warp 1 waits for the flag and reads the buffer."""
    buffer = cuda.shared.array(32, float32)
    flag = cuda.shared.array(1, int32)
    t = cuda.threadIdx.x
    if t == 0:
        flag[0] = 0
    cuda.syncthreads()
    if t < 32:
        buffer[t] = x[t]
        cuda.syncwarp()
        if t == 0:
            cuda.threadfence_block()
            cuda.atomic.exch(flag, 0, 1)
    else:
        while cuda.atomic.add(flag, 0, 0) == 0:
            pass
        cuda.threadfence_block()
        out[t - 32] = buffer[63 - t]


X = np.arange(32, dtype="f4")


def test_flag_hands_a_buffer_from_warp_to_warp() -> None:
    out = np.zeros(32, "f4")
    emulator.launch(hand_over, 1, 64, X, out)
    np.testing.assert_array_equal(out, X[::-1])
    many = np.zeros((70, 32), "f4")
    emulator.launch(blockwise, 70, 64, X, many)
    assert (many == X[::-1]).all()


@cuda.jit
def blockwise(x, out):  # type: ignore[no-untyped-def]
    """`hand_over` the other way round: every lane fences its own writes, and the consumer's leader waits for all."""
    buffer = cuda.shared.array(32, float32)
    flag = cuda.shared.array(1, int32)
    t = cuda.threadIdx.x
    if t == 0:
        flag[0] = 0
    cuda.syncthreads()
    if t >= 32:
        buffer[t - 32] = x[t - 32]
        cuda.threadfence_block()
        cuda.syncwarp()
        if t == 63:
            cuda.atomic.exch(flag, 0, 1)
    else:
        if t == 0:
            while cuda.atomic.cas(flag, 0, 1, 1) == 0:
                pass
            cuda.threadfence_block()
        cuda.syncwarp()
        out[cuda.blockIdx.x, t] = buffer[31 - t]


def without_fence(ptx: str, which: int) -> str:
    """The text of a kernel of two fences without one of them."""
    fences = list(re.finditer(r"(membar\.cta|fence\.\S+);", ptx))
    assert len(fences) == 2
    start, end = fences[which].span()
    return ptx[:start] + ptx[end:]


@pytest.mark.parametrize("which", [0, 1], ids=["producer", "consumer"])
def test_flag_without_a_fence_on_one_side_is_a_race(which: int) -> None:
    out = np.zeros(32, "f4")
    ptx = without_fence(ptx_of(hand_over, (X, out), (8, 0)), which)
    with pytest.raises(EmulatorError, match="races with a write by thread") as found:
        emulator.launch(ptx, 1, 64, X, out)
    assert found.value.kind == "shared-race"
    assert found.value.place.source == source_line(hand_over, "out[t - 32] = ")
    assert "ld.shared" in (found.value.place.ptx or "")


def test_buffer_written_by_lanes_that_nothing_gathers_is_a_race() -> None:
    """Without the warp's barrier the fence of lane 0 covers its own element only."""
    out = np.zeros(32, "f4")
    ptx = ptx_of(hand_over, (X, out), (8, 0))
    ptx, count = re.subn(r"bar\.warp\.sync\s+[^;]*;", "", ptx)
    assert count == 1
    with pytest.raises(EmulatorError, match="races with a write by thread") as found:
        emulator.launch(ptx, 1, 64, X, out)
    assert found.value.place.source == source_line(hand_over, "out[t - 32] = ")


REGISTERS = ".reg .b32 %t, %d, %f, %one, %r<8>; .reg .b64 %out, %y; .reg .pred %p, %q;"
SHARED = ".shared .align 4 .b8 data[4]; .shared .align 4 .b8 flag[4];"


def message(publish: str, poll: str, *, after: str = "", fence: str = "") -> int:
    """Thread 0 writes 42 and publishes it, thread 32 polls and reads; what that found."""
    body = f"""
    mov.u32 %t, %tid.x;
    ld.param.u64 %out, [p0];
    mov.u32 %d, 0;
    mov.u32 %one, 1;
    mov.u32 %r0, data;
    mov.u32 %r1, flag;
    setp.eq.u32 %p, %t, 0;
    @%p st.shared.u32 [%r1], 0;
    @%p st.shared.u32 [%r0], 7;
    bar.sync 0;
    setp.eq.u32 %q, %t, 32;
    @%q bra poll;
    @!%p bra done;
    st.shared.u32 [%r0], 42;
    {fence}
    {publish}
    bra done;
poll:
    {poll}
    setp.eq.u32 %p, %f, 0;
    @%p bra poll;
    {after}
    ld.shared.u32 %d, [%r0];
    st.global.u32 [%out], %d;
done:
    """
    out = np.zeros(1, "u4")
    emulator.launch(entry(body, 1, REGISTERS + SHARED), 1, 64, out, max_steps=20000)
    return int(out[0])


ACQUIRES = [
    "ld.acquire.cta.shared.u32 %f, [%r1];",
    "atom.acquire.cta.shared.add.u32 %f, [%r1], 0;",
    "atom.acq_rel.gpu.shared.or.b32 %f, [%r1], 0;",
    "ld.volatile.shared.u32 %f, [%r1]; fence.acq_rel.cta;",
    "ld.relaxed.cta.shared.u32 %f, [%r1]; membar.cta;",
    "atom.shared.cas.b32 %f, [%r1], 1, 1; fence.sc.cta;",
]
RELEASES = [
    "st.release.cta.shared.u32 [%r1], %one;",
    "red.release.cta.shared.add.u32 [%r1], 1;",
    "atom.acq_rel.cta.shared.exch.b32 %f, [%r1], 1;",
    "membar.cta; st.volatile.shared.u32 [%r1], 1;",
    "fence.acq_rel.gpu; st.relaxed.cta.shared.u32 [%r1], %one;",
    "membar.gl; red.shared.or.b32 [%r1], 1;",
]


@pytest.mark.parametrize("acquire", ACQUIRES)
@pytest.mark.parametrize("release", RELEASES)
def test_every_release_pattern_synchronizes_with_every_acquire_pattern(release: str, acquire: str) -> None:
    assert message(release, acquire) == 42


@pytest.mark.parametrize(
    ("release", "acquire"),
    [
        ("st.relaxed.cta.shared.u32 [%r1], %one;", ACQUIRES[0]),
        ("st.volatile.shared.u32 [%r1], 1; membar.cta;", ACQUIRES[0]),
        (RELEASES[0], "ld.relaxed.cta.shared.u32 %f, [%r1];"),
        (RELEASES[0], "membar.cta; ld.volatile.shared.u32 %f, [%r1];"),
    ],
    ids=["no release", "fence after the flag", "no acquire", "fence before the flag"],
)
def test_half_a_pattern_does_not_synchronize(release: str, acquire: str) -> None:
    with pytest.raises(EmulatorError, match="races with a write by thread 0") as found:
        message(release, acquire)
    assert found.value.kind == "shared-race"
    assert found.value.place.ptx == "ld.shared.u32 %d, [%r0];"


def test_plain_flag_is_a_race_itself() -> None:
    with pytest.raises(EmulatorError) as found:
        message(RELEASES[0], "ld.shared.u32 %f, [%r1]; membar.cta;")
    assert found.value.kind == "shared-race"
    assert found.value.place.thread == (32, 0, 0)
    assert "ld.shared.u32 %f, [%r1]" in (found.value.place.ptx or "")
    with pytest.raises(EmulatorError) as found:
        message("membar.cta; st.shared.u32 [%r1], %one;", ACQUIRES[0])
    assert found.value.kind == "shared-race"
    assert "[%r1]" in (found.value.place.ptx or "")


def test_release_covers_what_stands_before_its_fence() -> None:
    """The data are written between the fence and the flag."""
    with pytest.raises(EmulatorError) as found:
        message("st.shared.u32 [%r0], 43; st.volatile.shared.u32 [%r1], 1;", ACQUIRES[0], fence="membar.cta;")
    assert found.value.place.ptx == "ld.shared.u32 %d, [%r0];"


def test_failing_compare_and_swap_releases_nothing() -> None:
    """The flag becomes 1 by a relaxed store; the compare-and-swap behind the fence changes nothing."""
    publish = "membar.cta; atom.shared.cas.b32 %f, [%r1], 5, 1; st.relaxed.cta.shared.u32 [%r1], %one;"
    assert message(publish, ACQUIRES[0]) == 42  # that store comes behind the fence as well
    publish = "st.volatile.shared.u32 [%r1], 1; membar.cta; atom.shared.cas.b32 %f, [%r1], 5, 1;"
    with pytest.raises(EmulatorError, match="races with a write by thread 0"):
        message(publish, ACQUIRES[0])


@cuda.jit(lineinfo=True)
def locked_sum(out):  # type: ignore[no-untyped-def]
    """Every thread of the block adds its number under a lock, lanes of one warp among them."""
    lock = cuda.shared.array(1, int32)
    total = cuda.shared.array(1, int32)
    t = cuda.threadIdx.x
    if t == 0:
        lock[0] = 0
        total[0] = 0
    cuda.syncthreads()
    waiting = True
    while waiting:
        if cuda.atomic.cas(lock, 0, 0, 1) == 0:
            cuda.threadfence_block()
            total[0] += t
            cuda.threadfence_block()
            cuda.atomic.exch(lock, 0, 0)
            waiting = False
    cuda.syncthreads()
    if t == 0:
        out[cuda.blockIdx.x] = total[0]


def test_lock_orders_the_threads_of_a_block() -> None:
    out = np.zeros(3, "i4")
    emulator.launch(locked_sum, 3, 40, out)
    assert (out == 39 * 20).all()


@pytest.mark.parametrize("which", [0, 1], ids=["after taking it", "before giving it back"])
def test_lock_without_one_of_its_fences_is_a_race(which: int) -> None:
    out = np.zeros(3, "i4")
    ptx = without_fence(ptx_of(locked_sum, (out,), (8, 0)), which)
    with pytest.raises(EmulatorError) as found:
        emulator.launch(ptx, 3, 96, out)
    assert found.value.kind == "shared-race"
    assert found.value.place.source == source_line(locked_sum, "total[0] += t")


@cuda.jit
def ring(x, out):  # type: ignore[no-untyped-def]
    """Warp 0 fills two slots in turns, warp 1 empties them; counters say how far each is."""
    slots = cuda.shared.array((2, 32), float32)
    counters = cuda.shared.array(2, int32)
    t = cuda.threadIdx.x
    lane = t % 32
    if t < 2:
        counters[t] = 0
    cuda.syncthreads()
    for i in range(x.shape[0]):
        if t < 32:
            while cuda.atomic.add(counters, 1, 0) < i - 1:
                pass
            cuda.threadfence_block()
            slots[i % 2, lane] = x[i, lane]
        else:
            while cuda.atomic.add(counters, 0, 0) <= i:
                pass
            cuda.threadfence_block()
            out[i, lane] = slots[i % 2, 31 - lane]
        cuda.syncwarp()
        if lane == 0:
            cuda.threadfence_block()
            cuda.atomic.add(counters, t // 32, 1)


def test_ring_of_slots_between_two_warps() -> None:
    x = np.random.default_rng(0).random((8, 32)).astype("f4")
    out = np.zeros_like(x)
    emulator.launch(ring, 1, 64, x, out)
    np.testing.assert_array_equal(out, x[:, ::-1])


CONSUMERS = """
    mov.u32 %t, %tid.x;
    ld.param.u64 %out, [p0];
    mad.wide.u32 %y, %t, 4, %out;
    mov.u32 %r0, slot;
    setp.lt.u32 %p, %t, 32;
    @%p bra producer;
    bar.sync 1, 128;
    ld.shared.u32 %d, [%r0];
    st.global.u32 [%y], %d;
    shr.u32 %r1, %t, 5;
    setp.eq.u32 %q, %r1, {forgotten};
    @%q bra done;
    bar.arrive 2, {count};
    bra done;
producer:
    st.shared.u32 [%r0], 7;
    bar.arrive 1, 128;
    bar.sync 2, {count};
    st.shared.u32 [%r0], 8;
done:
"""


def consume(forgotten: int) -> list[int]:
    """Warp 0 fills a slot that warps 1 to 3 read, and once more when all but a forgotten one say that they have."""
    out = np.zeros(128, "u4")
    body = CONSUMERS.format(forgotten=forgotten, count=128 if forgotten > 3 else 96)
    emulator.launch(entry(body, 1, REGISTERS + ".shared .align 4 .b8 slot[4];"), 1, 128, out)
    return out.tolist()


def test_named_barriers_hand_a_slot_to_three_warps_and_back() -> None:
    assert consume(forgotten=9) == [0] * 32 + [7] * 96


@pytest.mark.parametrize("forgotten", [1, 2, 3])
def test_slot_that_is_filled_before_one_of_its_readers_is_done_is_a_race(forgotten: int) -> None:
    with pytest.raises(EmulatorError, match=f"overwrites, unordered, what thread {32 * forgotten + 31}") as found:
        consume(forgotten)
    assert found.value.kind == "shared-race"
    assert found.value.place.ptx == "st.shared.u32 [%r0], 8;"


@cuda.jit(lineinfo=True)
def counted(x, out, sync, reader):  # type: ignore[no-untyped-def]
    """All threads add to one number, and one of them takes it out."""
    total = cuda.shared.array(1, int32)
    t = cuda.threadIdx.x
    if t == 0:
        total[0] = 0
    cuda.syncthreads()
    cuda.atomic.add(total, 0, x[t])
    if sync:
        cuda.syncthreads()
    if t == reader:
        out[0] = total[0]


@pytest.mark.parametrize("reader", [0, 40, 127])
def test_sum_by_atomics_that_is_read_before_all_have_added_is_a_race(reader: int) -> None:
    """The last thread adds last here, by chance: what the others added is not ordered before what it reads."""
    x, out = np.arange(128, dtype="i4"), np.zeros(1, "i4")
    emulator.launch(counted, 1, 128, x, out, True, reader)
    assert out[0] == x.sum()
    with pytest.raises(EmulatorError, match="races with a write by thread") as found:
        emulator.launch(counted, 1, 128, x, out, False, reader)
    assert found.value.kind == "shared-race"
    assert found.value.place.source == source_line(counted, "out[0] = total[0]")


TICKETS = """
    mov.u32 %t, %tid.x;
    ld.param.u64 %out, [p0];
    mov.u32 %r1, data;
    setp.eq.u32 %p, %t, 0;
    @%p st.shared.u32 [%r1], 0;
    bar.sync 0;
    atom.shared.add.u32 %d, [%r1], 1;
    setp.ne.u32 %p, %d, 127;
    @%p bra done;
    st.shared.u32 [%r1], 0;
    st.global.u32 [%out], %d;
done:
"""


def test_thread_that_takes_the_last_ticket_may_reset_their_counter() -> None:
    """Its atomic has seen all others: it reads what they left."""
    out = np.zeros(1, "u4")
    emulator.launch(entry(TICKETS, 1, REGISTERS + SHARED), 1, 128, out)
    assert out[0] == 127


def test_atomic_after_a_read_by_another_warp_is_a_race() -> None:
    """Also where the last write before was an atomic."""
    body = """
    mov.u32 %t, %tid.x;
    ld.param.u64 %out, [p0];
    mov.u32 %r1, data;
    setp.eq.u32 %p, %t, 0;
    @%p st.shared.u32 [%r1], 0;
    bar.sync 0;
    red.shared.add.u32 [%r1], 1;
    bar.sync 0;
    setp.ge.u32 %p, %t, 32;
    @%p bra late;
    ld.shared.u32 %d, [%r1];
    bra done;
late:
    red.shared.add.u32 [%r1], 2;
done:
    """
    with pytest.raises(EmulatorError, match="overwrites, unordered, what thread") as found:
        emulator.launch(entry(body, 1, REGISTERS + SHARED), 1, 64, np.zeros(1, "u4"))
    assert found.value.place.ptx == "red.shared.add.u32 [%r1], 2;"


def test_flag_that_is_cleared_by_a_plain_store_while_it_may_be_polled_is_a_race() -> None:
    """The one who has acquired it may do so; the one who published it may not."""
    assert message(RELEASES[0], ACQUIRES[0], after="st.shared.u32 [%r1], 0;") == 42
    late = "poll: ld.volatile.shared.u32 %f, [%r1]; setp.eq.u32 %q, %f, 0; bra done;"
    body = f"""
    mov.u32 %t, %tid.x;
    mov.u32 %r1, flag;
    setp.eq.u32 %p, %t, 0;
    @%p st.shared.u32 [%r1], 1;
    bar.sync 0;
    setp.eq.u32 %q, %t, 0;
    @%q bra poll;
    setp.ne.u32 %p, %t, 32;
    @%p bra done;
    add.u32 %t, %t, 0;
    bra clear;
{late}
clear:
    st.shared.u32 [%r1], 0;
done:
    """
    with pytest.raises(EmulatorError, match="overwrites, unordered, what thread 0 reads") as found:
        emulator.launch(entry(body, 1, REGISTERS + SHARED), 1, 64, np.zeros(1, "u4"))
    assert found.value.place.ptx == "st.shared.u32 [%r1], 0;"

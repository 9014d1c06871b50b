"""Shuffles, votes, matches, reductions and barriers, against loops over the lanes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from emulator.harness import Array, entry, same

from numbaflash import emulator

REGISTERS = """
    .reg .b32 %t, %lane, %a, %d, %e, %m, %r<4>;
    .reg .b64 %in, %out, %x, %y;
    .reg .pred %p, %q;
"""


def collective(instruction: str, values: Array, *, before: str = "", threads: int = 64, target: str = "sm_80") -> Array:
    """Runs %a -> (%d, %e) for each thread; results as (threads, 2)."""
    body = f"""
    mov.u32 %t, %tid.x;
    mov.u32 %lane, %laneid;
    ld.param.u64 %in, [p0];
    ld.param.u64 %out, [p1];
    mad.wide.u32 %x, %t, 4, %in;
    mad.wide.u32 %y, %t, 8, %out;
    ld.global.u32 %a, [%x];
    mov.u32 %d, 0;
    mov.u32 %e, 0;
    {before}
    {instruction}
    st.global.v2.u32 [%y], {{%d, %e}};
    """
    out = np.zeros((threads, 2), "u4")
    emulator.launch(entry(body, 2, REGISTERS, target), 1, threads, values.view("u4"), out)
    return out


VALUES = np.random.default_rng(0).integers(0, 2**32, 64, dtype="u4")


def shuffled(mode: str, lane: int, b: int, c: int) -> tuple[int, bool]:
    """Source lane and predicate, by the ISA's pseudocode."""
    segment, clamp = c >> 8 & 31, c & 31
    last = lane & segment | clamp & ~segment
    first = lane & segment
    source = {"up": lane - b, "down": lane + b, "bfly": lane ^ b, "idx": first | b & ~segment & 31}[mode]
    inside = source >= last if mode == "up" else source <= last
    return (source if inside else lane), inside


@pytest.mark.parametrize("width", [32, 16, 8])
@pytest.mark.parametrize(
    ("mode", "distance"), [("up", 1), ("up", 5), ("down", 3), ("bfly", 1), ("bfly", 12), ("idx", 7)]
)
def test_shuffle_reads_the_lane_of_the_pseudocode(mode: str, distance: int, width: int) -> None:
    c = (32 - width) << 8 | (0 if mode == "up" else 31)
    out = collective(f"shfl.sync.{mode}.b32 %d|%p, %a, {distance}, {c}, 0xFFFFFFFF; selp.u32 %e, 1, 0, %p;", VALUES)
    for thread in range(64):
        source, inside = shuffled(mode, thread % 32, distance, c)
        assert out[thread, 0] == VALUES[thread // 32 * 32 + source]
        assert out[thread, 1] == inside


def test_votes_see_the_members_only() -> None:
    predicate = "setp.lt.u32 %p, %a, 0x80000000;"
    holds = VALUES < 0x80000000
    ballots = [int(np.packbits(holds[w * 32 : w * 32 + 32], bitorder="little").view("u4")[0]) for w in range(2)]
    out = collective("vote.sync.ballot.b32 %d, %p, 0xFFFFFFFF;", VALUES, before=predicate)
    assert out[:32, 0].tolist() == [ballots[0]] * 32
    assert out[32:, 0].tolist() == [ballots[1]] * 32
    for mode, oracle in (("all", all), ("any", any)):
        text = f"vote.sync.{mode}.pred %q, %p, 0xFFFFFFFF; selp.u32 %d, 1, 0, %q;"
        for values in (VALUES, np.zeros(64, "u4"), np.full(64, 2**31, "u4")):
            found = collective(text, values, before=predicate)[:, 0].reshape(2, 32)
            for warp in range(2):
                assert (found[warp] == oracle(values[warp * 32 : warp * 32 + 32] < 0x80000000)).all()
    uniform = collective(
        "vote.sync.uni.pred %q, %p, -1; selp.u32 %d, 1, 0, %q;", np.full(64, 2**31, "u4"), before=predicate
    )
    assert (uniform[:, 0] == 1).all()


def test_matching_lanes_find_each_other() -> None:
    values = np.random.default_rng(1).integers(0, 4, 64).astype("u4")
    out = collective("match.any.sync.b32 %d, %a, 0xFFFFFFFF;", values)
    for thread in range(64):
        warp = values[thread // 32 * 32 : thread // 32 * 32 + 32]
        assert out[thread, 0] == sum(1 << i for i in range(32) if warp[i] == values[thread])
    same_value = np.concatenate([np.full(32, 5, "u4"), values[:32]])
    out = collective("match.all.sync.b32 %d|%p, %a, 0xFFFFFFFF; selp.u32 %e, 1, 0, %p;", same_value)
    assert (out[:32] == [0xFFFFFFFF, 1]).all()
    assert (out[32:] == [0, 0]).all()


def test_matching_looks_at_all_64_bits() -> None:
    """The low words are all the same; the high ones tell odd lanes from even ones."""
    wide = ".reg .b64 %w; and.b32 %r0, %lane, 1; mov.b64 %w, {%a, %r0};"
    out = collective("match.any.sync.b64 %d, %w, -1;", np.full(64, 7, "u4"), before=wide)
    assert out[:, 0].tolist() == [0x55555555, 0xAAAAAAAA] * 32
    out = collective("match.all.sync.b64 %d|%p, %w, -1; selp.u32 %e, 1, 0, %p;", np.full(64, 7, "u4"), before=wide)
    assert not out.any()


REDUCTIONS = [
    ("add.u32", np.add, "u4"),
    ("add.s32", np.add, "i4"),
    ("min.u32", np.minimum, "u4"),
    ("min.s32", np.minimum, "i4"),
    ("max.u32", np.maximum, "u4"),
    ("max.s32", np.maximum, "i4"),
    ("and.b32", np.bitwise_and, "u4"),
    ("or.b32", np.bitwise_or, "u4"),
    ("xor.b32", np.bitwise_xor, "u4"),
]


@pytest.mark.parametrize(("name", "oracle", "dtype"), REDUCTIONS)
def test_warp_reduction(name: str, oracle: np.ufunc, dtype: str) -> None:
    out = collective(f"redux.sync.{name} %d, %a, 0xFFFFFFFF;", VALUES)
    warps = VALUES.view(dtype).reshape(2, 32)
    same(out[:, 0].reshape(2, 32), np.repeat(oracle.reduce(warps, axis=1, dtype=dtype)[:, None], 32, axis=1).view("u4"))


def test_halves_of_a_warp_reduce_on_their_own_in_diverged_code() -> None:
    """Each half has its own mask; the halves take different branches, and the instruction stands in both."""
    before = """
    setp.lt.u32 %p, %lane, 16;
    @%p bra low;
    redux.sync.add.u32 %d, %a, 0xFFFF0000;
    bra both;
low:
    redux.sync.add.u32 %d, %a, 0x0000FFFF;
both:
    """
    out = collective("mov.u32 %e, %d;", VALUES, before=before)
    expected = np.repeat(VALUES.reshape(4, 16).sum(axis=1, dtype="u4"), 16)
    same(out[:, 0], expected)


def test_masks_computed_at_run_time_group_the_lanes_of_one_instruction() -> None:
    before = "setp.lt.u32 %p, %lane, 16; selp.b32 %m, 0x0000FFFF, 0xFFFF0000, %p;"
    out = collective("redux.sync.add.u32 %d, %a, %m;", VALUES, before=before)
    same(out[:, 0], np.repeat(VALUES.reshape(4, 16).sum(axis=1, dtype="u4"), 16))


def test_active_mask_shows_the_diverged_lanes() -> None:
    out = collective(
        "setp.lt.u32 %p, %lane, 5; @!%p bra done; activemask.b32 %d; done:",
        VALUES,
    )
    assert (out[:, 0].reshape(2, 32)[:, :5] == 0b11111).all()
    assert (out[:, 0].reshape(2, 32)[:, 5:] == 0).all()


def test_elected_lane_is_the_lowest_of_the_mask() -> None:
    out = collective("elect.sync %d|%p, 0xFFFFFFFF; selp.u32 %e, 1, 0, %p;", VALUES, target="sm_90")
    assert (out[:, 0] == 0).all()
    assert out[:, 1].reshape(2, 32).argmax(axis=1).tolist() == [0, 0]
    assert out[:, 1].sum() == 2


def test_lanes_that_come_late_are_waited_for() -> None:
    """The shuffle stands before the code of the other lanes, which jump back to it."""
    body = """
    setp.lt.u32 %p, %lane, 16;
    @!%p bra late;
meet:
    shfl.sync.bfly.b32 %d, %a, 16, 31, 0xFFFFFFFF;
    bra done;
late:
    add.u32 %a, %a, 1;
    bra meet;
done:
    """
    out = collective(body, VALUES)
    shifted = VALUES + (np.arange(64) % 32 >= 16).astype("u4")
    same(out[:, 0], shifted.reshape(2, 2, 16)[:, ::-1].reshape(-1))


# ---- barriers


def block(body: str, threads: int, out: Array, *, shared: str = "", **options: Any) -> None:
    text = entry(
        f"mov.u32 %t, %tid.x; ld.param.u64 %out, [p0]; mad.wide.u32 %y, %t, 4, %out; {body}", 1, REGISTERS + shared
    )
    emulator.launch(text, options.pop("grid", 1), threads, out, **options)


@pytest.mark.parametrize(
    "barrier", ["bar.sync 0", "bar.cta.sync 0", "barrier.sync.aligned 3", "barrier.cta.sync 15", "bar.sync 1, 128"]
)
def test_barrier_orders_the_warps_of_a_block(barrier: str) -> None:
    out = np.zeros(128, "u4")
    block(
        f"mov.u32 %r0, ours; mad.lo.u32 %r1, %t, 4, %r0; st.shared.u32 [%r1], %t; {barrier};"
        "sub.u32 %r2, 127, %t; mad.lo.u32 %r1, %r2, 4, %r0; ld.shared.u32 %d, [%r1]; st.global.u32 [%y], %d;",
        128,
        out,
        shared=".shared .align 4 .b8 ours[512];",
    )
    assert out.tolist() == list(range(127, -1, -1))


@pytest.mark.parametrize(("name", "expected"), [("popc.u32", 50), ("and.pred", 0), ("or.pred", 1)])
def test_reducing_barrier_gives_everybody_the_same(name: str, expected: int) -> None:
    out = np.zeros(96, "u4")
    target = "%d" if "popc" in name else "%q"
    after = "" if "popc" in name else "selp.u32 %d, 1, 0, %q;"
    block(f"setp.lt.u32 %p, %t, 50; bar.red.{name} {target}, 0, %p; {after} st.global.u32 [%y], %d;", 96, out)
    assert (out == expected).all()


def test_named_barriers_let_producers_and_consumers_meet() -> None:
    """Warp 0 produces and arrives, warp 1 waits at the same barrier elsewhere in the code."""
    out = np.zeros(64, "u4")
    block(
        """
    mov.u32 %r0, ours;
    mov.u32 %d, 0;
    setp.lt.u32 %p, %t, 32;
    @!%p bra consumer;
    mad.lo.u32 %r1, %t, 4, %r0;
    add.u32 %r2, %t, 1000;
    st.shared.u32 [%r1], %r2;
    bar.arrive 1, 64;
    bra done;
consumer:
    bar.sync 1, 64;
    sub.u32 %r2, %t, 32;
    mad.lo.u32 %r1, %r2, 4, %r0;
    ld.shared.u32 %d, [%r1];
done:
    st.global.u32 [%y], %d;
    """,
        64,
        out,
        shared=".shared .align 4 .b8 ours[128];",
    )
    assert out.tolist() == [0] * 32 + list(range(1000, 1032))


ONE_BY_ONE = """
    mov.u32 %r0, ours;
    mad.lo.u32 %r1, %t, 4, %r0;
    setp.lt.u32 %p, %lane, 16;
    @%p bra low;
    st.shared.u32 [%r1], %t;
    barrier.sync 3{count};
    bra meet;
low:
    add.u32 %r2, %t, 1000;
    st.shared.u32 [%r1], %r2;
    {low}
meet:
    xor.b32 %r2, %t, 48;
    mad.lo.u32 %r1, %r2, 4, %r0;
    ld.shared.u32 %d, [%r1];
    st.global.u32 [%y], %d;
"""


@pytest.mark.parametrize("count", ["", ", 64"], ids=["whole block", "count"])
def test_unaligned_barrier_takes_the_threads_of_a_warp_one_by_one(count: str) -> None:
    """The halves of each warp come to the barrier at two places of the code."""
    shared = ".shared .align 4 .b8 ours[256];"
    head = "mov.u32 %lane, %laneid;"
    out = np.zeros(64, "u4")
    block(head + ONE_BY_ONE.format(count=count, low=f"barrier.sync 3{count};"), 64, out, shared=shared)
    other = np.arange(64) ^ 48
    assert out.tolist() == np.where(other % 32 < 16, other + 1000, other).tolist()
    with pytest.raises(emulator.EmulatorError, match="threads wait for others of their warp") as found:
        block(head + ONE_BY_ONE.format(count=count, low="barrier.sync 4;"), 64, out, shared=shared)
    assert found.value.kind == "barrier"
    aligned = ONE_BY_ONE.format(count=count, low=f"barrier.sync 3{count};").replace("sync", "sync.aligned")
    with pytest.raises(emulator.EmulatorError, match="the others that it needs do not come") as found:
        block(head + aligned, 64, out, shared=shared)
    assert found.value.kind == "barrier"


def test_unaligned_barrier_does_not_wait_for_threads_that_have_exited() -> None:
    """Half of each warp computes for a while and leaves without the barrier."""
    body = """
    mov.u32 %lane, %laneid;
    setp.ge.u32 %p, %lane, 16;
    @%p bra leaves;
    barrier.sync 1, 64;
    st.global.u32 [%y], 5;
    bra done;
leaves:
    mov.u32 %r0, 0;
again:
    add.u32 %r0, %r0, 1;
    setp.lt.u32 %q, %r0, 9;
    @%q bra again;
    exit;
done:
    """
    out = np.zeros(64, "u4")
    block(body, 64, out)
    assert out.tolist() == ([5] * 16 + [0] * 16) * 2


@pytest.mark.parametrize(("name", "expected"), [("popc.u32", 24), ("and.pred", 0), ("or.pred", 1)])
def test_unaligned_reducing_barrier_counts_every_thread_once(name: str, expected: int) -> None:
    target = "%d" if "popc" in name else "%q"
    after = "" if "popc" in name else "selp.u32 %d, 1, 0, %q;"
    text = f"barrier.red.{name} {target}, 2, %p;"
    body = f"""
    mov.u32 %lane, %laneid;
    and.b32 %r0, %t, 3;
    setp.eq.u32 %p, %r0, 3;
    setp.lt.u32 %q, %lane, 7;
    @%q bra low;
    {text}
    bra both;
low:
    {text}
both:
    {after}
    st.global.u32 [%y], %d;
    """
    out = np.zeros(96, "u4")
    block(body, 96, out)
    assert (out == expected).all()


PRODUCER = """
    mov.u32 %r0, ours;
    mad.lo.u32 %r1, %lane, 4, %r0;
    mov.u32 %d, 0;
    setp.lt.u32 %p, %t, 32;
    @!%p bra consumer;
    {before}
    barrier.arrive 1, 64;
    {after}
    bra done;
consumer:
    barrier.sync 1, 64;
    ld.shared.u32 %d, [%r1];
done:
    st.global.u32 [%y], %d;
"""


def test_arriving_orders_what_stands_before_it_and_nothing_after() -> None:
    shared = ".shared .align 4 .b8 ours[128];"
    head, store = "mov.u32 %lane, %laneid;", "st.shared.u32 [%r1], %t;"
    out = np.zeros(64, "u4")
    block(head + PRODUCER.format(before=store, after=""), 64, out, shared=shared)
    assert out.tolist() == [0] * 32 + list(range(32))
    late = "add.u32 %r2, %t, 7; st.shared.u32 [%r1], %r2;"
    with pytest.raises(emulator.EmulatorError) as found:
        block(head + PRODUCER.format(before=store, after=late), 64, out, shared=shared)
    assert found.value.kind == "shared-race"


def test_volatile_flags_are_no_race() -> None:
    """Warp 1 polls a flag that warp 0 sets."""
    out = np.zeros(64, "u4")
    block(
        """
    mov.u32 %r0, flag;
    mov.u32 %d, 1;
    setp.eq.u32 %p, %t, 0;
    @%p st.volatile.shared.u32 [%r0], 0;
    bar.sync 0;
    setp.ge.u32 %p, %t, 32;
    @%p bra poll;
    setp.eq.u32 %p, %t, 5;
    @%p st.volatile.shared.u32 [%r0], 3;
    bra done;
poll:
    ld.volatile.shared.u32 %d, [%r0];
    setp.eq.u32 %p, %d, 0;
    @%p bra poll;
done:
    st.global.u32 [%y], %d;
    """,
        64,
        out,
        shared=".shared .align 4 .b8 flag[4];",
    )
    assert out.tolist() == [1] * 32 + [3] * 32


def test_warp_barrier_orders_the_lanes_of_a_diverged_warp() -> None:
    body = """
    mov.u32 %r0, ours;
    mad.lo.u32 %r1, %t, 4, %r0;
    setp.eq.u32 %p, %t, 0;
    @%p st.shared.u32 [%r0], 77;
    {sync}
    ld.shared.u32 %d, [%r0];
    st.global.u32 [%y], %d;
    """
    out = np.zeros(32, "u4")
    shared = ".shared .align 4 .b8 ours[128];"
    block(body.format(sync="bar.warp.sync 0xFFFFFFFF;"), 32, out, shared=shared)
    assert (out == 77).all()
    with pytest.raises(emulator.EmulatorError, match="races with a write by thread 0"):
        block(body.format(sync=""), 32, out, shared=shared)


def test_blocks_on_one_machine_keep_their_shared_memory_apart() -> None:
    out = np.zeros(40, "u4")
    text = entry(
        "mov.u32 %t, %tid.x; mov.u32 %lane, %ctaid.x; ld.param.u64 %out, [p0]; mad.wide.u32 %y, %lane, 4, %out;"
        "mov.u32 %r0, ours; setp.eq.u32 %p, %t, 0; @%p st.shared.u32 [%r0], %lane; bar.sync 0;"
        "ld.shared.u32 %d, [%r0]; setp.eq.u32 %p, %t, 33; @%p st.global.u32 [%y], %d;",
        1,
        REGISTERS + ".shared .align 4 .b8 ours[4];",
    )
    emulator.launch(text, 40, 64, out)
    assert out.tolist() == list(range(40))


def test_every_collective_and_modifier_has_a_row(whole_file: Any) -> None:
    assert whole_file.missing("warp") == []

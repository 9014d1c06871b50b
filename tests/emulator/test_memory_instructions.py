"""Loads, stores, atomics and asynchronous copies in every state space, against what NumPy finds in the same bytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from emulator.harness import Array, entry, same
from numba import cuda, float32, int32

from numbaflash import emulator
from numbaflash.emulator.ir import SIZES

SCOPES = ("cta", "cluster", "gpu", "sys")

THREAD = """
    mov.u32 %t, %tid.x;
    ld.param.u64 %in, [p0];
    ld.param.u64 %out, [p1];
"""
REGISTERS = """
    .reg .b32 %t, %r<8>;
    .reg .b64 %in, %out, %x, %y, %rd<8>;
    .reg .b16 %h<8>;
    .reg .f32 %f<8>;
    .reg .pred %p;
"""


def run(body: str, source: Array, target: Array, threads: int = 32, **options: Any) -> emulator.Report:
    variables = options.pop("variables", "")
    before = options.pop("before", "")
    text = entry(THREAD + body, 2, REGISTERS + variables, target=options.pop("version", "sm_80"), before=before)
    return emulator.launch(text, 1, threads, source, target, **options)


@pytest.mark.parametrize(("kind", "dtype"), [("u8", "u1"), ("s8", "i1"), ("u16", "u2"), ("s16", "i2"), ("b32", "u4")])
def test_load_extends_to_its_register(kind: str, dtype: str) -> None:
    source = np.random.default_rng(0).integers(0, 256, 32 * 4, dtype="u1").view(dtype)[:32].copy()
    target = np.zeros(32, "i4" if dtype[0] == "i" else "u4")
    run(
        f"mad.wide.u32 %x, %t, {source.itemsize}, %in; mad.wide.u32 %y, %t, 4, %out;"
        f"ld.global.{kind} %r0, [%x]; st.global.b32 [%y], %r0;",
        source,
        target,
    )
    same(target, source.astype(target.dtype))


TYPES = [f"{letter}{bits}" for letter in "bsu" for bits in (8, 16, 32, 64)]
TYPES += ["f16", "f16x2", "bf16", "bf16x2", "f32", "f64"]


@pytest.mark.parametrize("load", ["ld", "ldu"])
@pytest.mark.parametrize("kind", TYPES)
def test_bytes_come_back_as_they_were_stored(kind: str, load: str) -> None:
    size = SIZES[kind]
    register = {"f32": "%f0", "f64": "%fd"}.get(kind, {1: "%h0", 2: "%h0", 4: "%r0", 8: "%rd0"}[size])
    source = np.random.default_rng(3).integers(0, 256, 32 * size, dtype="u1")
    target = np.zeros_like(source)
    run(
        f"mad.wide.u32 %x, %t, {size}, %in; mad.wide.u32 %y, %t, {size}, %out;"
        f"{load}.global.{kind} {register}, [%x]; st.global.{kind} [%y], {register};",
        source,
        target,
        variables=".reg .f64 %fd;",
    )
    same(target, source)


@pytest.mark.parametrize(
    "load",
    [
        *(f"ld.global.{x}.u32" for x in ("ca", "cg", "cs", "lu", "cv")),
        *(f"ld.global.L1::{x}.u32" for x in ("evict_normal", "evict_unchanged", "evict_first", "evict_last")),
        *(f"ld.global.nc.L1::no_allocate.L2::{x}.u32" for x in ("64B", "128B", "256B")),
        *("ld.weak.global.u32", "ld.volatile.global.u32", "ldu.global.u32", "ldu.u32", "ld.u32"),
        *(f"ld.{order}.{scope}.global.u32" for order in ("relaxed", "acquire") for scope in SCOPES),
    ],
)
def test_hints_and_orders_of_loads_do_not_change_what_is_read(load: str) -> None:
    source, target = np.random.default_rng(4).integers(0, 2**32, 32, dtype="u4"), np.zeros(32, "u4")
    prefetches = "prefetch.global.L1 [%x]; prefetch.local.L1 [%rd0]; prefetch.L2 [%x]; prefetchu.L1 [%x];"
    run(
        "mad.wide.u32 %x, %t, 4, %in; mad.wide.u32 %y, %t, 4, %out; mov.u64 %rd0, mine;"
        f"{prefetches} {load} %r0, [%x]; st.global.u32 [%y], %r0;",
        source,
        target,
        variables=".local .align 4 .b8 mine[4];",
    )
    same(target, source)


@pytest.mark.parametrize(
    "store",
    [
        *(f"st.global.{x}.u32" for x in ("wb", "cg", "cs", "wt")),
        *(f"st.global.L1::{x}.u32" for x in ("evict_normal", "evict_unchanged", "evict_first", "evict_last")),
        *("st.global.L1::no_allocate.u32", "st.weak.global.u32", "st.volatile.global.u32", "st.u32"),
        *(f"st.{order}.{scope}.global.u32" for order in ("relaxed", "release") for scope in SCOPES),
    ],
)
def test_hints_and_orders_of_stores_do_not_change_what_is_written(store: str) -> None:
    source, target = np.random.default_rng(5).integers(0, 2**32, 32, dtype="u4"), np.zeros(32, "u4")
    fences = "membar.cta; membar.gl; membar.sys;"
    fences += "".join(f"fence.{x}{scope};" for x in ("", "sc.", "acq_rel.") for scope in SCOPES)
    run(
        "mad.wide.u32 %x, %t, 4, %in; mad.wide.u32 %y, %t, 4, %out;"
        f"ld.global.u32 %r0, [%x]; {store} [%y], %r0; {fences}",
        source,
        target,
    )
    same(target, source)


def test_parameters_of_kernels_and_functions_are_read_by_their_spaces() -> None:
    target = np.zeros(1, "u4")
    function = """
.func (.param .b32 result) next(.param .b32 x)
{
    .reg .b32 %a;
    ld.param::func.u32 %a, [x];
    add.u32 %a, %a, 1;
    st.param::func.b32 [result], %a;
    ret;
}
"""
    run(
        "ld.param::entry.u64 %out, [p1]; { .param .b32 a; .param .b32 b; st.param.b32 [a], 41;"
        "call.uni (b), next, (a); ld.param.b32 %r0, [b]; } st.global.u32 [%out], %r0;",
        np.zeros(1, "u4"),
        target,
        threads=1,
        before=function,
    )
    assert target[0] == 42


@pytest.mark.parametrize(
    ("vector", "kind", "registers"), [("v2", "b32", "%r0, %r1"), ("v4", "b32", "%r0, %r1, %r2, %r3")]
)
@pytest.mark.parametrize("load", ["ld.global", "ld.global.ca", "ld.global.nc.L1::no_allocate.L2::128B", "ldu.global"])
def test_vector_load_and_store_move_neighbours(vector: str, kind: str, registers: str, load: str) -> None:
    count = int(vector[1:])
    source = np.random.default_rng(1).integers(0, 2**32, 32 * count, dtype="u4")
    target = np.zeros_like(source)
    run(
        f"mad.wide.u32 %x, %t, {4 * count}, %in; mad.wide.u32 %y, %t, {4 * count}, %out;"
        f"{load}.{vector}.{kind} {{{registers}}}, [%x]; st.global.{vector}.{kind} [%y], {{{registers}}};",
        source,
        target,
    )
    same(target, source)


def test_offsets_and_immediate_sources() -> None:
    source, target = np.arange(64, dtype="u4"), np.zeros(64, "u4")
    run(
        "mad.wide.u32 %x, %t, 4, %in; mad.wide.u32 %y, %t, 4, %out;"
        "ld.global.u32 %r0, [%x+128]; st.global.u32 [%y], %r0; st.global.u32 [%y+128], 7;",
        source,
        target,
    )
    same(target, np.concatenate([source[32:], np.full(32, 7, "u4")]))


@pytest.mark.parametrize("space", ["shared", "shared::cta", "local"])
@pytest.mark.parametrize("generic", [False, True], ids=["direct", "generic"])
def test_private_and_shared_memory_hold_what_was_stored(space: str, generic: bool) -> None:
    source, target = np.random.default_rng(2).random(32).astype("f4"), np.zeros(32, "f4")
    suffix = "" if generic else f".{space}"
    convert = f"cvta.{space}.u64 %rd0, %rd0;" if generic else ""
    step = "mad.wide.u32 %rd1, %t, 4, %rd0;" if space != "local" else "mov.u64 %rd1, %rd0;"
    run(
        f"mad.wide.u32 %x, %t, 4, %in; mad.wide.u32 %y, %t, 4, %out; mov.u64 %rd0, buffer; {convert} {step}"
        f"ld.global.f32 %f0, [%x]; st{suffix}.f32 [%rd1], %f0; ld{suffix}.f32 %f1, [%rd1]; st.global.f32 [%y], %f1;",
        source,
        target,
        variables=f".{space.split('::')[0]} .align 4 .b8 buffer[128];",
    )
    same(target, source)


def test_one_generic_access_reaches_several_spaces() -> None:
    """Lanes 0-9 address global memory, 10-19 shared and the rest local memory, by the same instructions."""
    source, target = np.arange(32, dtype="u4"), np.zeros(32, "u4")
    run(
        "mad.wide.u32 %x, %t, 4, %in; mad.wide.u32 %y, %t, 4, %out;"
        "mov.u64 %rd0, mine; cvta.local.u64 %rd0, %rd0;"
        "mov.u64 %rd1, ours; cvta.shared.u64 %rd1, %rd1; mad.wide.u32 %rd1, %t, 4, %rd1;"
        "setp.lt.u32 %p, %t, 20; selp.b64 %rd0, %rd1, %rd0, %p; setp.lt.u32 %p, %t, 10; selp.b64 %rd0, %y, %rd0, %p;"
        "add.u32 %r0, %t, 100; st.u32 [%rd0], %r0; ld.u32 %r1, [%rd0]; st.global.u32 [%y], %r1;",
        source,
        target,
        variables=".local .align 4 .b8 mine[4]; .shared .align 4 .b8 ours[128];",
    )
    same(target, np.arange(100, 132, dtype="u4"))


def test_windows_are_told_apart_by_isspacep() -> None:
    source, target = np.zeros(1, "u4"), np.zeros(3, "u4")
    run(
        "mov.u64 %rd0, ours; cvta.shared.u64 %rd0, %rd0;"
        "isspacep.shared %p, %rd0; @%p isspacep.shared::cta %p, %rd0; selp.u32 %r0, 1, 0, %p;"
        "isspacep.global %p, %in; selp.u32 %r1, 1, 0, %p;"
        "isspacep.local %p, %in; selp.u32 %r2, 1, 0, %p;"
        "st.global.u32 [%out], %r0; st.global.u32 [%out+4], %r1; st.global.u32 [%out+8], %r2;",
        source,
        target,
        threads=1,
        variables=".shared .align 4 .b8 ours[4];",
    )
    assert target.tolist() == [1, 1, 0]


def test_module_variables_have_their_initial_values() -> None:
    target = np.zeros(8, "u4")
    before = """
.const .align 4 .u32 table[4] = {10, 20, 0x30, 40};
.global .align 4 .f32 weights[3] = {0f3F800000, 0f40000000, 2.5};
.global .align 8 .u64 pointer = generic(table);
"""
    run(
        "ld.const.u32 %r0, [table+8]; st.global.u32 [%out], %r0;"
        "mov.u64 %rd0, weights; ld.global.u32 %r1, [%rd0+4]; st.global.u32 [%out+4], %r1;"
        "ld.global.u64 %rd1, [pointer]; ld.u32 %r2, [%rd1+12]; st.global.u32 [%out+8], %r2;"
        "mov.u64 %rd2, table; cvta.const.u64 %rd2, %rd2; ld.u32 %r4, [%rd2+4]; st.global.u32 [%out+16], %r4;"
        "ld.global.u32 %r3, [%rd0+8]; st.global.u32 [%out+12], %r3;",
        np.zeros(1, "u4"),
        target,
        threads=1,
        before=before,
    )
    assert target[:5].tolist() == [0x30, 0x40000000, 40, 0x40200000, 20]


# ---- atomics


def half(dtype: Any) -> Callable[[int, int], int]:
    def add(x: int, y: int) -> int:
        pairs = np.array([[x, y]], "u4").T.copy().view("u2").view(dtype).astype("f8")
        return int(pairs.sum(axis=0).astype("f4").astype(dtype).view("u4")[0])

    return add


ATOMICS: list[tuple[str, str, str, Callable[[Any, Any], Any]]] = [
    ("exch", "b32", "u4", lambda _, x: x),
    ("exch", "b64", "u8", lambda _, x: x),
    ("add", "u32", "u4", lambda old, x: old + x),
    ("add", "s32", "i4", lambda old, x: old + x),
    ("add", "u64", "u8", lambda old, x: old + x),
    ("add", "f32", "f4", lambda old, x: np.float32(old) + np.float32(x)),
    ("add", "f64", "f8", lambda old, x: old + x),
    ("add.noftz", "f16", "u2", half("f2")),
    ("add.noftz", "bf16", "u2", half(ml_dtypes.bfloat16)),
    ("add.noftz", "f16x2", "u4", half("f2")),
    ("add.noftz", "bf16x2", "u4", half(ml_dtypes.bfloat16)),
    ("add", "s64", "i8", lambda old, x: old + x),
    ("min", "u32", "u4", min),
    ("min", "s32", "i4", min),
    ("min", "u64", "u8", min),
    ("max", "u32", "u4", max),
    ("max", "s64", "i8", max),
    ("and", "b32", "u4", lambda old, x: old & x),
    ("or", "b64", "u8", lambda old, x: old | x),
    ("xor", "b32", "u4", lambda old, x: old ^ x),
    ("inc", "u32", "u4", lambda old, x: 0 if old >= x else old + 1),
    ("dec", "u32", "u4", lambda old, x: x if old == 0 or old > x else old - 1),
]


@pytest.mark.parametrize("space", ["global", "shared", "shared::cta", "generic"])
@pytest.mark.parametrize(("name", "kind", "dtype", "oracle"), ATOMICS, ids=lambda x: x if isinstance(x, str) else "")
def test_atomic_applies_one_thread_after_the_other(
    name: str, kind: str, dtype: str, oracle: Callable[[Any, Any], Any], space: str
) -> None:
    size = int(dtype[1])
    rng = np.random.default_rng(4)
    floats = "f16" in kind
    source = rng.integers(0, 50, 64 * size // 2 if floats else 64).astype("f4" if floats else dtype)
    if floats:
        source = source.astype(ml_dtypes.bfloat16 if kind.startswith("b") else "f2").view(dtype)
    start = source[32:34].copy()
    target = np.zeros(34, dtype)
    register = {2: "%h", 4: "%r", 8: "%rd"}[size] if dtype[0] != "f" else {4: "%f", 8: "%fd"}[size]
    move = f"b{size * 8}"
    where = "[%rd6]"
    suffix = "" if space == "generic" else f".{space}"
    prepare = "mov.u64 %rd5, ours;" if "shared" in space else "add.u64 %rd5, %out, 0;"
    # lanes take turns on two places: place 0 for even ones
    operation = "{operation}"
    body = f"""
    {prepare}
    and.b32 %r6, %t, 1;
    mad.wide.u32 %rd6, %r6, {size}, %rd5;
    setp.lt.u32 %p, %t, 2;
    mad.wide.u32 %rd7, %r6, {size}, %in;
    @%p ld.global.{move} {register}1, [%rd7+{32 * size}];
    @%p st{suffix}.{move} [%rd6], {register}1;
    bar.sync 0;
    mad.wide.u32 %rd7, %t, {size}, %in;
    ld.global.{move} {register}1, [%rd7];
    {operation}
    mad.wide.u32 %rd7, %t, {size}, %out;
    st.global.{move} [%rd7+{2 * size}], {register}2;
    bar.sync 0;
    @%p ld{suffix}.{move} {register}3, [%rd6];
    mad.wide.u32 %rd7, %r6, {size}, %out;
    @%p st.global.{move} [%rd7], {register}3;
    """
    options = {
        "version": "sm_90" if kind.startswith("bf16") else "sm_80",
        "variables": f".reg .f64 %fd<4>; .shared .align {size} .b8 ours[{2 * size}];",
    }
    atom = f"atom{suffix}.{name}.{kind} {register}2, {where}, {register}1;"
    run(body.replace("{operation}", atom), source, target, **options)
    values = [start[0], start[1]]
    returned = []
    with np.errstate(all="ignore"):
        for lane in range(32):
            old = values[lane % 2]
            returned.append(old)
            new = oracle(old if dtype[0] == "f" else int(old), source[lane] if dtype[0] == "f" else int(source[lane]))
            values[lane % 2] = (
                np.array(new).astype(dtype)[()]
                if dtype[0] == "f"
                else np.array(int(new) & (1 << 8 * size) - 1, f"u{size}").view(dtype)[()]
            )
    same(target, np.array([*values, *returned], dtype))
    if name != "exch":
        target = np.zeros(34, dtype)
        red = f"red{suffix}.{name}.{kind} {where}, {register}1; mov.{move} {register}2, {register}1;"
        run(body.replace("{operation}", red), source, target, **options)
        same(target, np.array([*values, *source[:32]], dtype))


ORDERS = ["relaxed", "acquire", "release", "acq_rel"]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("scope", SCOPES)
def test_orders_and_scopes_of_atomics_do_not_change_their_sum(order: str, scope: str) -> None:
    target = np.zeros(3, "u4")
    run(
        f"atom.{order}.{scope}.global.add.u32 %r0, [%out], %t; red.{order}.{scope}.global.add.u32 [%out+4], %t;"
        f"atom.{scope}.global.add.u32 %r0, [%out+8], 1;",
        np.zeros(1, "u4"),
        target,
    )
    assert target.tolist() == [496, 496, 32]


@pytest.mark.parametrize("bits", [16, 32, 64])
def test_compare_and_swap_compares_all_of_its_bits_and_no_more(bits: int) -> None:
    register = {16: "%h", 32: "%r", 64: "%rd"}[bits]
    start = np.array([5, 5 + (1 << bits - 1), 5, 7], f"u{bits // 8}")
    target = start.copy()
    run(
        f"mul.wide.u32 %y, %t, {bits // 8}; add.u64 %y, %y, %out;"
        f"mov.b{bits} {register}1, 5; mov.b{bits} {register}2, 9;"
        f"atom.global.cas.b{bits} {register}0, [%y], {register}1, {register}2;",
        np.zeros(1, "u4"),
        target,
        threads=4,
    )
    same(target, np.where(start == 5, 9, start).astype(start.dtype))


def test_compare_and_swap_lets_one_thread_win() -> None:
    target = np.zeros(33, "u4")
    run(
        "add.u32 %r1, %t, 1; atom.global.cas.b32 %r0, [%out], 0, %r1;"
        "mad.wide.u32 %y, %t, 4, %out; st.global.u32 [%y+4], %r0;",
        np.zeros(1, "u4"),
        target,
    )
    assert target[0] == 1
    assert target[1] == 0
    assert (target[2:] == 1).all()


def test_reduction_without_a_result() -> None:
    target = np.zeros(1, "u4")
    run("red.global.add.u32 [%out], %t; red.relaxed.gpu.global.add.u32 [%out], 1;", np.zeros(1, "u4"), target)
    assert target[0] == sum(range(32)) + 32


# ---- asynchronous copies


@pytest.mark.parametrize(
    ("copy", "size", "kept"),
    [
        ("cp.async.ca.shared.global [%r0], [%x], 4;", 4, 4),
        ("cp.async.ca.shared.global [%r0], [%x], 8;", 8, 8),
        *((f"cp.async.ca.shared.global.L2::{x} [%r0], [%x], 16;", 16, 16) for x in ("64B", "128B", "256B")),
        ("cp.async.ca.shared::cta.global [%r0], [%x], 16;", 16, 16),
        ("cp.async.cg.shared.global [%r0], [%x], 16;", 16, 16),
        ("cp.async.cg.shared.global [%r0], [%x], 16, 0;", 16, 0),
        ("cp.async.cg.shared.global [%r0], [%x], 16, 12;", 16, 12),
        ("mov.u32 %r2, 4; cp.async.ca.shared.global [%r0], [%x], 8, %r2;", 8, 4),
        ("setp.lt.u32 %p, %t, 99; cp.async.cg.shared.global [%r0], [%x], 16, %p;", 16, 0),
    ],
)
def test_asynchronous_copy_fills_the_rest_with_zeros(copy: str, size: int, kept: int) -> None:
    source = np.random.default_rng(5).integers(1, 256, 32 * size, dtype="u1")
    target = np.zeros(32 * size, "u1")
    words = size // 4
    out = "".join(f"ld.shared.u32 %r3, [%r0+{4 * i}]; st.global.u32 [%y+{4 * i}], %r3;" for i in range(words))
    run(
        f"mov.u32 %r1, ours; mad.lo.u32 %r0, %t, {size}, %r1; mad.wide.u32 %x, %t, {size}, %in;"
        f"mad.wide.u32 %y, %t, {size}, %out; {copy} cp.async.commit_group; cp.async.wait_group 0; {out}",
        source,
        target,
        variables=f".shared .align 16 .b8 ours[{32 * size}];",
    )
    wanted = source.reshape(32, size).copy()
    wanted[:, kept:] = 0
    same(target, wanted.reshape(-1))


def test_wait_group_leaves_the_newest_groups_in_flight() -> None:
    source, target = np.arange(64, dtype="u4"), np.zeros(64, "u4")
    body = """
    mov.u32 %r1, ours; mad.lo.u32 %r0, %t, 4, %r1; mad.wide.u32 %x, %t, 4, %in; mad.wide.u32 %y, %t, 4, %out;
    cp.async.ca.shared.global [%r0], [%x], 4;
    cp.async.commit_group;
    cp.async.ca.shared.global [%r0+128], [%x+128], 4;
    cp.async.commit_group;
    cp.async.wait_group 1;
    ld.shared.u32 %r2, [%r0];
    st.global.u32 [%y], %r2;
    {wait}
    ld.shared.u32 %r2, [%r0+128];
    st.global.u32 [%y+128], %r2;
    """
    shared = ".shared .align 16 .b8 ours[256];"
    run(body.format(wait="cp.async.wait_all;"), source, target, variables=shared)
    same(target, source)
    with pytest.raises(emulator.EmulatorError, match="not waited for"):
        run(body.format(wait=""), source, target, variables=shared)


def test_numba_local_arrays_with_indices_known_at_run_time() -> None:
    @cuda.jit
    def kernel(indices, out):  # type: ignore[no-untyped-def]
        scratch = cuda.local.array(8, float32)
        i = cuda.threadIdx.x
        for j in range(8):
            scratch[j] = float32(j * i)
        out[i] = scratch[indices[i]]

    indices = np.random.default_rng(0).integers(0, 8, 32).astype("i4")
    out = np.zeros(32, "f4")
    report = emulator.launch(kernel, 1, 32, indices, out)
    same(out, (indices * np.arange(32)).astype("f4"))
    assert report.local_bytes > 0


def test_numba_constant_arrays() -> None:
    table = np.arange(10, 20, dtype="i4")

    @cuda.jit
    def kernel(out):  # type: ignore[no-untyped-def]
        values = cuda.const.array_like(table)
        i = cuda.threadIdx.x
        out[i] = values[int32(i) % int32(10)]

    out = np.zeros(32, "i4")
    emulator.launch(kernel, 1, 32, out)
    same(out, table[np.arange(32) % 10])


def test_every_memory_instruction_and_modifier_has_a_row(whole_file: Any) -> None:
    assert whole_file.missing("memory") == []

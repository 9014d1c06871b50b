"""Branches, loops, calls, and the special registers that threads find their way by."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from emulator.harness import entry
from numba import cuda, float32, int32

from numbaflash import emulator
from numbaflash.emulator.launch import ptx_of

REGISTERS = ".reg .b32 %t, %d, %r<8>; .reg .b64 %out, %y; .reg .pred %p, %q;"
HEAD = "mov.u32 %t, %tid.x; ld.param.u64 %out, [p0]; mad.wide.u32 %y, %t, 4, %out; mov.u32 %d, 0;\n"


def run(body: str, threads: int = 64, before: str = "") -> Any:
    out = np.zeros(threads, "u4")
    text = entry(f"{HEAD}{body}\nstore:\nst.global.u32 [%y], %d;", 1, REGISTERS, before=before)
    emulator.launch(text, 1, threads, out)
    return out


def collatz(x: int) -> int:
    steps = 0
    while x > 1:
        x = x // 2 if x % 2 == 0 else 3 * x + 1
        steps += 1
    return steps


def test_every_thread_loops_as_often_as_it_needs() -> None:
    out = run("""
    add.u32 %r0, %t, 1;
loop:
    setp.le.u32 %p, %r0, 1;
    @%p bra store;
    add.u32 %d, %d, 1;
    and.b32 %r1, %r0, 1;
    setp.eq.u32 %q, %r1, 0;
    @%q bra even;
    mad.lo.u32 %r0, %r0, 3, 1;
    bra loop;
even:
    shr.u32 %r0, %r0, 1;
    bra.uni loop;
""")
    assert out.tolist() == [collatz(i + 1) for i in range(64)]


@pytest.mark.parametrize("opcode", ["brx.idx", "brx.idx.uni"])
def test_indexed_branch_takes_the_table_entry(opcode: str) -> None:
    out = run(f"""
    and.b32 %r0, %t, 3;
targets: .branchtargets zero, one, two, one;
    {opcode} %r0, targets;
zero:
    mov.u32 %d, 10;
    bra store;
one:
    mov.u32 %d, 11;
    bra store;
two:
    mov.u32 %d, 12;
    bra store;
""")
    assert out.tolist() == [10, 11, 12, 11] * 16


def test_guarded_exit_ends_some_threads() -> None:
    out = run("setp.lt.u32 %p, %t, 10; @%p exit; mov.u32 %d, 5;")
    assert out.tolist() == [0] * 10 + [5] * 54


@pytest.mark.parametrize("leave", ["exit", "exit.uni", "ret", "ret.uni"])
def test_what_stands_behind_the_end_is_not_executed(leave: str) -> None:
    assert run(f"mov.u32 %d, 5; st.global.u32 [%y], %d; {leave}; mov.u32 %d, 6;").tolist() == [5] * 64


def test_trap_is_an_error_for_the_threads_that_reach_it() -> None:
    body = "setp.ge.u32 %p, %t, {}; @%p bra store; trap;"
    assert run(body.format(0)).tolist() == [0] * 64
    with pytest.raises(emulator.EmulatorError, match="executed trap"):
        run(body.format(1))


def test_guarded_effects_touch_the_guarded_threads_only() -> None:
    out = run("setp.lt.u32 %p, %t, 10; @%p st.global.u32 [%y], 9; @!%p st.global.u32 [%y], 8; ret;")
    assert out.tolist() == [9] * 10 + [8] * 54


def test_scoped_registers_and_labels_keep_to_their_scope() -> None:
    scope = """
    {
    .reg .b32 %r0;
    .reg .pred %p;
    setp.gt.u32 %p, %t, 31;
    mov.u32 %r0, 1;
    @%p bra L;
    add.u32 %r0, %r0, 1;
L:
    add.u32 %d, %d, %r0;
    }
    """
    assert run("mov.u32 %r0, 100;\n" + scope * 2 + "add.u32 %d, %d, %r0;").tolist() == [104] * 32 + [102] * 32


def test_register_declared_after_an_inner_scope_is_not_the_one_in_it() -> None:
    out = run("""
    mov.u32 %r0, 0;
    { .reg .b32 %outer;
again:
      { .reg .b32 %v; mov.u32 %v, 7; }
      .reg .b32 %v;
      setp.eq.u32 %p, %r0, 1;
      @%p mov.u32 %d, %v;
      mov.u32 %v, 9;
      add.u32 %r0, %r0, 1;
      setp.lt.u32 %p, %r0, 2;
      @%p bra again;
    }
""")
    assert (out == 9).all()


FUNCTION = """
.func (.param .b32 result) twice_plus(.param .b32 x, .param .b32 y)
{
    .reg .b32 %a, %b;
    .reg .pred %p;
    .local .align 4 .b8 frame[4];
    ld.param.u32 %a, [x];
    ld.param.u32 %b, [y];
    setp.gt.u32 %p, %a, 31;
    @%p bra big;
    mad.lo.u32 %a, %a, 2, %b;
    st.param.b32 [result], %a;
    ret;
big:
    st.local.u32 [frame], %b;
    ld.local.u32 %a, [frame];
    st.param.b32 [result], %a;
    ret;
}
.func (.reg .b32 %back) inner(.reg .b32 %into)
{
    mul.lo.u32 %back, %into, 3;
    ret;
}
"""


def test_calls_pass_parameters_and_results() -> None:
    call = """
    {{
    .param .b32 p1;
    st.param.b32 [p1], {x};
    .param .b32 p2;
    st.param.b32 [p2], 7;
    .param .b32 r;
    call.uni (r), twice_plus, (p1, p2);
    ld.param.b32 {d}, [r];
    }}
    """
    out = run(call.format(x="%t", d="%d") + call.format(x="%d", d="%d") + "call (%d), inner, (%d);", before=FUNCTION)

    def f(x: int) -> int:
        return 2 * x + 7 if x <= 31 else 7

    assert out.tolist() == [3 * f(f(i)) for i in range(64)]


def test_recursion_is_refused() -> None:
    function = ".func f() { call f; ret; }"
    with pytest.raises(emulator.EmulatorError, match="recursive"):
        run("call f;", before=function)


@cuda.jit(device=True, inline="never", forceinline=False)
def helper(x, y):  # type: ignore[no-untyped-def]
    if x > y:
        return x - y
    return x * float32(2)


@cuda.jit
def calls_helper(x, out):  # type: ignore[no-untyped-def]
    i = cuda.grid(1)
    if i < x.size:
        out[i] = helper(x[i], float32(3)) + helper(float32(10), x[i])


def test_device_functions_of_numba() -> None:
    x = np.linspace(0, 20, 100).astype("f4")
    out = np.zeros_like(x)
    emulator.launch(calls_helper, 2, 64, x, out)

    def f(a: Any, b: Any) -> Any:
        return np.where(a > b, a - b, a * np.float32(2))

    np.testing.assert_array_equal(out, f(x, np.float32(3)) + f(np.float32(10), x))


@cuda.jit
def indices(out):  # type: ignore[no-untyped-def]
    x, y, z = cuda.grid(3)
    _, sy, sz = cuda.gridsize(3)
    out[x, y, z] = ((x * sy + y) * sz + z) * 32 + cuda.laneid


def test_indices_of_three_dimensional_launches() -> None:
    out = np.zeros((4, 6, 8), "i4")
    emulator.launch(indices, (2, 2, 4), (2, 3, 2), out)
    x, y, z = np.meshgrid(*(np.arange(n) for n in out.shape), indexing="ij")
    lane = x % 2 + 2 * (y % 3) + 6 * (z % 2)
    np.testing.assert_array_equal(out, ((x * 6 + y) * 8 + z) * 32 + lane)


def test_special_registers() -> None:
    names = ["%laneid", "%warpid", "%nwarpid", "%ntid.x", "%nctaid.y", "%lanemask_lt", "%lanemask_ge", "%lanemask_eq"]
    expected = [
        lambda t: t % 32,
        lambda t: t // 32,
        lambda _: 2,
        lambda _: 64,
        lambda _: 1,
        lambda t: (1 << t % 32) - 1,
        lambda t: 0xFFFFFFFF << t % 32 & 0xFFFFFFFF,
        lambda t: 1 << t % 32,
    ]
    for name, oracle in zip(names, expected, strict=True):
        assert run(f"mov.u32 %d, {name};").tolist() == [oracle(t) for t in range(64)], name


@cuda.jit
def strided(x, out, n):  # type: ignore[no-untyped-def]
    i = cuda.grid(1)
    if i < n:
        out[i, int32(1)] = x[i, i] * 2


def test_arrays_with_strides_and_overlaps_are_changed_in_place() -> None:
    base = np.arange(400, dtype="f8").reshape(20, 20)
    x, out = base[::2, ::2], np.zeros((10, 6), "f8")[:, ::3]
    emulator.launch(strided, 1, 32, x, out, 10)
    np.testing.assert_array_equal(out[:, 1], 2 * np.diag(x))
    assert not out[:, 0].any()
    view = np.arange(40, dtype="f4")

    @cuda.jit
    def shift(a, b):  # type: ignore[no-untyped-def]
        i = cuda.grid(1)
        value = a[i]
        cuda.syncthreads()
        b[i] = value

    emulator.launch(shift, 1, 32, view[:32], view[8:])
    np.testing.assert_array_equal(view, np.concatenate([np.arange(8), np.arange(32)]).astype("f4"))


def test_hopper_code_runs_too() -> None:
    x = np.linspace(0, 20, 100).astype("f4")
    out = np.zeros_like(x)
    assert ".target sm_90" in ptx_of(calls_helper, (x, out), (9, 0))
    emulator.launch(calls_helper, 2, 64, x, out, cc=(9, 0))
    assert out[0] == 10


@cuda.jit
def takes_tuples(factors, arrays, z, w, out):  # type: ignore[no-untyped-def]
    i = cuda.grid(1)
    out[i] = (factors[0] + factors[1] * arrays[0][i] + arrays[1][i]) * z + w
    arrays[1][i] = -1


def test_tuples_and_complex_numbers_are_passed_as_numba_does() -> None:
    ones, ramp, out = np.ones(32), np.arange(32, dtype="f4"), np.zeros(32, "c16")
    emulator.launch(takes_tuples, 1, 32, (1.0, 2), (ones, ramp), 1 + 2j, np.complex64(3 - 1j), out)
    np.testing.assert_array_equal(out, (3 + np.arange(32)) * (1 + 2j) + (3 - 1j))
    assert (ramp == -1).all()


@pytest.mark.parametrize("time", ["100", "%t"])
def test_sleeping_takes_no_time_and_changes_nothing(time: str) -> None:
    assert run(f"mov.u32 %d, 3; nanosleep.u32 {time}; add.u32 %d, %d, %t;").tolist() == [3 + i for i in range(64)]


def test_every_branch_and_modifier_has_a_row(whole_file: Any) -> None:
    assert whole_file.missing("control") == []

"""Bad kernels, bad arguments, bad launches: one type of error, which says what came and what is accepted."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from emulator import tensor_product
from emulator.harness import entry
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import cuda, float32

from numbaflash import emulator
from numbaflash.emulator import EmulatorError
from numbaflash.emulator.launch import ptx_of


@cuda.jit
def add(a, b, out):  # type: ignore[no-untyped-def]
    buffer = cuda.shared.array(64, float32)
    i = cuda.grid(1)
    buffer[cuda.threadIdx.x] = a[i]
    cuda.syncthreads()
    if i < out.size:
        out[i] = buffer[cuda.threadIdx.x] + b


X = np.zeros(64, "f4")
PTX = ptx_of(add, (X, np.float32(1), X), (8, 0))


def fails(match: str, *args: Any, kind: str | None = None, **options: Any) -> EmulatorError:
    with pytest.raises(EmulatorError, match=match) as found:
        emulator.launch(*args, **options)
    if kind is not None:
        assert found.value.kind == kind
    return found.value


# ---- text


def test_text_cut_off_anywhere_is_an_error() -> None:
    whole = PTX.rstrip()
    end = whole.rindex("}")
    for cut in range(0, end, max(end // 150, 1)):
        with pytest.raises(EmulatorError):
            emulator.launch(whole[:cut], 1, 64, X, np.float32(1), X)


def test_tensor_core_kernel_cut_off_at_any_line_is_an_error() -> None:
    """A text that ends before its kernel begins is whole, but has none."""
    lines = tensor_product.ptx().splitlines(keepends=True)
    last = max(number for number, line in enumerate(lines) if line.startswith("}"))
    emulator.load("".join(lines[: last + 1]))
    for cut in range(last + 1):
        with pytest.raises(
            EmulatorError, match=r"no \.target directive|it has: none|ends in the middle of a statement"
        ):
            emulator.load("".join(lines[:cut]))


_TOKEN = re.compile(r"[\w.%$]+|[^\s\w]")
_SHORT = re.sub(r"_Z\w+", "k", PTX)


def outcome(text: str) -> str:
    """The kind of the error, or "ran"; any other exception goes through."""
    try:
        emulator.launch(text, 1, 64, np.zeros(64, "f4"), np.float32(1), np.zeros(64, "f4"), max_steps=100)
    except EmulatorError as error:
        return error.kind
    return "ran"


@settings(max_examples=300)
@given(st.data())
def test_damaged_text_is_never_a_traceback(data: st.DataObject) -> None:
    """A token is deleted, doubled or replaced by another one of the text."""
    tokens = list(_TOKEN.finditer(_SHORT))
    victim = data.draw(st.sampled_from(tokens))
    other = data.draw(st.sampled_from(tokens)).group()
    text = _SHORT[: victim.start()] + data.draw(st.sampled_from(["", other, other + " " + victim.group()]))
    text += _SHORT[victim.end() :]
    assert outcome(text) != "internal"


@pytest.mark.parametrize("target", ["sm_60", "sm_100", "gfx90a"])
def test_other_targets_are_refused(target: str) -> None:
    error = fails(f"{target}.*sm_70 to sm_90a", entry("", 0, target=target), 1, 1, kind="unsupported")
    assert error.place.line == 2


def test_unknown_directives_are_refused() -> None:
    assert fails("unknown directive '.surprise'", PTX.replace(".visible", ".surprise", 1), 1, 1).place.line is not None


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("frobnicate.u32 %d, %a;", "frobnicate.u32 is not implemented"),
        ("add.u33 %d, %a, %a;", "type .u33"),
        ("add.sat.u32 %d, %a, %a;", "modifier .sat of add.sat.u32"),
        ("mul.u32 %d, %a, %a;", ".lo or .hi or .wide of mul.u32"),
        ("ex2.approx.sat.f32 %f, %f;", "modifier .sat"),
        ("fma.f32 %f, %f, %f, %f;", "leaving out .rn"),
        ("cvt.f16.f32 %h, %f;", "leaving out .rn"),
        ("wgmma.fence.sync.aligned;", "wgmma.fence.sync.aligned is not implemented"),
        (
            "mma.sync.aligned.m8n8k4.row.col.f32.f16.f16.f32 {%f,%f}, {%a}, {%a}, {%f,%f};",
            "leaving out .m16n8k8 or .m16n8k16",
        ),
        ("ld.global.b128 %d, [%x];", "type .b128"),
        ("ld.global.v4.u64 {%x,%x,%x,%x}, [%x];", "a vector of 4 .u64"),
        ("st.const.u32 [%x], %a;", "modifier .const"),
        ("add.u32 %d, %a;", "takes 3 operands, not 2"),
        ("add.u32 %d, %a, %x2;", "%x2 is neither declared nor a special register"),
        ("add.u64 %x, %x, %a;", "does not fit"),
        ("add.u32 %d, %a, %clock_speed;", "%clock_speed is neither declared nor a special register"),
        ("mov.u32 %d, nowhere;", "nowhere is not defined"),
        ("mov.f32 %f, ~0f3F800000;", "~ in front of a float"),
        ("bra nowhere;", "label nowhere is not defined"),
        ("call nothing;", "nothing, which is not defined"),
        ("cp.async.ca.shared.global [%a], [%x], 5;", "cp-size 5"),
    ],
)
def test_what_is_not_implemented_names_its_line(text: str, match: str) -> None:
    kernel = entry(text, 1, ".reg .b32 %a, %d; .reg .b64 %x; .reg .f32 %f; .reg .b16 %h;")
    error = fails(re.escape(match), kernel, 1, 1, 0)
    assert error.place.line == next(i for i, line in enumerate(kernel.splitlines(), 1) if text in line)


@pytest.mark.parametrize(
    ("text", "target", "needed"),
    [
        ("stmatrix.sync.aligned.m8n8.x1.shared.b16 [%a], {%a};", "sm_80", "sm_90"),
        ("add.bf16 %h, %h, %h;", "sm_80", "sm_90"),
        ("cp.async.wait_all;", "sm_75", "sm_80"),
    ],
)
def test_instructions_that_came_after_the_target(text: str, target: str, needed: str) -> None:
    fails(f"needs {needed}, not {target}", entry(text, 0, ".reg .b32 %a; .reg .b16 %h;", target), 1, 1)


def test_modules_need_one_kernel_or_its_name() -> None:
    two = entry("", 0) + entry("", 0).split(".address_size 64")[1].replace("entry k", "entry other")
    fails("name one kernel of the module; it has: k, other", two, 1, 1)
    fails("no kernel 'third'", two, 1, 1, entry="third")
    emulator.launch(two, 1, 1, entry="other")
    fails("it has: none", ".version 8.0\n.target sm_80\n.address_size 64\n", 1, 1)


# ---- arguments


def test_wrong_number_of_arguments() -> None:
    fails("for a kernel of 15 parameters", PTX, 1, 64, X, np.float32(1), kind="argument")
    fails("for a kernel of 15 parameters", PTX, 1, 64, X, np.float32(1), X, 3, kind="argument")


@pytest.mark.parametrize(
    "array",
    [np.zeros(64, "f8"), np.zeros((8, 8), "f4"), np.zeros(128, "f4")[::2]],
    ids=["dtype", "dimensions", "layout"],
)
def test_array_of_another_type_than_the_kernel_was_compiled_for(array: Any) -> None:
    with pytest.raises(EmulatorError, match=r"compiled for float32 with 1 dimensions|for a kernel of 15 parameters"):
        emulator.launch(PTX, 1, 64, array, np.float32(1), X)


def test_scalars_that_do_not_fit() -> None:
    raw = entry("", 2)
    fails("takes an integer of 64 bits", raw, 1, 1, 0, 2**70)
    fails(r"argument 1 is 1\.5 \(float\)", raw, 1, 1, 0, 1.5)
    fails("argument 0 is 'x'", raw, 1, 1, "x", 0)
    fails(r"takes a number \(\.f32\)", PTX, 1, 64, X, None, X)


def test_things_that_are_no_kernels() -> None:
    fails("kernel is a int", 3, 1, 1)
    fails("not a PTX module", "", 1, 1)
    fails("argument of a type", add, 1, 1, object(), 1.0, X)


def test_read_only_arrays_stay_as_they_are() -> None:
    out = np.zeros(64, "f4")
    out.flags.writeable = False
    fails("read-only", PTX, 1, 64, X, np.float32(1), out)


# ---- launches


@pytest.mark.parametrize("block", [1025, (32, 33), (1, 1, 65)])
def test_too_many_threads(block: Any) -> None:
    fails("threads; sm_80 takes 1024", PTX, 1, block, X, np.float32(1), X, kind="limit")


def test_launch_bounds_of_the_kernel() -> None:
    bounded = entry("", 0).replace(")\n{", ")\n.maxntid 64, 1, 1\n{")
    emulator.launch(bounded, 1, 64)
    fails("sm_80 takes 64", bounded, 1, 65, kind="limit")


def test_too_much_shared_memory() -> None:
    fails("sm_80 has 166912", PTX, 1, 64, X, np.float32(1), X, shared=166912, kind="limit")


@pytest.mark.parametrize(
    ("grid", "block"), [(0, 32), (1, 0), ((1, 2, 3, 4), 32), (1.5, 32), (1, (2, -1)), ((1, 70000), 1)]
)
def test_grids_and_blocks_that_are_none(grid: Any, block: Any) -> None:
    fails("grid|block", PTX, grid, block, X, np.float32(1), X)


def test_nothing_is_written_when_a_launch_fails() -> None:
    out = np.zeros(100, "f4")
    fails("out of bounds", PTX, 4, 64, np.ones(128, "f4"), np.float32(1), out, kind="bounds")
    assert not out.any()
    fails("shared is -1", PTX, 1, 64, X, np.float32(1), X, shared=-1)


def test_trap_is_reported() -> None:
    body = "mov.u32 %t, %tid.x; setp.eq.u32 %p, %t, 40; @%p trap;"
    error = fails("executed trap", entry(body, 0, ".reg .b32 %t; .reg .pred %p;"), 1, 64, kind="trap")
    assert error.place.thread == (40, 0, 0)

"""The readers and models of machine code, on listings small enough to count by hand."""

from __future__ import annotations

import pytest

from numbaflash.cuda.issue_model import tensor_share
from numbaflash.cuda.occupancy import TARGETS
from numbaflash.cuda.pipes import RATES, pipe_cycles, pipe_of
from numbaflash.cuda.sass import fast_path, hot_loop, parse, tensor_instructions

AMPERE, HOPPER = (8, 0), (9, 0)
NO_BARRIER = 7


def listing(*instructions):
    """A listing of (text, stall) or (text, stall, write barrier, wait mask), 16 bytes each."""
    lines = []
    for i, (text, stall, *rest) in enumerate(instructions):
        write, wait = rest or (NO_BARRIER, 0)
        control = stall | write << 5 | NO_BARRIER << 8 | wait << 11
        lines += [
            f"        /*{16 * i:04x}*/                   {text} ;    /* 0x0000000000000000 */",
            f"                                                  /* 0x{control << 41:016x} */",
        ]
    return "\n".join(lines)


HMMA = ("HMMA.16816.F32 R0, R4, R8, R0", 8)
LOOP = listing(
    ("MOV R1, c[0x0][0x28]", 1),
    ("LDSM.16.M88.4 R4, [R12]", 1, 0, 0),
    ("HMMA.16816.F32 R0, R4, R8, R0", 8, 7, 1),
    HMMA,
    ("@!P0 BRA 0x0070", 5),
    ("FMUL R0, R0, R3", 4),
    ("FMUL R1, R1, R3", 4),
    ("@P1 BRA 0x0010", 5),
    ("EXIT", 1),
)


def test_control_bits_are_read_as_ptxas_wrote_them():
    load, first = parse(LOOP)[1:3]
    assert (load.opcode, load.write_barrier, load.wait) == ("LDSM.16.M88.4", 0, 0)
    assert (first.stall, first.write_barrier, first.wait) == (8, 7, 1)
    assert parse(LOOP)[7].predicate == "P1"


def test_the_hot_loop_runs_from_its_target_to_its_branch():
    loop = hot_loop(parse(LOOP))
    assert [instruction.address for instruction in loop] == [16 * i for i in range(1, 8)]
    assert tensor_instructions(loop) == 2


def test_of_nested_loops_the_inner_one_is_hot_and_of_equals_the_shorter():
    code = parse(
        listing(HMMA, ("FADD R1, R1, R2", 4), ("BRA 0x0000", 5), HMMA, ("@P0 BRA 0x0030", 5), ("@P1 BRA 0x0000", 5))
    )
    assert [instruction.address for instruction in hot_loop(code)] == [48, 64]


def test_the_fast_path_leaves_out_what_a_forward_branch_skips():
    assert [i.name for i in fast_path(hot_loop(parse(LOOP)))] == ["LDSM", "HMMA", "HMMA", "BRA", "BRA"]


@pytest.mark.parametrize(("cc", "tensor", "fma"), [(AMPERE, 16, 4), ((8, 6), 32, 2), ((8, 9), 32, 2), (HOPPER, 12, 2)])
def test_pipes_are_charged_by_the_rates_of_the_target(cc, tensor, fma):
    cycles = pipe_cycles(parse(LOOP), cc)
    assert cycles == {"issue": 9, "tensor": tensor, "smem": 16, "fma": fma, "alu": 2, "misc": 3}


def test_every_target_has_rates():
    assert RATES.keys() == TARGETS.keys()


def test_an_mma_in_tf32_takes_twice_as_long_as_one_of_its_size_in_float16():
    assert [pipe_of(f"HMMA.{kind}", AMPERE) for kind in ("16816.F32", "1688.F32", "1688.F32.TF32")] == [
        ("tensor", 8),
        ("tensor", 4),
        ("tensor", 8),
    ]


def test_copies_stand_apart_from_fragments():
    code = parse(listing(("LDGSTS.E.BYPASS.128 [R1], [R2.64]", 1), ("STS [R1], R2", 1)))
    assert pipe_cycles(code, AMPERE) == {"issue": 2, "copy": 16, "smem": 4}


@pytest.mark.parametrize("cc", [AMPERE, (8, 6)])
def test_back_to_back_mmas_keep_the_tensor_pipe_full(cc):
    assert tensor_share(parse(listing(*[HMMA] * 50)), cc, warps=1) == pytest.approx(1, abs=0.01)


def test_one_warp_waits_for_its_load_and_a_second_fills_the_gap():
    loop = parse(listing(("LDSM.16.M88.4 R4, [R12]", 1, 0, 0), ("HMMA.16816.F32 R0, R4, R8, R0", 8, 7, 1), *[HMMA] * 5))
    alone, together = tensor_share(loop, AMPERE, warps=1), tensor_share(loop, AMPERE, warps=2)
    # 33 cycles of latency and 16 of the pipe before 48 cycles of MMAs.
    assert alone == pytest.approx(48 / (49 + 48), abs=0.01)
    assert together > 1.8 * alone

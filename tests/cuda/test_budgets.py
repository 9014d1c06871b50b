"""What the built code of flash_v2 may cost: these figures do not vary, whoever builds it."""

from __future__ import annotations

import pytest
from flash import AMPERE, machine_code

from numbaflash.cuda.build import build
from numbaflash.cuda.flash_v2 import FlashV2
from numbaflash.cuda.issue_model import tensor_share
from numbaflash.cuda.pipes import pipe_cycles
from numbaflash.cuda.sass import fast_path, hot_loop, tensor_instructions
from numbaflash.cuda.scoring import Scoring
from numbaflash.cuda.variant import Variant

CAUSAL = Scoring(right=True)
PLAIN = Scoring()
HOT = [(128, PLAIN), (128, CAUSAL), (64, PLAIN), (64, CAUSAL)]
EVERY_OPTION = Scoring(scaled=True, softcap=True, alibi=True, bias="float32", left=True, right=True)
# Shared memory that a block may have, KiB.
SHARED = {(8, 0): 163, (8, 6): 99, (8, 9): 99, (9, 0): 227, (12, 0): 99}


def loop_of(head_dim, scoring):
    return hot_loop(machine_code(Variant(head_dim, head_dim, "float16", scoring)))


@pytest.mark.parametrize(("head_dim", "scoring"), HOT)
def test_instructions_per_mma_stay_within_their_budget(head_dim, scoring):
    loop = loop_of(head_dim, scoring)
    # The rescaling that hardly ever runs counts as well.
    assert len(loop) / tensor_instructions(loop) <= {128: 3.5, 64: 4.3}[head_dim]


@pytest.mark.parametrize(("head_dim", "scoring"), HOT)
def test_the_issue_model_sees_the_tensor_cores_busy(head_dim, scoring):
    # The loop as it runs where no maximum is raised, which is nearly always.
    assert tensor_share(fast_path(loop_of(head_dim, scoring)), AMPERE, warps=2) >= {128: 0.79, 64: 0.76}[head_dim]


@pytest.mark.parametrize("scoring", [PLAIN, CAUSAL])
def test_blocks_that_all_rows_see_whole_pay_for_no_option_and_no_mask(scoring):
    loop = loop_of(128, scoring)
    assert not any(instruction.name in ("LDG", "FSEL", "I2F") for instruction in loop)
    # One comparison for the loop, one for whether there is a next block.
    assert sum(instruction.name in ("ISETP", "UISETP") for instruction in loop) <= 2


def test_what_comes_before_or_after_the_loop_costs_the_loop_nothing():
    plain = loop_of(64, CAUSAL)
    more = hot_loop(machine_code(Variant(64, 64, "float16", CAUSAL, sinks=True, lengths=True, lse=True)))
    assert len(more) <= len(plain) + 2  # registers are shared out anew
    assert tensor_share(fast_path(more), AMPERE) >= 0.76


@pytest.mark.parametrize(("head_dim", "share"), [(64, 0.85), (128, 0.74)])
def test_float32_on_tensor_cores_is_ahead_of_the_best_that_ffma_could_do(head_dim, share):
    loop = hot_loop(machine_code(Variant(head_dim, head_dim, "float32", CAUSAL)))
    # Of 156 / 3 TFLOP/s on an A100; all that it has of FFMA is 19.5, as much as a share of 0.375.
    assert tensor_share(fast_path(loop), AMPERE, warps=2) >= share


@pytest.mark.parametrize("scoring", [PLAIN, CAUSAL])
def test_fragments_are_loaded_for_two_mmas_each(scoring):
    loop = loop_of(128, scoring)
    assert pipe_cycles(loop, AMPERE)["smem"] / tensor_instructions(loop) <= 5.25


def spilled(head_dim, scoring, dtype="bfloat16", cc=AMPERE):
    variant = Variant(head_dim, head_dim, dtype, scoring, sinks=True, lengths=True, lse=True)
    return build(FlashV2.of(variant, cc), cc).usage.spill_bytes


@pytest.mark.parametrize("scoring", [PLAIN, CAUSAL, EVERY_OPTION, Scoring(bias="bool", right=True)])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_nothing_is_spilled(head_dim, scoring):
    assert spilled(head_dim, scoring) == 0


# Wherever registers were scarcest: just below 64 and at the widest of each shape.
@pytest.mark.parametrize(
    ("head_dim", "scoring", "dtype"),
    [
        (48, Scoring(softcap=True), "float16"),
        (96, Scoring(softcap=True, right=True), "float16"),
        (64, EVERY_OPTION, "float32"),
        (128, EVERY_OPTION, "float32"),
    ],
)
def test_nothing_is_spilled_where_registers_are_scarce(head_dim, scoring, dtype):
    assert spilled(head_dim, scoring, dtype) == 0


@pytest.mark.parametrize(("head_dim", "scoring"), [(64, Scoring(softcap=True)), (128, EVERY_OPTION)])
def test_nothing_is_spilled_in_the_order_of_loads_of_9_0(head_dim, scoring):
    assert spilled(head_dim, scoring, cc=(9, 0)) == 0


OPTIONS = [
    PLAIN,
    Scoring(left=True, right=True),
    Scoring(softcap=True),
    Scoring(softcap=True, right=True),
    Scoring(softcap=True, left=True, right=True),
    Scoring(alibi=True, right=True),
    Scoring(softcap=True, alibi=True, left=True, right=True),
    Scoring(bias="float16", right=True),
    Scoring(bias="float32"),
    Scoring(bias="bool", right=True),
    Scoring(softcap=True, bias="float32"),
    EVERY_OPTION,
]


def scarce(head_dim, scoring, dtype):
    """Return whether a build is the widest of its shape, or near 255 registers.

    All that took more than 230 are here; all others took fewer than the widest of their shape with the same options.
    `test_no_head_dim_up_to_128_spills_under_any_option` builds every one.
    """
    near = head_dim >= 96 or (head_dim >= 24 and scoring in OPTIONS[:2])
    return head_dim in (64, 128) or (dtype == "float16" and near)


EVERY_BUILD = [
    (head_dim, scoring, dtype)
    for dtype in ("float16", "float32")
    for head_dim in range(8, 129, 8)
    for scoring in OPTIONS
]


@pytest.mark.slow  # 116 builds of a second and a half
@pytest.mark.parametrize(("head_dim", "scoring", "dtype"), [build for build in EVERY_BUILD if scarce(*build)], ids=str)
def test_no_head_dim_up_to_128_spills_where_registers_are_scarce(head_dim, scoring, dtype):
    assert spilled(head_dim, scoring, dtype) == 0


@pytest.mark.exhaustive  # 384 builds, ten minutes: run it when a kernel has changed
@pytest.mark.parametrize(("head_dim", "scoring", "dtype"), EVERY_BUILD, ids=str)
def test_no_head_dim_up_to_128_spills_under_any_option(head_dim, scoring, dtype):
    assert spilled(head_dim, scoring, dtype) == 0


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("cc", SHARED)
def test_every_tile_fits_the_shared_memory_of_its_target(cc, dtype):
    for head_dim in range(8, 257, 8):
        for value_dim in {8, head_dim, 256}:
            for bias in ("", "float32"):
                flash = FlashV2.of(Variant(head_dim, value_dim, dtype, Scoring(bias=bias)), cc)
                assert flash.shared_bytes <= SHARED[cc] * 1024
                # A kibibyte of each block is the system's.
                assert flash.blocks * (flash.shared_bytes + 1024) <= (SHARED[cc] + 1) * 1024


@pytest.mark.parametrize("cc", SHARED)
def test_every_target_is_built_without_a_gpu(cc):
    built = build(FlashV2.of(Variant(128, 128, "float16", CAUSAL), cc), cc)
    assert f".target sm_{cc[0]}{cc[1]}" in built.ptx
    assert built.cubin[:4] == b"\x7fELF"
    assert built.usage.spill_bytes == 0

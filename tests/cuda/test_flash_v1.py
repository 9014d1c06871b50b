"""FlashAttention as published, run instruction by instruction with every check on, against the float64 oracle."""

from __future__ import annotations

import inspect
import itertools

import numpy as np
import pytest
from flash import AMPERE, assert_as_good_as_straightforward, counted, solved
from problems import SHAPES, options_for, problem

from numbaflash.cuda.arguments import PARAMETERS
from numbaflash.cuda.build import build
from numbaflash.cuda.flash_v1 import FlashV1
from numbaflash.cuda.scoring import Scoring
from numbaflash.cuda.variant import Variant

# Each option on its own once: a kernel takes two seconds to build.
OPTION_NAMES = [name for name in options_for(*problem()[:2]) if name not in ("left window", "lengths")]
EVERY_OPTION = Scoring(softcap=True, alibi=True, bias="float32", left=True, right=True)


def assert_as_good(q, k, v, **options):
    assert_as_good_as_straightforward(q, k, v, algorithm="v1", **options)


@pytest.mark.parametrize("name", OPTION_NAMES)
def test_an_option_means_at_every_shape_what_the_oracle_says(name):
    for seed, shape in enumerate(SHAPES):
        q, k, v = problem(**shape, seed=seed)
        assert_as_good(q, k, v, **options_for(q, k)[name])


@pytest.mark.parametrize(("head_dim", "value_dim"), [(8, 24), (256, 256), (192, 72)])
def test_head_dims_of_keys_and_values_may_be_any_multiple_of_8(head_dim, value_dim):
    q, k, v = problem(head_dim=head_dim, value_dim=value_dim, dtype="bfloat16", kv_tokens=300)
    assert_as_good(q, k, v, causal=True)


@pytest.mark.parametrize(("head_dim", "name"), [(64, "plain"), (128, "plain"), (128, "all"), (256, "plain")])
def test_float32_is_as_good_as_float32(head_dim, name):
    q, k, v = problem(head_dim=head_dim, dtype="float32")
    assert_as_good(q, k, v, **options_for(q, k)[name])


def test_keys_beyond_their_length_are_never_read():
    q, k, v = problem(batch=2, kv_tokens=150)
    k[1, 90:], v[1, 90:] = np.nan, np.nan
    out, _ = solved(q, k, v, algorithm="v1", kv_lengths=[150, 90])
    assert np.isfinite(out).all()


def test_a_maximum_that_grows_late_rescales_what_came_before():
    q, k, v = problem(q_tokens=64, kv_tokens=1024)
    q[:] = np.abs(q)
    k[:] = np.linspace(-3, 3, 1024)[None, :, None, None]
    assert_as_good(q, k, v)


def test_a_long_row_of_blocks_rounds_no_worse():
    # O passes through memory 24 times.
    assert_as_good(*problem(q_tokens=64, kv_tokens=24 * 64, head_dim=192, value_dim=16))


def test_a_row_without_keys_is_zero_and_its_sum_is_the_sinks_alone():
    q, k, v = problem(q_tokens=90, kv_tokens=20)
    out, lse = solved(q, k, v, algorithm="v1", causal=True)
    assert not out[:, :70].any()
    assert np.isneginf(lse[:, :, :70]).all()
    sinks = np.float32([0.5, -3])
    out, lse = solved(q, k[:, :0], v[:, :0], algorithm="v1", sink_logits=sinks)
    assert not out.any()
    np.testing.assert_allclose(lse, np.broadcast_to(sinks[:, None], lse.shape), rtol=1e-6)


def test_a_query_tile_passes_only_the_blocks_that_it_sees():
    q, k, v = problem(q_tokens=1024, kv_tokens=1024)
    (full,) = counted(q, k, v, algorithm="v1")
    (windowed,) = counted(q, k, v, algorithm="v1", causal=True, window=(63, None))
    # 16 tiles see the block of 256 keys that they stand in, and the 3 that begin one the block before it as well.
    assert windowed.instructions["tensor"] * 64 == full.instructions["tensor"] * 19


@pytest.mark.parametrize(("head_dim", "dtype"), [(64, "float16"), (128, "float16"), (64, "float32")])
def test_no_shared_access_loses_a_wavefront_and_every_sector_is_used_whole(head_dim, dtype):
    q, k, v = problem(q_tokens=128, kv_tokens=512, head_dim=head_dim, dtype=dtype)
    (counts,) = counted(q, k, v, algorithm="v1")
    assert counts.bank_conflicts == 0
    assert counts.local_bytes == 0
    assert all(access.efficiency == 1 for access in counts.global_)


@pytest.mark.parametrize(("scoring", "rest"), [(Scoring(), False), (EVERY_OPTION, True)], ids=["plain", "all"])
@pytest.mark.parametrize(("head_dim", "dtype"), [(64, "float16"), (128, "float16"), (256, "float16"), (128, "float32")])
def test_nothing_is_spilled(head_dim, dtype, scoring, rest):
    variant = Variant(head_dim, head_dim, dtype, scoring, sinks=rest, lengths=rest, lse=True)
    assert build(FlashV1.of(variant), AMPERE).usage.spill_bytes == 0


def test_nothing_is_spilled_where_registers_are_scarce():
    variant = Variant(248, 248, "float16", Scoring(softcap=True), sinks=True, lengths=True, lse=True)
    assert build(FlashV1.of(variant), AMPERE).usage.spill_bytes == 0


def test_every_tile_fits_the_shared_memory_of_every_target():
    for head_dim in range(8, 257, 8):
        for value_dim in {8, head_dim, 256}:
            for dtype, scoring in itertools.product(("float16", "float32"), (Scoring(), EVERY_OPTION)):
                flash = FlashV1.of(Variant(head_dim, value_dim, dtype, scoring))
                assert flash.shared_bytes <= 99 << 10  # of 8.6 and 8.9
                # Of 8.0, where a kibibyte of each block is the system's.
                assert flash.blocks * (flash.shared_bytes + 1024) <= 164 << 10


def test_arguments_are_passed_in_the_kernels_own_order():
    names = list(inspect.signature(FlashV1.of(Variant(64, 64, "float16")).kernel()).parameters)
    assert names == [name.replace("step", "row") for name in PARAMETERS] + ["state_out", "state_max", "state_sum"]

"""Standard attention, run instruction by instruction with every check on, against the float64 oracle."""

from __future__ import annotations

import inspect
import itertools

import numpy as np
import pytest
from flash import AMPERE, assert_as_good_as_straightforward, counted, solved
from problems import SHAPES, options_for, problem

from numbaflash.cuda.build import build
from numbaflash.cuda.scoring import Scoring
from numbaflash.cuda.standard import StandardScores, StandardSoftmax, StandardValues
from numbaflash.cuda.variant import Variant

# Each option on its own once: kernels take two seconds to build.
OPTION_NAMES = [name for name in options_for(*problem()[:2]) if name not in ("left window", "lengths")]
EVERY_OPTION = Scoring(softcap=True, alibi=True, bias="float32", left=True, right=True)
KERNELS = (StandardScores, StandardSoftmax, StandardValues)


def assert_as_good(q, k, v, **options):
    assert_as_good_as_straightforward(q, k, v, algorithm="standard", **options)


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
    out, _ = solved(q, k, v, algorithm="standard", kv_lengths=[150, 90])
    assert np.isfinite(out).all()


def test_a_row_without_keys_is_zero_and_its_sum_is_the_sinks_alone():
    q, k, v = problem(q_tokens=90, kv_tokens=20)
    out, lse = solved(q, k, v, algorithm="standard", causal=True)
    assert not out[:, :70].any()
    assert np.isneginf(lse[:, :, :70]).all()
    sinks = np.float32([0.5, -3])
    out, lse = solved(q, k[:, :0], v[:, :0], algorithm="standard", sink_logits=sinks)
    assert not out.any()
    np.testing.assert_allclose(lse, np.broadcast_to(sinks[:, None], lse.shape), rtol=1e-6)


def test_scores_beyond_the_range_of_16_bits_are_no_matter():
    q, k, v = problem(q_tokens=16, kv_tokens=64)
    q[:], k[:] = 200 * np.sign(q), np.sign(k) * np.arange(64)[None, :, None, None]
    out, _ = solved(q, k, v, algorithm="standard", scale=1.0)
    assert np.isfinite(out).all()


@pytest.mark.parametrize(("head_dim", "dtype"), [(64, "float16"), (128, "float16"), (64, "float32")])
def test_no_shared_access_loses_a_wavefront_and_every_sector_is_used_whole(head_dim, dtype):
    q, k, v = problem(q_tokens=128, kv_tokens=256, head_dim=head_dim, dtype=dtype)
    for counts in counted(q, k, v, algorithm="standard"):
        assert counts.bank_conflicts == 0
        assert counts.local_bytes == 0
        # The log-sum-exp alone is stored a float at a time: 4 bytes a row.
        assert all(access.efficiency == 1 for access in counts.global_ if access.nbytes != 4 * 2 * 128)


@pytest.mark.parametrize(("scoring", "rest"), [(Scoring(), False), (EVERY_OPTION, True)], ids=["plain", "all"])
@pytest.mark.parametrize(("head_dim", "dtype"), [(64, "float16"), (128, "float16"), (128, "float32")])
def test_nothing_is_spilled(head_dim, dtype, scoring, rest):
    variant = Variant(head_dim, head_dim, dtype, scoring, sinks=rest, lengths=rest, lse=True)
    for kernel in KERNELS:
        assert build(kernel.of(variant), AMPERE).usage.spill_bytes == 0


def test_every_tile_fits_the_shared_memory_of_every_target():
    for head_dim in range(8, 257, 8):
        for kernel, dtype in itertools.product(KERNELS, ("float16", "float32")):
            # Of 8.6 and 8.9, which have least.
            assert kernel.of(Variant(head_dim, head_dim, dtype)).shared_bytes <= 99 << 10


@pytest.mark.parametrize("kernel", KERNELS)
def test_arguments_are_passed_in_the_kernels_own_order(kernel):
    described = kernel.of(Variant(64, 64, "float16"))
    names = list(inspect.signature(described.kernel()).parameters)
    assert names == [name.replace("step", "row") for name in described.parameters]

"""FlashAttention-2 on tensor cores, run instruction by instruction with every check on, against the float64 oracle."""

from __future__ import annotations

import inspect
import itertools

import numpy as np
import pytest
from flash import AMPERE, assert_as_good_as_straightforward, counted, solved
from problems import SHAPES, options_for, problem

from numbaflash.cuda.arguments import PARAMETERS
from numbaflash.cuda.flash_v2 import FlashV2
from numbaflash.cuda.variant import Variant

OPTION_NAMES = list(options_for(*problem()[:2]))
# Each option on its own in one dtype, and in the others some: a kernel takes two seconds to build.
KERNELS = [
    *((64, "float16", name) for name in OPTION_NAMES),
    *itertools.product((128,), ("bfloat16",), ("plain", "causal window", "bias in the arrays' dtype", "all")),
    *itertools.product((72,), ("float32",), ("plain", "causal window", "bias in the arrays' dtype", "all")),
]


@pytest.mark.parametrize(("head_dim", "dtype", "name"), KERNELS)
def test_an_option_means_at_every_shape_what_the_oracle_says(head_dim, dtype, name):
    for seed, shape in enumerate(SHAPES):
        q, k, v = problem(**shape, head_dim=head_dim, dtype=dtype, seed=seed)
        assert_as_good_as_straightforward(q, k, v, **options_for(q, k)[name])


@pytest.mark.parametrize(("head_dim", "value_dim"), [(8, 8), (40, 40), (128, 128), (256, 64)])
def test_float32_is_as_good_as_float32_at_any_head_dim(head_dim, value_dim):
    q, k, v = problem(head_dim=head_dim, value_dim=value_dim, dtype="float32")
    assert_as_good_as_straightforward(q, k, v, causal=True)


@pytest.mark.parametrize(
    ("head_dim", "value_dim"), [(8, 8), (40, 40), (96, 96), (128, 128), (256, 256), (64, 128), (192, 72), (8, 256)]
)
def test_head_dims_of_keys_and_values_may_be_any_multiple_of_8(head_dim, value_dim):
    assert_as_good_as_straightforward(*problem(head_dim=head_dim, value_dim=value_dim), causal=True)


def test_keys_beyond_their_length_are_never_read():
    q, k, v = problem(batch=2, kv_tokens=150)
    k[1, 90:], v[1, 90:] = np.nan, np.nan
    out, _ = solved(q, k, v, kv_lengths=[150, 90])
    assert np.isfinite(out).all()


def test_a_maximum_that_grows_late_rescales_what_came_before():
    q, k, v = problem(q_tokens=64, kv_tokens=512)
    q[:] = np.abs(q)
    k[:] = np.linspace(3, -3, 512)[None, :, None, None]  # keys are visited last to first: each block exceeds the last
    assert_as_good_as_straightforward(q, k, v)


def test_a_bias_of_minus_infinity_hides_a_key_whatever_it_holds():
    q, k, v = problem(q_tokens=16, kv_tokens=96)
    k[:, 10] = np.nan
    bias = np.zeros((16, 96), np.float32)
    bias[:, 10] = -np.inf
    out, _ = solved(q, k, v, bias=bias)
    assert np.isfinite(out).all()


def test_arguments_are_named_in_the_kernels_own_order():
    kernel = FlashV2.of(Variant(64, 64, "float16"), AMPERE).kernel()
    assert list(inspect.signature(kernel).parameters) == list(PARAMETERS)


@pytest.mark.parametrize(("q_tokens", "kv_tokens"), [(5, 0), (300, 1)])
def test_a_row_without_keys_is_zero_and_its_sum_is_the_sinks_alone(q_tokens, kv_tokens):
    q, k, v = problem(batch=2, q_tokens=q_tokens, kv_tokens=kv_tokens)
    out, lse = solved(q, k, v, causal=True)
    empty = slice(0, q_tokens - kv_tokens)
    assert not out[:, empty].any()
    assert np.isneginf(lse[:, :, empty]).all()
    sinks = np.float32([0.5, -3])
    out, lse = solved(q, k, v, causal=True, sink_logits=sinks)
    assert not out[:, empty].any()
    np.testing.assert_allclose(lse[:, :, empty], np.broadcast_to(sinks[:, None], lse[:, :, empty].shape), rtol=1e-6)


def test_a_window_wider_than_any_integer_is_none():
    q, k, v = problem()
    out, _ = solved(q, k, v, window=(10**12, 2**40))
    assert np.array_equal(out, solved(q, k, v)[0])


def test_blocks_outside_the_window_are_not_visited():
    q, k, v = problem(q_tokens=128, kv_tokens=1024)
    (full,) = counted(q, k, v)
    (windowed,) = counted(q, k, v, causal=True, window=(127, None))
    # 128 rows and their 127 predecessors: 2 blocks of 128 keys instead of 8.
    assert windowed.instructions["tensor"] * 4 == full.instructions["tensor"]


@pytest.mark.parametrize(
    ("head_dim", "dtype"), [(64, "float16"), (96, "float16"), (128, "bfloat16"), (80, "float32"), (128, "float32")]
)
def test_no_shared_access_loses_a_wavefront_and_every_sector_is_used_whole(head_dim, dtype):
    q, k, v = problem(q_tokens=128, kv_tokens=256, head_dim=head_dim, dtype=dtype)
    (counts,) = counted(q, k, v)
    assert sum(access.conflicts for access in counts.shared) == 0
    assert counts.local_bytes == 0
    assert all(access.efficiency == 1 for access in counts.global_)

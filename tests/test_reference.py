"""The oracle itself, against PyTorch's attention in float64 and against the definitions of the contract."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from oracle import expected, random_tokens

B, SQ, SK, HQ, HKV, D, DV = 2, 7, 11, 4, 2, 8, 5


def problem(seed=0, q_tokens=SQ, kv_tokens=SK):
    rng = np.random.default_rng(seed)
    return (
        random_tokens(rng, B, q_tokens, HQ, D),
        random_tokens(rng, B, kv_tokens, HKV, D),
        random_tokens(rng, B, kv_tokens, HKV, DV),
    )


def torch_attention(q, k, v, mask=None, **options):
    q, k, v = (torch.from_numpy(x).double().transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(HQ // HKV, dim=1) for x in (k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, **options).transpose(1, 2).numpy()


def test_it_agrees_with_pytorch():
    q, k, v = problem()
    np.testing.assert_allclose(expected(q, k, v)[0], torch_attention(q, k, v), atol=1e-12)


def test_its_mask_is_aligned_to_the_bottom_right():
    q, k, v = problem()
    mask = torch.ones(SQ, SK, dtype=torch.bool).tril(SK - SQ)
    np.testing.assert_allclose(expected(q, k, v, causal=True)[0], torch_attention(q, k, v, mask), atol=1e-12)


def test_its_window_bias_and_alibi_are_those_of_a_float_mask():
    q, k, v = problem()
    rng = np.random.default_rng(1)
    bias = rng.standard_normal((B, 1, SQ, SK)).astype(np.float32)
    slopes = np.float32([0.1, 0.2, 0.5, 1.0])
    i, j = np.arange(SQ)[:, None] + SK - SQ, np.arange(SK)
    mask = bias - slopes[:, None, None].astype(np.float64) * np.abs(i - j)
    mask[..., (j < i - 3) | (j > i + 2)] = -np.inf

    out, _ = expected(q, k, v, window=(3, 2), bias=bias, alibi_slopes=slopes, scale=0.7)

    np.testing.assert_allclose(out, torch_attention(q, k, v, torch.from_numpy(mask), scale=0.7), atol=1e-12)


def test_its_lse_is_the_log_of_the_sum_of_exponentials():
    q, k, v = problem()
    scores = torch.from_numpy(q).double().transpose(1, 2) @ torch.from_numpy(k).double().transpose(
        1, 2
    ).repeat_interleave(2, dim=1).transpose(2, 3)
    want = torch.logsumexp(5 * torch.tanh(scores * 0.3 / 5), dim=-1).numpy()
    np.testing.assert_allclose(expected(q, k, v, scale=0.3, softcap=5.0)[1], want, atol=1e-12)


def test_a_sink_logit_is_a_key_without_a_value():
    q, k, v = problem()
    sinks = np.float32([0.5, -1.0, 2.0, 30.0])
    plain, plain_lse = expected(q, k, v)
    out, lse = expected(q, k, v, sink_logits=sinks)
    np.testing.assert_allclose(lse, np.logaddexp(plain_lse, sinks[:, None]), atol=1e-12)
    np.testing.assert_allclose(out, plain * np.exp(plain_lse - lse).swapaxes(1, 2)[..., None], atol=1e-12)


def test_keys_beyond_their_length_do_not_exist():
    q, k, v = problem()
    k[1, 6:], v[1, 6:] = np.nan, np.nan
    out, lse = expected(q, k, v, causal=True, kv_lengths=[SK, 6])
    alone, alone_lse = expected(q[1:], k[1:, :6], v[1:, :6], causal=True)
    np.testing.assert_array_equal(out[1:], alone)
    np.testing.assert_array_equal(lse[1:], alone_lse)


def test_a_row_that_sees_nothing_gives_zeros_and_an_lse_of_minus_infinity():
    q, k, v = problem(q_tokens=5, kv_tokens=3)
    out, lse = expected(q, k, v, causal=True)
    assert not out[:, :2].any()
    assert np.isneginf(lse[..., :2]).all()
    assert np.isfinite(lse[..., 2:]).all()


@pytest.mark.parametrize("sink", [0.0, -3.0])
def test_a_row_that_sees_nothing_has_the_sink_logit_as_its_lse(sink):
    q, k, v = problem(kv_tokens=0)
    out, lse = expected(q, k, v, sink_logits=np.full(HQ, sink, np.float32))
    assert not out.any()
    assert (lse == sink).all()

"""flash-attn's functions under their own names, against the float64 oracle and plain loops over sequences."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from oracle import assert_close, expected, random_tokens

from numbaflash import flash_attn
from numbaflash.flash_attn.bert_padding import pad_input, unpad_input

HALF = np.float16


def tokens(*shape, seed=0):
    return random_tokens(np.random.default_rng(seed), *shape, dtype=HALF)


def dense(q_tokens=9, kv_tokens=13):
    return tokens(2, q_tokens, 4, 16), tokens(2, kv_tokens, 2, 16, seed=1), tokens(2, kv_tokens, 2, 16, seed=2)


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ({}, {}),
        ({"causal": True}, {"causal": True}),
        ({"window_size": (3, 2)}, {"window": (3, 2)}),
        ({"window_size": (-1, 0)}, {"causal": True}),
        ({"causal": True, "window_size": (4, 5)}, {"causal": True, "window": (4, None)}),
        ({"softcap": 1.5, "softmax_scale": 0.4}, {"softcap": 1.5, "scale": 0.4}),
        ({"alibi_slopes": np.float32([0.1, 0.2, 0.3, 0.4])}, {"alibi_slopes": np.float32([0.1, 0.2, 0.3, 0.4])}),
    ],
    ids=str,
)
@pytest.mark.parametrize("lengths", [(9, 13), (13, 9)])
def test_options_mean_what_flash_attn_means_by_them(given, meant, lengths):
    q, k, v = dense(*lengths)
    out, lse, _ = flash_attn.flash_attn_func(q, k, v, return_attn_probs=True, **given)
    want, want_lse = expected(q, k, v, **meant)
    assert_close(out, want)
    np.testing.assert_allclose(lse, np.where(np.isneginf(want_lse), np.inf, want_lse), atol=1e-5)


@pytest.mark.parametrize("lengths", [(9, 13), (13, 9)])
def test_a_window_that_is_open_to_the_right_reaches_as_many_keys_as_there_are(lengths):
    # flash-attn takes seqlen_k for the open side, which shows where there are more queries than keys.
    q, k, v = dense(*lengths)
    out = flash_attn.flash_attn_func(q, k, v, window_size=(3, -1))
    assert_close(out, expected(q, k, v, window=(3, lengths[1]))[0])


def test_packed_arrays_are_read_in_place():
    qkv = tokens(2, 9, 3, 4, 16)
    plain = flash_attn.flash_attn_func(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2], causal=True)
    np.testing.assert_array_equal(flash_attn.flash_attn_qkvpacked_func(qkv, causal=True), plain)
    np.testing.assert_array_equal(flash_attn.flash_attn_kvpacked_func(qkv[:, :, 0], qkv[:, :, 1:], causal=True), plain)


@pytest.mark.parametrize("causal", [False, True])
def test_sequences_of_any_lengths_are_computed_one_behind_the_other(causal):
    q_lengths, k_lengths = [3, 0, 17, 1, 9], [5, 4, 17, 90, 0]
    q_ends, k_ends = (np.cumsum([0, *lengths], dtype=np.int32) for lengths in (q_lengths, k_lengths))
    q, k, v = tokens(q_ends[-1], 4, 16), tokens(k_ends[-1], 2, 16, seed=1), tokens(k_ends[-1], 2, 16, seed=2)
    out, lse, _ = flash_attn.flash_attn_varlen_func(
        q, k, v, q_ends, k_ends, 17, 90, causal=causal, return_attn_probs=True
    )
    for (qa, qb), (ka, kb) in zip(itertools.pairwise(q_ends), itertools.pairwise(k_ends), strict=True):
        want, want_lse = expected(q[None, qa:qb], k[None, ka:kb], v[None, ka:kb], causal=causal)
        assert_close(out[qa:qb], want[0])
        np.testing.assert_allclose(lse[:, qa:qb], np.where(np.isneginf(want_lse[0]), np.inf, want_lse[0]), atol=1e-5)


def test_tokens_behind_sequences_without_queries_see_nothing():
    q, k = np.ones((2, 4, 16), np.float16), np.ones((5, 2, 16), np.float16)
    nobody = np.int32([0, 0, 0])
    out, lse, _ = flash_attn.flash_attn_varlen_func(
        q, k, k, nobody, np.int32([0, 3, 5]), 0, 3, causal=True, return_attn_probs=True
    )
    assert not out.any()
    assert np.isposinf(lse).all()


def test_a_cache_is_read_up_to_its_lengths():
    q, k_cache, v_cache = dense(1, 40)
    k_cache[0, 30:] = v_cache[0, 30:] = np.nan
    out = flash_attn.flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=np.int32([30, 7]))
    for b, length in enumerate((30, 7)):
        want, _ = expected(q[b : b + 1], k_cache[b : b + 1, :length], v_cache[b : b + 1, :length])
        assert_close(out[b : b + 1], want)


def test_new_keys_are_written_where_the_cache_ends_and_attended_to():
    q, k_cache, v_cache = dense(3, 40)
    k, v = tokens(2, 3, 2, 16, seed=3), tokens(2, 3, 2, 16, seed=4)
    before = k_cache.copy()
    out = flash_attn.flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=np.int32([30, 7]), causal=True)
    for b, length in enumerate((30, 7)):
        np.testing.assert_array_equal(k_cache[b, length : length + 3], k[b])
        np.testing.assert_array_equal(v_cache[b, length : length + 3], v[b])
        np.testing.assert_array_equal(k_cache[b, :length], before[b, :length])
        np.testing.assert_array_equal(k_cache[b, length + 3 :], before[b, length + 3 :])
        whole = slice(0, length + 3)
        want, _ = expected(q[b : b + 1], k_cache[b : b + 1, whole], v_cache[b : b + 1, whole], causal=True)
        assert_close(out[b : b + 1], want)


@pytest.mark.parametrize("interleaved", [True, False])
def test_rotary_turns_new_queries_and_keys_by_their_positions(interleaved):
    q, k_cache, v_cache = dense(2, 40)
    k, v = tokens(2, 2, 2, 16, seed=3), tokens(2, 2, 2, 16, seed=4)
    angles = np.arange(40)[:, None] / 100.0 ** (np.arange(8) / 8)
    cos, sin = np.cos(angles).astype(HALF), np.sin(angles).astype(HALF)

    def turned(x, position):
        """Pairs as complex numbers, times e^(i angle)."""
        pairs = (x[..., 0::2], x[..., 1::2]) if interleaved else (x[..., :8], x[..., 8:])
        z = (pairs[0].astype(np.float64) + 1j * pairs[1]) * (cos[position] + 1j * sin[position].astype(np.float64))[
            :, None
        ]
        parts = np.stack((z.real, z.imag), -1).reshape(x.shape) if interleaved else np.concatenate((z.real, z.imag), -1)
        return parts.astype(HALF)

    out = flash_attn.flash_attn_with_kvcache(
        q,
        k_cache,
        v_cache,
        k,
        v,
        cos,
        sin,
        cache_seqlens=np.int32([20, 5]),
        causal=True,
        rotary_interleaved=interleaved,
    )
    for b, length in enumerate((20, 5)):
        positions = np.arange(length, length + 2)
        np.testing.assert_allclose(
            k_cache[b, positions].astype(np.float32), turned(k[b], positions).astype(np.float32), rtol=2e-3, atol=1e-3
        )
        want, _ = expected(
            turned(q[b], positions)[None], k_cache[None, b, : length + 2], v_cache[None, b, : length + 2], causal=True
        )
        np.testing.assert_allclose(out[b : b + 1].astype(np.float64), want, atol=4e-3)


def test_pages_are_read_where_the_block_table_says():
    page, lengths = 256, np.int32([300, 513])
    pages_k, pages_v = tokens(6, page, 2, 16, seed=1), tokens(6, page, 2, 16, seed=2)
    table = np.int32([[4, 1, 0], [2, 5, 3]])
    q = tokens(2, 1, 4, 16)
    out = flash_attn.flash_attn_with_kvcache(q, pages_k, pages_v, cache_seqlens=lengths, block_table=table)
    for b, length in enumerate(lengths):
        k, v = (pages[table[b]].reshape(1, -1, 2, 16)[:, :length] for pages in (pages_k, pages_v))
        assert_close(out[b : b + 1], expected(q[b : b + 1], k, v)[0])


def test_sequences_may_lie_in_any_entry_of_the_cache_behind_padding():
    q, k_cache, v_cache = dense(1, 40)
    out = flash_attn.flash_attn_with_kvcache(
        q,
        k_cache,
        v_cache,
        cache_seqlens=np.int32([30, 20]),
        cache_batch_idx=np.int32([1, 0]),
        cache_leftpad=np.int32([4, 0]),
    )
    for b, (entry, first, end) in enumerate(((1, 4, 30), (0, 0, 20))):
        want, _ = expected(q[b : b + 1], k_cache[None, entry, first:end], v_cache[None, entry, first:end])
        assert_close(out[b : b + 1], want)


def test_torch_tensors_come_back_as_torch_tensors():
    q, k, v = (torch.randn(1, 5, 2, 16).to(torch.bfloat16) for _ in range(3))
    out = flash_attn.flash_attn_func(q, k, v)
    assert out.dtype == torch.bfloat16
    want = torch.nn.functional.scaled_dot_product_attention(*(x.float().transpose(1, 2) for x in (q, k, v)))
    assert torch.allclose(out.float(), want.transpose(1, 2), atol=2e-2)


def test_what_there_is_not_says_so():
    q, k, v = (torch.randn(1, 5, 2, 16).half().requires_grad_() for _ in range(3))
    with pytest.raises((ValueError, NotImplementedError), match="dropout"):
        flash_attn.flash_attn_func(q, k, v, 0.1)
    out = flash_attn.flash_attn_func(q, k, v)
    with pytest.raises(NotImplementedError, match="no backward pass"):
        out.sum().backward()


def test_padding_taken_away_is_put_back():
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [0, 1, 1, 0]])
    x = torch.randn(3, 4, 5)
    packed, indices, ends, longest, _ = unpad_input(x, mask)
    assert torch.equal(packed, x[mask.bool()])
    assert ends.tolist() == [0, 2, 6, 8]
    assert longest == 4
    assert torch.equal(pad_input(packed, indices, 3, 4), x * mask[..., None])


def test_masks_of_another_shape_are_named():
    x, mask = np.zeros((2, 5, 3)), np.ones((2, 5))
    for masks in ({"attention_mask": mask[:, :4]}, {"attention_mask": mask, "unused_mask": mask[:, :4]}):
        with pytest.raises(ValueError, match=rf"{[*masks][-1]} must have hidden_states' batch and tokens \(2, 5\)"):
            unpad_input(x, **masks)


def test_a_wrong_argument_is_named():
    q, k, v = dense()
    with pytest.raises(TypeError, match=r"q must be float16 or bfloat16, .* got float32"):
        flash_attn.flash_attn_func(*(x.astype(np.float32) for x in (q, k, v)))
    with pytest.raises(ValueError, match="v must come with k"):
        flash_attn.flash_attn_with_kvcache(q, k, v, v=v)
    with pytest.raises(ValueError, match="cu_seqlens_q"):
        flash_attn.flash_attn_varlen_func(q[0], k[0], v[0], np.int32([0, 99]), np.int32([0, 13]), 9, 13)

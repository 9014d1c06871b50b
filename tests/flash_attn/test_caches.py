"""Pages and the caller's cache: read and written in place, at flash-attn's positions, or left alone."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from oracle import assert_close, expected, random_tokens

from numbaflash import flash_attn

HALF = np.float16
PAGE = 256


def tokens(*shape: int, seed: int = 0, dtype: Any = HALF) -> np.ndarray:
    return random_tokens(np.random.default_rng(seed), *shape, dtype=dtype)


def paged(*, seed: int = 1) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Six pages, and a table of three for each of two sequences."""
    return tokens(6, PAGE, 2, 16, seed=seed), tokens(6, PAGE, 2, 16, seed=seed + 1), np.int32([[4, 1, 0], [2, 5, 3]])


def laid_out(pages: np.ndarray, table: np.ndarray) -> np.ndarray:
    return pages[table].reshape(len(table), -1, *pages.shape[2:])


@pytest.mark.parametrize("q_tokens", [1, 20], ids=["decode", "prefill"])
def test_new_tokens_go_over_the_edge_of_a_page(q_tokens: int) -> None:
    k_pages, v_pages, table = paged()
    lengths = np.int32([PAGE - 1, 2 * PAGE - 7])
    q, k, v = tokens(2, q_tokens, 4, 16), tokens(2, 9, 2, 16, seed=3), tokens(2, 9, 2, 16, seed=4)
    whole_k, whole_v = laid_out(k_pages, table), laid_out(v_pages, table)
    out, lse = flash_attn.flash_attn_with_kvcache(
        q, k_pages, v_pages, k, v, cache_seqlens=lengths, block_table=table, causal=True, return_softmax_lse=True
    )
    for b, length in enumerate(lengths):
        whole_k[b, length : length + 9], whole_v[b, length : length + 9] = k[b], v[b]
        seen = slice(0, length + 9)
        want, want_lse = expected(q[b : b + 1], whole_k[b : b + 1, seen], whole_v[b : b + 1, seen], causal=True)
        assert_close(out[b : b + 1], want)
        np.testing.assert_allclose(lse[b : b + 1], want_lse, atol=1e-5)
    np.testing.assert_array_equal(laid_out(k_pages, table), whole_k)
    np.testing.assert_array_equal(laid_out(v_pages, table), whole_v)


def test_ragged_queries_read_pages() -> None:
    k_pages, v_pages, table = paged()
    q_ends, k_ends = np.int32([0, 3, 40]), np.int32([0, 300, 300 + 700])
    q = tokens(40, 4, 16)
    out = flash_attn.flash_attn_varlen_func(
        q, k_pages, v_pages, q_ends, k_ends, 37, 700, causal=True, block_table=table
    )
    for b in range(2):
        mine, length = slice(*q_ends[b : b + 2]), k_ends[b + 1] - k_ends[b]
        k, v = (laid_out(pages, table)[b : b + 1, :length] for pages in (k_pages, v_pages))
        assert_close(out[mine], expected(q[None, mine], k, v, causal=True)[0][0])


def test_pages_that_no_table_names_may_hold_anything() -> None:
    k_pages, v_pages, table = paged()
    lengths = np.int32([300, 20])
    q = tokens(2, 1, 4, 16)
    out = flash_attn.flash_attn_with_kvcache(q, k_pages, v_pages, cache_seqlens=lengths, block_table=table)
    unused = (0, 5, 3)
    k_pages[list(unused)] = v_pages[list(unused)] = np.nan
    table[0, 2], table[1, 1:] = -1, 99  # behind the lengths
    again = flash_attn.flash_attn_with_kvcache(q, k_pages, v_pages, cache_seqlens=lengths, block_table=table)
    np.testing.assert_array_equal(again, out)


@pytest.mark.parametrize("causal", [False, True])
def test_left_padding_shifts_keys_but_not_the_places_of_new_ones(causal: bool) -> None:
    q, k_cache, v_cache = tokens(2, 3, 4, 16), tokens(2, 40, 2, 16, seed=1), tokens(2, 40, 2, 16, seed=2)
    k, v = tokens(2, 3, 2, 16, seed=3), tokens(2, 3, 2, 16, seed=4)
    lengths, padding = np.int32([30, 7]), np.int32([4, 7])
    slopes = np.float32([0.1, 0.2, 0.3, 0.4])
    out = flash_attn.flash_attn_with_kvcache(
        q,
        k_cache,
        v_cache,
        k,
        v,
        cache_seqlens=lengths,
        cache_leftpad=padding,
        causal=causal,
        alibi_slopes=slopes,
    )
    for b in range(2):
        np.testing.assert_array_equal(k_cache[b, lengths[b] : lengths[b] + 3], k[b])
        seen = slice(padding[b], lengths[b] + 3)
        want, _ = expected(
            q[b : b + 1], k_cache[b : b + 1, seen], v_cache[b : b + 1, seen], causal=causal, alibi_slopes=slopes
        )
        assert_close(out[b : b + 1], want)


@pytest.mark.parametrize(
    ("options", "steps"),
    [({}, [0, 0, 0]), ({"causal": True}, [0, 1, 2]), ({"window_size": (5, -1)}, [0, 1, 2])],
    ids=["neither", "causal", "window"],
)
def test_queries_turn_as_one_unless_causal_or_windowed(options: dict[str, Any], steps: list[int]) -> None:
    q, k_cache, v_cache = tokens(1, 3, 2, 16), tokens(1, 40, 2, 16, seed=1), tokens(1, 40, 2, 16, seed=2)
    k, v = tokens(1, 3, 2, 16, seed=3), tokens(1, 3, 2, 16, seed=4)
    angles = np.random.default_rng(5).random((40, 8)) * 6
    cos, sin = np.cos(angles).astype(HALF), np.sin(angles).astype(HALF)
    rotated = flash_attn.flash_attn_with_kvcache(
        q, k_cache, v_cache, k, v, cos, sin, cache_seqlens=9, rotary_interleaved=False, **options
    )
    # The same with queries that were turned beforehand, against the keys that the first call has written.
    z = (q[..., :8].astype(np.float32) + 1j * q[..., 8:].astype(np.float32)) * (
        cos[9 + np.array(steps)].astype(np.float32) + 1j * sin[9 + np.array(steps)].astype(np.float32)
    )[None, :, None]
    turned = np.concatenate((z.real, z.imag), -1).astype(HALF)
    again = flash_attn.flash_attn_with_kvcache(turned, k_cache, v_cache, cache_seqlens=12, **options)
    np.testing.assert_allclose(rotated.astype(np.float32), again.astype(np.float32), atol=4e-3)


def test_a_part_of_the_head_may_be_rotated() -> None:
    q, k_cache, v_cache = tokens(1, 1, 2, 40), tokens(1, 20, 2, 40, seed=1), tokens(1, 20, 2, 40, seed=2)
    k, v = tokens(1, 1, 2, 40, seed=3), tokens(1, 1, 2, 40, seed=4)
    quarter_turn = np.zeros((20, 16), HALF), np.ones((20, 16), HALF)
    flash_attn.flash_attn_with_kvcache(q, k_cache, v_cache, k, v, *quarter_turn, cache_seqlens=5)
    np.testing.assert_array_equal(k_cache[0, 5, :, 0:32:2], -k[0, 0, :, 1:32:2])
    np.testing.assert_array_equal(k_cache[0, 5, :, 1:32:2], k[0, 0, :, 0:32:2])
    np.testing.assert_array_equal(k_cache[0, 5, :, 32:], k[0, 0, :, 32:])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_torch_cache_is_written_in_place(dtype: torch.dtype) -> None:
    k_cache, v_cache = torch.zeros(3, 20, 2, 16, dtype=dtype), torch.zeros(3, 20, 2, 16, dtype=dtype)
    q, k, v = (torch.randn(2, 1, 2, 16).to(dtype) for _ in range(3))
    out = flash_attn.flash_attn_with_kvcache(
        q,
        k_cache,
        v_cache,
        k,
        v,
        cache_seqlens=torch.tensor([0, 4], dtype=torch.int32),
        cache_batch_idx=torch.tensor([2, 0], dtype=torch.int32),
    )
    assert torch.equal(k_cache[2, 0], k[0, 0])
    assert torch.equal(v_cache[0, 4], v[1, 0])
    assert torch.equal(out[0], v[0])  # the only key there is
    assert k_cache.count_nonzero() == k.count_nonzero()


@pytest.mark.parametrize("splits", [0, 1, 7, 128])
def test_splits_change_no_result(splits: int) -> None:
    q, k_cache, v_cache = tokens(1, 1, 4, 16), tokens(1, 3000, 2, 16, seed=1), tokens(1, 3000, 2, 16, seed=2)
    out = flash_attn.flash_attn_with_kvcache(q, k_cache, v_cache, num_splits=splits)
    assert_close(out, expected(q, k_cache, v_cache)[0])


@pytest.mark.parametrize("head_dim", [1, 37, 256])
@pytest.mark.parametrize("dtype", [HALF, ml_dtypes.bfloat16])
def test_any_head_dim_up_to_256(head_dim: int, dtype: Any) -> None:
    q, k, v = (tokens(1, 11, heads, head_dim, seed=heads, dtype=dtype) for heads in (4, 2, 2))
    assert_close(flash_attn.flash_attn_func(q, k, v, causal=True), expected(q, k, v, causal=True)[0])


def test_an_error_leaves_the_cache_as_it_was() -> None:
    q, k_cache, v_cache = tokens(1, 1, 2, 16), tokens(1, 20, 2, 16, seed=1), tokens(1, 20, 2, 16, seed=2)
    k, v = tokens(1, 1, 2, 16, seed=3), tokens(1, 1, 2, 16, seed=4)
    before = k_cache.copy(), v_cache.copy()
    for wrong in ({"alibi_slopes": np.float32([1, 2, 3])}, {"softmax_scale": float("nan")}, {"cache_seqlens": 20}):
        with pytest.raises(ValueError, match="must"):
            flash_attn.flash_attn_with_kvcache(q, k_cache, v_cache, k, v, **{"cache_seqlens": 5, **wrong})
    np.testing.assert_array_equal((k_cache, v_cache), before)


def test_tokens_behind_the_last_sequence_get_nothing() -> None:
    q, k = tokens(10, 2, 16), tokens(8, 2, 16, seed=1)
    out, lse, _ = flash_attn.flash_attn_varlen_func(
        q, k, k, np.int32([0, 4]), np.int32([0, 8]), 4, 8, return_attn_probs=True
    )
    assert not out[4:].any()
    assert np.isposinf(lse[:, 4:]).all()
    assert_close(out[:4], expected(q[None, :4], k[None], k[None])[0][0])

"""What flash-attn rejects, and what would read or write beyond an array: named, and nothing has run."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from numbaflash import flash_attn

PAGES = np.ones((4, 256, 2, 16), np.float16)
TABLE = np.int32([[0, 1], [2, 3]])
ROTARY = np.ones((20, 8), np.float16)


def ones(*shape: int, dtype: Any = np.float16) -> np.ndarray:
    return np.ones(shape, dtype)


def rejected(
    function: Any, arguments: dict[str, Any], wrong: dict[str, Any], message: str, kind: type = ValueError
) -> None:
    function(**arguments)
    with pytest.raises(kind, match=message):
        function(**{**arguments, **wrong})


@pytest.mark.parametrize(
    ("wrong", "kind", "message"),
    [
        ({"q": ones(1, 4, 2, 16, dtype=np.float32)}, TypeError, "q must be float16 or bfloat16.* got float32"),
        ({"q": ones(1, 4, 2, 16, dtype=np.float64)}, TypeError, "q must be float16 or bfloat16.* got float64"),
        ({"k": torch.ones(1, 9, 2, 16).bfloat16()}, TypeError, "k must have q's dtype float16, got bfloat16"),
        ({"v": torch.ones(1, 9, 2, 16, device="meta").half()}, ValueError, "v must be on q's device cpu, got meta"),
        ({"v": [1, 2]}, TypeError, "v must be an array, got list"),
        ({"q": None}, TypeError, "q must be an array, got NoneType"),
        ({"softcap": None}, TypeError, "softcap must be a number, got NoneType"),
        ({"q": ones(4, 2, 16)}, ValueError, r"q must have 4 axes \(batch, tokens, heads, head_dim\)"),
        ({"q": ones(0, 4, 2, 16), "k": ones(0, 9, 2, 16), "v": ones(0, 9, 2, 16)}, ValueError, "at least one batch"),
        ({"q": ones(1, 4, 3, 16)}, ValueError, "q must have a multiple of k's 2 heads, got 3"),
        ({"k": ones(1, 9, 2, 8)}, ValueError, "k must have q's head_dim 16, got 8"),
        ({"v": ones(1, 9, 2, 8)}, ValueError, "v must have q's head_dim 16, got 8"),
        ({name: ones(1, 9, 2, 264) for name in "qkv"}, ValueError, "head_dim of 1 to 256, got 264"),
        ({"dropout_p": 0.17}, ValueError, r"dropout_p must be 0\.0, got 0\.17"),
        ({"window_size": 3}, TypeError, "window_size must be a pair of ints"),
        ({"window_size": (1.5, 0)}, TypeError, "window_size must be a pair of ints"),
        ({"alibi_slopes": ones(2)}, TypeError, "alibi_slopes must be a float32 array, got float16"),
        ({"alibi_slopes": ones(3, dtype=np.float32)}, ValueError, r"alibi_slopes must have shape \(2,\) or \(1, 2\)"),
        ({"softmax_scale": float("inf")}, ValueError, "scale must be finite"),
    ],
)
def test_dense(wrong: dict[str, Any], kind: type, message: str) -> None:
    arguments = {"q": ones(1, 4, 2, 16), "k": ones(1, 9, 2, 16), "v": ones(1, 9, 2, 16)}
    rejected(flash_attn.flash_attn_func, arguments, wrong, message, kind)


@pytest.mark.parametrize(
    ("function", "name", "shape"),
    [
        (flash_attn.flash_attn_qkvpacked_func, "qkv", (1, 4, 2, 2, 16)),
        (flash_attn.flash_attn_qkvpacked_func, "qkv", (4, 3, 2, 16)),
    ],
)
def test_packed(function: Any, name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=f"{name} must have"):
        function(ones(*shape))


@pytest.mark.parametrize(
    ("wrong", "kind", "message"),
    [
        ({"cu_seqlens_q": np.int64([0, 3, 4])}, TypeError, "cu_seqlens_q must be int32, got int64"),
        ({"cu_seqlens_q": np.int32([0])}, ValueError, "cu_seqlens_q must have at least 2 elements"),
        ({"cu_seqlens_q": np.int32([0, 5, 4])}, ValueError, "cu_seqlens_q must rise from 0"),
        ({"cu_seqlens_q": np.int32([1, 3, 4])}, ValueError, "cu_seqlens_q must rise from 0"),
        ({"cu_seqlens_k": np.int32([0, 5, 10])}, ValueError, "cu_seqlens_k must end at 9 tokens at most, got 10"),
        ({"cu_seqlens_k": np.int32([0, 9])}, ValueError, r"cu_seqlens_k must have shape \(3,\)"),
        ({"max_seqlen_q": 2}, ValueError, "max_seqlen_q must be at least the longest sequence's 3 tokens, got 2"),
        ({"max_seqlen_k": 4}, ValueError, "max_seqlen_k must be at least the longest sequence's 5 tokens, got 4"),
        ({"max_seqlen_k": None}, TypeError, "max_seqlen_k must be an int, got NoneType"),
        ({"v": ones(8, 2, 16)}, ValueError, r"v must have shape \(9, 2, 16\), got \(8, 2, 16\)"),
        ({"q": ones(1, 4, 2, 16)}, ValueError, "q must have 3 axes"),
        ({"cu_seqlens_k": torch.zeros(3, device="meta").int()}, ValueError, "cu_seqlens_k must be on q's device cpu"),
    ],
)
def test_varlen(wrong: dict[str, Any], kind: type, message: str) -> None:
    arguments = {
        "q": ones(4, 2, 16),
        "k": ones(9, 2, 16),
        "v": ones(9, 2, 16),
        "cu_seqlens_q": np.int32([0, 3, 4]),
        "cu_seqlens_k": np.int32([0, 5, 9]),
        "max_seqlen_q": 3,
        "max_seqlen_k": 5,
    }
    rejected(flash_attn.flash_attn_varlen_func, arguments, wrong, message, kind)


@pytest.mark.parametrize(
    ("wrong", "kind", "message"),
    [
        ({"v": None}, ValueError, "v must come with k"),
        ({"k": None}, ValueError, "v must come with k"),
        ({"cache_seqlens": None}, ValueError, "cache_seqlens must say where the new keys k go"),
        ({"cache_seqlens": 2.5}, TypeError, "cache_seqlens must be an int or int32 array, got float"),
        ({"cache_seqlens": np.int64([5, 5])}, TypeError, "cache_seqlens must be int32, got int64"),
        ({"cache_seqlens": np.int32([5, -1])}, ValueError, "cache_seqlens must be 0 to 20"),
        ({"cache_seqlens": np.int32([5, 19])}, ValueError, "cache_seqlens plus k's 2 tokens must fit the cache's 20"),
        ({"cache_batch_idx": np.int32([0, 2])}, ValueError, "cache_batch_idx must be 0 to 1"),
        ({"cache_batch_idx": np.int64([0, 1])}, TypeError, "cache_batch_idx must be int32"),
        ({"cache_leftpad": np.int32([0, 6])}, ValueError, "cache_leftpad must be 0 to cache_seqlens"),
        ({"k_cache": ones(3, 20, 2, 16), "v_cache": ones(3, 20, 2, 16)}, ValueError, "k_cache must have q's 2 batch"),
        ({"q": ones(2, 21, 2, 16)}, ValueError, "q must have at most the cache's 20 tokens"),
        ({"k": ones(2, 2, 1, 16)}, ValueError, "k must have shape"),
        ({"k_cache": ones(2, 20, 2, 32)[..., ::2]}, ValueError, "k_cache must have a last axis of stride 1"),
        ({"v_cache": np.broadcast_to(ones(16), (2, 20, 2, 16))}, ValueError, "v_cache must be writable"),
        ({"num_splits": 129}, ValueError, "num_splits must be at most 128, got 129"),
        ({"num_splits": 1.5}, TypeError, "num_splits must be an int, got float"),
        ({"k_cache": None}, TypeError, "k_cache must be an array, got NoneType"),
        ({"cache_seqlens": np.float32(3)}, TypeError, "cache_seqlens must be an int or int32 array, got float32"),
        ({"rotary_cos": ROTARY}, ValueError, "rotary_sin must come with rotary_cos"),
        ({"rotary_cos": ROTARY, "rotary_sin": ROTARY, "k": None, "v": None}, ValueError, "must come with new keys"),
        (
            {"rotary_cos": ROTARY[:9], "rotary_sin": ROTARY[:9]},
            ValueError,
            "angles for the cache's 20 positions, got 9",
        ),
        ({"rotary_cos": ROTARY[:, :4], "rotary_sin": ROTARY[:, :4]}, ValueError, "multiple of 8"),
        ({"rotary_cos": ones(20, 16), "rotary_sin": ones(20, 16)}, ValueError, "up to head_dim / 2 = 8; got 16"),
        ({"rotary_cos": ones(20, 8, dtype=np.float32), "rotary_sin": ROTARY}, TypeError, "rotary_cos must be float16"),
    ],
)
def test_kvcache(wrong: dict[str, Any], kind: type, message: str) -> None:
    arguments = {
        "q": ones(2, 2, 2, 16),
        "k_cache": ones(2, 20, 2, 16),
        "v_cache": ones(2, 20, 2, 16),
        "k": ones(2, 2, 2, 16),
        "v": ones(2, 2, 2, 16),
        "cache_seqlens": np.int32([5, 5]),
    }
    rejected(flash_attn.flash_attn_with_kvcache, arguments, wrong, message, kind)


@pytest.mark.parametrize(
    ("wrong", "kind", "message"),
    [
        ({"block_table": TABLE.astype(np.int64)}, TypeError, "block_table must be int32"),
        ({"block_table": TABLE[:1]}, ValueError, r"block_table must have shape \(2, any\)"),
        ({"block_table": TABLE + 1}, ValueError, "block_table must name pages 0 to 3, got 1 to 4"),
        ({"block_table": TABLE - 1}, ValueError, "block_table must name pages 0 to 3, got -1 to 2"),
        (
            {"k_cache": PAGES[:, :64], "v_cache": PAGES[:, :64], "cache_seqlens": np.int32([99, 128])},
            ValueError,
            "k_cache must have pages of a multiple of 256 tokens, got 64",
        ),
        (
            {"cache_batch_idx": np.int32([0, 1])},
            ValueError,
            "cache_batch_idx must be None where there is a block_table",
        ),
        ({"cache_leftpad": np.int32([0, 1])}, ValueError, "cache_leftpad must be None where there is a block_table"),
        ({"cache_seqlens": np.int32([512, 513])}, ValueError, "cache_seqlens must be 0 to 512"),
    ],
)
def test_pages(wrong: dict[str, Any], kind: type, message: str) -> None:
    arguments = {
        "q": ones(2, 1, 2, 16),
        "k_cache": PAGES,
        "v_cache": PAGES,
        "cache_seqlens": np.int32([300, 512]),
        "block_table": TABLE,
    }
    rejected(flash_attn.flash_attn_with_kvcache, arguments, wrong, message, kind)

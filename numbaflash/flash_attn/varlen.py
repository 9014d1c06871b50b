"""Sequences of any lengths, one behind the other without padding: `flash_attn_varlen_func` and its packed forms."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..arrays import as_numpy, like
from ..cpu import attend_runs, readable, threads_for
from .arguments import (
    check_arrays,
    check_axes,
    check_head_dim,
    check_no_dropout,
    check_shape,
    integer,
    integers,
    kernel_window,
    packed_parts,
    scoring,
    stored_lse,
)
from .gradients import forward_only
from .paged import check_pages, join_runs, page_runs, sequence_runs, visibility

__all__ = ["flash_attn_varlen_func", "flash_attn_varlen_kvpacked_func", "flash_attn_varlen_qkvpacked_func"]


def flash_attn_varlen_func(
    q: Any,
    k: Any,
    v: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Any = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Any = None,
) -> Any:
    """Attention of flash-attn's `flash_attn_varlen_func`; seqlen_q and seqlen_k are those of each sequence.

    Args:
        q: (total_q, heads, head_dim), float16 or bfloat16; head_dim is 1 to 256.
        k: (total_k, heads_k, head_dim), or pages (pages, page_size, heads_k, head_dim) with a block_table.
        v: As k.
        cu_seqlens_q: (batch + 1,), int32: sequence b owns the tokens `cu_seqlens_q[b]` to `cu_seqlens_q[b + 1]` of q.
        cu_seqlens_k: As cu_seqlens_q, for k; with a block_table only the differences count.
        max_seqlen_q: At least the longest sequence's queries.
        max_seqlen_k: At least the longest sequence's keys.
        dropout_p: 0.0.
        softmax_scale: Factor of q.k; None means 1/sqrt(head_dim).
        causal: As in `flash_attn_func`, like everything that follows.
        window_size: (left, right); -1 is unbounded.
        softcap: Cap of the scores.
        alibi_slopes: (heads,) or (batch, heads), float32.
        deterministic: Of the backward pass; the forward pass always is.
        return_attn_probs: Also return the LSE, and an empty array in the place of the dropout pattern.
        block_table: (batch, pages of a sequence), int32: the pages of each sequence; page_size is a multiple of 256.

    Returns:
        The output (total_q, heads, head_dim), q's library and dtype; with `return_attn_probs` also the natural
        log-sum-exp, float32 (heads, total_q), +inf where a query sees nothing, and an array of size 0. Tokens behind
        the last sequence get what a query gets that sees nothing.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: An argument has the wrong shape, value or device.
    """
    del deterministic

    def compute() -> Any:
        check_no_dropout(dropout_p)
        check_arrays(q=q, k=k, v=v)
        queries, keys, values = as_numpy(q, "q"), as_numpy(k, "k"), as_numpy(v, "v")
        check_axes("q", queries, ("total_q", "heads", "head_dim"))
        paged = block_table is not None
        axes = ("pages", "page_size", "heads_k", "head_dim") if paged else ("total_k", "heads_k", "head_dim")
        check_axes("k", keys, axes)
        total, heads, head_dim = queries.shape
        check_head_dim(heads, keys.shape[-2], head_dim)
        check_shape("k", keys, (*keys.shape[:-1], head_dim))
        check_shape("v", values, keys.shape)

        q_bounds = integers("cu_seqlens_q", cu_seqlens_q, (-1,), q)
        batch = len(q_bounds) - 1
        if batch < 1:
            raise ValueError(f"cu_seqlens_q must have at least 2 elements, got {len(q_bounds)}")
        kv_bounds = integers("cu_seqlens_k", cu_seqlens_k, (batch + 1,), q)
        q_tokens = _tokens("q", q_bounds, total, max_seqlen_q)
        kv_tokens = _tokens("k", kv_bounds, None if paged else len(keys), max_seqlen_k)

        keys, values = readable(keys), readable(values)
        if paged:
            table = integers("block_table", block_table, (batch, -1), q)
            check_pages(keys, values, table, kv_tokens, ("k", "v"))
            runs = page_runs(keys, values, table, kv_tokens)
        else:
            k_start, v_start = (kv_bounds[:-1] * array.strides[0] for array in (keys, values))
            runs = sequence_runs(keys, values, k_start, v_start, np.zeros(batch, np.int64), kv_tokens)
        window = kernel_window(window_size, causal, integer("max_seqlen_k", max_seqlen_k))
        scored = scoring(q, batch, softmax_scale, softcap, alibi_slopes)
        joined, visible = join_runs([runs], batch, keys, values), visibility(q_tokens, kv_tokens, window)
        with threads_for(q):
            out, lse = attend_runs(queries, joined, visible, scored, q_bounds)
        if q_bounds[-1] < total:
            out[q_bounds[-1] :], lse[:, q_bounds[-1] :] = 0, -np.inf
        if not return_attn_probs:
            return like(q, out)
        return like(q, out), like(q, stored_lse(lse)), q[:0]

    return forward_only(compute, q, k, v)


def flash_attn_varlen_kvpacked_func(
    q: Any,
    kv: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Any = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """`flash_attn_varlen_func` with keys and values in one array, (total_k, 2, heads_k, head_dim), read in place."""
    k, v = packed_parts("kv", kv, ("total_k", "2", "heads_k", "head_dim"))
    return flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )


def flash_attn_varlen_qkvpacked_func(
    qkv: Any,
    cu_seqlens: Any,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Any = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """`flash_attn_varlen_func` with queries, keys and values in one array, (total, 3, heads, head_dim)."""
    q, k, v = packed_parts("qkv", qkv, ("total", "3", "heads", "head_dim"))
    return flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens,
        cu_seqlens,
        max_seqlen,
        max_seqlen,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )


def _tokens(which: str, bounds: NDArray[np.int64], total: int | None, max_seqlen: int) -> NDArray[np.int64]:
    """Tokens of each sequence of q or k, or an error where bounds and longest length do not fit them."""
    limit = integer(f"max_seqlen_{which}", max_seqlen)
    tokens: NDArray[np.int64] = bounds[1:] - bounds[:-1]
    lengths = tokens.tolist()  # Python's min and max take 0.5 us for 64 sequences, NumPy's 2 for any number
    longest = max(lengths)
    if bounds[0] != 0 or min(lengths) < 0:
        raise ValueError(f"cu_seqlens_{which} must rise from 0, got {bounds.tolist()}")
    if total is not None and bounds[-1] > total:
        raise ValueError(f"cu_seqlens_{which} must end at {total} tokens at most, got {int(bounds[-1])}")
    if longest > limit:
        raise ValueError(f"max_seqlen_{which} must be at least the longest sequence's {longest} tokens, got {limit}")
    return tokens

"""Sequences of one length: `flash_attn_func` and its two packed forms."""

from __future__ import annotations

from typing import Any

from ..api import attention
from .arguments import (
    cap,
    check_arrays,
    check_axes,
    check_no_dropout,
    kernel_window,
    packed_parts,
    slopes,
    stored_lse,
)
from .gradients import forward_only

__all__ = ["flash_attn_func", "flash_attn_kvpacked_func", "flash_attn_qkvpacked_func"]

_AXES = ("batch", "tokens", "heads", "head_dim")


def flash_attn_func(
    q: Any,
    k: Any,
    v: Any,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Any = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """Attention of flash-attn's `flash_attn_func`.

    Args:
        q: (batch, seqlen_q, heads, head_dim), float16 or bfloat16; head_dim is 1 to 256.
        k: (batch, seqlen_k, heads_k, head_dim); `heads` is a multiple of `heads_k`.
        v: As k.
        dropout_p: 0.0.
        softmax_scale: Factor of q.k; None means 1/sqrt(head_dim).
        causal: Query i sees key j where j <= i + seqlen_k - seqlen_q (bottom-right aligned).
        window_size: (left, right): query i sees i + seqlen_k - seqlen_q - left <= j <= i + seqlen_k - seqlen_q + right;
            -1 is unbounded.
        softcap: s -> softcap * tanh(s / softcap); 0 and less means none.
        alibi_slopes: (heads,) or (batch, heads), float32: adds -slope * |i + seqlen_k - seqlen_q - j|.
        deterministic: Of the backward pass; the forward pass always is.
        return_attn_probs: Also return the LSE, and an empty array in the place of the dropout pattern.

    Returns:
        The output (batch, seqlen_q, heads, head_dim), q's library and dtype; with `return_attn_probs` also the natural
        log-sum-exp, float32 (batch, heads, seqlen_q), +inf where a query sees nothing, and an array of size 0.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: An argument has the wrong shape, value or device.
    """
    del deterministic
    return forward_only(
        lambda: _attend(
            q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, return_attn_probs
        ),
        *(q, k, v),
    )


def flash_attn_kvpacked_func(
    q: Any,
    kv: Any,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Any = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """`flash_attn_func` with keys and values in one array, (batch, seqlen_k, 2, heads_k, head_dim), read in place."""
    k, v = packed_parts("kv", kv, ("batch", "tokens", "2", "heads", "head_dim"))
    return flash_attn_func(
        q,
        k,
        v,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )


def flash_attn_qkvpacked_func(
    qkv: Any,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Any = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """`flash_attn_func` with queries, keys and values in one array, (batch, seqlen, 3, heads, head_dim)."""
    q, k, v = packed_parts("qkv", qkv, ("batch", "tokens", "3", "heads", "head_dim"))
    return flash_attn_func(
        q,
        k,
        v,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )


def _attend(
    q: Any,
    k: Any,
    v: Any,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size: Any,
    softcap: float,
    alibi_slopes: Any,
    return_attn_probs: bool,
) -> Any:
    check_no_dropout(dropout_p)
    check_arrays(q=q, k=k, v=v)
    for name, array in (("q", q), ("k", k), ("v", v)):
        check_axes(name, array, _AXES)
    if q.shape[0] < 1:
        raise ValueError(f"q must have at least one batch entry, got shape {tuple(q.shape)}")
    if v.shape[3] != q.shape[3]:
        raise ValueError(f"v must have q's head_dim {q.shape[3]}, got {v.shape[3]} (numbaflash.attention takes both)")
    out, lse = attention(
        q,
        k,
        v,
        scale=softmax_scale,
        window=kernel_window(window_size, causal, k.shape[1]),
        softcap=cap(softcap),
        alibi_slopes=slopes(alibi_slopes, q.shape[0], q.shape[2], q),
        return_lse=True,
    )
    return (out, stored_lse(lse), q[:0]) if return_attn_probs else out

"""Attention problems that the kernels are tested with: random tokens by shape, and sets of options by name."""

from __future__ import annotations

import numpy as np
from oracle import random_tokens

SHAPES = [
    {},
    {"q_tokens": 1, "kv_tokens": 1},
    {"q_tokens": 1, "kv_tokens": 300},
    {"q_tokens": 129, "kv_tokens": 128},
    {"q_tokens": 200, "kv_tokens": 64},
    {"q_tokens": 257, "kv_tokens": 13},
    {"q_tokens": 128, "kv_tokens": 257},
    {"q_tokens": 65, "kv_tokens": 256, "q_heads": 1},
    {"q_tokens": 40, "kv_tokens": 700, "q_heads": 1},
    {"q_tokens": 33, "kv_tokens": 65, "batch": 2, "q_heads": 4, "kv_heads": 4},
    {"q_tokens": 33, "kv_tokens": 65, "batch": 2, "q_heads": 4, "kv_heads": 2},
    {"q_tokens": 33, "kv_tokens": 65, "batch": 2, "q_heads": 4, "kv_heads": 1},
]
"""Around the edges of all kernels' tiles, with rows that see nothing under a causal mask, and heads in groups."""


def problem(
    *, q_tokens=70, kv_tokens=150, batch=1, q_heads=2, kv_heads=1, head_dim=64, value_dim=None, dtype="float16", seed=1
):
    rng = np.random.default_rng(seed)
    return (
        random_tokens(rng, batch, q_tokens, q_heads, head_dim, dtype=np.dtype(dtype)),
        random_tokens(rng, batch, kv_tokens, kv_heads, head_dim, dtype=np.dtype(dtype)),
        random_tokens(rng, batch, kv_tokens, kv_heads, value_dim or head_dim, dtype=np.dtype(dtype)),
    )


def options_for(q, k):
    """Sets of options by name, with arrays of the problem's shapes."""
    batch, q_tokens, q_heads, _ = q.shape
    kv_tokens = k.shape[1]
    rng = np.random.default_rng(5)
    seen = rng.random((batch, 1, q_tokens, kv_tokens)) < 0.7
    added = rng.standard_normal((q_heads, q_tokens, kv_tokens)).astype(np.float32)
    hidden = np.where(rng.random((q_tokens, kv_tokens)) < 0.3, -np.inf, 0).astype(q.dtype)
    slopes = np.geomspace(0.5, 0.05, q_heads).astype(np.float32)
    sinks = np.linspace(0.5, 3, q_heads).astype(np.float32)
    lengths = rng.integers(0, kv_tokens + 1, batch)
    lengths[0] = kv_tokens * 2 // 3
    everything = {
        "causal": True,
        "window": (60, None),
        "softcap": 3.0,
        "bias": added,
        "alibi_slopes": slopes,
        "sink_logits": sinks,
        "kv_lengths": lengths,
    }
    return {
        "plain": {},
        "causal": {"causal": True},
        "window": {"window": (20, 5)},
        "left window": {"window": (9, None)},
        "causal window": {"causal": True, "window": (33, None)},
        "softcap": {"softcap": 2.0},
        "float bias": {"bias": added},
        "bias in the arrays' dtype": {"bias": hidden},
        "bool bias": {"bias": seen},
        "bias of one row": {"bias": added[:, :1]},
        "alibi": {"alibi_slopes": slopes},
        "sinks": {"sink_logits": sinks},
        "negative scale": {"scale": -0.2},
        "lengths": {"kv_lengths": lengths},
        "causal lengths": {"kv_lengths": lengths, "causal": True},
        "all": everything,
    }

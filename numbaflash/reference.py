"""Attention as the formula writes it, in float64 NumPy: the oracle that every backend is tested against.

O = softmax(S) V with S = softcap(scale * Q K^T) + alibi + bias, masked; see "Attention Is All You Need", section 3.2.1.
It is slow, holds all scores at once and shares no code with the backends.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .problem import AttentionProblem

__all__ = ["attention", "visible"]


def attention(
    problem: AttentionProblem, q: NDArray[Any], k: NDArray[Any], v: NDArray[Any], sink_tokens: int = 0
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Solve `problem` in float64.

    Args:
        problem: What `numbaflash.problem.describe` returned for these arrays.
        q: (B, Sq, Hq, D).
        k: (B, Sk, Hkv, D).
        v: (B, Sk, Hkv, Dv).
        sink_tokens: First tokens that stay visible behind the window (StreamingLLM, section 3.2).

    Returns:
        The output (B, Sq, Hq, Dv) and the natural log-sum-exp (B, Hq, Sq).
    """
    group = problem.q_heads // problem.kv_heads
    out = np.zeros((problem.batch, problem.q_tokens, problem.q_heads, problem.value_dim))
    lse = np.full((problem.batch, problem.q_heads, problem.q_tokens), -np.inf)
    scoring = problem.scoring
    for b in range(problem.batch):
        length = int(problem.kv_lengths[b])
        may_see = visible(problem, b, sink_tokens)
        distance = np.abs(np.arange(problem.q_tokens)[:, None] + length - problem.q_tokens - np.arange(length))
        for h in range(problem.q_heads):
            queries = q[b, :, h].astype(np.float64)
            keys = k[b, :length, h // group].astype(np.float64)
            values = v[b, :length, h // group].astype(np.float64)
            with np.errstate(invalid="ignore", over="ignore"):
                s = scoring.scale * (queries @ keys.T)
                if scoring.softcap:
                    s = scoring.softcap * np.tanh(s / scoring.softcap)
                if scoring.alibi_slopes is not None:
                    s = s - np.float64(scoring.alibi_slopes[b, h]) * distance
                may_attend = may_see
                if scoring.bias is not None:
                    bias = scoring.bias[b, h, :, :length]
                    if bias.dtype == np.bool_:
                        may_attend = may_attend & bias
                    else:
                        may_attend = may_attend & (bias != -np.inf)
                        s = s + np.where(may_attend, bias, 0).astype(np.float64)
            sink = None if scoring.sink_logits is None else np.float64(scoring.sink_logits[h])
            for i in range(problem.q_tokens):
                columns = np.flatnonzero(may_attend[i])
                out[b, i, h], lse[b, h, i] = _softmax_row(s[i, columns], values[columns], sink)
    return out, lse


def visible(problem: AttentionProblem, b: int, sink_tokens: int = 0) -> NDArray[np.bool_]:
    """Return which of its keys each query row of batch entry b may see: (Sq, kv_lengths[b]) bool."""
    length = int(problem.kv_lengths[b])
    position = np.arange(problem.q_tokens)[:, None] + length - problem.q_tokens
    j = np.arange(length)[None, :]
    mask = np.ones((problem.q_tokens, length), np.bool_)
    if problem.window_left is not None:
        mask &= (j >= position - problem.window_left) | (j < sink_tokens)
    if problem.window_right is not None:
        mask &= j <= position + problem.window_right
    return mask


def _softmax_row(
    scores: NDArray[np.float64], values: NDArray[np.float64], sink: np.float64 | None
) -> tuple[NDArray[np.float64], np.float64]:
    logits = scores if sink is None else np.append(scores, sink)
    top = logits.max(initial=-np.inf)
    if top == -np.inf:
        return np.zeros(values.shape[1]), np.float64(-np.inf)
    with np.errstate(invalid="ignore"):
        weights = np.exp(logits - top)
        total = weights.sum()
        return weights[: len(scores)] @ values / total, top + np.log(total)

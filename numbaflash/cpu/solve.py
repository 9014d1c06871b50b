"""The CPU backend's entry points: an attention problem, or queries over runs, becomes a task for the kernels."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from ..problem import BFLOAT16, FLOAT16, FLOAT32, AttentionProblem, Scoring
from . import emit
from .pool import run
from .prefill import MAX_ITEM_ROWS, PREFILL_SCRATCH, prefill
from .runs import RUN_FIELDS, UNBOUNDED, KVRuns, Visibility
from .task import BOOL_BIAS, NO_BIAS, TASK

__all__ = ["SPLIT_KV_MAX_TOKENS", "attend_runs", "attention"]

# Steps of at most that many tokens go to the split-KV decode kernel, larger ones to the prefill kernel.
SPLIT_KV_MAX_TOKENS = 0

_CODES = {FLOAT32: emit.FLOAT32, FLOAT16: emit.FLOAT16, BFLOAT16: emit.BFLOAT16, np.dtype(np.bool_): BOOL_BIAS}


def attention(
    problem: AttentionProblem, q: NDArray[Any], k: NDArray[Any], v: NDArray[Any], algorithm: str
) -> tuple[NDArray[Any], NDArray[np.float32]]:
    """Solve a problem on the CPU.

    Args:
        problem: What `numbaflash.problem.describe` returned for these arrays.
        q: (B, Sq, Hq, D), any strides.
        k: (B, Sk, Hkv, D), any strides.
        v: (B, Sk, Hkv, Dv), any strides.
        algorithm: "v2", "v1" or "standard".

    Returns:
        The output (B, Sq, Hq, Dv) in q's dtype and the natural log-sum-exp (B, Hq, Sq), float32.
    """
    k, v = _readable(k), _readable(v)
    batch = problem.batch
    table = np.empty((batch, RUN_FIELDS), np.int64)
    index = np.arange(batch)
    table[:, 0] = k.ctypes.data + index * k.strides[0]
    table[:, 1] = v.ctypes.data + index * v.strides[0]
    table[:, 2] = 0
    table[:, 3] = problem.kv_lengths
    table[:, 4:] = k.strides[1], k.strides[2], v.strides[1], v.strides[2]
    runs = KVRuns(table, np.arange(batch + 1), k.dtype, problem.kv_heads, problem.head_dim, problem.value_dim)
    visibility = Visibility(
        q_start=problem.kv_lengths - problem.q_tokens,
        left=np.full(batch, _side(problem.window_left)),
        right=np.full(batch, _side(problem.window_right)),
        sinks=np.zeros(batch, np.int64),
    )
    return attend_runs(q, runs, visibility, problem.scoring)


def attend_runs(
    q: NDArray[Any], runs: KVRuns, visibility: Visibility, scoring: Scoring
) -> tuple[NDArray[Any], NDArray[np.float32]]:
    """Attend to keys and values that lie in runs.

    Args:
        q: (N, T, Hq, D), any strides; its dtype may differ from that of the runs.
        runs: Keys and values of the N sequences.
        visibility: Which of them each query sees.
        scoring: How they are scored; a bias is indexed by positions.

    Returns:
        The output (N, T, Hq, Dv) in q's dtype and the natural log-sum-exp (N, Hq, T), float32.
    """
    q = _readable(q)
    sequences, tokens, q_heads, head_dim = q.shape
    out = np.empty((sequences, tokens, q_heads, runs.value_dim), q.dtype)
    lse = np.empty((sequences, q_heads, tokens), np.float32)
    group = q_heads // runs.kv_heads
    rows = tokens * group
    rows_per_item = MAX_ITEM_ROWS
    items = sequences * runs.kv_heads * -(-rows // rows_per_item)
    bias = scoring.bias
    task = np.zeros(1, TASK)
    record = task[0]
    record["items"] = items
    record["rows_per_item"] = rows_per_item
    record["sequences"], record["q_tokens"], record["q_heads"] = sequences, tokens, q_heads
    record["kv_heads"], record["group"], record["head_dim"] = runs.kv_heads, group, head_dim
    record["value_dim"] = runs.value_dim
    record["q"], record["q_dtype"] = q.ctypes.data, _CODES[q.dtype]
    record["q_batch"], record["q_token"], record["q_head"] = q.strides[:3]
    record["out"] = out.ctypes.data
    record["out_batch"], record["out_token"], record["out_head"] = out.strides[:3]
    record["lse"] = lse.ctypes.data
    record["lse_batch"], record["lse_head"], record["lse_token"] = lse.strides
    record["runs"], record["bounds"], record["kv_dtype"] = (
        runs.table.ctypes.data,
        runs.bounds.ctypes.data,
        _CODES[runs.dtype],
    )
    record["q_start"], record["left"] = visibility.q_start.ctypes.data, visibility.left.ctypes.data
    record["right"], record["sinks"] = visibility.right.ctypes.data, visibility.sinks.ctypes.data
    record["bias_dtype"] = NO_BIAS
    if bias is not None:
        record["bias"], record["bias_dtype"] = bias.ctypes.data, _CODES[bias.dtype]
        record["bias_batch"], record["bias_head"], record["bias_row"], record["bias_key"] = bias.strides
    if scoring.alibi_slopes is not None:
        record["alibi_slopes"] = scoring.alibi_slopes.ctypes.data
    if scoring.sink_logits is not None:
        record["sink_logits"] = scoring.sink_logits.ctypes.data
    record["scale"], record["softcap"] = scoring.scale, scoring.softcap
    run(
        prefill,
        task,
        PREFILL_SCRATCH,
        min(numba.config.NUMBA_NUM_THREADS, items) - 1,
        (q, out, lse, runs, visibility, scoring),
    )
    return out, lse


def _readable(array: NDArray[Any]) -> NDArray[Any]:
    """The array, or a copy where its last axis is not contiguous or its elements are not aligned."""
    if array.flags.aligned and (array.strides[-1] == array.itemsize or array.shape[-1] == 1):
        return array
    return np.ascontiguousarray(array)


def _side(window: int | None) -> int:
    return UNBOUNDED if window is None else window

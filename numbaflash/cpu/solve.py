"""The CPU backend's entry points: an attention problem, or queries over runs, becomes a task for the kernels."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from ..problem import BFLOAT16, FLOAT16, FLOAT32, AttentionProblem, Scoring
from . import emit
from .decode import DECODE_SCRATCH, decode, plan_decode
from .panel import PANEL_ROWS
from .pool import run
from .prefill import MAX_ITEM_ROWS, PREFILL_SCRATCH, prefill
from .runs import RUN_FIELDS, UNBOUNDED, KVRuns, Visibility
from .vector import LANES
from .task import BOOL_BIAS, NO_BIAS, TASK

__all__ = ["SPLIT_KV_MAX_TOKENS", "attend_runs", "attention"]

# Steps of at most that many tokens go to the split-KV decode kernel, larger ones to the prefill kernel.
SPLIT_KV_MAX_TOKENS = 8

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
    sequences, tokens, q_heads, _ = q.shape
    out = np.empty((sequences, tokens, q_heads, runs.value_dim), q.dtype)
    lse = np.empty((sequences, q_heads, tokens), np.float32)
    if out.shape[0] * tokens == 0:
        return out, lse
    task = _task(q, runs, visibility, scoring, out, lse)
    references = (q, out, lse, runs, visibility, scoring)
    if tokens <= SPLIT_KV_MAX_TOKENS:
        _decode(task, references)
    else:
        _prefill(task, references)
    return out, lse


def _prefill(task: NDArray[Any], references: tuple[Any, ...]) -> None:
    record = task[0]
    pairs = int(record["sequences"] * record["kv_heads"])
    rows = int(record["q_tokens"] * record["group"])
    panels = -(-rows // PANEL_ROWS)
    # Several items a thread, so that no thread waits long for the last one.
    per_item = min(max(pairs * panels // (4 * _threads()), 1), MAX_ITEM_ROWS // PANEL_ROWS)
    record["rows_per_item"] = per_item * PANEL_ROWS
    record["items"] = items = pairs * -(-panels // per_item)
    run(prefill, task, PREFILL_SCRATCH, min(_threads(), items) - 1, references)


def _decode(task: NDArray[Any], references: tuple[Any, ...]) -> None:
    plan_decode(task.ctypes.data, 0)
    record = task[0]
    items, splits = int(record["items"]), int(record["splits"])
    if splits > 1:
        row_bytes = 4 * (-(-int(record["value_dim"]) // LANES) * LANES) + 8
        partials = np.empty(items * int(record["rows_per_item"]) * row_bytes, np.uint8)
        splits_done = np.zeros(items // splits, np.int64)
        record["partials"], record["splits_done"] = partials.ctypes.data, splits_done.ctypes.data
        references = (*references, partials, splits_done)
    run(decode, task, DECODE_SCRATCH, min(_threads(), items) - 1, references)


def _task(
    q: NDArray[Any],
    runs: KVRuns,
    visibility: Visibility,
    scoring: Scoring,
    out: NDArray[Any],
    lse: NDArray[np.float32],
) -> NDArray[Any]:
    task = np.zeros(1, TASK)
    record = task[0]
    record["sequences"], record["q_tokens"], record["q_heads"] = q.shape[:3]
    record["kv_heads"], record["group"] = runs.kv_heads, q.shape[2] // runs.kv_heads
    record["head_dim"], record["value_dim"] = runs.head_dim, runs.value_dim
    record["q"], record["q_dtype"] = q.ctypes.data, _CODES[q.dtype]
    record["q_batch"], record["q_token"], record["q_head"] = q.strides[:3]
    record["out"] = out.ctypes.data
    record["out_batch"], record["out_token"], record["out_head"] = out.strides[:3]
    record["lse"] = lse.ctypes.data
    record["lse_batch"], record["lse_head"], record["lse_token"] = lse.strides
    record["runs"], record["bounds"] = runs.table.ctypes.data, runs.bounds.ctypes.data
    record["kv_dtype"] = _CODES[runs.dtype]
    record["q_start"], record["left"] = visibility.q_start.ctypes.data, visibility.left.ctypes.data
    record["right"], record["sinks"] = visibility.right.ctypes.data, visibility.sinks.ctypes.data
    record["scale"], record["softcap"] = scoring.scale, scoring.softcap
    if scoring.alibi_slopes is not None:
        record["alibi_slopes"] = scoring.alibi_slopes.ctypes.data
    if scoring.sink_logits is not None:
        record["sink_logits"] = scoring.sink_logits.ctypes.data
    record["bias_dtype"] = NO_BIAS
    if scoring.bias is not None:
        bias = scoring.bias
        record["bias"], record["bias_dtype"] = bias.ctypes.data, _CODES[bias.dtype]
        record["bias_batch"], record["bias_head"], record["bias_row"], record["bias_key"] = bias.strides
    return task


def _threads() -> int:
    count: int = numba.config.NUMBA_NUM_THREADS
    return count


def _readable(array: NDArray[Any]) -> NDArray[Any]:
    """The array, or a copy where its last axis is not contiguous or its elements are not aligned."""
    if array.flags.aligned and (array.strides[-1] == array.itemsize or array.shape[-1] == 1):
        return array
    return np.ascontiguousarray(array)


def _side(window: int | None) -> int:
    return UNBOUNDED if window is None else window

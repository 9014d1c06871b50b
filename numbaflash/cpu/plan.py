"""What calls of the same shapes, strides and numbers have in common: all of a task but where its arrays lie.

Between two calls of attention a model reads megabytes of weights, and Python runs from cold caches, at a third of its
speed: what a call need not do again is worth three times what a loop over it tells.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..problem import BFLOAT16, FLOAT16, FLOAT32, AttentionProblem, Scoring
from . import emit
from .decode import plan_decode
from .panel import PANEL_ROWS
from .pool import thread_count
from .record import address_of, address_of_array
from .runs import COUNT, KVRuns, Visibility
from .task import NO_BIAS, Task
from .tensors import runs_of_tensors

__all__ = ["SPLIT_KV_MAX_TOKENS", "Plan", "plan_tensors"]

# Steps of at most that many tokens go to the split-KV decode kernel, larger ones to the prefill kernel.
SPLIT_KV_MAX_TOKENS = 8

_CODES = {FLOAT32: emit.FLOAT32, FLOAT16: emit.FLOAT16, BFLOAT16: emit.BFLOAT16, np.dtype(np.bool_): emit.BOOL}


class Plan:
    """How to attend with queries of one shape to keys and values that lie in such runs.

    Args:
        q_shape: As in `attend_runs`.
        q_strides: In bytes.
        q_dtype: Of the outputs, too.
        runs: Keys and values.
        visibility: Which of them each query sees.
        scoring: How they are scored.
        q_bounds: Of a packed batch.

    Attributes:
        task: All but the addresses of queries, outputs, keys and values; for decode, with the items it is cut into.
        runs: As given.
        out_shape: Of the output.
        lse_shape: Of the log-sum-exp.
        tokens: Queries of the longest sequence.
        pairs: Sequences times KV heads.
        panels: Of the longest sequence and one KV head.
        elements: Of all sequences' keys and values, for one head.
        is_empty: Whether there is nothing to do.
    """

    def __init__(
        self,
        q_shape: tuple[int, ...],
        q_strides: tuple[int, ...],
        q_dtype: np.dtype[Any],
        runs: KVRuns,
        visibility: Visibility,
        scoring: Scoring,
        q_bounds: NDArray[np.int64] | None = None,
    ) -> None:
        *batch, tokens, q_heads, _ = q_shape
        sequences, kv_heads, dims = len(runs.bounds) - 1, runs.kv_heads, (runs.head_dim, runs.value_dim)
        self.runs = runs
        self.out_shape = (*batch, tokens, q_heads, runs.value_dim)
        self.lse_shape = (*batch, q_heads, tokens)
        if q_bounds is not None:
            tokens = max((q_bounds[1:] - q_bounds[:-1]).tolist(), default=0)
        self.tokens: int = tokens
        self.pairs = sequences * kv_heads
        self.panels = -(-tokens * (q_heads // kv_heads) // PANEL_ROWS)
        numbers = scoring.scale, scoring.softcap
        self.task = _task_of_shape(q_shape, q_dtype, runs.dtype, sequences, tokens, kv_heads, *dims, *numbers).copy()
        self._keep_alive = visibility, scoring, q_bounds
        self.is_empty = tokens == 0 or 0 in self.out_shape  # a packed batch may have tokens that are nobody's
        if not self.is_empty:
            self._describe(q_strides, visibility, scoring, q_bounds)
        if tokens <= SPLIT_KV_MAX_TOKENS and not self.is_empty:
            plan_decode(self.task.address, thread_count())
            kv_tokens = self.task["kv_tokens"]
        else:
            kv_tokens = int(runs.table[:, COUNT].sum())
        self.elements = kv_tokens * sum(dims)

    @property
    def fmas(self) -> int:
        """Multiply-adds, were every key seen by all queries of its sequence; at least 1."""
        return max(self.elements * self.out_shape[-2] * self.tokens, 1)

    def _describe(
        self,
        q_strides: tuple[int, ...],
        visibility: Visibility,
        scoring: Scoring,
        q_bounds: NDArray[np.int64] | None,
    ) -> None:
        """Fill in where the arrays lie that all calls share."""
        task, runs = self.task, self.runs
        q_batch, q_token, q_head, _ = (0, *q_strides)[-4:]  # a packed batch has no batch axis
        sides, side = address_of(visibility.rows), visibility.rows.strides[0]
        task.set_from(
            "q_batch",
            *(q_batch, q_token, q_head, address_of(runs.table), address_of(runs.bounds)),
            *(sides, sides + side, sides + 2 * side, sides + 3 * side),
        )
        if q_bounds is not None:
            task["q_bounds"] = address_of_array(q_bounds)
        if (bias := scoring.bias) is not None:
            task.set_from("bias", address_of_array(bias), *bias.strides, _CODES[bias.dtype])
        if scoring.alibi_slopes is not None:
            task["alibi_slopes"] = address_of_array(scoring.alibi_slopes)
        if scoring.sink_logits is not None:
            task["sink_logits"] = address_of_array(scoring.sink_logits)
        if (codes := runs.codes) is not None:
            groups = codes.key_group, codes.value_group
            task.set_from("codes", address_of(codes.parameters), codes.bits, *groups, codes.symmetric, codes.page_size)


def plan_tensors(problem: AttentionProblem, *strides: tuple[int, ...]) -> Plan:
    """Return the plan for q, k and v of such strides, in bytes; the layers of a model share one."""
    return (_shared_plan if problem.is_plain else _new_plan)(problem, *strides)


def _new_plan(
    problem: AttentionProblem, q_strides: tuple[int, ...], k_strides: tuple[int, ...], v_strides: tuple[int, ...]
) -> Plan:
    q_shape = problem.batch, problem.q_tokens, problem.q_heads, problem.head_dim
    runs, visibility = runs_of_tensors(problem, k_strides, v_strides)
    return Plan(q_shape, q_strides, problem.dtype, runs, visibility, problem.scoring)


_shared_plan = functools.lru_cache(maxsize=256)(_new_plan)


@functools.lru_cache(maxsize=1024)
def _task_of_shape(
    q_shape: tuple[int, ...],
    q_dtype: np.dtype[Any],
    kv_dtype: np.dtype[Any],
    sequences: int,
    tokens: int,
    kv_heads: int,
    head_dim: int,
    value_dim: int,
    scale: float,
    softcap: float,
) -> Task:
    """A task without its arrays. The layers of a model ask for the same one, and it takes ten times a copy's time."""
    q_heads = q_shape[-2]
    out_token, lse_head = q_heads * value_dim * q_dtype.itemsize, 4 * q_shape[-3]
    is_packed = len(q_shape) == 3
    return Task(
        sequences=sequences,
        q_tokens=tokens,
        q_heads=q_heads,
        kv_heads=kv_heads,
        group=q_heads // kv_heads,
        head_dim=head_dim,
        value_dim=value_dim,
        q_dtype=_CODES[q_dtype],
        kv_dtype=_CODES[kv_dtype],
        out_batch=0 if is_packed else q_shape[-3] * out_token,
        out_token=out_token,
        out_head=value_dim * q_dtype.itemsize,
        lse_batch=0 if is_packed else q_heads * lse_head,
        lse_head=lse_head,
        lse_token=4,
        bias_dtype=NO_BIAS,
        scale=scale,
        softcap=softcap,
    )

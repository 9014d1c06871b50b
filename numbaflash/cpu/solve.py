"""The CPU backend's entry points: an attention problem, or queries over runs, becomes a task for the kernels."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..problem import BFLOAT16, FLOAT16, FLOAT32, AttentionProblem, Scoring
from . import emit, pauses
from .decode import DECODE_SCRATCH, decode, partial_bytes, plan_decode
from .flash_v1 import V1_SCRATCH, flash_v1
from .kv import TILE_KEYS
from .panel import PANEL_BYTES, PANEL_ROWS
from .pool import run, thread_count
from .prefill import MAX_ITEM_ROWS, PREFILL_SCRATCH, prefill
from .record import address_of, address_of_array
from .runs import COUNT, START, KVRuns, Visibility
from .standard import STANDARD_SCRATCH, standard_scores, standard_softmax, standard_values
from .task import BOOL_BIAS, NO_BIAS, Task
from .tensors import runs_of_tensors

__all__ = ["SPLIT_KV_MAX_TOKENS", "attend_runs", "attention", "readable"]

# Steps of at most that many tokens go to the split-KV decode kernel, larger ones to the prefill kernel.
SPLIT_KV_MAX_TOKENS = 8

# Less than that is done before a second thread has woken up: K and V read by decode, multiply-adds of a prefill.
_SHARED_FROM_BYTES = 1 << 20
_SHARED_FROM_FMAS = 1 << 22

# Multiply-adds between two pauses: 20 ms at 200 GFLOP/s, which two cores do.
_PART_FMAS = 1 << 31

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
    k, v = readable(k), readable(v)
    runs, visibility = runs_of_tensors(problem, k, v)
    call = _Call(readable(q), runs, visibility, problem.scoring, keep_alive=(k, v))
    if call.is_empty:
        return call.out, call.lse
    if algorithm == "standard":
        call.standard()
    elif algorithm == "v1":
        call.flash_v1()
    else:
        call.flash_v2()
    return call.out, call.lse


def attend_runs(
    q: NDArray[Any],
    runs: KVRuns,
    visibility: Visibility,
    scoring: Scoring,
    q_bounds: NDArray[np.int64] | None = None,
) -> tuple[NDArray[Any], NDArray[np.float32]]:
    """Attend to keys and values that lie in runs.

    A step of more than SPLIT_KV_MAX_TOKENS tokens gives each query row the same bits, however the sequence is cut into
    such steps and runs.

    Args:
        q: (N, T, Hq, D), any strides; its dtype may differ from that of the runs. With `q_bounds` (T, Hq, D), the
            sequences' tokens one behind the other.
        runs: Keys and values of the N sequences.
        visibility: Which of them each query sees.
        scoring: How they are scored; a bias is indexed by positions, and goes with q of 4 axes.
        q_bounds: (N + 1,) int64 from 0 to T; sequence n owns the tokens `q_bounds[n]` to `q_bounds[n + 1]` of q.

    Returns:
        The output (N, T, Hq, Dv) in q's dtype and the natural log-sum-exp (N, Hq, T), float32; with `q_bounds`
        (T, Hq, Dv) and (Hq, T).
    """
    call = _Call(readable(q), runs, visibility, scoring, q_bounds)
    if not call.is_empty:
        call.flash_v2()
    return call.out, call.lse


class _Call:
    """One call: its outputs, its task, and everything that the task's addresses point into."""

    def __init__(
        self,
        q: NDArray[Any],
        runs: KVRuns,
        visibility: Visibility,
        scoring: Scoring,
        q_bounds: NDArray[np.int64] | None = None,
        keep_alive: tuple[Any, ...] = (),
    ) -> None:
        tokens, q_heads, _ = q.shape[-3:]
        self.out = np.empty((*q.shape[:-1], runs.value_dim), q.dtype)
        self.lse = np.empty((*q.shape[:-3], q_heads, tokens), np.float32)
        self.is_empty = self.out.size == 0
        if q_bounds is not None:
            tokens = max((q_bounds[1:] - q_bounds[:-1]).tolist(), default=0)
        self._tokens: int = tokens
        self._runs = runs
        self._pairs = (len(runs.bounds) - 1) * runs.kv_heads
        self._panels = -(-tokens * (q_heads // runs.kv_heads) // PANEL_ROWS)
        self._kv_tokens: int | None = None
        self._keep_alive: tuple[Any, ...] = (q, visibility, scoring, q_bounds, keep_alive)
        if not self.is_empty:
            self._task = _describe(q, runs, visibility, scoring, self.out, self.lse, tokens, q_bounds)

    def flash_v2(self) -> None:
        """FlashAttention-2; by split-KV where there are few query tokens."""
        if self._tokens <= SPLIT_KV_MAX_TOKENS:
            self._decode()
            return
        # Several items a thread, so that no thread waits long for the last one.
        per_item = min(max(self._pairs * self._panels // (4 * thread_count()), 1), MAX_ITEM_ROWS // PANEL_ROWS)
        if pauses.are_wanted():  # a part is an item for each thread at least
            panels_per_part = _PART_FMAS * self._pairs * self._panels // self._fmas
            per_item = min(per_item, max(panels_per_part // thread_count(), 1))
        self._task["rows_per_item"] = per_item * PANEL_ROWS
        self._run_in_parts(prefill, PREFILL_SCRATCH, self._pairs * -(-self._panels // per_item))

    def _decode(self) -> None:
        plan_decode(self._task.address, thread_count())
        self._kv_tokens = self._task["kv_tokens"]
        if (splits := self._task["splits"]) > 1:
            rows = self._task["rows_per_item"]
            units = self._pairs * -(-self._tokens * self._task["group"] // rows)
            self._allocate_workspace(units * splits * rows * partial_bytes(self._runs.value_dim))
            splits_done = np.zeros(units, np.int64)
            self._task["splits_done"] = address_of_array(splits_done)
            self._keep_alive += (splits_done,)
        self._run_in_parts(decode, DECODE_SCRATCH, self._task["items"])

    def flash_v1(self) -> None:
        """FlashAttention-1; its threads share heads alone."""
        value_dim = -(-self._runs.value_dim // emit.LANES) * emit.LANES
        self._allocate_workspace(self._pairs * self._panels * PANEL_BYTES * (value_dim + 2))
        self._run(flash_v1, V1_SCRATCH, self._pairs)

    def standard(self) -> None:
        """Scores, softmax and values, one after the other."""
        table = self._runs.table
        keys = -(-int((table[:, START] + table[:, COUNT]).max()) // TILE_KEYS) * TILE_KEYS
        panels = self._pairs * self._panels
        self._allocate_workspace(panels * keys * PANEL_BYTES)
        for kernel in (standard_scores, standard_softmax, standard_values):
            self._task = self._task.starting_at(0)
            self._run(kernel, STANDARD_SCRATCH, panels)

    def _allocate_workspace(self, nbytes: int) -> None:
        workspace = np.empty(nbytes, np.uint8)
        self._task["workspace"] = address_of_array(workspace)
        self._keep_alive += (workspace,)

    def _run_in_parts(self, kernel: Any, scratch_bytes: int, items: int) -> None:
        """Run a kernel whose items do not depend on how many there are, with pauses where they are wanted."""
        part = max(_PART_FMAS * items // self._fmas, thread_count()) if pauses.are_wanted() else items
        self._run(kernel, scratch_bytes, min(part, items))
        for first in range(part, items, part):
            pauses.pause()
            self._task = self._task.starting_at(first)
            self._run(kernel, scratch_bytes, min(first + part, items))

    def _run(self, kernel: Any, scratch_bytes: int, items: int) -> None:
        self._task["items"] = items
        helpers = min(thread_count(), items) - 1 if items > 1 and self._is_worth_sharing() else 0
        references = (self.out, self.lse, self._runs, self._keep_alive)
        run(kernel, self._task, scratch_bytes, helpers, references)

    def _is_worth_sharing(self) -> bool:
        runs = self._runs
        nbytes = self._elements * runs.kv_heads * runs.dtype.itemsize
        is_decode = self._tokens <= SPLIT_KV_MAX_TOKENS
        return (is_decode and nbytes > _SHARED_FROM_BYTES) or self._fmas > _SHARED_FROM_FMAS

    @property
    def _fmas(self) -> int:
        """Multiply-adds, were every key seen by all queries of its sequence; at least 1."""
        q_heads: int = self.out.shape[-2]
        return max(self._elements * q_heads * self._tokens, 1)

    @property
    def _elements(self) -> int:
        """Elements of one head's keys and values."""
        if self._kv_tokens is None:
            self._kv_tokens = int(self._runs.table[:, COUNT].sum())
        return self._kv_tokens * (self._runs.head_dim + self._runs.value_dim)


def _describe(
    q: NDArray[Any],
    runs: KVRuns,
    visibility: Visibility,
    scoring: Scoring,
    out: NDArray[Any],
    lse: NDArray[np.float32],
    tokens: int,
    q_bounds: NDArray[np.int64] | None,
) -> Task:
    """The task, but for its items; `tokens` are those of the longest sequence."""
    sequences, kv_heads, head_dim, value_dim = len(runs.bounds) - 1, runs.kv_heads, runs.head_dim, runs.value_dim
    shape = sequences, tokens, kv_heads, head_dim, value_dim, scoring.scale, scoring.softcap
    task = _task_of_shape(q.shape, q.dtype, runs.dtype, *shape).copy()
    # A packed batch has no batch axis.
    q_batch, q_token, q_head, _ = (0, *q.strides)[-4:]
    sides, side = address_of(visibility.rows), visibility.rows.strides[0]
    task.set_from(
        "q",
        *(address_of_array(q), q_batch, q_token, q_head, address_of_array(out), address_of_array(lse)),
        *(address_of(runs.table), address_of(runs.bounds), sides, sides + side, sides + 2 * side, sides + 3 * side),
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
    return task


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


def readable(array: NDArray[Any]) -> NDArray[Any]:
    """The array, or a copy where its last axis is not contiguous or its elements are not aligned."""
    if array.flags.aligned and (array.strides[-1] == array.itemsize or array.shape[-1] == 1):
        return array
    return np.ascontiguousarray(array)

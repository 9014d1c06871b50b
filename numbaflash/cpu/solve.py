"""The CPU backend's entry points: an attention problem, or queries over runs, becomes a task for the kernels."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..problem import AttentionProblem, Scoring
from . import emit, pauses
from .decode import DECODE_SCRATCH, decode, partial_bytes
from .flash_v1 import V1_SCRATCH, flash_v1
from .kv import TILE_KEYS
from .openmp import team_here
from .panel import PANEL_BYTES, PANEL_ROWS
from .plan import SPLIT_KV_MAX_TOKENS, Plan, plan_tensors
from .pool import run, thread_count
from .prefill import MAX_ITEM_ROWS, PREFILL_SCRATCH, prefill
from .record import address_of_array
from .runs import COUNT, START, KVRuns, Visibility
from .standard import STANDARD_SCRATCH, standard_scores, standard_softmax, standard_values
from .task import Task

__all__ = ["attend_planned", "attend_runs", "attention", "readable"]

# So much is done before a second thread has woken up: K and V read by decode, multiply-adds of a prefill.
_SHARED_ABOVE_BYTES = 1 << 20
_SHARED_ABOVE_FMAS = 3 << 20

# Multiply-adds between two pauses: 20 ms at 200 GFLOP/s, which two cores do.
_PART_FMAS = 1 << 31


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
    q, k, v = readable(q), readable(k), readable(v)
    plan = plan_tensors(problem, q.strides, k.strides, v.strides)
    out, lse = np.empty(plan.out_shape, q.dtype), np.empty(plan.lse_shape, np.float32)
    arrays = q, k, v, out, lse
    attend_planned(plan, map(address_of_array, arrays), arrays, algorithm)
    return out, lse


def attend_planned(plan: Plan, addresses: Iterable[int], keep_alive: tuple[Any, ...], algorithm: str = "v2") -> None:
    """Solve what `plan_tensors` has planned.

    Args:
        plan: For the shapes and strides of these tensors.
        addresses: Of q's, k's and v's first elements, aligned to their size; of memory for `plan.out_shape` in the same
            dtype, and for `plan.lse_shape` in float32, both contiguous.
        keep_alive: What the addresses point into.
        algorithm: "v2", "v1" or "standard".
    """
    if plan.is_empty:
        return
    call = _Call(plan, plan.task.copy(), addresses, keep_alive)
    if algorithm == "standard":
        call.standard()
    elif algorithm == "v1":
        call.flash_v1()
    else:
        call.flash_v2()


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
    q = readable(q)
    plan = Plan(q.shape, q.strides, q.dtype, runs, visibility, scoring, q_bounds)
    out, lse = np.empty(plan.out_shape, q.dtype), np.empty(plan.lse_shape, np.float32)
    if not plan.is_empty:
        addresses = address_of_array(q), 0, 0, address_of_array(out), address_of_array(lse)
        _Call(plan, plan.task, addresses, (q, out, lse)).flash_v2()
    return out, lse


class _Call:
    """One call: its plan, its task, and everything that the task's addresses point into."""

    def __init__(self, plan: Plan, task: Task, addresses: Iterable[int], keep_alive: tuple[Any, ...]) -> None:
        """Take a plan and a task of its own; addresses are of q, what those in runs count from, and the outputs."""
        self._plan, self._task = plan, task
        self._keep_alive: tuple[Any, ...] = (plan, keep_alive)
        task.set_from("q", *addresses)

    def flash_v2(self) -> None:
        """FlashAttention-2; by split-KV where there are few query tokens."""
        if self._plan.tokens <= SPLIT_KV_MAX_TOKENS:
            self._decode()
            return
        # Several items a thread, so that no thread waits long for the last one.
        pairs, panels = self._plan.pairs, self._plan.panels
        per_item = min(max(pairs * panels // (4 * thread_count()), 1), MAX_ITEM_ROWS // PANEL_ROWS)
        if pauses.are_wanted():  # a part is an item for each thread at least
            panels_per_part = _PART_FMAS * pairs * panels // self._plan.fmas
            per_item = min(per_item, max(panels_per_part // thread_count(), 1))
        self._task["rows_per_item"] = per_item * PANEL_ROWS
        self._run_in_parts(prefill, PREFILL_SCRATCH, pairs * -(-panels // per_item))

    def _decode(self) -> None:
        if (splits := self._task["splits"]) > 1:
            rows = self._task["rows_per_item"]
            units = self._plan.pairs * -(-self._plan.tokens * self._task["group"] // rows)
            self._allocate_workspace(units * splits * rows * partial_bytes(self._plan.runs.value_dim))
            splits_done = np.zeros(units, np.int64)
            self._task["splits_done"] = address_of_array(splits_done)
            self._keep_alive += (splits_done,)
        self._run_in_parts(decode, DECODE_SCRATCH, self._task["items"])

    def flash_v1(self) -> None:
        """FlashAttention-1; its threads share heads alone."""
        value_dim = -(-self._plan.runs.value_dim // emit.LANES) * emit.LANES
        self._allocate_workspace(self._plan.pairs * self._plan.panels * PANEL_BYTES * (value_dim + 2))
        self._run(flash_v1, V1_SCRATCH, self._plan.pairs)

    def standard(self) -> None:
        """Scores, softmax and values, one after the other."""
        table = self._plan.runs.table
        keys = -(-int((table[:, START] + table[:, COUNT]).max()) // TILE_KEYS) * TILE_KEYS
        panels = self._plan.pairs * self._plan.panels
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
        part = max(_PART_FMAS * items // self._plan.fmas, thread_count()) if pauses.are_wanted() else items
        self._run(kernel, scratch_bytes, min(part, items))
        for first in range(part, items, part):
            pauses.pause()
            self._task = self._task.starting_at(first)
            self._run(kernel, scratch_bytes, min(first + part, items))

    def _run(self, kernel: Any, scratch_bytes: int, items: int) -> None:
        self._task["items"] = items
        helpers = min(thread_count(), items) - 1 if items > 1 and self._is_worth_sharing() else 0
        run(kernel, self._task, scratch_bytes, helpers, self._keep_alive)

    def _is_worth_sharing(self) -> bool:
        runs = self._plan.runs
        nbytes = self._plan.elements * runs.kv_heads * runs.dtype.itemsize
        is_decode = self._plan.tokens <= SPLIT_KV_MAX_TOKENS
        times = 4 if team_here() else 1  # its threads stand by
        return (is_decode and times * nbytes > _SHARED_ABOVE_BYTES) or times * self._plan.fmas > _SHARED_ABOVE_FMAS


def readable(array: NDArray[Any]) -> NDArray[Any]:
    """The array, or a copy where its last axis is not contiguous or its elements are not aligned."""
    if array.flags.aligned and (array.strides[-1] == array.itemsize or array.shape[-1] == 1):
        return array
    return np.ascontiguousarray(array)

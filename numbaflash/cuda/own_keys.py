"""A step's own keys by FlashAttention-2: what makes a prompt's step faster than so many steps of decode.

The decode kernels have 64 query rows a block at most and look up where each key lies. That is what pages take; but most
keys of a long step are tokens of the step itself, side by side in the caller's arrays, as FlashAttention-2 reads them,
with 128 rows a block. So a query's keys are parted: those in pages by the decode kernels, the step's own by
FlashAttention-2 under a causal window, and `finish_step` merges the two in float32 (or FlashAttention-2 writes the
output, where a query sees nothing in pages).

The decode kernels keep all keys where that would be wrong, or slower (`first_own_key`); and always the step's sink
tokens that the window of a later query leaves behind, for a window is all that FlashAttention-2 knows.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from numbaflash.device_arrays import DeviceArray
from numbaflash.problem import AttentionProblem, Scoring

from .arguments import Arrays, Strided
from .flash_v2 import FlashV2
from .round_rows import RoundRows
from .solve import Queue
from .variant import Variant

__all__ = [
    "LEAST_ALONE",
    "LEAST_MERGED",
    "OwnKeys",
    "OwnPart",
    "first_own_key",
    "may_be_parted",
    "own_parts",
    "rounded",
    "rounding",
]

LEAST_ALONE = 128
"""Tokens from which FlashAttention-2 is taken where nothing need be merged: the query rows of its block. And where the
other choice is CUDA cores, whatever the merge costs."""
LEAST_MERGED = 2048
"""Tokens from which it is where its result is merged with one of tensor cores. Both are written and read in float32, 16
bytes an element of O: 11 ps on an A100 (1.5 TB/s). T tokens are T/2 keys for each query, 2 T operations an element of
O; with tensor cores busy for 0.82 of the time instead of 0.55 (0.79 and 0.36 at a head dim of 64; the issue model's
shares of 312 TFLOP/s) that saves 0.004 T ps (0.010 T): as much from 2,800 tokens on (1,100)."""


def may_be_parted(tokens: int) -> bool:
    """Say whether a step of so many tokens may have a first key of its own."""
    return tokens >= min(LEAST_ALONE, LEAST_MERGED)


def first_own_key(length: int, tokens: int, window: int, sink_tokens: int, dtype: str, step_dtype: str) -> int | None:
    """Return the first of a step's tokens that FlashAttention-2 looks at; None: the decode kernel looks at all.

    Args:
        length: Tokens in the pages.
        tokens: Of the step.
        window: Newest tokens that a query sees, its own included.
        sink_tokens: First tokens of the sequence, which every query sees.
        dtype: Of the pages.
        step_dtype: Of the step.
    """
    if (dtype, step_dtype) == ("bfloat16", "float16"):
        return None  # 65504 is 65536 in bfloat16, for which the step's dtype has no number
    first = 0 if tokens <= window else min(tokens, max(0, sink_tokens - length))
    in_pages = min(length, sink_tokens) + max(0, length - max(sink_tokens, length - window + 1))
    by_tensor_cores = dtype == step_dtype != "float32"
    least = LEAST_MERGED if in_pages + first and by_tensor_cores else LEAST_ALONE
    return first if tokens - first >= least else None


def rounding(dtype: str, step_dtype: str) -> bool:
    """Say whether the pages hold less of a token than the step has."""
    return dtype != step_dtype and dtype != "float32"


class OwnPart(NamedTuple):
    """Successive sequences of a launch, alike in what FlashAttention-2 does for them.

    Attributes:
        start: The first of them.
        stop: Behind the last.
        first_key: Of the step's tokens, the first that is looked at.
        window: Newest tokens that a query sees, at most the step's.
        result: Number of the first one's result among those to be merged; -1 where it is the output.
    """

    start: int
    stop: int
    first_key: int
    window: int
    result: int


def own_parts(
    firsts: Sequence[int | None], windows: Sequence[int], results: Sequence[int], tokens: int
) -> Iterator[OwnPart]:
    """Yield the launches that a batch takes, given `first_own_key`, window and result of each sequence."""

    def kind(index: int) -> tuple[int | None, int, bool]:
        return firsts[index], min(windows[index], tokens), results[index] >= 0

    for (first, window, _), group in itertools.groupby(range(len(firsts)), kind):
        start, *others = group
        if first is not None:
            yield OwnPart(start, start + len(others) + 1, first, window, results[start])


@dataclass(frozen=True)
class OwnKeys:
    """A step's arrays in device memory, rows padded to multiples of 8 elements at multiples of 16 bytes.

    Attributes:
        queue: Where work is queued.
        q: (N, T, Hq, D).
        k: (N, T, Hkv, D), rounded to the dtype of the pages (`rounded`).
        v: Likewise.
        scoring: Of q; without a bias.
        slopes: (N, Hq) float32, scoring's ALiBi slopes.
        sinks: (Hq,) float32, its sink logits.
    """

    queue: Queue
    q: DeviceArray
    k: DeviceArray
    v: DeviceArray
    scoring: Scoring
    slopes: DeviceArray | None
    sinks: DeviceArray | None

    def attend(self, part: OwnPart, out: DeviceArray, results: DeviceArray, sums: DeviceArray) -> None:
        """Queue the launch of a part.

        Args:
            part: Which sequences.
            out: (N, T, Hq, D), contiguous, is written where the part's result is the output.
            results: (results, T, Hq, D) float32, contiguous, is written otherwise.
            sums: (results, Hq, T) float32, contiguous, likewise: their log-sum-exps.
        """
        batch, (_, tokens, q_heads, head_dim) = part.stop - part.start, self.q.shape
        merged = part.result >= 0
        keys = tokens - part.first_key
        problem = AttentionProblem(
            batch=batch,
            q_tokens=tokens,
            kv_tokens=keys,
            q_heads=q_heads,
            kv_heads=self.k.shape[2],
            head_dim=head_dim,
            value_dim=head_dim,
            dtype=self.q.dtype,
            window_left=None if part.window == tokens else part.window - 1,
            window_right=0,
            kv_lengths=np.full(batch, keys),
            # A sink counts once: where results are merged.
            scoring=replace(self.scoring, sink_logits=None) if merged else self.scoring,
        )
        arrays = Arrays(
            q=_from(self.q, part.start),
            k=_from(self.k, part.start, part.first_key),
            v=_from(self.v, part.start, part.first_key),
            out=_from(results, part.result) if merged else _from(out, part.start),
            lse=sums.address + part.result * sums.strides[0] if merged else 0,
            slopes=0 if self.slopes is None else self.slopes.address + part.start * self.slopes.strides[0],
            sinks=0 if self.sinks is None else self.sinks.address,
        )
        device = self.queue.device
        flash = FlashV2.of(Variant.of(problem, lse=merged), device.compute_capability, wide=merged)
        self.queue.launch(flash, flash.grid(problem), flash.arguments(problem, arrays))


def rounded(queue: Queue, array: DeviceArray, dtype: str) -> DeviceArray:
    """Return an array's numbers as a dtype has them, in a new array of its own dtype."""
    target = queue.empty(array.shape, array.dtype)
    kernel = RoundRows(array.dtype.name, dtype)
    queue.launch(kernel, kernel.grid(array), kernel.arguments(array, target))
    return target


def _from(array: DeviceArray, batch: int, token: int = 0) -> Strided:
    of_batch, of_token, of_head, of_element = array.strides
    return Strided(array.address + batch * of_batch + token * of_token, (of_batch, of_token, of_head, of_element))

"""The kernels from NumPy arrays to NumPy arrays, and what they are measured against.

They run on a GPU where there is one, else on the emulator; what a launch costs is counted on the emulator.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache

import numpy as np
from oracle import expected

from numbaflash.cuda.build import build, disassemble
from numbaflash.cuda.device import EmulatedDevice
from numbaflash.cuda.driver import find_usable_gpu
from numbaflash.cuda.flash_v2 import FlashV2
from numbaflash.cuda.gpu import cuda_device
from numbaflash.cuda.sass import parse
from numbaflash.cuda.solve import Queue, solve
from numbaflash.emulator import Report
from numbaflash.problem import describe
from numbaflash.reference import visible

AMPERE = (8, 0)


@cache
def machine_code(variant, cc=AMPERE):
    return parse(disassemble(build(FlashV2.of(variant, cc), cc).cubin))


@cache
def emulated_device():
    return EmulatedDevice(AMPERE)


@cache
def device():
    gpu, _ = find_usable_gpu()
    return emulated_device() if gpu is None else cuda_device(gpu.ordinal)


@dataclass(frozen=True)
class CountingQueue(Queue):
    """A queue of an emulated device that keeps what each of its launches would have cost the hardware."""

    reports: list[Report] = field(default_factory=list)

    def launch(self, *args):
        super().launch(*args)
        self.reports.append(self.device.last_report)


def solved(q, k, v, *, algorithm="v2", **options):
    """Return the output and the log-sum-exp."""
    with device().current():
        return _results(Queue(device(), device().default_stream), q, k, v, algorithm, options)


def counted(q, k, v, *, algorithm="v2", **options):
    """Return the counts of each launch."""
    queue = CountingQueue(emulated_device(), emulated_device().default_stream)
    _results(queue, q, k, v, algorithm, options)
    return queue.reports


def _results(queue, q, k, v, algorithm, options):
    problem = describe(q, k, v, **options)
    results = (
        np.zeros((*q.shape[:3], v.shape[3]), q.dtype),
        np.zeros((problem.batch, problem.q_heads, problem.q_tokens), np.float32),
    )
    placed = [queue.place(result) for result in results]
    solve(queue, problem, q, k, v, *placed, algorithm)
    for array, result in zip(placed, results, strict=True):
        queue.fetch(array, result)
    return results


def straightforward(q, k, v, **options):
    """Return attention as frameworks write it out: each product, sum and softmax rounded to the arrays' dtype."""
    problem = describe(q, k, v, **options)
    scoring, dtype = problem.scoring, q.dtype
    group = problem.q_heads // problem.kv_heads
    out = np.zeros((*q.shape[:3], v.shape[3]), dtype)

    def rounded(x):
        return x.astype(dtype).astype(np.float32)

    with np.errstate(over="ignore"):
        for b in range(problem.batch):
            length = int(problem.kv_lengths[b])
            may_see = visible(problem, b)
            away = np.abs(np.arange(problem.q_tokens)[:, None] + length - problem.q_tokens - np.arange(length))
            for h in range(problem.q_heads):
                keys, values = (x[b, :length, h // group].astype(np.float32) for x in (k, v))
                s = rounded(rounded(q[b, :, h].astype(np.float32) @ keys.T) * np.float32(scoring.scale))
                if scoring.softcap:
                    s = rounded(scoring.softcap * np.tanh(s / np.float32(scoring.softcap)))
                if scoring.alibi_slopes is not None:
                    s = rounded(s - scoring.alibi_slopes[b, h] * away)
                if scoring.bias is not None:
                    bias = scoring.bias[b, h, :, :length]
                    s = np.where(bias, s, -np.inf) if bias.dtype == bool else rounded(s + bias.astype(np.float32))
                s = np.where(may_see, s, -np.inf)
                sink = -np.inf if scoring.sink_logits is None else scoring.sink_logits[h]
                top = np.maximum(s.max(axis=1, initial=-np.inf, keepdims=True), sink)
                top = np.where(np.isneginf(top), 0, top)
                weights = np.exp(s - top)
                total = weights.sum(axis=1, keepdims=True) + np.exp(sink - top)
                weights = rounded(weights / np.where(total == 0, 1, total))
                out[b, :, h] = (weights @ values).astype(dtype)
    return out


def assert_as_good_as_straightforward(q, k, v, *, algorithm="v2", **options):
    """The kernel's largest error is at most twice that of `straightforward`, both against float64.

    And four last places of float32. Of a single key the straightforward result is exact, while V in two TF32 numbers
    has 23 of its 24 bits; and of a few rows the largest error in float32 is luck, for both. (Rounding to 16 bits hides
    as much.)
    """
    out, lse = solved(q, k, v, algorithm=algorithm, **options)
    want, want_lse = expected(q, k, v, **options)
    plain = straightforward(q, k, v, **options).astype(np.float64)
    error, allowed = (np.abs(x - want).max(initial=0) for x in (out.astype(np.float64), plain))
    last_place = np.spacing(np.float32(np.abs(want).max(initial=0)))
    assert error <= 2 * allowed + 4 * last_place, f"error {error}, straightforward {allowed}"
    np.testing.assert_allclose(lse, want_lse, rtol=2e-5, atol=2e-5)

"""Attention measured on this machine beside its peers: PyTorch, and for decode a plain read of the same memory.

Ours and the peer's runs alternate, and the ratio is the median over the pairs: what else the machine does meanwhile
hits both alike. The other figures are those of the fastest run.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import cpu
from .cpu.pool import thread_count
from .cpu.stream import read_memory
from .problem import BFLOAT16, DTYPES, FLOAT16, FLOAT32, describe, describe_scoring
from .roofline import decode, prefill

__all__ = ["Row", "decode_rows", "prefill_rows"]

GFLOPS, GBS = "GFLOP/s", "GB/s"

# PyTorch's threads (OpenMP) spin for some 14 ms behind their work, on cores that the next run wants. And behind a pause
# the cores of a virtual machine take some 50 ms to be at work together again, above all for threads that OpenMP wakes.
_PAUSE_SECONDS = 0.05
_WARM_UP_SECONDS = 0.06
PAGE_SIZE = 64
# What decode is measured with: storage dtype, query heads, KV heads.
DECODE_SHAPES = ((FLOAT32, 32, 8), (FLOAT16, 32, 32), (BFLOAT16, 32, 32), (FLOAT16, 32, 8), (BFLOAT16, 32, 8))


@dataclass(frozen=True)
class Row:
    """One measurement.

    Attributes:
        operator: What was computed.
        dtype: Of the arrays.
        detail: Their shape, or where they lay.
        intensity: FLOP for each byte that must be read or written.
        unit: Of `ours` and `peer`, more is better.
        ours: Our figure.
        peer_name: Who it is compared with.
        peer: The peer's figure in the same run; None where it is not installed.
        ratio: Ours over the peer's, the median over alternating runs; None where there is no peer.
    """

    operator: str
    dtype: str
    detail: str
    intensity: float
    unit: str
    ours: float
    peer_name: str
    peer: float | None
    ratio: float | None

    @property
    def name(self) -> str:
        """All of what was computed."""
        return f"{self.operator}, {self.dtype}, {self.detail}"

    @property
    def flops(self) -> float:
        """Our FLOP/s."""
        return self.ours * 1e9 * (1.0 if self.unit == GFLOPS else self.intensity)


def prefill_rows(quick: bool = False) -> Iterator[Row]:
    """Measure prefill with 8 heads, 2048 tokens, batch 1, against PyTorch's `scaled_dot_product_attention`.

    Args:
        quick: Half the tokens and fewer runs.

    Yields:
        GFLOP/s for each dtype, head_dim 64 and 128, causal and not; a causal problem counts half the operations.
    """
    heads, tokens, runs = 8, 1024 if quick else 2048, 3 if quick else 9
    torch = _torch()
    for dtype in DTYPES:
        for head_dim in (64, 128):
            q, k, v = (_normal(seed, (1, tokens, heads, head_dim), dtype) for seed in range(3))
            for causal in (False, True):
                problem = describe(q, k, v, causal=causal)
                ours = _solver(problem, q, k, v)
                peer = _torch_solver(torch, q, k, v, causal=causal) if torch else None
                work = prefill(tokens, heads, heads, head_dim, causal=causal, itemsize=dtype.itemsize)
                what = "causal prefill" if causal else "prefill", dtype.name, f"head_dim {head_dim}", work.intensity
                yield _compare(what, GFLOPS, work.operations * 1e-9, ours, "PyTorch", peer, runs)


def decode_rows(quick: bool = False) -> Iterator[Row]:
    """Measure the decode of one token, batch 1, head_dim 128, against a plain read of the same memory and PyTorch.

    Args:
        quick: A quarter of the tokens and fewer runs.

    Yields:
        GB/s at which K and V are read: from pages as the cache keeps them, and from contiguous tensors, 4096 tokens.
    """
    tokens, runs = 1024 if quick else 4096, 5 if quick else 15
    torch = _torch()
    for dtype, q_heads, kv_heads in DECODE_SHAPES:
        work = decode(tokens, q_heads, kv_heads, 128, dtype.name)
        shape = work.operator, dtype.name
        q = _normal(0, (1, 1, q_heads, 128), dtype)
        pages = _normal(1, (tokens // PAGE_SIZE, 2, kv_heads, PAGE_SIZE, 128), dtype)
        gigabytes = pages.nbytes * 1e-9
        paged = _paged_solver(q, pages)
        plain_read = partial(read_memory, pages)
        yield _compare((*shape, "pages", work.intensity), GBS, gigabytes, paged, "plain read", plain_read, runs)

        k, v = (
            np.ascontiguousarray(pages[:, i].transpose(0, 2, 1, 3)).reshape(1, tokens, kv_heads, 128) for i in (0, 1)
        )
        contiguous = _solver(describe(q, k, v), q, k, v)
        peer = _torch_solver(torch, q, k, v, causal=False) if torch else None
        what = (*shape, "contiguous", work.intensity)
        yield _compare(what, GBS, gigabytes, contiguous, "PyTorch", peer, min(runs, 7))


def _compare(
    what: tuple[str, str, str, float],
    unit: str,
    work: float,
    ours: Callable[[], Any],
    peer_name: str,
    peer: Callable[[], Any] | None,
    runs: int,
) -> Row:
    pairs = [(_seconds(ours), _seconds(peer) if peer else None) for _ in range(runs + 1)][1:]  # the first warms up
    best = work / min(ours for ours, _ in pairs)
    theirs = [(ours, peer) for ours, peer in pairs if peer is not None]
    if not theirs:
        return Row(*what, unit, best, peer_name, None, None)
    ratio = statistics.median(peer / ours for ours, peer in theirs)
    return Row(*what, unit, best, peer_name, work / min(peer for _, peer in theirs), ratio)


def _seconds(function: Callable[[], Any]) -> float:
    """Return what a run takes among others of its kind."""
    time.sleep(_PAUSE_SECONDS)
    begin = start = time.perf_counter()
    while start - begin < _WARM_UP_SECONDS:
        function()
        start = time.perf_counter()
    function()
    return time.perf_counter() - start


def _normal(seed: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    return np.random.default_rng(seed).standard_normal(shape, np.float32).astype(dtype)


def _solver(problem: Any, q: NDArray[Any], k: NDArray[Any], v: NDArray[Any]) -> Callable[[], Any]:
    return lambda: cpu.attention(problem, q, k, v, "v2")


def _paged_solver(q: NDArray[Any], pages: NDArray[Any]) -> Callable[[], Any]:
    """A step on pages (pages, K and V, kv_heads, page_size, head_dim) that lie in memory in any order."""
    order = np.random.default_rng(0).permutation(len(pages))
    rows = []
    for number, page in enumerate(order):
        k, v = pages[page].transpose(0, 2, 1, 3)
        rows.append(cpu.contiguous_run(k, v, number * PAGE_SIZE))
    kv_heads, head_dim = pages.shape[2], pages.shape[4]
    runs = cpu.KVRuns(np.array(rows), np.array([0, len(rows)]), pages.dtype, kv_heads, head_dim, head_dim)
    last = len(pages) * PAGE_SIZE - 1
    visibility = cpu.Visibility(*(np.array([value], np.int64) for value in (last, cpu.UNBOUNDED, 0, 0)))
    scoring = describe_scoring(batch=1, q_heads=q.shape[2], head_dim=head_dim)
    return lambda: cpu.attend_runs(q, runs, visibility, scoring)


def _torch() -> Any:
    try:
        import torch
    except ImportError:
        return None
    torch.set_num_threads(thread_count())
    return torch


def _torch_solver(torch: Any, q: NDArray[Any], k: NDArray[Any], v: NDArray[Any], *, causal: bool) -> Callable[[], Any]:
    """PyTorch on the same numbers, laid out as it likes them best: (batch, heads, tokens, head_dim), contiguous."""
    dtype = getattr(torch, str(q.dtype))
    tensors = [torch.from_numpy(x.astype(np.float32)).to(dtype).transpose(1, 2).contiguous() for x in (q, k, v)]
    solve = torch.nn.functional.scaled_dot_product_attention
    return lambda: solve(*tensors, is_causal=causal, enable_gqa=q.shape[2] != k.shape[2])

"""Decode from the cache's pages: the share of a copy's bandwidth at which keys and values are read.

One layer, a token a step, head_dim 128, float16. PyTorch's peer reads contiguous tensors of the same lengths. What fits
into the L2 comes from there after the first call of a round, for both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numbaflash

from .ceilings import copy_gbytes, place, torch_on
from .parts import Row
from .timing import Timing, clock

_HEAD_DIM = 128
_MOST_BYTES = 24 << 30  # of keys and values, ours and the peer's together


def beside_a_copy(emulated: bool) -> Iterator[Row]:
    """Yield GB/s of keys and values read by numbaflash and by PyTorch, beside a copy's, and the host's time a step."""
    torch = torch_on(emulated)
    ticking = clock(emulated)
    copy = copy_gbytes(ticking, emulated)
    lengths = (40,) if emulated else (65536, 16384, 4096, 1024)
    for kind, q_heads, kv_heads in (("MHA", 4, 4), ("GQA 8:1", 8, 1)) if emulated else _HEADS:
        for batch in (2,) if emulated else (1, 8, 64):
            for length in lengths:
                held = batch * length * kv_heads * 2 * _HEAD_DIM * 2
                if 2 * held > _MOST_BYTES:
                    continue
                contenders = {
                    "numbaflash": _ours(torch, batch, length, q_heads, kv_heads, emulated),
                    "pytorch": _theirs(torch, batch, length, q_heads, kv_heads, emulated),
                }
                effort = {"calls": 1, "rounds": 1} if emulated else {"calls": 4, "rounds": 7}
                timings = ticking.measure(contenders, **effort)
                ours, theirs = (_rate(held, timing) for timing in timings.values())
                yield {
                    "heads": kind,
                    "batch": batch,
                    "tokens": length,
                    "numbaflash": ours if ours is not None else f"{timings['numbaflash']}"[:60],
                    "pytorch": theirs if theirs is not None else f"{timings['pytorch']}"[:60],
                    "of_copy": ours / copy if ours else None,
                    "of_pytorch": ours / theirs if ours and theirs else None,
                    "host_us": 1e6 * timings["numbaflash"].host if ours else None,  # type: ignore[union-attr]
                }


_HEADS = (("MHA", 32, 32), ("GQA 8:1", 64, 8))


def _ours(torch: Any, batch: int, length: int, q_heads: int, kv_heads: int, emulated: bool) -> Callable[[int], Any]:
    """Return a step of `batch` caches; it appends, and so is taken back by the next."""
    backend = "emulated" if emulated else "cuda"
    caches = [
        numbaflash.RingKVCache(1, kv_heads, _HEAD_DIM, capacity=length, page_size=64, backend=backend)
        for _ in range(batch)
    ]
    for cache in caches:
        for start in range(0, length - 1, 4096):
            count = min(4096, length - 1 - start)
            cache.append(0, *_random(torch, emulated, 2, count, kv_heads, _HEAD_DIM))
    (q,) = _random(torch, emulated, 1, batch, 1, q_heads, _HEAD_DIM)
    k, v = _random(torch, emulated, 2, batch, 1, kv_heads, _HEAD_DIM)

    def call(_number: int) -> Any:
        for cache in caches:
            cache.truncate(length - 1)
        return numbaflash.attention_batch(caches, 0, q, k, v)

    return call


def _theirs(torch: Any, batch: int, length: int, q_heads: int, kv_heads: int, emulated: bool) -> Callable[[int], Any]:
    (q,) = _random(torch, emulated, 1, batch, q_heads, 1, _HEAD_DIM)
    k, v = _random(torch, emulated, 2, batch, kv_heads, length, _HEAD_DIM)
    solve = torch.nn.functional.scaled_dot_product_attention
    return lambda _number: solve(q, k, v, enable_gqa=q_heads != kv_heads)


def _random(torch: Any, emulated: bool, count: int, *shape: int) -> list[Any]:
    return [torch.randn(shape, device=place(emulated), dtype=torch.float32).half() for _ in range(count)]


def _rate(nbytes: int, timing: Timing | Exception) -> float | None:
    return None if isinstance(timing, Exception) else 1e-9 * nbytes / timing.device

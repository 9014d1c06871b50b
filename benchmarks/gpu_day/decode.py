"""Decode from the cache's pages: the share of a copy's bandwidth at which keys and values are read.

One layer, a token a step, head_dim 128, float16. The peers read contiguous tensors of the same lengths (FlashInfer: as
pages of 64 tokens). What fits into the L2 comes from there after the first call of a round, for all of them. Steps of
ours are measured with their launches replayed as a graph, and without.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numbaflash

from .ceilings import copy_gbytes, place, torch_on
from .parts import Row
from .timing import Timing, clock

__all__ = ["beside_a_copy", "caches_of", "without_replays"]

_HEAD_DIM = 128
_PAGE = 64
_HEADS = (("MHA", 32, 32), ("GQA 8:1", 64, 8))

Call = Callable[[int], Any]


def beside_a_copy(emulated: bool) -> Iterator[Row]:
    """Yield GB/s of keys and values read by numbaflash and its peers, beside a copy's, and the host's time a step."""
    torch = torch_on(emulated)
    ticking = clock(emulated)
    copy = copy_gbytes(ticking, emulated)
    lengths = (40,) if emulated else (65536, 16384, 4096, 1024)
    for kind, q_heads, kv_heads in (("MHA", 4, 4), ("GQA 8:1", 8, 1)) if emulated else _HEADS:
        for batch in (2,) if emulated else (1, 8, 64):
            for length in lengths:
                held = batch * length * kv_heads * 2 * _HEAD_DIM * 2
                # Keys and values are there twice, ours and the peers', and allocators keep some of what was before.
                if not emulated and 4 * held > torch.cuda.mem_get_info()[1]:
                    continue
                contenders = _contenders(torch, batch, length, q_heads, kv_heads, emulated)
                effort = {"calls": 1, "rounds": 1} if emulated else {"calls": 4, "rounds": 7}
                timings = ticking.measure(contenders, **effort)
                rates = {name: _rate(held, timings[name]) for name in contenders}
                ours, best = rates["numbaflash"], max((rates[name] or 0 for name in _PEERS), default=0)
                yield {
                    "heads": kind,
                    "batch": batch,
                    "tokens": length,
                    **{name: f"{timings[name]}"[:40] if rate is None else rate for name, rate in rates.items()},
                    "of_copy": ours / copy if ours else None,
                    "of_best_peer": ours / best if ours and best else None,
                    "host_us": _host_us(timings["numbaflash"]),
                    "host_us_without_graphs": _host_us(timings["without graphs"]),
                }
                del contenders


def caches_of(torch: Any, batch: int, length: int, kv_heads: int, emulated: bool) -> list[numbaflash.RingKVCache]:
    """Return caches of one layer that hold as many tokens as they may, so that each step reads as many."""
    backend = "emulated" if emulated else "cuda"
    caches = [
        numbaflash.RingKVCache(1, kv_heads, _HEAD_DIM, capacity=length, page_size=_PAGE, backend=backend)
        for _ in range(batch)
    ]
    for cache in caches:
        for start in range(0, length, 4096):
            cache.append(0, *_random(torch, emulated, 2, min(4096, length - start), kv_heads, _HEAD_DIM))
    return caches


def without_replays(call: Call, emulated: bool) -> Call:
    """Return a call whose launches are not replayed as a graph; on the emulator none are."""
    if emulated:
        return call
    from numbaflash.cuda.gpu import cuda_device

    replays = cuda_device(0).replays

    def plainly(number: int) -> Any:
        before, replays.enabled = replays.enabled, False
        try:
            return call(number)
        finally:
            replays.enabled = before

    return plainly


def _contenders(torch: Any, batch: int, length: int, q_heads: int, kv_heads: int, emulated: bool) -> dict[str, Call]:
    caches = caches_of(torch, batch, length, kv_heads, emulated)
    (q,) = _random(torch, emulated, 1, batch, 1, q_heads, _HEAD_DIM)
    new_k, new_v = _random(torch, emulated, 2, batch, 1, kv_heads, _HEAD_DIM)
    k, v = _random(torch, emulated, 2, batch, length, kv_heads, _HEAD_DIM)

    def ours(_number: int) -> Any:
        return numbaflash.attention_batch(caches, 0, q, new_k, new_v)

    peers = {name: _made(make, torch, q, k, v) for name, make in _PEERS.items()}
    return {"numbaflash": ours, "without graphs": without_replays(ours, emulated), **peers}


def _made(make: Callable[..., Call], *arguments: Any) -> Call:
    """Return a peer's call; where there is none, one that raises why."""
    try:
        return make(*arguments)
    except Exception as error:  # whatever a peer lacks on this machine, its row says so and the others go on
        why = error.with_traceback(None)

        def fails(_number: int) -> Any:
            raise why

        return fails


def _pytorch(torch: Any, q: Any, k: Any, v: Any) -> Call:
    turned = [tensor.transpose(1, 2) for tensor in (q, k, v)]
    solve = torch.nn.functional.scaled_dot_product_attention
    return lambda _: solve(*turned, enable_gqa=q.shape[2] != k.shape[2])


def _flash_attn(torch: Any, q: Any, k: Any, v: Any) -> Call:
    from flash_attn import flash_attn_with_kvcache

    lengths = torch.full((q.shape[0],), k.shape[1], dtype=torch.int32, device=q.device)
    return lambda _: flash_attn_with_kvcache(q, k, v, cache_seqlens=lengths)


def _flashinfer(torch: Any, q: Any, k: Any, v: Any) -> Call:
    import flashinfer

    batch, length, kv_heads, head_dim = k.shape
    pages = [tensor.view(batch * length // _PAGE, _PAGE, kv_heads, head_dim) for tensor in (k, v)]
    workspace = torch.empty(256 << 20, dtype=torch.uint8, device=q.device)
    solver = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=q.shape[2] != kv_heads)
    numbers = torch.arange(batch * length // _PAGE, dtype=torch.int32, device=q.device)
    bounds = torch.arange(batch + 1, dtype=torch.int32, device=q.device) * (length // _PAGE)
    last = torch.full((batch,), _PAGE, dtype=torch.int32, device=q.device)
    solver.plan(bounds, numbers, last, q.shape[2], kv_heads, head_dim, _PAGE, q_data_type=q.dtype)
    queries = q[:, 0]
    return lambda _: solver.run(queries, tuple(pages))


_PEERS = {"pytorch": _pytorch, "flash-attn": _flash_attn, "flashinfer": _flashinfer}


def _random(torch: Any, emulated: bool, count: int, *shape: int) -> list[Any]:
    return [torch.randn(shape, device=place(emulated), dtype=torch.float16) for _ in range(count)]


def _rate(nbytes: int, timing: Timing | Exception) -> float | None:
    return None if isinstance(timing, Exception) else 1e-9 * nbytes / timing.device


def _host_us(timing: Timing | Exception) -> float | None:
    return None if isinstance(timing, Exception) else 1e6 * timing.host

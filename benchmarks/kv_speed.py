"""How fast a quantized cache decodes on this CPU beside float16: one layer, batch 1, head_dim 128.

The caches take turns, one token each: what else the machine does meanwhile hits all of them alike. A token's time is
that of a whole step, bookkeeping included: the median of the steps that fill a page, which is quantized then, counts
once, that of the others as often as they come.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import numpy as np

from numbaflash import RingKVCache

HEAD_DIM = 128
PAGE_SIZE = 64
KINDS = (
    ("float16", None),
    ("int8", "group"),
    ("int4", "group"),
    ("int8", "group:keys=token"),
    ("int4", "group:keys=token"),
    ("int4", "hqq"),
)


def measure(q_heads: int, kv_heads: int, tokens: int, turns: int) -> list[dict[str, object]]:
    """Return a row for each kind of cache."""
    rng = np.random.default_rng(0)
    caches = [
        RingKVCache(
            1,
            kv_heads,
            HEAD_DIM,
            capacity=tokens + turns,
            page_size=PAGE_SIZE,
            dtype=dtype,
            quantizer=quantizer,
            backend="cpu",
        )
        for dtype, quantizer in KINDS
    ]
    for start in range(0, tokens, 1024):
        k, v = (rng.standard_normal((min(1024, tokens - start), kv_heads, HEAD_DIM), np.float32) for _ in range(2))
        for cache in caches:
            cache.append(0, k, v)
    seconds: list[list[float]] = [[] for _ in caches]
    for _ in range(turns):
        q, k, v = (
            rng.standard_normal((1, n, HEAD_DIM), np.float32).astype(np.float16) for n in (q_heads, *[kv_heads] * 2)
        )
        for cache, times in zip(caches, seconds, strict=True):
            begin = time.perf_counter()
            cache.step(0, q, k, v)
            times.append(time.perf_counter() - begin)
    a_token = [token_seconds(times, tokens) for times in seconds]
    return [
        {
            "heads": f"{q_heads}/{kv_heads}",
            "tokens": tokens,
            "cache": f"{dtype} {quantizer or ''}".strip(),
            "tokens_per_s": 1 / own,
            "beside_float16": a_token[0] / own,
        }
        for (dtype, quantizer), own in zip(KINDS, a_token, strict=True)
    ]


def token_seconds(times: list[float], tokens: int) -> float:
    """Seconds of a token, from those of the steps behind so many tokens."""
    fills_a_page = [(tokens + turn + 1) % PAGE_SIZE == 0 for turn in range(len(times))]
    filling, others = (
        statistics.median(time for time, fills in zip(times, fills_a_page, strict=True) if fills == wanted)
        for wanted in (True, False)
    )
    return (filling + (PAGE_SIZE - 1) * others) / PAGE_SIZE


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--turns", type=int, default=192, help="steps of each cache, whole pages of 64")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    rows = [row for kv_heads in (32, 8) for row in measure(32, kv_heads, arguments.tokens, arguments.turns)]
    if arguments.json:
        print(json.dumps(rows))
        return
    for row in rows:
        figures = f"{row['tokens_per_s']:8.0f} tokens/s of one layer  {row['beside_float16']:.2f} x float16"
        print(f"{row['heads']:6} {row['tokens']} tokens  {row['cache']:24} {figures}")


if __name__ == "__main__":
    main()

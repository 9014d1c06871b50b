"""Small problems for every kernel, compared with the formula: what compute-sanitizer and ncu run.

`python -m benchmarks.gpu_day.small {emulated,cuda} [--one-large]`; a wrong result is an exit status of 1.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np

import numbaflash
from numbaflash import reference
from numbaflash.problem import describe

ALGORITHMS = ("v2", "v1", "standard")
_TOLERANCE = {"float16": 2e-3, "bfloat16": 2e-2, "float32": 1e-5}

Problem = tuple[list[Any], dict[str, Any]]
"""q, k and v; and options."""


def main() -> None:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(prog="small", description=__doc__.partition("\n")[0])
    parser.add_argument("backend", choices=("emulated", "cuda"))
    parser.add_argument("--one-large", action="store_true", help="one problem that fills a GPU, not compared")
    asked = parser.parse_args()
    if asked.one_large:
        arrays = _arrays(1, 64, 64, 2, 2, 64) if asked.backend == "emulated" else _arrays(2, 2048, 2048, 16, 16, 128)
        for algorithm in ALGORITHMS:
            numbaflash.attention(*arrays, algorithm=algorithm, backend=asked.backend)
        return
    wrong = 0
    for arrays, options in list(problems())[: 1 if asked.backend == "emulated" else None]:
        want, _ = reference.attention(describe(*arrays, **options), *arrays)
        for algorithm in ALGORITHMS:
            out = numbaflash.attention(*arrays, algorithm=algorithm, backend=asked.backend, **options)
            error = np.abs(out.astype(np.float64) - want).max()
            right = bool(error <= _TOLERANCE[arrays[0].dtype.name])  # a NaN is wrong
            wrong += not right
            print(f"{algorithm} {arrays[0].shape} {arrays[0].dtype} {list(options)}: off by {error:.1e}", flush=True)
    for steps, dtype, storage, options in list(cache_steps())[: 1 if asked.backend == "emulated" else None]:
        error = _error_of_cache(steps, dtype, storage, options, asked.backend)
        right = error <= _TOLERANCE[dtype]
        wrong += not right
        print(f"cache {steps} {dtype} in {storage} {list(options)}: off by {error:.1e}", flush=True)
    sys.exit(min(wrong, 1))


def problems() -> Iterator[Problem]:
    """Yield problems of ragged shapes, with no option and with every one, in each dtype."""
    rng = np.random.default_rng(1)
    everything = {
        "causal": True,
        "window": (60, None),
        "softcap": 3.0,
        "bias": rng.standard_normal((4, 70, 150), np.float32),
        "alibi_slopes": np.geomspace(0.5, 0.05, 4).astype(np.float32),
        "sink_logits": np.linspace(0.5, 3, 4, dtype=np.float32),
        "kv_lengths": [150, 77],
    }
    for head_dim, dtype in ((64, "float16"), (128, "bfloat16"), (40, "float32")):
        for options in ({}, everything):
            yield _arrays(2, 70, 150, 4, 2, head_dim, dtype), options


def cache_steps() -> Iterator[tuple[list[int], str, str, dict[str, Any]]]:
    """Yield tokens of steps, dtypes of step and storage, and options: prompts, alone and merged, and decode."""
    options = {"sink_logits": np.linspace(0.5, 3, 4, dtype=np.float32), "softcap": 3.0}
    # The lone tokens at the end are launches that come again: a GPU replays them.
    for dtype, storage in (("float16", "float16"), ("bfloat16", "bfloat16"), ("float32", "float16")):
        yield [150, 5, *[1] * 6], dtype, storage, {}
        yield [30, 140, 17, 1, 1, 1], dtype, storage, options
    yield [20, 2100, 1], "float16", "float16", {}  # FlashAttention-2's part merged with that of tensor cores


def _error_of_cache(steps: list[int], dtype: str, storage: str, options: dict[str, Any], backend: str) -> float:
    """Return the largest difference of a cache's results from the formula for the whole sequence."""
    capacity, sinks, tokens = 100, 4, sum(steps)
    q, k, v = (array[0] for array in _arrays(1, tokens, tokens, 4, 2, 64, dtype))
    cache = numbaflash.RingKVCache(
        1, 2, 64, capacity=capacity, sink_tokens=sinks, page_size=16, dtype=storage, backend=backend
    )
    cuts = np.cumsum([0, *steps])
    outs = [cache.step(0, q[a:b], k[a:b], v[a:b], **options) for a, b in pairwise(cuts)]
    arrays = (q[None].astype(np.float32), *(x[None].astype(storage).astype(np.float32) for x in (k, v)))
    described = describe(*arrays, causal=True, window=(capacity - sinks - 1, 0), **options)
    want, _ = reference.attention(described, *arrays, sinks)
    return float(np.abs(np.concatenate(outs).astype(np.float64) - want[0]).max())


def _arrays(
    batch: int, q_tokens: int, kv_tokens: int, q_heads: int, kv_heads: int, head_dim: int, dtype: str = "float16"
) -> list[Any]:
    rng = np.random.default_rng(0)
    sizes = [(q_tokens, q_heads), (kv_tokens, kv_heads), (kv_tokens, kv_heads)]
    return [
        rng.standard_normal((batch, tokens, heads, head_dim), np.float32).astype(np.dtype(dtype))
        for tokens, heads in sizes
    ]


if __name__ == "__main__":
    main()

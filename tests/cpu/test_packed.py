"""Sequences with different numbers of queries, packed one behind the other: each gets what it gets alone."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from numbaflash.cpu import KVRuns, Visibility, attend_runs, contiguous_run
from numbaflash.problem import describe_scoring

from .inputs import assert_close, normal, solve


@pytest.mark.parametrize("q_tokens", [[3, 0, 8, 1], [1, 300, 0, 77, 9]], ids=["split-KV", "prefill"])
@pytest.mark.parametrize("heads", [(6, 2), (4, 4)])
def test_a_packed_sequence_gets_what_it_gets_alone(q_tokens: list[int], heads: tuple[int, int]) -> None:
    q_heads, kv_heads = heads
    kv_tokens = [350, 40, 7, 0, 130][: len(q_tokens)]
    q_bounds, kv_bounds = np.cumsum([0, *q_tokens]), np.cumsum([0, *kv_tokens])
    # Every second token of a larger array: the tokens are packed, the memory need not be.
    q = normal(1, 2 * q_bounds[-1], q_heads, 40)[::2]
    k, v = (normal(seed, kv_bounds[-1], kv_heads, 40) for seed in (2, 3))
    slopes = np.linspace(0.1, 1, len(q_tokens) * q_heads, dtype=np.float32).reshape(-1, q_heads)
    runs = KVRuns(
        table=np.array([contiguous_run(k[a:b], v[a:b], 0) for a, b in pairwise(kv_bounds)]),
        bounds=np.arange(len(q_tokens) + 1),
        dtype=q.dtype,
        kv_heads=kv_heads,
        head_dim=40,
        value_dim=40,
    )
    sequences = len(q_tokens)
    visibility = Visibility(
        q_start=np.diff(kv_bounds) - np.diff(q_bounds),
        left=np.full(sequences, 60),
        right=np.zeros(sequences, np.int64),
        sinks=np.zeros(sequences, np.int64),
    )
    scoring = describe_scoring(batch=sequences, q_heads=q_heads, head_dim=40, softcap=5.0, alibi_slopes=slopes)

    out, lse = attend_runs(q, runs, visibility, scoring, q_bounds)

    for n in range(sequences):
        mine, keys = slice(*q_bounds[n : n + 2]), slice(*kv_bounds[n : n + 2])
        options = {"causal": True, "window": (60, None), "softcap": 5.0, "alibi_slopes": slopes[n]}
        alone, alone_lse = solve(q[None, mine], k[None, keys], v[None, keys], **options)
        assert_close(out[mine], lse[:, mine], alone[0], alone_lse[0])

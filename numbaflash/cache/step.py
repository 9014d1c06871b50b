"""Steps and attention of caches, of one or of many at once: all their queries and runs go into one launch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..cpu import Codes, KVRuns, Visibility, attend_runs
from ..problem import Scoring
from .layer import HostLayer, NewTokens, Segment
from .page_format import PageFormat

__all__ = ["attend", "step"]


def step(
    layers: Sequence[HostLayer], q: NDArray[Any], k: NDArray[Any], v: NDArray[Any], scoring: Scoring
) -> NDArray[Any]:
    """Attend to what the layers hold and to the new tokens, then write those.

    Args:
        layers: One of each cache, N of them, alike in heads, head_dim, dtype and page format.
        q: (N, T, Hq, D).
        k: (N, T, Hkv, D).
        v: (N, T, Hkv, D).
        scoring: As in `cpu.attend_runs`.

    Returns:
        (N, T, Hq, D), q's dtype.

    Raises:
        ValueError: k or v cannot be stored; nothing has changed.
    """
    news: list[NewTokens] = []
    taken = 0
    try:
        for layer, keys, values in zip(layers, k, v, strict=True):
            news.append(layer.prepare(keys, values))
        out = attend(layers, [layer.length for layer in layers], q, news, scoring)
        for layer, new in zip(layers, news, strict=True):
            taken += 1
            layer.write(new)
    except BaseException:
        for layer, new in zip(layers[taken:], news[taken:], strict=False):
            layer.discard(new)
        raise
    return out


def attend(
    layers: Sequence[HostLayer],
    starts: Sequence[int],
    q: NDArray[Any],
    news: Sequence[NewTokens],
    scoring: Scoring,
) -> NDArray[Any]:
    """Attend with queries (N, T, Hq, D) at positions `starts` and on; `news` are tokens behind those of the layers."""
    tokens = q.shape[1]
    segments: list[Segment] = []
    owners: list[int] = []
    for n, (layer, start, new) in enumerate(zip(layers, starts, news, strict=True)):
        of_one = layer.segments(start, start + tokens, new)
        segments += of_one
        owners += [n] * len(of_one)
    if not segments:
        return np.empty_like(q)
    layouts = [layers[n].layout for n in owners]
    visibility = Visibility(
        q_start=[segment.start for segment in segments],
        left=[layout.window - 1 for layout in layouts],
        right=[0] * len(segments),
        sinks=[layout.sink_tokens for layout in layouts],
    )
    runs = _runs(layers[0], segments)
    queries = q if runs.codes is None else _folded(layers, q)
    if len(segments) == len(q):
        return attend_runs(queries, runs, visibility, scoring)[0].astype(q.dtype, copy=False)
    if scoring.alibi_slopes is not None:
        scoring = replace(scoring, alibi_slopes=np.ascontiguousarray(scoring.alibi_slopes[owners]))
    bounds = _bounds([segment.stop - segment.start for segment in segments])
    out, _ = attend_runs(queries.reshape(-1, *q.shape[2:]), runs, visibility, scoring, bounds)
    return out.reshape(q.shape).astype(q.dtype, copy=False)


def _runs(layer: HostLayer, segments: Sequence[Segment]) -> KVRuns:
    """The runs of all segments, each of them a sequence, of layers like this one."""
    ring = layer.ring
    return KVRuns(
        table=_joined([segment.table for segment in segments]),
        bounds=_bounds([len(segment.table) for segment in segments]),
        dtype=ring.dtype,
        kv_heads=ring.kv_heads,
        head_dim=ring.head_dim,
        value_dim=ring.head_dim,
        codes=None if layer.page_format is None else _codes(layer.page_format, segments),
    )


def _codes(page_format: PageFormat, segments: Sequence[Segment]) -> Codes:
    return Codes(
        parameters=_joined([segment.parameters for segment in segments]),
        bits=page_format.bits,
        key_group=page_format.key_group,
        value_group=page_format.value_group,
        symmetric=page_format.symmetric,
        page_size=page_format.page_size,
    )


def _joined(tables: list[NDArray[np.int64]]) -> NDArray[np.int64]:
    return tables[0] if len(tables) == 1 else np.concatenate(tables)


def _bounds(counts: list[int]) -> NDArray[np.int64]:
    return np.array([0, *accumulate(counts)], np.int64)


def _folded(layers: Sequence[HostLayer], q: NDArray[Any]) -> NDArray[Any]:
    """The queries as they meet the layers' keys."""
    given = list(q)
    folded = [layer.fold_queries(queries) for layer, queries in zip(layers, given, strict=True)]
    return q if all(a is b for a, b in zip(folded, given, strict=True)) else np.stack(folded)

"""Steps and attention of quantized caches, of one or of many at once, as `float_steps.py` has them of others.

What a query sees of codes and what in 16 bits depends on its page: a step is parted by pages, into one launch still.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..cpu import Codes, KVRuns, Visibility, attend_runs
from ..problem import Scoring
from .layer import HostLayer, NewTokens, Segment
from .page_format import PageFormat

__all__ = ["append", "attend", "step"]


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
        ValueError: k or v cannot be stored; no layer has changed.
        MemoryError: A layer has no pages left; no layer has changed.
    """
    with _prepared(layers, k, v) as news:
        out = _attend(layers, [layer.length for layer in layers], q, news, scoring)
        _write(layers, news)
    return out


def append(layers: Sequence[HostLayer], k: NDArray[Any], v: NDArray[Any]) -> None:
    """Write new tokens, (N, T, Hkv, D) each.

    Raises:
        ValueError: They cannot be stored; no layer has changed.
        MemoryError: A layer has no pages left; no layer has changed.
    """
    with _prepared(layers, k, v) as news:
        _write(layers, news)


def attend(layers: Sequence[HostLayer], q: NDArray[Any], scoring: Scoring) -> NDArray[Any]:
    """Attend with the queries (N, T, Hq, D) of the last T tokens of each layer."""
    news = []
    for layer in layers:
        none = np.empty((0, layer.ring.kv_heads, layer.ring.head_dim), layer.ring.dtype)
        news.append(layer.prepare(none, none))
    return _attend(layers, [layer.length - q.shape[1] for layer in layers], q, news, scoring)


@contextmanager
def _prepared(layers: Sequence[HostLayer], k: NDArray[Any], v: NDArray[Any]) -> Iterator[list[NewTokens]]:
    """Prepare the tokens of all layers; where anything fails, all pages that they have go back."""
    news: list[NewTokens] = []
    try:
        for layer, keys, values in zip(layers, k, v, strict=True):
            news.append(layer.prepare(keys, values))
        yield news
    except BaseException:
        for layer, new in zip(layers, news, strict=False):
            layer.discard(new)
        raise


def _write(layers: Sequence[HostLayer], news: list[NewTokens]) -> None:
    """Write the tokens of all layers, or of none: the first is written when the last one has its pages."""
    for i, layer in enumerate(layers):
        news[i] = layer.reserve(news[i])
    for layer, new in zip(layers, news, strict=True):
        layer.write(new)


def _attend(
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
    queries = _folded(layers, q)
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
        codes=_codes(layer.page_format, segments),
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

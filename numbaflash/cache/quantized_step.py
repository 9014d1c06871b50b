"""Steps and attention of quantized caches: queries in segments, see `quantized.py` for why."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..cpu import Codes, KVRuns, Visibility, attend_runs
from ..problem import FLOAT16, Scoring
from .layout import RingLayout
from .page_format import PageFormat
from .quantized import Closed, QuantizedLayer, Segment
from .quantizers import Quantizer

__all__ = ["Part", "attend", "raw_tokens", "step"]


@dataclass(frozen=True)
class Part:
    """One cache's part in a call: a layer of it, and what its tokens go through."""

    layer: QuantizedLayer
    index: int
    layout: RingLayout
    page_format: PageFormat
    quantizer: Quantizer


def step(
    sequences: list[Part],
    q: NDArray[Any],
    k: NDArray[Any],
    v: NDArray[Any],
    scoring: Scoring,
) -> NDArray[Any]:
    """Attend to what the layers hold and to the new tokens, then write those.

    Args:
        sequences: N of them, with pages of one format.
        q: (N, T, Hq, D).
        k: (N, T, Hkv, D).
        v: (N, T, Hkv, D).
        scoring: As in `cpu.attend_runs`.

    Returns:
        (N, T, Hq, D), q's dtype.

    Raises:
        ValueError: k or v is not finite in float16; nothing has changed.
    """
    news = [raw_tokens(one, keys, values) for one, keys, values in zip(sequences, k, v, strict=True)]
    closed: list[Closed] = []
    written = 0
    try:
        for one, new in zip(sequences, news, strict=True):
            closed.append(one.layer.close_pages(*new))
        starts = [one.layer.length for one in sequences]
        out = attend(sequences, starts, q, news, closed, scoring)
        for one, new, pages in zip(sequences, news, closed, strict=True):
            one.layer.write(*new, pages)
            written += 1
    except BaseException:
        for one, pages in zip(sequences[written:], closed[written:], strict=False):
            one.layer.discard(pages)
        raise
    return out


def raw_tokens(one: Part, k: NDArray[Any], v: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return keys and values as the cache holds them before they are quantized: folded, float16, finite."""
    tokens = []
    for name, given in (("k", one.quantizer.fold_keys(one.index, k)), ("v", v)):
        with np.errstate(over="ignore"):
            token = np.ascontiguousarray(given, FLOAT16)
        if not np.isfinite(token).all():
            row, head, _ = (int(axis[0]) for axis in np.nonzero(~np.isfinite(token)))
            raise ValueError(
                f"{name} must be finite in float16 to be quantized, got {given[row, head].max()} or NaN "
                f"among token {row}, head {head}"
            )
        tokens.append(token)
    return tokens[0], tokens[1]


def attend(
    sequences: list[Part],
    starts: list[int],
    q: NDArray[Any],
    news: list[tuple[NDArray[Any], NDArray[Any]]],
    closed: list[Closed],
    scoring: Scoring,
) -> NDArray[Any]:
    """Attend with queries at positions `starts` and on; `news` and the pages they fill are not in the layers yet."""
    segments = [
        one.layer.segments(start, start + q.shape[1], *new, pages)
        for one, start, new, pages in zip(sequences, starts, news, closed, strict=True)
    ]
    folded = np.stack([one.quantizer.fold_queries(one.index, of_one) for one, of_one in zip(sequences, q, strict=True)])
    layouts = [one.layout for one in sequences]
    return _attend_segments(folded, segments, layouts, sequences[0].page_format, scoring).astype(q.dtype, copy=False)


def _attend_segments(
    q: NDArray[Any],
    segments: list[list[Segment]],
    layouts: list[RingLayout],
    page_format: PageFormat,
    scoring: Scoring,
) -> NDArray[Any]:
    """Attend with the queries of N sequences, each in segments, in one launch.

    Args:
        q: (N, T, Hq, D), the queries of a sequence in the order of its segments.
        segments: Of each sequence.
        layouts: Of each sequence.
        page_format: Of all pages of codes.
        scoring: Slopes of ALiBi are by sequence.

    Returns:
        (N, T, Hq, D), q's dtype.
    """
    flat = [(n, segment) for n, of_one in enumerate(segments) for segment in of_one]
    if not flat:
        return np.empty_like(q)
    sequence = [n for n, _ in flat]
    if scoring.alibi_slopes is not None:
        scoring = replace(scoring, alibi_slopes=np.ascontiguousarray(scoring.alibi_slopes[sequence]))
    codes = Codes(
        parameters=np.concatenate([segment.parameters for _, segment in flat]),
        bits=page_format.bits,
        key_group=page_format.key_group,
        value_group=page_format.value_group,
        symmetric=page_format.symmetric,
        page_size=page_format.page_size,
    )
    runs = KVRuns(
        table=np.concatenate([segment.table for _, segment in flat]),
        bounds=np.cumsum([0, *(len(segment.table) for _, segment in flat)]),
        dtype=FLOAT16,
        kv_heads=page_format.kv_heads,
        head_dim=page_format.head_dim,
        value_dim=page_format.head_dim,
        codes=codes,
    )
    visibility = Visibility(
        q_start=[segment.start for _, segment in flat],
        left=[layouts[n].window - 1 for n in sequence],
        right=[0] * len(flat),
        sinks=[layouts[n].sink_tokens for n in sequence],
    )
    if len(flat) == len(q):
        return attend_runs(q, runs, visibility, scoring)[0]
    bounds = np.cumsum([0, *(segment.stop - segment.start for _, segment in flat)])
    return attend_runs(q.reshape(-1, *q.shape[2:]), runs, visibility, scoring, bounds)[0].reshape(q.shape)

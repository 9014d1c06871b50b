"""The last minutes of a server: rates and percentiles of every stretch of two seconds."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import asdict, dataclass, fields
from typing import Final

from .metrics import Metrics, quantile

SECONDS: Final = 2.0
_POINTS: Final = 150


@dataclass(frozen=True, slots=True)
class Point:
    """One stretch of time; percentiles are None where nothing was computed in it.

    Attributes:
        at: Its end, in seconds since the epoch.
        decode_steps: Decode steps a second.
        prefill_steps: Prefill steps a second.
        tokens: Tokens (of one layer) a second.
        batch: Decode steps computed together, on average.
        queue_p50_ms: Median time that decode steps waited.
        queue_p99_ms: 99th percentile of it.
        kernel_p50_ms: Median time of a launch of decode steps.
        kernel_p99_ms: 99th percentile of it.
        errors: Calls and steps that failed, a second.
        kv_reserved_bytes: Reserved for keys and values at its end.
        sessions: That lived at its end.
    """

    at: float
    decode_steps: float
    prefill_steps: float
    tokens: float
    batch: float | None
    queue_p50_ms: float | None
    queue_p99_ms: float | None
    kernel_p50_ms: float | None
    kernel_p99_ms: float | None
    errors: float
    kv_reserved_bytes: int
    sessions: int


@dataclass(frozen=True)
class _Totals:
    at: float
    decode: int
    prefill: int
    tokens: int
    errors: int
    launches: int
    queue: list[int]
    kernel: list[int]

    @classmethod
    def of(cls, metrics: Metrics) -> _Totals:
        decode, prefill = metrics.kinds["decode"], metrics.kinds["prefill"]
        return cls(
            at=time.monotonic(),
            decode=decode.steps,
            prefill=prefill.steps,
            tokens=decode.tokens + prefill.tokens,
            errors=metrics.errors.total(),
            launches=sum(decode.batch.counts),
            queue=list(decode.queue_ns.counts),
            kernel=list(decode.kernel_ns.counts),
        )


class History:
    """Points, oldest first; `sample` is to be called every `SECONDS`.

    Args:
        metrics: What is sampled.
    """

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._before = _Totals.of(metrics)
        self._points: deque[Point] = deque(maxlen=_POINTS)

    def sample(self, kv_reserved_bytes: int, sessions: int) -> None:
        """Close the stretch since the last call."""
        before, now = self._before, _Totals.of(self._metrics)
        seconds, launches = now.at - before.at, now.launches - before.launches
        decode = self._metrics.kinds["decode"]
        queue = [b - a for a, b in zip(before.queue, now.queue, strict=True)]
        kernel = [b - a for a, b in zip(before.kernel, now.kernel, strict=True)]
        point = Point(
            at=time.time(),
            decode_steps=(now.decode - before.decode) / seconds,
            prefill_steps=(now.prefill - before.prefill) / seconds,
            tokens=(now.tokens - before.tokens) / seconds,
            batch=(now.decode - before.decode) / launches if launches else None,
            queue_p50_ms=_milliseconds(quantile(decode.queue_ns.bounds, queue, 0.5)),
            queue_p99_ms=_milliseconds(quantile(decode.queue_ns.bounds, queue, 0.99)),
            kernel_p50_ms=_milliseconds(quantile(decode.kernel_ns.bounds, kernel, 0.5)),
            kernel_p99_ms=_milliseconds(quantile(decode.kernel_ns.bounds, kernel, 0.99)),
            errors=(now.errors - before.errors) / seconds,
            kv_reserved_bytes=kv_reserved_bytes,
            sessions=sessions,
        )
        self._points.append(point)
        self._before = now

    def columns(self) -> dict[str, list[float | None]]:
        """Return the points as a list for each of their fields."""
        rows = [asdict(point) for point in self._points]
        return {field.name: [row[field.name] for row in rows] for field in fields(Point)}


def _milliseconds(nanoseconds: float | None) -> float | None:
    return None if nanoseconds is None else round(nanoseconds / 1e6, 4)

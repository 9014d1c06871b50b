"""What a running server counts, and how Prometheus reads it.

Steps are too many to be counted by Prometheus' own objects, which take a lock each time. The engine and the event loop
add plain integers here, each its own, and `Collector` turns them into metrics when somebody asks.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector as _Collector

from .errors import ServiceError, SessionClosedError, SessionEvictedError, SessionExpiredError, SessionLostError

# 20 us to 10 s, as 2, 5, 10 in each decade.
_NANOSECONDS: Final = (20_000, 50_000, *(10**n * m for n in range(5, 10) for m in (1, 2, 5)), 10**10)
_ENDS: Final = {SessionClosedError: "closed", SessionExpiredError: "expired", SessionEvictedError: "evicted"}
_STEPS: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Histogram:
    """How many values fell below each bound, and their sum; whole numbers."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: tuple[int, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)  # the last one: above all bounds
        self.total = 0

    def add(self, value: int) -> None:
        """Count a value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def cumulative(self, unit: float) -> list[tuple[str, float]]:
        """Return (bound, values up to it) as Prometheus has them, bounds divided by `unit`."""
        seen, buckets = 0, []
        for bound, count in zip((*self.bounds, None), list(self.counts), strict=True):
            seen += count
            buckets.append(("+Inf" if bound is None else f"{bound / unit:g}", float(seen)))
        return buckets


def quantile(bounds: tuple[int, ...], counts: list[int], share: float) -> float | None:
    """Estimate a quantile of a histogram's values, or of those of a stretch of time (counts subtracted).

    Within a bucket values are taken to lie evenly, above all bounds to be the last one. None where there are none.
    """
    rank = share * sum(counts)
    if not rank:
        return None
    below, seen = 0, 0
    for bound, count in zip(bounds, counts, strict=False):
        if seen + count >= rank:
            return below + (bound - below) * (rank - seen) / count
        below, seen = bound, seen + count
    return float(bounds[-1])


@dataclass(eq=False, slots=True)
class KindOfStep:
    """What is counted of decode steps, and of prefill steps."""

    steps: int = 0
    tokens: int = 0
    queue_ns: Histogram = field(default_factory=lambda: Histogram(_NANOSECONDS))
    kernel_ns: Histogram = field(default_factory=lambda: Histogram(_NANOSECONDS))
    batch: Histogram = field(default_factory=lambda: Histogram(_STEPS))


class Metrics:
    """The counters of one server.

    Args:
        small: Steps of fewer tokens than this are called decode, others prefill.

    Attributes:
        kinds: Steps that were computed, "decode" and "prefill"; the engine's thread counts.
        replayed: Steps that had been taken before and were sent again; the engine's thread counts.
        errors: Calls and steps of streams that failed, by reason or gRPC code; the event loop counts, like all below.
        created: Sessions made.
        ended: Sessions ended, by why.
        spills: Sessions written to disk for the room that they took.
        unspills: Sessions that came back from there.
    """

    def __init__(self, small: int) -> None:
        self.kinds = {"decode": KindOfStep(), "prefill": KindOfStep()}
        self._small = small
        self.replayed = 0
        self.errors: Counter[str] = Counter()
        self.created = 0
        self.ended: Counter[str] = Counter()
        self.spills = 0
        self.unspills = 0

    def count_error(self, error: ServiceError) -> None:
        """Count a call or a step that failed."""
        self.errors[error.reason or error.code.name] += 1

    def count_end(self, why: SessionLostError) -> None:
        """Count a session that ended, by the error that its calls get from now on."""
        self.ended[_ENDS.get(type(why), "failed")] += 1

    def launched(self, tokens: int, queue_ns: Sequence[int], kernel_ns: int) -> None:
        """Count a launch: the tokens of each of its steps, how long each waited, and how long it took."""
        kind = self.kinds["decode" if tokens < self._small else "prefill"]
        for waited in queue_ns:
            kind.queue_ns.add(waited)
        kind.steps += len(queue_ns)
        kind.tokens += len(queue_ns) * tokens
        kind.kernel_ns.add(kernel_ns)
        kind.batch.add(len(queue_ns))


@dataclass(frozen=True)
class Gauges:
    """What a server holds at a moment."""

    draining: bool
    sessions: int
    kv_memory_bytes: int
    kv_reserved_bytes: int
    kv_used_bytes: int
    kv_pages: int
    spilled_sessions: int
    spilled_bytes: int
    spill_memory_bytes: int
    replay_memory_bytes: int
    replay_bytes: int
    queued_steps: int
    queued_bytes: int
    streams: int


_GAUGES: Final = {
    "draining": "1 while the server is about to stop",
    "sessions": "Sessions that live",
    "kv_memory_bytes": "The budget for keys and values",
    "kv_reserved_bytes": "Reserved of it by sessions",
    "kv_used_bytes": "Bytes of the pages in use",
    "kv_pages": "Pages of keys and values in use",
    "spilled_sessions": "Of the sessions, those on disk",
    "spilled_bytes": "Bytes of their files",
    "spill_memory_bytes": "The budget for those",
    "replay_memory_bytes": "The budget for answers kept so that a step can be sent again",
    "replay_bytes": "Bytes of those answers",
    "queued_steps": "Steps waiting or running",
    "queued_bytes": "Bytes of those steps",
    "streams": "Attend streams that are open",
}


class Collector(_Collector):
    """Gives a server's counters to a Prometheus registry.

    Args:
        metrics: The counters.
        gauges: Asked at every collection; may raise, and then nothing is collected.
        info: Labels of `numbaflash_info`.
    """

    def __init__(self, metrics: Metrics, gauges: Callable[[], Gauges], info: dict[str, str]) -> None:
        self._metrics = metrics
        self._gauges = gauges
        self._info = info

    def collect(self) -> Iterator[Metric]:
        """Yield all metrics."""
        gauges = self._gauges()
        info = GaugeMetricFamily("numbaflash_info", "What serves", labels=list(self._info))
        info.add_metric(list(self._info.values()), 1)
        yield info
        for name, meaning in _GAUGES.items():
            yield GaugeMetricFamily(f"numbaflash_{name}", meaning, value=getattr(gauges, name))
        yield from self._counters()
        yield from self._histograms()

    def _counters(self) -> Iterator[Metric]:
        metrics = self._metrics
        kinds = metrics.kinds.items()
        for name, meaning, label, values in (
            ("steps", "Steps computed", "kind", {kind: counts.steps for kind, counts in kinds}),
            ("tokens", "Tokens of one layer computed", "kind", {kind: counts.tokens for kind, counts in kinds}),
            ("errors", "Calls, and steps of streams, that failed", "reason", dict(metrics.errors)),
            ("sessions_ended", "Sessions ended", "why", dict(metrics.ended)),
        ):
            family = CounterMetricFamily(f"numbaflash_{name}", meaning, labels=[label])
            for value, count in values.items():
                family.add_metric([value], count)
            yield family
        yield CounterMetricFamily(
            "numbaflash_replayed_steps", "Steps sent again and answered as before", metrics.replayed
        )
        yield CounterMetricFamily("numbaflash_sessions_created", "Sessions made", metrics.created)
        yield CounterMetricFamily("numbaflash_spills", "Sessions written to disk", metrics.spills)
        yield CounterMetricFamily("numbaflash_unspills", "Sessions brought back from disk", metrics.unspills)

    def _histograms(self) -> Iterator[Metric]:
        for name, meaning, attribute, unit in (
            ("queue_seconds", "Time of a step from its arrival to its computation", "queue_ns", 1e9),
            ("kernel_seconds", "Time of a launch", "kernel_ns", 1e9),
            ("batch_steps", "Steps of a launch", "batch", 1.0),
        ):
            family = HistogramMetricFamily(f"numbaflash_{name}", meaning, labels=["kind"])
            for kind, counts in self._metrics.kinds.items():
                histogram: Histogram = getattr(counts, attribute)
                family.add_metric([kind], histogram.cumulative(unit), histogram.total / unit)
            yield family

"""HTTP beside gRPC, for those who operate the server: metrics for Prometheus, and a page for a person.

    /             the page: it shows what /status.json says, and asks it again every two seconds
    /status.json  what the server is and holds, and its last five minutes
    /metrics      for Prometheus
    /health       200 while the server takes new work, else 503

It only reads. Session ids are cut to eight characters: who knows a whole one may use the session.
"""

from __future__ import annotations

import asyncio
import json
import time
from base64 import b64encode
from collections.abc import Callable
from dataclasses import asdict
from hashlib import sha256
from http import HTTPStatus
from importlib.resources import files
from re import DOTALL, findall
from typing import Any, Final, Literal, TypeVar

from prometheus_client import CollectorRegistry, GCCollector, ProcessCollector
from prometheus_client.exposition import choose_encoder

from .history import SECONDS, History
from .metrics import Collector
from .servicer import AttentionServicer
from .sessions import Session
from .web import Reply, WebServer

T = TypeVar("T")

_SESSIONS_SHOWN: Final = 100
_ANSWER_SECONDS: Final = 5.0
_PAGE: Final = files(__package__).joinpath("status_page.html").read_text("utf-8")


class StatusPage:
    """Tells over HTTP what a server does; to be made, started and stopped on its event loop.

    Args:
        servicer: Whose state is told.
        host: Address to listen on.
        port: Port to listen on; 0: any free one.

    Attributes:
        state: The owner keeps it up to date.
        url: Where the page is.

    Raises:
        OSError: The address cannot be listened on.
    """

    def __init__(self, servicer: AttentionServicer, host: str, port: int) -> None:
        self.state: Literal["starting", "serving", "stopping"] = "starting"
        self._servicer = servicer
        self._loop = asyncio.get_running_loop()
        self._started = time.monotonic()
        self._history = History(servicer.metrics)
        self._registry = CollectorRegistry()
        self._registry.register(Collector(servicer.metrics, lambda: self._ask(servicer.gauges), servicer.identity()))
        self._process = ProcessCollector(registry=self._registry)
        GCCollector(self._registry)
        try:
            self._web = WebServer(host, port, self._answer)
        except OSError as error:
            raise OSError(f"cannot listen on {host}:{port} for metrics: {error.strerror or error}") from None
        self.url = self._web.url

    def start(self) -> None:
        """Answer, and sample from now on."""
        self._web.run()
        self._sampling = asyncio.create_task(self._sample())

    async def stop(self) -> None:
        """Answer no more."""
        self._sampling.cancel()
        await asyncio.to_thread(self._web.close)

    async def _sample(self) -> None:
        while True:
            await asyncio.sleep(SECONDS)
            gauges = self._servicer.gauges()
            self._history.sample(gauges.kv_reserved_bytes, gauges.sessions)

    def _status(self) -> dict[str, Any]:
        """Gather what /status.json says; on the event loop."""
        servicer, metrics = self._servicer, self._servicer.metrics
        resident = [m.samples[0].value for m in self._process.collect() if m.name == "process_resident_memory_bytes"]
        recent = sorted(servicer.sessions(), key=lambda session: session.idle_seconds)
        return {
            "state": self.state,
            "uptime_seconds": time.monotonic() - self._started,
            "resident_bytes": resident[0] if resident else None,
            "server": servicer.identity(),
            "holds": asdict(servicer.gauges()),
            "totals": {
                "steps": {kind: counts.steps for kind, counts in metrics.kinds.items()},
                "replayed": metrics.replayed,
                "errors": dict(metrics.errors.most_common()),
                "created": metrics.created,
                "ended": dict(metrics.ended.most_common()),
            },
            "history": self._history.columns(),
            "sessions": [_describe(session) for session in recent[:_SESSIONS_SHOWN]],
        }

    def _answer(self, path: str, accepted: str) -> Reply | None:
        """Answer a GET; on a thread of the HTTP server."""
        if path == "/":
            return Reply("text/html; charset=utf-8", _PAGE.encode(), headers=(("Content-Security-Policy", _policy()),))
        if path == "/status.json":
            return Reply("application/json", json.dumps(self._ask(self._status)).encode())
        if path == "/metrics":
            encode, content_type = choose_encoder(accepted)
            return Reply(content_type, encode(self._registry))
        if path == "/health":
            status = HTTPStatus.OK if self.state == "serving" else HTTPStatus.SERVICE_UNAVAILABLE
            return Reply("text/plain; charset=utf-8", f"{self.state}\n".encode(), status)
        return None

    def _ask(self, question: Callable[[], T]) -> T:
        """Call a function on the event loop, whose state it reads.

        Raises:
            TimeoutError: The loop hangs.
        """

        async def ask() -> T:
            return question()

        return asyncio.run_coroutine_threadsafe(ask(), self._loop).result(_ANSWER_SECONDS)


def _describe(session: Session) -> dict[str, Any]:
    shape = session.shape
    return {
        "id": session.id[:8],
        "shape": f"{shape.num_layers} x {shape.num_kv_heads} x {shape.head_dim} {shape.dtype}",
        "tokens": max(session.lengths()),
        "capacity": shape.capacity,
        "kv_bytes": session.kv_bytes,
        "steps": session.steps,
        "busy": session.in_flight > 0,
        "spilled": session.spilled is not None,
        "idle_seconds": session.idle_seconds,
        "ttl_seconds": session.ttl,
    }


def _policy() -> str:
    """Let the page run its own script and style, and fetch from here; nothing else."""
    rules = ["default-src 'none'", "connect-src 'self'", "img-src data:", "base-uri 'none'", "form-action 'none'"]
    for element in ("script", "style"):
        (content,) = findall(f"<{element}>(.*?)</{element}>", _PAGE, DOTALL)
        rules.append(f"{element}-src 'sha256-{b64encode(sha256(content.encode()).digest()).decode()}'")
    return "; ".join(rules)

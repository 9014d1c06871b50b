"""What the server counts, as Prometheus reads it over HTTP beside gRPC."""

from __future__ import annotations

import asyncio
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from numbaflash_service import Client, RetryPolicy
from numbaflash_service.config import load
from numbaflash_service.errors import KVBudgetError, PositionMismatchError
from numbaflash_service.metrics import Histogram, quantile
from numbaflash_service.server import Server

ONCE = RetryPolicy(attempts=1)
MIB = 1 << 20


def get(server: Any, path: str, **headers: str) -> tuple[int, str, str]:
    """Status, content type and body."""
    request = urllib.request.Request(server.server.status_page.url.rstrip("/") + path, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return answer.status, answer.headers["Content-Type"], answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.headers["Content-Type"], error.read().decode()


def scrape(server: Any) -> dict[str, float]:
    """Every sample, by its name and labels as they are written."""
    status, content_type, text = get(server, "/metrics")
    assert status == 200
    assert content_type.startswith("text/plain")
    return {
        sample.name + "".join(f" {name}={value}" for name, value in sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


@pytest.fixture
def watched(start_server: Callable[..., Any]) -> Any:
    return start_server(metrics_port=0, kv_memory=4 * MIB)


def test_steps_tokens_and_sessions_are_counted_as_they_were_taken(watched: Any, qkv: Callable[..., Any]) -> None:
    with Client(watched.target, retry=ONCE) as client:
        session = client.create_session(2, 2, 16, capacity=256)
        for layer in range(2):
            session.step(layer, **qkv(100))
            for _ in range(3):
                session.step(layer, **qkv(1))
        other = client.create_session(1, 2, 16, capacity=64)
        other.close()
        told = scrape(watched)
        assert told["numbaflash_sessions"] == 1
        assert told["numbaflash_kv_memory_bytes"] == 4 * MIB
        assert told["numbaflash_kv_reserved_bytes"] == session.max_nbytes
        page = 2 * 2 * 64 * 16 * 2
        assert (told["numbaflash_kv_pages"], told["numbaflash_kv_used_bytes"]) == (4, 4 * page)
        assert told["numbaflash_queued_steps"] == 0
    assert told["numbaflash_steps_total kind=decode"] == 6
    assert told["numbaflash_steps_total kind=prefill"] == 2
    assert told["numbaflash_tokens_total kind=decode"] == 6
    assert told["numbaflash_tokens_total kind=prefill"] == 200
    assert told["numbaflash_queue_seconds_count kind=decode"] == 6
    assert told["numbaflash_kernel_seconds_count kind=prefill"] == 2
    assert told["numbaflash_kernel_seconds_sum kind=prefill"] > 0
    assert told["numbaflash_sessions_created_total"] == 2
    assert told["numbaflash_sessions_ended_total why=closed"] == 1
    assert told["process_resident_memory_bytes"] > 0


def test_steps_computed_together_are_one_launch(
    start_server: Callable[..., Any], connect_stock: Any, qkv: Callable[..., Any], step_request: Any
) -> None:
    server = start_server(metrics_port=0)
    stock = connect_stock(server)
    sessions = [stock.new_session() for _ in range(3)]
    with server.engine_held():
        calls = [stock.Decode.future(step_request(session_id, qkv(1))) for session_id in sessions]
        server.wait_for_queue(3)
        assert scrape(server)["numbaflash_queued_steps"] == 3
    for call in calls:
        call.result(timeout=20)
    told = scrape(server)
    assert told["numbaflash_steps_total kind=decode"] == 3
    assert told["numbaflash_batch_steps_count kind=decode"] == 1
    assert told["numbaflash_batch_steps_sum kind=decode"] == 3
    assert told["numbaflash_batch_steps_bucket kind=decode le=2"] == 0
    assert told["numbaflash_batch_steps_bucket kind=decode le=4"] == 1


def test_every_error_is_counted_once_by_its_reason(
    watched: Any, connect_stock: Any, qkv: Callable[..., Any], step_request: Any
) -> None:
    stock = connect_stock(watched)
    with Client(watched.target, retry=ONCE) as client:
        with pytest.raises(KVBudgetError):
            client.create_session(32, 8, 128, capacity=4096)
        for stream in (True, False):
            session = client.create_session(1, 2, 16, capacity=64, stream=stream)
            session.step(0, **qkv(1))
            session._lengths[0] = 7
            with pytest.raises(PositionMismatchError):
                session.step(0, **qkv(1))
    session_id = stock.new_session()
    request = step_request(session_id, qkv(1))
    assert not stock.Decode(request).replayed
    assert stock.Decode(request).replayed
    told = scrape(watched)
    assert told["numbaflash_errors_total reason=KV_BUDGET"] == 1
    assert told["numbaflash_errors_total reason=POSITION_MISMATCH"] == 2
    assert told["numbaflash_replayed_steps_total"] == 1
    assert told["numbaflash_steps_total kind=decode"] == 3


def test_openmetrics_is_spoken_to_who_asks_for_it(watched: Any) -> None:
    _, content_type, text = get(watched, "/metrics", Accept="application/openmetrics-text; version=1.0.0")
    assert content_type.startswith("application/openmetrics-text")
    assert text.endswith("# EOF\n")


def test_without_a_port_nothing_listens(server: Any) -> None:
    assert server.server.status_page is None


def test_a_metrics_port_that_is_taken_is_an_error_that_names_it(watched: Any) -> None:
    taken = int(watched.server.status_page.url.rpartition(":")[2].rstrip("/"))
    second = Server(load(listen=["127.0.0.1:0"], metrics_port=taken))
    with pytest.raises(OSError, match=rf"cannot listen on 127\.0\.0\.1:{taken} for metrics"):
        asyncio.run(second.start())


@given(values=st.lists(st.integers(0, 10**11)), share=st.sampled_from([0.01, 0.5, 0.9, 0.99, 1.0]))
def test_a_quantile_lies_in_the_bucket_of_the_true_one(values: list[int], share: float) -> None:
    bounds = (20, 50, 10**3, 10**6, 10**10)
    histogram = Histogram(bounds)
    for value in values:
        histogram.add(value)
    assert histogram.total == sum(values)
    assert histogram.cumulative(1.0)[-1] == ("+Inf", len(values))
    estimate = quantile(bounds, histogram.counts, share)
    if not values:
        assert estimate is None
        return
    true = np.quantile(values, share, method="inverted_cdf")
    edges = (0, *bounds)
    upper = next((bound for bound in bounds if true <= bound), bounds[-1])
    lower = edges[edges.index(upper) - 1] if true <= bounds[-1] else bounds[-1]
    assert lower <= estimate <= upper

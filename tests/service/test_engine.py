"""The engine: steps that wait are computed together, to the same bits, and one that is at fault fails alone."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import numbaflash
from numbaflash_service.v1 import attention_pb2 as pb

from .plain_calls import out

TOKENS = 3


def sessions_of_different_lengths(stock: Any, qkv: Any, step_request: Any, **shape: Any) -> tuple[list[str], list[Any]]:
    ids, caches = [], []
    for length in (0, 5, 40, 100):
        ids.append(stock.new_session(**shape))
        caches.append(
            numbaflash.RingKVCache(2, 2, 16, **{"capacity": 64, "dtype": "float32", **shape})  # as new_session
        )
        if length:
            stock.Prefill(step_request(ids[-1], qkv(length)))
            caches[-1].step(0, **qkv(length))
    return ids, caches


def waiting(server: Any, stock: Any, requests: list[pb.StepRequest]) -> list[Any]:
    """Send requests so that they all wait for the engine together; return the calls' answers or errors."""
    with server.engine_held():
        calls = []
        for i, request in enumerate(requests):
            calls.append(stock.Decode.future(request))
            server.wait_for_queue(i + 1)
    return [call.exception(timeout=20) or call.result() for call in calls]


def test_steps_that_wait_are_computed_together_to_the_bits_of_each_alone(
    server: Any, stock: Any, qkv: Callable[..., Any], step_request: Any
) -> None:
    ids, caches = sessions_of_different_lengths(stock, qkv, step_request)
    arrays = [qkv(TOKENS, seed=i) for i in range(4)]
    requests = [step_request(ids[i], arrays[i], position=caches[i].length(0), request_id=f"{i}") for i in range(4)]
    answers = waiting(server, stock, requests)
    assert [answer.batch_size for answer in answers] == [4] * 4
    for answer, cache, array in zip(answers, caches, arrays, strict=True):
        np.testing.assert_array_equal(out(answer), cache.step(0, **array))
        assert answer.position == cache.length(0)
    assert [stock.Decode(request).replayed for request in requests] == [True] * 4


def test_only_steps_that_are_alike_are_computed_together(
    server: Any, stock: Any, qkv: Callable[..., Any], step_request: Any
) -> None:
    ids = [stock.new_session(dtype=dtype) for dtype in ("float32", "float32", "float16", "float32", "float32")]
    ids.append(stock.new_session(dtype="float32"))
    requests = [
        step_request(ids[0], qkv(1)),
        step_request(ids[1], qkv(1), layer=1),
        step_request(ids[2], qkv(1)),
        step_request(ids[3], qkv(2)),
        step_request(ids[4], qkv(1, q_heads=2)),
        step_request(ids[5], qkv(1)),
    ]
    requests[1].options.scale = 0.5
    assert [answer.batch_size for answer in waiting(server, stock, requests)] == [2, 1, 1, 1, 1, 2]


def test_prefills_are_computed_alone(server: Any, stock: Any, qkv: Callable[..., Any], step_request: Any) -> None:
    requests = [step_request(stock.new_session(), qkv(100)) for _ in range(2)]
    assert [answer.batch_size for answer in waiting(server, stock, requests)] == [1, 1]


def test_a_step_at_fault_in_a_batch_fails_alone(
    server: Any, stock: Any, qkv: Callable[..., Any], step_request: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids, caches = sessions_of_different_lengths(stock, qkv, step_request)
    requests = [step_request(ids[i], qkv(1), position=caches[i].length(0), request_id="x") for i in range(4)]
    requests[2].position += 1
    answers = waiting(server, stock, requests)
    assert "position is 41 and layer 0 holds 40" in answers[2].details()
    assert [answers[i].batch_size for i in (0, 1, 3)] == [3] * 3

    for i in (0, 1, 3):
        requests[i].position += 1
        requests[i].request_id = "y"
    requests[2].position -= 1

    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("no batches today")

    monkeypatch.setattr(numbaflash, "attention_batch", refuse)
    answers = waiting(server, stock, requests)
    assert [answer.batch_size for answer in answers] == [1] * 4
    assert [answer.position for answer in answers] == [2, 7, 41, 102]


def test_a_batch_is_as_large_as_configured(
    start_server: Any, connect_stock: Any, qkv: Callable[..., Any], step_request: Any
) -> None:
    server = start_server(max_batch=2)
    stock = connect_stock(server)
    requests = [step_request(stock.new_session(), qkv(1)) for _ in range(5)]
    assert sorted(answer.batch_size for answer in waiting(server, stock, requests)) == [1, 2, 2, 2, 2]


def test_a_configured_wait_collects_steps_that_come_apart(
    start_server: Any, connect_stock: Any, qkv: Callable[..., Any], step_request: Any
) -> None:
    server = start_server(batch_wait=1.0, max_batch=3)
    server.engine._backlog._batch_wait = 60.0  # which nobody waits: three steps are as many as are waited for
    stock = connect_stock(server)
    requests = [step_request(stock.new_session(), qkv(1)) for _ in range(3)]
    calls = []
    for i, request in enumerate(requests):
        calls.append(stock.Decode.future(request))
        server.wait_until(lambda i=i: len(server.submitted) > i)
    assert [call.result(timeout=20).batch_size for call in calls] == [3] * 3


def test_a_session_alone_has_its_short_steps_taken_without_the_thread(
    server: Any, stock: Any, qkv: Callable[..., Any], step_request: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = []
    step = numbaflash.RingKVCache.step

    def recorded(self: numbaflash.RingKVCache, *arguments: Any, **options: Any) -> Any:
        threads.append(threading.current_thread())
        return step(self, *arguments, **options)

    ids = [stock.new_session() for _ in range(2)]
    caches = [numbaflash.RingKVCache(2, 2, 16, capacity=64, dtype="float32") for _ in ids]
    monkeypatch.setattr(numbaflash.RingKVCache, "step", recorded)
    calls = [(0, 20), (0, 1), (0, 2), (1, 1), (1, 1), (0, 1), (0, 40)]
    for session, tokens in calls:
        array, cache = qkv(tokens, seed=len(threads)), caches[session]
        answer = stock.Decode(step_request(ids[session], array, position=cache.length(0)))
        np.testing.assert_array_equal(out(answer), step(cache, 0, **array))
    by_thread = [thread is server.engine._thread for thread in threads]
    assert by_thread == [True, False, False, True, False, True, True]  # prefills, and steps behind another session's

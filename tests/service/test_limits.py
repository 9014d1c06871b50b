"""Budgets hold: memory is reserved before it is taken, queues are bounded, and idle sessions end."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import numbaflash
from numbaflash_service import Client, RetryPolicy
from numbaflash_service.errors import (
    KVBudgetError,
    QueueFullError,
    QuotaError,
    ServiceError,
    SessionExpiredError,
)
from numbaflash_service.principals import Principal
from numbaflash_service.sessions import SessionTable, Shape

from .plain_calls import refusal

ONCE = RetryPolicy(attempts=1)
MIB = 1 << 20


def shape(**changes: Any) -> Shape:
    fields = {"num_layers": 1, "num_kv_heads": 1, "head_dim": 1, "num_q_heads": 0, "capacity": 1, "sink_tokens": 0}
    return Shape(**{**fields, "dtype": "float16", "page_size": 64, "rollback": 64, **changes})


@given(
    num_layers=st.integers(1, 1024),
    num_kv_heads=st.integers(1, 1024),
    head_dim=st.integers(1, 256),
    capacity=st.integers(1, 1 << 24),
    page_size=st.sampled_from([8, 16, 32, 64, 128, 256]),
    rollback=st.integers(0, 1 << 16),
)
def test_what_is_reserved_covers_every_page_and_never_wraps(num_layers: int, **dims: int) -> None:
    reserved = shape(num_layers=num_layers, **dims).kv_bytes
    tokens = dims["capacity"] + dims["rollback"]
    assert reserved > num_layers * tokens * dims["num_kv_heads"] * dims["head_dim"] * 2 * 2


def test_the_largest_session_that_can_be_asked_for_is_refused_by_its_true_size() -> None:
    table = SessionTable(kv_memory=1 << 40, max_sessions=1)
    largest = shape(num_layers=1024, num_kv_heads=1024, head_dim=256, capacity=1 << 24, page_size=8, dtype="float32")
    with pytest.raises(KVBudgetError) as caught:
        table.create(Principal("somebody"), largest, 1.0)
    needed = next(int(word) for word in caught.value.message.split() if word.isdecimal())
    assert needed > 1024 * (1 << 24) * 1024 * 256 * 2 * 4
    assert table.kv_reserved == 0


def test_the_cache_never_takes_more_than_was_reserved(client: Client, qkv: Callable[..., Any]) -> None:
    session = client.create_session(2, 2, 16, capacity=100, sink_tokens=3, page_size=8)
    for layer in range(2):
        session.prefill(layer, **qkv(300))
    cache = numbaflash.RingKVCache(2, 2, 16, capacity=100, sink_tokens=3, page_size=8)
    assert cache.max_nbytes <= session.max_nbytes


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_a_device_gives_no_more_than_was_reserved_also_to_forks_and_after_some_have_ended(
    start_server: Any, qkv: Callable[..., Any], dtype: str
) -> None:
    server = start_server(backend="emulated", kv_memory="1MiB")
    table = server.server._servicer._table
    with Client(server.target, retry=ONCE) as client:
        session = client.create_session(1, 2, 32, capacity=40, page_size=8, dtype=dtype)
        session.step(0, **qkv(200, head_dim=32))
        pools = next(iter(table)).cache.pools

        def taken() -> int:
            return sum(pool.taken_nbytes for pool in pools)

        assert 0 < taken() <= session.max_nbytes == table.kv_reserved
        forks = [session.fork() for _ in range(3)]
        for seed, fork in enumerate(forks):
            fork.step(0, **qkv(200, head_dim=32, seed=seed))  # which writes to all of its pages
        most = taken()
        assert 2 * session.max_nbytes < most <= 4 * session.max_nbytes == table.kv_reserved
        for fork in forks:
            fork.close()
        assert table.kv_reserved == taken() == most  # of one pool, whose slabs stay
        fork = session.fork()
        fork.step(0, **qkv(200, head_dim=32))
        assert table.kv_reserved == taken() == most
        assert table.kv_left == MIB - most  # and what is left is all that others may have
        for one in (fork, session):
            one.close()
        assert table.kv_left == MIB


def test_sessions_share_a_hard_budget_and_give_it_back(start_server: Any) -> None:
    server = start_server(kv_memory=2 * MIB)
    with Client(server.target, retry=ONCE) as client:
        held = [client.create_session(1, 4, 64, capacity=512) for _ in range(3)]
        with pytest.raises(KVBudgetError) as caught:
            client.create_session(1, 4, 64, capacity=512)
        assert caught.value.retry_after is not None
        assert client.info().usage.kv_reserved_bytes == sum(session.max_nbytes for session in held) <= 2 * MIB
        held[0].close()
        client.create_session(1, 4, 64, capacity=512)
        for session in list(client._sessions):
            session.close()
        assert client.info().usage.kv_reserved_bytes == 0


def test_a_session_that_will_never_fit_is_not_worth_a_retry(start_server: Any) -> None:
    with Client(start_server(kv_memory=2 * MIB).target) as client:
        with pytest.raises(KVBudgetError) as caught:
            client.create_session(32, 8, 128, capacity=4096)
        assert caught.value.retry_after is None


def test_the_number_of_sessions_is_bounded(start_server: Any) -> None:
    with Client(start_server(max_sessions=2).target, retry=ONCE) as client:
        for _ in range(2):
            client.create_session(1, 1, 16, capacity=8)
        with pytest.raises(QuotaError):
            client.create_session(1, 1, 16, capacity=8)


def test_waiting_steps_are_bounded_by_number_and_by_bytes(
    start_server: Any, connect_stock: Any, qkv: Callable[..., Any], step_request: Any
) -> None:
    for limit in ({"max_queued_steps": 2}, {"max_queued_bytes": MIB}):
        server = start_server(**limit)
        stock = connect_stock(server)
        sessions = [stock.new_session(capacity=4096) for _ in range(3)]
        requests = [step_request(session_id, qkv(1200, q_heads=2)) for session_id in sessions]
        assert requests[0].ByteSize() * 2 < MIB < requests[0].ByteSize() * 3
        with server.engine_held():
            calls = [stock.Prefill.future(request) for request in requests[:2]]
            server.wait_for_queue(2)
            error = refusal(stock.Prefill, requests[2])
            assert isinstance(error, QueueFullError)
            assert error.retry_after is not None
        assert [call.result(timeout=20).position for call in calls] == [1200, 1200]
        assert stock.Prefill(requests[2]).position == 1200
        assert server.engine.nbytes == 0


def test_answers_that_are_kept_are_bounded_and_nothing_is_written_where_they_do_not_fit(
    start_server: Any, qkv: Callable[..., Any]
) -> None:
    server = start_server(replay_memory=MIB)
    with Client(server.target, retry=ONCE) as client:
        sessions = [client.create_session(1, 2, 64, capacity=4096) for _ in range(3)]
        prompt = qkv(400, head_dim=64)
        for session in sessions[:2]:
            session.prefill(0, **prompt)
        with pytest.raises(KVBudgetError, match="kept for replay"):
            sessions[2].prefill(0, **prompt)
        assert sessions[2].length(0) == 0
        assert client.info().usage.replay_bytes <= MIB
        sessions[0].decode(0, **qkv(1, head_dim=64))  # a layer's next step lets its last answer go
        assert sessions[2].prefill(0, **prompt).shape == (400, 4, 64)
        for session in sessions:
            session.close()
        assert client.info().usage.replay_bytes == 0


def test_an_idle_session_ends_after_its_time_to_live_and_its_error_says_so(
    start_server: Any, qkv: Callable[..., Any]
) -> None:
    server = start_server()
    with Client(server.target, retry=ONCE) as client:
        idle = client.create_session(1, 2, 16, capacity=64, ttl=0.01)
        other = client.create_session(1, 2, 16, capacity=64)
        server.wait_until(lambda: server.server._servicer._table.kv_reserved == other.max_nbytes)
        with pytest.raises(SessionExpiredError, match=r"0\.01 s"):
            idle.step(0, **qkv(1))
        idle.close()  # gone already: fine
        assert [session.session_id for session in client.list_sessions()] == [other.id]


def test_a_step_renews_the_time_to_live_and_one_in_flight_holds_the_session(
    start_server: Any, connect_stock: Any, qkv: Callable[..., Any], step_request: Any
) -> None:
    server = start_server()
    stock = connect_stock(server)
    session_id = stock.new_session()
    table = server.server._servicer._table
    with server.engine_held():
        call = stock.Decode.future(step_request(session_id, qkv(1)))
        server.wait_for_queue(1)
        (session,) = table
        session.expires = time.monotonic()  # its time is over
        assert table.end_idle() == []
    assert call.result(timeout=20).position == 1
    assert session.expires > time.monotonic()
    assert table.end_idle() == []
    assert list(table) == [session]


def test_a_time_to_live_beyond_the_servers_is_refused(start_server: Any) -> None:
    with (
        Client(start_server(max_ttl=100.0).target) as client,
        pytest.raises(ServiceError, match="at most 100 s") as caught,
    ):
        client.create_session(1, 2, 16, capacity=64, ttl=101)
    assert caught.value.reason == "BAD_TENSOR"


def test_what_is_due_each_second_goes_on_after_a_failure(start_server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    server = start_server()
    memory, failures = server.server._servicer._memory, []

    async def fail() -> None:
        failures.append(1)
        raise RuntimeError("on purpose")

    monkeypatch.setattr(memory, "relieve", fail)
    with Client(server.target, retry=ONCE) as client:
        server.wait_until(lambda: bool(failures))
        client.create_session(1, 2, 16, capacity=64, ttl=0.01)
        server.wait_until(lambda: not len(server.server._servicer._table))

"""The memory budget holds: idle sessions go to disk and come back, or end with a notice; none in use goes."""

from __future__ import annotations

import asyncio
import errno
import re
import time
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from numbaflash_service import Client, RetryPolicy, life, records
from numbaflash_service.errors import (
    BusyError,
    KVBudgetError,
    SessionEvictedError,
    SessionExpiredError,
)
from numbaflash_service.sessions import SessionTable
from numbaflash_service.to_the_end import to_the_end
from numbaflash_service.v1 import attention_pb2 as pb

from .plain_calls import refusal
from .twins import KV_MEMORY, SHAPE, Twin, tokens

ONCE = RetryPolicy(attempts=1)


@pytest.fixture
def spilling(start_server: Any, tmp_path: Path) -> Any:
    def start(**config: Any) -> Any:
        defaults = {"kv_memory": KV_MEMORY, "spill_dir": tmp_path / "spill", "spill_after": 0.0, "kv_high_water": 1.0}
        return start_server(**defaults | config)

    return start


def spilled(client: Client) -> dict[str, bool]:
    return {session.session_id: session.spilled for session in client.list_sessions()}


def test_more_sessions_than_fit_are_served_and_none_notices(spilling: Any) -> None:
    server = spilling()
    with Client(server.target) as client:
        twins = [Twin(client, stream=bool(i % 2)) for i in range(5)]
        for turn in range(4):
            for seed, twin in enumerate(twins):
                twin.step(40 if turn == 0 else 1, seed=10 * turn + seed)
                assert client.info().usage.kv_reserved_bytes <= KV_MEMORY
        usage = client.info().usage
        assert (usage.sessions, usage.spilled_sessions) == (5, 4 if usage.kv_reserved_bytes < KV_MEMORY / 2 else 3)
        assert 0 < usage.spilled_bytes <= usage.spill_memory_bytes
        for twin in twins:
            twin.session.close()
        usage = client.info().usage
        assert (usage.kv_reserved_bytes, usage.spilled_bytes, usage.spilled_sessions) == (0, 0, 0)


def test_the_least_recently_used_goes_first(spilling: Any) -> None:
    with Client(spilling().target) as client:
        first, second = Twin(client), Twin(client)
        second.step()
        first.step()
        third = Twin(client)
        assert spilled(client) == {first.session.id: False, second.session.id: True, third.session.id: False}


def test_above_the_high_water_mark_idle_sessions_go_before_they_must(spilling: Any) -> None:
    server = spilling(kv_high_water=0.7, spill_after=0.2)
    with Client(server.target) as client:
        twins = [Twin(client), Twin(client)]
        server.wait_until(lambda: sum(session.spilled is not None for session in server.server._servicer._table) == 1)
        for twin in twins:
            twin.step(3)


def test_everything_a_client_can_do_brings_a_session_back(spilling: Any) -> None:
    server = spilling()
    with Client(server.target) as client:
        twin, other = Twin(client), Twin(client)
        twin.step(30)

        def spill() -> None:
            other.step()
            Twin(client).session.close()
            assert spilled(client)[twin.session.id]

        spill()
        child, cache = twin.session.fork(), twin.cache.fork()
        other.session.close()
        other = Twin(client)
        child.close()
        other.session.close()
        other = Twin(client)
        spill()
        twin.session.truncate(20)
        twin.cache.truncate(20)
        twin.step()
        spill()
        assert twin.session.snapshot("a") == 21
        restored = client.restore("a")
        assert [restored.length(layer) for layer in range(2)] == [21, 21]
        arrays = tokens(1, seed=3)
        assert restored.step(0, **arrays).tobytes() == twin.session.step(0, **arrays).tobytes()
        del cache


def test_a_session_with_a_step_in_flight_never_goes(spilling: Any, connect_stock: Any, step_request: Any) -> None:
    server = spilling(evict_after=0.0)
    stock = connect_stock(server)
    ids = [stock.new_session(**SHAPE) for _ in range(2)]
    with Client(server.target, retry=ONCE) as client:
        with server.engine_held():
            steps = [stock.Prefill.future(step_request(session_id, tokens(3))) for session_id in ids]
            server.wait_for_queue(2)
            with pytest.raises(KVBudgetError) as caught:
                client.create_session(**SHAPE)
            assert caught.value.retry_after
        assert [step.result(timeout=20).position for step in steps] == [3, 3]
        client.create_session(**SHAPE)
        assert sorted(spilled(client).values()) == [False, False, True]


def test_a_session_that_is_wanted_while_it_is_written_stays(
    spilling: Any, connect_stock: Any, step_request: Any
) -> None:
    server = spilling()
    stock = connect_stock(server)
    session_id, other = (stock.new_session(**SHAPE) for _ in range(2))
    stock.Prefill(step_request(other, tokens(3)))
    servicer = server.server._servicer
    session = servicer._table._sessions[session_id]
    with server.engine_held():  # which the spill asks for the answers
        creating = stock.CreateSession.future(pb.CreateSessionRequest(shape=pb.SessionShape(**SHAPE)))
        server.wait_until(lambda: session.work is not None)
        step = stock.Prefill.future(step_request(session_id, tokens(5)))
        server.wait_until(lambda: session.in_flight == 1)
    assert step.result(timeout=20).position == 5
    assert creating.result(timeout=20).session_id  # the other one went in its place
    assert session.spilled is None
    assert servicer._table._sessions[other].spilled
    assert len(list(servicer._spill.files())) == 1


def test_without_a_folder_the_idle_end_with_a_notice(start_server: Any) -> None:
    server = start_server(kv_memory=KV_MEMORY, kv_high_water=1.0, evict_after=0.3)
    with Client(server.target) as client:
        idle, used = Twin(client), Twin(client)
        until = time.monotonic() + 0.35
        while time.monotonic() < until:
            used.step()
        before = time.time()
        Twin(client)
        with pytest.raises(SessionEvictedError) as caught:
            idle.step()
        assert "it made room for another" in caught.value.message
        ended = re.search(r"ended at (\S+): idle", caught.value.message)
        assert before - 1.0 < datetime.fromisoformat(ended[1]).timestamp() <= time.time()
        used.step()


def test_above_the_high_water_mark_the_idle_end_where_there_is_no_folder(start_server: Any) -> None:
    server = start_server(kv_memory=KV_MEMORY, kv_high_water=0.7, evict_after=0.2)
    with Client(server.target) as client:
        idle, _ = Twin(client), Twin(client)
        server.wait_until(lambda: len(server.server._servicer._table) == 1)
        with pytest.raises(SessionEvictedError, match="the memory was nearly full"):
            idle.step()


def test_while_the_folder_cannot_be_written_nobody_is_ended_in_advance(
    spilling: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = spilling(kv_high_water=0.0, evict_after=0.0)
    memory = server.server._servicer._memory
    monkeypatch.setattr(records, "write", _full_disk)
    with Client(server.target) as client:
        twin = Twin(client)
        server.wait_until(lambda: memory._paused_until > 0)
        for _ in range(2):
            server.on_loop(memory.relieve())
        twin.step()


def _full_disk(*_: object) -> int:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_nobody_is_ended_who_has_just_been_there(start_server: Any) -> None:
    server = start_server(kv_memory=KV_MEMORY, evict_after=30.0)
    with Client(server.target, retry=ONCE) as client:
        twins = [Twin(client), Twin(client)]
        with pytest.raises(KVBudgetError) as caught:
            client.create_session(**SHAPE)
        assert 0 < caught.value.retry_after <= 1.0
        for twin in twins:
            twin.step()


def test_a_session_larger_than_the_memory_puts_nobody_out(spilling: Any) -> None:
    with Client(spilling().target, retry=ONCE) as client:
        twin = Twin(client)
        with pytest.raises(KVBudgetError) as caught:
            client.create_session(**SHAPE | {"num_layers": 8})
        assert caught.value.retry_after is None
        assert not spilled(client)[twin.session.id]


def test_time_to_live_counts_on_disk_too(spilling: Any) -> None:
    server = spilling()
    table = server.server._servicer._table
    with Client(server.target) as client:
        short = Twin(client, ttl=100.0)
        short.step()
        (session,) = table
        ends = session.expires
        others = [Twin(client) for _ in range(2)]
        assert spilled(client)[short.session.id]
        assert session.expires == ends
        session.expires -= 100.0  # so much later
        server.wait_until(lambda: len(table) == 2)
        with pytest.raises(SessionExpiredError, match="it ended at 2"):
            short.session.step(0, **tokens(1))
        server.wait_until(lambda: server.server._servicer._spill.nbytes == 0)
        for twin in others:
            twin.step()


def test_the_folder_has_a_budget_of_its_own(spilling: Any) -> None:
    server = spilling(spill_memory=1 << 20, evict_after=0.0)
    with Client(server.target) as client:
        twins = []
        for seed in range(5):
            twins.append(Twin(client))
            twins[-1].step(600, seed)
            twins[-1].step(1, seed)
            assert client.info().usage.spilled_bytes <= 1 << 20
        outcomes = []
        for twin in twins:
            try:
                twin.step()
                outcomes.append("here")
            except SessionEvictedError as error:
                outcomes.append("room on disk" if "it made room on disk" in error.message else error.message)
        assert outcomes[:2] == ["room on disk"] * 2
        assert outcomes[-1] == "here"


def test_steps_of_a_stream_wait_for_their_session_in_order(
    spilling: Any, connect_stock: Any, step_request: Any
) -> None:
    server = spilling()
    stock = connect_stock(server)
    session_id = stock.new_session(**SHAPE)
    stock.Prefill(step_request(session_id, tokens(10)))
    for _ in range(2):
        stock.new_session(**SHAPE)
    assert server.server._servicer._table._sessions[session_id].spilled
    requests = [step_request(session_id, tokens(1), position=10 + i, request_id=str(i)) for i in range(8)]
    assert [answer.position for answer in stock.Attend(iter(requests))] == list(range(11, 19))


def test_a_step_that_waits_for_its_session_keeps_other_calls_off(
    spilling: Any, connect_stock: Any, step_request: Any
) -> None:
    server = spilling()
    stock = connect_stock(server)
    session_id, *_ = (stock.new_session(**SHAPE) for _ in range(3))
    with server.engine_held():
        step = stock.Prefill.future(step_request(session_id, tokens(3)))
        server.wait_for_queue(1)
        for method, request in (
            (stock.Prefill, step_request(session_id, tokens(3), request_id="other")),
            (stock.Truncate, pb.TruncateRequest(session_id=session_id)),
            (stock.Fork, pb.ForkRequest(session_id=session_id)),
        ):
            assert isinstance(refusal(method, request), BusyError)
    assert step.result(timeout=20).position == 3


def test_a_session_closed_on_its_way_leaves_no_bytes_behind(
    spilling: Any, connect_stock: Any, step_request: Any
) -> None:
    server = spilling()
    stock = connect_stock(server)
    session_id, *others = (stock.new_session(**SHAPE) for _ in range(3))
    with server.engine_held():
        step = stock.Prefill.future(step_request(session_id, tokens(3)))
        server.wait_for_queue(1)
        closing = stock.CloseSession.future(pb.CloseSessionRequest(session_id=session_id))
        server.wait_until(lambda: session_id not in server.server._servicer._table._sessions)
    closing.result(timeout=20)
    assert refusal(step.result, timeout=20).reason == "SESSION_UNKNOWN"
    for other in others:
        stock.CloseSession(pb.CloseSessionRequest(session_id=other))
    usage = stock.GetInfo(pb.GetInfoRequest()).usage
    assert (usage.kv_reserved_bytes, usage.spilled_bytes, usage.queued_steps) == (0, 0, 0)


def test_a_session_put_out_for_a_call_that_went_away_gives_its_bytes_back(
    start_server: Any, connect_stock: Any
) -> None:
    server = start_server(kv_memory=KV_MEMORY, kv_high_water=1.0, evict_after=0.0)
    stock, servicer = connect_stock(server), server.server._servicer
    for _ in range(2):
        stock.new_session(**SHAPE)
    with server.engine_held():  # which lets go of the session's cache
        creating = stock.CreateSession.future(pb.CreateSessionRequest(shape=pb.SessionShape(**SHAPE)))
        server.wait_until(lambda: len(servicer._table) == 1)
        creating.cancel()
        server.wait_until(lambda: servicer._door.calls.used == 0)
    (left,) = servicer.sessions()
    server.wait_until(lambda: servicer._table.kv_reserved == left.kv_bytes)


def test_a_call_that_comes_just_when_its_session_is_put_out_finds_it_ended(
    start_server: Any, connect_stock: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = start_server(kv_memory=KV_MEMORY, kv_high_water=1.0, evict_after=0.0)
    stock, memory = connect_stock(server), server.server._servicer._memory
    session_id = stock.new_session(**SHAPE)

    async def put_out_meanwhile(operation: Any, **undo: Any) -> Any:
        """The call has found its session, and somebody who needs all memory is a step before it."""
        putting_out = asyncio.ensure_future(memory.make_room(KV_MEMORY))
        try:
            return await to_the_end(operation, **undo)
        finally:
            await putting_out

    monkeypatch.setattr(life, "to_the_end", put_out_meanwhile)
    error = refusal(stock.Fork, pb.ForkRequest(session_id=session_id), timeout=20)
    assert isinstance(error, SessionEvictedError)
    assert stock.new_session(**SHAPE)


def test_bytes_are_counted_while_the_engine_lets_go_of_a_cache() -> None:
    class Leaving:
        """A session whose cache is gone when it is looked at again."""

        def __init__(self) -> None:
            self.id, self.kv_bytes = "leaving", 100
            self._caches = [SimpleNamespace(pools=())]

        @property
        def cache(self) -> Any:
            return self._caches.pop() if self._caches else None

    table = SessionTable(1000, 10)
    leaving: Any = Leaving()
    table._holding["leaving"] = leaving
    assert table.kv_reserved == 100

"""Flow control: bounds on what is under way, shared by all callers, and what is told to those who have to wait."""

from __future__ import annotations

import hashlib
import queue
from collections import deque
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from numbaflash_service import principals
from numbaflash_service.errors import QueueFullError, QuotaError, from_call
from numbaflash_service.limits import Limit
from numbaflash_service.principals import Principal, TokenBucket
from numbaflash_service.turns import Turns
from numbaflash_service.v1 import attention_pb2 as pb

from .plain_calls import refusal

ALICE, BOB, CAROL = PRINCIPALS = [Principal(name) for name in ("alice", "bob", "carol")]


def fill(limit: Limit, *principals: Principal, amount: int = 1) -> dict[str, int]:
    """Let callers take in turns until nobody may any more; return what each got."""
    taken = dict.fromkeys([principal.name for principal in principals], 0)
    waiting = list(principals)
    while waiting:
        for principal in list(waiting):
            try:
                limit.check(principal, amount, 0.1)
            except QueueFullError:
                waiting.remove(principal)
            else:
                limit.take(principal, amount)
                taken[principal.name] += amount
    return taken


def test_one_caller_of_several_leaves_as_much_as_it_takes() -> None:
    limit = Limit(256, "steps", shared=True)
    assert fill(limit, ALICE) == {"alice": 128}
    assert fill(limit, BOB) == {"bob": 64}
    assert fill(Limit(256, "steps", shared=True), *PRINCIPALS) == {"alice": 64, "bob": 64, "carol": 64}
    assert fill(Limit(256, "steps", shared=False), ALICE) == {"alice": 256}


def test_what_is_larger_than_the_limit_passes_alone() -> None:
    for shared in (True, False):
        limit = Limit(100, "bytes", shared=shared)
        limit.check(ALICE, 1000, 0.1)
        limit.take(ALICE, 1000)
        for principal in (ALICE, BOB):
            with pytest.raises(QueueFullError):
                limit.check(principal, 1, 0.1)
        limit.give_back(ALICE, 1000)
        limit.check(BOB, 1000, 0.1)


@given(
    moves=st.lists(st.tuples(st.sampled_from(PRINCIPALS), st.integers(1, 40), st.booleans())),
    most=st.integers(40, 100),
    shared=st.booleans(),
)
def test_a_limit_is_never_passed_and_all_comes_back(
    moves: list[tuple[Principal, int, bool]], most: int, shared: bool
) -> None:
    limit = Limit(most, "steps", shared=shared)
    held: list[tuple[Principal, int]] = []
    for principal, amount, giving in moves:
        if giving and held:
            limit.give_back(*held.pop(0))
        else:
            try:
                limit.check(principal, amount, 0.1)
            except QueueFullError:
                continue
            limit.take(principal, amount)
            held.append((principal, amount))
        assert limit.used == sum(amount for _, amount in held) <= most
    while held:
        limit.give_back(*held.pop())
    assert limit.used == 0
    assert not limit._of


def test_calls_under_way_are_bounded_streams_included(
    start_server: Any, connect_stock: Any, qkv: Any, step_request: Any
) -> None:
    server = start_server(max_calls=2)
    stock = connect_stock(server)
    session_id, requests = stock.new_session(), queue.SimpleQueue()
    stream = stock.Attend(iter(requests.get, None))
    with server.engine_held():
        requests.put(step_request(session_id, qkv(1)))
        creating = stock.CreateSession.future(
            pb.CreateSessionRequest(shape=pb.SessionShape(num_layers=1, num_kv_heads=1, head_dim=8, capacity=8))
        )
        calls = server.server._servicer._door.calls
        server.wait_until(lambda: calls.used == 2)
        error = refusal(stock.GetInfo, pb.GetInfoRequest())
        assert isinstance(error, QueueFullError)
        assert error.retry_after
    creating.result(timeout=20)
    assert next(stream).position == 1
    stock.GetInfo(pb.GetInfoRequest())
    requests.put(None)
    assert list(stream) == []
    server.wait_until(lambda: calls.used == 0)


# -- turns -----------------------------------------------------------------------------------------------------------

Item = tuple[Principal | None, int]


@given(items=st.lists(st.tuples(st.sampled_from([*PRINCIPALS, None]), st.just(0)), max_size=40))
def test_turns_keep_every_callers_own_order_and_pass_nothing_that_is_nobodys(items: list[Item]) -> None:
    items = [(principal, number) for number, (principal, _) in enumerate(items)]
    waiting = deque(items)
    Turns[Item](lambda item: item[0]).arrange(waiting)
    assert sorted(number for _, number in waiting) == list(range(len(items)))
    barrier = next((number for principal, number in items if principal is None), len(items))
    assert list(waiting)[barrier:] == items[barrier:]
    for principal in PRINCIPALS:
        numbers = [number for owner, number in waiting if owner is principal]
        assert numbers == sorted(numbers)


@given(
    costs=st.lists(st.sampled_from([0.001, 0.01, 0.1, 1.0]), min_size=3, max_size=3),
    backlog=st.lists(st.integers(0, 60), min_size=3, max_size=3),
    pause=st.floats(0, 1000),
)
def test_callers_that_wait_get_equal_time_whatever_their_steps_cost_and_whoever_was_away(
    costs: list[float], backlog: list[int], pause: float
) -> None:
    turns = Turns[Item](lambda item: item[0])
    turns.arrange(deque([(ALICE, 0)]))
    turns.charge([(ALICE, 0)], pause)  # the others were away meanwhile
    waiting = deque((principal, i) for principal, count in zip(PRINCIPALS, backlog, strict=True) for i in range(count))
    cost = dict(zip(PRINCIPALS, costs, strict=True))
    had = dict.fromkeys(PRINCIPALS, 0.0)
    while waiting:
        turns.arrange(waiting)
        first = waiting.popleft()
        turns.charge([first], cost[first[0]])
        had[first[0]] += cost[first[0]]
        waiters = {owner for owner, _ in waiting} - {ALICE}
        if len(waiters) == 2:
            assert abs(had[BOB] - had[CAROL]) <= max(cost[BOB], cost[CAROL]) + 1e-9


@pytest.fixture
def two_callers(start_server: Any, connect_stock: Any, tmp_path: Path) -> Callable[..., tuple[Any, Any, Any]]:
    def start(**config: Any) -> tuple[Any, Any, Any]:
        names = ("alice", "bob")
        lines = (f"{name} sha256:{hashlib.sha256(name.encode()).hexdigest()}\n" for name in names)
        (tmp_path / "tokens").write_text("".join(lines))
        server = start_server(auth_tokens=tmp_path / "tokens", **config)
        return server, *(connect_stock(server, token=name) for name in names)

    return start


def test_a_caller_that_floods_the_queue_holds_up_nobody_else(two_callers: Any, qkv: Any, step_request: Any) -> None:
    server, alice, bob = two_callers(max_batch=1)
    flood = [alice.new_session() for _ in range(20)]
    session_id = bob.new_session()
    owners: list[str] = []
    launch = server.engine._launch

    def watch(steps: list[Any]) -> Any:
        owners.extend(step.session.owner.name for step in steps)
        return launch(steps)

    server.engine._launch = watch
    with server.engine_held():
        calls = []
        for number, flooded in enumerate(flood, 1):
            calls.append(alice.Prefill.future(step_request(flooded, qkv(100))))
            server.wait_for_queue(number)
        calls.append(bob.Decode.future(step_request(session_id, qkv(1))))
        server.wait_for_queue(21)
        creating = bob.CreateSession.future(
            pb.CreateSessionRequest(shape=pb.SessionShape(num_layers=1, num_kv_heads=1, head_dim=8, capacity=8))
        )
        server.wait_until(lambda: server.server._servicer._door.calls.used == 22)
    creating.result(timeout=20)
    assert owners.index("bob") <= 1
    assert [call.result(timeout=20).position for call in calls] == [100] * 20 + [1]


def test_one_caller_cannot_fill_the_queue(two_callers: Any, qkv: Any, step_request: Any) -> None:
    server, alice, bob = two_callers(max_queued_steps=8)
    sessions = [alice.new_session() for _ in range(5)]
    session_id = bob.new_session()
    with server.engine_held():
        calls = []
        for number, flooded in enumerate(sessions[:4], 1):
            calls.append(alice.Decode.future(step_request(flooded, qkv(1))))
            server.wait_for_queue(number)
        error = refusal(alice.Decode, step_request(sessions[4], qkv(1)))
        assert isinstance(error, QueueFullError)
        assert "by this caller" in error.message
        calls.append(bob.Decode.future(step_request(session_id, qkv(1))))
        server.wait_for_queue(5)
    assert [call.result(timeout=20).position for call in calls] == [1] * 5


def test_a_step_that_waited_too_long_is_refused_and_changes_nothing(
    start_server: Any, connect_stock: Any, qkv: Any, step_request: Any
) -> None:
    server = start_server(max_queue_time=60.0)
    stock = connect_stock(server)
    session_id = stock.new_session()
    with server.engine_held():
        call = stock.Decode.future(step_request(session_id, qkv(1)))
        server.wait_for_queue(1)
        server.submitted[-1].arrived_ns -= int(60e9)  # so long ago
    error = from_call(call.exception(timeout=20))
    assert isinstance(error, QueueFullError)
    assert error.retry_after
    assert stock.Decode(step_request(session_id, qkv(1), request_id="again")).position == 1


# -- quotas ----------------------------------------------------------------------------------------------------------


def test_every_caller_has_a_share_of_sessions_and_of_their_memory(two_callers: Any) -> None:
    for quota in ({"quota_sessions": 2}, {"quota_kv_memory": 200_000}):
        server, alice, bob = two_callers(**quota)
        held = [alice.new_session() for _ in range(2)]
        error = refusal(alice.new_session)
        assert (error.reason, error.code) == ("QUOTA", grpc.StatusCode.RESOURCE_EXHAUSTED)
        assert 0.1 <= (error.retry_after or 0) <= 10.0
        bob.new_session()
        alice.CloseSession(pb.CloseSessionRequest(session_id=held[0]))
        alice.new_session()
        principals = {session.owner.name: session.owner for session in server.server._servicer._table}
        assert {name: owner.sessions for name, owner in principals.items()} == {"alice": 2, "bob": 1}


def test_a_session_larger_than_a_callers_share_is_not_worth_a_retry(two_callers: Any) -> None:
    _, alice, _ = two_callers(quota_kv_memory=100_000)
    error = refusal(alice.new_session, capacity=4096)
    assert (error.reason, error.retry_after) == ("QUOTA", None)


def test_a_caller_is_told_to_wait_until_its_tokens_have_come(
    two_callers: Any, qkv: Any, step_request: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr(principals, "time", SimpleNamespace(monotonic=lambda: now))
    _, alice, bob = two_callers(quota_tokens_per_second=10.0)
    session_id, other = alice.new_session(), bob.new_session()
    request = step_request(session_id, qkv(60))
    alice.Prefill(request)  # 60 of one layer of two: 30 tokens, of which one second's 10 were there
    error = refusal(alice.Decode, step_request(session_id, qkv(1), position=60, request_id="next"))
    assert (error.reason, error.retry_after) == ("QUOTA", pytest.approx(2.0))
    bob.Prefill(step_request(other, qkv(60)))
    now += 1.5
    error = refusal(alice.Decode, step_request(session_id, qkv(1), position=60, request_id="next"))
    assert error.retry_after == pytest.approx(0.5)
    now += error.retry_after
    assert alice.Prefill(request).replayed  # costs nothing
    for position in range(60, 63):
        alice.Decode(step_request(session_id, qkv(1), position=position, request_id=f"{position}"))
        now += 0.06
    refusal(alice.Decode, step_request(session_id, qkv(1, head_dim=8), position=63))  # nor does what fails
    alice.Decode(step_request(session_id, qkv(1), position=63, request_id="last"))


@given(steps=st.lists(st.tuples(st.floats(0, 2), st.floats(0.01, 50)), max_size=60), rate=st.floats(0.5, 100))
def test_the_rate_holds_in_the_long_run_and_whoever_waits_as_told_is_let_in(
    steps: list[tuple[float, float]], rate: float
) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        now = 0.0
        monkeypatch.setattr(principals, "time", SimpleNamespace(monotonic=lambda: now))
        bucket, taken, largest = TokenBucket(rate), 0.0, 0.0
        for pause, tokens in steps:
            now += pause
            try:
                bucket.check()
            except QuotaError as error:
                now += (error.retry_after or 0.0) + 1e-9
                bucket.check()
            bucket.take(tokens)
            taken, largest = taken + tokens, max(largest, tokens)
            assert taken <= rate * (now + 1.0) + largest + 1e-6

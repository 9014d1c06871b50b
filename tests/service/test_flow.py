"""Flow control: bounds on what is under way, shared by all callers, and what is told to those who have to wait."""

from __future__ import annotations

import queue
from typing import Any

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from numbaflash_service.errors import QueueFullError, from_call
from numbaflash_service.limits import Limit
from numbaflash_service.principals import Principal
from numbaflash_service.v1 import attention_pb2 as pb

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
        with pytest.raises(grpc.RpcError) as caught:
            stock.GetInfo(pb.GetInfoRequest())
        error = from_call(caught.value)
        assert isinstance(error, QueueFullError)
        assert error.retry_after
    creating.result(timeout=20)
    assert next(stream).position == 1
    stock.GetInfo(pb.GetInfoRequest())
    requests.put(None)
    assert list(stream) == []
    server.wait_until(lambda: calls.used == 0)

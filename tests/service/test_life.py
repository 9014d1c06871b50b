"""Fork and Truncate: what they do to a session, to its retries, and to steps that arrive late."""

from __future__ import annotations

import asyncio
import contextlib
import gc
from typing import Any

import grpc
import numpy as np
import pytest

import numbaflash
from numbaflash_service import Client, RetryPolicy
from numbaflash_service.errors import (
    BadTensorError,
    BusyError,
    KVBudgetError,
    PositionMismatchError,
    ServiceError,
    SessionUnknownError,
)
from numbaflash_service.v1 import attention_pb2 as pb

from .plain_calls import refusal

SHAPE = {"num_layers": 2, "num_kv_heads": 2, "head_dim": 16, "capacity": 64, "dtype": "float32"}


def pair(client: Client, **changes: Any) -> tuple[Any, numbaflash.RingKVCache]:
    """A session and a cache, alike."""
    return client.create_session(**SHAPE | changes), numbaflash.RingKVCache(**SHAPE | changes)


def step_both(forms: tuple[Any, Any], layer: int, arrays: dict[str, np.ndarray]) -> None:
    over_wire, in_process = (form.step(layer, **arrays) for form in forms)
    assert over_wire.tobytes() == in_process.tobytes()


def same_place(session: Any, cache: Any) -> bool:
    return all(
        (session.length(layer), session.first(layer)) == (cache.length(layer), cache.first(layer))
        for layer in range(session.num_layers)
    )


def test_a_child_holds_the_same_tokens_and_both_go_their_own_way(client: Client, qkv: Any) -> None:
    session, cache = pair(client, sink_tokens=2, page_size=8)
    for layer in range(2):
        step_both((session, cache), layer, qkv(70 + layer))
    children = session.fork(), cache.fork()
    assert same_place(*children)
    assert children[0].id != session.id
    for seed, forms in enumerate(((session, cache), children)):
        for tokens in (1, 30):
            step_both(forms, 0, qkv(tokens, seed=seed))
    session.close()
    step_both(children, 1, qkv(3, seed=5))


def test_a_fork_reserves_memory_like_a_session_of_its_own(start_server: Any) -> None:
    server = start_server(kv_memory=2 << 20)
    with Client(server.target, retry=RetryPolicy(attempts=1)) as client:
        session = client.create_session(1, 2, 64, capacity=1600)
        session.fork()
        before = client.info().usage
        with pytest.raises(KVBudgetError):
            session.fork()
        assert client.info().usage == before
        assert before.kv_reserved_bytes == 2 * session.max_nbytes


def test_truncated_sessions_go_on_as_truncated_caches(client: Client, qkv: Any) -> None:
    forms = pair(client, capacity=32, sink_tokens=3, page_size=8, rollback=10)
    for tokens, back in ((50, 7), (4, 4), (1, 0), (20, 10)):
        for layer in range(2):
            step_both(forms, layer, qkv(tokens, seed=layer))
        length = forms[1].length(0) - back
        for form in forms:
            form.truncate(length)
        assert same_place(*forms)


@pytest.mark.parametrize("length", [0, 39, 51, 2**63])
def test_a_length_that_cannot_be_is_refused_and_changes_nothing(client: Client, qkv: Any, length: int) -> None:
    forms = pair(client, capacity=32, page_size=8, rollback=10)
    for layer in range(2):
        step_both(forms, layer, qkv(50))
    for form in forms:
        with pytest.raises(ValueError, match="length"):
            form.truncate(length)
    assert same_place(*forms)
    step_both(forms, 0, qkv(1))


@pytest.mark.parametrize(
    ("name", "wrong"), [("layer", 2), ("layer", -1), ("layer", True), ("length", -1), ("length", 1.0)]
)
def test_numbers_are_refused_as_by_a_cache(client: Client, qkv: Any, name: str, wrong: object) -> None:
    refusals = []
    for form in pair(client):
        form.step(0, **qkv(1))
        with pytest.raises((TypeError, ValueError), match=f"{name} must be") as caught:
            form.truncate(wrong) if name == "length" else form.length(wrong)
        refusals.append((caught.type, str(caught.value)))
        assert form.length(0) == 1
    assert refusals[0] == refusals[1]


def test_a_truncation_sent_again_is_answered_again_and_takes_nothing_more(
    stock: Any, qkv: Any, step_request: Any
) -> None:
    session_id = stock.new_session(num_layers=1)
    stock.Prefill(step_request(session_id, qkv(8)))
    truncate = pb.TruncateRequest(session_id=session_id, length=5)
    first, again = stock.Truncate(truncate), stock.Truncate(truncate)
    assert (first.epoch, first.first, first.replayed) == (1, 0, False)
    assert (again.epoch, again.first, again.replayed) == (1, 0, True)
    step = step_request(session_id, qkv(3), position=5, request_id="next")
    step.options.epoch = 1
    assert stock.Prefill(step).position == 8
    assert stock.Truncate(truncate).replayed  # as one that was under way for long
    step.position, step.request_id = 8, "after"
    assert stock.Prefill(step).position == 11


def test_a_step_that_arrives_after_its_position_was_freed_again_is_refused(
    stock: Any, qkv: Any, step_request: Any
) -> None:
    session_id = stock.new_session(num_layers=1)
    stock.Prefill(step_request(session_id, qkv(5), request_id="a"))
    late = step_request(session_id, qkv(1), position=5, request_id="b")
    stock.Decode(late)
    stock.Truncate(pb.TruncateRequest(session_id=session_id, length=5))
    error = refusal(stock.Decode, late)
    assert isinstance(error, PositionMismatchError)
    assert error.position == 5
    assert "epoch is 0" in error.message
    fresh = step_request(session_id, qkv(1, seed=1), position=5, request_id="c")
    fresh.options.epoch = 1
    assert not stock.Decode(fresh).replayed


def test_another_truncation_of_an_epoch_that_is_over_is_refused(stock: Any, qkv: Any, step_request: Any) -> None:
    session_id = stock.new_session(num_layers=1)
    stock.Prefill(step_request(session_id, qkv(8)))
    stock.Truncate(pb.TruncateRequest(session_id=session_id, length=6))
    assert isinstance(
        refusal(stock.Truncate, pb.TruncateRequest(session_id=session_id, length=5)), PositionMismatchError
    )
    assert isinstance(
        refusal(stock.Truncate, pb.TruncateRequest(session_id=session_id, length=6, epoch=7)), PositionMismatchError
    )
    assert stock.Truncate(pb.TruncateRequest(session_id=session_id, length=5, epoch=1)).epoch == 2


def test_answers_of_steps_that_were_taken_back_are_not_given_again(stock: Any, qkv: Any, step_request: Any) -> None:
    session_id = stock.new_session(num_layers=1)
    stock.Prefill(step_request(session_id, qkv(5), request_id="a"))
    stock.Truncate(pb.TruncateRequest(session_id=session_id, length=5))
    again = step_request(session_id, qkv(5), request_id="a")
    again.options.epoch = 1
    assert isinstance(refusal(stock.Prefill, again), PositionMismatchError)


def test_a_truncation_sent_again_just_when_it_is_done_is_answered_as_it_was(
    server: Any, stock: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    session_id = stock.new_session()
    memory = server.server._servicer._memory
    hold, waiting, first_is_done = memory.hold, [], asyncio.Event()

    @contextlib.asynccontextmanager
    async def hold_one_by_one(session: Any, call: Any) -> Any:
        """Both calls have seen the session as it was before either of them gets it."""
        waiting.append(call)
        while len(waiting) < 2:
            await asyncio.sleep(0)
        if call is waiting[1]:
            await first_is_done.wait()
        async with hold(session, call) as cache:
            yield cache
        first_is_done.set()

    monkeypatch.setattr(memory, "hold", hold_one_by_one)
    calls = [stock.Truncate.future(pb.TruncateRequest(session_id=session_id), timeout=20) for _ in range(2)]
    answers = [call.result() for call in calls]
    assert {answer.epoch for answer in answers} == {1}
    assert sorted(answer.replayed for answer in answers) == [False, True]


def test_a_child_does_not_answer_the_parents_steps(stock: Any, qkv: Any, step_request: Any) -> None:
    session_id = stock.new_session(num_layers=1)
    stock.Prefill(step_request(session_id, qkv(5), request_id="a"))
    child = stock.Fork(pb.ForkRequest(session_id=session_id))
    assert (list(child.state.lengths), child.state.epoch) == ([5], 0)
    assert isinstance(
        refusal(stock.Prefill, step_request(child.session_id, qkv(5), request_id="a")), PositionMismatchError
    )
    assert stock.Prefill(step_request(session_id, qkv(5), request_id="a")).replayed


def test_a_step_in_flight_keeps_others_from_the_session(server: Any, stock: Any, qkv: Any, step_request: Any) -> None:
    session_id = stock.new_session()
    with server.engine_held():
        step = stock.Decode.future(step_request(session_id, qkv(1)))
        server.wait_for_queue(1)
        assert isinstance(refusal(stock.Fork, pb.ForkRequest(session_id=session_id)), BusyError)
        assert isinstance(refusal(stock.Truncate, pb.TruncateRequest(session_id=session_id)), BusyError)
    assert step.result(timeout=20).position == 1


@pytest.mark.parametrize("method", ["Fork", "Truncate"])
def test_a_session_that_does_not_exist_is_unknown(stock: Any, method: str) -> None:
    request = getattr(pb, f"{method}Request")(session_id="0" * 32)
    assert isinstance(refusal(getattr(stock, method), request), SessionUnknownError)


def test_a_child_whose_caller_went_away_is_ended(server: Any, stock: Any) -> None:
    table, calls = server.server._servicer._table, server.server._servicer._door.calls
    session_id = stock.new_session()
    before = {session.id for session in table}
    with server.engine_held():
        call = stock.Fork.future(pb.ForkRequest(session_id=session_id))
        server.wait_until(lambda: len(table) > len(before))
        call.cancel()
        server.wait_until(lambda: calls.used == 0)  # the server knows that it went away
        (child,) = {session.id for session in table} - before
    server.wait_until(lambda: len(table) == len(before))
    assert isinstance(refusal(stock.Truncate, pb.TruncateRequest(session_id=child)), SessionUnknownError)
    assert stock.Truncate(pb.TruncateRequest(session_id=session_id)).epoch == 1


@pytest.mark.parametrize("method", ["CreateSession", "Fork"])
def test_a_session_closed_before_anybody_knew_of_it_has_ended_once(
    server: Any, stock: Any, caplog: pytest.LogCaptureFixture, method: str
) -> None:
    table, calls = server.server._servicer._table, server.server._servicer._door.calls
    parent = stock.new_session()
    shape = pb.SessionShape(num_layers=1, num_kv_heads=1, head_dim=8, capacity=8)
    made = {"session_id": parent} if method == "Fork" else {"shape": shape}
    before = {session.id for session in table}
    with server.engine_held():
        call = getattr(stock, method).future(getattr(pb, f"{method}Request")(**made))
        server.wait_until(lambda: len(table) > len(before))
        (new,) = {session.id for session in table} - before  # as ListSessions says
        closing = stock.CloseSession.future(pb.CloseSessionRequest(session_id=new))
        server.wait_until(lambda: len(table) == len(before))
        call.cancel()
        server.wait_until(lambda: calls.used == 1)
    closing.result(timeout=20)
    stock.CloseSession(pb.CloseSessionRequest(session_id=parent))
    assert not caplog.records


def test_a_refusal_that_nobody_waits_for_is_no_fault(server: Any, stock: Any, caplog: pytest.LogCaptureFixture) -> None:
    calls, memory = server.server._servicer._door.calls, server.server._servicer._memory
    session_id = stock.new_session()
    with server.engine_held():
        call = stock.Truncate.future(pb.TruncateRequest(session_id=session_id, length=1))
        server.wait_until(lambda: memory.holds == 1)
        call.cancel()
        server.wait_until(lambda: calls.used == 0)  # the server knows that its caller went away
    server.wait_until(lambda: memory.holds == 0)
    assert stock.Truncate(pb.TruncateRequest(session_id=session_id)).epoch == 1
    gc.collect()  # asyncio reports what nobody retrieved when it goes
    assert not caplog.records


class Forgetful:
    """Loses the answers of a method's first calls; the calls are made."""

    def __init__(self, client: Client, method: str, losses: int) -> None:
        self._calls, self._method, self._losses = client._calls, method, losses
        client._calls = self  # type: ignore[assignment]

    def __call__(self, name: str, request: bytes, timeout: float) -> bytes:
        answer = self._calls(name, request, timeout)
        if name == self._method and self._losses:
            self._losses -= 1
            raise ServiceError("the answer was lost", code=grpc.StatusCode.UNAVAILABLE)
        return answer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._calls, name)


@pytest.mark.parametrize("losses", [1, 5])
def test_a_truncation_whose_answer_is_lost_is_settled_before_the_next_call(
    client: Client, qkv: Any, losses: int
) -> None:
    forms = pair(client)
    for layer in range(2):
        step_both(forms, layer, qkv(8))
    Forgetful(client, "Truncate", losses)
    forms[1].truncate(5)
    with contextlib.suppress(ServiceError):  # where more are lost than the client tries
        forms[0].truncate(5)
    step_both(forms, 0, qkv(1))
    assert same_place(*forms)


def test_the_field_at_fault_is_named(stock: Any) -> None:
    session_id = stock.new_session()
    error = refusal(stock.Truncate, pb.TruncateRequest(session_id=session_id, length=1))
    assert isinstance(error, BadTensorError)
    assert error.field == "length"

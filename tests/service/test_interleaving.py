"""A large step does not keep others waiting: small ones go before it and between its parts, so many and no more."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import numbaflash
from numbaflash.cpu import solve
from numbaflash_service.backlog import Backlog, Errand
from numbaflash_service.principals import Principal
from numbaflash_service.steps import Step

from .plain_calls import out

SMALL = 9
ALICE, BOB = Principal("alice"), Principal("bob")


@pytest.fixture(autouse=True)
def short_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pause after every item, as after the 20 ms of a part in real life."""
    monkeypatch.setattr(solve, "_PART_FMAS", 1)


def follow(server: Any) -> list[tuple[str, ...]]:
    """Note what the engine computes, in order: the session of each step when it starts, and each pause."""
    order: list[tuple[str, ...]] = []
    launch, pause = server.engine._launch, server.engine._pause

    def launched(steps: list[Any]) -> Any:
        order.append(tuple(step.request_id for step in steps))
        return launch(steps)

    def paused(step: Any) -> None:
        order.append(("pause",))
        pause(step)

    server.engine._launch, server.engine._pause = launched, paused
    return order


def in_process(*steps: dict[str, np.ndarray]) -> np.ndarray:
    """What the last of some steps gives."""
    cache = numbaflash.RingKVCache(2, 2, 16, capacity=64, dtype="float32")
    return [cache.step(0, **step) for step in steps][-1]


def test_a_session_is_answered_while_anothers_prefill_is_computed(
    start_server: Any, connect_stock: Any, qkv: Callable[..., Any], step_request: Any
) -> None:
    server = start_server()
    stock = connect_stock(server)
    prefilled, decoding = stock.new_session(), stock.new_session()
    pause, sent, answers = server.engine._pause, [], []

    def paused(step: Any) -> None:
        if len(sent) < 3:  # a step comes during each of the first parts
            i = len(sent)
            sent.append(stock.Decode.future(step_request(decoding, qkv(1, seed=i), position=i, request_id=f"{i}")))
            while len(server.submitted) < i + 2:  # the prefill came first
                threading.Event().wait(0.001)
            pause(step)
            answers.append(sent[-1].result(timeout=20))  # while the prefill waits
        else:
            pause(step)

    server.engine._pause = paused
    prefill = stock.Prefill(step_request(prefilled, qkv(300)))
    np.testing.assert_array_equal(out(prefill), in_process(qkv(300)))
    assert len(answers) == 3
    for i, answer in enumerate(answers):
        np.testing.assert_array_equal(out(answer), in_process(*(qkv(1, seed=j) for j in range(i + 1))))
    # Each has its own time, not that of what it waited for or that went between.
    assert prefill.kernel_ns > 0


def test_small_steps_go_first_but_none_before_an_earlier_one_of_its_session(
    start_server: Any, connect_stock: Any, qkv: Callable[..., Any], step_request: Any
) -> None:
    server = start_server()
    stock = connect_stock(server)
    a, b, c = (stock.new_session() for _ in range(3))
    order, streams = follow(server), []
    requests: list[Any] = [
        step_request(a, qkv(100), request_id="prefill a"),
        step_request(a, qkv(1), position=100, request_id="decode a"),
        step_request(b, qkv(1), request_id="decode b"),
        step_request(c, qkv(100), layer=1, request_id="prefill c"),
        step_request(c, qkv(1), request_id="decode c"),
        step_request(b, qkv(1), position=1, request_id="decode b again"),
    ]
    with server.engine_held():
        # The steps of a session come on one stream, so that all of them may be in flight.
        gates = [threading.Event() for _ in requests]

        def stream(session: str) -> Any:
            for gate, request in zip(gates, requests, strict=True):
                gate.wait(timeout=20)
                if request.session_id == session:
                    yield request

        streams = [stock.Attend(stream(session)) for session in (a, b, c)]
        for i, gate in enumerate(gates):
            gate.set()
            server.wait_for_queue(i + 1)
    answered = [[answer.request_id for answer in stream] for stream in streams]
    assert answered == [["prefill a", "decode a"], ["decode b", "decode b again"], ["prefill c", "decode c"]]
    assert [one for (one,) in order if one != "pause"] == [
        *("decode b", "decode b again"),  # before the first prefill
        *("prefill a", "decode a", "prefill c", "decode c"),
    ]


def test_between_two_parts_of_a_prefill_go_as_many_small_steps_as_go_together_and_no_more(
    start_server: Any, connect_stock: Any, qkv: Callable[..., Any], step_request: Any
) -> None:
    server = start_server(max_batch=2)
    stock = connect_stock(server)
    sessions = [stock.new_session() for _ in range(8)]
    order, calls = follow(server), []
    with server.engine_held():
        for i, session in enumerate(sessions):
            calls.append(stock.Prefill.future(step_request(session, qkv(1 if i else 300), request_id="step")))
            server.wait_for_queue(i + 1)
    assert all(call.result(timeout=20).position for call in calls)
    batch, large, pause = ("step",) * 2, ("step",), ("pause",)
    assert order[:7] == [batch, large, pause, batch, pause, batch, pause]
    assert order[7:9] == [("step",), pause]  # the seventh, alone


# -- the backlog by itself -------------------------------------------------------------------------------------------


def step(session: str, owner: Principal, tokens: int, number: int = 0) -> Step:
    """A step of which the backlog sees nothing but this."""
    form = SimpleNamespace(tokens=tokens, arrays=(), layout=SimpleNamespace(tensors=(1, 2, 3)), alike=(tokens,))
    of: Any = SimpleNamespace(id=session, owner=owner)
    # The backlog asks the form for nothing else than these four.
    return Step(of, 0, number, "", form, memoryview(b""), None, lambda _: None)  # type: ignore[arg-type]


def backlog(max_batch: int = 4, *, shared: bool = True) -> Backlog:
    return Backlog(max_batch=max_batch, batch_wait=0.0, small=SMALL, shared=shared)


@given(
    sent=st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from([1, 1, 2, 100]), st.booleans()), max_size=40),
    arriving=st.lists(st.integers(0, 5), min_size=40, max_size=40),
    parts=st.integers(1, 4),
    max_batch=st.integers(1, 5),
    shared=st.booleans(),
)
def test_all_is_done_once_in_each_sessions_order_and_nothing_waits_for_more_than_a_round(
    sent: list[tuple[str, int, bool]], arriving: list[int], parts: int, max_batch: int, *, shared: bool
) -> None:
    waiting = backlog(max_batch, shared=shared)
    steps = [
        step(session + owner.name, owner, tokens, number)
        for number, (session, tokens, alice) in enumerate(sent)
        for owner in [ALICE if alice else BOB]
    ]
    coming, counts = deque(steps), iter(arriving)
    done: list[Step] = []

    def arrive() -> None:
        for _ in range(next(counts, len(coming))):
            if coming:
                waiting.put(coming.popleft())

    def do(work: Any) -> None:
        assert len(work) <= max_batch
        assert len({one.session.id for one in work}) == len(work)
        done.extend(work)
        waiting.charge(work, 0.1)

    def rest(large: Step, *, begun: bool) -> None:
        arrive()
        round_of = [one for work in waiting.take_before(large, begun=begun) for one in (work, do(work))[0]]
        assert len(round_of) <= max_batch
        assert all(one.form.tokens < SMALL and one.session.id != large.session.id for one in round_of)

    while len(done) < len(steps):
        arrive()
        if waiting._inbox.empty() and not waiting._waiting:
            continue
        work = waiting.take()
        assert isinstance(work, list)
        if not waiting.is_small(work[0]):
            for part in range(parts):
                rest(work[0], begun=part > 0)
                waiting.charge(work, 1.0)
        do(work)
    assert sorted(one.position for one in done) == list(range(len(steps)))
    for session in {one.session.id for one in steps}:
        numbers = [one.position for one in done if one.session.id == session]
        assert numbers == sorted(numbers)


def test_a_caller_that_has_had_more_time_does_not_pass_anothers_prefill() -> None:
    waiting = backlog()
    large, own, other = step("a", ALICE, 100), step("b", ALICE, 1), step("c", BOB, 1)
    waiting.charge([other], 10.0)
    for one in (large, own, other):
        waiting.put(one)
    assert waiting.take() == [large]
    assert list(waiting.take_before(large, begun=False)) == [[own]]
    waiting.charge([large], 5.0)
    assert list(waiting.take_before(large, begun=True)) == []
    waiting.charge([large], 5.0)
    assert list(waiting.take_before(large, begun=True)) == [[other]]


def test_an_errand_passes_a_prefill_that_has_not_begun_and_no_other() -> None:
    waiting, large = backlog(shared=False), step("a", ALICE, 100)
    errand = Errand(lambda: None, ALICE)
    waiting.put(large)
    waiting.put(errand)
    waiting.put(None)
    assert waiting.take() == [large]
    assert list(waiting.take_before(large, begun=True)) == []
    assert list(waiting.take_before(large, begun=False)) == [errand]
    assert waiting.take() is None

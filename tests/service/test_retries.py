"""The client's retries: lost answers are asked for again, nothing is taken twice, what is final is raised at once."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import numbaflash
from numbaflash_service import Client, RetryPolicy, Session, calls, connection
from numbaflash_service.errors import (
    BadTensorError,
    BusyError,
    PositionMismatchError,
    QueueFullError,
    ServiceError,
    SessionUnknownError,
)
from numbaflash_service.v1 import attention_pb2 as pb

LOST = ServiceError("the answer was lost", code=grpc.StatusCode.UNAVAILABLE)
QUICK = RetryPolicy(attempts=5, first_delay=0.001)
PATIENT = RetryPolicy(attempts=1000, max_delay=0.1)


class Clock:
    """Time that only passes while something sleeps."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.slept: list[float] = []
        monkeypatch.setattr(calls, "time", self)  # for these calls alone: servers and their threads have the real one

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


def failing(error: Exception) -> Callable[[float], None]:
    def attempt(_: float) -> None:
        raise error

    return attempt


def test_delays_double_up_to_a_bound_and_attempts_end(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    monkeypatch.setattr(calls.random, "uniform", lambda _, most: most)
    policy = RetryPolicy(attempts=6, first_delay=0.1, max_delay=1.0)
    with pytest.raises(ServiceError):
        policy.run(failing(LOST), timeout=100.0)
    assert clock.slept == [0.1, 0.2, 0.4, 0.8, 1.0]


@given(delays=st.lists(st.floats(0, 3), min_size=1, max_size=5))
def test_what_the_server_asks_for_is_waited_for(delays: list[float]) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        clock = Clock(monkeypatch)
        errors = iter(QueueFullError("full", retry_after=delay) for delay in delays)

        def attempt(_: float) -> str:
            for error in errors:
                raise error
            return "done"

        assert RetryPolicy(attempts=9).run(attempt, timeout=100.0) == "done"
        assert len(clock.slept) == len(delays)
        assert all(slept >= delay for slept, delay in zip(clock.slept, delays, strict=True))


def test_no_attempt_begins_after_the_time_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    given_: list[float] = []

    def attempt(seconds: float) -> None:
        given_.append(seconds)
        raise QueueFullError("full", retry_after=0.4)

    with pytest.raises(QueueFullError):
        RetryPolicy(attempts=100, first_delay=0.0).run(attempt, timeout=1.0)
    assert given_ == pytest.approx([1.0, 0.6, 0.2])
    assert clock.now < 1.0


@pytest.mark.parametrize(
    "error",
    [
        BadTensorError("tensors", "no"),
        PositionMismatchError("no", position=1),
        SessionUnknownError("no"),
        ServiceError("no", code=grpc.StatusCode.INTERNAL),
        ServiceError("no", code=grpc.StatusCode.DEADLINE_EXCEEDED),
    ],
)
def test_what_is_final_is_raised_at_once(error: ServiceError, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    with pytest.raises(type(error)):
        RetryPolicy().run(failing(error), timeout=10.0)
    assert clock.slept == []


def lose_answers(session: Session, which: Callable[[int], bool]) -> list[int]:
    """Let the server take every attempt, and lose the answers of those that `which` picks by number."""
    numbers: list[int] = []

    def losing(call: Callable[..., bytes]) -> Callable[..., bytes]:
        def lossy(*arguments: Any) -> bytes:
            answer = call(*arguments)
            numbers.append(len(numbers))
            if which(numbers[-1]):
                raise LOST
            return answer

        return lossy

    if session._stream:
        session._stream.exchange = losing(session._stream.exchange)  # type: ignore[method-assign]
    else:
        session._calls = losing(session._calls)  # type: ignore[assignment]
    return numbers


@pytest.mark.parametrize("stream", [True, False])
def test_lost_answers_are_asked_for_again_and_no_token_is_doubled(server: Any, qkv: Any, stream: bool) -> None:
    cache = numbaflash.RingKVCache(1, 2, 16, capacity=64, dtype="float32")
    with Client(server.target, retry=QUICK) as client:
        session = client.create_session(1, 2, 16, capacity=64, dtype="float32", stream=stream)
        attempts = lose_answers(session, lambda number: number % 3 != 2)
        for seed, tokens in enumerate((20, 1, 1, 5)):
            arrays = qkv(tokens, seed=seed)
            np.testing.assert_array_equal(session.step(0, **arrays), cache.step(0, **arrays))
        assert len(attempts) == 12
        (listed,) = [listed for listed in client.list_sessions() if listed.session_id == session.id]
        assert (listed.max_length, listed.steps) == (27, 4)


@pytest.mark.parametrize("stream", [True, False])
def test_a_step_given_up_may_be_called_again_but_not_with_other_data(server: Any, qkv: Any, stream: bool) -> None:
    cache = numbaflash.RingKVCache(1, 2, 16, capacity=64, dtype="float32")
    with Client(server.target, retry=QUICK) as client:
        session = client.create_session(1, 2, 16, capacity=64, dtype="float32", stream=stream)
        lose_answers(session, lambda number: number < QUICK.attempts)
        with pytest.raises(ServiceError, match="the answer was lost"):
            session.step(0, **qkv(3))
        assert session.length(0) == 0
        with pytest.raises(PositionMismatchError) as caught:
            session.step(0, **qkv(3, seed=1))
        assert caught.value.position == 3
    with Client(server.target, retry=QUICK) as client:
        session = client.create_session(1, 2, 16, capacity=64, dtype="float32", stream=stream)
        lose_answers(session, lambda number: number < QUICK.attempts)
        with pytest.raises(ServiceError, match="the answer was lost"):
            session.step(0, **qkv(3))
        np.testing.assert_array_equal(session.step(0, **qkv(3)), cache.step(0, **qkv(3)))
        assert session.length(0) == 3


@pytest.mark.parametrize("stream", [True, False])
def test_a_timeout_is_kept_and_the_step_can_be_called_again(server: Any, qkv: Any, stream: bool) -> None:
    with Client(server.target, retry=PATIENT) as client:
        session = client.create_session(1, 2, 16, capacity=64, stream=stream)
        session.step(0, **qkv(1))
        with server.engine_held(), pytest.raises(ServiceError) as caught:
            session.step(0, **qkv(1), timeout=0.2)
        assert caught.value.code is grpc.StatusCode.DEADLINE_EXCEEDED
        session.step(0, **qkv(1))  # busy until the first one is taken back
        assert session.length(0) == 2


@pytest.mark.usefixtures("heeds_ctrl_c")
@pytest.mark.parametrize("stream", [True, False])
def test_a_step_broken_off_by_ctrl_c_can_be_called_again(server: Any, qkv: Any, stream: bool) -> None:
    cache = numbaflash.RingKVCache(1, 2, 16, capacity=64)
    with Client(server.target, retry=PATIENT) as client:
        session = client.create_session(1, 2, 16, capacity=64, stream=stream)
        np.testing.assert_array_equal(session.step(0, **qkv(9)), cache.step(0, **qkv(9)))

        def press() -> None:
            server.wait_for_queue(1)
            os.kill(os.getpid(), signal.SIGINT)

        user = threading.Thread(target=press)
        user.start()
        with server.engine_held(), pytest.raises(KeyboardInterrupt):
            session.step(0, **qkv(3))
        user.join()
        for tokens in (3, 1, 1):
            np.testing.assert_array_equal(session.step(0, **qkv(tokens)), cache.step(0, **qkv(tokens)))


def test_a_busy_session_is_tried_again(server: Any, stock: Any, qkv: Any, step_request: Any) -> None:
    with Client(server.target, retry=PATIENT) as client:
        session = client.create_session(2, 2, 16, capacity=64)
        refused = threading.Event()
        submit = server.engine.submit

        def watch(step: Any, writer: object) -> None:
            try:
                submit(step, writer)
            except BusyError:
                refused.set()
                raise

        server.engine.submit = watch
        with server.engine_held():
            other = stock.Decode.future(step_request(session.id, qkv(1), layer=1))
            server.wait_for_queue(1)
            mine = threading.Thread(target=session.step, args=(0,), kwargs=qkv(1))
            mine.start()
            assert refused.wait(timeout=20)
        mine.join(timeout=20)
        server.engine.submit = submit
        assert other.result(timeout=20).position == 1
        assert session.length(0) == 1


def test_a_server_that_comes_up_late_is_waited_for(start_server: Any, tmp_path: Path) -> None:
    address = f"unix:{tmp_path}/socket"
    starter = threading.Timer(0.3, start_server, kwargs={"listen": [address]})
    starter.start()
    with Client(address, retry=PATIENT) as client:
        assert client.info().backend == "cpu"
    starter.join()


@pytest.mark.parametrize("stream", [True, False])
def test_a_session_lost_with_its_server_is_an_error_that_says_so(
    start_server: Any, qkv: Any, tmp_path: Path, stream: bool
) -> None:
    address = f"unix:{tmp_path}/socket"
    first = start_server(listen=[address])
    with Client(address, retry=PATIENT) as client:
        session = client.create_session(1, 2, 16, capacity=64, stream=stream)
        session.step(0, **qkv(1))
        first.stop()
        start_server(listen=[address])
        with pytest.raises(SessionUnknownError):
            session.step(0, **qkv(1))
        fresh = client.create_session(1, 2, 16, capacity=64, stream=stream)
        assert fresh.step(0, **qkv(1)).shape == (1, 4, 16)


def listed_ids(stock: Any) -> list[str]:
    return [listed.session_id for listed in stock.ListSessions(pb.ListSessionsRequest()).sessions]


def test_closing_a_client_closes_its_sessions(server: Any, stock: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "_CLOSE_SECONDS", 60.0)  # however busy the machine is
    with Client(server.target) as client:
        session = client.create_session(1, 2, 16, capacity=64)
        assert session.id in listed_ids(stock)
    assert session.id not in listed_ids(stock)


def test_closing_a_client_whose_server_is_gone_gives_up_at_the_first_session(
    start_server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = start_server()
    client = Client(server.target, retry=RetryPolicy(attempts=1))
    for _ in range(3):
        client.create_session(1, 2, 16, capacity=64)
    server.stop()
    made = []
    call = client._call
    monkeypatch.setattr(client, "_call", lambda name, *arguments: (made.append(name), call(name, *arguments))[1])
    client.close()
    assert made == ["CloseSession"]
    assert not client._sessions


def test_nobody_there_is_an_error_after_the_last_attempt() -> None:
    with Client("127.0.0.1:1", retry=RetryPolicy(attempts=3)) as client:
        with pytest.raises(ServiceError) as caught:
            client.info()
        assert caught.value.code is grpc.StatusCode.UNAVAILABLE
        assert caught.value.reason is None

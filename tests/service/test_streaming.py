"""The Attend stream, and what happens to steps while they wait: order, errors, cancellation, deadlines, two writers."""

from __future__ import annotations

import gc
import queue
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import numpy as np
import pytest

from numbaflash_service.errors import from_status
from numbaflash_service.v1 import attention_pb2 as pb

from .plain_calls import refusal


class Stream:
    """An Attend call whose requests come one by one."""

    def __init__(self, stock: Any) -> None:
        self._requests: queue.SimpleQueue = queue.SimpleQueue()
        self.call = stock.Attend(iter(self._requests.get, None))

    def send(self, request: pb.StepRequest) -> None:
        copy = pb.StepRequest()
        copy.CopyFrom(request)
        self._requests.put(copy)

    def receive(self) -> pb.StepResponse:
        return next(self.call)

    def finish(self) -> list[pb.StepResponse]:
        self._requests.put(None)
        return list(self.call)


@pytest.fixture
def open_stream(stock: Any) -> Iterator[Callable[[], Stream]]:
    opened: list[Stream] = []

    def make() -> Stream:
        opened.append(Stream(stock))
        return opened[-1]

    yield make
    for stream in opened:
        stream._requests.put(None)
        stream.call.cancel()


def reason(response: pb.StepResponse) -> str | None:
    return from_status(response.error).reason if response.HasField("error") else None


def test_a_stream_answers_as_single_calls_do(stock: Any, qkv: Any, step_request: Any, open_stream: Any) -> None:
    streamed, called = stock.new_session(), stock.new_session()
    stream, position = open_stream(), 0
    for tokens in (20, 1, 3, 1):
        stream.send(step_request(streamed, qkv(tokens), position=position))
        expected = stock.Decode(step_request(called, qkv(tokens), position=position))
        answer = stream.receive()
        assert answer.payload == expected.payload
        assert (answer.position, answer.first) == (expected.position, expected.first)
        position += tokens


def test_the_payload_of_a_step_is_given_up_with_its_answer(
    server: Any, stock: Any, qkv: Any, step_request: Any, open_stream: Any
) -> None:
    session_id, stream = stock.new_session(), open_stream()
    gc.disable()  # which would hide a cycle of references
    try:
        payloads = []
        for position in range(3):
            stream.send(step_request(session_id, qkv(1), position=position))
            stream.receive()
            payloads.append(weakref.ref(server.submitted.pop().payload))
        server.wait_until(lambda: not any(payload() is not None for payload in payloads))
    finally:
        gc.enable()


def test_many_in_flight_are_answered_in_order_per_session(
    stock: Any, qkv: Any, step_request: Any, open_stream: Any
) -> None:
    sessions = [stock.new_session() for _ in range(3)]
    stream = open_stream()
    for position in range(30):
        for session_id in sessions:
            stream.send(step_request(session_id, qkv(1), position=position, request_id=f"{position}"))
    answers = stream.finish()
    assert len(answers) == 90
    for session_id in sessions:
        mine = [answer for answer in answers if answer.session_id == session_id]
        assert [answer.request_id for answer in mine] == [f"{position}" for position in range(30)]
        assert [answer.position for answer in mine] == list(range(1, 31))


def test_an_error_waits_for_the_earlier_steps_of_its_session(
    server: Any, stock: Any, qkv: Any, step_request: Any, open_stream: Any
) -> None:
    session_id, stream = stock.new_session(), open_stream()
    with server.engine_held():
        stream.send(step_request(session_id, qkv(1), request_id="good"))
        stream.send(step_request(session_id, qkv(1, head_dim=8), position=1, request_id="bad"))
        stream.send(step_request(session_id, qkv(1), position=1, request_id="next"))
        server.wait_for_queue(2)
    answers = stream.finish()
    assert [(answer.request_id, reason(answer)) for answer in answers] == [
        ("good", None),
        ("bad", "BAD_TENSOR"),
        ("next", None),
    ]


def test_a_stream_goes_on_after_any_error(stock: Any, qkv: Any, step_request: Any, open_stream: Any) -> None:
    session_id, stream = stock.new_session(), open_stream()
    bad = {
        "SESSION_UNKNOWN": step_request("f" * 32, qkv(1)),
        "POSITION_MISMATCH": step_request(session_id, qkv(1), position=7),
        "BAD_TENSOR": step_request(session_id, {}),
    }
    for position, (expected, request) in enumerate(bad.items()):
        stream.send(request)
        answer = stream.receive()
        assert reason(answer) == expected
        assert (answer.session_id, answer.request_id) == (request.session_id, "r")
        assert not answer.tensors
        stream.send(step_request(session_id, qkv(1), position=position))
        assert stream.receive().position == position + 1


def test_bytes_that_are_no_step_do_not_end_a_stream(stock: Any, qkv: Any, step_request: Any) -> None:
    requests: queue.SimpleQueue = queue.SimpleQueue()
    call = stock.channel.stream_stream("/numbaflash.v1.Attention/Attend")(iter(requests.get, None))
    requests.put(b"\x0a\xff")
    assert reason(pb.StepResponse.FromString(next(call))) == "BAD_TENSOR"
    requests.put(step_request(stock.new_session(), qkv(1)).SerializeToString())
    assert pb.StepResponse.FromString(next(call)).position == 1
    requests.put(None)
    assert list(call) == []


def test_a_step_that_is_cancelled_while_it_waits_changes_nothing(
    server: Any, stock: Any, qkv: Any, step_request: Any
) -> None:
    session_id = stock.new_session()
    with server.engine_held():
        call = stock.Decode.future(step_request(session_id, qkv(1), request_id="given up"))
        server.wait_for_queue(1)
        call.cancel()
        server.wait_until(lambda: server.submitted[-1].taken_back)
    server.wait_for_queue(0)
    assert stock.Decode(step_request(session_id, qkv(1), request_id="another")).position == 1


def test_a_stream_that_goes_away_takes_back_its_waiting_steps(
    server: Any, stock: Any, qkv: Any, step_request: Any, open_stream: Any
) -> None:
    session_id, stream = stock.new_session(), open_stream()
    with server.engine_held():
        for position in range(3):
            stream.send(step_request(session_id, qkv(1), position=position))
        server.wait_for_queue(3)
        stream.call.cancel()
        server.wait_until(lambda: all(step.taken_back for step in server.submitted[-3:]))
    server.wait_for_queue(0)
    assert stock.Decode(step_request(session_id, qkv(1), request_id="another")).position == 1


def test_a_deadline_that_passes_in_the_queue_changes_nothing(
    server: Any, stock: Any, qkv: Any, step_request: Any
) -> None:
    session_id = stock.new_session()
    with server.engine_held():
        call = stock.Decode.future(step_request(session_id, qkv(1)), timeout=3.0)
        server.wait_for_queue(1)  # long before
        assert call.exception().code() is grpc.StatusCode.DEADLINE_EXCEEDED
        server.wait_until(lambda: server.submitted[-1].taken_back)  # the client may know it first
    server.wait_for_queue(0)
    assert stock.Decode(step_request(session_id, qkv(1), request_id="another")).position == 1


def test_a_second_writer_of_a_session_is_busy_and_may_come_again(
    server: Any, stock: Any, qkv: Any, step_request: Any, open_stream: Any
) -> None:
    session_id, stream = stock.new_session(), open_stream()
    with server.engine_held():
        stream.send(step_request(session_id, qkv(1), request_id="first"))
        server.wait_for_queue(1)
        error = refusal(stock.Decode, step_request(session_id, qkv(1), layer=1))
    assert (error.reason, error.code) == ("BUSY", grpc.StatusCode.ABORTED)
    assert error.retry_after is not None
    assert stream.receive().position == 1
    assert stock.Decode(step_request(session_id, qkv(1), layer=1)).position == 1


def test_a_session_that_is_closed_under_a_waiting_step_fails_that_step_alone(
    server: Any, stock: Any, qkv: Any, step_request: Any, open_stream: Any
) -> None:
    closed, other, stream = stock.new_session(), stock.new_session(), open_stream()
    with server.engine_held():
        for session_id in (closed, other):
            stream.send(step_request(session_id, qkv(1)))
        server.wait_for_queue(2)
        closing = stock.CloseSession.future(pb.CloseSessionRequest(session_id=closed))
        server.wait_until(lambda: server.submitted[-2].session.lost is not None)
    closing.result(timeout=20)
    answers = {answer.session_id: answer for answer in stream.finish()}
    assert reason(answers[closed]) == "SESSION_UNKNOWN"
    assert answers[other].position == 1


def test_a_stream_reads_no_further_than_its_bound(
    start_server: Any, connect_stock: Any, qkv: Any, step_request: Any
) -> None:
    server = start_server(max_in_flight=4)
    stock = connect_stock(server)
    session_id, stream = stock.new_session(), Stream(stock)
    with server.engine_held():
        for position in range(12):
            stream.send(step_request(session_id, qkv(1), position=position))
        server.wait_for_queue(4)
        time.sleep(0.1)  # for a fifth one to come, if it did
        server.wait_for_queue(4)
    assert [answer.position for answer in stream.finish()] == list(range(1, 13))


def test_timings_are_reported(stock: Any, qkv: Any, step_request: Any) -> None:
    answer = stock.Decode(step_request(stock.new_session(), qkv(1)))
    assert answer.kernel_ns > 0
    assert answer.queue_ns > 0
    assert answer.batch_size == 1
    assert np.isfinite(np.frombuffer(answer.payload, np.float32)).all()

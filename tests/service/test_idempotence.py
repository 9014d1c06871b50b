"""Every step can be sent again: by `position` and `request_id` it runs, is answered from before, or is refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import grpc
import numpy as np
import pytest

from numbaflash_service import replay
from numbaflash_service.errors import KVBudgetError, PositionMismatchError
from numbaflash_service.replay import Answer, Answers
from numbaflash_service.v1 import attention_pb2 as pb

from .plain_calls import refusal


def mismatch(call: Any, request: pb.StepRequest) -> PositionMismatchError:
    error = refusal(call, request)
    assert isinstance(error, PositionMismatchError)
    return error


def test_the_same_step_again_gives_the_earlier_answer_and_writes_nothing(
    stock: Any, qkv: Any, step_request: Any
) -> None:
    session_id = stock.new_session()
    request = step_request(session_id, qkv(5), request_id="a")
    first = stock.Prefill(request)
    for _ in range(3):
        again = stock.Prefill(request)
        assert again.replayed
        assert not first.replayed
        assert again.payload == first.payload
        assert (again.position, again.first) == (first.position, first.first)
    assert stock.Decode(step_request(session_id, qkv(1), position=5, request_id="b")).position == 6


def test_a_replayed_answer_is_the_one_of_that_time_even_where_the_data_differs(
    stock: Any, qkv: Any, step_request: Any
) -> None:
    session_id = stock.new_session()
    first = stock.Prefill(step_request(session_id, qkv(5), request_id="a"))
    again = stock.Prefill(step_request(session_id, qkv(5, seed=9), request_id="a"))
    assert again.payload == first.payload


@pytest.mark.parametrize("position", [0, 4, 6, 2**64 - 1])
def test_another_position_is_a_mismatch_that_tells_the_servers(
    stock: Any, qkv: Any, step_request: Any, position: int
) -> None:
    session_id = stock.new_session()
    stock.Prefill(step_request(session_id, qkv(5), request_id="a"))
    error = mismatch(stock.Decode, step_request(session_id, qkv(1), position=position, request_id="b"))
    assert error.position == 5
    assert error.code is grpc.StatusCode.FAILED_PRECONDITION
    assert stock.Decode(step_request(session_id, qkv(1), position=5, request_id="c")).position == 6


def test_only_the_last_step_is_answered_again(stock: Any, qkv: Any, step_request: Any) -> None:
    session_id = stock.new_session()
    stock.Prefill(step_request(session_id, qkv(5), request_id="a"))
    stock.Decode(step_request(session_id, qkv(1), position=5, request_id="b"))
    assert mismatch(stock.Prefill, step_request(session_id, qkv(5), request_id="a")).position == 6
    assert stock.Decode(step_request(session_id, qkv(1), position=5, request_id="b")).replayed


def test_a_step_without_a_request_id_is_never_answered_again(stock: Any, qkv: Any, step_request: Any) -> None:
    session_id = stock.new_session()
    stock.Prefill(step_request(session_id, qkv(5), request_id=""))
    assert mismatch(stock.Prefill, step_request(session_id, qkv(5), request_id="")).position == 5


def test_layers_are_counted_apart(stock: Any, qkv: Any, step_request: Any) -> None:
    session_id = stock.new_session()
    stock.Prefill(step_request(session_id, qkv(5), layer=0, request_id="same"))
    answer = stock.Prefill(step_request(session_id, qkv(3), layer=1, request_id="same"))
    assert (answer.position, answer.replayed) == (3, False)
    assert stock.Prefill(step_request(session_id, qkv(5), layer=0, request_id="same")).replayed


def test_a_refused_step_leaves_the_last_answer_in_place(stock: Any, qkv: Any, step_request: Any) -> None:
    session_id = stock.new_session()
    request = step_request(session_id, qkv(5), request_id="a")
    stock.Prefill(request)
    with pytest.raises(grpc.RpcError):
        stock.Decode(step_request(session_id, qkv(1, head_dim=8), position=5))
    mismatch(stock.Decode, step_request(session_id, qkv(1), position=9))
    assert stock.Prefill(request).replayed


def test_appending_and_attending_are_steps_too(stock: Any, qkv: Any, step_request: Any) -> None:
    session_id, whole = stock.new_session(), stock.new_session()
    arrays = qkv(5)
    append = step_request(session_id, {"k": arrays["k"], "v": arrays["v"]}, request_id="a")
    answer = stock.Prefill(append)
    assert (answer.position, len(answer.tensors)) == (5, 0)
    assert stock.Prefill(append).replayed
    attend = step_request(session_id, {"q": arrays["q"]}, position=5, request_id="b")
    outs = [stock.Decode(attend).payload for _ in range(2)]
    expected = np.frombuffer(stock.Prefill(step_request(whole, arrays)).payload, np.float32)
    for out in outs:
        np.testing.assert_allclose(np.frombuffer(out, np.float32), expected, rtol=1e-5, atol=1e-6)
    assert mismatch(stock.Decode, step_request(session_id, {"q": arrays["q"]}, position=4)).position == 5


def answer(nbytes: int, made: float = 0.0) -> Answer:
    return Answer("r", 0, 1, 0, np.zeros(nbytes, np.uint8), made)


def test_kept_answers_stay_within_their_bytes_and_young_ones_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(replay, "time", SimpleNamespace(monotonic=lambda: now))
    answers = Answers(100)
    answers.keep("old", 0, answer(40, made=now - 2 * replay.KEPT_FOR_SECONDS))
    answers.keep("old", 1, answer(40, made=now - 2 * replay.KEPT_FOR_SECONDS))
    answers.make_room(50)
    assert (answers.get("old", 0), answers.nbytes) == (None, 40)
    answers.keep("young", 0, answer(50, made=now))
    with pytest.raises(KVBudgetError) as caught:
        answers.make_room(60)
    assert caught.value.retry_after
    assert answers.get("old", 1)
    assert answers.get("young", 0)
    answers.make_room(50)
    assert answers.get("old", 1) is None
    answers.keep("young", 0, answer(10, made=now))
    assert answers.nbytes == 10

"""Errors on the wire: the contract's codes and reasons, readable by any client, and the same exception at both ends."""

from __future__ import annotations

from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from hypothesis import example, given
from hypothesis import strategies as st

from numbaflash_service import errors
from numbaflash_service.errors import ServiceError, from_call, from_status, to_status
from numbaflash_service.v1 import attention_pb2 as pb

from .plain_calls import refusal

CONTRACT = {
    "SESSION_UNKNOWN": grpc.StatusCode.NOT_FOUND,
    "SESSION_EXPIRED": grpc.StatusCode.NOT_FOUND,
    "SESSION_EVICTED": grpc.StatusCode.NOT_FOUND,
    "POSITION_MISMATCH": grpc.StatusCode.FAILED_PRECONDITION,
    "BUSY": grpc.StatusCode.ABORTED,
    "KV_BUDGET": grpc.StatusCode.RESOURCE_EXHAUSTED,
    "QUEUE_FULL": grpc.StatusCode.RESOURCE_EXHAUSTED,
    "QUOTA": grpc.StatusCode.RESOURCE_EXHAUSTED,
    "STORAGE": grpc.StatusCode.RESOURCE_EXHAUSTED,
    "SNAPSHOT_UNKNOWN": grpc.StatusCode.NOT_FOUND,
    "SNAPSHOT_DAMAGED": grpc.StatusCode.DATA_LOSS,
    "DRAINING": grpc.StatusCode.UNAVAILABLE,
    "BAD_TENSOR": grpc.StatusCode.INVALID_ARGUMENT,
}


def make(cls: type[ServiceError], message: str, retry_after: float | None) -> ServiceError:
    if cls is errors.PositionMismatchError:
        return cls(message, position=2**40, retry_after=retry_after)
    if cls is errors.BadTensorError:
        return cls("tensors[0].shape", message, retry_after=retry_after)
    return cls(message, retry_after=retry_after)


def test_reasons_and_codes_are_the_contracts() -> None:
    assert {cls.reason: cls.code for cls in errors._WITH_REASON} == CONTRACT


@given(
    cls=st.sampled_from(errors._WITH_REASON),
    message=st.text(max_size=20),
    retry_after=st.none() | st.floats(0, 1000).map(lambda seconds: round(seconds, 6)),
)
def test_an_error_arrives_as_it_was_raised(cls: type[ServiceError], message: str, retry_after: float | None) -> None:
    sent = make(cls, message, retry_after)
    received = from_status(to_status(sent))
    assert type(received) is cls
    assert received.message == sent.message
    assert received.retry_after == (None if retry_after is None else pytest.approx(retry_after, abs=1e-8))
    for attribute in ("code", "position", "field"):
        assert getattr(received, attribute, None) == getattr(sent, attribute, None)


def test_an_error_of_somebody_else_is_a_plain_one() -> None:
    status = to_status(errors.BusyError("who?"))
    info = error_details_pb2.ErrorInfo(reason="BUSY", domain="elsewhere")
    status.details[0].Pack(info)
    received = from_status(status)
    assert type(received) is ServiceError
    assert (received.code, received.reason) == (grpc.StatusCode.ABORTED, None)


def test_details_that_are_damaged_are_left_out() -> None:
    status = to_status(errors.PositionMismatchError("somewhere", position=3))
    info = error_details_pb2.ErrorInfo(reason="POSITION_MISMATCH", domain="numbaflash", metadata={"position": "-1x"})
    status.details[0].Pack(info)
    assert from_status(status).code is grpc.StatusCode.FAILED_PRECONDITION
    status.details[0].value = b"\xff\xff"
    assert from_status(status).message == "somewhere"


class FailedCall:
    def __init__(self, trailer: bytes) -> None:
        self._trailer = trailer

    def code(self) -> grpc.StatusCode:
        return grpc.StatusCode.ABORTED

    def details(self) -> str:
        return "what the channel says"

    def trailing_metadata(self) -> tuple[tuple[str, bytes], ...]:
        return ((errors.STATUS_TRAILER, self._trailer),)


@example(trailer=b"\x0a\xff")
@given(trailer=st.binary(max_size=40) | st.just(to_status(errors.BusyError("status")).SerializeToString()))
def test_a_trailer_that_is_no_status_is_left_out(trailer: bytes) -> None:
    error = from_call(FailedCall(trailer))
    assert isinstance(error, ServiceError)
    if trailer == b"\x0a\xff":
        assert (error.code, error.message) == (grpc.StatusCode.ABORTED, "what the channel says")


def test_a_stock_client_reads_reason_and_field_by_the_standard_library(stock: Any, qkv: Any, step_request: Any) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        stock.Prefill(step_request(stock.new_session(), qkv(1, head_dim=8)))
    status = rpc_status.from_call(caught.value)
    details = {}
    for detail in status.details:
        for message in (error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()):
            if detail.Unpack(message):
                details[type(message).__name__] = message
    assert (details["ErrorInfo"].reason, details["ErrorInfo"].domain) == ("BAD_TENSOR", "numbaflash")
    assert details["BadRequest"].field_violations[0].field == "tensors[0].shape"


@pytest.mark.parametrize("session_id", ["", "0" * 32, "é" * 100])
def test_a_session_that_never_was_is_unknown(stock: Any, qkv: Any, step_request: Any, session_id: str) -> None:
    for call, request in (
        (stock.Decode, step_request(session_id, qkv(1))),
        (stock.CloseSession, pb.CloseSessionRequest(session_id=session_id)),
    ):
        assert isinstance(refusal(call, request), errors.SessionUnknownError)


def test_a_closed_session_is_unknown_and_may_be_closed_again(stock: Any, qkv: Any, step_request: Any) -> None:
    session_id = stock.new_session()
    for _ in range(2):
        stock.CloseSession(pb.CloseSessionRequest(session_id=session_id))
    assert refusal(stock.Decode, step_request(session_id, qkv(1))).reason == "SESSION_UNKNOWN"


@pytest.mark.parametrize("name", ["Snapshot", "Restore"])
def test_a_server_without_a_folder_has_no_snapshots(stock: Any, name: str) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        getattr(stock, name)(getattr(pb, f"{name}Request")(name="a"))
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_an_unexpected_error_says_nothing_of_the_servers_inside(
    start_server: Any, connect_stock: Any, qkv: Any, step_request: Any, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    server = start_server()
    stock = connect_stock(server)
    session_id = stock.new_session()
    engine = server.engine

    def fail(_: object) -> None:
        raise ZeroDivisionError("integer division or modulo by zero")

    monkeypatch.setattr(engine, "_launch", fail)
    with pytest.raises(grpc.RpcError) as caught:
        stock.Decode(step_request(session_id, qkv(1)))
    assert caught.value.code() is grpc.StatusCode.INTERNAL
    assert "division" not in caught.value.details()
    assert "ZeroDivisionError" in caplog.text
    monkeypatch.undo()
    assert stock.Decode(step_request(session_id, qkv(1))).position == 1

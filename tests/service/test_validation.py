"""Every field of every request: what is wrong is named, nothing is written, the server goes on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf.duration_pb2 import Duration
from hypothesis import given
from hypothesis import strategies as st

from numbaflash_service.errors import BadTensorError, from_call
from numbaflash_service.v1 import attention_pb2 as pb

from .plain_calls import refusal

SHAPE = {"num_layers": 2, "num_kv_heads": 2, "head_dim": 16, "capacity": 64, "dtype": "float32"}


def outcome(call: Callable[..., Any], request: Any) -> str | None:
    try:
        call(request)
    except grpc.RpcError as failed:
        return from_call(failed).reason
    return "taken"


def sessions(stock: Any) -> dict[str, pb.SessionInfo]:
    """What the server holds."""
    return {session.session_id: session for session in stock.ListSessions(pb.ListSessionsRequest()).sessions}


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"num_layers": 0}, "shape.num_layers"),
        ({"num_layers": 2**32 - 1}, "shape.num_layers"),
        ({"num_kv_heads": 0}, "shape.num_kv_heads"),
        ({"num_kv_heads": 2**31}, "shape.num_kv_heads"),
        ({"head_dim": 0}, "shape.head_dim"),
        ({"head_dim": 257}, "shape.head_dim"),
        ({"num_q_heads": 3}, "shape.num_q_heads"),
        ({"num_q_heads": 2**32 - 2}, "shape.num_q_heads"),
        ({"capacity": 0}, "shape.capacity"),
        ({"capacity": 2**64 - 1}, "shape.capacity"),
        ({"sink_tokens": 64}, "shape.sink_tokens"),
        ({"sink_tokens": 2**64 - 1}, "shape.sink_tokens"),
        ({"dtype": "float64"}, "shape.dtype"),
        ({"dtype": "int3"}, "shape.dtype"),
        ({"quantizer": "group"}, "shape.quantizer"),
        ({"quantizer": "nonsense", "dtype": "int4"}, "shape.quantizer"),
        ({"quantizer": "hqq:group_size=128", "dtype": "int8", "head_dim": 64}, "shape.quantizer"),
        ({"dtype": "int4", "head_dim": 80}, "shape.quantizer"),
        ({"quantizer": "awq", "dtype": "int4", "head_dim": 64}, "tensors"),
        ({"page_size": 4}, "shape.page_size"),
        ({"page_size": 48}, "shape.page_size"),
        ({"page_size": 512}, "shape.page_size"),
        ({"rollback": 2**64 - 1}, "shape.rollback"),
    ],
)
def test_a_session_shape_that_cannot_be_is_refused_by_field(stock: Any, change: dict, field: str) -> None:
    request, before = pb.CreateSessionRequest(shape=pb.SessionShape(**{**SHAPE, **change})), sessions(stock).keys()
    error = refusal(stock.CreateSession, request)
    assert isinstance(error, BadTensorError)
    assert error.field == field
    assert sessions(stock).keys() == before


@pytest.mark.parametrize("ttl", [Duration(), Duration(seconds=-1), Duration(seconds=2**40), Duration(nanos=-1)])
def test_a_time_to_live_that_cannot_be_is_refused_by_field(stock: Any, ttl: Duration) -> None:
    error = refusal(stock.CreateSession, pb.CreateSessionRequest(shape=pb.SessionShape(**SHAPE), ttl=ttl))
    assert isinstance(error, BadTensorError)
    assert error.field == "ttl"


def test_what_a_shape_leaves_out_has_a_default(stock: Any) -> None:
    made = [stock.new_session(dtype=""), stock.new_session(rollback=0, page_size=8)]
    default, given_ = (sessions(stock)[session_id].shape for session_id in made)
    assert (default.dtype, default.page_size, default.rollback) == ("float16", 64, 64)
    assert (given_.page_size, given_.rollback) == (8, 0)


Arrays = dict[str, np.ndarray]


def heads(count: int) -> Callable[[Arrays], Arrays]:
    return lambda a: {**a, "q": np.ones((3, count, 16), np.float32)}


BAD_ARRAYS: dict[str, tuple[Callable[[Arrays], Arrays], str]] = {
    "no tensors": (lambda _: {}, "tensors"),
    "q and k without v": (lambda a: {"q": a["q"], "k": a["k"]}, "tensors"),
    "v alone": (lambda a: {"v": a["v"]}, "tensors"),
    "an unknown tensor": (lambda a: {**a, "bias": a["q"]}, "tensors[3].name"),
    "q of rank 2": (lambda a: {**a, "q": a["q"][0]}, "tensors[0].shape"),
    "k of rank 4": (lambda a: {**a, "k": a["k"][None]}, "tensors[1].shape"),
    "q heads that do not divide": (heads(3), "tensors[0].shape"),
    "q heads beyond the limit": (heads(1026), "tensors[0].shape"),
    "other kv heads than the session": (lambda a: {**a, "k": a["q"]}, "tensors[1].shape"),
    "another head_dim than the session": (lambda a: {**a, "v": a["v"][..., :8]}, "tensors[2].shape"),
    "fewer tokens of v": (lambda a: {**a, "v": a["v"][:2]}, "tensors[2].shape"),
    "mixed dtypes": (lambda a: {**a, "k": a["k"].astype(np.float16)}, "tensors[1].dtype"),
    "alibi_slopes of q's rank": (lambda a: {**a, "alibi_slopes": a["q"]}, "tensors[3].shape"),
    "alibi_slopes in half": (lambda a: {**a, "alibi_slopes": np.ones(4, np.float16)}, "tensors[3].dtype"),
    "sink_logits of other heads": (lambda a: {**a, "sink_logits": np.ones(5, np.float32)}, "tensors[3].shape"),
    "an option without q": (
        lambda a: {"k": a["k"], "v": a["v"], "sink_logits": np.ones(4, np.float32)},
        "tensors[2].name",
    ),
}


@pytest.mark.parametrize("case", BAD_ARRAYS)
def test_tensors_that_do_not_fit_the_session_are_refused_and_nothing_is_written(
    stock: Any, qkv: Any, step_request: Any, case: str
) -> None:
    change, field = BAD_ARRAYS[case]
    session_id = stock.new_session()
    good = step_request(session_id, qkv(3))
    stock.Prefill(good)
    error = refusal(stock.Prefill, step_request(session_id, change(qkv(3)), position=3))
    assert isinstance(error, BadTensorError)
    assert error.field == field
    next_step = stock.Decode(step_request(session_id, qkv(1), position=3))
    assert next_step.position == 4
    stock.CloseSession(pb.CloseSessionRequest(session_id=session_id))


def test_a_zero_length_tensor_is_refused_by_field(stock: Any, step_request: Any, qkv: Any) -> None:
    session_id = stock.new_session()
    error = refusal(stock.Prefill, step_request(session_id, {name: a[:0] for name, a in qkv(1).items()}))
    assert isinstance(error, BadTensorError)
    assert error.field == "tensors[0].shape"


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"layer": 2}, "layer"),
        ({"layer": 2**32 - 1}, "layer"),
        ({"request_id": "x" * 65}, "request_id"),
        ({"request_id": "é" * 33}, "request_id"),
        ({"options": pb.StepOptions(scale=float("nan"))}, "options.scale"),
        ({"options": pb.StepOptions(scale=float("inf"))}, "options.scale"),
        ({"options": pb.StepOptions(scale=1e300)}, "options.scale"),
        ({"options": pb.StepOptions(softcap=1e300)}, "options.softcap"),
        ({"options": pb.StepOptions(softcap=-1)}, "options.softcap"),
        ({"options": pb.StepOptions(softcap=float("nan"))}, "options.softcap"),
        ({"payload": b""}, "tensors[0].offset"),
        ({"payload": b"short"}, "tensors[0].offset"),
    ],
)
def test_a_step_with_a_bad_field_is_refused_by_name(
    stock: Any, qkv: Any, step_request: Any, change: dict, field: str
) -> None:
    session_id = stock.new_session()
    request = step_request(session_id, qkv(2))
    for name in change:
        request.ClearField(name)
    request.MergeFrom(pb.StepRequest(**change))
    error = refusal(stock.Prefill, request)
    assert isinstance(error, BadTensorError)
    assert error.field == field
    assert stock.Prefill(step_request(session_id, qkv(2))).position == 2


@pytest.mark.parametrize("name", ["scale", "softcap"])
def test_a_number_that_is_an_option_of_queries_is_refused_without_them(
    stock: Any, qkv: Any, step_request: Any, name: str
) -> None:
    session_id, arrays = stock.new_session(), qkv(2)
    del arrays["q"]
    request = step_request(session_id, arrays)
    setattr(request.options, name, 0.5)
    assert refusal(stock.Prefill, request).field == f"options.{name}"
    request.ClearField("options")
    assert stock.Prefill(request).position == 2


def test_the_query_heads_that_a_session_was_made_for_are_kept_to(stock: Any, qkv: Any, step_request: Any) -> None:
    session_id = stock.new_session(num_q_heads=4)
    assert refusal(stock.Decode, step_request(session_id, qkv(1, q_heads=2))).field == "tensors[0].shape"
    assert stock.Decode(step_request(session_id, qkv(1, q_heads=4))).position == 1


def test_more_queries_than_tokens_are_refused(stock: Any, qkv: Any, step_request: Any) -> None:
    session_id = stock.new_session()
    stock.Prefill(step_request(session_id, qkv(3)))
    error = refusal(stock.Decode, step_request(session_id, {"q": qkv(4)["q"]}, position=3))
    assert error.reason == "BAD_TENSOR"
    assert "q must have at most" in error.message


@pytest.mark.parametrize("name", ["GetInfo", "CreateSession", "Prefill", "Decode", "CloseSession", "ListSessions"])
def test_bytes_that_are_no_message_are_refused(stock: Any, name: str) -> None:
    call = stock.channel.unary_unary(f"/numbaflash.v1.Attention/{name}")
    error = refusal(call, b"\x0a\xff")
    assert error.reason == "BAD_TENSOR"
    assert "2 bytes are not a numbaflash.v1." in error.message


@given(
    position=st.sampled_from([0, 1, 2**63, 2**64 - 1]),
    layer=st.sampled_from([0, 1, 2**31]),
    descriptors=st.lists(
        st.builds(
            pb.TensorDesc,
            name=st.sampled_from(["q", "k", "v", "sink_logits", ""]),
            dtype=st.sampled_from(["float32", "float16", "int4", ""]),
            shape=st.lists(st.sampled_from([0, 1, 2, 4, 16, 2**32, 2**63]), max_size=5),
            offset=st.sampled_from([0, 64, 128, 2**63, 2**64 - 64]),
            nbytes=st.sampled_from([0, 64, 128, 256, 2**64 - 1]),
        ),
        max_size=6,
    ),
    payload=st.sampled_from([0, 1, 64, 512]).map(bytes),
)
def test_no_request_breaks_the_server(
    stock: Any, session_id: str, position: int, layer: int, descriptors: list, payload: bytes
) -> None:
    request = pb.StepRequest(
        session_id=session_id, layer=layer, position=position, tensors=descriptors, payload=payload
    )
    assert outcome(stock.Decode, request) in ("taken", "BAD_TENSOR", "POSITION_MISMATCH")


@pytest.fixture(scope="module")
def session_id(stock: Any) -> str:
    return stock.new_session()


def test_nan_and_infinity_stay_in_their_own_row(stock: Any, qkv: Any, step_request: Any) -> None:
    clean, dirty = qkv(3), qkv(3)
    dirty["q"][1] = np.nan
    dirty["q"][2, 0] = np.inf
    outs = []
    for arrays in (clean, dirty):
        answer = stock.Prefill(step_request(stock.new_session(), arrays))
        outs.append(np.frombuffer(answer.payload, np.float32).reshape(3, 4, 16))
    np.testing.assert_array_equal(outs[0][0], outs[1][0])
    np.testing.assert_array_equal(outs[0][2, 1:], outs[1][2, 1:])

"""The slicing codec against protobuf itself: same bytes out, same messages in, same bytes refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from google.protobuf.message import DecodeError
from hypothesis import example, given
from hypothesis import strategies as st

from numbaflash_service import wire
from numbaflash_service.errors import BadTensorError
from numbaflash_service.v1 import attention_pb2 as pb

U32, U64 = st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1)
DESCRIPTORS = st.lists(
    st.builds(
        pb.TensorDesc,
        name=st.text(max_size=5),
        dtype=st.sampled_from(["float32", "bfloat16", "?"]),
        shape=st.lists(U64, max_size=3),
        offset=U64,
        nbytes=U64,
    ),
    max_size=3,
)
REQUESTS = st.builds(
    pb.StepRequest,
    session_id=st.text(max_size=40),
    layer=U32,
    position=U64,
    request_id=st.text(max_size=10),
    options=st.none() | st.builds(pb.StepOptions, scale=st.none() | st.floats(allow_nan=False), softcap=st.just(0.5)),
    tensors=DESCRIPTORS,
)
RESPONSES = st.builds(
    pb.StepResponse, session_id=st.text(max_size=40), position=U64, replayed=st.booleans(), tensors=DESCRIPTORS
)
PAYLOADS = st.binary(max_size=400)
SHAPES = st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=4), max_size=5)
DTYPE = st.sampled_from(sorted(wire.DTYPES))


def varint(value: int, padding: int = 0) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    for _ in range(padding):
        out[-1] |= 0x80
        out.append(0)
    return bytes(out)


@st.composite
def fields(draw: st.DrawFn, depth: int = 0) -> bytes:
    """One top-level field of any number and wire type, in plain or padded encoding, sometimes cut short."""
    number = draw(st.sampled_from([0, 1, 2, 3, 6, 7, 11, 15, 15, 15, 16, 2047]))
    wire_type = draw(st.integers(0, 7 if depth < 3 else 2))
    padding = draw(st.sampled_from([0, 0, 0, 1, 4, 9, 10]))
    tag = varint(number << 3 | wire_type, draw(st.sampled_from([0, 0, 0, 1, 5])))
    if wire_type == 0:
        body = varint(draw(U64), padding)
    elif wire_type == 1:
        body = draw(st.binary(min_size=8, max_size=8))
    elif wire_type == 5:
        body = draw(st.binary(min_size=4, max_size=4))
    elif wire_type == 2:
        content = draw(st.binary(max_size=150))
        body = varint(draw(st.sampled_from([len(content)] * 6 + [len(content) + 1, 2**31, 2**32, 2**63])), padding)
        body += content
    elif wire_type == 3:
        end = number << 3 | 4 if draw(st.booleans()) else 4
        body = b"".join(draw(st.lists(fields(depth + 1), max_size=2))) + varint(end)
    else:
        body = b""
    return (tag + body)[: draw(st.sampled_from([None] * 8 + [1, 2]))]


def stock_decode(cls: type, data: bytes) -> tuple[bytes, bytes] | None:
    try:
        message = cls.FromString(data)
    except DecodeError:
        return None
    payload = message.payload
    message.ClearField("payload")
    return known(message), payload


def whole(parts: wire.Parts) -> Any:
    """Put a message together again; what has no form of its own is refused."""
    message = type(parts.head)()
    message.CopyFrom(parts.head)
    message.MergeFrom(wire.decode(type(parts.head), parts.form))
    return message


def our_decode(cls: type, data: bytes) -> tuple[bytes, bytes] | None:
    try:
        parts = wire.decode_step(cls, data)
        message = whole(parts)
    except BadTensorError:
        return None
    assert not parts.head.payload
    assert not parts.head.tensors
    return known(message), bytes(parts.payload)


def known(message: Any) -> bytes:
    """The message's bytes without its unknown fields: taken apart, they may change their order."""
    message.DiscardUnknownFields()
    return message.SerializeToString(deterministic=True)


@given(head=REQUESTS | RESPONSES, shapes=SHAPES, dtype=DTYPE)
def test_encoded_bytes_are_exactly_protobufs(
    head: pb.StepRequest | pb.StepResponse, shapes: list[list[int]], dtype: str
) -> None:
    head.ClearField("tensors")
    arrays = {f"t{i}": np.full(shape, i + 1).astype(wire.DTYPES[dtype]) for i, shape in enumerate(shapes)}
    ours = wire.encode_step(head, arrays)
    for name, array in arrays.items():
        head.payload += bytes(-len(head.payload) % wire.ALIGNMENT)
        head.tensors.add(name=name, dtype=dtype, shape=array.shape, offset=len(head.payload), nbytes=array.nbytes)
        head.payload += array.tobytes()
    assert ours == head.SerializeToString()


@given(message=REQUESTS | RESPONSES, payload=PAYLOADS)
def test_what_protobuf_encodes_is_taken_apart_without_copying_the_payload(
    message: pb.StepRequest | pb.StepResponse, payload: bytes
) -> None:
    message.payload = payload
    data = message.SerializeToString()
    parts = wire.decode_step(type(message), data)
    assert parts.payload == payload
    assert parts.payload.obj is data
    message.ClearField("payload")
    assert whole(parts) == message
    assert not parts.head.tensors
    assert not isinstance(message, pb.StepRequest) or not parts.head.HasField("options")


@given(data=st.lists(fields(), max_size=5).map(b"".join) | st.binary(max_size=60))
@example(data=b"\x7a\x01a\x7a\x02bc")  # the payload twice: the last one counts
@example(data=b"\x7a\x81\x00a")  # a padded length
@example(data=b"\x78\x05")  # the payload's number with another wire type: an unknown field
@example(data=b"\x7b\x7a\x01a\x7c")  # the payload's number inside a group of that number
@example(data=b"\x7a\xff\xff\xff\xff\x0f")  # a length beyond any message
def test_any_bytes_are_read_or_refused_as_protobuf_does(data: bytes) -> None:
    for cls in (pb.StepRequest, pb.StepResponse):
        assert our_decode(cls, data) == stock_decode(cls, data)


@given(message=REQUESTS, payload=st.binary(min_size=1, max_size=300), data=st.data())
def test_truncated_and_mutated_messages_are_read_or_refused_as_protobuf_does(
    message: pb.StepRequest, payload: bytes, data: st.DataObject
) -> None:
    message.payload = payload
    whole = bytearray(message.SerializeToString())
    at = data.draw(st.integers(0, len(whole) - 1))
    if data.draw(st.booleans()):
        mutated = bytes(whole[:at])
    else:
        whole[at] = data.draw(st.integers(0, 255))
        mutated = bytes(whole)
    assert our_decode(pb.StepRequest, mutated) == stock_decode(pb.StepRequest, mutated)


@given(shapes=SHAPES.filter(bool), dtype=DTYPE, transpose=st.booleans())
def test_tensors_come_back_as_they_went(shapes: list[list[int]], dtype: str, transpose: bool) -> None:
    rng = np.random.default_rng(0)
    arrays = {}
    for i, shape in enumerate(shapes):
        array = rng.standard_normal(shape).astype(wire.DTYPES[dtype])
        arrays[f"t{i}"] = array.T if transpose else array
    parts = wire.decode_step(pb.StepResponse, wire.encode_step(pb.StepResponse(position=3), arrays))
    back = wire.answer_layout(parts.form, len(parts.payload)).views(parts.payload)
    assert back.keys() == arrays.keys()
    for name, array in arrays.items():
        assert back[name].dtype == array.dtype
        assert back[name].shape == array.shape
        assert back[name].tobytes() == array.tobytes()  # C order, whatever the strides were
        assert not back[name].flags.writeable


GOOD = {"name": "q", "dtype": "float32", "shape": [2, 4], "offset": 64, "nbytes": 32}


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"name": ""}, "tensors[0].name"),
        ({"dtype": "float64"}, "tensors[0].dtype"),
        ({"dtype": ""}, "tensors[0].dtype"),
        ({"shape": []}, "tensors[0].shape"),
        ({"shape": [2, 0, 4], "nbytes": 0}, "tensors[0].shape"),
        ({"shape": [1] * 9, "nbytes": 4}, "tensors[0].shape"),
        ({"nbytes": 31}, "tensors[0].nbytes"),
        ({"nbytes": 0}, "tensors[0].nbytes"),
        ({"shape": [2**32, 2**32], "nbytes": 0}, "tensors[0].nbytes"),  # 2^64 elements: 0 in 64 bits
        ({"shape": [2**62, 4], "nbytes": 2**64 - 4}, "tensors[0].nbytes"),
        ({"offset": 32}, "tensors[0].offset"),
        ({"offset": 128}, "tensors[0].offset"),
        ({"offset": 2**64 - 64}, "tensors[0].offset"),  # offset + nbytes is a small number in 64 bits
    ],
)
def test_a_descriptor_that_does_not_match_its_payload_is_refused_by_name(change: dict, field: str) -> None:
    desc = pb.TensorDesc(**{**GOOD, **change})
    with pytest.raises(BadTensorError) as caught:
        wire.read_layout([desc], 96)
    assert caught.value.field == field


@given(
    a=st.integers(0, 4), b=st.integers(0, 4), rows=st.tuples(st.integers(1, 40), st.integers(1, 40)), swap=st.booleans()
)
def test_overlapping_tensors_are_refused_and_others_are_not(a: int, b: int, rows: tuple[int, int], swap: bool) -> None:
    spans = [(64 * a, 64 * a + 4 * rows[0]), (64 * b, 64 * b + 4 * rows[1])]
    descriptors = [
        pb.TensorDesc(name=name, dtype="float32", shape=[count], offset=start, nbytes=stop - start)
        for name, count, (start, stop) in zip("qk", rows, spans, strict=True)
    ]
    if swap:
        descriptors.reverse()
    if max(spans)[0] < min(spans)[1]:
        with pytest.raises(BadTensorError, match="inside another tensor"):
            wire.read_layout(descriptors, 1024)
    else:
        assert len(wire.read_layout(descriptors, 1024).tensors) == 2


def test_a_repeated_name_is_refused() -> None:
    twice = [pb.TensorDesc(**GOOD), pb.TensorDesc(**{**GOOD, "offset": 128})]
    with pytest.raises(BadTensorError) as caught:
        wire.read_layout(twice, 192)
    assert caught.value.field == "tensors[1].name"


def test_long_forms_are_not_remembered() -> None:
    calls = []

    @wire.remember_forms
    def read(form: bytes, payload_bytes: int) -> int:
        calls.append(len(form))
        return payload_bytes

    for _ in range(3):
        assert read(b"x" * 100, 1) == 1
        assert read(b"x" * 5000, 1) == 1
    assert calls == [100, 5000, 5000, 5000]

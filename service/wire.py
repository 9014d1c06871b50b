"""Tensors to bytes and back.

`StepRequest` and `StepResponse` end in one large `bytes payload`. Protobuf copies such a field twice on the way in and
once on the way out. Here the field is sliced off the wire as a view, and joined on the way out; the bytes on the wire
are exactly protobuf's, so any stock client or server is at the other end.

Below, a *head* is the message without its payload.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any, Final, TypeVar

import ml_dtypes
import numpy as np
from google.protobuf.message import DecodeError, Message
from numpy.typing import NDArray

from .errors import BadTensorError
from .v1 import attention_pb2 as pb

ALIGNMENT: Final = 64
MAX_RANK: Final = 8
DTYPES: Final[Mapping[str, np.dtype[Any]]] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
DTYPE_NAMES: Final[Mapping[np.dtype[Any], str]] = {dtype: name for name, dtype in DTYPES.items()}

_LENGTH_DELIMITED = 2
_PAYLOAD_TAG = pb.StepRequest.PAYLOAD_FIELD_NUMBER << 3 | _LENGTH_DELIMITED
_EMPTY = memoryview(b"")
_ZEROS = bytes(ALIGNMENT)

Head = TypeVar("Head", bound=Message)
Steps = TypeVar("Steps", pb.StepRequest, pb.StepResponse)


def decode(cls: type[Head], wire: bytes) -> Head:
    """Parse a message that has no payload.

    Raises:
        BadTensorError: `wire` is not a message of this type.
    """
    try:
        return cls.FromString(wire)
    except DecodeError:
        raise BadTensorError("request", f"these {len(wire)} bytes are not a {cls.DESCRIPTOR.full_name}") from None


def decode_step(cls: type[Steps], wire: bytes) -> tuple[Steps, memoryview]:
    """Parse a `StepRequest` or `StepResponse`.

    Returns:
        The head (its `payload` is empty) and the payload, a view into `wire`.

    Raises:
        BadTensorError: `wire` is not a message of this type.
    """
    span = _find_payload(wire)
    if span is None:  # unusual encodings: protobuf itself says what they mean
        message = decode(cls, wire)
        payload = memoryview(message.payload)
        message.ClearField("payload")
        return message, payload
    tag_at, start, stop = span
    head = wire[:tag_at] if stop == len(wire) else wire[:tag_at] + wire[stop:]
    return decode(cls, head), memoryview(wire)[start:stop] if stop > start else _EMPTY


def encode_step(head: pb.StepRequest | pb.StepResponse, payload: Iterable[bytes | memoryview]) -> bytes:
    """Serialize a head and the pieces of its payload into the bytes that protobuf would have written."""
    pieces = list(payload)
    nbytes = sum(map(len, pieces))
    if nbytes == 0:
        return bytes(head.SerializeToString())
    return b"".join((head.SerializeToString(), _length_prefix(nbytes), *pieces))


def describe(
    arrays: Mapping[str, NDArray[Any]], offset: int = 0
) -> tuple[list[pb.TensorDesc], list[bytes | memoryview]]:
    """Lay arrays out in a payload.

    Args:
        arrays: by name, of any strides, with a dtype of `DTYPES`.
        offset: bytes of payload that come before.

    Returns:
        The descriptors, and the pieces of the payload (views of the arrays where those are C-contiguous).
    """
    descriptors, pieces = [], list[bytes | memoryview]()
    for name, array in arrays.items():
        if gap := -offset % ALIGNMENT:
            pieces.append(_ZEROS[:gap])
            offset += gap
        piece = _raw_bytes(array)
        descriptors.append(
            pb.TensorDesc(
                name=name, dtype=DTYPE_NAMES[array.dtype], shape=array.shape, offset=offset, nbytes=len(piece)
            )
        )
        pieces.append(piece)
        offset += len(piece)
    return descriptors, pieces


def tensors(descriptors: Sequence[pb.TensorDesc], payload: memoryview) -> dict[str, NDArray[Any]]:
    """Read the tensors of a message, as read-only views into its payload (of no particular alignment in memory).

    Raises:
        BadTensorError: descriptors that contradict themselves, each other or the payload; the error names the field.
    """
    arrays = dict[str, NDArray[Any]]()
    used = 0
    for i, desc in enumerate(descriptors):
        name, dtype, shape = desc.name, DTYPES.get(desc.dtype), tuple(desc.shape)
        offset, nbytes = desc.offset, desc.nbytes
        count = math.prod(shape)  # Python's integers do not wrap, whatever the product
        if (
            not name
            or name in arrays
            or dtype is None
            or not 1 <= len(shape) <= MAX_RANK
            or not count
            or nbytes != count * dtype.itemsize
            or offset % ALIGNMENT
            or offset + nbytes > len(payload)
        ):
            raise _contradiction(i, desc, len(payload), repeated=name in arrays)
        if offset < used:
            _check_overlap(descriptors)
        used = max(used, offset + nbytes)
        arrays[name] = np.frombuffer(payload, dtype, count, offset).reshape(shape)
    return arrays


def _contradiction(index: int, desc: pb.TensorDesc, payload_bytes: int, *, repeated: bool) -> BadTensorError:
    """Say what is wrong with a descriptor, the first of what may be several things."""
    dtype, shape = DTYPES.get(desc.dtype), tuple(desc.shape)
    if not desc.name or repeated:
        field, why = "name", "names are not empty and not repeated"
    elif dtype is None:
        field, why = "dtype", f"got {desc.dtype[:32]!r}; takes {', '.join(DTYPES)}"
    elif not 1 <= len(shape) <= MAX_RANK or 0 in shape:
        field, why = "shape", f"got {shape[: MAX_RANK + 1]}; takes 1 to {MAX_RANK} axes, none of them empty"
    elif desc.nbytes != (wanted := math.prod(shape) * dtype.itemsize):
        field, why = "nbytes", f"got {desc.nbytes}; {desc.dtype} {shape} has {wanted}"
    elif desc.offset % ALIGNMENT:
        field, why = "offset", f"got {desc.offset}; takes multiples of {ALIGNMENT}"
    else:
        stop = desc.offset + desc.nbytes
        field, why = "offset", f"bytes {desc.offset} to {stop} of a payload of {payload_bytes}"
    return BadTensorError(f"tensors[{index}].{field}", f"{desc.name[:32]!r}: {why}")


def _check_overlap(descriptors: Sequence[pb.TensorDesc]) -> None:
    spans = sorted((desc.offset, desc.offset + desc.nbytes, i) for i, desc in enumerate(descriptors))
    for (_, stop, _), (start, _, i) in pairwise(spans):
        if start < stop:
            raise BadTensorError(f"tensors[{i}].offset", f"byte {start} is inside another tensor, which ends at {stop}")


def _raw_bytes(array: NDArray[Any]) -> memoryview:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _find_payload(wire: bytes) -> tuple[int, int, int] | None:
    """Walk the top-level fields of a message.

    Returns:
        Where the payload's tag is, where its bytes start and where they stop (all the end of `wire` where there is no
        payload). None for anything but one payload among fields in the plainest encoding: one-byte tags, lengths
        without padding, no groups. The walk never goes past the end of `wire`.
    """
    end = len(wire)
    at = 0
    span = None
    while at < end:
        tag_at, tag = at, wire[at]
        at += 1
        wire_type = tag & 7
        if tag < 8 or tag >= 0x80:  # field number 0 is not valid; 16 and above take a longer tag
            return None
        if wire_type == _LENGTH_DELIMITED:
            length, shift = 0, 0
            while True:
                if at >= end or shift > 28:
                    return None
                byte = wire[at]
                at += 1
                length |= (byte & 0x7F) << shift
                if byte < 0x80:
                    break
                shift += 7
            if (byte == 0 and shift) or length > end - at:
                return None
            if tag == _PAYLOAD_TAG:
                if span is not None:
                    return None
                span = tag_at, at, at + length
            at += length
        elif wire_type == 0:
            stop = min(end, at + 10)
            while at < stop and wire[at] >= 0x80:
                at += 1
            if at >= stop:
                return None
            at += 1
        elif wire_type in (1, 5):
            at += 8 if wire_type == 1 else 4
            if at > end:
                return None
        else:
            return None
    return span or (end, end, end)


def _length_prefix(nbytes: int) -> bytes:
    prefix = bytearray((_PAYLOAD_TAG,))
    while nbytes >= 0x80:
        prefix.append(nbytes & 0x7F | 0x80)
        nbytes >>= 7
    prefix.append(nbytes)
    return bytes(prefix)

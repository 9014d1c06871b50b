"""Tensors to bytes and back.

`StepRequest` and `StepResponse` end in one large `bytes payload`. Protobuf copies such a field twice on the way in and
once on the way out. Here it is sliced off the wire as a view, and joined on the way out; the bytes on the wire are
exactly protobuf's, so any stock client or server is at the other end.

A message comes apart in three: its *head* (who, where, which), its *form* (options and tensor descriptors), and its
payload. The steps of a sequence have the same form again and again, so a form is kept as bytes, and what it means is
worked out once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any, Final, Generic, NamedTuple, TypeAlias, TypeVar

import ml_dtypes
import numpy as np
from google.protobuf.message import DecodeError, Message
from numpy.typing import NDArray

from .errors import BadTensorError
from .v1 import attention_pb2 as pb

ALIGNMENT: Final = 64
# Of HTTP/2, for both sides' `grpc.http2.max_frame_size`: 4 MiB in frames of this size, and not in 256 of 16 KiB, take a
# ninth less time there and back (7.7 ms, not 8.6). In one frame they take 7.1, but what others send on the connection
# waits for the end of a frame.
FRAME_BYTES: Final = 1 << 20
MAX_RANK: Final = 8
DTYPES: Final[Mapping[str, np.dtype[Any]]] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
DTYPE_NAMES: Final[Mapping[np.dtype[Any], str]] = {dtype: name for name, dtype in DTYPES.items()}

# Forms that are remembered; longer ones than a few descriptors take are not, so that nobody can fill the memory.
_REMEMBERED_FORMS: Final = 1024
_LONGEST_REMEMBERED_FORM: Final = 1024

_LENGTH_DELIMITED = 2
_PAYLOAD_TAG = pb.StepRequest.PAYLOAD_FIELD_NUMBER << 3 | _LENGTH_DELIMITED
_ZEROS = bytes(ALIGNMENT)
_LARGEST_ELEMENT = 4

M = TypeVar("M", bound=Message)
Step = TypeVar("Step", pb.StepRequest, pb.StepResponse)
StepType: TypeAlias = type[pb.StepRequest] | type[pb.StepResponse]
T = TypeVar("T")

# The fields of the form; they are the last ones before the payload.
_FORM_FIELDS: Final[Mapping[StepType, tuple[str, ...]]] = {
    pb.StepRequest: ("options", "tensors"),
    pb.StepResponse: ("tensors",),
}
_FIRST_FORM_TAG: Final[Mapping[StepType, int]] = {
    cls: cls.DESCRIPTOR.fields_by_name[fields[0]].number << 3 for cls, fields in _FORM_FIELDS.items()
}


class Parts(NamedTuple, Generic[Step]):
    """A message taken apart: its head (a message without the other fields), its form in bytes, its payload."""

    head: Step
    form: bytes
    payload: memoryview


@dataclass(frozen=True)
class Layout:
    """Where tensors lie in a payload, checked against its size.

    Attributes:
        tensors: Name, dtype, shape and offset in bytes of each.
    """

    tensors: tuple[tuple[str, np.dtype[Any], tuple[int, ...], int], ...]

    def views(self, payload: memoryview | NDArray[np.uint8]) -> dict[str, NDArray[Any]]:
        """Return the tensors by name, as views into a payload of the size that the layout was read for."""
        return {name: np.ndarray(shape, dtype, payload, offset) for name, dtype, shape, offset in self.tensors}


def decode(cls: type[M], wire: bytes) -> M:
    """Parse a message that has no payload.

    Raises:
        BadTensorError: `wire` is not a message of this type.
    """
    try:
        return cls.FromString(wire)
    except DecodeError:
        raise BadTensorError("request", f"{len(wire)} bytes are not a {cls.DESCRIPTOR.full_name}") from None


def decode_step(cls: type[Step], wire: bytes) -> Parts[Step]:
    """Take a `StepRequest` or `StepResponse` apart; the payload is a view into `wire`.

    Raises:
        BadTensorError: `wire` is not a message of this type, as far as head and payload say.
    """
    found = _find_form_and_payload(cls, wire)
    if found is not None:
        form_at, payload_tag_at, payload_at = found
        head = decode(cls, wire[:form_at])
        return Parts(head, wire[form_at:payload_tag_at], memoryview(wire)[payload_at:])
    # Unusual encodings: protobuf itself says what they mean.
    head = decode(cls, wire)
    payload = memoryview(head.payload)
    form = cls()
    for field in _FORM_FIELDS[cls]:
        if field == "tensors" or head.HasField("options"):  # which only a request has
            getattr(form, field).MergeFrom(getattr(head, field))
        head.ClearField(field)
    head.ClearField("payload")
    return Parts(head, form.SerializeToString(), payload)


def encode_step(
    head: pb.StepRequest | pb.StepResponse | pb.CreateSessionRequest, arrays: Mapping[str, NDArray[Any]]
) -> bytes:
    """Serialize a head (with options, if any) and tensors into the bytes that protobuf would have written.

    Args:
        head: A message without tensors and payload.
        arrays: Tensors by name, of any strides, with a dtype of `DTYPES`.
    """
    if not arrays:
        return head.SerializeToString()
    return _join(head, *_lay_out(head, arrays), arrays)


def encode_request(head: pb.StepRequest, arrays: Mapping[str, NDArray[Any]]) -> bytes:
    """Serialize a step's request, with "=" behind its request_id until all elements of the payload lie aligned in it.

    Such a payload is computed where it lies: 0.5 ms less for one of 4 MiB.
    """
    descriptors, gaps = _lay_out(head, arrays)
    head.request_id += "=" * (-(head.ByteSize() + len(descriptors)) % _LARGEST_ELEMENT)
    return _join(head, descriptors, gaps, arrays)


def remember_forms(function: Callable[..., T]) -> Callable[..., T]:
    """Cache a function of a form's bytes and other hashable arguments."""
    remembering = lru_cache(_REMEMBERED_FORMS)(function)

    def call(form: bytes, *arguments: Any) -> T:
        return (remembering if len(form) <= _LONGEST_REMEMBERED_FORM else function)(form, *arguments)

    return call


@remember_forms
def answer_layout(form: bytes, payload_bytes: int) -> Layout:
    """Read the form of a `StepResponse`."""
    return read_layout(decode(pb.StepResponse, form).tensors, payload_bytes)


def read_layout(descriptors: Sequence[pb.TensorDesc], payload_bytes: int) -> Layout:
    """Check the descriptors of a message against each other and the size of its payload.

    Raises:
        BadTensorError: They contradict themselves, each other or the payload; the error names the field.
    """
    tensors = []
    for i, desc in enumerate(descriptors):
        shape, dtype = tuple(desc.shape), DTYPES.get(desc.dtype)
        stop = desc.offset + desc.nbytes
        name = desc.name[:32]
        if not name or any(desc.name == other.name for other in descriptors[:i]):
            field, why = "name", "names are not empty and not repeated"
        elif dtype is None:
            field, why = "dtype", f"got {desc.dtype[:32]!r}; takes {', '.join(DTYPES)}"
        elif not 1 <= len(shape) <= MAX_RANK or 0 in shape:
            field, why = "shape", f"got {shape[: MAX_RANK + 1]}; takes 1 to {MAX_RANK} axes, none of them empty"
        # Python's integers do not wrap, whatever the product.
        elif desc.nbytes != (needed := math.prod(shape) * dtype.itemsize):
            field, why = "nbytes", f"got {desc.nbytes}; {desc.dtype} {shape} has {needed}"
        elif desc.offset % ALIGNMENT:
            field, why = "offset", f"got {desc.offset}; takes multiples of {ALIGNMENT}"
        elif stop > payload_bytes:
            field, why = "offset", f"bytes {desc.offset} to {stop} of a payload of {payload_bytes}"
        else:
            tensors.append((desc.name, dtype, shape, desc.offset))
            continue
        raise BadTensorError(f"tensors[{i}].{field}", f"{name!r}: {why}")
    spans = sorted((desc.offset, desc.offset + desc.nbytes, i) for i, desc in enumerate(descriptors))
    for (_, stop, _), (start, _, i) in pairwise(spans):
        if start < stop:
            raise BadTensorError(f"tensors[{i}].offset", f"byte {start} is inside another tensor, which ends at {stop}")
    return Layout(tuple(tensors))


def _join(head: Message, descriptors: bytes, gaps: Sequence[int], arrays: Mapping[str, NDArray[Any]]) -> bytes:
    pieces: list[bytes | memoryview] = [head.SerializeToString(), descriptors]
    for gap, array in zip(gaps, arrays.values(), strict=True):
        if gap:
            pieces.append(_ZEROS[:gap])
        pieces.append(np.ascontiguousarray(array).view(np.uint8).data)
    return b"".join(pieces)


def _lay_out(head: Message, arrays: Mapping[str, NDArray[Any]]) -> tuple[bytes, tuple[int, ...]]:
    cls: Any = type(head)
    return _describe(cls, tuple([(name, array.dtype, array.shape) for name, array in arrays.items()]))


@lru_cache(_REMEMBERED_FORMS)
def _describe(cls: Any, specs: tuple[tuple[str, np.dtype[Any], tuple[int, ...]], ...]) -> tuple[bytes, tuple[int, ...]]:
    """Lay tensors out: descriptors and the payload's tag and length as bytes, and the gap in front of each tensor."""
    message, gaps, end = cls(), [], 0
    for name, dtype, shape in specs:
        gaps.append(-end % ALIGNMENT)
        offset, nbytes = end + gaps[-1], math.prod(shape) * dtype.itemsize
        message.tensors.add(name=name, dtype=DTYPE_NAMES[dtype], shape=shape, offset=offset, nbytes=nbytes)
        end = offset + nbytes
    return message.SerializeToString() + (_payload_prefix(end) if end else b""), tuple(gaps)


def _find_form_and_payload(cls: StepType, wire: bytes) -> tuple[int, int, int] | None:
    """Walk the top-level fields of a message.

    Returns:
        Where the form starts, where the payload's tag stands and where the payload's bytes start (all the end of `wire`
        where there is none). None for anything but the plainest encoding: head, form and payload in this order, the
        payload once and last, one-byte tags, lengths without padding, no groups. The walk never leaves `wire`.
    """
    end = len(wire)
    first_form_tag = _FIRST_FORM_TAG[cls]
    at, form_at = 0, -1
    while at < end:
        tag_at, tag = at, wire[at]
        at += 1
        wire_type = tag & 7
        if tag < 8 or tag >= 0x80:  # field number 0 is not valid; 16 and above take a longer tag
            return None
        if tag >= first_form_tag:
            if form_at < 0:
                form_at = tag_at
        elif form_at >= 0:
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
                return (form_at, tag_at, at) if at + length == end else None
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
    return (end if form_at < 0 else form_at), end, end


def _payload_prefix(nbytes: int) -> bytes:
    prefix = bytearray((_PAYLOAD_TAG,))
    while nbytes >= 0x80:
        prefix.append(nbytes & 0x7F | 0x80)
        nbytes >>= 7
    prefix.append(nbytes)
    return bytes(prefix)

"""Requests that are nearly right: a seeded mutator of protobuf messages, field by field and byte by byte."""

from __future__ import annotations

import random
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError, Message

INTEGERS = {
    FieldDescriptor.CPPTYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_INT64: (-(2**63), 2**63 - 1),
    FieldDescriptor.CPPTYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, 2**64 - 1),
}
INTERESTING = [0, 1, 2, 3, 7, 8, 16, 63, 64, 65, 127, 128, 255, 256, 1024, 4096, 2**16, 2**31 - 1, 2**31, 2**32 - 1]
INTERESTING += [2**53, 2**62, 2**63 - 1, 2**63, 2**64 - 64, 2**64 - 1, -1]
FLOATS = [0.0, -0.0, 1.0, -1.0, 1e-300, 1e300, float("nan"), float("inf"), float("-inf")]
WORDS = ["", "q", "k", "v", "alibi_slopes", "sink_logits", "float16", "bfloat16", "float32", "int8", "int4", "x" * 65]
WORDS += ["../../etc/passwd", "a\0b", "é" * 40, "0" * 32, "channel_scales", "hqq:g64", "awq", "name", "."]


def mutate(rng: random.Random, message: Message) -> bytes:
    """Serialize a message with one to four faults in it."""
    in_fields = rng.random() < 0.6 and len(message.DESCRIPTOR.fields) > 0
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        if in_fields:
            _change_a_field(rng, message)
    data = message.SerializeToString()
    if not in_fields or rng.random() < 0.1:
        for _ in range(rng.choice([1, 1, 2, 4])):
            data = _change_bytes(rng, data)
    return data


def _change_a_field(rng: random.Random, message: Any) -> None:
    field = rng.choice(message.DESCRIPTOR.fields)
    if field.message_type:
        if field.is_repeated:
            _change_messages(rng, getattr(message, field.name))
        elif rng.random() < 0.1:
            message.ClearField(field.name)
        else:
            _change_a_field(rng, getattr(message, field.name))
    elif field.is_repeated:
        values = list(getattr(message, field.name))
        at = rng.randrange(len(values) + 1)
        values[at : at + rng.choice([0, 1])] = [_value(rng, field) for _ in range(rng.choice([0, 1, 1, 2, 9]))]
        del getattr(message, field.name)[:]
        getattr(message, field.name).extend(values)
    else:
        old = getattr(message, field.name)
        setattr(message, field.name, _near(rng, field, old) if rng.random() < 0.4 else _value(rng, field))


def _change_messages(rng: random.Random, messages: Any) -> None:
    if not messages or rng.random() < 0.1:
        messages.add()
    chosen = rng.choice(messages)
    action = rng.random()
    if action < 0.1:
        messages.add().CopyFrom(chosen)
    elif action < 0.2:
        del messages[rng.randrange(len(messages))]
    else:
        _change_a_field(rng, chosen)


def _value(rng: random.Random, field: Any) -> Any:
    kind = field.cpp_type
    if kind in INTEGERS:
        least, most = INTEGERS[kind]
        value = rng.choice(INTERESTING) if rng.random() < 0.8 else rng.getrandbits(64)
        return min(max(value, least), most)
    if kind == FieldDescriptor.CPPTYPE_DOUBLE:
        return rng.choice(FLOATS)
    if kind == FieldDescriptor.CPPTYPE_BOOL:
        return rng.random() < 0.5
    if field.type == FieldDescriptor.TYPE_BYTES:
        return rng.randbytes(rng.choice([0, 1, 63, 64, 512, 4096]))
    return rng.choice(WORDS)


def _near(rng: random.Random, field: Any, old: Any) -> Any:
    """A value that is nearly the old one."""
    kind = field.cpp_type
    if kind in INTEGERS:
        least, most = INTEGERS[kind]
        return min(max(old + rng.choice([-64, -1, 1, 64]), least), most)
    if isinstance(old, (str, bytes)):
        return old[: rng.randrange(len(old) + 1)] if rng.random() < 0.5 else old + old[: rng.choice([1, 64])]
    return _value(rng, field)


def _change_bytes(rng: random.Random, data: bytes) -> bytes:
    at = rng.randrange(len(data) + 1)
    # Tags and lengths stand at the start, tensors' bytes behind them: half of the faults go there.
    at = min(at, rng.randrange(256)) if rng.random() < 0.5 else at
    end = min(len(data), at + rng.choice([1, 1, 2, 8, 64]))
    head, middle, tail = data[:at], data[at:end], data[end:]
    action = rng.randrange(8)
    if action == 0:
        middle = bytes(byte ^ 1 << rng.randrange(8) for byte in middle)
    elif action == 1:
        middle = rng.randbytes(len(middle))
    elif action == 2:
        middle = b""
    elif action == 3:
        middle += rng.randbytes(rng.choice([1, 8, 300]))
    elif action == 4:
        middle += middle
    elif action == 5:
        middle = bytes([rng.choice([0x00, 0x01, 0x7A, 0x7B, 0x7C, 0x7F, 0x80, 0xFF])]) * len(middle)
    elif action == 6:
        tail = b""
    else:
        middle = b"\xff" * 9 + b"\x01" + middle
    return head + middle + tail


def parses(cls: Any, data: bytes) -> bool:
    """Whether protobuf takes the bytes for such a message."""
    try:
        cls.FromString(data)
    except DecodeError:
        return False
    return True

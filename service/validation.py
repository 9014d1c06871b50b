"""Every field of every request, checked in one place before anything is touched.

Each function takes a message and returns checked values, or raises `BadTensorError` with the field's name.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from google.protobuf.duration_pb2 import Duration
from numpy.typing import NDArray

from . import wire
from .errors import BadTensorError
from .sessions import Shape
from .v1 import attention_pb2 as pb

MAX_LAYERS: Final = 1024
MAX_HEADS: Final = 1024
MAX_HEAD_DIM: Final = 256
MAX_CAPACITY: Final = 1 << 24
MAX_REQUEST_ID_BYTES: Final = 64
_DEFAULT_PAGE_SIZE: Final = 64
_DEFAULT_ROLLBACK: Final = 64
_MAX_ROLLBACK: Final = 1 << 16


@dataclass(frozen=True, eq=False)
class StepArguments:
    """What `RingKVCache.step`, `append` or `attend` is called with.

    Attributes:
        tensors: "q", "k" and "v"; or "k" and "v"; or "q".
        options: Keyword arguments.
    """

    tensors: dict[str, NDArray[Any]]
    options: dict[str, Any]


def session_shape(message: pb.SessionShape) -> Shape:
    """Check what a session is to be made for."""
    kv_heads = _between("shape.num_kv_heads", message.num_kv_heads, 1, MAX_HEADS)
    q_heads = message.num_q_heads
    if q_heads % kv_heads or q_heads > MAX_HEADS:
        raise BadTensorError(
            "shape.num_q_heads", f"got {q_heads}; takes 0 or a multiple of num_kv_heads ({kv_heads}) up to {MAX_HEADS}"
        )
    capacity = _between("shape.capacity", message.capacity, 1, MAX_CAPACITY)
    dtype = message.dtype or "float16"
    if dtype not in wire.DTYPES:
        raise BadTensorError("shape.dtype", f"got {dtype[:32]!r}; takes {', '.join(wire.DTYPES)}")
    if message.quantizer:
        raise BadTensorError("shape.quantizer", f"got {message.quantizer[:32]!r}; this version has none")
    page_size = message.page_size or _DEFAULT_PAGE_SIZE
    if not 8 <= page_size <= 256 or page_size & (page_size - 1):
        raise BadTensorError("shape.page_size", f"got {page_size}; takes a power of two, 8 to 256")
    return Shape(
        num_layers=_between("shape.num_layers", message.num_layers, 1, MAX_LAYERS),
        num_kv_heads=kv_heads,
        head_dim=_between("shape.head_dim", message.head_dim, 1, MAX_HEAD_DIM),
        num_q_heads=q_heads,
        capacity=capacity,
        sink_tokens=_between("shape.sink_tokens", message.sink_tokens, 0, capacity - 1),
        dtype=dtype,
        page_size=page_size,
        rollback=_between("shape.rollback", message.rollback, 0, _MAX_ROLLBACK)
        if message.HasField("rollback")
        else _DEFAULT_ROLLBACK,
    )


def time_to_live(message: Duration, longest: float) -> float:
    """Check how long a session is to live without a step, in seconds."""
    if not 0 <= message.nanos < 1_000_000_000:
        raise BadTensorError("ttl", f"got {message.nanos} nanos; takes 0 to 999999999")
    seconds = message.seconds + message.nanos / 1e9
    if not 0 < seconds <= longest:
        raise BadTensorError("ttl", f"got {seconds:g} s; takes more than 0 and at most {longest:g} s")
    return seconds


def step(request: pb.StepRequest, payload: memoryview, shape: Shape) -> StepArguments:
    """Check a step against the session that it is for."""
    if request.layer >= shape.num_layers:
        raise BadTensorError("layer", f"got {request.layer}; takes 0 to {shape.num_layers - 1}")
    if len(request.request_id.encode()) > MAX_REQUEST_ID_BYTES:
        raise BadTensorError("request_id", f"got more than {MAX_REQUEST_ID_BYTES} bytes")
    arrays = wire.tensors(request.tensors, payload)
    fields = {desc.name: f"tensors[{i}]" for i, desc in enumerate(request.tensors)}
    for name in arrays.keys() - {"q", "k", "v", "alibi_slopes", "sink_logits"}:
        raise BadTensorError(f"{fields[name]}.name", f"got {name[:32]!r}; takes q, k, v, alibi_slopes and sink_logits")
    given: dict[str, NDArray[Any]] = {name: arrays[name] for name in ("q", "k", "v") if name in arrays}
    if tuple(given) not in (("q", "k", "v"), ("k", "v"), ("q",)):
        raise BadTensorError("tensors", f"got {', '.join(given) or 'none'}; takes q, k and v, or k and v, or q")
    for name, array in given.items():
        _check_tensor(name, array, fields[name], given, shape)
    if "q" not in given:
        for name in arrays.keys() - given.keys():
            raise BadTensorError(f"{fields[name]}.name", f"{name} is an option of q, and there is no q")
        return StepArguments(given, {})
    return StepArguments(given, _options(request, arrays, fields))


def _check_tensor(name: str, array: NDArray[Any], field: str, given: dict[str, NDArray[Any]], shape: Shape) -> None:
    first_name, first = next(iter(given.items()))
    if array.dtype != first.dtype:
        raise BadTensorError(f"{field}.dtype", f"{name} has {array.dtype}; takes {first_name}'s, {first.dtype}")
    if array.ndim != 3:
        raise BadTensorError(f"{field}.shape", f"{name} has {array.shape}; takes (tokens, heads, head_dim)")
    tokens, heads, head_dim = array.shape
    if head_dim != shape.head_dim:
        raise BadTensorError(f"{field}.shape", f"{name} has head_dim {head_dim}; the session has {shape.head_dim}")
    if tokens != len(first):
        raise BadTensorError(f"{field}.shape", f"{name} has {tokens} tokens; takes {first_name}'s, {len(first)}")
    if name != "q":
        if heads != shape.num_kv_heads:
            raise BadTensorError(f"{field}.shape", f"{name} has {heads} heads; the session has {shape.num_kv_heads}")
    elif shape.num_q_heads and heads != shape.num_q_heads:
        raise BadTensorError(f"{field}.shape", f"q has {heads} heads; the session has {shape.num_q_heads}")
    elif heads % shape.num_kv_heads or heads > MAX_HEADS:
        raise BadTensorError(
            f"{field}.shape",
            f"q has {heads} heads; takes a multiple of the session's {shape.num_kv_heads} kv heads, up to {MAX_HEADS}",
        )


def _options(request: pb.StepRequest, arrays: dict[str, NDArray[Any]], fields: dict[str, str]) -> dict[str, Any]:
    options = dict[str, Any]()
    if request.options.HasField("scale"):
        if not math.isfinite(request.options.scale):
            raise BadTensorError("options.scale", f"got {request.options.scale}; takes finite numbers")
        options["scale"] = request.options.scale
    if request.options.softcap:
        if not (math.isfinite(request.options.softcap) and request.options.softcap > 0):
            raise BadTensorError(
                "options.softcap", f"got {request.options.softcap}; takes 0 (none) or a positive number"
            )
        options["softcap"] = request.options.softcap
    heads = arrays["q"].shape[1]
    for name in ("alibi_slopes", "sink_logits"):
        if name in arrays:
            array = arrays[name]
            if array.dtype != np.float32:
                raise BadTensorError(f"{fields[name]}.dtype", f"{name} has {array.dtype}; takes float32")
            if array.shape != (heads,):
                raise BadTensorError(f"{fields[name]}.shape", f"{name} has {array.shape}; takes ({heads},), q's heads")
            options[name] = array.copy()  # aligned, which a slice of the wire need not be
    return options


def _between(field: str, value: int, least: int, most: int) -> int:
    if not least <= value <= most:
        raise BadTensorError(field, f"got {value}; takes {least} to {most}")
    return value

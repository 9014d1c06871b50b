"""Every field of every request, checked in one place before anything is touched.

Each function takes a message and returns checked values, or raises `BadTensorError` with the field's name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np
from google.protobuf.duration_pb2 import Duration
from numpy.typing import NDArray

from numbaflash.cache.page_format import BITS
from numbaflash.cache.quantizers import AWQQuantizer, quantizer_of
from numbaflash.problem import MAX_FLOAT32

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
_SNAPSHOT_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


@dataclass(frozen=True)
class StepForm:
    """What all steps of one form have in common, every value checked; only the numbers in the tensors differ.

    Attributes:
        layout: Where "q" (T, Hq, D), "k" and "v" (T, Hkv, D) lie, or the last two, or the first; and array options.
        tokens: T.
        out_nbytes: Bytes of the output.
        numbers: Options of `RingKVCache.step` that are numbers.
        arrays: Names of those that are arrays.
        alike: Steps of different sessions can be computed together where this is equal.
        epoch: How many times the client knows the session to have been truncated.
    """

    layout: wire.Layout
    tokens: int
    out_nbytes: int
    numbers: Mapping[str, float]
    arrays: tuple[str, ...]
    alike: tuple[object, ...]
    epoch: int

    def arguments(self, payload: memoryview | NDArray[np.uint8]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the tensors, and the options, as views into a step's payload."""
        tensors = self.layout.views(payload)
        options = {name: tensors.pop(name) for name in self.arrays}
        return tensors, {**options, **self.numbers}


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
    if dtype not in (*wire.DTYPES, *BITS):
        raise BadTensorError("shape.dtype", f"got {dtype[:32]!r}; takes {', '.join((*wire.DTYPES, *BITS))}")
    page_size = message.page_size or _DEFAULT_PAGE_SIZE
    if not 8 <= page_size <= 256 or page_size & (page_size - 1):
        raise BadTensorError("shape.page_size", f"got {page_size}; takes a power of two, 8 to 256")
    num_layers = _between("shape.num_layers", message.num_layers, 1, MAX_LAYERS)
    head_dim = _between("shape.head_dim", message.head_dim, 1, MAX_HEAD_DIM)
    return Shape(
        num_layers=num_layers,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        num_q_heads=q_heads,
        capacity=capacity,
        sink_tokens=_between("shape.sink_tokens", message.sink_tokens, 0, capacity - 1),
        dtype=dtype,
        page_size=page_size,
        rollback=_between("shape.rollback", message.rollback, 0, _MAX_ROLLBACK)
        if message.HasField("rollback")
        else _DEFAULT_ROLLBACK,
        quantizer=_quantizer(message.quantizer, dtype, (num_layers, kv_heads, head_dim)),
    )


def _quantizer(text: str, dtype: str, model: tuple[int, int, int]) -> str:
    """Check a quantizer against the model, and return its text."""
    if dtype not in BITS:
        if text:
            raise BadTensorError("shape.quantizer", f"got {text[:64]!r}; dtype {dtype} takes none")
        return ""
    unit = np.ones(model, np.float32) if text.startswith(AWQQuantizer.name) else None
    try:
        quantizer = quantizer_of(text[:256] or "group", unit)
        quantizer.page_format(dtype, model[1], _DEFAULT_PAGE_SIZE, model[2])
    except ValueError as error:
        raise BadTensorError("shape.quantizer", str(error)) from error
    return quantizer.text


def channel_scales(message: pb.CreateSessionRequest, shape: Shape) -> NDArray[np.float32] | None:
    """Check awq's scales, and copy them out of the message; None for other quantizers."""
    given = wire.read_layout(message.tensors, len(message.payload)).views(memoryview(message.payload))
    if not shape.quantizer.startswith(AWQQuantizer.name):
        if given:
            raise BadTensorError("tensors", f"got {', '.join(given)}; takes none but for quantizer awq")
        return None
    if list(given) != ["channel_scales"]:
        raise BadTensorError("tensors", f"got {', '.join(given) or 'none'}; quantizer awq takes channel_scales")
    scales: NDArray[Any] = given["channel_scales"]
    model = shape.num_layers, shape.num_kv_heads, shape.head_dim
    if scales.dtype != np.float32 or scales.shape != model:
        raise BadTensorError("tensors[0].shape", f"got {scales.dtype} {scales.shape}; takes float32 {model}")
    if not (np.isfinite(scales) & (scales > 0)).all():
        raise BadTensorError("tensors[0]", "channel_scales are not all positive and finite")
    return scales.copy()


def time_to_live(message: Duration, longest: float) -> float:
    """Check how long a session is to live without a step, in seconds."""
    if not 0 <= message.nanos < 1_000_000_000:
        raise BadTensorError("ttl", f"got {message.nanos} nanos; takes 0 to 999999999")
    seconds = message.seconds + message.nanos / 1e9
    if not 0 < seconds <= longest:
        raise BadTensorError("ttl", f"got {seconds:g} s; takes more than 0 and at most {longest:g} s")
    return seconds


def snapshot_name(name: str) -> str:
    """Check the name of a snapshot: one part of a path, and a visible one."""
    if not _SNAPSHOT_NAME.fullmatch(name):
        raise BadTensorError(
            "name", "takes 1 to 128 letters, digits, '-', '_' and '.', the first one a letter or a digit"
        )
    return name


def step_head(request: pb.StepRequest, shape: Shape) -> None:
    """Check what a step says of itself beside its form."""
    if request.layer >= shape.num_layers:
        raise BadTensorError("layer", f"got {request.layer}; takes 0 to {shape.num_layers - 1}")
    if len(request.request_id.encode()) > MAX_REQUEST_ID_BYTES:
        raise BadTensorError("request_id", f"got more than {MAX_REQUEST_ID_BYTES} bytes")


@wire.remember_forms
def step_form(form: bytes, payload_bytes: int, shape: Shape) -> StepForm:
    """Check options and tensors of a step against the session that it is for."""
    request = wire.decode(pb.StepRequest, form)
    layout = wire.read_layout(request.tensors, payload_bytes)
    tensors = {
        name: _Tensor(f"tensors[{i}]", dtype, tensor_shape)
        for i, (name, dtype, tensor_shape, _) in enumerate(layout.tensors)
    }
    arrays = tuple(name for name in tensors if name in ("alibi_slopes", "sink_logits"))
    for name in tensors.keys() - {"q", "k", "v", *arrays}:
        field = tensors[name].field
        raise BadTensorError(f"{field}.name", f"got {name[:32]!r}; takes q, k, v, alibi_slopes and sink_logits")
    given = {name: tensors[name] for name in ("q", "k", "v") if name in tensors}
    if list(given) not in (["q", "k", "v"], ["k", "v"], ["q"]):
        raise BadTensorError("tensors", f"got {', '.join(given) or 'none'}; takes q, k and v, or k and v, or q")
    first_name, first = next(iter(given.items()))
    for name, tensor in given.items():
        if tensor.dtype != first.dtype:
            raise BadTensorError(
                f"{tensor.field}.dtype", f"{name} has {tensor.dtype}; takes {first_name}'s, {first.dtype}"
            )
        _check_tensor(name, tensor, shape)
        if tensor.shape[0] != first.shape[0]:
            raise BadTensorError(
                f"{tensor.field}.shape", f"{name} has {tensor.shape[0]} tokens; takes {first_name}'s, {first.shape[0]}"
            )
    for name in arrays:
        _check_option(name, tensors[name], given.get("q"))
    numbers = _numbers(request.options)
    for name in numbers:
        if "q" not in given:
            raise BadTensorError(f"options.{name}", "it is an option of q, and there is no q")
    stored = shape.dtype, shape.quantizer, shape.page_size if shape.quantizer else 0
    return StepForm(
        layout=layout,
        tokens=first.shape[0],
        out_nbytes=math.prod(first.shape) * first.dtype.itemsize if "q" in given else 0,
        numbers=numbers,
        arrays=arrays,
        alike=(*((name, tensor.shape) for name, tensor in given.items()), first.dtype, stored, *numbers.items()),
        epoch=request.options.epoch,
    )


class _Tensor(NamedTuple):
    field: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]


def _check_tensor(name: str, tensor: _Tensor, shape: Shape) -> None:
    field = f"{tensor.field}.shape"
    if len(tensor.shape) != 3:
        raise BadTensorError(field, f"{name} has {tensor.shape}; takes (tokens, heads, head_dim)")
    _, heads, head_dim = tensor.shape
    if head_dim != shape.head_dim:
        raise BadTensorError(field, f"{name} has head_dim {head_dim}; the session has {shape.head_dim}")
    if name != "q":
        if heads != shape.num_kv_heads:
            raise BadTensorError(field, f"{name} has {heads} heads; the session has {shape.num_kv_heads}")
    elif shape.num_q_heads and heads != shape.num_q_heads:
        raise BadTensorError(field, f"q has {heads} heads; the session has {shape.num_q_heads}")
    elif heads % shape.num_kv_heads or heads > MAX_HEADS:
        raise BadTensorError(
            field,
            f"q has {heads} heads; takes a multiple of the session's {shape.num_kv_heads} kv heads, up to {MAX_HEADS}",
        )


def _check_option(name: str, tensor: _Tensor, q: _Tensor | None) -> None:
    if q is None:
        raise BadTensorError(f"{tensor.field}.name", f"{name} is an option of q, and there is no q")
    if tensor.dtype != np.float32:
        raise BadTensorError(f"{tensor.field}.dtype", f"{name} has {tensor.dtype}; takes float32")
    if tensor.shape != q.shape[1:2]:
        raise BadTensorError(f"{tensor.field}.shape", f"{name} has {tensor.shape}; takes {q.shape[1:2]}, q's heads")


def _numbers(options: pb.StepOptions) -> dict[str, float]:
    numbers = {}
    if options.HasField("scale"):
        if not abs(options.scale) <= MAX_FLOAT32:  # nor is NaN
            raise BadTensorError("options.scale", f"got {options.scale}; takes finite float32 numbers")
        numbers["scale"] = options.scale
    if options.softcap:
        if not 0 < options.softcap <= MAX_FLOAT32:
            raise BadTensorError(
                "options.softcap", f"got {options.softcap}; takes 0 (none) or a positive float32 number"
            )
        numbers["softcap"] = options.softcap
    return numbers


def _between(field: str, value: int, least: int, most: int) -> int:
    if not least <= value <= most:
        raise BadTensorError(field, f"got {value}; takes {least} to {most}")
    return value

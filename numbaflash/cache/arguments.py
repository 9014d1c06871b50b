"""The checks of a cache's arguments; messages name the argument, what came and what is accepted."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike

from ..device_arrays import AnyArray
from ..problem import DTYPES, check_heads
from .layout import RingLayout
from .page_format import BITS
from .quantizers import Quantizer, quantizer_of

__all__ = ["check_kv", "check_q", "choose_quantizer", "int_in", "ring_layout", "storage_dtype"]

_CODES = {"int8": np.dtype(np.int8), "int4": np.dtype(ml_dtypes.int4)}


def int_in(name: str, value: object, least: int, most: int | None = None) -> int:
    """Return an int of `least` to `most`."""
    if type(value) is int and value >= least and (most is None or value <= most):
        return value  # at once, for steps come here several times
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < least or (most is not None and value > most):
        accepted = f"{least} or more" if most is None else f"{least} to {most}"
        raise ValueError(f"{name} must be {accepted}, got {value}")
    return int(value)


def ring_layout(capacity: int, sink_tokens: int, page_size: int, rollback: int) -> RingLayout:
    """Return the shape of a ring, as `RingKVCache` takes its arguments."""
    capacity = int_in("capacity", capacity, 1)
    page_size = int_in("page_size", page_size, 8, 256)
    if page_size & (page_size - 1):
        raise ValueError(f"page_size must be a power of two, got {page_size}")
    return RingLayout(
        capacity=capacity,
        sink_tokens=int_in("sink_tokens", sink_tokens, 0, capacity - 1),
        page_size=page_size,
        rollback=int_in("rollback", rollback, 0),
    )


def storage_dtype(dtype: DTypeLike) -> np.dtype[Any]:
    """Return the dtype that a cache is asked to store."""
    try:
        resolved = _CODES[dtype] if isinstance(dtype, str) and dtype in _CODES else np.dtype(dtype)
    except TypeError:
        resolved = np.dtype(np.void)
    if resolved not in (*DTYPES, *_CODES.values()):
        raise ValueError(f"dtype must be float32, float16, bfloat16, int8 or int4, got {dtype!r}")
    return resolved


def choose_quantizer(dtype: np.dtype[Any], quantizer: Quantizer | str | None) -> Quantizer | None:
    """Return the quantizer of a storage dtype; None where that is a float."""
    if dtype.name not in BITS:
        if quantizer is not None:
            raise ValueError(f"quantizer must be None for dtype {dtype.name}, got {quantizer!r}")
        return None
    if isinstance(quantizer, Quantizer):
        return quantizer
    if quantizer is not None and not isinstance(quantizer, str):
        raise TypeError(f"quantizer must be a name, a Quantizer or None, got {type(quantizer).__name__}")
    return quantizer_of("group" if quantizer is None else quantizer)


def check_q(q: AnyArray, kv_heads: int, head_dim: int, lead: tuple[int, ...] = ()) -> None:
    """Check the shape of queries, (*lead, T, Hq, D)."""
    shape = q.shape
    if len(shape) != len(lead) + 3 or shape[-1] != head_dim or shape[: len(lead)] != lead:
        raise _wrong_shape("q", shape, (*lead, "tokens", "q heads", head_dim))
    check_heads(shape[-2], kv_heads)


def check_kv(k: AnyArray, v: AnyArray, kv_heads: int, head_dim: int, lead: tuple[int, ...] = ()) -> None:
    """Check the shapes of keys and values, (*lead, T, Hkv, D)."""
    for name, array in (("k", k), ("v", v)):
        shape = array.shape
        if len(shape) != len(lead) + 3 or shape[-2:] != (kv_heads, head_dim) or shape[: len(lead)] != lead:
            raise _wrong_shape(name, shape, (*lead, "tokens", kv_heads, head_dim))
    if v.shape != k.shape:
        raise ValueError(f"v must have k's shape {k.shape}, got {v.shape}")


def _wrong_shape(name: str, shape: tuple[int, ...], axes: tuple[int | str, ...]) -> ValueError:
    return ValueError(f"{name} must have shape ({', '.join(map(str, axes))}), got {shape}")

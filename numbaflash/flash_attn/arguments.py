"""What flash-attn's functions accept, checked before anything runs, and its window in numbaflash's terms."""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..arrays import as_numpy
from ..problem import MAX_HEAD_DIM, Scoring, check_heads, describe_scoring

__all__ = [
    "Window",
    "cap",
    "check_arrays",
    "check_axes",
    "check_head_dim",
    "check_no_dropout",
    "check_shape",
    "integer",
    "integers",
    "kernel_window",
    "packed_parts",
    "scoring",
    "slopes",
    "stored_lse",
]

Window = tuple[int | None, int | None]
_DTYPES = ("float16", "bfloat16")


def check_arrays(optional: Mapping[str, Any] = MappingProxyType({}), /, **arrays: Any) -> None:
    """Raise unless all arrays are float16 or bfloat16, of the same dtype and on the same device.

    Args:
        optional: Arrays that may be None.
        **arrays: Arrays that must be there.

    Raises:
        TypeError: One is no array, or its dtype is another.
        ValueError: One is on another device.
    """
    given = [*arrays.items(), *((name, array) for name, array in optional.items() if array is not None)]
    first, template = given[0]
    for name, array in given:
        if not hasattr(array, "shape") or not hasattr(array, "dtype"):
            raise TypeError(f"{name} must be an array, got {type(array).__name__}")
        dtype = _dtype_name(array.dtype)
        if dtype not in _DTYPES:
            raise TypeError(
                f"{name} must be float16 or bfloat16, as in flash-attn (numbaflash.attention takes float32 too), "
                f"got {dtype}"
            )
        if dtype != _dtype_name(template.dtype):
            raise TypeError(f"{name} must have {first}'s dtype {_dtype_name(template.dtype)}, got {dtype}")
        check_device(name, array, first, template)


def check_device(name: str, array: Any, other: str, template: Any) -> None:
    """Raise ValueError unless two arrays, of any libraries, are on the same device."""
    device, expected = getattr(array, "device", "cpu"), getattr(template, "device", "cpu")
    if device != expected and str(device) != str(expected):
        raise ValueError(f"{name} must be on {other}'s device {expected}, got {device}")


def check_no_dropout(dropout_p: float) -> None:
    """Raise ValueError unless dropout is off."""
    if dropout_p != 0:
        raise ValueError(
            f"dropout_p must be 0.0, got {dropout_p}: attention runs forward only here, and dropout belongs to training"
        )


def check_axes(name: str, array: Any, axes: tuple[str, ...]) -> None:
    """Raise ValueError unless an array has as many axes as are named."""
    if len(array.shape) != len(axes):
        raise ValueError(f"{name} must have {len(axes)} axes ({', '.join(axes)}), got shape {tuple(array.shape)}")


def check_shape(name: str, array: Any, shape: tuple[int, ...]) -> None:
    """Raise ValueError unless an array has that shape."""
    if tuple(array.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(array.shape)}")


def check_head_dim(q_heads: int, kv_heads: int, head_dim: int) -> None:
    """Raise ValueError unless the heads divide and the head dim is 1 to 256."""
    check_heads(q_heads, kv_heads)
    if not 1 <= head_dim <= MAX_HEAD_DIM:
        raise ValueError(f"q must have a head_dim of 1 to {MAX_HEAD_DIM}, got {head_dim}")


def packed_parts(name: str, array: Any, axes: tuple[str, ...]) -> list[Any]:
    """Views of the parts that lie along the second last axis but one ("3" of qkv, "2" of kv)."""
    if not hasattr(array, "shape"):
        raise TypeError(f"{name} must be an array, got {type(array).__name__}")
    check_axes(name, array, axes)
    parts = int(axes[-3])
    if array.shape[-3] != parts:
        raise ValueError(f"{name} must have {parts} parts ({', '.join(axes)}), got shape {tuple(array.shape)}")
    return [array[..., part, :, :] for part in range(parts)]


def kernel_window(window_size: Any, causal: bool, kv_tokens: int) -> Window:
    """Return flash-attn's window as (left, right) with None for unbounded, for keys of up to `kv_tokens` tokens.

    flash-attn takes a side of `kv_tokens` or more for unbounded, and an unbounded right side beside a bounded left one
    for `kv_tokens`; it matters where there are more queries than keys.
    """
    try:
        left, right = (operator.index(side) for side in window_size)
    except (TypeError, ValueError):
        raise TypeError(
            f"window_size must be a pair of ints (left, right), -1 for unbounded, got {window_size!r}"
        ) from None
    if right >= kv_tokens:
        right = -1
    if causal:
        right = 0
    if left < 0 or left >= kv_tokens:
        return None, right if right >= 0 else None
    return left, right if right >= 0 else kv_tokens


def integer(name: str, value: Any) -> int:
    """Return an int, or raise TypeError where it is none."""
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an int, got {type(value).__name__}") from None


def cap(softcap: Any) -> float:
    """Return the softcap in numbaflash's terms, where 0 means none and nothing is negative."""
    try:
        return float(max(softcap, 0.0))
    except TypeError:
        raise TypeError(f"softcap must be a number, got {type(softcap).__name__}") from None


def slopes(alibi_slopes: Any, batch: int, q_heads: int, q: Any) -> Any:
    """Return the ALiBi slopes as they came, or raise unless they are float32 of shape (heads,) or (batch, heads)."""
    if alibi_slopes is None:
        return None
    if not hasattr(alibi_slopes, "dtype") or _dtype_name(alibi_slopes.dtype) != "float32":
        kind = _dtype_name(alibi_slopes.dtype) if hasattr(alibi_slopes, "dtype") else type(alibi_slopes).__name__
        raise TypeError(f"alibi_slopes must be a float32 array, got {kind}")
    if tuple(alibi_slopes.shape) not in ((q_heads,), (batch, q_heads)):
        raise ValueError(
            f"alibi_slopes must have shape ({q_heads},) or {(batch, q_heads)}, got {tuple(alibi_slopes.shape)}"
        )
    check_device("alibi_slopes", alibi_slopes, "q", q)
    return alibi_slopes


def scoring(q: Any, batch: int, softmax_scale: float | None, softcap: Any, alibi_slopes: Any) -> Scoring:
    """Describe how queries (..., heads, head_dim) of so many sequences are scored."""
    heads, head_dim = q.shape[-2:]
    return describe_scoring(
        batch=batch,
        q_heads=heads,
        head_dim=head_dim,
        scale=softmax_scale,
        softcap=cap(softcap),
        alibi_slopes=slopes(alibi_slopes, batch, heads, q),
    )


def integers(name: str, array: Any, shape: tuple[int, ...], template: Any) -> NDArray[np.int64]:
    """Return an int32 array of that shape (one or two axes, -1 for any size) on the device of `template` (q), as int64.

    Raises:
        TypeError: It is no int32 array.
        ValueError: It has another shape, or is on another device.
    """
    check_device(name, array, "q", template)
    numbers = as_numpy(array, name)
    if numbers.dtype != np.int32:
        raise TypeError(f"{name} must be int32, got {numbers.dtype}")
    sizes = numbers.shape
    if len(sizes) != len(shape) or (sizes[0] != shape[0] != -1) or (sizes[-1] != shape[-1] != -1):
        wanted = ", ".join("any" if size < 0 else str(size) for size in shape)
        raise ValueError(f"{name} must have shape ({wanted}{',' if len(shape) == 1 else ''}), got {numbers.shape}")
    return numbers.astype(np.int64)


def stored_lse(lse: Any) -> Any:
    """Turn the LSE of rows that see nothing from -inf to flash-attn's +inf, in place."""
    lse[lse == float("-inf")] = float("inf")
    return lse


@functools.cache
def _dtype_name(dtype: Any) -> str:
    """The name of any library's dtype: "torch.float16" is "float16"."""
    return str(dtype).rpartition(".")[2]

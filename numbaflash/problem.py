"""An attention problem, described once: every backend solves this description.

`describe` checks all arguments of `numbaflash.attention` and raises before anything runs; what it returns holds only
canonical values (plain ints and floats, options broadcast to their full shape as views), so a backend checks nothing.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike, NDArray

from .arrays import as_numpy
from .device_arrays import DeviceArray

__all__ = [
    "BFLOAT16",
    "DTYPES",
    "FLOAT16",
    "FLOAT32",
    "MAX_FLOAT32",
    "MAX_HEAD_DIM",
    "AttentionProblem",
    "Scoring",
    "check_dtype",
    "check_heads",
    "check_window",
    "describe",
    "describe_scoring",
]

FLOAT32 = np.dtype(np.float32)
FLOAT16 = np.dtype(np.float16)
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = (FLOAT32, FLOAT16, BFLOAT16)
MAX_HEAD_DIM = 256
MAX_FLOAT32 = float(np.finfo(np.float32).max)  # scores are computed in float32
_BEYOND_ALL_KEYS = 1 << 62  # of a window's side; positions that far away still fit 64 bits


@dataclass(frozen=True, eq=False)
class Scoring:
    """How a query and a key become a score: s = softcap(scale * q.k) + alibi + bias, and who else joins the softmax.

    Attributes:
        scale: Factor of q.k.
        softcap: s -> softcap * tanh(s / softcap); 0 means none.
        alibi_slopes: (B, Hq) float32, adds -slope * |query position - key position|; None means none.
        bias: (B, Hq, Sq, Sk) view, NumPy's or a DeviceArray; float32, q's dtype or bool (True = may); None means none.
        sink_logits: (Hq,) float32, a virtual key without a value for each head; None means none.
    """

    scale: float
    softcap: float = 0.0
    alibi_slopes: NDArray[np.float32] | None = None
    bias: Any = None
    sink_logits: NDArray[np.float32] | None = None


@dataclass(frozen=True, eq=False)
class AttentionProblem:
    """Shapes, dtype, mask and scoring of one call of `attention`; every value is checked.

    Query row i of batch entry b stands at position `i + kv_lengths[b] - q_tokens` of its key sequence, and sees the
    keys from `window_left` before that position to `window_right` after it (None: unbounded). `causal` is
    `window_right = 0`.

    One that `is_plain` has no options that are arrays; all calls of its shapes and numbers share it.
    """

    batch: int
    q_tokens: int
    kv_tokens: int
    q_heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    dtype: np.dtype[Any]
    window_left: int | None
    window_right: int | None
    kv_lengths: NDArray[np.int64]
    scoring: Scoring
    is_plain: bool = False


def describe(
    q: NDArray[Any] | DeviceArray,
    k: NDArray[Any] | DeviceArray,
    v: NDArray[Any] | DeviceArray,
    *,
    scale: float | None = None,
    causal: bool = False,
    window: tuple[int | None, int | None] = (None, None),
    softcap: float = 0.0,
    bias: Any = None,
    alibi_slopes: Any = None,
    sink_logits: Any = None,
    kv_lengths: Any = None,
) -> AttentionProblem:
    """Check the arguments of `numbaflash.attention` and describe the problem they pose.

    Args:
        q: (B, Sq, Hq, D).
        k: (B, Sk, Hkv, D).
        v: (B, Sk, Hkv, Dv).
        scale: As in `numbaflash.attention`, like everything that follows.
        causal: Bottom-right aligned causal mask.
        window: (left, right) tokens that a query sees beside its own position.
        softcap: Cap of the scores.
        bias: Additive float or bool.
        alibi_slopes: (Hq,) or (B, Hq).
        sink_logits: (Hq,).
        kv_lengths: (B,) ints.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: An argument has the wrong shape or value.
    """
    dtype = check_dtype(q=q, k=k, v=v)
    left, right = check_window(window)
    if not isinstance(causal, (bool, np.bool_)):
        raise TypeError(f"causal must be a bool, got {type(causal).__name__}")
    if causal:
        right = 0 if right is None else min(right, 0)
    factor = None if scale is None else _finite("scale", scale)
    problem = _plain_problem(q.shape, k.shape, v.shape, dtype, left, right, factor, _softcap(softcap))
    if bias is None and alibi_slopes is None and sink_logits is None and kv_lengths is None:
        return problem
    batch, q_tokens, q_heads, kv_tokens = problem.batch, problem.q_tokens, problem.q_heads, problem.kv_tokens
    scoring = describe_scoring(
        batch=batch,
        q_heads=q_heads,
        head_dim=problem.head_dim,
        scale=problem.scoring.scale,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        sink_logits=sink_logits,
        bias=None if bias is None else _bias(bias, dtype, (batch, q_heads, q_tokens, kv_tokens)),
    )
    lengths = problem.kv_lengths if kv_lengths is None else _kv_lengths(kv_lengths, batch, kv_tokens)
    return replace(problem, scoring=scoring, kv_lengths=lengths, is_plain=False)


@functools.lru_cache(maxsize=256)
def _plain_problem(
    q_shape: tuple[int, ...],
    k_shape: tuple[int, ...],
    v_shape: tuple[int, ...],
    dtype: np.dtype[Any],
    left: int | None,
    right: int | None,
    scale: float | None,
    softcap: float,
) -> AttentionProblem:
    """The problem without options that are arrays. All layers of a model pose the same one."""
    for name, shape in (("q", q_shape), ("k", k_shape), ("v", v_shape)):
        if len(shape) != 4:
            raise ValueError(f"{name} must have 4 axes (batch, tokens, heads, head_dim), got shape {shape}")
    batch, q_tokens, q_heads, head_dim = q_shape
    kv_tokens, kv_heads = k_shape[1:3]
    for name, shape in (("k", k_shape), ("v", v_shape)):
        if shape[0] != batch:
            raise ValueError(f"{name} must have q's batch size {batch}, got {shape[0]} (shape {shape})")
    if v_shape[1:3] != k_shape[1:3]:
        raise ValueError(f"v must have k's tokens and heads {k_shape[1:3]}, got {v_shape[1:3]} (shape {v_shape})")
    if k_shape[3] != head_dim:
        raise ValueError(f"k must have q's head_dim {head_dim}, got {k_shape[3]} (shape {k_shape})")
    check_heads(q_heads, kv_heads)
    for name, dim in (("q", head_dim), ("v", v_shape[3])):
        if not 1 <= dim <= MAX_HEAD_DIM:
            raise ValueError(f"{name} must have a head_dim of 1 to {MAX_HEAD_DIM}, got {dim}")
    kv_lengths = np.full(batch, kv_tokens, np.int64)
    kv_lengths.flags.writeable = False
    return AttentionProblem(
        batch=batch,
        q_tokens=q_tokens,
        kv_tokens=kv_tokens,
        q_heads=q_heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        value_dim=v_shape[3],
        dtype=dtype,
        window_left=left,
        window_right=right,
        kv_lengths=kv_lengths,
        scoring=Scoring(_default_scale(head_dim) if scale is None else scale, softcap),
        is_plain=True,
    )


def describe_scoring(
    *,
    batch: int,
    q_heads: int,
    head_dim: int,
    scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    sink_logits: Any = None,
    bias: NDArray[Any] | DeviceArray | None = None,
) -> Scoring:
    """Check the options of scoring that `attention` and `RingKVCache` share; `bias` is checked already.

    Raises:
        TypeError: An option has the wrong type or dtype.
        ValueError: An option has the wrong shape or value.
    """
    checked_scale = _default_scale(head_dim) if scale is None else _finite("scale", scale)
    checked_softcap = _softcap(softcap)
    slopes = None
    if alibi_slopes is not None:
        slopes = _float_option("alibi_slopes", alibi_slopes, ((q_heads,), (batch, q_heads)))
        if not np.isfinite(slopes).all():
            raise ValueError(f"alibi_slopes must be finite in float32, got {slopes.tolist()}")
        slopes = np.ascontiguousarray(np.broadcast_to(slopes, (batch, q_heads)))
    sinks = None
    if sink_logits is not None:
        sinks = np.ascontiguousarray(_float_option("sink_logits", sink_logits, ((q_heads,),)))
        if not (sinks < np.inf).all():
            raise ValueError(f"sink_logits must be finite in float32, or -inf for none, got {sinks.tolist()}")
    return Scoring(checked_scale, checked_softcap, slopes, bias, sinks)


def check_dtype(**arrays: NDArray[Any] | DeviceArray) -> np.dtype[Any]:
    """Return the one dtype that all arrays share; TypeError where it is none of float32, float16, bfloat16."""
    (first, array), *others = arrays.items()
    if array.dtype not in DTYPES:
        raise TypeError(f"{first} must be float32, float16 or bfloat16, got {array.dtype}")
    for name, other in others:
        if other.dtype != array.dtype:
            raise TypeError(f"{name} must have {first}'s dtype {array.dtype}, got {other.dtype}")
    return array.dtype


def check_heads(q_heads: int, kv_heads: int) -> None:
    """Raise ValueError unless every KV head serves the same number of query heads, at least one."""
    if kv_heads < 1:
        raise ValueError(f"k must have at least one head, got {kv_heads}")
    if q_heads < 1 or q_heads % kv_heads:
        raise ValueError(f"q must have a multiple of k's {kv_heads} heads, got {q_heads}")


def check_window(window: object) -> tuple[int | None, int | None]:
    """Return both sides of a window, None for what reaches beyond all keys.

    Raises:
        TypeError: It is no pair of ints or None.
        ValueError: A side is negative.
    """
    if not isinstance(window, (tuple, Sequence)) or len(window) != 2:  # a tuple is found out ten times as fast
        raise TypeError(f"window must be a pair (left, right) of ints or None, got {window!r}")
    left, right = window
    return _window_side("left", left), _window_side("right", right)


def _window_side(name: str, side: object) -> int | None:
    if side is None:
        return None
    if isinstance(side, (bool, np.bool_)) or not isinstance(side, (int, np.integer)):
        raise TypeError(f"window's {name} side must be an int or None, got {side!r}")
    if side < 0:
        raise ValueError(f"window's {name} side must be 0 or more, or None for unbounded, got {side}")
    return int(side) if side < _BEYOND_ALL_KEYS else None


def _bias(bias: Any, dtype: np.dtype[Any], shape: tuple[int, int, int, int]) -> NDArray[Any] | DeviceArray:
    array = bias if isinstance(bias, DeviceArray) else as_numpy(bias, "bias")
    if array.dtype not in (FLOAT32, dtype, np.dtype(np.bool_)):
        raise TypeError(f"bias must be float32, q's dtype {dtype} or bool, got {array.dtype}")
    try:
        return array.broadcast_to(shape) if isinstance(array, DeviceArray) else np.broadcast_to(array, shape)
    except ValueError:
        raise ValueError(
            f"bias must broadcast to (batch, q heads, q tokens, kv tokens) = {shape}, got shape {array.shape}"
        ) from None


def _kv_lengths(kv_lengths: Any, batch: int, kv_tokens: int) -> NDArray[np.int64]:
    array = _listed("kv_lengths", kv_lengths)
    if array.size and array.dtype.kind not in "iu":  # NumPy takes an empty list for floats
        raise TypeError(f"kv_lengths must be integers, got {array.dtype}")
    if array.shape != (batch,):
        raise ValueError(f"kv_lengths must have shape ({batch},), got {array.shape}")
    if batch and not 0 <= int(array.min()) <= int(array.max()) <= kv_tokens:
        raise ValueError(f"kv_lengths must lie in 0 to {kv_tokens} (k's tokens), got {array.tolist()}")
    return array.astype(np.int64)


def _float_option(name: str, value: Any, shapes: tuple[tuple[int, ...], ...]) -> NDArray[np.float32]:
    array = _listed(name, value, np.float64)
    if array.dtype not in (*DTYPES, np.dtype(np.float64)):
        raise TypeError(f"{name} must be floating point, got {array.dtype}")
    if array.shape not in shapes:
        raise ValueError(f"{name} must have shape {' or '.join(map(str, shapes))}, got {array.shape}")
    with np.errstate(over="ignore"):
        return array.astype(np.float32)


def _listed(name: str, value: Any, dtype: DTypeLike | None = None) -> NDArray[Any]:
    """An array of any library, or a list of numbers in `dtype`, as NumPy's."""
    if not isinstance(value, (list, tuple)):
        return as_numpy(value, name)
    try:
        return np.asarray(value, dtype)
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be an array or a list of numbers, got {value}") from None


def _default_scale(head_dim: int) -> float:
    return 1.0 / math.sqrt(head_dim)


def _softcap(softcap: object) -> float:
    cap = _finite("softcap", softcap)
    if cap < 0:
        raise ValueError(f"softcap must be 0 (none) or positive, got {softcap}")
    return cap


def _finite(name: str, value: object) -> float:
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    number = float(value)
    if not abs(number) <= MAX_FLOAT32:  # nor is NaN
        raise ValueError(f"{name} must be finite in float32, got {number}")
    return number

"""What a forward kernel is launched with: raw addresses, strides and sizes.

A Numba array costs a launch up to 12 parameters and 2 microseconds; a raw address costs one of each kind.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import float32, int32, int64

from numbaflash.problem import AttentionProblem

from .parameters import numpy_arguments, score_factors

__all__ = ["PARAMETERS", "Arrays", "Strided", "arguments"]

PARAMETERS = {
    # Addresses of global memory. q, k, v and out are (batch, tokens, heads, dim) with strides in bytes; lse is
    # (batch, heads, tokens); lengths (batch,) int32; slopes (batch, heads) and sinks (heads,) float32.
    **dict.fromkeys(("q", "k", "v", "out", "lse", "lengths", "bias", "slopes", "sinks"), int64),
    **dict.fromkeys(("q_batch", "q_head", "q_row", "k_batch", "k_head", "k_step"), int64),
    **dict.fromkeys(("v_batch", "v_head", "v_step", "out_batch", "out_head", "out_row"), int64),
    **dict.fromkeys(("bias_batch", "bias_head", "bias_row"), int64),
    **dict.fromkeys(("bias_key", "q_tokens", "kv_tokens", "q_heads", "group", "window_left", "window_right"), int32),
    # Factor of q.k and cap, both as `score_pairs` says.
    **dict.fromkeys(("scale", "cap"), float32),
}
"""Name and type of the kernel's parameters, in order. A step is the rows that `RowCopy` copies at once."""


class Strided(NamedTuple):
    """An array in device memory.

    Attributes:
        address: Of its first element.
        strides: Bytes, of its four axes: (batch, tokens, heads, dim) or (batch, heads, q tokens, kv tokens).
    """

    address: int = 0
    strides: tuple[int, int, int, int] = (0, 0, 0, 0)


class Arrays(NamedTuple):
    """Where a launch finds its arrays in device memory; 0 for what the variant does not use.

    q, k, v and out have rows at multiples of 16 bytes and their last axis contiguous; lse is (B, Hq, Sq) float32;
    lengths (B,) int32; slopes (B, Hq) and sinks (Hq,) float32, all contiguous.
    """

    q: Strided
    k: Strided
    v: Strided
    out: Strided
    bias: Strided = Strided()
    lse: int = 0
    lengths: int = 0
    slopes: int = 0
    sinks: int = 0


def arguments(problem: AttentionProblem, arrays: Arrays, k_rows: int, v_rows: int) -> list[np.generic]:
    """Return the kernel's arguments in the order of `PARAMETERS`, each a NumPy scalar of its type.

    Args:
        problem: What to solve.
        arrays: Where it lies in device memory.
        k_rows: Rows of K in a step.
        v_rows: Rows of V in a step.
    """
    factor, cap = score_factors(problem.scoring)
    # A bound beyond all keys is none; it must not overflow where positions are added to it.
    unbounded = problem.q_tokens + problem.kv_tokens
    q, k, v, out, bias = arrays.q, arrays.k, arrays.v, arrays.out, arrays.bias
    values: dict[str, Any] = {
        **{name: getattr(arrays, name).address for name in ("q", "k", "v", "out", "bias")},
        **{name: getattr(arrays, name) for name in ("lse", "lengths", "slopes", "sinks")},
        "q_batch": q.strides[0],
        "q_row": q.strides[1],
        "q_head": q.strides[2],
        "k_batch": k.strides[0],
        "k_step": k.strides[1] * k_rows,
        "k_head": k.strides[2],
        "v_batch": v.strides[0],
        "v_step": v.strides[1] * v_rows,
        "v_head": v.strides[2],
        "out_batch": out.strides[0],
        "out_row": out.strides[1],
        "out_head": out.strides[2],
        **dict(zip(("bias_batch", "bias_head", "bias_row", "bias_key"), bias.strides, strict=True)),
        "q_tokens": problem.q_tokens,
        "kv_tokens": problem.kv_tokens,
        "q_heads": problem.q_heads,
        "group": problem.q_heads // problem.kv_heads,
        "window_left": _bounded(problem.window_left, unbounded),
        "window_right": _bounded(problem.window_right, unbounded),
        "scale": factor,
        "cap": cap,
    }
    return numpy_arguments(PARAMETERS, values)


def _bounded(side: int | None, unbounded: int) -> int:
    return unbounded if side is None else min(side, unbounded)

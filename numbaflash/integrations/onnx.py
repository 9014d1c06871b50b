"""ONNX: Attention (opset 23 to 25) and TensorScatter for `onnx.reference.ReferenceEvaluator(model, new_ops=ops())`."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx.reference.op_run import OpRun

from ..api import attention
from ..cpu import UNBOUNDED, Visibility, attend_runs, readable
from ..flash_attn.paged import join_runs, sequence_runs
from ..problem import check_dtype, check_heads, describe_scoring

__all__ = ["ops"]

_SCORES, _CAPPED, _BIASED, _PROBABILITIES = range(4)  # what qk_matmul_output_mode asks for


def ops() -> list[type[OpRun]]:
    """Return the operators that numbaflash computes: float32, float16 and bfloat16.

    Example:
        ReferenceEvaluator(model, new_ops=ops()).run(None, inputs)
    """
    return [Attention, TensorScatter]


class Attention(OpRun):
    """Scaled dot product attention, https://onnx.ai/onnx/operators/onnx__Attention.html.

    Softmax runs in float32, whatever `softmax_precision` asks for.
    """

    op_domain = ""

    def _run(
        self,
        q: NDArray[Any],
        k: NDArray[Any],
        v: NDArray[Any],
        attn_mask: NDArray[Any] | None = None,
        past_key: NDArray[Any] | None = None,
        past_value: NDArray[Any] | None = None,
        nonpad_kv_seqlen: NDArray[Any] | None = None,
        *,
        is_causal: int = 0,
        kv_num_heads: int | None = None,
        q_num_heads: int | None = None,
        qk_matmul_output_mode: int = _SCORES,
        scale: float | None = None,
        softcap: float | None = None,
        softmax_precision: int | None = None,
        left_window_size: int | None = None,
        right_window_size: int | None = None,
    ) -> tuple[NDArray[Any], ...]:
        del softmax_precision
        if (past_key is None) != (past_value is None):
            raise ValueError("past_key and past_value must be given together, got one of them")
        if nonpad_kv_seqlen is not None and past_key is not None:
            raise ValueError("nonpad_kv_seqlen must not be given with past_key: the cache is in K and V then")
        packed = q.ndim == 3
        q, k, v = (
            _heads_first(name, array, heads)
            for name, array, heads in (("Q", q, q_num_heads), ("K", k, kv_num_heads), ("V", v, kv_num_heads))
        )
        past = 0
        if past_key is not None and past_value is not None:
            past = past_key.shape[2]
            k, v = np.concatenate((past_key, k), axis=2), np.concatenate((past_value, v), axis=2)
        _check_shapes(q, k, v)
        left, right = _side("left_window_size", left_window_size), _side("right_window_size", right_window_size)
        right = 0 if is_causal else right
        cap = softcap or 0.0
        wanted = len(self.onnx_node.output)
        scores: tuple[NDArray[Any], ...] = ()
        sees_all = left is None and right is None
        is_plain = attn_mask is None and nonpad_kv_seqlen is None and wanted <= 3
        if is_plain and (sees_all or past + q.shape[2] == k.shape[2]):  # the last query stands at the last key
            tokens_first = (array.swapaxes(1, 2) for array in (q, k, v))
            out = attention(*tokens_first, scale=scale, softcap=cap, window=(left, right), backend="cpu")
        else:
            problem = _Problem(q, k, v, past, nonpad_kv_seqlen, scale, cap, attn_mask)
            problem.see(left, right)
            out = problem.solve()
            scores = (problem.scores(qk_matmul_output_mode),) if wanted > 3 else ()
        out = out.reshape(*out.shape[:2], -1) if packed else out.swapaxes(1, 2)
        return *(out, k, v)[:wanted], *scores


class _Problem:
    """Attention of arrays (batch, heads, tokens, head_dim) with all options, for the kernels and for the formula."""

    def __init__(
        self,
        q: NDArray[Any],
        k: NDArray[Any],
        v: NDArray[Any],
        past: int,
        lengths: NDArray[Any] | None,
        scale: float | None,
        softcap: float,
        mask: NDArray[Any] | None,
    ) -> None:
        batch, heads, tokens, head_dim = q.shape
        total = k.shape[2]
        self._q, self._k, self._v = q, k, v
        self._lengths = np.full(batch, total)
        offset = np.full(batch, past)
        if lengths is not None:
            self._lengths = lengths.reshape(-1).astype(np.int64)
            if self._lengths.shape != (batch,) or not ((self._lengths >= 0) & (self._lengths <= total)).all():
                raise ValueError(f"nonpad_kv_seqlen must be {batch} numbers from 0 to {total}, got {lengths.tolist()}")
            offset = self._lengths - tokens
        self._bias = None if mask is None else _padded_mask(mask, q.dtype, (batch, heads, tokens, total))
        self._scoring = describe_scoring(
            batch=batch, q_heads=heads, head_dim=head_dim, scale=scale, softcap=softcap, bias=self._bias
        )
        self._visibility = Visibility(
            q_start=offset,
            left=np.full(batch, UNBOUNDED),
            right=np.full(batch, UNBOUNDED),
            sinks=np.zeros(batch, np.int64),
        )

    def see(self, left: int | None, right: int | None) -> None:
        """Restrict what each query sees; None is unbounded."""
        for side, bound in ((left, self._visibility.left), (right, self._visibility.right)):
            if side is not None:
                bound[:] = min(side, UNBOUNDED)

    def solve(self) -> NDArray[Any]:
        """Return the output, (batch, tokens, heads, value_dim)."""
        k, v = (readable(array).swapaxes(1, 2) for array in (self._k, self._v))
        k_start, v_start = (np.arange(len(array)) * array.strides[0] for array in (k, v))
        runs = sequence_runs(k, v, k_start, v_start, np.zeros(len(k), np.int64), self._lengths)
        out, _ = attend_runs(self._q.swapaxes(1, 2), join_runs([runs], len(k), k, v), self._visibility, self._scoring)
        return out

    def scores(self, mode: int) -> NDArray[Any]:
        """Return what the fused kernels never write out, by the formula: (batch, heads, tokens, all keys)."""
        group = self._q.shape[1] // self._k.shape[1]
        keys = np.repeat(self._k, group, axis=1).astype(np.float32)
        scores = self._scoring.scale * (self._q.astype(np.float32) @ keys.swapaxes(2, 3))
        if mode >= _CAPPED and self._scoring.softcap:
            scores = self._scoring.softcap * np.tanh(scores / self._scoring.softcap)
        if mode >= _BIASED:
            bias = self._additive_bias()
            scores = scores + bias
            if mode == _PROBABILITIES:
                seen = ~np.isneginf(bias)
                top = np.max(scores, axis=-1, keepdims=True, initial=-np.inf, where=seen)
                below = np.subtract(scores, top, where=seen, out=np.zeros_like(scores))
                weights = np.exp(below, where=seen, out=np.zeros_like(scores))
                scores = weights / np.maximum(weights.sum(axis=-1, keepdims=True), np.finfo(np.float32).tiny)
        return scores.astype(self._q.dtype)

    def _additive_bias(self) -> NDArray[np.float32]:
        tokens, total = self._q.shape[2], self._k.shape[2]
        see = self._visibility
        position = (see.q_start[:, None] + np.arange(tokens))[:, None, :, None]
        key = np.arange(total)
        left, right, lengths = (side[:, None, None, None] for side in (see.left, see.right, self._lengths))
        visible = (key >= position - left) & (key <= position + right) & (key < lengths)
        bias: NDArray[np.float32] = np.where(visible, np.float32(0), np.float32(-np.inf))
        if self._bias is None:
            return np.broadcast_to(bias, (*self._q.shape[:3], total))
        if self._bias.dtype == np.bool_:
            return np.where(self._bias, bias, np.float32(-np.inf))
        return bias + self._bias.astype(np.float32)


class TensorScatter(OpRun):
    """A KV cache's update, https://onnx.ai/onnx/operators/onnx__TensorScatter.html; "linear" and "circular"."""

    op_domain = ""

    def _run(
        self,
        past_cache: NDArray[Any],
        update: NDArray[Any],
        write_indices: NDArray[Any] | None = None,
        *,
        axis: int = -2,
        mode: str = "linear",
    ) -> tuple[NDArray[Any]]:
        if mode not in ("linear", "circular"):
            raise ValueError(f"mode must be 'linear' or 'circular', got {mode!r}")
        axis %= past_cache.ndim
        if axis == 0:
            raise ValueError("axis must not be the batch axis 0")
        batch, capacity, tokens = len(past_cache), past_cache.shape[axis], update.shape[axis]
        shape = (*past_cache.shape[:axis], tokens, *past_cache.shape[axis + 1 :])
        if update.shape != shape or tokens > capacity:
            raise ValueError(
                f"update must have past_cache's shape {past_cache.shape}, or fewer tokens on axis {axis}, "
                f"got {update.shape}"
            )
        starts = np.zeros(batch, np.int64) if write_indices is None else write_indices.reshape(-1).astype(np.int64)
        if starts.shape != (batch,):
            raise ValueError(f"write_indices must have shape ({batch},), got {starts.shape}")
        places = starts[:, None] + np.arange(tokens)
        if mode == "circular":
            places %= capacity
        elif ((starts < 0) | (starts + tokens > capacity)).any():
            raise ValueError(
                f"write_indices must leave room for {tokens} tokens in {capacity} (mode is 'linear'), "
                f"got {starts.tolist()}"
            )
        present = past_cache.copy()
        np.moveaxis(present, axis, 1)[np.arange(batch)[:, None], places] = np.moveaxis(update, axis, 1)
        return (present,)


def _check_shapes(q: NDArray[Any], k: NDArray[Any], v: NDArray[Any]) -> None:
    check_dtype(Q=q, K=k, V=v)
    check_heads(q.shape[1], k.shape[1])
    for name, array, shape in (
        ("K", k, (len(q), *k.shape[1:3], q.shape[3])),
        ("V", v, (*k.shape[:3], v.shape[3])),
    ):
        if array.shape != shape:
            raise ValueError(f"{name} must have shape {shape}, got {array.shape}")


def _side(name: str, tokens: int | None) -> int | None:
    """A side of the window; None is unbounded."""
    if tokens is None or tokens == -1:
        return None
    if tokens < -1:
        raise ValueError(f"{name} must be -1 or more, got {tokens}")
    return tokens


def _heads_first(name: str, array: NDArray[Any], heads: int | None) -> NDArray[Any]:
    """(batch, heads, tokens, head_dim), a view of a packed (batch, tokens, heads * head_dim) array."""
    if array.ndim == 4:
        return array
    if array.ndim != 3 or not heads or array.shape[2] % heads:
        raise ValueError(
            f"{name} must have 4 axes, or 3 and a multiple of its number of heads (q_num_heads, kv_num_heads); "
            f"got shape {array.shape} and {heads} heads"
        )
    return array.reshape(*array.shape[:2], heads, -1).swapaxes(1, 2)


def _padded_mask(mask: NDArray[Any], dtype: np.dtype[Any], shape: tuple[int, int, int, int]) -> NDArray[Any]:
    """The mask for all keys: those behind its last one are forbidden."""
    if mask.dtype not in (np.dtype(np.bool_), np.dtype(np.float32), dtype):
        raise TypeError(f"attn_mask must be bool or Q's dtype {dtype}, got {mask.dtype}")
    missing = shape[3] - mask.shape[-1] if mask.ndim and mask.shape[-1] != 1 else 0
    if missing > 0:
        filler = False if mask.dtype == np.bool_ else -np.inf
        mask = np.pad(mask, [(0, 0)] * (mask.ndim - 1) + [(0, missing)], constant_values=filler)
    try:
        return np.broadcast_to(mask, shape)
    except ValueError:
        raise ValueError(f"attn_mask must broadcast to {shape}, got shape {mask.shape}") from None

"""Decoding with a cache that the caller owns: `flash_attn_with_kvcache`."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..arrays import as_numpy, like
from ..cpu import attend_runs, readable, threads_for
from .arguments import (
    check_arrays,
    check_axes,
    check_head_dim,
    check_shape,
    integer,
    integers,
    kernel_window,
    scoring,
    stored_lse,
)
from .gradients import forward_only
from .paged import check_pages, join_runs, page_runs, sequence_runs, visibility
from .rotary import rotate

__all__ = ["flash_attn_with_kvcache"]

_AXES = ("batch", "tokens", "heads", "head_dim")
_MAX_SPLITS = 128


def flash_attn_with_kvcache(
    q: Any,
    k_cache: Any,
    v_cache: Any,
    k: Any = None,
    v: Any = None,
    rotary_cos: Any = None,
    rotary_sin: Any = None,
    cache_seqlens: Any = None,
    cache_batch_idx: Any = None,
    cache_leftpad: Any = None,
    block_table: Any = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Any = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Any = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Any:
    """Attention of flash-attn's `flash_attn_with_kvcache`; the new keys and values are written into the cache in place.

    The cache is written after the attention has succeeded: an error leaves it as it was.

    Args:
        q: (batch, seqlen_q, heads, head_dim), float16 or bfloat16; head_dim is 1 to 256.
        k_cache: (batch of the cache, capacity, heads_k, head_dim), or pages (pages, page_size, heads_k, head_dim) with
            a block_table; the last axis has stride 1.
        v_cache: As k_cache.
        k: (batch, seqlen_new, heads_k, head_dim), written at `cache_seqlens` and on; needs v and cache_seqlens.
        v: As k.
        rotary_cos: (positions, rotary_dim / 2), q's dtype; rotary_dim is a multiple of 16 up to head_dim. k is rotated
            at its place in the cache; q at `cache_seqlens` and on where causal or with a window, else at
            `cache_seqlens` throughout.
        rotary_sin: As rotary_cos.
        cache_seqlens: (batch,) int32, or an int: tokens in the cache, left padding included; None: it is full.
        cache_batch_idx: (batch,) int32: each sequence's entry of the cache; not with a block_table.
        cache_leftpad: (batch,) int32: index of each sequence's first token in the cache; not with a block_table.
        block_table: (batch, pages of a sequence), int32; page_size is a multiple of 256.
        softmax_scale: Factor of q.k; None means 1/sqrt(head_dim).
        causal: As in `flash_attn_func`, like window_size, softcap and alibi_slopes, where seqlen_k is what the cache
            holds with the new tokens, without left padding.
        window_size: (left, right); -1 is unbounded.
        softcap: Cap of the scores.
        rotary_interleaved: Rotated pairs are elements 0 and 1, 2 and 3, ...; else i and i + rotary_dim / 2.
        alibi_slopes: (heads,) or (batch, heads), float32.
        num_splits: Up to 128; a hint that changes no result. The kernels choose their own.
        return_softmax_lse: Also return the LSE.

    Returns:
        The output (batch, seqlen_q, heads, head_dim), q's library and dtype; with `return_softmax_lse` also the natural
        log-sum-exp, float32 (batch, heads, seqlen_q), +inf where a query sees nothing.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: An argument has the wrong shape, value or device, or needs another one.
    """

    def compute() -> Any:
        new_arrays = {"k": k, "v": v, "rotary_cos": rotary_cos, "rotary_sin": rotary_sin}
        check_arrays(new_arrays, q=q, k_cache=k_cache, v_cache=v_cache)
        if integer("num_splits", num_splits) > _MAX_SPLITS:
            raise ValueError(f"num_splits must be at most {_MAX_SPLITS}, got {num_splits}")
        cache = _Cache(q, k_cache, v_cache, cache_seqlens, cache_batch_idx, cache_leftpad, block_table)
        queries = as_numpy(q, "q")
        batch, q_tokens, _, head_dim = queries.shape
        window = kernel_window(window_size, causal, cache.capacity)
        new = None
        if k is not None:
            new = cache.check_new(q_tokens, k, v, cache_seqlens)
        elif v is not None:
            raise ValueError("v must come with k, the new keys; k is None")
        if rotary_cos is not None or rotary_sin is not None:
            if new is None:
                raise ValueError("rotary_cos and rotary_sin must come with new keys and values (k, v); k is None")
            rotary = _Rotary(rotary_cos, rotary_sin, head_dim, cache.capacity, bool(rotary_interleaved))
            queries = rotary(queries, cache.lengths, advancing=window != (None, None))
            new = rotary(new[0], cache.lengths, advancing=True), new[1]

        parts = [cache.runs(), *([] if new is None else [cache.new_runs(*new)])]
        runs = join_runs(parts, batch, cache.keys, cache.values)
        visible = visibility(q_tokens, cache.visible + (0 if new is None else new[0].shape[1]), window)
        scored = scoring(q, batch, softmax_scale, softcap, alibi_slopes)
        with threads_for(q):
            out, lse = attend_runs(queries, runs, visible, scored)
        if new is not None:
            cache.write(*new)
        return (like(q, out), like(q, stored_lse(lse))) if return_softmax_lse else like(q, out)

    return forward_only(compute, q, k, v, k_cache, v_cache)


class _Cache:
    """The caller's cache, checked.

    Attributes:
        keys: (batch of the cache, capacity, heads, head_dim), or (pages, page_size, heads, head_dim).
        values: As keys.
        capacity: Tokens that a sequence has room for.
        lengths: (batch,): tokens of each sequence in the cache, left padding included.
        visible: (batch,): the same without left padding.
    """

    def __init__(
        self, q: Any, k_cache: Any, v_cache: Any, seqlens: Any, batch_idx: Any, leftpad: Any, block_table: Any
    ) -> None:
        check_axes("q", q, _AXES)
        batch, _, heads, head_dim = q.shape
        if batch < 1:
            raise ValueError(f"q must have at least one batch entry, got shape {tuple(q.shape)}")
        self.keys, self.values = as_numpy(k_cache, "k_cache"), as_numpy(v_cache, "v_cache")
        for name, array in (("k_cache", self.keys), ("v_cache", self.values)):
            check_axes(name, array, _AXES)
            if array.strides[3] != array.itemsize and head_dim > 1:
                raise ValueError(f"{name} must have a last axis of stride 1, got strides {array.strides} in bytes")
        check_head_dim(heads, self.keys.shape[2], head_dim)
        check_shape("k_cache", self.keys, (*self.keys.shape[:3], head_dim))
        check_shape("v_cache", self.values, self.keys.shape)
        self.pages = None if block_table is None else integers("block_table", block_table, (batch, -1), q)
        self.capacity = self.keys.shape[1] * (1 if self.pages is None else self.pages.shape[1])
        self.lengths = self._lengths(seqlens, batch, q)
        self._entries = np.arange(batch)
        self._padding = np.zeros(batch, np.int64)
        if self.pages is not None:
            for name, option in (("cache_batch_idx", batch_idx), ("cache_leftpad", leftpad)):
                if option is not None:
                    raise ValueError(f"{name} must be None where there is a block_table: the table names each page")
            check_pages(self.keys, self.values, self.pages, self.lengths, ("k_cache", "v_cache"))
        elif batch_idx is not None:
            self._entries = integers("cache_batch_idx", batch_idx, (batch,), q)
            _check_range("cache_batch_idx", self._entries, 0, len(self.keys) - 1)
        elif len(self.keys) != batch:
            raise ValueError(f"k_cache must have q's {batch} batch entries (or cache_batch_idx), got {len(self.keys)}")
        if leftpad is not None:
            self._padding = integers("cache_leftpad", leftpad, (batch,), q)
            if (self._padding < 0).any() or (self._padding > self.lengths).any():
                raise ValueError(
                    f"cache_leftpad must be 0 to cache_seqlens {self.lengths.tolist()}, got {self._padding.tolist()}"
                )
        self.visible = self.lengths - self._padding

    def _lengths(self, seqlens: Any, batch: int, q: Any) -> NDArray[np.int64]:
        if seqlens is None:
            return np.full(batch, self.capacity)
        if hasattr(seqlens, "shape") and not isinstance(seqlens, np.generic):
            lengths = integers("cache_seqlens", seqlens, (batch,), q)
        else:
            try:
                lengths = np.full(batch, operator.index(seqlens))
            except TypeError:
                raise TypeError(f"cache_seqlens must be an int or int32 array, got {type(seqlens).__name__}") from None
        _check_range("cache_seqlens", lengths, 0, self.capacity)
        return lengths

    def check_new(self, q_tokens: int, k: Any, v: Any, seqlens: Any) -> tuple[NDArray[Any], NDArray[Any]]:
        """The new keys and values, or an error where they are not acceptable or there is no room for them."""
        if v is None:
            raise ValueError("v must come with k, the new keys; v is None")
        if seqlens is None:
            raise ValueError("cache_seqlens must say where the new keys k go, got None")
        keys, values = readable(as_numpy(k, "k")), readable(as_numpy(v, "v"))
        check_axes("k", keys, _AXES)
        check_shape("k", keys, (len(self.lengths), keys.shape[1], *self.keys.shape[2:]))
        check_shape("v", values, keys.shape)
        if q_tokens > self.capacity:
            raise ValueError(f"q must have at most the cache's {self.capacity} tokens where k is given, got {q_tokens}")
        if int(self.lengths.max()) + keys.shape[1] > self.capacity:
            raise ValueError(
                f"cache_seqlens plus k's {keys.shape[1]} tokens must fit the cache's {self.capacity}, "
                f"got {self.lengths.tolist()}"
            )
        if self.pages is not None:
            check_pages(self.keys, self.values, self.pages, self.lengths + keys.shape[1], ("k_cache", "v_cache"))
        for name, array in (("k_cache", self.keys), ("v_cache", self.values)):
            if not array.flags.writeable:
                raise ValueError(f"{name} must be writable where k is given, got a read-only array")
        return keys, values

    def runs(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """What the cache holds, where it lies."""
        if self.pages is not None:
            return page_runs(self.keys, self.values, self.pages, self.lengths)
        k_start, v_start = (
            self._entries * array.strides[0] + self._padding * array.strides[1] for array in (self.keys, self.values)
        )
        return sequence_runs(self.keys, self.values, k_start, v_start, np.zeros_like(self.lengths), self.visible)

    def new_runs(self, k: NDArray[Any], v: NDArray[Any]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The new tokens, where they lie, behind those of the cache."""
        k_start, v_start = (np.arange(len(array)) * array.strides[0] for array in (k, v))
        return sequence_runs(k, v, k_start, v_start, self.visible, np.full(len(k), k.shape[1]))

    def write(self, k: NDArray[Any], v: NDArray[Any]) -> None:
        """Put the new tokens behind those of the cache."""
        places = self.lengths[:, None] + np.arange(k.shape[1])
        entries = self._entries[:, None]
        if self.pages is not None:
            page_size = self.keys.shape[1]
            entries = self.pages[entries, places // page_size]
            places = places % page_size
        self.keys[entries, places] = k
        self.values[entries, places] = v


class _Rotary:
    """Rotary angles, checked."""

    def __init__(self, cos: Any, sin: Any, head_dim: int, capacity: int, interleaved: bool) -> None:
        for name, other, array in (("rotary_sin", "rotary_cos", sin), ("rotary_cos", "rotary_sin", cos)):
            if array is None:
                raise ValueError(f"{name} must come with {other}, got None")
        self._cos, self._sin = as_numpy(cos, "rotary_cos"), as_numpy(sin, "rotary_sin")
        check_axes("rotary_cos", self._cos, ("positions", "rotary_dim / 2"))
        check_shape("rotary_sin", self._sin, self._cos.shape)
        positions, pairs = self._cos.shape
        if 2 * pairs > head_dim or pairs % 8:
            raise ValueError(
                f"rotary_cos must have a rotary_dim / 2 that is a multiple of 8, up to head_dim / 2 = "
                f"{head_dim / 2:g}; got {pairs}"
            )
        if positions < capacity:
            raise ValueError(f"rotary_cos must have angles for the cache's {capacity} positions, got {positions}")
        self._interleaved = interleaved

    def __call__(self, x: NDArray[Any], lengths: NDArray[np.int64], *, advancing: bool) -> NDArray[Any]:
        """Rotate tokens that stand behind the cache's: each at its place, or all at the first one's."""
        steps = np.arange(x.shape[1]) if advancing else np.zeros(x.shape[1], np.int64)
        positions = lengths[:, None] + steps
        if positions.size and int(positions.max()) >= len(self._cos):
            raise ValueError(
                f"rotary_cos must have angles for position {int(positions.max())}, got {len(self._cos)} positions"
            )
        return rotate(x, self._cos, self._sin, positions, interleaved=self._interleaved)


def _check_range(name: str, values: NDArray[np.int64], low: int, high: int) -> None:
    if not low <= int(values.min()) <= int(values.max()) <= high:
        raise ValueError(f"{name} must be {low} to {high}, got {values.tolist()}")

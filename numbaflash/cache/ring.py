"""The KV cache: a ring of pages for each layer, exact however the tokens arrive.

The law: however the tokens are cut into steps, `step` returns what `numbaflash.attention` returns on the whole sequence
with `causal=True, window=(capacity - sink_tokens - 1, 0)`, plus the sink tokens. It holds for prompts longer than the
ring too, because a step attends to its own tokens where they are and only then writes to the ring what will stay. A
quantized cache obeys it with what `quantized.py` says each query sees in the place of the keys and values.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike, NDArray

from ..arrays import as_numpy, like
from ..backends import CACHE_BACKENDS, choose_backend
from ..cpu import RUN_FIELDS, KVRuns, Visibility, attend_runs, contiguous_run
from ..problem import DTYPES, FLOAT16, MAX_HEAD_DIM, Scoring, check_dtype, check_heads, describe_scoring
from . import files, quantized_step
from .layer import LayerRing
from .layout import RingLayout, raw_layout
from .page_format import BITS, PageFormat
from .pages import PagePool
from .quantized import Closed, QuantizedLayer
from .quantizers import Quantizer, quantizer_of
from .size import layer_nbytes

__all__ = ["RingKVCache", "attention_batch"]

_CODES = {"int8": np.dtype(np.int8), "int4": np.dtype(ml_dtypes.int4)}


class RingKVCache:
    """Keys and values of a sequence, for every layer of a model, in rings of pages.

    A cache is used by one thread at a time; its forks may be used by others. Pages are taken when they are first
    written, so a short sequence costs what it holds.

    Args:
        num_layers: Layers, each with a length of its own.
        num_kv_heads: Heads of keys and values.
        head_dim: Elements of a key and of a value, 1 to 256.
        capacity: Tokens that stay visible: the attention window, sink tokens included.
        sink_tokens: First tokens that are never overwritten (StreamingLLM, section 3.2); fewer than `capacity`.
        dtype: Storage dtype, "float32", "float16" or "bfloat16". Keys and values are rounded to it before they are
            attended to, so that results do not depend on how the tokens arrived. Or "int8" or "int4": a page is
            quantized once it is full, the newest tokens are float16 until then, and so are the sink tokens for good.
        quantizer: Of int8 and int4: "group" (the default), "hqq", either with options as `quantizer_of` takes them, or
            a `Quantizer`.
        page_size: Tokens of a page: a power of two, 8 to 256.
        rollback: So many of the newest tokens can always be truncated, with the whole window still there.
        backend: "cpu", or None to choose.

    Attributes:
        layout: Capacity, sink tokens, page size and rollback, and the slots that follow from them.
        quantizer: The one in use; None where dtype is a float.
        pools: The pages that this cache and its forks take theirs from.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is out of range.
    """

    def __init__(
        self,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        capacity: int,
        sink_tokens: int = 0,
        dtype: DTypeLike = "float16",
        quantizer: Quantizer | str | None = None,
        page_size: int = 64,
        rollback: int = 64,
        backend: str | None = None,
    ) -> None:
        self.num_layers = _int_in("num_layers", num_layers, 1)
        self.num_kv_heads = _int_in("num_kv_heads", num_kv_heads, 1)
        self.head_dim = _int_in("head_dim", head_dim, 1, MAX_HEAD_DIM)
        capacity = _int_in("capacity", capacity, 1)
        page_size = _int_in("page_size", page_size, 8, 256)
        if page_size & (page_size - 1):
            raise ValueError(f"page_size must be a power of two, got {page_size}")
        self.layout = RingLayout(
            capacity=capacity,
            sink_tokens=_int_in("sink_tokens", sink_tokens, 0, capacity - 1),
            page_size=page_size,
            rollback=_int_in("rollback", rollback, 0),
        )
        self.dtype = _storage_dtype(dtype)
        self.backend = choose_backend(backend, CACHE_BACKENDS)
        self.quantizer = _quantizer(self.dtype, quantizer)
        if self.quantizer is None:
            self._format: PageFormat | None = None
            self.pools: tuple[PagePool, ...] = (self._page_pool(self.dtype),)
            self._hold([LayerRing(self.layout, self.pools[0]) for _ in range(self.num_layers)])
            return
        self.quantizer.check_model(self.num_layers, self.num_kv_heads, self.head_dim)
        self._format = self.quantizer.page_format(self.dtype.name, self.num_kv_heads, page_size, self.head_dim)
        self.pools = self._page_pool(FLOAT16), PagePool((self._format.page_nbytes,), np.dtype(np.uint8))
        self._hold([self._quantized_layer(self.quantizer, self._format) for _ in range(self.num_layers)])

    def _page_pool(self, dtype: np.dtype[Any]) -> PagePool:
        return PagePool((2, self.num_kv_heads, self.layout.page_size, self.head_dim), dtype)

    def _quantized_layer(self, quantizer: Quantizer, page_format: PageFormat) -> QuantizedLayer:
        raw, codes = self.pools
        return QuantizedLayer(self.layout, page_format, codes, LayerRing(raw_layout(self.layout), raw), quantizer)

    def append(self, layer: int, k: Any, v: Any) -> None:
        """Write T tokens of one layer; the oldest fall out.

        Args:
            layer: 0 to num_layers - 1.
            k: (T, Hkv, D), float32, float16 or bfloat16; rounded to the storage dtype.
            v: (T, Hkv, D), k's dtype.

        Raises:
            TypeError: Wrong dtypes.
            ValueError: Wrong shapes, no such layer, or what is to be quantized is not finite in float16.
        """
        ring = self._layer(layer)
        keys, values = as_numpy(k, "k"), as_numpy(v, "v")
        check_dtype(k=keys, v=values)
        _check_kv(self, keys, values, lead=())
        if isinstance(ring, LayerRing):
            ring.write(_stored(keys, self.dtype), _stored(values, self.dtype))
            return
        new = quantized_step.raw_tokens(self._part(layer), keys, values)
        closed = ring.close_pages(*new)
        try:
            ring.write(*new, closed)
        except BaseException:
            ring.discard(closed)
            raise

    def attend(
        self,
        layer: int,
        q: Any,
        *,
        scale: float | None = None,
        softcap: float = 0.0,
        alibi_slopes: Any = None,
        sink_logits: Any = None,
    ) -> Any:
        """Attend causally with the queries of the last T tokens, which `append` has written.

        Args:
            layer: 0 to num_layers - 1.
            q: (T, Hq, D); T <= rollback + 1 once the ring has wrapped.
            scale: As in `numbaflash.attention`, like everything that follows.
            softcap: Cap of the scores.
            alibi_slopes: (Hq,).
            sink_logits: (Hq,).

        Returns:
            (T, Hq, D), q's library and dtype.

        Raises:
            TypeError: Wrong dtypes.
            ValueError: Wrong shapes, no such layer, or more queries than the ring still has the windows of, or the
                float16 tokens of their pages.
        """
        ring = self._layer(layer)
        queries = as_numpy(q, "q")
        check_dtype(q=queries)
        _check_q(self, queries, lead=())
        start = ring.length - len(queries)
        if start < 0:
            raise ValueError(f"q must have at most the layer's {ring.length} tokens, got {len(queries)}")
        if self.layout.first_visible(start) < ring.intact:
            most = ring.length - ring.intact - self.layout.window + 1
            raise ValueError(f"q must have at most {most} tokens, older windows are overwritten; got {len(queries)}")
        scoring = describe_scoring(
            batch=1,
            q_heads=queries.shape[1],
            head_dim=self.head_dim,
            scale=scale,
            softcap=softcap,
            alibi_slopes=alibi_slopes,
            sink_logits=sink_logits,
        )
        if isinstance(ring, LayerRing):
            return like(q, _attend([self], [ring], [start], queries[None], None, scoring)[0])
        if ring.page_start(start) < ring.raw_intact and start >= self.layout.sink_tokens:
            raise ValueError(
                f"q must have tokens whose pages are still there in float16, those from {ring.raw_intact} on; "
                f"got the newest {len(queries)} of {ring.length}"
            )
        none = np.empty((0, self.num_kv_heads, self.head_dim), FLOAT16)
        part, closed = self._part(layer), Closed(0, [])
        out = quantized_step.attend([part], [start], queries[None], [(none, none)], [closed], scoring)
        return like(q, out[0])

    def step(
        self,
        layer: int,
        q: Any,
        k: Any,
        v: Any,
        *,
        scale: float | None = None,
        softcap: float = 0.0,
        alibi_slopes: Any = None,
        sink_logits: Any = None,
    ) -> Any:
        """Append T tokens and attend with their queries: prefill (any T) and decode alike.

        The cache changes only after the attention has succeeded.

        Args:
            layer: 0 to num_layers - 1.
            q: (T, Hq, D).
            k: (T, Hkv, D).
            v: (T, Hkv, D).
            scale: As in `numbaflash.attention`, like everything that follows.
            softcap: Cap of the scores.
            alibi_slopes: (Hq,).
            sink_logits: (Hq,).

        Returns:
            (T, Hq, D), q's library and dtype.

        Raises:
            TypeError: Wrong dtypes.
            ValueError: Wrong shapes, or no such layer.
        """
        queries, keys, values = as_numpy(q, "q"), as_numpy(k, "k"), as_numpy(v, "v")
        check_dtype(q=queries, k=keys, v=values)
        _check_q(self, queries, lead=())
        _check_kv(self, keys, values, lead=())
        if len(keys) != len(queries):
            raise ValueError(f"k must have q's {len(queries)} tokens, got {len(keys)}")
        scoring = describe_scoring(
            batch=1,
            q_heads=queries.shape[1],
            head_dim=self.head_dim,
            scale=scale,
            softcap=softcap,
            alibi_slopes=alibi_slopes,
            sink_logits=sink_logits,
        )
        return like(q, _step([self], layer, queries[None], keys[None], values[None], scoring)[0])

    def length(self, layer: int) -> int:
        """Return how many tokens the layer has seen."""
        return self._layer(layer).length

    def first(self, layer: int) -> int:
        """Return the position of the layer's oldest visible token that is no sink; its length while there is none."""
        length = self._layer(layer).length
        return min(length, self.layout.first_visible(length - 1))

    def truncate(self, length: int) -> None:
        """Take every layer back to `length` tokens; nothing changes when that raises.

        Raises:
            ValueError: A layer is shorter, or its window would have holes (more than `rollback` tokens back); or it is
                quantized, `length` lies inside a page, and that page is there as codes only.
        """
        length = _int_in("length", length, 0)
        for index, ring in enumerate(self._layers):
            if length > ring.length:
                raise ValueError(f"length must be at most {ring.length}, the tokens of layer {index}; got {length}")
            if self.layout.first_visible(length - 1) < ring.intact:
                least = ring.intact + self.layout.window
                raise ValueError(
                    f"length must be at least {least}, or layer {index}'s window would have holes; got {length}"
                )
            if isinstance(ring, QuantizedLayer) and not ring.can_truncate(length):
                raise ValueError(
                    f"length must be {ring.raw_intact} or more, or {ring.page_start(length)} where a page begins: "
                    f"layer {index} holds what lies between as codes only; got {length}"
                )
        for ring in self._layers:
            ring.truncate(length)

    def fork(self) -> RingKVCache:
        """Return a child that holds the same tokens and goes its own way; pages are shared until one side writes."""
        child = object.__new__(RingKVCache)
        for name in (
            "num_layers",
            "num_kv_heads",
            "head_dim",
            "layout",
            "dtype",
            "quantizer",
            "backend",
            "pools",
            "_format",
        ):
            setattr(child, name, getattr(self, name))
        child._hold([ring.fork() for ring in self._layers])
        return child

    @property
    def nbytes(self) -> int:
        """Bytes of the pages in use; a page that a fork shares counts in both."""
        return sum(ring.nbytes for ring in self._layers)

    @property
    def max_nbytes(self) -> int:
        """Bytes of the pages once every ring is full."""
        quantizer = self.quantizer
        one = layer_nbytes(self.num_kv_heads, self.head_dim, self.layout, self.dtype.name, quantizer)
        return self.num_layers * one.total

    def save(
        self,
        path: str | os.PathLike[str],
        *,
        notes: Mapping[str, str] | None = None,
        attachments: Mapping[str, NDArray[Any]] | None = None,
    ) -> None:
        """Write the cache to a safetensors file, whole or not at all; a page at a time, so that it takes no memory.

        Args:
            path: Of the file.
            notes: Strings that go with it, for `files.CacheFile` to read.
            attachments: Arrays that go with it, none of them empty.

        Raises:
            OSError: The file cannot be written.
        """
        shape = files.RingShape(
            num_layers=self.num_layers,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            capacity=self.layout.capacity,
            sink_tokens=self.layout.sink_tokens,
            page_size=self.layout.page_size,
            rollback=self.layout.rollback,
            dtype=self.dtype.name,
            quantizer=None if self.quantizer is None else self.quantizer.text,
        )
        layers = [files.LayerState(ring.length, ring.intact, ring.raw_intact) for ring in self._layers]
        codes = [ring for ring in self._layers if isinstance(ring, QuantizedLayer)]
        files.write(
            path,
            shape,
            layers,
            lambda layer, start, stop: self._layers[layer].read(start, stop),
            self.pools[0].dtype,
            lambda layer, page: codes[layer].read_page(page),
            channel_scales=getattr(self.quantizer, "channel_scales", None),
            notes=notes or {},
            attachments=attachments or {},
        )

    @classmethod
    def load(cls, path: str | os.PathLike[str] | files.CacheFile, *, backend: str | None = None) -> RingKVCache:
        """Read a cache that `save` wrote.

        Args:
            path: Of the file; or the file, open.
            backend: As for a new cache.

        Raises:
            OSError: The file cannot be read.
            ValueError: The file is no such cache, of another version, or damaged.
        """
        if not isinstance(path, files.CacheFile):
            with files.CacheFile(path) as file:
                return cls.load(file, backend=backend)
        shape = path.shape
        cache = cls(
            shape.num_layers,
            shape.num_kv_heads,
            shape.head_dim,
            capacity=shape.capacity,
            sink_tokens=shape.sink_tokens,
            dtype=shape.dtype,
            quantizer=None if shape.quantizer is None else quantizer_of(shape.quantizer, path.channel_scales()),
            page_size=shape.page_size,
            rollback=shape.rollback,
            backend=backend,
        )
        for layer, (ring, state) in enumerate(zip(cache._layers, path.layers, strict=True)):
            raw = ring if isinstance(ring, LayerRing) else ring.raw
            for position, keys, values in path.tokens(layer):
                raw.length = position
                raw.write(keys, values)
            raw.length, raw.intact = state.length, state.raw_intact
            if isinstance(ring, QuantizedLayer):
                ring.intact = state.intact
                for page, content in path.pages(layer):
                    ring.write_page(page, content)
        return cache

    def _part(self, layer: int) -> quantized_step.Part:
        ring, quantizer, page_format = self._layer(layer), self.quantizer, self._format
        if not isinstance(ring, QuantizedLayer) or quantizer is None or page_format is None:
            raise TypeError(f"a cache of dtype {self.dtype.name} is not quantized")
        return quantized_step.Part(ring, layer, self.layout, page_format, quantizer)

    def _hold(self, layers: list[LayerRing | QuantizedLayer]) -> None:
        self._layers = layers
        # A cache that is no longer used gives its pages back to the pool, which its forks may still use.
        weakref.finalize(self, _release, layers).atexit = False

    def _layer(self, layer: int) -> LayerRing | QuantizedLayer:
        return self._layers[_int_in("layer", layer, 0, self.num_layers - 1)]


def attention_batch(
    caches: Sequence[RingKVCache],
    layer: int,
    q: Any,
    k: Any,
    v: Any,
    *,
    scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    sink_logits: Any = None,
) -> Any:
    """`RingKVCache.step` for N caches of any lengths in one launch.

    Args:
        caches: N different caches with the same heads, head_dim and dtype, and pages of the same format where they are
            quantized; capacities and sink tokens may differ.
        layer: A layer that all of them have.
        q: (N, T, Hq, D).
        k: (N, T, Hkv, D).
        v: (N, T, Hkv, D).
        scale: As in `numbaflash.attention`, like everything that follows.
        softcap: Cap of the scores.
        alibi_slopes: (Hq,) or (N, Hq).
        sink_logits: (Hq,).

    Returns:
        (N, T, Hq, D), q's library and dtype.

    Raises:
        TypeError: Wrong dtypes.
        ValueError: Wrong shapes, caches that differ or come twice, or no such layer; no cache has changed then.
    """
    caches = list(caches)
    if not caches:
        raise ValueError("caches must have at least one cache, got none")
    for cache in caches:
        if not isinstance(cache, RingKVCache):
            raise TypeError(f"caches must hold RingKVCache objects, got {type(cache).__name__}")
    if len({id(cache) for cache in caches}) != len(caches):
        raise ValueError("caches must not hold the same cache twice")
    kinds = {(cache.num_kv_heads, cache.head_dim, cache.dtype.name) for cache in caches}
    if len(kinds) != 1:
        raise ValueError(f"caches must agree in kv heads, head_dim and dtype, got {sorted(kinds)}")
    if len({cache._format for cache in caches}) != 1:
        raise ValueError("caches must agree in page_size and the quantizer's groups where they are quantized")
    queries, keys, values = as_numpy(q, "q"), as_numpy(k, "k"), as_numpy(v, "v")
    check_dtype(q=queries, k=keys, v=values)
    lead = (len(caches),)
    _check_q(caches[0], queries, lead)
    _check_kv(caches[0], keys, values, lead)
    if keys.shape[1] != queries.shape[1]:
        raise ValueError(f"k must have q's {queries.shape[1]} tokens, got {keys.shape[1]}")
    scoring = describe_scoring(
        batch=len(caches),
        q_heads=queries.shape[2],
        head_dim=caches[0].head_dim,
        scale=scale,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        sink_logits=sink_logits,
    )
    return like(q, _step(caches, layer, queries, keys, values, scoring))


def _step(
    caches: Sequence[RingKVCache],
    layer: int,
    q: NDArray[Any],
    k: NDArray[Any],
    v: NDArray[Any],
    scoring: Scoring,
) -> NDArray[Any]:
    """Attend to what the caches hold and to the new tokens, then write those."""
    if caches[0].quantizer is not None:
        return quantized_step.step([cache._part(layer) for cache in caches], q, k, v, scoring)
    rings = [ring for cache in caches if isinstance(ring := cache._layer(layer), LayerRing)]
    stored = _stored(k, caches[0].dtype), _stored(v, caches[0].dtype)
    out = _attend(caches, rings, [ring.length for ring in rings], q, stored, scoring)
    for ring, keys, values in zip(rings, *stored, strict=True):
        ring.write(keys, values)
    return out


def _attend(
    caches: Sequence[RingKVCache],
    rings: Sequence[LayerRing],
    starts: Sequence[int],
    q: NDArray[Any],
    new: tuple[NDArray[Any], NDArray[Any]] | None,
    scoring: Scoring,
) -> NDArray[Any]:
    """Attend with queries (N, T, Hq, D) at positions `starts` and on; `new` are tokens behind those of the rings."""
    first = caches[0]
    table = np.empty((sum(ring.max_runs for ring in rings) + len(rings), RUN_FIELDS), np.int64)
    address, rows, bounds = table.ctypes.data, 0, [0]
    for n, (cache, ring, start) in enumerate(zip(caches, rings, starts, strict=True)):
        rows += ring.list_runs(cache.layout.first_visible(start), address + rows * table.strides[0])
        if new:
            table[rows] = contiguous_run(new[0][n], new[1][n], ring.length)
            rows += 1
        bounds.append(rows)
    runs = KVRuns(
        table=table[:rows],
        bounds=np.array(bounds, np.int64),
        dtype=first.dtype,
        kv_heads=first.num_kv_heads,
        head_dim=first.head_dim,
        value_dim=first.head_dim,
    )
    visibility = Visibility(
        q_start=starts,
        left=[cache.layout.window - 1 for cache in caches],
        right=[0] * len(caches),
        sinks=[cache.layout.sink_tokens for cache in caches],
    )
    return attend_runs(q, runs, visibility, scoring)[0]


def _release(layers: Sequence[LayerRing | QuantizedLayer]) -> None:
    for ring in layers:
        ring.release()


def _stored(array: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Round to the storage dtype; what is too large for it becomes infinite, as IEEE 754 has it, and NaN stays NaN."""
    if array.dtype == dtype:
        return np.ascontiguousarray(array)
    with np.errstate(over="ignore", invalid="ignore"):
        return np.ascontiguousarray(array, dtype)


def _check_q(cache: RingKVCache, q: NDArray[Any], lead: tuple[int, ...]) -> None:
    _check_shape("q", q, (*lead, "tokens", "q heads", cache.head_dim))
    check_heads(q.shape[-2], cache.num_kv_heads)


def _check_kv(cache: RingKVCache, k: NDArray[Any], v: NDArray[Any], lead: tuple[int, ...]) -> None:
    for name, array in (("k", k), ("v", v)):
        _check_shape(name, array, (*lead, "tokens", cache.num_kv_heads, cache.head_dim))
    if v.shape != k.shape:
        raise ValueError(f"v must have k's shape {k.shape}, got {v.shape}")


def _check_shape(name: str, array: NDArray[Any], axes: tuple[int | str, ...]) -> None:
    if array.ndim != len(axes) or any(
        axis != size and not isinstance(axis, str) for axis, size in zip(axes, array.shape, strict=True)
    ):
        raise ValueError(f"{name} must have shape ({', '.join(map(str, axes))}), got {array.shape}")


def _storage_dtype(dtype: DTypeLike) -> np.dtype[Any]:
    try:
        resolved = _CODES[dtype] if isinstance(dtype, str) and dtype in _CODES else np.dtype(dtype)
    except TypeError:
        resolved = np.dtype(np.void)
    if resolved not in (*DTYPES, *_CODES.values()):
        raise ValueError(f"dtype must be float32, float16, bfloat16, int8 or int4, got {dtype!r}")
    return resolved


def _quantizer(dtype: np.dtype[Any], quantizer: Quantizer | str | None) -> Quantizer | None:
    if dtype.name not in BITS:
        if quantizer is not None:
            raise ValueError(f"quantizer must be None for dtype {dtype.name}, got {quantizer!r}")
        return None
    if isinstance(quantizer, Quantizer):
        return quantizer
    if quantizer is not None and not isinstance(quantizer, str):
        raise TypeError(f"quantizer must be a name, a Quantizer or None, got {type(quantizer).__name__}")
    return quantizer_of("group" if quantizer is None else quantizer)


def _int_in(name: str, value: object, least: int, most: int | None = None) -> int:
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < least or (most is not None and value > most):
        accepted = f"{least} or more" if most is None else f"{least} to {most}"
        raise ValueError(f"{name} must be {accepted}, got {value}")
    return int(value)

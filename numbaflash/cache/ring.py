"""The KV cache: a ring of pages for each layer, exact however the tokens arrive.

The law: however the tokens are cut into steps, `step` returns what `numbaflash.attention` returns on the whole sequence
with `causal=True, window=(capacity - sink_tokens - 1, 0)`, plus the sink tokens. It holds for prompts longer than the
ring too, because a step attends to its own tokens where they are and only then writes to the ring what will stay. A
quantized cache obeys it with what `quantized.py` says each query sees in the place of the keys and values.
"""

from __future__ import annotations

import functools
import importlib
import os
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from numpy.typing import DTypeLike, NDArray

from ..backends import BACKENDS, choose_backend
from ..problem import MAX_HEAD_DIM, check_dtype, describe_scoring
from . import files
from .arguments import check_kv, check_q, choose_quantizer, int_in, ring_layout, storage_dtype
from .host_place import HostPlace
from .layer import Layer
from .place import CacheShape, Place
from .quantized import QuantizedLayer
from .quantizers import Quantizer, quantizer_of
from .size import layer_nbytes

__all__ = ["RingKVCache"]


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
        backend: "cpu"; "cuda", where arrays on the GPU are read and written where they lie, in the order of their
            library's current stream; "emulated", the GPU's kernels on the emulator: slow, and checked. None: "cuda"
            where a GPU is there, else "cpu".

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
        self.num_layers = int_in("num_layers", num_layers, 1)
        self.num_kv_heads = int_in("num_kv_heads", num_kv_heads, 1)
        self.head_dim = int_in("head_dim", head_dim, 1, MAX_HEAD_DIM)
        self.layout = ring_layout(capacity, sink_tokens, page_size, rollback)
        self.dtype = storage_dtype(dtype)
        self.quantizer = choose_quantizer(self.dtype, quantizer)
        self.backend = choose_backend(backend, BACKENDS)
        self._place = _place_of(self.backend)
        self.pools, layers = self._place.open(self._shape())
        self._hold(layers)

    def _shape(self) -> CacheShape:
        return CacheShape(self.num_layers, self.num_kv_heads, self.head_dim, self.layout, self.dtype, self.quantizer)

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
        held = self._layer(layer)
        keys, values = self._place.view(k, "k"), self._place.view(v, "v")
        check_dtype(k=keys, v=values)
        check_kv(keys, values, self.num_kv_heads, self.head_dim)
        self._place.append(held, keys, values, {"k": k, "v": v})

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
        held = self._layer(layer)
        queries = self._place.view(q, "q")
        check_dtype(q=queries)
        check_q(queries, self.num_kv_heads, self.head_dim)
        held.check_queries(held.length - queries.shape[0])
        scoring = describe_scoring(
            batch=1,
            q_heads=queries.shape[1],
            head_dim=self.head_dim,
            scale=scale,
            softcap=softcap,
            alibi_slopes=self._place.option(alibi_slopes),
            sink_logits=self._place.option(sink_logits),
        )
        return self._place.attend(held, queries, scoring, {"q": q})

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
        view = self._place.view
        queries, keys, values = view(q, "q"), view(k, "k"), view(v, "v")
        check_dtype(q=queries, k=keys, v=values)
        check_q(queries, self.num_kv_heads, self.head_dim)
        check_kv(keys, values, self.num_kv_heads, self.head_dim)
        if keys.shape[0] != queries.shape[0]:
            raise ValueError(f"k must have q's {queries.shape[0]} tokens, got {keys.shape[0]}")
        scoring = describe_scoring(
            batch=1,
            q_heads=queries.shape[1],
            head_dim=self.head_dim,
            scale=scale,
            softcap=softcap,
            alibi_slopes=self._place.option(alibi_slopes),
            sink_logits=self._place.option(sink_logits),
        )
        given = {"q": q, "k": k, "v": v}
        return self._place.step([self._layer(layer)], queries, keys, values, scoring, given)

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
        length = int_in("length", length, 0)
        for layer in self._layers:
            layer.check_truncate(length)
        for layer in self._layers:
            layer.truncate(length)

    def fork(self) -> RingKVCache:
        """Return a child that holds the same tokens and goes its own way; pages are shared until one side writes."""
        child = object.__new__(RingKVCache)
        shared = "num_layers num_kv_heads head_dim layout dtype quantizer backend pools _place"
        for name in shared.split():
            setattr(child, name, getattr(self, name))
        child._hold([layer.fork() for layer in self._layers])
        return child

    def __copy__(self) -> RingKVCache:
        """As `fork`."""
        return self.fork()

    def __deepcopy__(self, _memo: dict[int, Any]) -> RingKVCache:
        """As `fork`."""
        return self.fork()

    def __reduce__(self) -> NoReturn:
        """Raise: another process would read addresses of this one's memory."""
        raise TypeError("a RingKVCache cannot be pickled: save(path) writes it, and load(path) reads it elsewhere")

    @property
    def nbytes(self) -> int:
        """Bytes of the pages in use; a page that a fork shares counts in both."""
        return sum(layer.nbytes for layer in self._layers)

    @property
    def max_nbytes(self) -> int:
        """Bytes of the pages once every ring is full."""
        stored = self._place.stored_dim(self.head_dim)
        one = layer_nbytes(self.num_kv_heads, stored, self.layout, self.dtype.name, self.quantizer)
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
            attachments: Arrays that go with it, none of them empty; float32, float16, bfloat16, int8 or uint8.

        Raises:
            ValueError: An attachment cannot be stored; nothing is written.
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
        states = [files.LayerState(layer.length, layer.intact, layer.raw_intact) for layer in self._layers]
        quantized = [layer for layer in self._layers if isinstance(layer, QuantizedLayer)]
        files.write(
            path,
            shape,
            states,
            lambda layer, start, stop: self._layers[layer].ring.read(start, stop),
            self.pools[0].dtype,
            lambda layer, page: quantized[layer].read_page(page),
            channel_scales=None if self.quantizer is None else self.quantizer.folding,
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
        for layer, state in zip(cache._layers, path.layers, strict=True):
            layer.restore(path.tokens(layer.index), state.length, state.raw_intact)
            if isinstance(layer, QuantizedLayer):
                layer.restore_pages(path.pages(layer.index), state.intact)
        return cache

    def _hold(self, layers: Sequence[Layer]) -> None:
        self._layers = layers
        # A cache that is no longer used gives its pages back to the pool, which its forks may still use.
        weakref.finalize(self, _release, layers).atexit = False

    def _layer(self, layer: int) -> Layer:
        return self._layers[int_in("layer", layer, 0, self.num_layers - 1)]


@functools.cache
def _place_of(backend: str) -> Place:
    if backend == "cpu":
        return HostPlace()
    try:
        module = importlib.import_module(".device_place", __package__)
    except ImportError as error:
        raise RuntimeError(f"backends 'cuda' and 'emulated' need pip install 'numbaflash[cuda]': {error}") from error
    place: Place = module.device_place(backend)
    return place


def _release(layers: Sequence[Layer]) -> None:
    for layer in layers:
        layer.release()

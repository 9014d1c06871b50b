"""Caches in host memory, computed by the CPU's kernels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from ..arrays import as_numpy, like
from ..cpu import threads_for
from ..device_arrays import AnyArray
from ..problem import FLOAT16, Scoring
from . import code_steps, float_steps
from .host_quantized import HostQuantizedLayer
from .layer import FloatLayer, Layer
from .layout import RingLayout, raw_layout
from .pages import PagePool, PageTable
from .place import CacheShape, Place, Pool, check_quantizer
from .token_ring import TokenRing

__all__ = ["HostPlace"]


class HostPlace(Place):
    """Host memory."""

    def open(self, shape: CacheShape) -> tuple[tuple[Pool, ...], list[Layer]]:
        """Return the pools and the empty layers of a new cache: quantized ones have a pool of codes as well."""
        layout, quantizer = shape.layout, shape.quantizer
        if quantizer is None:
            pool = _page_pool(shape, shape.dtype)
            return (pool,), [FloatLayer(i, layout, _ring(layout, pool)) for i in range(shape.num_layers)]
        page_format = check_quantizer(shape, quantizer)
        pool, codes = _page_pool(shape, FLOAT16), PagePool((page_format.page_nbytes,), np.dtype(np.uint8))
        raw = raw_layout(layout)
        return (pool, codes), [
            HostQuantizedLayer(i, layout, _ring(raw, pool), page_format, PageTable(codes, layout.ring_slots), quantizer)
            for i in range(shape.num_layers)
        ]

    def stored_dim(self, head_dim: int) -> int:
        """Rows are not padded."""
        return head_dim

    def view(self, array: Any, name: str) -> NDArray[Any]:
        """View an array in host memory."""
        return as_numpy(array, name)

    def option(self, value: Any) -> Any:
        """Options must be in host memory already."""
        return value

    def check_together(self, places: Sequence[Place]) -> None:
        """See that all caches are in host memory."""
        if not all(isinstance(place, HostPlace) for place in places):
            raise ValueError("caches must all have one backend, got 'cpu' and others")

    def append(self, layer: Layer, k: AnyArray, v: AnyArray, given: Mapping[str, Any]) -> None:  # noqa: ARG002
        """Append tokens."""
        keys, values = (cast("NDArray[Any]", array) for array in (k, v))
        _steps_of(layer).append([layer], keys[None], values[None])

    def attend(self, layer: Layer, q: AnyArray, scoring: Scoring, given: Mapping[str, Any]) -> Any:
        """Attend with the queries of a layer's last tokens."""
        queries = cast("NDArray[Any]", q)
        with threads_for(given["q"]):
            return like(given["q"], _steps_of(layer).attend([layer], queries[None], scoring)[0])

    def step(
        self, layers: Sequence[Layer], q: AnyArray, k: AnyArray, v: AnyArray, scoring: Scoring, given: Mapping[str, Any]
    ) -> Any:
        """Attend, then append."""
        queries, keys, values = (cast("NDArray[Any]", array) for array in (q, k, v))
        step = _steps_of(layers[0]).step
        with threads_for(given["q"]):
            if queries.ndim == 3:
                return like(given["q"], step(layers, queries[None], keys[None], values[None], scoring)[0])
            return like(given["q"], step(layers, queries, keys, values, scoring))


def _steps_of(layer: Layer) -> Any:
    """The functions for layers like this one."""
    return code_steps if layer.page_format else float_steps


def _ring(layout: RingLayout, pool: PagePool) -> TokenRing:
    return TokenRing(layout, PageTable(pool, layout.slots))


def _page_pool(shape: CacheShape, dtype: np.dtype[Any]) -> PagePool:
    return PagePool((2, shape.kv_heads, shape.layout.page_size, shape.head_dim), dtype)

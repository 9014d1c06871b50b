"""Caches in device memory, computed by the kernels of `numbaflash.cuda`: on a GPU, or on the emulator.

One path for both: it knows a `Device`, never which. Work is queued on the current stream of the library that the
arrays are from; a cache that is used on several streams keeps its order by events (`DevicePagePool`).
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any, cast

import numpy as np

from ..arrays import as_numpy
from ..cuda import paged
from ..cuda.callers import Result, caller_stream
from ..cuda.codes import CodeFormat
from ..cuda.device import Device, EmulatedDevice
from ..cuda.gpu import CudaDevice, cuda_device
from ..cuda.paged_sequences import PagedLayer, padded
from ..cuda.scratch import Scratch
from ..cuda.solve import Queue
from ..device_arrays import AnyArray, DeviceArray, is_on_gpu, view
from ..problem import FLOAT16, Scoring
from .device_pages import DevicePagePool, DevicePageTable, all_used_by
from .device_quantized import DeviceQuantizedLayer
from .device_ring import DeviceLayer, DeviceRing, changing
from .layer import Layer
from .layout import RingLayout, raw_layout
from .place import CacheShape, Place, Pool, check_quantizer

__all__ = ["DevicePlace", "device_place"]


@functools.cache
def device_place(backend: str) -> DevicePlace:
    """Return the place of caches with backend "cuda" (the first GPU) or "emulated"; the same one each time.

    Raises:
        RuntimeError: There is no GPU, or it is too old.
    """
    if backend == "cuda":
        return DevicePlace(cuda_device(0))
    return DevicePlace(EmulatedDevice(), one_at_a_time=True)


class DevicePlace(Place):
    """A device.

    Args:
        device: Which.
        one_at_a_time: It may be used by one thread at a time.

    Attributes:
        new_queue: Makes the queue of a call.
    """

    def __init__(self, device: Device, *, one_at_a_time: bool = False) -> None:
        self.device = device
        self.new_queue: Callable[..., Queue] = Queue
        # Only a GPU replays launches; on the emulator arrays of their own are checked better.
        self._scratch = Scratch(device) if isinstance(device, CudaDevice) else None
        self._alone: AbstractContextManager[Any] = threading.RLock() if one_at_a_time else nullcontext()

    def open(self, shape: CacheShape) -> tuple[tuple[Pool, ...], list[Layer]]:
        """Return the pools and the empty layers of a new cache: quantized ones have a pool of codes as well."""
        layout, quantizer, layers = shape.layout, shape.quantizer, range(shape.num_layers)
        elements = 2 * shape.kv_heads * layout.page_size * self.stored_dim(shape.head_dim)
        with self._alone, self.device.current():
            if quantizer is None:
                pool = self._pool(elements * shape.dtype.itemsize, shape.dtype)
                kind = PagedLayer(shape.kv_heads, shape.head_dim, shape.dtype)
                return (pool,), [DeviceLayer(i, layout, _ring(layout, pool, kind)) for i in layers]
            page_format = check_quantizer(shape, quantizer)
            pool = self._pool(elements * FLOAT16.itemsize, FLOAT16)
            codes = self._pool(page_format.page_nbytes, np.dtype(np.uint8))
            kind = PagedLayer(shape.kv_heads, shape.head_dim, FLOAT16, CodeFormat.of(page_format))
            raw = raw_layout(layout)
            return (pool, codes), [
                DeviceQuantizedLayer(
                    i, layout, _ring(raw, pool, kind), page_format, DevicePageTable(codes, layout.ring_slots), quantizer
                )
                for i in layers
            ]

    def stored_dim(self, head_dim: int) -> int:
        """Rows are padded to whole 16 bytes."""
        return padded(head_dim)

    def view(self, array: Any, name: str) -> AnyArray:
        """View an array in host memory, or on this device."""
        if not is_on_gpu(array):
            return as_numpy(array, name)
        if not isinstance(self.device, CudaDevice):
            raise ValueError(f"{name} must be in host memory for backend 'emulated', got an array on a GPU")
        seen = view(array, name)
        if isinstance(seen, DeviceArray) and seen.device not in (None, self.device.ordinal):
            raise ValueError(
                f"{name} must be on the cache's GPU, number {self.device.ordinal}, got number {seen.device}"
            )
        return seen

    def option(self, value: Any) -> Any:
        """Copy an array on the GPU to the host."""
        if value is None or not is_on_gpu(value):
            return value
        with self._call({"option": value}, {}) as queue:
            return queue.read(cast(DeviceArray, self.view(value, "option")))

    def check_together(self, places: Sequence[Place]) -> None:
        """See that all caches are on this device."""
        for place in places:
            if place is not self:
                other = place.device.name if isinstance(place, DevicePlace) else "host memory"
                raise ValueError(f"caches must all be on one device, got {self.device.name} and {other}")

    def append(self, layer: Layer, k: AnyArray, v: AnyArray, given: Mapping[str, Any]) -> None:
        """Append tokens."""
        held = [cast(DeviceLayer, layer)]
        with self._call(given, {"k": k, "v": v}, held) as queue:
            K, V = held[0].receive(held, _batched(k), _batched(v), queue)
            with changing(held, k.shape[0], queue):
                sequences = [layer.sequence(layer.length, queue) for layer in held]
                paged.step(queue, held[0].ring.kind, sequences, None, K, V, None, None)

    def attend(self, layer: Layer, q: AnyArray, scoring: Scoring, given: Mapping[str, Any]) -> Any:
        """Attend with the queries of a layer's last tokens."""
        held = cast(DeviceLayer, layer)
        with self._call(given, {"q": q}, [held]) as queue:
            result = Result(queue, given["q"], q.shape, q.dtype)
            out = cast(DeviceArray, _batched(result.array))
            Q = held.fold_queries([held], _batched(q), queue)
            sequence = held.sequence(held.length - q.shape[0], queue)
            paged.step(queue, held.ring.kind, [sequence], Q, None, None, scoring, out)
            return result.handed_over()

    def step(
        self, layers: Sequence[Layer], q: AnyArray, k: AnyArray, v: AnyArray, scoring: Scoring, given: Mapping[str, Any]
    ) -> Any:
        """Attend, then append."""
        held = cast(Sequence[DeviceLayer], layers)
        for layer in held:
            layer.check_next()
        views, tokens = {"q": q, "k": k, "v": v}, k.shape[-3]
        with self._call(given, views, held) as queue:
            K, V = held[0].receive(held, _batched(k), _batched(v), queue)
            Q = held[0].fold_queries(held, _batched(q), queue)
            with changing(held, tokens, queue):
                result = Result(queue, given["q"], q.shape, q.dtype)
                out = cast(DeviceArray, _batched(result.array))
                sequences = [layer.sequence(layer.length, queue) for layer in held]
                paged.step(queue, held[0].ring.kind, sequences, Q, K, V, scoring, out)
                for layer in held:
                    layer.ring.overwrite(tokens)
                return result.handed_over()

    @contextmanager
    def _call(
        self, given: Mapping[str, Any], views: Mapping[str, AnyArray], layers: Sequence[DeviceLayer] = ()
    ) -> Iterator[Queue]:
        """Order a call's work behind what its arrays and pages wait for."""
        with self.device.current():
            stream = self.device.default_stream
            if isinstance(self.device, CudaDevice):
                on_gpu = [name for name, value in given.items() if is_on_gpu(value)]
                leader = given[on_gpu[0]] if on_gpu else None
                arrays = [array for array in views.values() if isinstance(array, DeviceArray)]
                stream = caller_stream(self.device, leader, arrays)
            scratch = nullcontext() if self._scratch is None else self._scratch.lent(stream)
            pools = [pool for layer in layers for pool in layer.pools]
            with all_used_by(stream, pools), self._alone, scratch as arena:
                yield self.new_queue(self.device, stream, arena)

    def _pool(self, page_nbytes: int, dtype: np.dtype[Any]) -> DevicePagePool:
        return DevicePagePool(self.device, page_nbytes, dtype, self._alone)


def _ring(layout: RingLayout, pool: DevicePagePool, kind: PagedLayer) -> DeviceRing:
    return DeviceRing(layout, DevicePageTable(pool, layout.slots), kind)


def _batched(array: AnyArray) -> AnyArray:
    """Give (T, H, D) a first axis."""
    if array.ndim == 4:
        return array
    if isinstance(array, DeviceArray):
        return replace(array, shape=(1, *array.shape), strides=(0, *array.strides))
    return array[None]

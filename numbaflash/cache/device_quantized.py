"""A quantized layer on a device: pages of codes and of float16 tokens, which one kernel reads as they are.

New tokens come through the host: there they are rounded, looked at for what is not finite, and there full pages are
quantized, all by the code that caches in host memory run, so that codes are the same to the bit and a file goes on
anywhere. Where the arrays lie on a GPU, that waits for it once in a step, for only the host can raise an error when
NaN arrives; the tokens of a page that had begun are read back once in `page_size` tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from ..cuda.device import Stream
from ..cuda.paged_sequences import PagedCodes, PagedSequence
from ..cuda.solve import Queue
from ..device_arrays import AnyArray, DeviceArray
from .device_pages import DevicePagePool, DevicePageTable
from .device_ring import DeviceLayer, DeviceRing
from .quantized import QuantizedLayer

__all__ = ["DeviceQuantizedLayer"]

# A page table of this many slots has page p in slot p.
_ENDLESS = 2**31 - 1


class DeviceQuantizedLayer(QuantizedLayer, DeviceLayer):
    """A `QuantizedLayer` on a device."""

    ring: DeviceRing
    table: DevicePageTable

    # Pages that the tokens received fill: number of the first, their content, and where that lies until it is known
    # whether it comes to stay; and pages, by slot, where it then goes to and there is none yet, or a shared one.
    _first_filled: int = 0
    _filled: Sequence[Any] | NDArray[np.uint8] = ()
    _placed: DeviceArray | None = None
    _fresh: Mapping[int, int] = MappingProxyType({})
    _listed: DeviceArray | None = None
    _stream: Stream

    @property
    def pools(self) -> list[DevicePagePool]:
        """Where its pages come from."""
        return [self.ring.pool, self.table.pool]

    @classmethod
    def receive(cls, layers: Sequence[Self], k: AnyArray, v: AnyArray, queue: Queue) -> tuple[AnyArray, AnyArray]:
        """Fold new tokens, (N, T, Hkv, D), round them to float16, and quantize the pages that they fill.

        Raises:
            ValueError: Some are not finite in float16; no layer has changed.
        """
        arrived = zip(layers, _on_host(k, queue), _on_host(v, queue), strict=True)
        stored = [layer.fold_and_round(keys, values) for layer, keys, values in arrived]
        for layer, tokens in zip(layers, stored, strict=True):
            layer._first_filled, layer._filled = layer.quantize_full_pages(*tokens)
        keys, values = (np.stack(arrays) for arrays in zip(*stored, strict=True))
        return keys, values

    @classmethod
    def fold_queries(cls, layers: Sequence[Self], q: AnyArray, queue: Queue) -> AnyArray:
        """Fold queries, (N, T, Hq, D), on the host where the quantizer folds any, and round them to their dtype."""
        if all(layer.quantizer.folding is None for layer in layers):
            return q
        pairs = zip(layers, _on_host(q, queue), strict=True)
        folded = [layer.quantizer.fold_queries(layer.index, queries) for layer, queries in pairs]
        return np.stack(folded).astype(q.dtype)

    def sequence(self, start: int, queue: Queue) -> PagedSequence:
        """Return the layer as kernels that are queued now will see it, for queries from `start` on.

        Pages that are being filled have no slots yet, for what these hold may still be seen: then all are listed.
        """
        window, ring = self.layout.window, self.ring.sequence(start, queue)
        if self._placed is None:
            return ring._replace(codes=PagedCodes(self.table.placed(queue), self.layout.ring_slots, window))
        first = self.first_page(start)
        seen = [self.table[self.slot_of(number)] for number in range(first, self._first_filled)]
        seen += self._addresses(max(first, self._first_filled))
        listed = self._listed = queue.place(np.array(seen, np.int64))
        return ring._replace(codes=PagedCodes(listed.address - 8 * first, _ENDLESS, window))

    def prepare(self, tokens: int, queue: Queue) -> None:
        """See that there are pages for the tokens received; those of codes are placed beside the pool's."""
        super().prepare(tokens, queue)
        if not len(self._filled):
            return
        pool = self.table.pool
        rows = np.zeros((len(self._filled), pool.stride), np.uint8)
        rows[:, : pool.page_nbytes] = self._filled
        self._placed, self._stream = queue.place(rows), queue.stream
        slots = [self.slot_of(number) for number in self._staying()]
        slots = [slot for slot in slots if not self.table[slot] or pool.is_shared(self.table[slot])]
        self._fresh = dict(zip(slots, pool.acquire(len(slots), queue.stream), strict=True))

    def commit(self, tokens: int) -> None:
        """The pages of codes go to their slots, and the tokens are there.

        What is lost is noted first, and the length comes last: Ctrl-C in between leaves the layer as short as it was.
        """
        pool, fresh, staying, placed = self.table.pool, self._fresh, self._staying(), self._placed
        addresses = self._addresses(staying.start)
        self._forget()
        self._intact = max(self._intact, self.length + tokens - self.layout.ring_tokens)
        for slot, page in fresh.items():
            before = self.table[slot]
            self.table[slot] = page
            if before:
                pool.release(before)
        for number, address in zip(staying, addresses, strict=True):
            pool.device.copy(self.table[self.slot_of(number)], address, pool.page_nbytes, self._stream)
        del placed  # the addresses are in it
        super().commit(tokens)

    def discard(self) -> None:
        """They are not: the pages go back."""
        super().discard()
        for page in self._fresh.values():
            self.table.pool.release(page)
        self._forget()

    def _staying(self) -> range:
        """The numbers of the filled pages that later ones of them do not overwrite."""
        behind = self._first_filled + len(self._filled)
        return range(max(self._first_filled, behind - self.layout.ring_slots), behind)

    def _addresses(self, first: int) -> list[int]:
        """Where the filled pages from number `first` on lie."""
        if self._placed is None:
            return []
        numbers = range(first - self._first_filled, len(self._filled))
        return [self._placed.address + i * self.table.pool.stride for i in numbers]

    def _forget(self) -> None:
        self._filled, self._placed, self._fresh, self._listed = (), None, {}, None


def _on_host(array: AnyArray, queue: Queue) -> NDArray[Any]:
    return queue.read(array) if isinstance(array, DeviceArray) else array

"""Steps and attention of quantized caches, of one or of many at once, as `float_steps.py` has them of others.

What a query sees of codes and what in 16 bits depends on its page: a step is parted by pages, into one launch still.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..cpu import RUN_FIELDS, Codes, KVRuns, Visibility, attend_runs
from ..cpu.code_paging import list_parts
from ..cpu.fit import all_finite
from ..cpu.record import address_of
from ..problem import Scoring
from .host_quantized import FilledPages, HostQuantizedLayer
from .quantized import check_finite, in_float16
from .quantizers import Quantizer
from .token_ring import RingBatch

__all__ = ["append", "attend", "step"]


def step(
    layers: Sequence[HostQuantizedLayer], q: NDArray[Any], k: NDArray[Any], v: NDArray[Any], scoring: Scoring
) -> NDArray[Any]:
    """Attend to what the layers hold and to the new tokens, then write those.

    Args:
        layers: One of each cache, N of them, alike in heads, head_dim, dtype and page format.
        q: (N, T, Hq, D).
        k: (N, T, Hkv, D).
        v: (N, T, Hkv, D).
        scoring: As in `cpu.attend_runs`.

    Returns:
        (N, T, Hq, D), q's dtype.

    Raises:
        ValueError: k or v cannot be stored; no layer has changed.
        MemoryError: A layer has no pages left; no layer has changed.
    """
    batch = _Batch(layers, k, v)
    try:
        out = batch.attend(q, scoring)
        fresh = batch.rings.reserve()
    except BaseException:
        batch.discard()
        raise
    batch.write(fresh)
    return out


def append(layers: Sequence[HostQuantizedLayer], k: NDArray[Any], v: NDArray[Any]) -> None:
    """Write new tokens, (N, T, Hkv, D) each.

    Raises:
        ValueError: They cannot be stored; no layer has changed.
        MemoryError: A layer has no pages left; no layer has changed.
    """
    batch = _Batch(layers, k, v)
    try:
        fresh = batch.rings.reserve()
    except BaseException:
        batch.discard()
        raise
    batch.write(fresh)


def attend(layers: Sequence[HostQuantizedLayer], q: NDArray[Any], scoring: Scoring) -> NDArray[Any]:
    """Attend with the queries (N, T, Hq, D) of the last T tokens of each layer."""
    ring = layers[0].ring
    none = np.empty((len(layers), 0, ring.kv_heads, ring.head_dim), ring.dtype)
    return _Batch(layers, none, none).attend(q, scoring)


class _Batch:
    """Layers of several caches, and tokens that follow those in them: none, or as many for each.

    Attributes:
        rings: Their tokens in float16, and those that follow.

    Raises:
        ValueError: k or v cannot be stored.
        MemoryError: There are no pages for what is to be quantized.
    """

    def __init__(self, layers: Sequence[HostQuantizedLayer], k: NDArray[Any], v: NDArray[Any]) -> None:
        self._layers = layers
        keys, values = in_float16(_folded(layers, k, Quantizer.fold_keys)), in_float16(v)
        self.rings = RingBatch([layer.ring for layer in layers], keys, values)
        self._new = keys.shape[1]
        k_at, *_, v_at, _, _, _ = self.rings.places
        if not all_finite(k_at, v_at, keys.size):
            check_finite("k", keys)
            check_finite("v", values)
        self._filled: dict[int, FilledPages] = {}  # by the layers' numbers here
        try:
            for n, layer in enumerate(layers):
                if layer.fills_pages(self._new):
                    self._filled[n] = layer.fill_pages(keys[n], values[n])
        except BaseException:
            self.discard()
            raise

    def discard(self) -> None:
        """Give back the pages that the tokens fill, in the place of `write`."""
        for n, filled in self._filled.items():
            self._layers[n].give_back(filled)

    def write(self, fresh: Any) -> None:
        """Append the tokens, with what `rings.reserve` returned, and the pages that they fill; it cannot fail."""
        length = self._layers[0].length
        try:
            self.rings.write(fresh)
            self._place_codes()
        except BaseException:  # Ctrl-C: tokens that the rings hold must have their codes
            if self._layers[0].length != length:
                self._place_codes()
            raise

    def _place_codes(self) -> None:
        """Put the pages that the tokens fill in their slots, once the rings hold those; again does no harm."""
        for n, filled in self._filled.items():
            self._layers[n].place(filled)
        for layer in self._layers:
            layer.overwritten_by_codes()

    def attend(self, q: NDArray[Any], scoring: Scoring) -> NDArray[Any]:
        """Attend with the queries (N, T, Hq, D) of the last T tokens, those that follow among them."""
        sequences, tokens = q.shape[:2]
        if not tokens:
            return np.empty_like(q)
        counts = [layer.count_parts(tokens, self._new) for layer in self._layers]
        runs, visibility, bounds = self._seen_by(tokens, counts)
        queries = _folded(self._layers, q, Quantizer.fold_queries)
        if len(bounds) == sequences + 1:
            return attend_runs(queries, runs, visibility, scoring)[0].astype(q.dtype, copy=False)
        if scoring.alibi_slopes is not None:
            owners = np.repeat(np.arange(sequences), counts)
            scoring = replace(scoring, alibi_slopes=np.ascontiguousarray(scoring.alibi_slopes[owners]))
        out, _ = attend_runs(queries.reshape(-1, *q.shape[2:]), runs, visibility, scoring, bounds)
        return out.reshape(q.shape).astype(q.dtype, copy=False)

    def _seen_by(self, queries: int, counts: list[int]) -> tuple[KVRuns, Visibility, NDArray[np.int64]]:
        """What the last queries of each layer see, parted by pages into so many, and the parts' bounds among them."""
        parts = sum(counts)
        rows = sum([count * layer.max_runs(self._new) for layer, count in zip(self._layers, counts, strict=True)])
        # Side by side, for NumPy takes its time for each array.
        numbers = np.empty(6 * parts + 2 + rows * (RUN_FIELDS + 2), np.int64)
        bounds_at, query_bounds_at, table_at = 4 * parts, 5 * parts + 1, 6 * parts + 2
        parameters_at = table_at + rows * RUN_FIELDS
        layers = array("q", [layer.record.address for layer in self._layers])
        new_pages, addresses = self._new_pages()
        address = address_of(numbers)
        used = list_parts(
            address_of(layers),
            len(layers),
            queries,
            self._new,
            *self.rings.places,
            address_of(new_pages),
            parts,
            address,
            address + 8 * bounds_at,
            address + 8 * query_bounds_at,
            address + 8 * table_at,
            address + 8 * parameters_at,
        )
        del addresses  # `new_pages` refers to them until here
        page_format = self._layers[0].page_format
        codes = Codes(
            parameters=numbers[parameters_at : parameters_at + 2 * used].reshape(used, 2),
            bits=page_format.bits,
            key_group=page_format.key_group,
            value_group=page_format.value_group,
            symmetric=page_format.symmetric,
            page_size=page_format.page_size,
        )
        table = numbers[table_at : table_at + used * RUN_FIELDS].reshape(used, RUN_FIELDS)
        runs = self.rings.runs(table, numbers[bounds_at:query_bounds_at], codes)
        return runs, Visibility.of_rows(numbers[:bounds_at].reshape(4, parts)), numbers[query_bounds_at:table_at]

    def _new_pages(self) -> tuple[array[int], list[array[int]]]:
        """The pages that no slot has yet, as `list_parts` takes them, and what that refers to."""
        new_pages, addresses = array("q", bytes(16 * len(self._layers))), []
        for n, filled in self._filled.items():
            pool = self._layers[n].table.pool
            addresses.append(array("q", [pool.address(page) for page in filled.pages]))
            new_pages[2 * n], new_pages[2 * n + 1] = filled.first, address_of(addresses[-1])
        return new_pages, addresses


def _folded(
    layers: Sequence[HostQuantizedLayer],
    tokens: NDArray[Any],
    fold: Callable[[Quantizer, int, NDArray[Any]], NDArray[Any]],
) -> NDArray[Any]:
    """Tokens (N, T, heads, D) as each layer's quantizer has them."""
    if all(layer.quantizer.folding is None for layer in layers):
        return tokens
    return np.stack([fold(layer.quantizer, layer.index, of_one) for layer, of_one in zip(layers, tokens, strict=True)])

"""Steps and attention of quantized caches, of one or of many at once, as `float_steps.py` has them of others.

What a query sees of codes and what in 16 bits depends on its page: a step is parted by pages, into one launch still.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..cpu import RUN_FIELDS, Codes, KVRuns, Visibility, attend_runs
from ..cpu.code_paging import list_parts
from ..cpu.record import address_of
from ..problem import Scoring
from .host_quantized import FilledPages, HostQuantizedLayer
from .quantized import in_float16
from .token_ring import RingBatch

__all__ = ["append", "attend", "step"]

# A number above that of any page.
_NO_PAGE = 1 << 62


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
        k = _folded(k, [layer.quantizer.fold_keys for layer in layers], layers)
        self._keys, self._values = in_float16("k", k), in_float16("v", v)
        self.rings = RingBatch([layer.ring for layer in layers], self._keys, self._values)
        self._filled: list[FilledPages] = []
        try:
            for layer, keys, values in zip(layers, self._keys, self._values, strict=True):
                pages = layer.fill_pages(keys, values)
                self._filled.append(pages)
        except BaseException:
            self.discard()
            raise

    def discard(self) -> None:
        """Give back the pages that the tokens fill, in the place of `write`."""
        for layer, filled in zip(self._layers, self._filled, strict=False):
            layer.give_back(filled)

    def write(self, fresh: Any) -> None:
        """Append the tokens, with what `rings.reserve` returned, and the pages that they fill; it cannot fail."""
        self.rings.write(fresh)
        for layer, filled in zip(self._layers, self._filled, strict=True):
            layer.place(filled)

    def attend(self, q: NDArray[Any], scoring: Scoring) -> NDArray[Any]:
        """Attend with the queries (N, T, Hq, D) of the last T tokens, those that follow among them."""
        tokens = q.shape[1]
        if not tokens:
            return np.empty_like(q)
        parts, owners, runs, visibility = self._seen_by_last(tokens)
        queries = _folded(q, [layer.quantizer.fold_queries for layer in self._layers], self._layers)
        if len(parts) == len(q):
            return attend_runs(queries, runs, visibility, scoring)[0].astype(q.dtype, copy=False)
        if scoring.alibi_slopes is not None:
            scoring = replace(scoring, alibi_slopes=np.ascontiguousarray(scoring.alibi_slopes[owners]))
        bounds = np.cumsum([0, *(stop - start for start, stop in parts)])
        out, _ = attend_runs(queries.reshape(-1, *q.shape[2:]), runs, visibility, scoring, bounds)
        return out.reshape(q.shape).astype(q.dtype, copy=False)

    def _seen_by_last(self, tokens: int) -> tuple[list[tuple[int, int]], list[int], KVRuns, Visibility]:
        """Part the queries of the last tokens by pages, and say what each part sees.

        Returns:
            Positions of each part, in order, its layer, and its runs and what is visible of them.
        """
        parts: list[tuple[int, int]] = []
        owners: list[int] = []
        records: list[tuple[int, ...]] = []
        addresses, rows = [], 0
        keys, values = self._keys.ctypes.data, self._values.ctypes.data
        k_layer, k_token, k_head, _ = self._keys.strides
        v_layer, v_token, v_head, _ = self._values.strides
        for n, (layer, filled) in enumerate(zip(self._layers, self._filled, strict=True)):
            new_page, new_pages = _NO_PAGE, 0
            if filled.pages:
                addresses.append(np.array([layer.table.pool.address(page) for page in filled.pages], np.int64))
                new_page, new_pages = filled.first, address_of(addresses[-1])
            stop = layer.length + self._keys.shape[1]
            for own, start, behind in layer.layout.by_pages(stop - tokens, stop):
                first = layer.first_page(start)
                rows += layer.layout.sink_slots + own - first + 3
                at = keys + n * k_layer, values + n * v_layer
                held = layer.ring.record.address, layer.record.address
                records.append((*held, first, own, start, behind, *at, new_page, new_pages))  # in the order of `Part`
                parts.append((start, behind))
                owners.append(n)
        count = len(parts)
        wanted = np.array(records, np.int64)
        # Side by side, for NumPy takes its time for each array.
        numbers = np.empty(5 * count + 1 + rows * (RUN_FIELDS + 2), np.int64)
        bounds_at, table_at = 4 * count, 5 * count + 1
        parameters_at = table_at + rows * RUN_FIELDS
        address = address_of(numbers)
        used = list_parts(
            address_of(wanted),
            count,
            k_token,
            k_head,
            v_token,
            v_head,
            address,
            address + 8 * bounds_at,
            address + 8 * table_at,
            address + 8 * parameters_at,
        )
        ring, page_format = self._layers[0].ring, self._layers[0].page_format
        runs = KVRuns(
            table=numbers[table_at : table_at + used * RUN_FIELDS].reshape(used, RUN_FIELDS),
            bounds=numbers[bounds_at:table_at],
            dtype=ring.dtype,
            kv_heads=ring.kv_heads,
            head_dim=ring.head_dim,
            value_dim=ring.head_dim,
            codes=Codes(
                parameters=numbers[parameters_at : parameters_at + 2 * used].reshape(used, 2),
                bits=page_format.bits,
                key_group=page_format.key_group,
                value_group=page_format.value_group,
                symmetric=page_format.symmetric,
                page_size=page_format.page_size,
            ),
        )
        return parts, owners, runs, Visibility.of_rows(numbers[:bounds_at].reshape(4, count))


def _folded(
    tokens: NDArray[Any],
    fold: Sequence[Callable[[int, NDArray[Any]], NDArray[Any]]],
    layers: Sequence[HostQuantizedLayer],
) -> NDArray[Any]:
    """Tokens (N, T, heads, D) as each layer's quantizer has them."""
    given = list(tokens)
    folded = [one(layer.index, array) for one, layer, array in zip(fold, layers, given, strict=True)]
    return tokens if all(a is b for a, b in zip(folded, given, strict=True)) else np.stack(folded)

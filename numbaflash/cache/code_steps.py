"""Steps and attention of quantized caches, of one or of many at once, as `float_steps.py` has them of others.

What a query sees of codes and what in 16 bits depends on its page: a step is parted by pages, into one launch still.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..cpu import RUN_FIELDS, Codes, KVRuns, Visibility, attend_runs
from ..cpu.code_paging import list_parts
from ..cpu.record import address_of
from ..problem import Scoring
from .host_quantized import FilledPages, HostQuantizedLayer
from .quantized import in_float16
from .quantizers import Quantizer
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


class _Parts(NamedTuple):
    """Queries of several layers, parted by the pages that they lie in.

    Attributes:
        tokens: How many each part has.
        owners: Number of its layer.
        rows: Runs that it may see.
        records: Parts as `list_parts` takes them.
        addresses: What those refer to.
    """

    tokens: list[int]
    owners: list[int]
    rows: list[int]
    records: array[int]
    addresses: list[array[int]]


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
        k = _folded(layers, k, Quantizer.fold_keys)
        self._keys, self._values = in_float16("k", k), in_float16("v", v)
        self.rings = RingBatch([layer.ring for layer in layers], self._keys, self._values)
        self._filled: list[FilledPages] = []
        try:
            for n, layer in enumerate(layers):
                pages = layer.fill_pages(self._keys[n], self._values[n])
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
        parts = self._part_last(tokens)
        runs, visibility = self._seen_by(parts)
        queries = _folded(self._layers, q, Quantizer.fold_queries)
        if len(parts.tokens) == len(q):
            return attend_runs(queries, runs, visibility, scoring)[0].astype(q.dtype, copy=False)
        if scoring.alibi_slopes is not None:
            scoring = replace(scoring, alibi_slopes=np.ascontiguousarray(scoring.alibi_slopes[parts.owners]))
        bounds = np.cumsum([0, *parts.tokens])
        out, _ = attend_runs(queries.reshape(-1, *q.shape[2:]), runs, visibility, scoring, bounds)
        return out.reshape(q.shape).astype(q.dtype, copy=False)

    def _part_last(self, tokens: int) -> _Parts:
        """Part the queries of the last tokens by the pages that they lie in."""
        parts = _Parts([], [], [], array("q"), [])
        keys, k_layer, _, _, values, v_layer, _, _ = self.rings.places
        for n, (layer, filled) in enumerate(zip(self._layers, self._filled, strict=True)):
            new_page, new_pages = _NO_PAGE, 0
            if filled.pages:
                pages = array("q", [layer.table.pool.address(page) for page in filled.pages])
                parts.addresses.append(pages)
                new_page, new_pages = filled.first, address_of(pages)
            held = layer.ring.record.address, layer.record.address
            new = keys + n * k_layer, values + n * v_layer, new_page, new_pages
            stop = layer.length + self._keys.shape[1]
            for own, start, behind in layer.layout.by_pages(stop - tokens, stop):
                first = layer.first_page(start)
                parts.records.extend((*held, first, own, start, behind, *new))  # in the order of `Part`
                parts.rows.append(layer.layout.sink_slots + own - first + 3)
                parts.tokens.append(behind - start)
                parts.owners.append(n)
        return parts

    def _seen_by(self, parts: _Parts) -> tuple[KVRuns, Visibility]:
        count = len(parts.tokens)
        rows = sum(parts.rows)
        # Side by side, for NumPy takes its time for each array.
        numbers = np.empty(5 * count + 1 + rows * (RUN_FIELDS + 2), np.int64)
        bounds_at, table_at = 4 * count, 5 * count + 1
        parameters_at = table_at + rows * RUN_FIELDS
        address = address_of(numbers)
        _, _, k_token, k_head, _, _, v_token, v_head = self.rings.places
        used = list_parts(
            address_of(parts.records),
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
        runs = self.rings.runs(table, numbers[bounds_at:table_at], codes)
        return runs, Visibility.of_rows(numbers[:bounds_at].reshape(4, count))


def _folded(
    layers: Sequence[HostQuantizedLayer],
    tokens: NDArray[Any],
    fold: Callable[[Quantizer, int, NDArray[Any]], NDArray[Any]],
) -> NDArray[Any]:
    """Tokens (N, T, heads, D) as each layer's quantizer has them."""
    if all(layer.quantizer.folding is None for layer in layers):
        return tokens
    return np.stack([fold(layer.quantizer, layer.index, of_one) for layer, of_one in zip(layers, tokens, strict=True)])

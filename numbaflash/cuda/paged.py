"""A step of many sequences whose keys and values lie in pages on the device: two launches, however many they are.

The first attends, reading the pages and the step's own tokens; the second merges what was split and writes the tokens
into their pages. So nothing that a page holds changes before attention is done. A step of many tokens attends to its
own in a launch more (`own_keys`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from numbaflash.device_arrays import DeviceArray
from numbaflash.problem import FLOAT32, Scoring

from .code_decode import CodeDecode
from .decode_variant import DECODE_PARAMETERS, DecodeVariant
from .device import Dimensions
from .finish_step import FINISH_PARAMETERS, FinishStep
from .own_keys import OwnKeys, first_own_key, may_be_parted, own_parts, rounded, rounding
from .paged_keys import ITEM, RECORD
from .paged_sequences import MAX_POSITION, PagedLayer, PagedSequence, Stretch, padded, stretches
from .parameters import numpy_arguments, score_factors
from .row_elements import PIECE
from .solve import Launchable, Queue
from .splits import KEY_TILE, rounded_up, split_keys
from .tensor_decode import TILE_KEYS, TensorDecode
from .vector_decode import VectorDecode

__all__ = ["step"]


def step(
    queue: Queue,
    layer: PagedLayer,
    sequences: Sequence[PagedSequence],
    q: DeviceArray | NDArray[Any] | None,
    k: DeviceArray | NDArray[Any] | None,
    v: DeviceArray | NDArray[Any] | None,
    scoring: Scoring | None,
    out: DeviceArray | None,
) -> None:
    """Queue a step: attend with q to the pages and to k and v, then append those to the pages.

    Args:
        queue: Where.
        layer: What the sequences have in common.
        sequences: N of them; the pages that new tokens go to are in their tables.
        q: (N, T, Hq, D); None to append only.
        k: (N, T, Hkv, D), q's dtype, or float16 where there are codes; None to attend only.
        v: (N, T, Hkv, D), likewise.
        scoring: Of q; without a bias.
        out: (N, T, Hq, D) of q's dtype, contiguous, is written.

    Raises:
        ValueError: A sequence would get longer than `MAX_POSITION`; nothing is queued.
    """
    given = q if q is not None else k
    assert given is not None
    tokens = given.shape[1]
    longest = max(max(sequence.start, sequence.length) for sequence in sequences) + tokens
    if longest > MAX_POSITION:
        raise ValueError(f"a sequence must have at most {MAX_POSITION} tokens on a device, got {longest}")
    if not given.shape[0] or not tokens:
        return
    call = _Call(queue, layer, sequences, tokens, given.dtype)
    tail = None if k is None or v is None else _Tail(_readable(queue, k), _readable(queue, v))
    if q is not None:
        assert scoring is not None
        assert out is not None
        call.attend(_readable(queue, q), tail, scoring, out)
    elif tail is not None:
        call.append(tail)


class _Tail(NamedTuple):
    """A step's own keys and values."""

    k: DeviceArray
    v: DeviceArray


def _readable(queue: Queue, array: DeviceArray | NDArray[Any]) -> DeviceArray:
    return queue.readable(queue.place(array))


class _Call:
    """One step on its way: its records on the device, and the launches that read them."""

    def __init__(
        self, queue: Queue, layer: PagedLayer, sequences: Sequence[PagedSequence], tokens: int, dtype: np.dtype[Any]
    ) -> None:
        self.queue, self.layer, self.sequences, self.tokens, self.dtype = queue, layer, sequences, tokens, dtype
        self.width = padded(layer.head_dim)
        self.stretches = stretches(sequences, tokens)
        self.queries = max(stretch.stop - stretch.start for stretch in self.stretches)
        self.records = _records([(sequences[stretch.entry], stretch) for stretch in self.stretches], tokens)

    def attend(self, q: DeviceArray, tail: _Tail | None, scoring: Scoring, out: DeviceArray) -> None:
        """Queue the attention, and what follows it."""
        queue, layer = self.queue, self.layer
        q_heads = q.shape[2]
        group = q_heads // layer.kv_heads
        variant = DecodeVariant.of(self.width, layer.dtype, q.dtype, scoring, self.tokens, layer.codes)
        kernel = _kernel(variant, self.tokens * group)
        row_blocks = -(-self.queries * group // kernel.rows)
        own_keys = self._own_keys(tail)
        items = self._split(group, kernel.rows, own_keys)
        several, results = bool((self.records["splits"] > 1).any()), int(self.records["own"].max()) + 1
        # All of these live until the launches that read them are queued.
        uploaded = queue.place(np.concatenate([self.records.view(np.uint8), items.view(np.uint8)]))
        partials = (len(items) if (items["partial"] >= 0).any() else 0, self.queries, q_heads)
        outs, sums = queue.temporary((*partials, self.width), FLOAT32), queue.temporary((*partials, 2), FLOAT32)
        owns = queue.temporary((results, self.tokens, q_heads, self.width), FLOAT32)
        own_sums = queue.temporary((results, q_heads, self.tokens), FLOAT32)
        whole = out if self.width == layer.head_dim else queue.temporary((*out.shape[:3], self.width), out.dtype)
        slopes, sinks = (
            None if array is None else queue.place(array) for array in (scoring.alibi_slopes, scoring.sink_logits)
        )
        factor, cap = score_factors(scoring)
        values = {
            "kv_heads": layer.kv_heads,
            "tokens": self.queries,
            **_places(q=q, out=whole),
            **_places(**_of(tail)),
            "records": uploaded.address,
            "items": uploaded.address + self.records.nbytes,
            "partials": outs.address,
            "partial_sums": sums.address,
            "owns": owns.address,
            "own_sums": own_sums.address,
            "slopes": 0 if slopes is None else slopes.address,
            "sinks": 0 if sinks is None else sinks.address,
            "q_heads": q_heads,
            "group": group,
            "factor": factor,
            "cap": cap,
        }
        launches: list[tuple[Launchable, Dimensions, list[np.generic]]] = []
        if len(items):
            grid = (len(items), layer.kv_heads, row_blocks)
            launches.append((kernel, grid, numpy_arguments(DECODE_PARAMETERS, values)))
        if tail is not None:
            self._attend_to_own(own_keys, OwnKeys(queue, q, *tail, scoring, slopes, sinks), whole, owns, own_sums)
        merged = len(self.records) * self.queries * q_heads if several or results else 0
        launches += self._finish(values, merged, tail, sinks=sinks is not None, owns=results > 0)
        queue.launch_all(launches)
        if whole is not out:
            queue.copy_rows(whole, out)

    def append(self, tail: _Tail) -> None:
        """Queue what makes the step's tokens part of the pages."""
        records = self.queue.place(self.records.view(np.uint8))
        unused = dict.fromkeys(("partials", "partial_sums", "owns", "own_sums", "sinks", "q_heads"), 0)
        values = {
            "kv_heads": self.layer.kv_heads,
            **_places(out=None, **_of(tail)),
            **unused,
            "records": records.address,
        }
        self.queue.launch_all(self._finish(values, 0, tail, sinks=False, owns=False))

    def _finish(
        self, values: dict[str, Any], merged_rows: int, tail: _Tail | None, *, sinks: bool, owns: bool
    ) -> list[tuple[Launchable, Dimensions, list[np.generic]]]:
        """Return the launch that merges so many rows and appends the step's tokens, where there is either."""
        pieces = self.width // PIECE
        merged, appended = merged_rows * pieces, 0 if tail is None else 2 * math.prod(tail.k.shape[:3]) * pieces
        if not merged + appended:
            return []
        token_dtype = self.dtype if tail is None else tail.k.dtype
        kernel = FinishStep(
            self.width, self.layer.dtype.name, self.dtype.name, token_dtype.name, sinks and merged > 0, owns
        )
        values = values | {"merged": merged, "appended": appended, "tokens": self.tokens, "queries": self.queries}
        return [(kernel, kernel.grid(merged + appended), numpy_arguments(FINISH_PARAMETERS, values))]

    def _attend_to_own(
        self,
        own_keys: Sequence[int | None],
        step: OwnKeys,
        out: DeviceArray,
        results: DeviceArray,
        sums: DeviceArray,
    ) -> None:
        """Queue what FlashAttention-2 does for the sequences that have a first key of their own."""
        windows = [self.sequences[stretch.entry].window for stretch in self.stretches]
        parts = list(own_parts(own_keys, windows, self.records["own"].tolist(), self.tokens))
        if parts and rounding(self.layer.dtype.name, self.dtype.name):
            k, v = (rounded(self.queue, array, self.layer.dtype.name) for array in (step.k, step.v))
            step = replace(step, k=k, v=v)
        for part in parts:
            step.attend(part, out, results, sums)

    def _own_keys(self, tail: _Tail | None) -> list[int | None]:
        """Return `first_own_key` of each sequence."""
        if tail is None or self.layer.codes is not None or not may_be_parted(self.tokens):
            return [None] * len(self.stretches)
        return [
            first_own_key(
                sequence.length,
                self.tokens,
                sequence.layout.window,
                sequence.layout.sink_tokens,
                self.layer.dtype.name,
                self.dtype.name,
            )
            for sequence in self.sequences
        ]

    def _split(self, group: int, block_rows: int, own_keys: Sequence[int | None]) -> NDArray[Any]:
        """Part the keys that each stretch sees, note it in the records, and return the work list.

        Args:
            group: Query heads of a KV head.
            block_rows: Query rows of a block.
            own_keys: Of each stretch, which of its keys of its own is not looked at, like all behind it.
        """
        items: list[tuple[int, int, int, int]] = []
        noted: list[tuple[int, int, int, int]] = []
        partials = results = 0
        for index, (stretch, own) in enumerate(zip(self.stretches, own_keys, strict=True)):
            # The keys of the oldest row are the first ones, of the newest the last.
            sequence = self.sequences[stretch.entry]
            sinks, page_size = sequence.layout.sink_tokens, sequence.layout.page_size
            oldest = max(sinks + stretch.own_page * page_size, stretch.start - sequence.window + 1)
            end = stretch.stop if own is None else sequence.length + own
            coded = (stretch.own_page - stretch.first_page) * page_size
            keys = coded + min(sinks, end) + max(0, end - oldest)
            if not keys:
                noted.append((end, -1, partials, 0))
                continue
            rows = (stretch.stop - stretch.start) * group
            blocks = self.layer.kv_heads * -(-rows // block_rows)
            tile, itemsize = self._unit(page_size)
            size = split_keys(keys, rows, self.width, itemsize, blocks, self.queue.device, tile)
            splits = -(-keys // size)
            several = splits > 1 or own is not None
            noted.append((end, -1 if own is None else results, partials, splits))
            items += [
                (index, i * size, min(keys, (i + 1) * size), partials + i if several else -1) for i in range(splits)
            ]
            partials += splits if several else 0
            results += own is not None
        for name, values in zip(("end", "own", "first_partial", "splits"), zip(*noted, strict=True), strict=True):
            self.records[name] = values
        if self.queue.arena is not None:  # steps can be replayed that have the same grid
            items += [(0, 0, 0, partials + i) for i in range(rounded_up(len(items)) - len(items))]
        return np.array(items, ITEM)

    def _unit(self, page_size: int) -> tuple[int, float]:
        """Keys that shares are multiples of, and bytes of an element."""
        codes = self.layer.codes
        if codes is None:
            return KEY_TILE, self.layer.dtype.itemsize
        return max(KEY_TILE, page_size), (codes.key_nbytes + codes.value_nbytes) / (2 * page_size * self.width)


def _records(parts: Sequence[tuple[PagedSequence, Stretch]], tokens: int) -> NDArray[Any]:
    """Describe stretches of queries to kernels, as if no keys were split.

    By columns: to set 20 elements of 64 structures takes milliseconds.
    """
    records = np.zeros(len(parts), RECORD)
    columns = {
        "table": [sequence.table for sequence, _ in parts],
        "length": [sequence.length for sequence, _ in parts],
        "window": [min(sequence.window, MAX_POSITION) for sequence, _ in parts],
        "sink_tokens": [sequence.layout.sink_tokens for sequence, _ in parts],
        "sink_slots": [sequence.layout.sink_slots for sequence, _ in parts],
        "ring_slots": [sequence.layout.ring_slots for sequence, _ in parts],
        "kept_from": [
            max(sequence.layout.sink_tokens, sequence.length + tokens - sequence.layout.ring_tokens)
            for sequence, _ in parts
        ],
        "page_shift": [sequence.layout.page_size.bit_length() - 1 for sequence, _ in parts],
        "start": [stretch.start for _, stretch in parts],
        "end": [stretch.stop for _, stretch in parts],
        "entry": [stretch.entry for _, stretch in parts],
        "first_query": [stretch.start - sequence.start for sequence, stretch in parts],
        "queries": [stretch.stop - stretch.start for _, stretch in parts],
        "first_page": [stretch.first_page for _, stretch in parts],
        "own_page": [stretch.own_page for _, stretch in parts],
        "code_table": [0 if sequence.codes is None else sequence.codes.table for sequence, _ in parts],
        "code_slots": [0 if sequence.codes is None else sequence.codes.slots for sequence, _ in parts],
        "own": [-1] * len(parts),
    }
    for name, values in columns.items():
        records[name] = values
    return records


def _kernel(variant: DecodeVariant, rows: int) -> VectorDecode | TensorDecode | CodeDecode:
    """Choose the kernel for so many query rows of a KV head.

    Tensor cores take 16 rows at the price of one, and 16-bit numbers of one dtype; beside codes, which become float16,
    queries of either. One row is memory's to bound on CUDA cores as well, which compute no empty rows beside it. Pages
    of codes that are smaller than a tile go by them, too.
    """
    if variant.codes is not None:
        if rows > 1 and variant.step_dtype != "float32" and variant.codes.page_size >= TILE_KEYS:
            return TensorDecode.of(variant, rows)
        return CodeDecode.of(variant, rows)
    if rows > 1 and variant.dtype == variant.step_dtype != "float32":
        return TensorDecode.of(variant, rows)
    return VectorDecode.of(variant, rows)


def _of(tail: _Tail | None) -> dict[str, DeviceArray | None]:
    return {"k": None, "v": None} if tail is None else tail._asdict()


def _places(**arrays: DeviceArray | None) -> dict[str, int]:
    """Addresses and strides of (N, T, H, D) arrays, as the kernels' parameters are named."""
    values: dict[str, int] = {}
    for name, array in arrays.items():
        values[name] = 0 if array is None else array.address
        strides = (0, 0, 0) if array is None else array.strides[:3]
        values |= dict(zip((f"{name}_batch", f"{name}_token", f"{name}_head"), strides, strict=True))
    return values

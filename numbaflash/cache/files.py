"""Caches on disk: a safetensors file with its version, its shape and a checksum of every page in the header.

Tensors `layers.N.k` and `layers.N.v` hold (tokens, kv_heads, head_dim): the sink tokens, then everything from the
oldest token that is intact to the newest. Of a quantized cache they hold the float16 tokens, and `layers.N.pages`
(pages, bytes) the pages of codes, from the one of the oldest intact token on; `channel_scales` are awq's. Nothing in
the file is executed when it is read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .checked import STORED_DTYPES, CheckedFile, DamagedError, PagedTensor
from .checked import write as write_checked

__all__ = ["CacheFile", "DamagedError", "LayerState", "RingShape", "write"]

_FORMAT = "numbaflash.RingKVCache"
_VERSION = 2
_HEADER = ("format", "version", "shape", "layers")
_ATTACHED = "attached."
_CHANNEL_SCALES = "channel_scales"


@dataclass(frozen=True)
class RingShape:
    """The arguments that make an empty cache of the same shape."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    capacity: int
    sink_tokens: int
    page_size: int
    rollback: int
    dtype: str
    quantizer: str | None = None

    @property
    def raw_dtype(self) -> str:
        """Of tokens that are no codes."""
        return self.dtype if self.quantizer is None else "float16"


@dataclass(frozen=True)
class LayerState:
    """One layer: tokens seen, the oldest intact position, and from where on tokens are kept that are no codes."""

    length: int
    intact: int
    raw_intact: int

    def can_be(self, shape: RingShape) -> bool:
        """Say whether a cache can have come to it: all that its next query sees is there, and within the rings."""
        sinks, window = shape.sink_tokens, shape.capacity - shape.sink_tokens
        raw_from, raw_tokens = max(sinks, self.length - window), window + shape.rollback
        if shape.quantizer is not None:  # a query sees its own page in float16
            inside = max(self.length - sinks, 0) % shape.page_size
            raw_from, raw_tokens = max(sinks, self.length - inside), shape.page_size + shape.rollback
        return (
            self.length >= 0
            and max(sinks, self.length - window - shape.rollback) <= self.intact <= max(sinks, self.length - window)
            and max(sinks, self.length - raw_tokens) <= self.raw_intact <= raw_from
        )

    def kept(self, sink_tokens: int) -> tuple[range, range]:
        """Return the positions that are in the file, not as codes: of the sink tokens, of those behind them."""
        return range(min(self.length, sink_tokens)), range(min(self.raw_intact, self.length), self.length)

    def coded(self, shape: RingShape) -> range:
        """Return the numbers, behind the sink tokens, of the pages of codes that are in the file."""
        if shape.quantizer is None:
            return range(0)
        first, behind = ((max(at - shape.sink_tokens, 0)) // shape.page_size for at in (self.intact, self.length))
        return range(min(first, behind), behind)


def write(
    path: str | os.PathLike[str],
    shape: RingShape,
    layers: Sequence[LayerState],
    read: Callable[[int, int, int], NDArray[Any]],
    dtype: np.dtype[Any],
    read_page: Callable[[int, int], NDArray[np.uint8]],
    *,
    channel_scales: NDArray[np.float32] | None,
    notes: Mapping[str, str],
    attachments: Mapping[str, NDArray[Any]],
) -> None:
    """Write a cache; whoever reads sees the old file or the new one, never a part of it.

    Args:
        path: Of the file.
        shape: What makes an empty one.
        layers: State of each layer.
        read: Gives the tokens of a layer from a position to another, (2, tokens, kv_heads, head_dim).
        dtype: Of those.
        read_page: Gives a layer's page of codes by its number.
        channel_scales: Of awq.
        notes: Strings that go with it.
        attachments: Arrays that go with it.

    Raises:
        ValueError: An attachment cannot be stored.
        OSError: The file cannot be written.
    """
    tensors: dict[str, PagedTensor] = {}
    for index, layer in enumerate(layers):
        tokens = sum(map(len, layer.kept(shape.sink_tokens)))
        for name in ("k", "v"):
            axes = (tokens, shape.num_kv_heads, shape.head_dim)
            tensors[f"layers.{index}.{name}"] = PagedTensor(dtype, axes, shape.page_size)
        if coded := layer.coded(shape):
            nbytes = len(read_page(index, coded.start))
            tensors[f"layers.{index}.pages"] = PagedTensor(np.dtype(np.uint8), (len(coded), nbytes), 1)
    if channel_scales is not None:
        tensors[_CHANNEL_SCALES] = PagedTensor(channel_scales.dtype, channel_scales.shape, len(channel_scales))
    for name, array in attachments.items():
        if not array.size or not array.ndim or array.dtype.name not in STORED_DTYPES or not array.dtype.isnative:
            accepted = f"arrays of {', '.join(STORED_DTYPES)}, none of them empty"
            raise ValueError(f"attachments must be {accepted}; got {name!r} of {array.dtype} {array.shape}")
        tensors[_ATTACHED + name] = PagedTensor(array.dtype, array.shape, len(array))

    def content() -> Iterator[tuple[str, int, NDArray[Any]]]:
        for index, layer in enumerate(layers):
            sinks, ring = layer.kept(shape.sink_tokens)
            for page, first in enumerate(range(0, len(sinks) + len(ring), shape.page_size)):
                behind = first + shape.page_size
                stretches = sinks[first:behind], ring[max(0, first - len(sinks)) : max(0, behind - len(sinks))]
                parts = [read(index, stretch.start, stretch.stop) for stretch in stretches if stretch]
                keys, values = np.concatenate(parts, axis=1)
                yield f"layers.{index}.k", page, keys
                yield f"layers.{index}.v", page, values
            for row, page in enumerate(layer.coded(shape)):
                yield f"layers.{index}.pages", row, read_page(index, page)[None]
        if channel_scales is not None:
            yield _CHANNEL_SCALES, 0, channel_scales
        for name, array in attachments.items():
            yield _ATTACHED + name, 0, array

    header = {
        "format": _FORMAT,
        "version": str(_VERSION),
        "shape": json.dumps(asdict(shape)),
        "layers": json.dumps([asdict(layer) for layer in layers]),
    }
    write_checked(path, {**notes, **header}, tensors, content())


class CacheFile:
    """A cache on disk, open for reading.

    Args:
        path: Of the file.

    Attributes:
        shape: What makes an empty cache of the same shape.
        layers: State of each layer.
        notes: The strings that went with it.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is no cache, of another version, or its header is damaged.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = path
        self._file = CheckedFile(path)
        try:
            notes = self._file.notes
            if notes.get("format") != _FORMAT:
                raise ValueError(f"{path} holds no {_FORMAT} (format {notes.get('format')!r})")
            if notes.get("version") != str(_VERSION):
                raise ValueError(f"{path} has version {notes.get('version')!r}, this release reads {_VERSION}")
            self.shape = RingShape(**json.loads(notes["shape"]))
            states = json.loads(notes["layers"])
            # Files of a release without quantizers do not say from where on tokens are no codes: all are.
            self.layers = [LayerState(**{"raw_intact": state["intact"], **state}) for state in states]
            self._check()
        except (TypeError, KeyError) as error:
            self._file.close()
            raise DamagedError(path, str(error)) from None
        except BaseException:
            self._file.close()
            raise
        self.notes = {name: note for name, note in notes.items() if name not in _HEADER}

    def __enter__(self) -> CacheFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def _check(self) -> None:
        """See that header and tensors agree: checksums find accidents, and a file may be anybody's."""
        shape = self.shape
        if len(self.layers) != shape.num_layers:
            raise ValueError(f"{self._path} has {len(self.layers)} layers, and its shape {shape.num_layers}")
        for index, layer in enumerate(self.layers):
            if not layer.can_be(shape):
                raise ValueError(f"{self._path} has a layer {index} that cannot be: {layer}")
            tokens = sum(map(len, layer.kept(shape.sink_tokens)))
            for name in ("k", "v"):
                tensor = self._file.tensors[f"layers.{index}.{name}"]
                expected = (tokens, shape.num_kv_heads, shape.head_dim), shape.raw_dtype, shape.page_size
                if (tensor.shape, tensor.dtype.name, tensor.page_rows) != expected:
                    raise ValueError(f"{self._path} has a tensor layers.{index}.{name} that does not fit its shape")
            coded = layer.coded(shape)
            if coded and self._file.tensors[f"layers.{index}.pages"].shape[0] != len(coded):
                raise ValueError(f"{self._path} has a tensor layers.{index}.pages that does not fit its shape")

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def tokens(self, layer: int) -> Iterator[tuple[int, NDArray[Any], NDArray[Any]]]:
        """Read a layer's tokens: position of the first, keys and values of some that follow each other, and so on.

        Raises:
            OSError: The file cannot be read.
            DamagedError: A page is damaged.
        """
        sinks, ring = self.layers[layer].kept(self.shape.sink_tokens)
        for page in range(self._file.tensors[f"layers.{layer}.k"].pages):
            keys, values = (self._file.read(f"layers.{layer}.{name}", page) for name in ("k", "v"))
            first = page * self.shape.page_size
            stretches = sinks[first : first + len(keys)], ring[max(0, first - len(sinks)) :][: len(keys)]
            row = 0
            for stretch in stretches:
                count = min(len(stretch), len(keys) - row)
                if count:
                    yield stretch.start, keys[row : row + count], values[row : row + count]
                row += count

    def pages(self, layer: int) -> Iterator[tuple[int, NDArray[np.uint8]]]:
        """Read a layer's pages of codes: number behind the sink tokens, and bytes.

        Raises:
            OSError: The file cannot be read.
            ValueError: A page is damaged.
        """
        for row, page in enumerate(self.layers[layer].coded(self.shape)):
            yield page, self._file.read(f"layers.{layer}.pages", row)[0]

    def channel_scales(self) -> NDArray[np.float32] | None:
        """Read awq's scales; None where there are none.

        Raises:
            OSError: The file cannot be read.
            ValueError: They are damaged.
        """
        return self._file.read(_CHANNEL_SCALES, 0) if _CHANNEL_SCALES in self._file.tensors else None

    def attachments(self) -> dict[str, NDArray[Any]]:
        """Read the arrays that went with it.

        Raises:
            OSError: The file cannot be read.
            DamagedError: One is damaged.
        """
        names = [name for name in self._file.tensors if name.startswith(_ATTACHED)]
        return {name.removeprefix(_ATTACHED): self._file.read(name, 0) for name in names}

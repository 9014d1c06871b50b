"""Where the pages of a cache live and what computes with them: host memory and the CPU, or a device and its kernels."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from ..device_arrays import AnyArray
from ..problem import Scoring
from .layer import Layer
from .layout import RingLayout
from .page_format import PageFormat
from .quantizers import Quantizer

__all__ = ["CacheShape", "Place", "Pool", "check_quantizer"]


@dataclass(frozen=True, eq=False)
class CacheShape:
    """What the pages of a cache depend on.

    Attributes:
        num_layers: Layers.
        kv_heads: Heads of keys and values.
        head_dim: Elements of a key and of a value.
        layout: Of each layer's ring.
        dtype: Of what is stored.
        quantizer: Of int8 and int4; None for floats.
    """

    num_layers: int
    kv_heads: int
    head_dim: int
    layout: RingLayout
    dtype: np.dtype[Any]
    quantizer: Quantizer | None


def check_quantizer(shape: CacheShape, quantizer: Quantizer) -> PageFormat:
    """Return what a cache's pages of codes look like.

    Raises:
        ValueError: The quantizer is of another model, or does not go with the head_dim.
    """
    quantizer.check_model(shape.num_layers, shape.kv_heads, shape.head_dim)
    return quantizer.page_format(shape.dtype.name, shape.kv_heads, shape.layout.page_size, shape.head_dim)


class Pool(Protocol):
    """Pages that a cache and its forks take theirs from.

    Attributes:
        dtype: Of what they hold.
        page_nbytes: Bytes of a page.
    """

    dtype: np.dtype[Any]
    page_nbytes: int

    @property
    def nbytes(self) -> int:
        """Bytes of all pages that have an owner."""

    @property
    def taken_nbytes(self) -> int:
        """Bytes of memory that it holds: those, and what it keeps for more."""


class Place(ABC):
    """A place.

    In its methods arrays are as `view` returned them: (T, H, D) for one layer, (N, T, H, D) for N of them. `given`
    holds what they were made from, by the names of the arguments; a result is an array of the library of its "q".
    """

    @abstractmethod
    def open(self, shape: CacheShape) -> tuple[tuple[Pool, ...], list[Layer]]:
        """Return the pools and the empty layers of a new cache.

        Raises:
            ValueError: There is no cache of that shape here.
        """

    @abstractmethod
    def stored_dim(self, head_dim: int) -> int:
        """Return the elements that a key takes in a page of floats."""

    @abstractmethod
    def view(self, array: Any, name: str) -> AnyArray:
        """View an array of any library where it lies.

        Raises:
            TypeError: It is no array.
            ValueError: It lies where nothing can be done with it here.
        """

    @abstractmethod
    def option(self, value: Any) -> Any:
        """Return an option of scoring as an array in host memory, where it is an array that is not; else itself."""

    @abstractmethod
    def check_together(self, places: Sequence[Place]) -> None:
        """See that caches of these places can be in one launch.

        Raises:
            ValueError: They cannot.
        """

    @abstractmethod
    def append(self, layer: Layer, k: AnyArray, v: AnyArray, given: Mapping[str, Any]) -> None:
        """Append tokens; the layer has not changed where that fails."""

    @abstractmethod
    def attend(self, layer: Layer, q: AnyArray, scoring: Scoring, given: Mapping[str, Any]) -> Any:
        """Attend with the queries of a layer's last tokens."""

    @abstractmethod
    def step(
        self, layers: Sequence[Layer], q: AnyArray, k: AnyArray, v: AnyArray, scoring: Scoring, given: Mapping[str, Any]
    ) -> Any:
        """Attend to what the layers hold and to the new tokens, then append those; no layer has changed if it fails."""

"""One layer of a cache, wherever its tokens lie; of floats in host memory here, with codes in `host_quantized.py`.

On a device it is one of `device_ring.py`, or of `device_quantized.py`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol, Self

from numpy.typing import NDArray

from .layout import RingLayout
from .page_format import PageFormat
from .token_ring import TokenRing

__all__ = ["FloatLayer", "Layer", "Ring"]


class Ring(Protocol):
    """Tokens as they are, in pages.

    Attributes:
        length: Tokens seen.
        intact: Oldest position, sink tokens apart, that has not been overwritten.
    """

    length: int
    intact: int

    @property
    def nbytes(self) -> int:
        """Bytes of the pages in use."""

    def fork(self) -> Self:
        """Return a twin that shares all pages."""

    def release(self) -> None:
        """Give all pages back."""

    def write(self, keys: NDArray[Any], values: NDArray[Any]) -> None:
        """Append tokens, (T, Hkv, D) each, of the storage dtype."""

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Return copies of the tokens `start` to `stop`: (2, tokens, Hkv, D)."""


class Layer:
    """The tokens of one layer; all are in its ring, unless `quantized.py` says otherwise.

    Args:
        index: Of the layer.
        layout: Of the cache.
        ring: Tokens that are no codes.

    Attributes:
        page_format: Of the pages of codes; None where there are none.
    """

    page_format: PageFormat | None = None

    def __init__(self, index: int, layout: RingLayout, ring: Ring) -> None:
        self.index = index
        self.layout = layout
        self.ring = ring

    @property
    def length(self) -> int:
        """Tokens seen."""
        return self.ring.length

    @property
    def intact(self) -> int:
        """Oldest position, sink tokens apart, that has not been overwritten."""
        return self.ring.intact

    @property
    def raw_intact(self) -> int:
        """Oldest position, sink tokens apart, from which on all tokens are there and no codes."""
        return self.ring.intact

    @property
    def nbytes(self) -> int:
        """Bytes of the pages in use."""
        return self.ring.nbytes

    def fork(self) -> Self:
        """Return a twin that shares all pages."""
        return type(self)(self.index, self.layout, self.ring.fork())

    def release(self) -> None:
        """Give all pages back."""
        self.ring.release()

    def check_queries(self, start: int) -> None:
        """See that everything is there that the queries from `start` on see.

        Raises:
            ValueError: Some of it is overwritten.
        """
        count = self.length - start
        if start < 0:
            raise ValueError(f"q must have at most the layer's {self.length} tokens, got {count}")
        if self.layout.first_visible(start) < self.intact:
            most = self.length - self.intact - self.layout.window + 1
            raise ValueError(f"q must have at most {most} tokens, older windows are overwritten; got {count}")

    def check_truncate(self, length: int) -> None:
        """See that the layer can be taken back to `length` tokens.

        Raises:
            ValueError: It is shorter, or some of what is visible then is overwritten.
        """
        if length > self.length:
            raise ValueError(f"length must be at most {self.length}, the tokens of layer {self.index}; got {length}")
        if self.layout.first_visible(length - 1) < self.intact:
            least = self.intact + self.layout.window
            raise ValueError(
                f"length must be at least {least}, or layer {self.index}'s window would have holes; got {length}"
            )

    def truncate(self, length: int) -> None:
        """Take the layer back to `length` tokens, which `check_truncate` has allowed."""
        self.ring.length = length

    def restore(self, tokens: Iterable[tuple[int, NDArray[Any], NDArray[Any]]], length: int, raw_intact: int) -> None:
        """Fill an empty ring.

        Args:
            tokens: Position of the first, keys and values of tokens that follow each other.
            length: Tokens seen.
            raw_intact: As the property.
        """
        for position, keys, values in tokens:
            self.ring.length = position
            self.ring.write(keys, values)
        self.ring.length, self.ring.intact = length, raw_intact


class FloatLayer(Layer):
    """A layer in host memory whose tokens are all in its ring."""

    ring: TokenRing

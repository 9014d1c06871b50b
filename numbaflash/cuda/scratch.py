"""Memory for what one call needs between its launches, at the same addresses for every call that asks for the same."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from .device import Buffer, Device, Event, Stream

__all__ = ["Arena", "Scratch"]

_MOST_BYTES = 16 << 20
"""Enough for the partial results of a step of decode; a prompt's are allocated as they come."""
_ALIGNMENT = 256


class Arena:
    """A buffer that is handed out from its start, piece by piece.

    Attributes:
        buffer: The memory.
        wanted: Bytes that were asked for, whether there was room or not.
    """

    def __init__(self, buffer: Buffer | None) -> None:
        self.buffer = buffer
        self.wanted = 0

    def take(self, nbytes: int) -> int | None:
        """Return the address of the next piece, a multiple of 256; None where there is no room."""
        start = self.wanted
        self.wanted += -(-nbytes // _ALIGNMENT) * _ALIGNMENT
        if self.buffer is None or self.wanted > self.buffer.nbytes:
            return None
        return self.buffer.address + start


class Scratch:
    """The memory that the calls of a device lend from, one call at a time, on any stream."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._buffer: Buffer | None = None
        self._wanted = 0  # by the call that wanted most
        self._last: Event | None = None
        self._lock = threading.Lock()

    @contextmanager
    def lent(self, stream: Stream) -> Iterator[Arena | None]:
        """Lend the memory to a call that queues its work on a stream; None where another call has it."""
        if not self._lock.acquire(blocking=False):
            yield None
            return
        try:
            if self._last is not None:
                stream.wait(self._last)
            self._grow(stream)
            arena = Arena(self._buffer)
            try:
                yield arena
            finally:
                self._wanted = max(self._wanted, min(arena.wanted, _MOST_BYTES))
                self._last = stream.record()
        finally:
            self._lock.release()

    def _grow(self, stream: Stream) -> None:
        """Have as much memory as has been wanted."""
        if self._wanted <= (0 if self._buffer is None else self._buffer.nbytes):
            return
        default = self._device.default_stream
        if self._last is not None:
            default.wait(self._last)  # in whose order the old memory is freed
        self._buffer = None
        try:
            self._buffer = self._device.allocate(1 << (self._wanted - 1).bit_length(), default)
        except MemoryError:
            self._wanted = 0
        else:
            stream.wait(default.record())

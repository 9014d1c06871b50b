"""Long calls in parts, for a thread that has something else to do in between."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["are_wanted", "pause", "pausing"]


class _Wish(threading.local):
    callback: Callable[[], object] | None = None


_wish = _Wish()


@contextmanager
def pausing(callback: Callable[[], object]) -> Iterator[None]:
    """Have what this thread computes on the CPU in the block cut into parts of some 20 ms; the bits are the same.

    Args:
        callback: Called between two parts, with pauses off. It may attend, with other caches; what it raises ends the
            call that is cut, whose cache is as it was before then.
    """
    before, _wish.callback = _wish.callback, callback
    try:
        yield
    finally:
        _wish.callback = before


def are_wanted() -> bool:
    """Say whether this thread's calls are to be cut."""
    return _wish.callback is not None


def pause() -> None:
    """Let the thread do what else it has to do."""
    callback, _wish.callback = _wish.callback, None
    try:
        if callback is not None:
            callback()
    finally:
        _wish.callback = callback

"""Ctrl-C, put off for a moment."""

from __future__ import annotations

# Below `signal`, which looks for the names of handlers: that takes 10 of 11 us here.
import _signal  # type: ignore[import-not-found]  # typeshed leaves it out
import signal
import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def before_ctrl_c(function: Callable[[], T]) -> T:
    """Call a function that is not to be broken off, and returns soon; Ctrl-C that comes meanwhile is heeded then."""
    # Python runs handlers on the main thread alone; and one that it does not know, it could not put back.
    if threading.current_thread() is not threading.main_thread() or _signal.getsignal(signal.SIGINT) is None:
        return function()
    pressed: list[bool] = []
    handler = _signal.signal(signal.SIGINT, lambda *_: pressed.append(True))
    try:
        return function()
    finally:
        _signal.signal(signal.SIGINT, handler)
        if pressed:
            signal.raise_signal(signal.SIGINT)

"""What the emulator says of a bug: caught, and held against the line where it was put in."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

from numbaflash.emulator import EmulatorError


def line_of(ptx: str, pattern: str, occurrence: int = 0) -> int:
    """Number of the line with the n-th match."""
    return [i for i, text in enumerate(ptx.splitlines(), 1) if re.search(pattern, text)][occurrence]


def edited(ptx: str, pattern: str, replacement: str, occurrence: int = 0) -> str:
    """The text with the n-th match replaced; lines keep their numbers."""
    found = list(re.finditer(pattern, ptx))[occurrence]
    return ptx[: found.start()] + replacement + ptx[found.end() :]


def stands(error: EmulatorError, ptx: str, pattern: str, source: str, occurrence: int = 0) -> None:
    """The error names the n-th PTX line with a match, and a line of the Python source."""
    assert error.place.line == line_of(ptx, pattern, occurrence)
    assert error.place.source == source


def caught(run: Callable[[], Any]) -> EmulatorError:
    with pytest.raises(EmulatorError) as found:
        run()
    return found.value

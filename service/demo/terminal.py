"""What the demo shows on a terminal while it works: what it is doing, and the text word by word."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

from rich.cells import cell_len
from rich.console import Console

Progress = Callable[[str], None]


@contextmanager
def progress() -> Iterator[Progress]:
    """A function that tells the user what is going on: on a terminal in one line that changes, else line by line."""
    console = Console(stderr=True, highlight=False)
    if console.is_terminal:
        with console.status("") as status:
            yield status.update
    else:
        yield lambda what: console.print(what, soft_wrap=True)


class WordWriter:
    """Writes text that comes in pieces, and breaks lines between words where they would cross the right margin.

    A word is written when it is complete. As a context manager, it writes the last one and ends the line.

    Args:
        out: where to.
        width: cells of a line; None: lines are not broken, and every piece is written at once.
    """

    def __init__(self, out: TextIO, width: int | None) -> None:
        self._out = out
        self._width = width
        self._column = 0
        self._space = self._word = ""

    @classmethod
    def to_stdout(cls) -> WordWriter:
        """As wide as the terminal; what goes to a file or a pipe stays as it is."""
        console = Console()
        return cls(sys.stdout, console.width if console.is_terminal else None)

    def __enter__(self) -> WordWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._end_word()
        self._put("\n")

    def write(self, piece: str) -> None:
        """Write the next piece of the text."""
        if self._width is None:
            self._put(piece)
            return
        for character in piece:
            if not character.isspace():
                self._word += character
                continue
            self._end_word()
            if character == "\n":
                self._put("\n")
                self._space, self._column = "", 0
            else:
                self._space += character

    def _end_word(self) -> None:
        if not self._word:
            return
        if self._width and self._column and self._column + cell_len(self._space + self._word) > self._width:
            self._space, self._column = "\n", 0
        self._put(self._space + self._word)
        self._column += cell_len(self._space.lstrip("\n") + self._word)
        self._space = self._word = ""

    def _put(self, text: str) -> None:
        self._out.write(text)
        self._out.flush()

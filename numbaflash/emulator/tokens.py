"""PTX text -> tokens, and how a parser takes them."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from typing import NamedTuple, NoReturn

from .errors import EmulatorError, Place
from .ir import Float

_TOKEN = re.compile(
    r"""(?P<space>\s+|//[^\n]*|/\*.*?\*/)
      | (?P<string>"[^"\n]*")
      | (?P<float>0[fF][0-9a-fA-F]{8}|0[dD][0-9a-fA-F]{16}|\d+\.\d*(?:[eE][-+]?\d+)?|\d+[eE][-+]?\d+)
      | (?P<int>(?:0[xX][0-9a-fA-F]+|0[bB][01]+|\d+)U?)
      | (?P<name>[%$_A-Za-z][\w$]*(?:(?:\.|::)[\w$]+)*)
      | (?P<dot>\.[A-Za-z_]\w*(?:::\w+)?)
      | (?P<sign>[{}()\[\],;:@!<>|=+\-~*&])""",
    re.VERBOSE | re.DOTALL,
)


class Token(NamedTuple):
    """A word of the text; `kind` is a group of `_TOKEN`."""

    kind: str
    text: str
    line: int


class Tokens:
    """The tokens of a text, and how far they are taken.

    Attributes:
        items: All tokens.
        at: Position of the next one.
    """

    def __init__(self, text: str) -> None:
        self.items = list(_split(text))
        self.at = 0
        self._last_line = text.count("\n") + 1

    def fail(self, reason: str, token: Token | None = None, kind: str = "syntax") -> NoReturn:
        """Raises an error at a token, by default the next one."""
        token = token or (self.items[self.at] if self.at < len(self.items) else None)
        line = token.line if token else self._last_line
        raise EmulatorError(reason, kind=kind, place=Place(line=line))

    def peek(self) -> str:
        """The text of the next token, empty at the end."""
        return self.items[self.at].text if self.at < len(self.items) else ""

    def ahead(self) -> Token:
        """The next token, not taken yet."""
        if self.at >= len(self.items):
            self.fail("the PTX text ends in the middle of a statement")
        return self.items[self.at]

    def next(self) -> Token:
        """Takes the next token."""
        token = self.ahead()
        self.at += 1
        return token

    def accept(self, text: str) -> bool:
        """Takes the next token if it is the given one."""
        if self.peek() == text:
            self.at += 1
            return True
        return False

    def expect(self, text: str) -> None:
        """Takes a token that must be the given one."""
        token = self.next()
        if token.text != text:
            self.fail(f"expected {text!r}, found {token.text!r}", token)

    def name(self) -> str:
        """Takes a name."""
        token = self.next()
        if token.kind != "name":
            self.fail(f"expected a name, found {token.text!r}", token)
        return token.text

    def integer(self) -> int:
        """Takes an integer literal and its sign."""
        negative = self.accept("-")
        inverted = not negative and self.accept("~")
        token = self.next()
        if token.kind != "int":
            self.fail(f"expected an integer, found {token.text!r}", token)
        digits = token.text.rstrip("U").lower()
        octal = len(digits) > 1 and digits[0] == "0" and digits[1] not in "xb"
        if octal and set(digits) - set("01234567"):
            self.fail(f"{token.text} is no octal number", token)
        value = int(digits, 8 if octal else 0)
        return -value if negative else ~value if inverted else value

    def float_literal(self) -> Float:
        """Takes a floating-point literal: the caller has seen that it is one."""
        text = self.next().text
        if text[:2] in ("0f", "0F"):
            return Float(int(text[2:], 16), 4)
        if text[:2] in ("0d", "0D"):
            return Float(int(text[2:], 16), 8)
        return Float(int.from_bytes(struct.pack("<d", float(text)), "little"), 8)

    def skip_line(self, line: int) -> None:
        """Takes what is left of a line."""
        while self.at < len(self.items) and self.items[self.at].line == line:
            self.at += 1


def _split(text: str) -> Iterator[Token]:
    position, line = 0, 1
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None:
            raise EmulatorError(f"unexpected character {text[position]!r}", kind="syntax", place=Place(line=line))
        if match.lastgroup == "space":
            line += match.group().count("\n")
        else:  # no other kind of token spans lines
            yield Token(match.lastgroup or "", match.group(), line)
        position = match.end()

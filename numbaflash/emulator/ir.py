"""The typed form of a PTX module: what the parser makes, and everything after it reads."""

from __future__ import annotations

from dataclasses import dataclass, field

SIZES = {
    **{f"{kind}{bits}": bits // 8 for kind in "bsu" for bits in (8, 16, 32, 64)},
    "f16": 2,
    "bf16": 2,
    "f32": 4,
    "f64": 8,
    "f16x2": 4,
    "bf16x2": 4,
    "pred": 1,
}
"""Bytes of each fundamental type."""


@dataclass(frozen=True, slots=True)
class Reg:
    """A register, ``%tid.x`` and its like included; ``_`` is the sink."""

    name: str


@dataclass(frozen=True, slots=True)
class Not:
    """A negated predicate operand, ``!%p1``."""

    reg: Reg


@dataclass(frozen=True, slots=True)
class Int:
    """An integer literal."""

    value: int


@dataclass(frozen=True, slots=True)
class Float:
    """A floating-point literal by its bits: 4 bytes (``0f...``) or 8 (``0d...``, decimal)."""

    bits: int
    size: int


@dataclass(frozen=True, slots=True)
class Symbol:
    """The address of a variable, plus an offset."""

    name: str
    offset: int = 0


@dataclass(frozen=True, slots=True)
class Address:
    """``[base + offset]``."""

    base: Reg | Symbol | None
    offset: int


@dataclass(frozen=True, slots=True)
class Vector:
    """``{a, b, c, d}``."""

    items: tuple[Operand, ...]


@dataclass(frozen=True, slots=True)
class Pair:
    """Two destinations, ``%p1|%p2``."""

    first: Reg
    second: Reg


@dataclass(frozen=True, slots=True)
class Tuple:
    """The parenthesised list of a call."""

    items: tuple[Operand, ...]


Operand = Reg | Not | Int | Float | Symbol | Address | Vector | Pair | Tuple


@dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction.

    Attributes:
        opcode: With its modifiers, ``add.rn.f32``.
        operands: In the order of the text.
        guard: The predicate before it, if any.
        line: Line in the PTX text.
        loc: (file number, line) of the last ``.loc``.
    """

    opcode: str
    operands: tuple[Operand, ...]
    guard: Reg | Not | None
    line: int
    loc: tuple[int, int] | None

    @property
    def parts(self) -> list[str]:
        """The opcode and each modifier."""
        return self.opcode.split(".")


@dataclass(frozen=True, slots=True)
class Label:
    """A branch target; it stands in a function's body, before the instruction that it names."""

    name: str


@dataclass(frozen=True, slots=True)
class Variable:
    """A variable of any state space.

    Attributes:
        initial: Little-endian bytes, or symbols for addresses (each 8 bytes), where the text gives them.
    """

    name: str
    space: str
    type: str
    align: int
    size: int
    external: bool = False
    initial: tuple[int | Float | Symbol, ...] = ()


@dataclass
class Function:
    """An entry (kernel) or a device function."""

    name: str
    entry: bool
    line: int
    params: list[Variable] = field(default_factory=list)
    returns: list[Variable] = field(default_factory=list)
    registers: dict[str, str] = field(default_factory=dict)
    variables: dict[str, Variable] = field(default_factory=dict)
    body: list[Instruction | Label] = field(default_factory=list)
    tables: dict[str, list[str]] = field(default_factory=dict)
    max_threads: int | None = None
    defined: bool = False


@dataclass
class Module:
    """A translation unit."""

    text: str
    target: str = ""
    variables: dict[str, Variable] = field(default_factory=dict)
    functions: dict[str, Function] = field(default_factory=dict)
    files: dict[int, str] = field(default_factory=dict)
    _lines: list[str] | None = field(default=None, repr=False)

    def statement(self, line: int) -> str:
        """The PTX text of a line, with its long names cut short."""
        if self._lines is None:
            self._lines = self.text.splitlines()
        text = self._lines[line - 1].strip()
        return text if len(text) <= 120 else text[:117] + "..."

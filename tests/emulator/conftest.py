"""Keeps account of which opcodes and modifiers of the emulator's tables the tests of a file have used."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from numbaflash.emulator.isa import emit
from numbaflash.emulator.launch import _translation

Row = tuple[str, tuple[str, ...], str]
"""Opcode, the types that stand behind the modifier, and the modifier (or type), "" for leaving it out."""


FLOAT_TYPES = {"f16", "f16x2", "bf16", "bf16x2", "f32", "f64"}


class Rows:
    """What the tables of the instruction set offer, and what of it the tests of one file have used.

    A handler asks for each modifier that it implements (`Emit.flag`, `one_of`, `type`): so what it asks for is what it
    offers, and what it gets is what a test has used.
    """

    def __init__(self) -> None:
        self.offered: set[Row] = set()
        self.used: set[Row] = set()
        self.tests: set[str] = set()

    def note(self, e: emit.Emit, types: tuple[str, ...], choices: tuple[str, ...], used: str) -> None:
        chapter = chapter_of(e.op)
        types = () if chapter == "memory" else types  # each type with each cache hint would say nothing
        self.offered.update((e.op, types, choice) for choice in choices)
        self.used.add((e.op, types, used))

    def missing(self, *chapters: str, floats: bool = True, integers: bool = True) -> list[str]:
        """Readable names of what the tests have not used, of some chapters of the instruction set.

        Args:
            chapters: Modules of the tables.
            floats: Whether to look at rows of floating-point types as well.
            integers: Whether to look at all others.
        """
        opcodes = {name for name in emit.HANDLERS if chapter_of(name) in chapters}
        never = opcodes - {op for op, _, _ in self.used} if integers else set()
        missing = [
            ".".join([op, f"[{choice}]", *types])
            for op, types, choice in self.offered - self.used
            if op in opcodes and (floats if {choice, *types} & FLOAT_TYPES else integers)
        ]
        return sorted([*missing, *never])


def chapter_of(opcode: str) -> str:
    return emit.HANDLERS[opcode].__module__.rsplit(".", 1)[1]


@pytest.fixture(scope="module", autouse=True)
def rows() -> Iterator[Rows]:
    """The account of a file; translations that other files made are made again."""
    account, original = Rows(), emit.Emit
    types: dict[int, tuple[str, ...]] = {}

    def flag(self: emit.Emit, name: str) -> bool:
        found = flag_of(self, name)
        account.note(self, types.get(id(self), ()), (name, ""), name if found else "")
        return found

    def one_of(self: emit.Emit, *choices: str, default: str | None = None) -> str:
        before = len(self.mods)
        found = one_of_of(self, *choices, default=default)
        offered = choices if default is None else (*choices, "")
        account.note(self, types.get(id(self), ()), offered, found if len(self.mods) < before else "")
        return found

    def type_(self: emit.Emit, *allowed: str) -> str:
        found = type_of(self, *allowed)
        behind = types.get(id(self), ())
        account.note(self, behind[1:], allowed, found)
        types[id(self)] = (found, *behind)
        return found

    def init(self: emit.Emit, *args: Any) -> None:
        types.pop(id(self), None)
        init_of(self, *args)
        if self.op in emit.HANDLERS:
            account.note(self, (), (), "opcode")

    flag_of, one_of_of, type_of, init_of = original.flag, original.one_of, original.type, original.__init__
    with pytest.MonkeyPatch.context() as patch:
        for name, function in (("flag", flag), ("one_of", one_of), ("type", type_), ("__init__", init)):
            patch.setattr(original, name, function)
        _translation.cache_clear()
        yield account
    _translation.cache_clear()


@pytest.fixture(autouse=True)
def counted(request: pytest.FixtureRequest, rows: Rows) -> None:
    rows.tests.add(request.node.name)


@pytest.fixture
def whole_file(request: pytest.FixtureRequest, rows: Rows) -> Rows:
    """The account after all other tests of the file; a run of some of them says nothing."""
    left = {item.name for item in request.node.parent.collect()} - rows.tests
    if left:
        pytest.skip(f"{len(left)} tests of this file were not run")
    return rows

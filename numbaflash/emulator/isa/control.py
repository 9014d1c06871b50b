"""Control flow (PTX ISA, "Control Flow Instructions").

Branches themselves are the scheduler's work: here their conditions are evaluated, and the modifiers checked.
"""

from __future__ import annotations

from ..ir import Reg, Symbol
from .emit import Emit, here, op


@op("bra")
def branch(e: Emit) -> None:
    """bra: the segment returns the condition, or nothing where there is none."""
    e.flag("uni")
    e.finish(1)
    if not isinstance(e.operands[0], Symbol):
        e.bad_operand(e.operands[0])
    e.effect("branch")
    _condition(e)


def _condition(e: Emit) -> None:
    if e.instruction.guard is not None:
        e.line(f"condition = {e.source(e.instruction.guard, 'pred')}")


@op("brx")
def indexed_branch(e: Emit) -> None:
    """brx.idx: the segment returns the index into the table of targets."""
    e.one_of("idx")
    e.flag("uni")
    e.finish(2)
    e.effect("branch")
    e.line(f"condition = {e.source(e.operands[0], 'u32')} + g.zero(u4)")


@op("ret", "exit")
def leave(e: Emit) -> None:
    """ret, exit."""
    e.flag("uni")
    e.finish(0)
    e.effect("branch")
    _condition(e)


@op("trap")
def trap(e: Emit) -> None:
    """trap: reported as an error."""
    e.finish(0)
    e.effect("branch")
    e.line(f"m.trap(g, {here(e)})")


@op("nanosleep")
def pause(e: Emit) -> None:
    """nanosleep: takes no time here."""
    e.type("u32")
    e.finish(1)
    e.effect("branch")
    if isinstance(e.operands[0], Reg):
        e.source(e.operands[0], "u32")

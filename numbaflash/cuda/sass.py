"""Reads the machine code of a kernel (`cuobjdump -sass`) and finds its hot loop."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

__all__ = ["Instruction", "fast_path", "hot_loop", "parse", "tensor_instructions"]

_LINE = re.compile(
    r"\s+/\*(?P<address>[0-9a-f]{4,})\*/\s+(?:@(?P<predicate>!?U?P[T\d]+)\s+)?(?P<opcode>[A-Z][A-Z0-9_.]*)\s*"
    r"(?P<operands>.*?);\s*/\* 0x[0-9a-f]{16} \*/"
)
_UPPER_HALF = re.compile(r"\s+/\* 0x([0-9a-f]{16}) \*/")
_TARGET = re.compile(r"0x([0-9a-f]+)")


@dataclass(frozen=True)
class Instruction:
    """One machine instruction and the control bits that ptxas gave it.

    Attributes:
        address: Byte in its function.
        opcode: With its modifiers.
        operands: As printed.
        predicate: Under which it runs, "" for always.
        stall: Cycles until the warp's next instruction may issue.
        write_barrier: Scoreboard that is set until its result is there; 7 for none.
        read_barrier: Scoreboard that is set until its operands are read; 7 for none.
        wait: Bit i: waits for scoreboard i.
    """

    address: int
    opcode: str
    operands: str
    predicate: str
    stall: int
    write_barrier: int
    read_barrier: int
    wait: int

    @property
    def name(self) -> str:
        """The opcode without modifiers."""
        return self.opcode.split(".")[0]

    @property
    def target(self) -> int | None:
        """Where a branch goes, None for another instruction."""
        found = _TARGET.search(self.operands) if self.name == "BRA" else None
        return int(found.group(1), 16) if found else None


def parse(listing: str) -> list[Instruction]:
    """Return the instructions of a listing that holds one kernel."""
    instructions, pending = [], None
    for line in listing.splitlines():
        if found := _LINE.match(line):
            pending = found
        elif pending is not None and (found := _UPPER_HALF.match(line)):
            control = int(found.group(1), 16) >> 41
            instructions.append(
                Instruction(
                    address=int(pending["address"], 16),
                    opcode=pending["opcode"],
                    operands=pending["operands"],
                    predicate=pending["predicate"] or "",
                    stall=control & 15,
                    write_barrier=(control >> 5) & 7,
                    read_barrier=(control >> 8) & 7,
                    wait=(control >> 11) & 63,
                )
            )
            pending = None
    return instructions


def tensor_instructions(code: Sequence[Instruction]) -> int:
    """Return how many instructions run on the tensor cores."""
    return sum(instruction.name == "HMMA" for instruction in code)


def hot_loop(code: Sequence[Instruction]) -> list[Instruction]:
    """Return the loop that does the matrix products: of the innermost ones that hold most of them, the shortest.

    (Blocks that need a mask have a loop of their own, with as many products and more instructions.)

    Raises:
        ValueError: No loop uses the tensor cores.
    """
    loops = [(start, end) for start, end in _loops(code) if tensor_instructions(code[start : end + 1])]
    innermost = [
        (start, end)
        for start, end in loops
        if not any((start, end) != other and start <= other[0] and other[1] <= end for other in loops)
    ]
    if not innermost:
        raise ValueError("no loop of the listing uses the tensor cores")
    bodies = [list(code[start : end + 1]) for start, end in innermost]
    return max(bodies, key=lambda body: (tensor_instructions(body), -len(body)))


def _loops(code: Sequence[Instruction]) -> Iterator[tuple[int, int]]:
    index = {instruction.address: i for i, instruction in enumerate(code)}
    for i, instruction in enumerate(code):
        target = instruction.target
        if target is not None and target <= instruction.address and target in index:
            yield index[target], i


def fast_path(loop: Sequence[Instruction]) -> list[Instruction]:
    """Return the loop as it runs when every forward branch within it is taken: past the code for rare cases."""
    path, resume = [], -1
    for instruction in loop:
        if instruction.address < resume:
            continue
        path.append(instruction)
        target = instruction.target
        if target is not None and instruction.address < target <= loop[-1].address:
            resume = target
    return path

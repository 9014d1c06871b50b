"""Reads the machine code of a kernel (`cuobjdump -sass`) and says what its hot loop asks of each pipe.

The rates are those of compute capability 8.0 for one of an SM's four sub-partitions (CUDA C++ Programming Guide,
"Throughput of Native Arithmetic Instructions"): what is counted is a fact of the code, how many cycles that takes on
another GPU is not.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

__all__ = ["Instruction", "fast_path", "hot_loop", "parse", "pipe_cycles", "pipe_of", "tensor_instructions"]

_LINE = re.compile(
    r"\s+/\*(?P<address>[0-9a-f]{4,})\*/\s+(?:@(?P<predicate>!?U?P[T\d]+)\s+)?(?P<opcode>[A-Z][A-Z0-9_.]*)\s*"
    r"(?P<operands>.*?);\s*/\* 0x[0-9a-f]{16} \*/"
)
_UPPER_HALF = re.compile(r"\s+/\* 0x([0-9a-f]{16}) \*/")
_TARGET = re.compile(r"0x([0-9a-f]+)")

_FMA = {"FFMA", "FMUL", "FADD", "IMAD", "HFMA2", "HADD2", "HMUL2"}
_MISC = {"BRA", "BAR", "DEPBAR", "LDGDEPBAR", "NOP", "WARPSYNC", "BSSY", "BSYNC", "CALL", "RET", "EXIT"}


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


def pipe_of(opcode: str) -> tuple[str, int]:
    """Return the pipe that an instruction uses and for how many cycles: tensor, fma, alu, mufu, smem or misc.

    HMMA.16816 takes 8 cycles (256 multiply-adds per cycle; in TF32, half of that, 8 for its 1688), FP32 and
    integers 2 (16 lanes), the special functions 8 (4 lanes); the shared-memory pipe serves four sub-partitions: its 4
    wavefronts of an LDSM.x4 take 16.
    """
    name, *modifiers = opcode.split(".")
    if name == "HMMA":
        return "tensor", 8 if {"16816", "TF32"} & set(modifiers) else 4
    if name in _FMA:
        return "fma", 1 if name.startswith("H") else 2
    if name == "MUFU":
        return "mufu", 8
    if name == "LDSM":
        return "smem", 16 if "4" in modifiers else 8 if "2" in modifiers else 4
    if name in ("LDS", "STS"):
        return "smem", 16 if "128" in modifiers else 8 if "64" in modifiers else 4
    if name == "LDGSTS":
        return "smem", 16
    if name in ("SHFL", "LDL", "STL"):
        return "smem", 4
    if name.startswith("U") or name in _MISC:
        return "misc", 1
    return "alu", 2


def pipe_cycles(code: Sequence[Instruction]) -> Counter[str]:
    """Return the cycles that straight-line code keeps each pipe busy, and "issue", one for each instruction.

    Copies from global to shared memory stand apart, as "copy": "smem" is what fragments and spills cost.
    """
    cycles: Counter[str] = Counter(issue=len(code))
    for instruction in code:
        pipe, busy = pipe_of(instruction.opcode)
        cycles["copy" if instruction.name == "LDGSTS" else pipe] += busy
    return cycles

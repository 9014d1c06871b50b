"""Runs of instructions -> Python functions, made when they are first needed.

A segment is translated for the registers that it reads before it writes them, and writes back only what may be read
after it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from . import floatmath, intmath
from .program import Program, is_barrier

_NUMPY = ("where", "maximum", "minimum", "absolute", "sqrt", "sin", "cos", "log2", "exp2", "tanh", "copysign")
_INTEGER = (
    *("saturate", "add_carry", "sub_carry", "multiply_high", "multiply_24", "divide", "remainder", "popcount"),
    *("leading_zeros", "reverse_bits", "find_bit", "shift_left", "shift_right", "extract_field", "insert_field"),
    *("bit_mask", "extend_field", "dp4a", "dp2a", "lop3", "funnel_shift", "permute", "pack", "unpack"),
)
_FLOAT = (
    *("fma", "flush", "saturate_unit", "rectify", "widen", "narrow", "arithmetic", "approximate_divide", "extreme"),
    *("narrow_extreme", "narrow_map", "compare", "to_integer", "from_integer", "round_f32", "tf32", "sign_bits"),
    *("classify", "INTEGER_ROUND"),
)
NAMESPACE: dict[str, Any] = {
    **{name: getattr(np, name) for name in _NUMPY},
    **{name: getattr(intmath, name) for name in _INTEGER},
    **{name: getattr(floatmath, name) for name in _FLOAT},
    **{f"{kind}{size}": np.dtype(f"{kind}{size}") for kind in "ui" for size in (1, 2, 4, 8)},
    "f4": np.dtype("f4"),
    "f8": np.dtype("f8"),
    "b1": np.dtype("b1"),
}
"""What generated code may call."""


@dataclass(frozen=True)
class Segment:
    """A translated run of instructions.

    Attributes:
        start: Program counter of its first instruction.
        stop: Program counter after its last one.
        function: (machine, group, registers) -> condition of the branch at its end, if any.
        pipes: Instructions by pipe.
        source: The Python source, for a reader.
    """

    start: int
    stop: int
    function: Callable[[Any, Any, list[Any]], Any]
    pipes: dict[str, int]
    source: str


class Translator:
    """The segments of one program."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self._segments: dict[tuple[int, int], Segment] = {}
        self._masks: dict[int, Callable[..., Any]] = {}
        size = len(program.code)
        ends = iter([*program.leaders[1:], size])
        self.end = [0] * (size + 1)
        """Program counter -> end of its basic block."""
        for leader in program.leaders:
            stop = next(ends, size)
            self.end[leader:stop] = [stop] * (stop - leader)
        self.end[size:] = [size]
        self.next_collective = [size] * (size + 1)
        """Program counter -> the first collective from there to the end of its block, or that end."""
        for pc in reversed(range(size)):
            if program.code[pc].collective is not None:
                self.next_collective[pc] = pc
            else:
                self.next_collective[pc] = self.next_collective[pc + 1] if pc + 1 < self.end[pc] else self.end[pc]

    def segment(self, start: int, stop: int) -> Segment:
        """The translation of [start, stop)."""
        found = self._segments.get((start, stop))
        if found is None:
            found = self._segments[start, stop] = self._translate(start, stop)
        return found

    def mask(self, pc: int) -> Callable[[Any, Any, list[Any]], Any]:
        """A function that gives the member mask of the collective at `pc`."""
        found = self._masks.get(pc)
        if found is None:
            code = self.program.code[pc]
            lines = _loads(sorted(set(code.reads)))
            found = self._masks[pc] = self._compile("\n".join([*lines, f"    return {code.collective}"]), pc)
        return found

    def _translate(self, start: int, stop: int) -> Segment:
        reads: list[int] = []
        written: set[int] = set()
        body: list[str] = []
        pipes: dict[str, int] = {}
        for pc in range(start, stop):
            code = self.program.code[pc]
            reads.extend(x for x in code.reads if x not in written)
            written.update(code.writes)
            body.append(f"    # {self.program.instructions[pc].line}")
            body.extend(f"    {line}" for line in code.lines)
            pipes[code.pipe] = pipes.get(code.pipe, 0) + 1
        last = self.program.instructions[stop - 1]
        barrier = is_barrier(last)
        needed = sorted(written & self._live_after(stop - 1)) if not barrier else []
        has_condition = any(line.startswith("condition =") for line in self.program.code[stop - 1].lines)
        lines = [*_loads(sorted(set(reads))), *body]
        if needed:
            lines.append("    if g.full:")
            lines.extend(f"        R[{x}] = v{x}" for x in needed)
            lines.append("    else:")
            lines.extend(f"        R[{x}] = g.put(R[{x}], v{x})" for x in needed)
        lines.append("    return condition" if has_condition else "    return None")
        source = "\n".join(lines)
        return Segment(start, stop, self._compile(source, start), pipes, source)

    def _compile(self, body: str, pc: int) -> Callable[..., Any]:
        source = f"def segment(m, g, R):\n{body}\n"
        namespace = {**NAMESPACE, **self.program.names.constants}
        exec(compile(source, f"<{self.program.name[:40]} at {pc}>", "exec"), namespace)
        function: Callable[..., Any] = namespace["segment"]
        return function

    # ---- liveness

    def successors(self, pc: int) -> list[int]:
        """Where control can go after the instruction at `pc`."""
        item = self.program.instructions[pc]
        opcode = item.parts[0]
        if opcode in ("ret", "exit", "trap"):
            return [pc + 1] if item.guard is not None and pc + 1 < len(self.program.code) else []
        targets = list(self.program.branches.get(pc, []))
        falls = (opcode != "brx" and opcode != "bra") or item.guard is not None
        if falls:
            targets.append(pc + 1)
        return [x for x in targets if x < len(self.program.code)]

    @cached_property
    def _live_in(self) -> dict[int, set[int]]:
        """Registers that may be read from the start of each block on."""
        leaders = [x for x in self.program.leaders if x < len(self.program.code)]
        used: dict[int, set[int]] = {}
        killed: dict[int, set[int]] = {}
        follow: dict[int, list[int]] = {}
        for leader in leaders:
            use: set[int] = set()
            kill: set[int] = set()
            for pc in range(leader, self.end[leader]):
                code = self.program.code[pc]
                use.update(x for x in code.reads if x not in kill)
                kill.update(code.writes)
            used[leader], killed[leader] = use, kill
            follow[leader] = self.successors(self.end[leader] - 1)
        live = {leader: set(used[leader]) for leader in leaders}
        changed = True
        while changed:
            changed = False
            for leader in reversed(leaders):
                after: set[int] = set().union(*(live[x] for x in follow[leader])) if follow[leader] else set()
                total = used[leader] | (after - killed[leader])
                if len(total) != len(live[leader]):
                    live[leader] = total
                    changed = True
        return live

    def _live_after(self, pc: int) -> set[int]:
        """Registers that may be read after the instruction at `pc`."""
        stop = self.end[pc]
        follow = self.successors(stop - 1)
        live: set[int] = set().union(*(self._live_in[x] for x in follow)) if follow else set()
        for position in range(stop - 1, pc, -1):
            code = self.program.code[position]
            live = (live - set(code.writes)) | set(code.reads)
        return live


def _loads(registers: list[int]) -> list[str]:
    """Statements that bring registers from the file to local names."""
    if not registers:
        return []
    return [
        "    if g.full:",
        *(f"        v{x} = R[{x}]" for x in registers),
        "    else:",
        *(f"        v{x} = R[{x}][g.lanes]" for x in registers),
    ]

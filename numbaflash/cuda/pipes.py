"""How long an instruction keeps a pipe of an SM's sub-partition busy, by compute capability.

An SM has four sub-partitions. Rates of arithmetic are those of the CUDA C++ Programming Guide, "Throughput of Native
Arithmetic Instructions"; those of tensor cores are NVIDIA's white papers'. What a loop asks of each pipe is a fact of
the code; whether a GPU keeps to these rates is not.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from .sass import Instruction

__all__ = ["RATES", "pipe_cycles", "pipe_of"]


@dataclass(frozen=True)
class Rates:
    """Cycles of a warp's instruction, where GPUs differ.

    Attributes:
        tensor: Of HMMA.16816, 2048 multiply-adds with sums in float32; in TF32, of HMMA.1688, half as many.
        float32: Of FFMA, FMUL and FADD.
    """

    tensor: int
    float32: int


RATES = {
    # A100: 1024 multiply-adds of float16 a cycle and SM. 64 of float32.
    (8, 0): Rates(tensor=8, float32=2),
    # GA102: 512; its GeForce cards take twice as long where sums are float32. 128 of float32.
    (8, 6): Rates(tensor=16, float32=1),
    # AD102: the same, and the same of its GeForce cards and the L40.
    (8, 9): Rates(tensor=16, float32=1),
    # H100: 2048 by wgmma, 4 cycles; mma.sync reaches 0.63 of that ("Benchmarking and Dissecting the Nvidia Hopper GPU
    # Architecture", Luo et al., 2024, section V).
    (9, 0): Rates(tensor=6, float32=1),
}
"""By compute capability."""

_FLOAT32 = {"FFMA", "FMUL", "FADD"}
_HALF2 = {"HFMA2", "HADD2", "HMUL2"}
_MISC = {"BRA", "BAR", "DEPBAR", "LDGDEPBAR", "NOP", "WARPSYNC", "BSSY", "BSYNC", "CALL", "RET", "EXIT"}


def pipe_of(opcode: str, cc: tuple[int, int]) -> tuple[str, int]:
    """Return the pipe that an instruction uses and for how many cycles: tensor, fma, alu, mufu, smem or misc.

    The same everywhere: integers 2 (16 lanes; IMAD in half of the pipe of float32, where that has 32), the special
    functions 8 (4 lanes). The shared-memory pipe serves four sub-partitions, a wavefront a cycle: the 4 of an LDSM.x4
    take 16.
    """
    name, *modifiers = opcode.split(".")
    if name == "HMMA":
        cycles = RATES[cc].tensor
        return "tensor", cycles if {"16816", "TF32"} & set(modifiers) else cycles // 2
    if name in _FLOAT32:
        return "fma", RATES[cc].float32
    if name == "IMAD":
        return "fma", 2
    if name in _HALF2:
        return "fma", 1
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


def pipe_cycles(code: Sequence[Instruction], cc: tuple[int, int]) -> Counter[str]:
    """Return the cycles that straight-line code keeps each pipe busy, and "issue", one for each instruction.

    Copies from global to shared memory stand apart, as "copy": "smem" is what fragments and spills cost.
    """
    cycles: Counter[str] = Counter(issue=len(code))
    for instruction in code:
        pipe, busy = pipe_of(instruction.opcode, cc)
        cycles["copy" if instruction.name == "LDGSTS" else pipe] += busy
    return cycles

"""What the machine that Numba compiles for can do: vector width, registers, half-precision conversions.

Numba decides the target (the host, or NUMBA_CPU_NAME and NUMBA_CPU_FEATURES); the micro-kernels are shaped for it here.
"""

from __future__ import annotations

from dataclasses import dataclass

from numba.core.registry import cpu_target

__all__ = ["TARGET", "Target"]


@dataclass(frozen=True)
class Target:
    """The properties of a CPU that shape the micro-kernels.

    Attributes:
        lanes: float32 elements of a vector register.
        rows: Rows of the prefill's register tile, which is `rows` x 3 vectors: with one vector for the broadcast
            element and three for the other operand, it just fits the registers (32 or 16).
        has_fma: Fused multiply-add is an instruction (without it LLVM calls libm, once for each element).
        has_float16: float16 <-> float32 conversions are instructions (without them LLVM calls compiler-rt, which a
            Python process need not have).
        is_x86: Else 64-bit ARM.
    """

    lanes: int
    rows: int
    is_x86: bool
    has_fma: bool
    has_float16: bool


def _target_of(triple: str, features: frozenset[str]) -> Target:
    if "avx512bw" in features:
        return Target(16, 8, True, True, True)
    if triple.startswith(("aarch64", "arm64")):
        return Target(4, 8, False, True, True)
    if "avx2" in features:
        return Target(8, 4, True, "fma" in features, "f16c" in features)
    return Target(4, 4, True, False, False)


def _numba_target() -> Target:
    triple, _, features = cpu_target.target_context.codegen().magic_tuple()
    return _target_of(triple, frozenset(name[1:] for name in features.split(",") if name.startswith("+")))


TARGET = _numba_target()

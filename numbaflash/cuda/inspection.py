"""What the kernels of one attention problem take: registers, shared memory, instructions, and what the models say.

Everything here is true of the built code, or counted while the emulator ran it; the issue model is a model. No GPU is
needed and none is asked.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from numbaflash.emulator import Report
from numbaflash.problem import FLOAT32, describe

from .build import Build, build, disassemble
from .device import Dimensions, EmulatedDevice
from .issue_model import tensor_share
from .occupancy import TARGETS, Occupancy, occupancy
from .pipes import pipe_cycles
from .sass import Instruction, fast_path, hot_loop, parse, tensor_instructions
from .solve import ALGORITHMS, Launchable, Queue, check_solvable, solve

__all__ = [
    "BIASES",
    "FLASH_ATTENTION_2",
    "HotLoop",
    "KernelFacts",
    "ObservedLaunch",
    "ObservedQueue",
    "Peer",
    "check_target",
    "facts_of",
    "inspect",
]

BIASES = ("none", "float32", "same", "bool")
"""Kinds of bias: "same" has q's dtype."""

# Enough for a loop of several K/V blocks; whole tiles, so that no sector is read in part for want of rows.
_TOKENS = 512


@dataclass(frozen=True)
class HotLoop:
    """The loop that does the matrix products, as one warp runs it.

    Attributes:
        instructions: Of one round.
        mmas: Tensor core instructions among them.
        usual_instructions: Of a round that takes no forward branch's rare path: no row's maximum is raised.
        cycles_per_mma: By pipe of `pipes.pipe_cycles`, at the target's rates; "issue" is instructions.
        mix: Instructions by opcode.
        warps: Resident warps of a sub-partition that the model ran.
        tensor_share: Share of cycles in which the tensor cores work on a usual round, by the issue model.
    """

    instructions: int
    mmas: int
    usual_instructions: int
    cycles_per_mma: dict[str, float]
    mix: dict[str, int]
    warps: int
    tensor_share: float


@dataclass(frozen=True)
class KernelFacts:
    """One kernel.

    Attributes:
        name: Its entry.
        threads: Of a block.
        registers: Per thread.
        spill_bytes: Per thread, written to and read from local memory for want of registers.
        stack_bytes: Local memory per thread.
        shared_bytes: Dynamic shared memory of a block.
        occupancy: Resident blocks of a multiprocessor.
        instructions: Of the whole kernel.
        loop: Its hot loop, None where it does not use the tensor cores.
        bank_conflicts: Wavefronts of shared memory lost to them, counted by the emulator.
        shared_wavefronts: All of them.
        sectors: 32-byte sectors of global memory that were touched.
        sector_efficiency: Share of their bytes that was wanted.
        ptx: Its PTX text.
        sass: Its machine code, as cuobjdump lists it.
    """

    name: str
    threads: int
    registers: int
    spill_bytes: int
    stack_bytes: int
    shared_bytes: int
    occupancy: Occupancy
    instructions: int
    loop: HotLoop | None
    bank_conflicts: int
    shared_wavefronts: int
    sectors: int
    sector_efficiency: float
    ptx: str = field(repr=False)
    sass: str = field(repr=False)


@dataclass(frozen=True)
class Peer:
    """The same figures of FlashAttention-2's kernel.

    From the machine code in PyTorch 2.14's wheel, float16, sm_80, read by the same `pipes` and `issue_model`.

    Attributes:
        instructions: Of a round of its loop.
        mmas: Of them.
        spills: Registers of the kernel that were spilled.
        cycles_per_mma: By pipe.
        tensor_share: By the issue model, 2 warps.
    """

    instructions: int
    mmas: int
    spills: int
    cycles_per_mma: dict[str, float]
    tensor_share: float


def _peer(instructions: int, spills: int, fma: float, alu: float, mufu: float, smem: float, share: float) -> Peer:
    cycles = {"issue": instructions / 256, "tensor": 8.0, "fma": fma, "alu": alu, "mufu": mufu, "smem": smem}
    return Peer(instructions, 256, spills, cycles, share)


FLASH_ATTENTION_2 = {
    (128, False): _peer(1156, 13, 3.70, 1.87, 2.12, 5.17, 0.757),
    (128, True): _peer(1224, 31, 3.67, 2.26, 2.12, 5.17, 0.691),
    (64, False): _peer(1622, 33, 5.72, 2.90, 4.12, 4.67, 0.633),
    (64, True): _peer(1619, 26, 5.68, 2.94, 4.12, 4.67, 0.637),
}
"""By (head_dim, causal)."""


def inspect(
    *,
    algorithm: str = "v2",
    head_dim: int = 128,
    value_dim: int | None = None,
    dtype: str = "float16",
    cc: tuple[int, int] = (8, 0),
    causal: bool = False,
    window: tuple[int | None, int | None] = (None, None),
    softcap: float = 0.0,
    bias: str = "none",
    alibi: bool = False,
    sinks: bool = False,
    lengths: bool = False,
    lse: bool = False,
) -> list[KernelFacts]:
    """Build the kernels of a problem, run them on the emulator, and say what they take.

    Args:
        algorithm: "standard", "v1" or "v2".
        head_dim: Of queries and keys.
        value_dim: Of values; head_dim where None.
        dtype: "float16", "bfloat16" or "float32".
        cc: Compute capability, one of `occupancy.TARGETS`.
        causal: As in `numbaflash.attention`, like `window` and `softcap`.
        window: (left, right).
        softcap: Cap of the scores.
        bias: One of `BIASES`.
        alibi: Each head has a slope.
        sinks: Each head has a sink logit.
        lengths: Each batch entry has its own number of keys.
        lse: The log-sum-exp is written.

    Returns:
        The kernels in the order of their launches.

    Raises:
        ValueError: There is no such target or problem, or no kernel for it.
        RuntimeError: The compilers are missing.
    """
    check_target(cc)
    if bias not in BIASES:
        raise ValueError(f"bias must be {' or '.join(map(repr, BIASES))}, got {bias!r}")
    if algorithm not in ALGORITHMS:
        raise ValueError(f"algorithm must be {' or '.join(map(repr, ALGORITHMS))}, got {algorithm!r}")
    rng = np.random.default_rng(0)
    shapes = [(1, _TOKENS, 1, dim) for dim in (head_dim, head_dim, head_dim if value_dim is None else value_dim)]
    q, k, v = (rng.standard_normal(shape, np.float32).astype(dtype) for shape in shapes)
    options: dict[str, Any] = {"causal": causal, "window": window, "softcap": softcap}
    if bias != "none":
        options["bias"] = np.zeros((_TOKENS, _TOKENS), {"same": dtype, "bool": "bool", "float32": "float32"}[bias])
        options["bias"][:] = 1
    if alibi:
        options["alibi_slopes"] = [0.1]
    if sinks:
        options["sink_logits"] = [0.0]
    if lengths:
        options["kv_lengths"] = [_TOKENS - 64]
    problem = describe(q, k, v, **options)
    check_solvable(problem, algorithm)
    device = EmulatedDevice(cc)
    queue = ObservedQueue(device, device.default_stream)
    out = queue.empty((*q.shape[:3], problem.value_dim), problem.dtype)
    sums = queue.empty((1, 1, _TOKENS), FLOAT32) if lse else None
    solve(queue, problem, q, k, v, out, sums, algorithm)
    return [facts_of(cc, launch) for launch in queue.launches]


def check_target(cc: tuple[int, int]) -> None:
    """Raise ValueError where nothing is known of such a GPU."""
    if cc not in TARGETS:
        accepted = ", ".join(f"{major}.{minor}" for major, minor in TARGETS)
        raise ValueError(f"cc must be one of {accepted}, got {'.'.join(map(str, cc))}")


class ObservedLaunch(NamedTuple):
    """A kernel, and what its launch would have cost the hardware."""

    kernel: Launchable
    built: Build
    report: Report


@dataclass(frozen=True)
class ObservedQueue(Queue):
    """A queue of an emulated device that keeps what it launched."""

    launches: list[ObservedLaunch] = field(default_factory=list)

    def launch(self, kernel: Launchable, grid: Dimensions, arguments: list[np.generic]) -> None:
        """Launch a kernel, and keep it."""
        super().launch(kernel, grid, arguments)
        assert isinstance(self.device, EmulatedDevice)
        assert self.device.last_report is not None
        built = build(kernel, self.device.compute_capability)
        self.launches.append(ObservedLaunch(kernel, built, self.device.last_report))

    def launch_all(self, launches: Sequence[tuple[Launchable, Dimensions, list[np.generic]]]) -> None:
        """Launch kernels one by one."""
        for launch in launches:
            self.launch(*launch)


def facts_of(cc: tuple[int, int], launch: ObservedLaunch) -> KernelFacts:
    """Return what a launched kernel takes."""
    kernel, built, report = launch
    sass = disassemble(built.cubin)
    code = parse(sass)
    resident = occupancy(cc, built.usage.registers, kernel.threads, kernel.shared_bytes)
    # The warps of a multiprocessor are spread over its four sub-partitions.
    warps = max(1, resident.blocks * kernel.threads // 32 // 4)
    return KernelFacts(
        name=built.name,
        threads=kernel.threads,
        registers=built.usage.registers,
        spill_bytes=built.usage.spill_bytes,
        stack_bytes=built.usage.stack_bytes,
        shared_bytes=kernel.shared_bytes,
        occupancy=resident,
        instructions=len(code),
        loop=_loop(code, cc, warps) if _has_hot_loop(code) else None,
        bank_conflicts=report.bank_conflicts,
        shared_wavefronts=sum(access.wavefronts for access in report.shared),
        sectors=sum(access.sectors for access in report.global_),
        sector_efficiency=report.global_efficiency,
        ptx=built.ptx,
        sass=sass,
    )


def _has_hot_loop(code: list[Instruction]) -> bool:
    try:
        hot_loop(code)
    except ValueError:
        return False
    return True


def _loop(code: list[Instruction], cc: tuple[int, int], warps: int) -> HotLoop:
    loop = hot_loop(code)
    usual, mmas = fast_path(loop), tensor_instructions(loop)
    return HotLoop(
        instructions=len(loop),
        mmas=mmas,
        usual_instructions=len(usual),
        cycles_per_mma={pipe: cycles / mmas for pipe, cycles in pipe_cycles(loop, cc).items()},
        mix=dict(Counter(instruction.name for instruction in loop).most_common()),
        warps=warps,
        tensor_share=tensor_share(usual, cc, warps),
    )

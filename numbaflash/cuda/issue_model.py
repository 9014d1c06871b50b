"""An issue-level model of one sub-partition of an SM, to tune kernels by without the GPU.

It runs a hot loop as a few resident warps would: each issues in order and obeys the control bits that ptxas wrote into
every instruction (stall counts and scoreboards), each pipe takes an instruction only every so many cycles. Launch, tail
and memory are not in it. It has ranked FlashAttention-2's kernels as they are published to run on an A100 (0.757 for
0.72 of peak at head dim 128, 0.637 for 0.58 at 64 under a causal mask): read it as a ratio between kernels, never as a
measurement. For other GPUs than that nothing is known of how well it ranks.

Rates are `pipes.pipe_of`'s. Latencies that ptxas leaves to scoreboards are published microbenchmarks of GA100, rounded,
whatever the GPU: two resident warps hide most of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from .pipes import pipe_of
from .sass import Instruction

__all__ = ["tensor_share"]

_LATENCY = {
    "MUFU": 24,
    "LDSM": 33,
    "LDS": 30,
    "SHFL": 26,
    "LDL": 60,
    "STL": 20,
    "LDGSTS": 40,
    "STS": 24,
    "S2R": 30,
    "DEPBAR": 4,
}
_OTHER_LATENCY = 20
_OPERANDS_READ = 12


def tensor_share(
    loop: Sequence[Instruction], cc: tuple[int, int], warps: int = 2, iterations: int = 24, skew: int = 37
) -> float:
    """Return the share of cycles in which the tensor pipe works while `warps` warps run the loop.

    Args:
        loop: Straight-line code that each warp repeats, built for `cc`.
        cc: Compute capability, one of `pipes.RATES`.
        warps: Resident warps of the sub-partition: as many as resident blocks of 128 threads.
        iterations: Rounds of each warp.
        skew: Cycles between the starts of two warps, for no two blocks of an SM run in step. The share varies by some
            hundredths with it; a difference between two kernels that does not survive other skews is none.
    """
    length, total = len(loop), len(loop) * iterations
    pipes = [pipe_of(instruction.opcode, cc) for instruction in loop]
    latencies = [_LATENCY.get(instruction.name, _OTHER_LATENCY) for instruction in loop]
    position = [0] * warps
    ready = [skew * warp for warp in range(warps)]
    scoreboards = [[0] * 6 for _ in range(warps)]
    free: Counter[str] = Counter()
    busy = cycle = latest = 0
    while any(done < total for done in position):
        soonest = None
        for warp in (latest, *(other for other in range(warps) if other != latest)):
            if position[warp] >= total:
                continue
            at = position[warp] % length
            instruction, (pipe, cost) = loop[at], pipes[at]
            start = max(ready[warp], free[pipe] if pipe != "misc" else 0)
            for board in range(6):
                if instruction.wait >> board & 1:
                    start = max(start, scoreboards[warp][board])
            if start > cycle:
                soonest = start if soonest is None else min(soonest, start)
                continue
            free[pipe] = cycle + cost
            busy += cost if pipe == "tensor" else 0
            for board, delay in (
                (instruction.write_barrier, latencies[at]),
                (instruction.read_barrier, _OPERANDS_READ),
            ):
                if board < 6:
                    scoreboards[warp][board] = max(scoreboards[warp][board], cycle + delay + cost)
            ready[warp] = cycle + max(1, instruction.stall)
            position[warp] += 1
            latest, soonest = warp, cycle + 1
            break
        cycle = max(cycle + 1, soonest or 0)
    return busy / cycle

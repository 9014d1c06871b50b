"""How many blocks of a kernel one multiprocessor holds at a time."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["TARGETS", "Occupancy", "occupancy"]


@dataclass(frozen=True)
class Multiprocessor:
    """What its blocks share (CUDA C++ Programming Guide, "Technical Specifications per Compute Capability").

    Attributes:
        shared_bytes: Shared memory; a kibibyte of each block's share is the system's.
        warps: Resident warps at most.
        blocks: Resident blocks at most.
    """

    shared_bytes: int
    warps: int
    blocks: int


TARGETS = {
    (8, 0): Multiprocessor(164 << 10, 64, 32),
    (8, 6): Multiprocessor(100 << 10, 48, 16),
    (8, 9): Multiprocessor(100 << 10, 48, 24),
    (9, 0): Multiprocessor(228 << 10, 64, 32),
}
"""By compute capability: those that `shapes` chooses tiles for."""

_REGISTERS = 65536
_REGISTERS_AT_ONCE = 256  # A warp gets them by so many.
_SYSTEM_SHARED_BYTES = 1024


@dataclass(frozen=True)
class Occupancy:
    """Resident blocks, and what allows no more.

    Attributes:
        blocks: Per multiprocessor.
        limits: Of "registers", "shared memory", "warps" and "blocks" those that would not hold one more.
    """

    blocks: int
    limits: tuple[str, ...]


def occupancy(cc: tuple[int, int], registers: int, threads: int, shared_bytes: int) -> Occupancy:
    """Return how many blocks are resident on one multiprocessor.

    Args:
        cc: Compute capability, one of `TARGETS`.
        registers: Per thread.
        threads: Of a block, a multiple of 32.
        shared_bytes: Of a block.
    """
    target, warps = TARGETS[cc], threads // 32
    of_warp = -(-32 * registers // _REGISTERS_AT_ONCE) * _REGISTERS_AT_ONCE
    room = {
        "registers": _REGISTERS // (warps * of_warp),
        "shared memory": target.shared_bytes // (shared_bytes + _SYSTEM_SHARED_BYTES),
        "warps": target.warps // warps,
        "blocks": target.blocks,
    }
    blocks = min(room.values())
    return Occupancy(blocks, tuple(name for name, count in room.items() if count == blocks))

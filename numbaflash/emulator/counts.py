"""What a launch would have cost the hardware: instructions by pipe, wavefronts, sectors, bytes."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class SharedAccess:
    """A shared-memory instruction.

    Attributes:
        line: PTX line.
        source: ``file:line`` of the Python source, if known.
        op: Kind of access.
        wavefronts: How many the banks needed.
        ideal: How many accesses of this width need without conflicts.
        nbytes: Bytes that the threads asked for.
    """

    line: int
    source: str | None
    op: str
    wavefronts: int = 0
    ideal: int = 0
    nbytes: int = 0

    @property
    def conflicts(self) -> int:
        """Wavefronts lost to bank conflicts."""
        return self.wavefronts - self.ideal


@dataclass
class GlobalAccess:
    """A global-memory instruction.

    Attributes:
        line: PTX line.
        source: ``file:line`` of the Python source, if known.
        op: Kind of access.
        requests: Warp-level requests.
        sectors: 32-byte sectors that they touched.
        wanted: Distinct bytes that they wanted of those sectors.
        nbytes: Bytes that the threads asked for, those asked for twice counted twice.
    """

    line: int
    source: str | None
    op: str
    requests: int = 0
    sectors: int = 0
    wanted: int = 0
    nbytes: int = 0

    @property
    def efficiency(self) -> float:
        """Share of the sectors' bytes that was wanted, 0 to 1."""
        return self.wanted / (32 * self.sectors) if self.sectors else 1.0


@dataclass
class Report:
    """The counts of one launch.

    Attributes:
        kernel: Name of the kernel.
        instructions: Warp-level instructions by pipe: fma, alu, imad, mufu (special functions), xu (conversions),
            fp64, tensor, lsu (loads and stores), shfl, branch, const (kernel parameters).
        shared: Accesses to shared memory by PTX line.
        global_: Accesses to global memory by PTX line.
        local_bytes: Bytes that threads read and wrote in local memory: spills and indexed private arrays.
    """

    kernel: str
    instructions: Counter[str] = field(default_factory=Counter)
    shared: list[SharedAccess] = field(default_factory=list)
    global_: list[GlobalAccess] = field(default_factory=list)
    local_bytes: int = 0

    @property
    def bank_conflicts(self) -> int:
        """Wavefronts lost to bank conflicts in the whole launch."""
        return sum(access.conflicts for access in self.shared)

    @property
    def shared_bytes(self) -> int:
        """Bytes that threads read and wrote in shared memory."""
        return sum(access.nbytes for access in self.shared)

    @property
    def global_bytes(self) -> int:
        """Bytes that threads read and wrote in global memory."""
        return sum(access.nbytes for access in self.global_)

    @property
    def global_efficiency(self) -> float:
        """Share of all sectors' bytes that was wanted, 0 to 1."""
        sectors = sum(access.sectors for access in self.global_)
        return sum(access.wanted for access in self.global_) / (32 * sectors) if sectors else 1.0

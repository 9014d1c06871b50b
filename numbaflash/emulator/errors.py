"""The one error type of the emulator, and the codes that the compiled checks hand back to Python."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Place:
    """Where a fault happened: everything that is known about it.

    Attributes:
        kernel: Name of the kernel.
        block: Block index (x, y, z), where one thread block is at fault.
        thread: Thread index (x, y, z), where one thread is at fault.
        line: Line of the PTX text, counted from 1.
        ptx: The PTX statement on that line.
        source: ``file:line`` of the Python source, where the PTX carries line info.
    """

    kernel: str | None = None
    block: tuple[int, int, int] | None = None
    thread: tuple[int, int, int] | None = None
    line: int | None = None
    ptx: str | None = None
    source: str | None = None

    def __str__(self) -> str:
        parts = []
        if self.kernel is not None:
            parts.append(f"kernel {self.kernel}")
        if self.block is not None:
            parts.append(f"block {self.block}")
        if self.thread is not None:
            parts.append(f"thread {self.thread}")
        if self.line is not None:
            parts.append(f"PTX line {self.line}" + (f": {self.ptx}" if self.ptx else ""))
        if self.source is not None:
            parts.append(f"source {self.source}")
        return "; ".join(parts)


class EmulatorError(Exception):
    """A kernel that cannot be run, or one that did what it must not.

    Attributes:
        reason: What is wrong, without the place.
        kind: Which check spoke: ``"syntax"``, ``"unsupported"``, ``"argument"``, ``"limit"``, ``"bounds"``,
            ``"alignment"``, ``"uninitialized"``, ``"in-flight"``, ``"shared-race"``, ``"global-race"``,
            ``"barrier"``, ``"collective"``, ``"shuffle"``, ``"trap"`` or ``"hang"``.
        place: Where it happened.
    """

    def __init__(self, reason: str, *, kind: str, place: Place | None = None) -> None:
        self.reason = reason
        self.kind = kind
        self.place = place or Place()
        where = str(self.place)
        super().__init__(f"{reason} [{where}]" if where else reason)

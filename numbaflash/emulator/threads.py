"""The threads of some blocks that run together: registers, shared and local memory, faults, counts."""

# mypy: disable-error-code="no-any-return"
# Operators on NDArray[Any] are typed Any.

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from . import checks, traffic
from .counts import GlobalAccess, Report, SharedAccess
from .errors import EmulatorError, Place
from .global_checks import Global
from .grid_order import GridOrder
from .group import WARP, Group
from .ir import Instruction
from .isa import Site
from .order import Order
from .program import LOCAL_WINDOW, SHARED_WINDOW, limits
from .shared_checks import Shared
from .translate import Translator

Array = NDArray[Any]


@dataclass(frozen=True)
class Checks:
    """Which checks a launch makes; bounds, alignment, barriers and collectives are always checked.

    Attributes:
        uninitialized: Reads of shared and local memory that nothing was written to.
        shared_races: Unordered accesses to shared memory by threads of a block.
        global_races: Unordered accesses to global memory by different blocks.
    """

    uninitialized: bool = True
    shared_races: bool = True
    global_races: bool = True


@dataclass
class Launch:
    """What all chunks of a launch share.

    Attributes:
        translator: The program.
        grid: Blocks in x, y, z.
        block: Threads in x, y, z.
        params: The parameter bank.
        memory: Global memory and its shadow.
        symbols: Addresses of the module's global variables.
        shared_bytes: Dynamic shared memory.
        checks: What to check.
        max_steps: Segments that a chunk may run before it counts as hanging.
        order: What happened before what between blocks.
        report: The counts.
    """

    translator: Translator
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    params: Array
    memory: Global
    symbols: dict[str, int]
    shared_bytes: int
    checks: Checks
    max_steps: int
    order: GridOrder
    report: Report

    def __post_init__(self) -> None:
        self.shared_counts: dict[int, SharedAccess] = {}
        self.global_counts: dict[int, GlobalAccess] = {}


class Threads:
    """The state of the blocks [first, first + count) of a launch."""

    def __init__(self, launch: Launch, first: int, count: int) -> None:
        self.launch = launch
        self.program = launch.translator.program
        self.first, self.count = first, count
        self.threads = int(np.prod(launch.block))
        self.warps_per_block = -(-self.threads // WARP)
        self.lanes_per_block = self.warps_per_block * WARP
        self.total = count * self.lanes_per_block
        lanes = np.arange(self.total)
        self.thread = lanes % self.lanes_per_block
        self.block = first + lanes // self.lanes_per_block
        self.alive = self.thread < self.threads
        self.registers: list[Array] = self._zero_registers()
        self.order = Order(count, self.lanes_per_block)
        self.shared = self._shared_memory()
        self.shared_base = (self.block - first) * self.shared.stride
        local = self.program.local_size
        self.local = np.full((self.total, local), 0xFF, np.uint8)
        self.local_state = np.zeros((self.total, local), np.uint8)
        self._special: dict[str, Array] = {}

    @property
    def _shared_bytes(self) -> int:
        return self.program.shared_used + self.launch.shared_bytes

    def _zero_registers(self) -> list[Array]:
        zeros = {kind: np.zeros(self.total, kind) for kind in set(self.program.register_storage)}
        return [zeros[kind] for kind in self.program.register_storage]

    def _shared_memory(self) -> Shared:
        limit = self.program.static_shared + self.launch.shared_bytes
        stride = max(-(-limit // 128) * 128, 128)
        shift = granule(self.program.sites, "shared")
        granules = self.count * stride >> shift
        slots = self.warps_per_block if self.program.names.partial_order else min(self.warps_per_block, 2)
        strong = any_strong(self.program.sites, "shared")
        return Shared(
            data=np.full(self.count * stride, 0xFF, np.uint8),
            state=self._fresh_shared(stride, shift),
            writer=np.zeros(granules, np.int64),
            strong_writer=np.zeros(granules if strong else 0, np.int64),
            other_writer=np.zeros(granules if strong else 0, np.int64),
            readers=np.zeros((granules, slots), np.int64),
            strong_reader=np.zeros(granules if strong else 0, np.int64),
            clocks=self.order.clocks,
            lowest=limits(self.program.module.target).reserved,
            limit=limit,
            stride=stride,
            lanes_per_block=self.lanes_per_block,
            shift=shift,
            initialized=self.launch.checks.uninitialized,
            races=self.launch.checks.shared_races,
        )

    def _fresh_shared(self, stride: int, shift: int) -> Array:
        """The state of shared memory at the start: fresh, and outside between the variables."""
        state = np.zeros((self.count, stride >> shift), np.uint8)
        end = self.program.static_shared >> shift
        if self.program.shared_variables:
            state[:, :end] = checks.OUTSIDE
            for _, start, size in self.program.shared_variables:
                state[:, start >> shift : -(-(start + size) >> shift)] = checks.FRESH
        return state.reshape(-1)

    # ---- faults

    def place(self, instruction: Instruction, lane: int) -> Place:
        """Where a lane executes an instruction."""
        place = self.program.place(instruction)
        x, y, _ = self.launch.block
        thread = int(self.thread[lane])
        return Place(
            place.kernel,
            self._block_index(int(self.block[lane])),
            (thread % x, thread // x % y, thread // (x * y)),
            place.line,
            place.ptx,
            place.source,
        )

    def _block_index(self, number: int) -> tuple[int, int, int]:
        x, y, _ = self.launch.grid
        return (number % x, number // x % y, number // (x * y))

    def fail(self, reason: str, kind: str, instruction: Instruction, lane: int) -> NoReturn:
        """Raises the error of a lane at an instruction."""
        raise EmulatorError(reason, kind=kind, place=self.place(instruction, lane))

    def _fault(self, g: Group, site: Site, space: str, address: Array, found: tuple[int, int, int]) -> NoReturn:
        code, position, other = found
        kind = checks.FAULTS[code]
        what = f"{site.size}-byte {site.op} at {space} address {int(address[position]):#x}"
        who = f"thread {other}" if space == "shared" else f"block {self._block_index(int(other))}"
        who = "several blocks" if space == "global" and other < 0 else who
        match code:
            case checks.BOUNDS:
                reason = f"{what} is out of bounds" + self._bounds_hint(space, int(address[position]))
            case checks.ALIGNMENT:
                reason = f"{what} is not aligned to {site.size} bytes"
            case checks.UNINITIALIZED:
                reason = f"{what} reads bytes that were never written"
            case checks.IN_FLIGHT:
                reason = f"{what} touches bytes of an asynchronous copy that was not waited for"
            case checks.READ_AFTER_WRITE:
                reason = f"{what} races with a write by {who}"
            case checks.WRITE_AFTER_WRITE:
                reason = f"{what} overwrites, unordered, what {who} wrote"
            case _:
                reason = f"{what} overwrites, unordered, what {who} reads"
        self.fail(reason, f"{space}-race" if kind == "race" else kind, site.instruction, int(g.lanes[position]))

    def _bounds_hint(self, space: str, address: int) -> str:
        if space == "shared":
            below = [x for x in self.program.shared_variables if x[1] <= address < self.program.static_shared]
            if below:
                name, start, size = below[-1]
                return f": {name} has {size} bytes from {start:#x} on"
            return f": the block has {self._shared_bytes} bytes of shared memory"
        if space == "local":
            return f": a thread has {self.program.local_size} bytes of local memory"
        return ""

    def trap(self, g: Group, instruction: Instruction) -> NoReturn:
        """Reports that the kernel gave up by trap."""
        self.fail("the kernel executed trap", "trap", instruction, int(g.lanes[0]))

    # ---- constants

    def special(self, g: Group, name: str) -> Array:
        """A special register."""
        found = self._special.get(name)
        if found is None:
            found = self._special[name] = self._special_register(name)
        return g.take(found)

    def _special_register(self, name: str) -> Array:
        base, _, axis = name[1:].partition(".")
        lane = self.thread % WARP
        if axis:
            position = "xyz".index(axis)
            sizes = self.launch.grid if "cta" in base else self.launch.block
            if base[0] == "n":
                return np.full(self.total, sizes[position], np.uint32)
            number = self.block if base == "ctaid" else self.thread
            below = int(np.prod(sizes[:position], dtype=np.int64))
            return (number // below % sizes[position]).astype(np.uint32)
        one, values = np.uint64(1), lane.astype(np.uint64)
        masks = {
            "lanemask_eq": one << values,
            "lanemask_lt": (one << values) - one,
            "lanemask_le": (one << values + one) - one,
            "lanemask_gt": ~((one << values + one) - one),
            "lanemask_ge": ~((one << values) - one),
        }
        if base in masks:
            return masks[base].astype(np.uint32)
        scalars = {
            "nwarpid": self.warps_per_block,
            "dynamic_smem_size": self.launch.shared_bytes,
            "total_smem_size": self._shared_bytes,
            "nsmid": 1,
        }
        if base == "laneid":
            return lane.astype(np.uint32)
        if base == "warpid":
            return (self.thread // WARP).astype(np.uint32)
        return np.full(self.total, scalars.get(base, 0), np.uint64 if base in ("clock64", "globaltimer") else np.uint32)

    def parameter(self, g: Group, at: int, dtype: Any) -> Array:
        """A value of the parameter bank."""
        return g.fill(self.launch.params[at : at + dtype.itemsize].view(dtype)[0])

    def symbol(self, name: str, offset: int, dtype: Any) -> Any:
        """The address of a global variable."""
        if name not in self.launch.symbols:
            raise EmulatorError(f"{name} is not defined in this module", kind="unsupported")
        return np.int64(self.launch.symbols[name] + offset).view(dtype)

    def in_window(self, address: Array, space: str) -> Array:
        """Which generic addresses belong to a state space."""
        shared, local = address >= np.uint64(SHARED_WINDOW), address >= np.uint64(LOCAL_WINDOW)
        return {"local": local, "shared": shared & ~local}.get(space, ~shared)

    # ---- counting

    def _count_shared(self, site: Site, lanes: Array, address: Array) -> None:
        counts = self.launch.shared_counts.get(site.index)
        if counts is None:
            place = self.program.place(site.instruction)
            counts = SharedAccess(site.instruction.line, place.source, site.op)
            self.launch.shared_counts[site.index] = counts
        wavefronts, ideal = traffic.bank_wavefronts(lanes, address, site.size)
        counts.wavefronts += wavefronts
        counts.ideal += ideal
        counts.nbytes += lanes.size * site.size

    def _count_global(self, site: Site, lanes: Array, address: Array, size: int) -> None:
        counts = self.launch.global_counts.get(site.index)
        if counts is None:
            place = self.program.place(site.instruction)
            counts = GlobalAccess(site.instruction.line, place.source, site.op)
            self.launch.global_counts[site.index] = counts
        requests, sectors, wanted = traffic.sector_traffic(lanes, address, size)
        counts.requests += requests
        counts.sectors += sectors
        counts.wanted += wanted
        counts.nbytes += lanes.size * size


def granule(sites: list[Site], space: str) -> int:
    """log2 of the bytes that the shadow of a space keeps apart: the narrowest access that can reach it."""
    sizes = [site.size for site in sites if site.space in (space, "generic")]
    return min(sizes, default=16).bit_length() - 1


def any_strong(sites: list[Site], space: str) -> bool:
    """Whether a kernel has strong accesses that can reach a space."""
    return any(site.strong for site in sites if site.space in (space, "generic"))

"""Some blocks of a launch, run together: registers, memories, and what generated code calls.

`Machine` holds the state of a chunk of blocks and the operations of its threads on memory and on each other; which
threads run when is decided in `schedule`.
"""

# mypy: disable-error-code="no-any-return"
# Operators on NDArray[Any] are typed Any.

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from . import checks, collectives, mma
from .atomics import atomic
from .counts import GlobalAccess, Report, SharedAccess
from .errors import EmulatorError, Place
from .group import WARP, Group
from .isa import Site
from .isa.emit import storage
from .memory import BASE
from .parse import Instruction
from .program import LOCAL_WINDOW, SHARED_WINDOW
from .translate import Translator

Array = NDArray[Any]
_NO_VALUES = np.empty((0, 1), np.uint8)
_NEVER = np.empty((0, 0), np.bool_)


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
        known: (blocks, blocks): whose writes a block has been told of by a fence and an atomic; (0, 0) where the
            program has no fence.
        report: The counts.
    """

    translator: Translator
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    params: Array
    memory: checks.Global
    symbols: dict[str, int]
    shared_bytes: int
    checks: Checks
    max_steps: int
    known: Array
    report: Report

    def __post_init__(self) -> None:
        self.shared_counts: dict[int, SharedAccess] = {}
        self.global_counts: dict[int, GlobalAccess] = {}
        self.published: dict[int, Array] = {}


@dataclass
class _Copy:
    """An asynchronous copy that has not been waited for."""

    lanes: Array
    address: Array
    converged: Array
    size: int
    number: Array


class Machine:
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
        self.shared = self._shared_memory()
        self.shared_base = (self.block - first) * self.shared.stride
        local = self.program.local_size
        self.local = np.full((self.total, local), 0xFF, np.uint8)
        self.local_state = np.zeros((self.total, local), np.uint8)
        self.copies: list[_Copy] = []
        self.committed = np.zeros(self.total, np.int64)
        self.fenced = np.zeros(count, np.bool_)
        self.fragments = mma.Fragments()
        self._special: dict[str, Array] = {}

    def _zero_registers(self) -> list[Array]:
        zeros = {kind: np.zeros(self.total, kind) for kind in ("b1", "u1", "u2", "u4", "u8", "f4", "f8")}
        return [zeros[storage(kind)] for kind in self.program.names.registers.values()]

    def _shared_memory(self) -> checks.Shared:
        limit = self.program.static_shared + self.launch.shared_bytes
        stride = max(-(-limit // 128) * 128, 128)
        shift = granule(self.program.sites, "shared")
        granules = self.count * stride >> shift
        warps = self.warps_per_block
        clocks = np.zeros((self.count, warps, warps), np.int64)
        clocks[:, np.arange(warps), np.arange(warps)] = 1
        return checks.Shared(
            data=np.full(self.count * stride, 0xFF, np.uint8),
            state=np.zeros(granules, np.uint8),
            writer=np.zeros(granules, np.int64),
            reader=np.zeros(granules, np.int64),
            other_reader=np.zeros(granules, np.int64),
            clocks=clocks,
            lowest=_lowest(self.program.module.target),
            limit=limit,
            stride=stride,
            lanes_per_block=self.lanes_per_block,
            shift=shift,
            initialized=self.launch.checks.uninitialized,
            races=self.launch.checks.shared_races,
        )

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
                reason = f"{what} is out of bounds" + self._bounds_hint(space)
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

    def _bounds_hint(self, space: str) -> str:
        if space == "shared":
            return f": the block has {self.shared.limit - self.shared.lowest} bytes of shared memory"
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
        limit = self.shared.limit - self.shared.lowest
        scalars = {
            "nwarpid": self.warps_per_block,
            "dynamic_smem_size": self.launch.shared_bytes,
            "total_smem_size": limit,
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
        wavefronts, ideal = checks.bank_wavefronts(lanes, address, site.size)
        counts.wavefronts += wavefronts
        counts.ideal += ideal
        counts.nbytes += lanes.size * site.size

    def _count_global(self, site: Site, lanes: Array, address: Array, size: int) -> None:
        counts = self.launch.global_counts.get(site.index)
        if counts is None:
            place = self.program.place(site.instruction)
            counts = GlobalAccess(site.instruction.line, place.source, site.op)
            self.launch.global_counts[site.index] = counts
        requests, sectors, wanted = checks.sector_traffic(lanes, address, size)
        counts.requests += requests
        counts.sectors += sectors
        counts.wanted += wanted
        counts.nbytes += lanes.size * size

    # ---- loads and stores

    def load_shared(self, g: Group, site: Site, address: Array, count: int) -> list[Array]:
        """Loads `count` elements per lane; unsigned integers."""
        found = checks.shared_read(self.shared, g.lanes, address, g.converged, site.size)
        if found[0]:
            self._fault(g, site, "shared", address, found)
        self._count_shared(site, g.lanes, address)
        return _elements(self.shared.data, g.take(self.shared_base) + address, site.size, count)

    def store_shared(self, g: Group, site: Site, address: Array, values: list[Array]) -> None:
        """Stores elements of each lane."""
        data = _interleave(values, g.n)
        found = checks.shared_write(self.shared, g.lanes, address, g.converged, site.size, data, checks.READY, False)
        if found[0]:
            self._fault(g, site, "shared", address, found)
        self._count_shared(site, g.lanes, address)

    def load_global(self, g: Group, site: Site, address: Array, count: int) -> list[Array]:
        """Loads `count` elements per lane; unsigned integers."""
        memory = self.launch.memory
        found = checks.global_read(
            memory, g.take(self.block), address, site.size, site.size, site.strong, site.read_only, self.launch.known
        )
        if found[0]:
            self._fault(g, site, "global", address, found)
        if site.strong:
            self._synchronize(g, address)
        self._count_global(site, g.lanes, address, site.size)
        return _elements(memory.data, address - BASE, site.size, count)

    def store_global(self, g: Group, site: Site, address: Array, values: list[Array]) -> None:
        """Stores elements of each lane."""
        if site.strong:
            self._synchronize(g, address)
        data = _interleave(values, g.n)
        self._write_global(g, site, address, data)
        self._count_global(site, g.lanes, address, site.size)

    def _write_global(self, g: Group, site: Site, address: Array, data: Array) -> None:
        found = checks.global_write(
            self.launch.memory, g.take(self.block), address, site.size, data, site.strong, self.launch.known
        )
        if found[0]:
            self._fault(g, site, "global", address, found)

    def _check_local(self, g: Group, site: Site, address: Array, write: bool) -> None:
        found = checks.local_access(
            self.local_state,
            g.lanes,
            address,
            site.size,
            self.program.local_size,
            write,
            self.launch.checks.uninitialized,
        )
        if found[0]:
            self._fault(g, site, "local", address, found)
        self.launch.report.local_bytes += g.n * site.size

    def load_local(self, g: Group, site: Site, address: Array, count: int) -> list[Array]:
        """Loads `count` elements per lane; unsigned integers."""
        self._check_local(g, site, address, write=False)
        return _elements(self.local.reshape(-1), g.lanes * self.program.local_size + address, site.size, count)

    def store_local(self, g: Group, site: Site, address: Array, values: list[Array]) -> None:
        """Stores elements of each lane."""
        self._check_local(g, site, address, write=True)
        rows = self.local.reshape(-1, site.size)
        rows[(g.lanes * self.program.local_size + address) // site.size] = _interleave(values, g.n)

    def _spaces(self, g: Group, address: Array) -> list[tuple[str, Array, Group, Array]]:
        """Cuts generic accesses by state space: name, positions, group, address there."""
        if address.max() < SHARED_WINDOW:
            return [("global", np.arange(g.n), g, address)]
        parts = []
        for space, low, high in (
            ("global", -(1 << 62), SHARED_WINDOW),
            ("shared", SHARED_WINDOW, LOCAL_WINDOW),
            ("local", LOCAL_WINDOW, 1 << 62),
        ):
            chosen = np.flatnonzero((address >= low) & (address < high))
            if chosen.size:
                part = g if chosen.size == g.n else Group(g.lanes[chosen], self.total, self.alive)
                parts.append((space, chosen, part, address[chosen] - (low if low > 0 else 0)))
        return parts

    def load_generic(self, g: Group, site: Site, address: Array, count: int) -> list[Array]:
        """Loads from wherever the address lies."""
        parts = self._spaces(g, address)
        if len(parts) == 1:
            return getattr(self, f"load_{parts[0][0]}")(parts[0][2], site, parts[0][3], count)
        out = [np.empty(g.n, f"u{site.size // count}") for _ in range(count)]
        for space, chosen, part, there in parts:
            for target, values in zip(out, getattr(self, f"load_{space}")(part, site, there, count), strict=True):
                target[chosen] = values
        return out

    def store_generic(self, g: Group, site: Site, address: Array, values: list[Array]) -> None:
        """Stores to wherever the address lies."""
        for space, chosen, part, there in self._spaces(g, address):
            picked = [np.broadcast_to(x, g.n)[chosen] for x in values]
            getattr(self, f"store_{space}")(part, site, there, picked)

    # ---- atomics

    def atomic_shared(self, g: Group, site: Site, address: Array, name: str, kind: str, *values: Array) -> Array:
        """One read-modify-write per lane, in the order of lanes."""
        found = checks.shared_write(
            self.shared, g.lanes, address, g.converged, site.size, _NO_VALUES, checks.READY, True
        )
        if found[0]:
            self._fault(g, site, "shared", address, found)
        self._count_shared(site, g.lanes, address)
        return atomic(self.shared.data, g.take(self.shared_base) + address, name, kind, values)

    def atomic_global(self, g: Group, site: Site, address: Array, name: str, kind: str, *values: Array) -> Array:
        """One read-modify-write per lane, in the order of lanes."""
        self._synchronize(g, address)
        self._write_global(g, site, address, _NO_VALUES)
        self._count_global(site, g.lanes, address, site.size)
        return atomic(self.launch.memory.data, address - BASE, name, kind, values)

    def atomic_generic(self, g: Group, site: Site, address: Array, name: str, kind: str, *values: Array) -> Array:
        """One read-modify-write per lane, wherever its address lies."""
        out: Array | None = None
        for space, chosen, part, there in self._spaces(g, address):
            if space == "local":
                self.fail("atomic operation on local memory", "bounds", site.instruction, int(part.lanes[0]))
            picked = [np.broadcast_to(x, g.n)[chosen] for x in values]
            result = getattr(self, f"atomic_{space}")(part, site, there, name, kind, *picked)
            out = np.empty(g.n, result.dtype) if out is None else out
            out[chosen] = result
        assert out is not None
        return out

    def fence(self, g: Group, device_wide: bool) -> None:
        """membar, fence: the blocks' next atomics publish what they wrote."""
        if device_wide:
            self.fenced[np.unique(g.take(self.block)) - self.first] = True

    def _synchronize(self, g: Group, address: Array) -> None:
        """An atomic after a fence publishes the block's writes to all blocks that come to that address later."""
        known = self.launch.known
        if not known.size:
            return
        published = self.launch.published
        for block, at in dict.fromkeys(zip(g.take(self.block).tolist(), address.tolist(), strict=True)):
            if at in published:
                known[block] |= published[at]
            if self.fenced[block - self.first]:
                told = known[block].copy()
                told[block] = True
                published[at] = published[at] | told if at in published else told

    # ---- asynchronous copies

    def copy_async(self, g: Group, into: Site, out_of: Site, target: Array, source: Array, used: Array | None) -> None:
        """cp.async: the bytes arrive now, and are poison until they are waited for."""
        size = into.size
        data = np.zeros((g.n, size), np.uint8)
        for count in (size,) if used is None else np.unique(used):
            if count > size:
                self.fail(f"src-size {count} exceeds cp-size {size}", "bounds", into.instruction, int(g.lanes[0]))
            chosen = np.arange(g.n) if used is None else np.flatnonzero(used == count)
            if count:
                part = g if chosen.size == g.n else Group(g.lanes[chosen], self.total, self.alive)
                data[chosen, :count] = self._copy_source(part, out_of, source[chosen], int(count))
        found = checks.shared_write(self.shared, g.lanes, target, g.converged, size, data, checks.PENDING, False)
        if found[0]:
            self._fault(g, into, "shared", target, found)
        self._count_shared(into, g.lanes, target)
        self.copies.append(_Copy(g.lanes, target, g.converged, size, g.take(self.committed)))

    def _copy_source(self, g: Group, site: Site, address: Array, count: int) -> Array:
        memory = self.launch.memory
        found = checks.global_read(
            memory, g.take(self.block), address, count, site.size, False, False, self.launch.known
        )
        if found[0]:
            self._fault(g, site, "global", address, found)
        self._count_global(site, g.lanes, address, count)
        return memory.data.reshape(-1, site.size)[(address - BASE) // site.size][:, :count]

    def commit_copies(self, g: Group) -> None:
        """cp.async.commit_group."""
        self.committed = self.committed.copy()
        self.committed[g.lanes] += 1

    def wait_copies(self, g: Group, pending: int | None) -> None:
        """cp.async.wait_group (all but the newest `pending` groups) and wait_all (None)."""
        limit = np.full(self.total, -1)
        limit[g.lanes] = self.committed[g.lanes] - pending if pending is not None else np.iinfo(np.int64).max
        rest = []
        for copy in self.copies:
            done = copy.number < limit[copy.lanes]
            if done.any():
                now = slice(None) if done.all() else done
                checks.complete_copy(self.shared, copy.lanes[now], copy.address[now], copy.converged[now], copy.size)
            if not done.all():
                left = ~done
                rest.append(
                    _Copy(copy.lanes[left], copy.address[left], copy.converged[left], copy.size, copy.number[left])
                )
        self.copies = rest

    # ---- collectives

    def _reporter(self, g: Group, instruction: Instruction, kind: str) -> collectives.Fail:
        return lambda reason, position: self.fail(reason, kind, instruction, int(g.lanes[position]))

    def shuffle(
        self, g: Group, here: Instruction, mode: str, a: Array, b: Array, c: Array, mask: Array
    ) -> tuple[Array, Array]:
        """shfl.sync."""
        return collectives.shuffle(g, mode, a, b, c, mask, self._reporter(g, here, "shuffle"))

    def vote(self, g: Group, here: Instruction, mode: str, a: Array, mask: Array) -> Array:
        """vote.sync."""
        return collectives.vote(g, mode, a, mask, self._reporter(g, here, "collective"))

    def active_mask(self, g: Group) -> Array:
        """The lanes that run together (activemask)."""
        return collectives.active_mask(g)

    def match(self, g: Group, here: Instruction, mode: str, a: Array, mask: Array) -> tuple[Array, Array]:
        """match.sync."""
        return collectives.match(g, mode, a, mask, self._reporter(g, here, "collective"))

    def reduce(self, g: Group, here: Instruction, name: str, a: Array, mask: Array) -> Array:
        """redux.sync."""
        return collectives.reduce(g, name, a, mask, self._reporter(g, here, "collective"))

    def elect(self, g: Group, here: Instruction, mask: Array) -> tuple[Array, Array]:
        """elect.sync."""
        return collectives.elect(g, mask, self._reporter(g, here, "collective"))

    def warp_barrier(self, g: Group) -> None:
        """bar.warp.sync: what the lanes did before is ordered before what they do after."""
        block, warp = np.divmod(g.warps, self.warps_per_block)
        self.shared.clocks[block, warp, warp] += 1

    def join(self, block: int, warps: Array) -> None:
        """A barrier of a block: all that its warps did before is ordered before all that they do after."""
        clocks = self.shared.clocks[block]
        clocks[warps] = clocks[warps].max(axis=0)
        clocks[warps, warps] += 1

    def join_all(self) -> None:
        """A barrier of every block, by all of its warps."""
        clocks = self.shared.clocks
        clocks[:] = clocks.max(axis=1, keepdims=True)
        every = np.arange(self.warps_per_block)
        clocks[:, every, every] += 1

    # ---- matrices

    def _whole(self, g: Group, instruction: Instruction) -> None:
        if not g.whole:
            missing = g.gather(np.repeat(~g.present.all(axis=1, keepdims=True), WARP, axis=1))
            lane = int(g.lanes[np.flatnonzero(missing)[0]])
            self.fail("a matrix instruction needs all 32 threads of the warp", "collective", instruction, lane)

    def load_matrix(self, g: Group, site: Site, address: Array, count: int, transposed: bool) -> Array:
        """ldmatrix: lanes 8 i to 8 i + 7 give the addresses of the rows of matrix i."""
        self._whole(g, site.instruction)
        lanes, there = _row_lanes(g, address, count)
        found = checks.shared_read(self.shared, lanes, there, np.ones(lanes.size, np.bool_), 16)
        if found[0]:
            self._fault(Group(lanes, self.total, self.alive), site, "shared", there, found)
        self._count_shared(site, lanes, there)
        rows = self.shared.data.reshape(-1, 16)[self.shared_base[lanes] + there >> 4]
        return mma.matrices_to_registers(rows.reshape(-1, count, 8, 16), transposed)

    def store_matrix(self, g: Group, site: Site, address: Array, values: list[Array], transposed: bool) -> None:
        """stmatrix: the inverse of ldmatrix."""
        self._whole(g, site.instruction)
        lanes, there = _row_lanes(g, address, len(values))
        data = mma.registers_to_matrices(values, transposed).reshape(-1, 16)
        ones = np.ones(lanes.size, np.bool_)
        found = checks.shared_write(self.shared, lanes, there, ones, 16, data, checks.READY, False)
        if found[0]:
            self._fault(Group(lanes, self.total, self.alive), site, "shared", there, found)
        self._count_shared(site, lanes, there)

    def mma_f32(self, g: Group, here: Instruction, kind: str, a: Any, b: Any, c: Any) -> Array:
        """mma.sync with float32 accumulators."""
        self._whole(g, here)
        return mma.multiply(self.fragments, kind, a, b, np.stack(c))

    def mma_f16(self, g: Group, here: Instruction, kind: str, a: Any, b: Any, c: Any) -> Array:
        """mma.sync with f16 accumulators."""
        self._whole(g, here)
        return mma.multiply_f16(self.fragments, kind, a, b, np.stack(c))

    def mma_s32(self, g: Group, here: Instruction, kind: str, a: Any, b: Any, c: Any, saturated: bool) -> Array:
        """mma.sync with int32 accumulators."""
        self._whole(g, here)
        return mma.multiply_s32(self.fragments, kind, a, b, np.stack(c), saturated)


def granule(sites: list[Site], space: str) -> int:
    """log2 of the bytes that the shadow of a space keeps apart: the narrowest access that can reach it."""
    sizes = [site.size for site in sites if site.space in (space, "generic")]
    return min(sizes, default=16).bit_length() - 1


def _lowest(target: str) -> int:
    from .program import limits

    return limits(target).reserved


def _elements(data: Array, at: Array, size: int, count: int) -> list[Array]:
    """`count` unsigned integers per lane out of bytes."""
    item = size // count
    if count == 1:
        return [data.view(f"u{item}")[at // item]]
    return list(np.ascontiguousarray(data.view(f"u{item}").reshape(-1, count)[at // size].T))


def _interleave(values: list[Array], n: int) -> Array:
    """Elements of each lane as rows of bytes."""
    stacked = np.stack([np.broadcast_to(x, n) for x in values], axis=1)
    return np.ascontiguousarray(stacked).view(np.uint8)


def _row_lanes(g: Group, address: Array, count: int) -> tuple[Array, Array]:
    """The lanes whose addresses a matrix instruction uses, and those."""
    chosen = slice(None, 8 * count)
    lanes = np.ascontiguousarray(g.lanes.reshape(-1, WARP)[:, chosen]).reshape(-1)
    return lanes, np.ascontiguousarray(address.reshape(-1, WARP)[:, chosen]).reshape(-1)

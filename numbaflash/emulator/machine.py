"""What generated code calls: the operations of threads on memory and on each other.

Which threads run when is decided in `schedule`.
"""

# mypy: disable-error-code="no-any-return"
# Operators on NDArray[Any] are typed Any.

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import checks, collectives, global_checks, mma, shared_checks
from .atomics import atomic
from .group import WARP, Group
from .ir import Instruction
from .isa import Site
from .memory import BASE
from .program import LOCAL_WINDOW, SHARED_WINDOW
from .threads import Launch, Threads

Array = NDArray[Any]
_NO_VALUES = np.empty((0, 1), np.uint8)


@dataclass
class _Copy:
    """An asynchronous copy that has not been waited for."""

    lanes: Array
    address: Array
    converged: Array
    size: int
    number: Array


class Machine(Threads):
    """The blocks [first, first + count) of a launch, and what their threads can do."""

    def __init__(self, launch: Launch, first: int, count: int) -> None:
        super().__init__(launch, first, count)
        self.copies: list[_Copy] = []
        self.committed = np.zeros(self.total, np.int64)
        self.fragments = mma.Fragments()

    # ---- loads and stores

    def load_shared(self, g: Group, site: Site, address: Array, count: int) -> list[Array]:
        """Loads `count` elements per lane; unsigned integers."""
        found = shared_checks.shared_read(self.shared, g.lanes, address, g.converged, site.size, site.strong)
        if found[0]:
            self._fault(g, site, "shared", address, found)
        if site.strong and self.program.names.fences:
            self.order.load(g, address)
        self._count_shared(site, g.lanes, address)
        return _elements(self.shared.data, g.take(self.shared_base) + address, site.size, count)

    def store_shared(self, g: Group, site: Site, address: Array, values: list[Array]) -> None:
        """Stores elements of each lane."""
        data = _interleave(values, g.n)
        found = shared_checks.shared_write(
            self.shared, g.lanes, address, g.converged, site.size, data, checks.READY, int(site.strong)
        )
        if found[0]:
            self._fault(g, site, "shared", address, found)
        if site.strong and self.program.names.fences:
            self.order.store(g, address)
        self._count_shared(site, g.lanes, address)

    def load_global(self, g: Group, site: Site, address: Array, count: int) -> list[Array]:
        """Loads `count` elements per lane; unsigned integers."""
        memory = self.launch.memory
        found = global_checks.global_read(
            memory, g.take(self.block), address, site.size, site.size, site.device_wide, site.read_only
        )
        if found[0]:
            self._fault(g, site, "global", address, found)
        if site.device_wide:
            self.launch.order.load(g.take(self.block), address)
        self._count_global(site, g.lanes, address, site.size)
        return _elements(memory.data, address - BASE, site.size, count)

    def store_global(self, g: Group, site: Site, address: Array, values: list[Array]) -> None:
        """Stores elements of each lane."""
        self._write_global(g, site, address, _interleave(values, g.n), int(site.device_wide))
        if site.device_wide:
            self.launch.order.store(g.take(self.block), address)
        self._count_global(site, g.lanes, address, site.size)

    def _write_global(self, g: Group, site: Site, address: Array, data: Array, kind: int) -> None:
        found = global_checks.global_write(self.launch.memory, g.take(self.block), address, site.size, data, kind)
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

    def _atomic_kind(self, site: Site) -> int:
        return checks.OBSERVING if site.result in self.program.read_registers else checks.STRONG

    def atomic_shared(self, g: Group, site: Site, address: Array, name: str, kind: str, *values: Array) -> Array:
        """One read-modify-write per lane, in the order of lanes."""
        found = shared_checks.shared_write(
            self.shared, g.lanes, address, g.converged, site.size, _NO_VALUES, checks.READY, self._atomic_kind(site)
        )
        if found[0]:
            self._fault(g, site, "shared", address, found)
        self._count_shared(site, g.lanes, address)
        before = atomic(self.shared.data, g.take(self.shared_base) + address, name, kind, values)
        if self.program.names.fences:
            self.order.update(g, address, _wrote(name, before, values))
        return before

    def atomic_global(self, g: Group, site: Site, address: Array, name: str, kind: str, *values: Array) -> Array:
        """One read-modify-write per lane, in the order of lanes."""
        self._write_global(g, site, address, _NO_VALUES, self._atomic_kind(site) if site.device_wide else checks.WEAK)
        self._count_global(site, g.lanes, address, site.size)
        before = atomic(self.launch.memory.data, address - BASE, name, kind, values)
        if site.device_wide:
            self.launch.order.update(g.take(self.block), address, _wrote(name, before, values))
        return before

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
        """membar, fence, and the ones in acquire and release forms."""
        self.order.fence(g)
        if device_wide:
            self.launch.order.fence(g.take(self.block))

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
        found = shared_checks.shared_write(
            self.shared, g.lanes, target, g.converged, size, data, checks.PENDING, checks.WEAK
        )
        if found[0]:
            self._fault(g, into, "shared", target, found)
        self._count_shared(into, g.lanes, target)
        self.copies.append(_Copy(g.lanes, target, g.converged, size, g.take(self.committed)))

    def _copy_source(self, g: Group, site: Site, address: Array, count: int) -> Array:
        memory = self.launch.memory
        found = global_checks.global_read(memory, g.take(self.block), address, count, site.size, False, False)
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
                shared_checks.complete_copy(
                    self.shared, copy.lanes[now], copy.address[now], copy.converged[now], copy.size
                )
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

    def warp_barrier(self, g: Group, here: Instruction, mask: Array) -> None:
        """bar.warp.sync: what the lanes of a mask did before is ordered before what they do after."""
        collectives.members(g, mask, self._reporter(g, here, "collective"))
        self.order.join_lanes(g, mask)

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
        found = shared_checks.shared_read(self.shared, lanes, there, np.ones(lanes.size, np.bool_), 16, False)
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
        found = shared_checks.shared_write(self.shared, lanes, there, ones, 16, data, checks.READY, checks.WEAK)
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


def _wrote(name: str, before: Array, values: tuple[Array, ...]) -> Array:
    """Which lanes of an atomic wrote: a compare-and-swap that fails does not."""
    return before == values[0] if name == "cas" else np.ones(before.size, np.bool_)


def _row_lanes(g: Group, address: Array, count: int) -> tuple[Array, Array]:
    """The lanes whose addresses a matrix instruction uses, and those."""
    chosen = slice(None, 8 * count)
    lanes = np.ascontiguousarray(g.lanes.reshape(-1, WARP)[:, chosen]).reshape(-1)
    return lanes, np.ascontiguousarray(address.reshape(-1, WARP)[:, chosen]).reshape(-1)

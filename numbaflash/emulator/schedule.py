"""Which threads of a chunk run when: lowest program counter first, so that diverged threads meet again.

Whole warps run a basic block in one go. Threads of a warp that is not converged stop before each collective, and wait
there until all that it names have come; if they cannot come, that is an error.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from .errors import EmulatorError
from .group import WARP, Group
from .ir import Reg
from .machine import Machine
from .program import is_barrier

Array = NDArray[Any]

_PATIENCE = 1024
"""Steps that the same threads may take, while others could run, before those get a turn: spin locks need it."""


@dataclass
class _Arrival:
    """Threads that have come to a barrier together; `votes` are their predicates at a bar.red."""

    lanes: Array
    pc: int
    kind: str
    votes: Array | None

    def pick(self, chosen: Array) -> _Arrival:
        """Some of the threads."""
        votes = None if self.votes is None else self.votes[chosen]
        return _Arrival(self.lanes[chosen], self.pc, self.kind, votes)


@dataclass
class _Barrier:
    """One block's threads at one of its barriers.

    Attributes:
        early: Threads that wait for the others of their own warp, at a barrier without .aligned.
        came: Threads of the warps that count as arrived.
        warps: Those warps.
        arrived: How many threads they count for.
        expected: The count that the instruction gives; None where all threads of the block must come.
        told: What all of them did before, as a clock (see `order`).
    """

    expected: int | None
    told: Array
    early: list[_Arrival] = field(default_factory=list)
    came: list[_Arrival] = field(default_factory=list)
    warps: set[int] = field(default_factory=set)
    arrived: int = 0


class Scheduler:
    """Runs the threads of a machine to their end."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.translator = machine.launch.translator
        self.program = machine.program
        self.size = len(self.program.code)
        self.ready: dict[int, tuple[Group, int]] = {}
        self.stalled: dict[int, Array] = {}
        self.barriers: dict[tuple[int, int], _Barrier] = {}
        self.everyone = Group(np.arange(machine.total), machine.total, machine.alive)
        self.steps = 0

    def run(self) -> None:
        """Runs until every thread has exited.

        Raises:
            EmulatorError: A check failed, or the threads cannot go on.
        """
        machine = self.machine
        self._push(0, np.flatnonzero(machine.alive))
        turns = 0
        while True:
            if not self.ready:
                self._check_waiting()
                return
            pc = min(self.ready)
            if len(self.ready) > 1:
                turns += 1
                if turns > _PATIENCE:
                    turns = 0
                    pc = min(self.ready, key=lambda x: self.ready[x][1])
            else:
                turns = 0
            group, _ = self.ready.pop(pc)
            self.steps += 1
            if self.steps > machine.launch.max_steps:
                self._fail_at(pc, group, f"still running after {machine.launch.max_steps} steps", "hang")
            self._step(pc, group)

    # ---- queues

    def _group(self, lanes: Array) -> Group:
        if lanes.size == self.machine.total:
            return self.everyone
        return Group(lanes, self.machine.total, self.machine.alive)

    def _push(self, pc: int, lanes: Array | Group) -> None:
        """Makes threads runnable at a program counter, together with those that are there already."""
        group = lanes if isinstance(lanes, Group) else self._group(lanes)
        if not group.n:
            return
        if self._leaves(pc):  # now, so that nobody waits for threads that have nothing left to do
            self._exit(group)
        elif pc in self.ready:
            other, since = self.ready[pc]
            self.ready[pc] = self._group(np.sort(np.concatenate([other.lanes, group.lanes]))), since
        else:
            self.ready[pc] = group, self.steps

    def _fail_at(self, pc: int, group: Group, reason: str, kind: str) -> NoReturn:
        instruction = self.program.instructions[min(pc, self.size - 1)]
        self.machine.fail(reason, kind, instruction, int(group.lanes[0]))

    # ---- running

    def _step(self, pc: int, group: Group) -> None:
        """Runs a group from a program counter to the end of the block, or to what stops it."""
        end = self.translator.end[pc]
        collective = self.translator.next_collective[pc]
        if collective < end and not group.whole:
            self._step_apart(pc, group, collective, end)
        else:
            self._run(pc, end, group)

    def _step_apart(self, pc: int, group: Group, collective: int, end: int) -> None:
        """The same for warps that may lack threads, where the block has collectives."""
        together = group.converged
        if together.all():
            self._run(pc, end, group)
            return
        self._push(pc, group.lanes[together])
        apart = self._group(group.lanes[~together])
        if collective == pc:
            self._meet(pc, apart)
        else:
            self._run(pc, collective, apart)

    def _meet(self, pc: int, group: Group) -> None:
        """Threads of diverged warps at a collective: those whose partners are all here go on, the others wait."""
        if pc in self.stalled:
            group = self._group(np.sort(np.concatenate([self.stalled.pop(pc), group.lanes])))
        complete = self._complete(pc, group)
        if complete.any():
            chosen = self._group(group.lanes[complete])
            stop = self.translator.next_collective[pc + 1] if pc + 1 < self.translator.end[pc] else pc + 1
            whole = bool(chosen.converged.all())
            self._run(pc, self.translator.end[pc] if whole else stop, chosen)
        if not complete.all():
            self.stalled[pc] = group.lanes[~complete]

    def _complete(self, pc: int, group: Group) -> Array:
        """Which threads have all partners that the collective names here; exited ones are not waited for."""
        if self.program.code[pc].collective == "warp":
            return group.converged
        mask = self.translator.mask(pc)(self.machine, group, self.machine.registers)
        bits = np.uint32(1) << np.arange(WARP, dtype=np.uint32)
        wanted = group.spread(np.broadcast_to(mask, group.n))[:, :, None] & bits != 0
        alive = self.machine.alive.reshape(-1, WARP)[group.warps]
        missing = wanted & (alive & ~group.present)[:, None, :]
        return group.gather(~missing.any(axis=2))

    def _run(self, start: int, stop: int, group: Group) -> None:
        segment = self.translator.segment(start, stop)
        condition = segment.function(self.machine, group, self.machine.registers)
        warps = group.warps.size
        for pipe, count in segment.pipes.items():
            self.machine.launch.report.instructions[pipe] += count * warps
        self._leave(stop, group, condition)

    def _leave(self, stop: int, group: Group, condition: Any) -> None:
        """Sends a group on from the last instruction of a segment."""
        last = self.program.instructions[stop - 1]
        opcode = last.parts[0]
        if opcode in ("bra", "ret", "exit"):
            target = self.program.branches[stop - 1][0] if opcode == "bra" else self.size
            if condition is None:
                self._push(target, group)
                return
            taken = np.broadcast_to(condition, group.n)
            count = np.count_nonzero(taken)
            if count == group.n:
                self._push(target, group)
            elif count == 0:
                self._push(stop, group)
            else:
                self._push(target, group.lanes[taken])
                self._push(stop, group.lanes[~taken])
        elif opcode == "brx":
            targets = self.program.branches[stop - 1]
            for index in np.unique(condition):
                if index >= len(targets):
                    self._fail_at(stop - 1, group, f"branch index {index} is past the table of targets", "bounds")
                self._push(targets[index], group.lanes[condition == index])
        elif is_barrier(last):
            self._arrive(stop - 1, group, *condition)
        else:
            self._push(stop, group)

    def _leaves(self, pc: int) -> bool:
        """Whether the thread ends at a program counter."""
        if pc >= self.size:
            return True
        instruction = self.program.instructions[pc]
        return instruction.parts[0] in ("ret", "exit") and instruction.guard is None

    def _exit(self, group: Group) -> None:
        self.machine.alive[group.lanes] = False
        # who was converged may have changed for the others: their groups are made anew
        self.ready = {pc: (self._group(other.lanes), since) for pc, (other, since) in self.ready.items()}
        for key in [key for key, barrier in self.barriers.items() if barrier.early]:
            if key in self.barriers:
                self._gather(key)

    # ---- barriers

    def _arrive(self, pc: int, group: Group, number: Any, count: Any, predicate: Any) -> None:
        """Takes threads to a barrier, and lets those go on whose barrier is complete."""
        machine = self.machine
        parts = self.program.instructions[pc].parts
        kind = next(x for x in parts if x in ("sync", "red", "arrive"))
        if group.full and kind == "sync" and count is None and not self.barriers and np.size(number) == 1:
            machine.order.join_blocks()
            self._push(pc + 1, group)
            return
        aligned = parts[0] == "bar" or "aligned" in parts
        numbers = np.broadcast_to(number, group.n)
        counts = None if count is None else np.broadcast_to(count, group.n)
        votes = None if predicate is None else np.broadcast_to(predicate, group.n)
        arrival = _Arrival(group.lanes, pc, kind, votes)
        for block in np.unique(group.lanes // machine.lanes_per_block):
            mine = group.lanes // machine.lanes_per_block == block
            for name in np.unique(numbers[mine]):
                chosen = mine & (numbers == name)
                wanted = None if counts is None else int(counts[chosen][0])
                self._arrive_block(arrival.pick(chosen), (int(block), int(name)), wanted, aligned)

    def _arrive_block(self, arrival: _Arrival, key: tuple[int, int], wanted: int | None, aligned: bool) -> None:
        block, name = key
        machine, part, pc = self.machine, self._group(arrival.lanes), arrival.pc
        barrier = self.barriers.get(key)
        if barrier is None:
            barrier = self.barriers[key] = _Barrier(wanted, np.zeros(machine.lanes_per_block, np.int32))
        if name > 15:
            self._fail_at(pc, part, f"barrier {name}: a block has barriers 0 to 15", "barrier")
        if wanted is not None and (wanted % WARP or wanted == 0):
            self._fail_at(pc, part, f"barrier count {wanted} is no multiple of {WARP}", "barrier")
        if barrier.expected != wanted:
            self._fail_at(pc, part, f"warps wait at barrier {name} with different counts", "barrier")
        elsewhere = [other.pc for other in barrier.came if other.pc != pc]
        if aligned and wanted is None and elsewhere:
            line = self.program.instructions[elsewhere[0]].line
            self._fail_at(pc, part, f"other threads of the block wait at the barrier of PTX line {line}", "barrier")
        repeated = {int(x) - block * machine.warps_per_block for x in part.warps} & barrier.warps
        if repeated:
            self._fail_at(pc, part, f"warp {min(repeated)} arrives twice at barrier {name}", "barrier")
        barrier.early.append(arrival)
        self._gather(key)

    def _gather(self, key: tuple[int, int]) -> None:
        """Counts the warps of which every living thread has come to a barrier."""
        block, machine, barrier = key[0], self.machine, self.barriers[key]
        first = block * machine.lanes_per_block
        here = np.zeros(machine.lanes_per_block, np.bool_)
        for arrival in barrier.early:
            here[arrival.lanes - first] = True
        absent = machine.alive[first : first + here.size] & ~here
        whole = np.asarray(here.reshape(-1, WARP).any(axis=1) & ~absent.reshape(-1, WARP).any(axis=1))
        early, barrier.early = barrier.early, []
        for arrival in early:
            counted = whole[(arrival.lanes - first) // WARP]
            if not counted.all():
                barrier.early.append(arrival.pick(~counted))
            if counted.any():
                arrival = arrival.pick(counted)
                barrier.came.append(arrival)
                barrier.told = np.maximum(barrier.told, machine.order.arrive(block, arrival.lanes - first))
        barrier.warps |= set(np.flatnonzero(whole).tolist())
        threads = sum(arrival.lanes.size for arrival in barrier.came)
        barrier.arrived = threads if barrier.expected is None else len(barrier.warps) * WARP
        if barrier.arrived >= (barrier.expected or machine.threads):
            self._release(key)
        for arrival in barrier.came:
            if arrival.kind == "arrive" and whole[(arrival.lanes[0] - first) // WARP]:
                self._push(arrival.pc + 1, arrival.lanes)

    def _release(self, key: tuple[int, int]) -> None:
        barrier, block = self.barriers.pop(key), key[0]
        waiting = [arrival for arrival in barrier.came if arrival.kind != "arrive"]
        lanes = np.concatenate([arrival.lanes for arrival in waiting]) if waiting else np.empty(0, np.int64)
        if lanes.size == self.machine.threads:
            self.machine.order.join_block(block)
        elif lanes.size:
            self.machine.order.depart(block, lanes % self.machine.lanes_per_block, barrier.told)
        votes = [arrival.votes for arrival in waiting if arrival.votes is not None]
        for arrival in waiting:
            if votes:
                self._deliver(arrival.pc, arrival.lanes, np.concatenate(votes))
            self._push(arrival.pc + 1, arrival.lanes)

    def _deliver(self, pc: int, lanes: Array, votes: Array) -> None:
        """Puts the result of a bar.red into its register."""
        instruction = self.program.instructions[pc]
        target = instruction.operands[0]
        if "red" not in instruction.parts:
            return
        assert isinstance(target, Reg)
        number = self.program.names.number[target.name]
        value: Any = np.uint32(np.count_nonzero(votes))
        if "popc" not in instruction.parts:
            value = votes.all() if "and" in instruction.parts else votes.any()
        registers = self.machine.registers
        registers[number] = self._group(lanes).put(registers[number], value)

    # ---- the end

    def _check_waiting(self) -> None:
        """Fails where threads wait for others that will not come."""
        for pc, lanes in sorted(self.stalled.items()):
            instruction = self.program.instructions[pc]
            kind = "barrier" if is_barrier(instruction) else "collective"
            here = int(np.count_nonzero(lanes // WARP == lanes[0] // WARP))
            self._fail_at(
                pc,
                self._group(lanes),
                f"{instruction.parts[0]} is reached by {here} threads of the warp, and the others that it needs "
                f"do not come",
                kind,
            )
        for (_, name), barrier in sorted(self.barriers.items(), key=lambda item: item[0]):
            wanted = self.machine.threads if barrier.expected is None else barrier.expected
            reason = f"{barrier.arrived} of {wanted} threads came, the others have exited or wait elsewhere"
            if barrier.early:
                reason = f"{barrier.early[0].lanes.size} threads wait for others of their warp, which do not come"
            for arrival in (*barrier.early, *(x for x in barrier.came if x.kind != "arrive")):
                self._fail_at(arrival.pc, self._group(arrival.lanes), f"barrier {name}: {reason}", "barrier")


def run(machine: Machine) -> None:
    """Runs a chunk of blocks; NumPy's floating-point warnings are what PTX defines to be silent."""
    try:
        with np.errstate(all="ignore"):
            Scheduler(machine).run()
    except (FloatingPointError, IndexError, ValueError) as error:  # a hole in the emulator, never the caller's fault
        raise EmulatorError(f"internal error: {error!r}", kind="internal") from error

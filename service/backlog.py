"""What waits for the engine's thread, and what of it is next.

Steps of one session go in the order in which they came. Steps of different sessions that are alike (same layer, same
number of tokens, same heads) and small go together. Callers take turns. And while a large step is computed, in parts,
small steps of other sessions go between them: after each part, those that wait then. So neither waits for long: a
small step for a part and what is before it in the queue, a part for as many small steps as go together at most.
"""

from __future__ import annotations

import queue
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

from .principals import Principal
from .steps import Step
from .turns import Turns


@dataclass(frozen=True, eq=False, slots=True)
class Errand:
    """A function that is to run on the engine's thread, between steps.

    Attributes:
        run: The function.
        owner: Whose it is: it waits for that caller's steps alone. None: for all. For large ones that have not begun
            it does not wait.
    """

    run: Callable[[], None]
    owner: Principal | None


Work: TypeAlias = list[Step] | Errand
_Waiting: TypeAlias = Step | Errand | None  # the last of which ends the thread


def _owner(waiting: _Waiting) -> Principal | None:
    if waiting is None:
        return None
    return waiting.session.owner if isinstance(waiting, Step) else waiting.owner


class Backlog:
    """Belongs to the engine's thread, but for `put`.

    Args:
        max_batch: Steps computed together at most.
        batch_wait: Seconds that a small step waits for others like it.
        small: Steps of fewer tokens than this are small.
        shared: Whether there can be several callers.
    """

    def __init__(self, *, max_batch: int, batch_wait: float, small: int, shared: bool) -> None:
        self._max_batch = max_batch
        self._batch_wait = batch_wait
        self._small = small
        self._turns: Turns[_Waiting] | None = Turns(_owner) if shared else None
        self._inbox: queue.SimpleQueue[_Waiting] = queue.SimpleQueue()
        self._waiting: deque[_Waiting] = deque()

    def put(self, waiting: _Waiting) -> None:
        """Let something wait; None ends the thread when everything before it is done."""
        self._inbox.put(waiting)

    def is_small(self, step: Step) -> bool:
        """Say whether a step is of few tokens."""
        return step.form.tokens < self._small

    def take(self) -> Work | None:
        """Wait for something to do and return it; None: there will be nothing any more."""
        if not self._waiting:
            self._waiting.append(self._inbox.get())
        self._await_others()
        self._receive()
        if self._turns:
            self._turns.arrange(self._waiting)
        first = self._waiting.popleft()
        return self._batch(first, self._waiting) if isinstance(first, Step) else first

    def take_before(self, large: Step, *, begun: bool) -> Iterator[Work]:
        """Take what may go before a large step, or before its next part where it has begun."""
        self._receive()
        going: deque[_Waiting] = deque()
        staying: deque[_Waiting] = deque()
        passed = {large.session.id}  # no step overtakes an earlier one of its session
        for waiting in self._waiting:
            if isinstance(waiting, Step):
                goes = self.is_small(waiting) and waiting.session.id not in passed and self._may_pass(large, waiting)
                if not goes:
                    passed.add(waiting.session.id)
            else:
                goes = waiting is not None and not begun  # it may end the session of the step
            (going if goes and len(going) < self._max_batch else staying).append(waiting)
        self._waiting = staying
        while going:
            first = going.popleft()
            assert first
            yield self._batch(first, going) if isinstance(first, Step) else first

    def charge(self, steps: Iterable[Step], seconds: float) -> None:
        """Count the time that steps took, so much for each."""
        if self._turns:
            self._turns.charge(steps, seconds)

    def _may_pass(self, large: Step, small: Step) -> bool:
        """Say whether a small step's caller has had no more time than the large one's."""
        return self._turns is None or self._turns.is_level(small.session.owner, large.session.owner)

    def _await_others(self) -> None:
        """Let a small step wait for others like it."""
        first = self._waiting[0]
        if not (self._batch_wait and isinstance(first, Step) and self.is_small(first)):
            return
        until = first.arrived_ns / 1e9 + self._batch_wait
        while len(self._waiting) < self._max_batch and (left := until - time.perf_counter_ns() / 1e9) > 0:
            try:
                self._waiting.append(self._inbox.get(timeout=left))
            except queue.Empty:
                return

    def _receive(self) -> None:
        """Move what has arrived to what waits."""
        while True:
            try:
                self._waiting.append(self._inbox.get_nowait())
            except queue.Empty:
                return

    def _batch(self, first: Step, waiting: deque[_Waiting]) -> list[Step]:
        """Take out of `waiting` what can be computed together with `first`."""
        batch = [first]
        kind = self._kind(first)
        if kind is None or not waiting:
            return batch
        passed = {first.session.id}  # no step overtakes an earlier one of its session
        left: deque[_Waiting] = deque()
        while waiting and len(batch) < self._max_batch:
            step = waiting.popleft()
            if not isinstance(step, Step):  # nor an errand, which may end a session
                waiting.appendleft(step)
                break
            if step.session.id not in passed and self._kind(step) == kind:
                batch.append(step)
            else:
                left.append(step)
            passed.add(step.session.id)
        waiting.extendleft(reversed(left))
        return batch

    def _kind(self, step: Step) -> tuple[object, ...] | None:
        """What steps must have in common to be computed together; None: computed alone."""
        form = step.form
        if not self.is_small(step) or form.arrays or len(form.layout.tensors) != 3:
            return None
        return step.layer, form.alike

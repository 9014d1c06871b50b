"""The one thread that owns the device: it takes the steps that wait, and computes them, several at once where it can.

What is computed next, and what of it together, is `backlog.py`'s to say. On the CPU a large step is computed in parts,
so that small ones of other sessions go between them; devices compute it in one piece.

Only a session that has the service to itself is served without the thread: while nothing waits or runs there, the event
loop takes its short steps at once.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any, Final, TypeVar

import grpc
from numpy.typing import NDArray

import numbaflash
from numbaflash.cpu import pausing

from .backlog import Backlog, Errand, Work
from .errors import BadTensorError, ExhaustedError, PositionMismatchError, QueueFullError, ServiceError
from .limits import Limit
from .metrics import Metrics
from .principals import Principal
from .replay import Answer, Answers
from .scratch import Scratch
from .steps import Done, Outcome, Step

log = logging.getLogger(__name__)

# Keys and values that a core reads in less time than it takes another thread to wake up twice, some 100 us.
_BRIEF_BYTES: Final = 2 << 20
# What a caller is told to wait when the queue is full, at least and at most, in seconds.
_SHORTEST_RETRY: Final = 0.02
_LONGEST_RETRY: Final = 5.0
T = TypeVar("T")


class Engine:
    """Queue and thread. All public methods are the event loop's.

    Args:
        answers: Where the answers of the last steps are kept.
        max_steps: Steps that may wait or run at a time.
        max_bytes: Bytes of those.
        max_batch: Steps computed together at most.
        batch_wait: Seconds that a small step waits for others like it.
        small: Steps of fewer tokens than this are computed together.
        max_wait: Seconds that a step may wait.
        shared: Whether there can be several callers.
        metrics: Where they are counted.
    """

    def __init__(
        self,
        answers: Answers,
        *,
        max_steps: int,
        max_bytes: int,
        max_batch: int,
        batch_wait: float,
        small: int,
        max_wait: float,
        shared: bool,
        metrics: Metrics,
    ) -> None:
        self._answers = answers
        self._steps = Limit(max_steps, "steps are waiting", shared=shared)
        self._bytes = Limit(max_bytes, "bytes of steps are waiting", shared=shared)
        self._max_wait_ns = int(max_wait * 1e9)
        self._last_wait = 0.0  # of a step that was computed, in seconds
        self._batch_wait = batch_wait
        self._metrics = metrics
        self._calls = 0  # functions waiting or running
        self._last_session = ""
        self._backlog = Backlog(max_batch=max_batch, batch_wait=batch_wait, small=small, shared=shared)
        self._loop = asyncio.get_running_loop()
        self._scratch, self._spare_scratch = Scratch(), Scratch()
        self._charged_until = 0.0  # on the clock of `time.perf_counter`
        self._aside_ns = 0  # spent on small steps between the parts of large ones
        self._thread = threading.Thread(target=self._run, name="numbaflash-engine", daemon=True)
        self._thread.start()

    @property
    def steps(self) -> int:
        """Steps that wait or run."""
        return self._steps.used

    @property
    def nbytes(self) -> int:
        """Bytes of those."""
        return self._bytes.used

    def submit(self, step: Step, writer: object) -> None:
        """Queue a step of a call or stream; `step.settle` gets what comes of it.

        Raises:
            BusyError: Another writer's steps of the session are in flight.
            QueueFullError: Too many steps wait, or too many bytes of them.
        """
        self.admit(step, writer)
        self.start(step)

    def admit(self, step: Step, writer: object) -> None:
        """Count a step in, as `submit`; `start` or `refuse` must follow, at once or later."""
        owner, nbytes = step.session.owner, len(step.payload)
        # As long as steps have had to wait lately, there will be room again.
        retry_after = min(_LONGEST_RETRY, max(_SHORTEST_RETRY, self._last_wait))
        self._steps.check(owner, 1, retry_after)
        self._bytes.check(owner, nbytes, retry_after)
        step.session.begin_step(writer)
        self._steps.take(owner, 1)
        self._bytes.take(owner, nbytes)

    def start(self, step: Step) -> None:
        """Queue a step that is counted in."""
        lone = self._steps.used == 1 and not self._calls and step.session.id == self._last_session
        self._last_session = step.session.id
        if lone and self._is_brief(step):
            self._deliver(self._compute([step]))
        else:
            self._backlog.put(step)

    def refuse(self, step: Step, error: ServiceError) -> None:
        """Answer a step that is counted in, and was not started."""
        self._deliver([(step, error)])

    async def call(self, function: Callable[[], T], owner: Principal | None = None) -> T:
        """Run a function on the engine's thread and return what it returns.

        Args:
            function: What to run.
            owner: Whose it is; see `Errand`.
        """
        done: asyncio.Future[T] = self._loop.create_future()

        def run() -> None:
            try:
                result = function()
            except Exception as error:  # it is the caller's
                self._loop.call_soon_threadsafe(self._resolve_call, done, error)
            else:
                self._loop.call_soon_threadsafe(self._resolve_call, done, result)

        self._calls += 1
        self._backlog.put(Errand(run, owner))
        return await done

    async def stop(self) -> None:
        """Compute what waits, and end the thread."""
        self._backlog.put(None)
        await asyncio.to_thread(self._thread.join)

    # -- the engine's thread -----------------------------------------------------------------------------------------

    def _run(self) -> None:
        while (work := self._backlog.take()) is not None:
            if isinstance(work, list) and not self._backlog.is_small(work[0]):
                for earlier in self._backlog.take_before(work[0], begun=False):
                    self._do(earlier)
            self._do(work)
            del work  # payloads go with their answers: the next ones take their memory

    def _do(self, work: Work) -> None:
        self._charged_until = time.perf_counter()
        if isinstance(work, Errand):
            work.run()
        else:
            self._loop.call_soon_threadsafe(self._deliver, self._compute(work))
            self._charge(work)

    def _charge(self, steps: list[Step]) -> None:
        """Count the time since the last count as the steps'."""
        now = time.perf_counter()
        self._backlog.charge(steps, (now - self._charged_until) / len(steps))
        self._charged_until = now

    def _pause(self, large: Step) -> None:
        """Let small steps go between two parts of a large one."""
        paused_ns = time.perf_counter_ns()
        self._charge([large])
        self._scratch, self._spare_scratch = self._spare_scratch, self._scratch
        for work in self._backlog.take_before(large, begun=True):
            self._do(work)
        self._scratch, self._spare_scratch = self._spare_scratch, self._scratch
        self._charged_until = time.perf_counter()
        self._aside_ns += time.perf_counter_ns() - paused_ns

    def _compute(self, batch: list[Step]) -> list[tuple[Step, Outcome]]:
        """Take steps; what comes back for each is None where it was taken back before."""
        outcomes: list[tuple[Step, Outcome]] = []
        ready = []
        for step in batch:
            if step.taken_back:
                outcomes.append((step, None))
                continue
            try:
                earlier = self._admit(step)
            except ServiceError as error:
                outcomes.append((step, error))
            else:
                if earlier is None:
                    ready.append(step)
                else:
                    self._metrics.replayed += 1
                    outcomes.append((step, Done(earlier, replayed=True)))
        if len(ready) > 1:
            try:
                return outcomes + self._launch(ready)
            except Exception as error:
                # One of them is at fault: alone, each gets its own error, and the others succeed.
                log.warning("a batch of %d steps failed (%s); they are computed one by one", len(ready), error)
                return outcomes + [outcome for step in ready for outcome in self._compute([step])]
        for step in ready:
            try:
                outcomes += self._launch([step])
            except ServiceError as error:
                outcomes.append((step, error))
            except ValueError as error:
                outcomes.append((step, BadTensorError("tensors", str(error))))
            except MemoryError:
                outcomes.append((step, ExhaustedError("the machine has no memory left", retry_after=1.0)))
            except Exception:  # whatever it is, the thread goes on with the other steps
                log.exception("a step failed", extra={"request_id": step.request_id, "session": step.session.id[:8]})
                outcomes.append((step, ServiceError("the step failed", code=grpc.StatusCode.INTERNAL)))
        return outcomes

    def _admit(self, step: Step) -> Answer | None:
        """Decide whether a step runs now (None), has run before (its answer), or never (raises)."""
        if step.session.lost:
            raise step.session.lost()
        if step.deadline is not None and time.monotonic() >= step.deadline:
            raise ServiceError("the deadline passed while the step waited", code=grpc.StatusCode.DEADLINE_EXCEEDED)
        if (waited_ns := time.perf_counter_ns() - step.arrived_ns) > self._max_wait_ns:
            raise QueueFullError(
                f"the step waited {waited_ns / 1e9:.3g} s, longer than it may", retry_after=_LONGEST_RETRY
            )
        length = step.cache.length(step.layer)
        if step.position == length:
            return None
        last = self._answers.get(step.session.id, step.layer)
        if last and (last.before, last.position) == (step.position, length):
            if step.request_id and step.request_id == last.request_id:
                return last
            hint = "; its last step started there, with another request_id"
        else:
            hint = ""
        raise PositionMismatchError(
            f"position is {step.position} and layer {step.layer} holds {length} tokens{hint}", position=length
        )

    def _launch(self, steps: list[Step]) -> list[tuple[Step, Outcome]]:
        """Compute steps that are ready, in one launch."""
        self._answers.make_room(sum(step.form.out_nbytes for step in steps))
        aside_ns = self._aside_ns
        started, outs = self._attend(steps)
        kernel_ns = time.perf_counter_ns() - started - (self._aside_ns - aside_ns)
        queue_ns = [started - step.arrived_ns for step in steps]
        self._last_wait = queue_ns[0] / 1e9
        self._metrics.launched(steps[0].form.tokens, queue_ns, kernel_ns)
        return [
            (step, Done(self._keep(step, out), False, waited_ns, kernel_ns, len(steps)))
            for step, out, waited_ns in zip(steps, outs, queue_ns, strict=True)
        ]

    def _attend(self, steps: list[Step]) -> tuple[int, list[NDArray[Any] | None]]:
        """Step the caches; return when the computation started, in nanoseconds, and the outputs."""
        self._scratch.clear()
        if len(steps) > 1:
            stacked, options = self._stack(steps)
            started = time.perf_counter_ns()
            out = numbaflash.attention_batch([step.cache for step in steps], steps[0].layer, **stacked, **options)
            # Each answer its own memory: one that is kept must not keep the others.
            return started, [row.copy() for row in out]
        (step,) = steps
        tensors, options = step.form.arguments(self._scratch.align(step.payload))
        cache = step.cache
        method = cache.step if len(tensors) == 3 else cache.append if "k" in tensors else cache.attend
        started = time.perf_counter_ns()
        if self._backlog.is_small(step):
            return started, [method(step.layer, **tensors, **options)]
        with self._answers.promise(step.form.out_nbytes), pausing(partial(self._pause, step)):
            return started, [method(step.layer, **tensors, **options)]

    def _stack(self, steps: list[Step]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Put steps that are alike next to each other: (N, T, heads, D), and the options that they share."""
        arguments = [step.form.arguments(step.payload) for step in steps]
        stacked = {name: self._scratch.stack([tensors[name] for tensors, _ in arguments]) for name in arguments[0][0]}
        return stacked, arguments[0][1]

    def _keep(self, step: Step, out: NDArray[Any] | None) -> Answer:
        session, cache = step.session, step.cache
        position = cache.length(step.layer)
        answer = Answer(step.request_id, step.position, position, cache.first(step.layer), out)
        session.steps += 1
        if (
            position > step.position
        ):  # a step that only attends changes nothing, and is computed again when it is sent again
            self._answers.keep(session.id, step.layer, answer)
        return answer

    # -- the event loop ----------------------------------------------------------------------------------------------

    def _is_brief(self, step: Step) -> bool:
        """Whether to wake the engine's thread, which waits, would take longer than the step itself."""
        cache, form = step.cache, step.form
        if cache.backend != "cpu":
            return False
        token_bytes = 2 * cache.num_kv_heads * cache.head_dim * cache.dtype.itemsize
        tokens = min(step.position, cache.layout.window) + form.tokens
        return not self._batch_wait and self._backlog.is_small(step) and tokens * token_bytes <= _BRIEF_BYTES

    def _resolve_call(self, done: asyncio.Future[Any], outcome: object) -> None:
        self._calls -= 1
        resolve(done, outcome)

    def _deliver(self, outcomes: list[tuple[Step, Outcome]]) -> None:
        for step, outcome in outcomes:
            self._steps.give_back(step.session.owner, 1)
            self._bytes.give_back(step.session.owner, len(step.payload))
            step.session.end_step()
            step.settle(outcome)


def resolve(future: asyncio.Future[Any], outcome: object) -> None:
    """Give a future its result or exception, unless it was cancelled: then nobody waits for it any more."""
    if future.done():
        return
    if isinstance(outcome, Exception):
        future.set_exception(outcome)
    else:
        future.set_result(outcome)

"""An event loop whose order is drawn from a seed: what comes from outside comes whenever it could.

asyncio runs callbacks in the order in which they became ready, and so does this loop: that order is never drawn. Drawn
is when something else moves: a thread to its next step, what it has handed on to the loop, a message to where it goes,
the clock to the next timer. Each source keeps its own order, and each kind of them has a pace, so that in one schedule
the disk is slow and in another one the network. Threads are real ones of which one runs at a time, up to where they
wait, hand something on or sync a file. Time stands still until the clock is drawn: nothing ever sleeps.
"""

from __future__ import annotations

import asyncio
import contextvars
import heapq
import itertools
import os
import queue
import random
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from numbaflash_service import backlog, engine, memory, servicer, sessions

# How often a source is chosen beside another one: drawn for each when it is first met.
PACES = [0.02, 0.1, 0.5, 1.0, 4.0]
CLOCK_PACE = 0.01
# More turns, or seconds, than any schedule takes that comes to an end.
MOST_TURNS = 200_000
MOST_SECONDS = 10_000.0

# What the wall clock says when the loop's is 0.
EPOCH = 1.7e9

# The process that a task or thread belongs to.
HOME: contextvars.ContextVar[Process | None] = contextvars.ContextVar("HOME", default=None)


class HangError(AssertionError):
    """Nothing can move any more, or nothing comes of what moves."""


class Process:
    """Tasks and threads that end together."""

    def __init__(self) -> None:
        self.tasks: set[asyncio.Task[Any]] = set()
        self.threads: list[Thread] = []
        self.context = contextvars.copy_context()
        self.context.run(HOME.set, self)


class Lane:
    """What comes from one source, in its order."""

    def __init__(self, loop: Loop, kind: str) -> None:
        self._loop = loop
        self.pace = loop.pace(kind)
        self.waiting: deque[asyncio.Handle] = deque()

    def put(self, callback: Callable[..., object], *args: Any, context: contextvars.Context | None = None) -> None:
        if not self.waiting:
            self._loop.lanes.append(self)
        self.waiting.append(asyncio.Handle(callback, args, self._loop, context))

    def arrive(self) -> None:
        handle = self.waiting.popleft()
        if not self.waiting:
            self._loop.lanes.remove(self)
        self._loop.ready.append(handle)


class Thread:
    """In the place of `threading.Thread`: goes when the loop lets it, up to its next `park`."""

    def __init__(self, loop: Loop, target: Callable[[], object], kind: str) -> None:
        self._loop = loop
        self._target = target
        self._turn = threading.Semaphore(0)
        self._may_go: Callable[[], bool] | None = None
        self._process = HOME.get()
        self._real = threading.Thread(target=self._run, name=f"simulated-{kind}", daemon=True)
        self.pace = loop.pace(kind)
        self.lane = Lane(loop, kind)
        self.ended = False

    def start(self) -> None:
        self._loop.threads.append(self)
        if self._process:
            self._process.threads.append(self)
        self._real.start()

    def join(self) -> None:
        """Called on another thread of the loop's."""
        self._loop.park(lambda: self.ended)

    def can_go(self) -> bool:
        return self._may_go is None or self._may_go()

    def go(self) -> None:
        """Called by the loop."""
        self._loop.running = self
        self._turn.release()
        self._loop.turn.acquire()
        self._loop.running = None

    def park(self, may_go: Callable[[], bool] | None = None) -> None:
        """Called by the thread itself."""
        self._may_go = may_go
        if not self._loop.abandoned:
            self._loop.turn.release()
            self._turn.acquire()
        if self._loop.abandoned:
            raise SystemExit

    def abandon(self) -> None:
        self._turn.release()
        self._real.join()

    def _run(self) -> None:
        self._turn.acquire()
        try:
            if not self._loop.abandoned:
                self._target()
        except Exception as error:  # whatever it is: nobody but the schedule's end looks for it
            self._loop.faults.append(f"a thread ended with {error!r}")
        finally:
            self.ended = True
            self._loop.threads.remove(self)
            self._loop.turn.release()


class Queue:
    """In the place of `queue.SimpleQueue`."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._items: deque[Any] = deque()

    def put(self, item: Any) -> None:
        self._items.append(item)

    def get(self) -> Any:
        self._loop.park(lambda: bool(self._items))
        return self._items.popleft()

    def get_nowait(self) -> Any:
        if not self._items and self._loop.running and self._loop.random.random() < 0.25:
            self._loop.park()
        if not self._items:
            raise queue.Empty
        return self._items.popleft()

    def empty(self) -> bool:
        return not self._items


class Loop(asyncio.AbstractEventLoop):
    """See above.

    Attributes:
        random: What everything is drawn from.
        ready: Callbacks, in the order in which they run.
        lanes: Those from which something can come.
        threads: Those that have not ended.
        running: The thread that does; None: the loop itself.
        faults: What went wrong where no test sees it.
    """

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.ready: deque[asyncio.Handle] = deque()
        self.lanes: list[Lane] = []
        self.threads: list[Thread] = []
        self.running: Thread | None = None
        self.turn = threading.Semaphore(0)
        self.abandoned = False
        self.faults: list[str] = []
        self.turns = 0
        self._now = 1000.0
        self._timers: list[tuple[float, int, asyncio.TimerHandle]] = []
        self._numbers = itertools.count()
        self._paces: dict[str, float] = {}
        self._tasks: set[asyncio.Task[Any]] = set()

    # -- what is drawn -----------------------------------------------------------------------------------------------

    def pace(self, kind: str) -> float:
        if kind not in self._paces:
            self._paces[kind] = self.random.choice(PACES)
        return self._paces[kind]

    def run_until_complete(self, coroutine: Any) -> Any:
        main = self.create_task(coroutine)
        asyncio._set_running_loop(self)
        try:
            while not main.done():
                self._take_turn()
        finally:
            asyncio._set_running_loop(None)
        return main.result()

    def _take_turn(self) -> None:
        self.turns += 1
        moves: list[Callable[[], None]] = [lane.arrive for lane in self.lanes]
        paces = [lane.pace for lane in self.lanes]
        for thread in self.threads:
            if thread.can_go():
                moves.append(thread.go)
                paces.append(thread.pace)
        if self.ready:
            moves.append(self._run_next)
            paces.append(self.pace("callbacks"))
        if self._timers:
            moves.append(self._move_the_clock)
            paces.append(CLOCK_PACE)
        if not moves or self.turns > MOST_TURNS or self._now > MOST_SECONDS:
            waiting = "\n".join(sorted(str(task) for task in self._tasks))
            raise HangError(f"after {self.turns} turns, at {self._now:.3f}, there wait\n{waiting}")
        (move,) = self.random.choices(moves, paces)
        move()

    def _run_next(self) -> None:
        handle = self.ready.popleft()
        if not handle.cancelled():
            handle._run()

    def _move_the_clock(self) -> None:
        self._now = max(self._now, self._timers[0][0])
        while self._timers and self._timers[0][0] <= self._now:
            self.ready.append(heapq.heappop(self._timers)[2])

    # -- asyncio's interface -----------------------------------------------------------------------------------------

    def time(self) -> float:
        return self._now

    def call_soon(self, callback: Any, *args: Any, context: contextvars.Context | None = None) -> asyncio.Handle:
        handle = asyncio.Handle(callback, args, self, context)
        self.ready.append(handle)
        return handle

    def call_at(
        self, when: float, callback: Any, *args: Any, context: contextvars.Context | None = None
    ) -> asyncio.TimerHandle:
        handle = asyncio.TimerHandle(when, callback, args, self, context)
        heapq.heappush(self._timers, (when, next(self._numbers), handle))
        return handle

    def call_later(
        self, delay: float, callback: Any, *args: Any, context: contextvars.Context | None = None
    ) -> asyncio.TimerHandle:
        return self.call_at(self._now + delay, callback, *args, context=context)

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        self._timers = [timer for timer in self._timers if timer[2] is not handle]
        heapq.heapify(self._timers)

    def call_soon_threadsafe(self, callback: Any, *args: Any, context: contextvars.Context | None = None) -> None:
        """Hand something to the loop, which takes it at some later time; the thread, too, goes on when it can."""
        assert self.running
        self.running.lane.put(callback, *args, context=context)
        self.running.park()

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=self)

    def create_task(self, coroutine: Any, *, name: str | None = None, context: Any = None) -> asyncio.Task[Any]:
        task = asyncio.Task(coroutine, loop=self, name=name, context=context)
        process = context.get(HOME) if context else HOME.get()
        for tasks in (self._tasks, *([process.tasks] if process else [])):
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        return task

    def run_in_executor(self, executor: Any, function: Callable[..., Any], *args: Any) -> asyncio.Future[Any]:
        assert executor is None
        future = self.create_future()

        def run() -> None:
            try:
                result, settle = function(*args), future.set_result
            except Exception as error:  # whatever it is goes to whoever waits, as from any executor
                result, settle = error, future.set_exception
            self.call_soon_threadsafe(lambda: None if future.done() else settle(result))

        Thread(self, run, "disk").start()
        return future

    def get_debug(self) -> bool:
        return False

    def is_running(self) -> bool:
        return True

    def is_closed(self) -> bool:
        return False

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        self.faults.append(f"{context['message']}: {context.get('exception')!r} {context.get('task', '')}")

    # -- threads -----------------------------------------------------------------------------------------------------

    def park(self, may_go: Callable[[], bool] | None = None) -> None:
        """Let others go before the running thread does."""
        assert self.running
        self.running.park(may_go)

    def sync(self, _: int) -> None:
        """In the place of `os.fsync`."""
        if self.running:
            self.running.park()

    def close(self) -> None:
        """End threads that nobody lets go any more."""
        self.abandoned = True
        for thread in list(self.threads):
            thread.abandon()


@contextmanager
def simulated(seed: int) -> Iterator[Loop]:
    """A loop whose threads and clock are those of the service's modules, too."""
    loop, numbers = Loop(seed), itertools.count()
    with pytest.MonkeyPatch.context() as patch:
        real = engine.time
        clock = SimpleNamespace(
            monotonic=loop.time,
            time=lambda: EPOCH + loop.time(),
            perf_counter=real.perf_counter,
            perf_counter_ns=real.perf_counter_ns,
        )
        for module in (engine, memory, servicer, sessions):
            patch.setattr(module, "time", clock)
        patch.setattr(sessions, "secrets", SimpleNamespace(token_hex=lambda _: f"{next(numbers):032x}"))
        patch.setattr(engine, "threading", SimpleNamespace(Thread=lambda target, **_: Thread(loop, target, "engine")))
        patch.setattr(backlog, "queue", SimpleNamespace(SimpleQueue=lambda: Queue(loop), Empty=queue.Empty))
        patch.setattr(os, "fsync", loop.sync)
        try:
            yield loop
        finally:
            loop.close()

"""Running a kernel on all cores: the calling thread works, and a few waiting threads join in.

Work items are taken from a counter in the task itself, so whoever is late finds nothing to do, and a call returns when
its items are done, whether or not the helpers have woken up. Any number of threads may call at once; each call makes
progress by its own thread.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import os
import threading
import time
from queue import SimpleQueue
from typing import Any

import numba
import numpy as np

from .jit import entry_point
from .openmp import team_here
from .record import address_of_array
from .standby import BOX_BYTES, LEAST_SCRATCH, STAND_BY_NS, count_asleep, stand_by, work_together
from .task import Task

__all__ = ["run", "start_helpers", "thread_count"]

_MOST_HELPERS = 255
_SOON_NS = 2 * STAND_BY_NS  # from the end of a task until a helper has woken up for the next

_current_cpu: Any = getattr(ctypes.CDLL(None), "sched_getcpu", None) if hasattr(os, "sched_setaffinity") else None


def thread_count() -> int:
    """Threads that a call may use: the CPUs that this process may run on, or NUMBA_NUM_THREADS."""
    count: int = numba.config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]  # Numba sets it by its name
    return min(count, _MOST_HELPERS + 1)


def run(kernel: Any, task: Task, scratch_bytes: int, helpers: int, keep_alive: tuple[Any, ...]) -> None:
    """Run `kernel` on a task until all its items are done.

    Args:
        kernel: Takes items until there are none.
        task: What to do.
        scratch_bytes: Memory that the kernel wants for each thread.
        helpers: Threads that may join in.
        keep_alive: What the addresses in the task point into.
    """
    team = team_here()
    threads = 1 + helpers if team is None else min(1 + helpers, team.count())
    with _exit:
        if threads == 1:
            kernel(task.address, _scratch.of(scratch_bytes))
        elif team is not None:
            room = -(-scratch_bytes // 64) * 64
            team.run(kernel, task, threads, _scratch.of(threads * room), room)
        else:
            _helpers.run((kernel, task, keep_alive), _scratch.of(scratch_bytes), scratch_bytes, helpers)


def start_helpers() -> None:
    """Start all threads that may ever join in, on the CPUs of the calling thread, rather than when they are needed."""
    _helpers.start(thread_count() - 1)


class _Exit:
    """The interpreter's exit, which unmaps what is compiled: it waits for kernels that daemon threads run.

    As a context manager, what a kernel runs in: in such a thread none begins then.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running = 0
        self._begun = False

    def __enter__(self) -> None:
        if threading.current_thread().daemon:  # others have ended before, and this one, if it is the main thread, waits
            self._count(1)
            if self._begun:
                self._count(-1)
                threading.Event().wait()  # for good: the thread ends with the process

    def __exit__(self, *_: object) -> None:
        if threading.current_thread().daemon:
            self._count(-1)

    def begin(self) -> None:
        self._begun = True
        while self._running:
            time.sleep(0.001)

    def _count(self, more: int) -> None:
        with self._lock:
            self._running += more


_Job = tuple[Any, Task, tuple[Any, ...]]


class _Helpers:
    """Threads that wait for tasks; started when first needed, they end with the process.

    They run on all CPUs but the caller's. The kernel of a virtual machine takes a CPU that has slept for some 10 ms for
    one that its host gave to somebody else, and wakes a helper on the caller's CPU instead, where the two take turns:
    a decode of 4 ms took 7 after a pause of 50 ms.

    They sleep, but where one task soon follows another: there they stand by for the next, as threads of OpenMP do for a
    hundred times as long. Between the layers of a model, whose products of matrices want all CPUs, nobody stands by.
    """

    def __init__(self) -> None:
        self._jobs: SimpleQueue[_Job] = SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._listing = threading.Condition()
        self._cpus: set[int] = set()
        self._left: int | None = None  # to the caller
        self._scratch_bytes = LEAST_SCRATCH  # the most that any task has wanted
        self._boxes = np.zeros(_MOST_HELPERS * BOX_BYTES, np.uint8)

    def run(self, job: _Job, scratch: int, scratch_bytes: int, wanted: int) -> None:
        """Do a job, of which those who wake up late have references, with up to `wanted` helpers."""
        if len(self._threads) < wanted:
            with contextlib.suppress(RuntimeError):  # the system has no more threads, or Python exits: fewer will do
                self.start(wanted)
        if _current_cpu and (cpu := _current_cpu()) != self._left:
            self._leave(cpu)
        kernel, task, _ = job
        self._scratch_bytes = max(self._scratch_bytes, scratch_bytes)
        task.set_from("entry", entry_point(kernel), scratch_bytes)
        boxes = address_of_array(self._boxes), len(self._threads), wanted
        if asleep := count_asleep(*boxes, scratch_bytes):
            task["next_item"] = task["items"]  # those who are woken up find none before all is ready
            for _ in range(asleep):
                self._jobs.put(job)
        work_together(task.address, scratch, *boxes)

    def start(self, count: int) -> None:
        """See that there are `count` helpers.

        Raises:
            RuntimeError: The system has no more threads.
        """
        with self._listing:
            while (number := len(self._threads)) < count:
                threading.Thread(target=self._work, name=f"numbaflash-{number}", daemon=True).start()
                while len(self._threads) == number:
                    self._listing.wait()
            if _current_cpu:
                self._cpus, self._left = os.sched_getaffinity(0), None  # threads inherit it

    def _leave(self, cpu: int) -> None:
        self._left = cpu
        if others := self._cpus - {cpu}:
            with contextlib.suppress(OSError):  # where a sandbox forbids it, all is as slow as it was
                for thread in self._threads:
                    assert thread.native_id
                    os.sched_setaffinity(thread.native_id, others)

    def _work(self) -> None:
        with self._listing:  # by itself: whoever starts it may be interrupted
            number = len(self._threads)
            self._threads.append(threading.current_thread())
            self._listing.notify_all()
        box = address_of_array(self._boxes) + number * BOX_BYTES
        idle_since = 0
        while True:
            kernel, task, keep_alive = self._jobs.get()
            is_soon = 0 <= time.monotonic_ns() - idle_since < _SOON_NS
            with _exit:
                with contextlib.suppress(MemoryError):  # then its caller does it
                    kernel(task.address, _scratch.of(max(self._scratch_bytes, task["scratch_bytes"])))
                del kernel, task, keep_alive
                idle_since = max(idle_since, time.monotonic_ns())
                if is_soon:
                    idle_since = stand_by(box, _scratch.address, _scratch.nbytes)


class _Scratch(threading.local):
    """A thread's scratch memory, aligned to a cache line and kept for the next call."""

    address = nbytes = 0

    def of(self, nbytes: int) -> int:
        """Return the address of so many bytes, or more."""
        if self.nbytes < nbytes:
            self._block = np.empty(nbytes + 64, np.uint8)
            self.address, self.nbytes = (address_of_array(self._block) + 63) // 64 * 64, nbytes
        return self.address


_helpers = _Helpers()
_exit = _Exit()
_scratch = _Scratch()


def _forget_threads() -> None:
    """A forked child has none of its parent's threads."""
    global _helpers, _exit
    _helpers, _exit = _Helpers(), _Exit()


os.register_at_fork(after_in_child=_forget_threads)
atexit.register(lambda: _exit.begin())

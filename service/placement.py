"""Which CPU the event loop runs on."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

from numbaflash.cpu.pool import start_helpers

_POLLER: Final = "_poll_wrapper"  # what grpc.aio calls the function of that thread, which Python names it after


def share_a_cpu() -> None:
    """Keep the event loop and the thread that waits on sockets for it on one CPU; other threads may run on all.

    With every message that thread wakes the loop, and with every answer the loop wakes that thread. From one CPU to
    another this takes 35 us on a virtual machine, where the other has fallen asleep, and 4 us on one: a step of 32 KiB
    takes 0.4 ms there and back, not 0.5, and a single call 0.7, not 0.9 (benchmarks/service.py).

    To be called on the loop, when its server has started. Threads inherit their CPUs from those that start them: so the
    kernels' are started before. Does nothing where the system has no such call.
    """
    pollers = [thread.native_id for thread in threading.enumerate() if _POLLER in thread.name and thread.native_id]
    if not pollers or not hasattr(os, "sched_setaffinity"):
        return
    start_helpers()
    cpus = os.sched_getaffinity(0)
    # Of asyncio.to_thread: they read and write files.
    threads = ThreadPoolExecutor(initializer=os.sched_setaffinity, initargs=(0, cpus))
    asyncio.get_running_loop().set_default_executor(threads)
    with contextlib.suppress(OSError):  # where a sandbox forbids it, all is as slow as it was
        cpu = _current_cpu()
        for thread in (*pollers, 0):
            os.sched_setaffinity(thread, {cpu})


def _current_cpu() -> int:
    fields = Path("/proc/thread-self/stat").read_text().rpartition(")")[2].split()
    return int(fields[36])  # proc_pid_stat(5) counts from 1, and two stand before the bracket

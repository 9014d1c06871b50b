"""Which CPUs the threads of `numbaflash serve` run on."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest

PROGRAM = """
import asyncio, os, threading
import grpc
import numpy as np
import numbaflash
from numbaflash_service.config import load
from numbaflash_service.placement import share_a_cpu
from numbaflash_service.server import Server

def is_helper(name):
    return name.removeprefix("numbaflash-").isdigit()

async def main():
    every = os.sched_getaffinity(0)
    server = Server(load(listen=["127.0.0.1:0"], backend="cpu"))
    await server.start()
    share_a_cpu()
    cpus = {thread.name: os.sched_getaffinity(thread.native_id) for thread in threading.enumerate()}
    cpus["to_thread"] = await asyncio.to_thread(os.sched_getaffinity, 0)
    zeros = np.zeros((4096, 1, 8), np.float16)
    numbaflash.attention(zeros[None], zeros[None], zeros[None], backend="cpu")  # from here, too, on all CPUs
    helpers = [thread for thread in threading.enumerate() if is_helper(thread.name)]
    together = [cpus.pop("MainThread"), *(cpus.pop(name) for name in list(cpus) if "_poll_wrapper" in name)]
    assert len(together) == 2 and together[0] == together[1] and len(together[0]) == 1, together
    assert all(found == every for name, found in cpus.items() if not is_helper(name)), cpus
    assert "numbaflash-engine" in cpus
    assert helpers
    assert all(os.sched_getaffinity(thread.native_id) == every - together[0] for thread in helpers), helpers
    await server.stop()

asyncio.run(main())
"""


pytestmark = pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) == 1,
    reason="there is one CPU, or the system does not say which a thread may use",
)


@pytest.mark.parametrize(("flags", "pinned"), [([], True), (["--no-pin-event-loop"], False)])
def test_a_server_keeps_its_loop_on_one_cpu_unless_told_not_to(serve: Any, flags: list[str], pinned: bool) -> None:
    process, _ = serve("--listen", "127.0.0.1:0", *flags)
    cpus = os.sched_getaffinity(process.pid)
    assert len(cpus) == 1 if pinned else cpus == os.sched_getaffinity(0)


def test_the_event_loop_and_its_poller_share_a_cpu_and_all_others_have_all() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr

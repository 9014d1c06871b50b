"""What a step of decode costs the host, from `attention_batch` down to a launch: microseconds, medians.

The device is given little to do, so that nothing waits for it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

import numbaflash
from numbaflash.cuda import paged
from numbaflash.cuda.copy_rows import CopyRows
from numbaflash.cuda.device import EmulatedDevice
from numbaflash.cuda.solve import Queue

from .ceilings import place, torch_on
from .decode import caches_of, without_replays
from .parts import Row

_LAUNCHES = 8


def host_times(emulated: bool) -> Iterator[Row]:
    """Yield times of a launch by itself, and of steps with 8 KV heads of 128 in each of its floors."""
    yield from _launches(emulated)
    torch = torch_on(emulated)
    for batch in (2,) if emulated else (1, 8, 64):
        caches = caches_of(torch, batch, 40 if emulated else 1024, 8, emulated)
        q, k, v = (
            torch.randn((batch, 1, heads, 128), device=place(emulated)).to(torch.float16) for heads in (32, 8, 8)
        )

        def step(_number: int, arrays: tuple[Any, ...] = (caches, 0, q, k, v)) -> Any:
            return numbaflash.attention_batch(*arrays)

        for graphs, call in ((True, step), (False, without_replays(step, emulated))):
            inner: list[float] = []
            with _timed(inner):
                outer = _host_seconds(call, emulated)
            yield {
                "what": "attention_batch",
                "batch": batch,
                "graphs": graphs and not emulated,
                "host_us": 1e6 * outer,
                "of_it_paged_step_us": 1e6 * statistics.median(inner),
            }


def _launches(emulated: bool) -> Iterator[Row]:
    """Launch a small kernel some times over: by the queue, by the device, as a graph."""
    if emulated:
        device: Any = EmulatedDevice()
    else:
        from numbaflash.cuda.gpu import cuda_device

        device = cuda_device(0)
    with device.current():
        queue = Queue(device, device.default_stream)
        source, target = (queue.empty((1, 1, 1, 8), np.dtype(np.float16)) for _ in range(2))
        device.fill(source.address, 16, 0)
        kernel = CopyRows(2)
        launch = (kernel, kernel.grid(source), kernel.arguments(source, target))

        def one_by_one(_number: int) -> None:
            for _ in range(_LAUNCHES):
                queue.launch(*launch)

        def as_a_graph(_number: int) -> None:
            queue.launch_all([launch] * _LAUNCHES)

        for what, call in (("launch", one_by_one), ("launch, 8 as a graph", as_a_graph)):
            seconds = _host_seconds(call, emulated)
            device.synchronize()
            yield {"what": what, "host_us": 1e6 * seconds / _LAUNCHES}


def _host_seconds(call: Callable[[int], Any], emulated: bool) -> float:
    times = []
    for number in range(3 if emulated else 60):
        start = time.perf_counter()
        call(number)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


@contextmanager
def _timed(seconds: list[float]) -> Iterator[None]:
    """Keep how long each `paged.step` takes."""
    step = paged.step

    def watched(*arguments: Any) -> None:
        start = time.perf_counter()
        step(*arguments)
        seconds.append(time.perf_counter() - start)

    paged.step = watched
    try:
        yield
    finally:
        paged.step = step

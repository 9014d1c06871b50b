"""How fast the emulator runs kernels, every check on: `python benchmarks/emulator.py [--json]`.

A row is one kernel; its time is the median of several launches after the first, which compiles and translates. The peer
is Numba's CUDA simulator, in a process of its own, for the kernels that it can run: it has no inline PTX, so the
attention on tensor cores is beyond it. It gets fewer launches, since it is slow.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from typing import Any

import numpy as np
from numba import cuda, float32
from rich.console import Console
from rich.table import Table

_SIMULATED = "NUMBA_ENABLE_CUDASIM"


@cuda.jit
def vector_add(a, b, out):
    """Adds 16,384 pairs of numbers, one a thread."""
    i = cuda.grid(1)
    if i < out.size:
        out[i] = a[i] + b[i]


@cuda.jit
def block_sums(x, out):
    """Adds up 64 x 256 numbers: a tree in shared memory, then an atomic a block."""
    buffer = cuda.shared.array(256, float32)
    t = cuda.threadIdx.x
    buffer[t] = x[cuda.grid(1)]
    cuda.syncthreads()
    step = 128
    while step > 0:
        if t < step:
            buffer[t] += buffer[t + step]
        cuda.syncthreads()
        step //= 2
    if t == 0:
        cuda.atomic.add(out, 0, buffer[0])


def _random(*shape: int, dtype: str = "f4") -> Any:
    return np.random.default_rng(0).standard_normal(shape).astype(dtype)


def _plain(launch: Callable[..., Any], kernel: Any, *arrays: Any) -> Callable[[], Any]:
    """A launch of 64 blocks of 256 threads."""
    return lambda: launch(kernel, 64, 256, *arrays)


def _kernels(launch: Callable[..., Any]) -> dict[str, Callable[[], Any]]:
    """The kernels that the simulator can run as well."""
    x = _random(16384)
    out, total = np.zeros_like(x), np.zeros(1, "f4")
    return {
        "vector add, 16k threads": _plain(launch, vector_add, x, x, out),
        "reduction, 64 x 256": _plain(launch, block_sums, x, total),
    }


def _attention() -> Callable[[], Any]:
    """FlashAttention-2 on tensor cores: 2 x 4 heads x 300 x 333 x 128, float16."""
    from numbaflash.cuda.arguments import Arrays, Strided
    from numbaflash.cuda.build import build
    from numbaflash.cuda.device import EmulatedDevice
    from numbaflash.cuda.flash_v2 import FlashV2
    from numbaflash.cuda.shapes import tile_shape
    from numbaflash.cuda.variant import Variant
    from numbaflash.problem import describe

    device = EmulatedDevice()
    arrays = {name: _random(2, n, 4, 128, dtype="f2") for name, n in (("q", 300), ("k", 333), ("v", 333), ("out", 300))}
    buffers = {name: device.allocate(x.nbytes) for name, x in arrays.items()}
    for name, x in arrays.items():
        device.copy_in(buffers[name].address, x)
    problem = describe(arrays["q"], arrays["k"], arrays["v"])
    flash = FlashV2(Variant(128, 128, "float16"), tile_shape(128, 128, (8, 0)))
    kernel = device.load(build(flash, (8, 0)).ptx, max_shared=flash.shared_bytes)
    placed = Arrays(*(Strided(buffers[name].address, x.strides) for name, x in arrays.items()))
    scalars = flash.arguments(problem, placed)
    grid = flash.grid(problem)

    def run() -> int:
        kernel.launch(grid, flash.threads, *scalars, shared=flash.shared_bytes)
        return len(buffers)  # they live as long as they are referenced

    return run


def _median(run: Callable[[], Any], rounds: int) -> float:
    """Median seconds of `rounds` calls, after one that is not counted."""
    run()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _simulate() -> None:
    """In the simulator's process: prints seconds by kernel."""

    def launch(kernel: Any, grid: int, block: int, *arrays: Any) -> None:
        kernel[grid, block](*arrays)

    print(json.dumps({name: _median(run, 1) for name, run in _kernels(launch).items()}))


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print figures for a machine")
    options = parser.parse_args()
    from numbaflash import emulator

    seconds = {name: _median(run, 20) for name, run in _kernels(emulator.launch).items()}
    seconds["attention on tensor cores, 2 x 4 x 300 x 333 x 128"] = _median(_attention(), 5)
    peer = subprocess.run(
        [sys.executable, __file__], env={**os.environ, _SIMULATED: "1"}, check=True, capture_output=True, text=True
    )
    simulated = json.loads(peer.stdout)
    rows = [
        {"kernel": name, "emulator_ms": own * 1e3, "simulator_ms": simulated[name] * 1e3 if name in simulated else None}
        for name, own in seconds.items()
    ]
    if options.json:
        print(json.dumps({"date": str(date.today()), "machine": platform.processor(), "rows": rows}))
        return
    table = Table(
        "kernel", "emulator, ms", "CUDA simulator, ms", "ratio", title=f"{date.today()}, {os.cpu_count()} cores"
    )
    for row in rows:
        own, other = row["emulator_ms"], row["simulator_ms"]
        peer_cells = ("-", "-") if other is None else (f"{other:,.0f}", f"{other / own:,.0f}")
        table.add_row(row["kernel"], f"{own:,.1f}", *peer_cells)
    Console().print(table)


if __name__ == "__main__":
    if os.environ.get(_SIMULATED) == "1":
        _simulate()
    else:
        main()

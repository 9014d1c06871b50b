"""One line of ncu for each kernel: how long, how busy the tensor cores, how many bytes of device memory."""

from __future__ import annotations

import csv
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from numbaflash.cuda.tools import find_tool

from .parts import Row

_ROOT = Path(__file__).parents[2]
_METRICS = {
    "gpu__time_duration.sum": "time",
    "dram__bytes.sum": "device_memory",
    "launch__registers_per_thread": "registers",
    "sm__inst_executed_pipe_tensor.sum": "mmas",
    "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_elapsed": "tensor_cores_busy",
    "smsp__issue_active.avg.pct_of_peak_sustained_active": "issue_slots_busy",
    "l1tex__data_bank_conflicts_pipe_lsu_mem_shared.sum": "bank_conflicts",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "warps_resident",
}
"""ncu's metric -> our column."""
_EVERYWHERE = 3
"""As many of them every GPU has; were one of the others unknown to this one, ncu would profile nothing."""


def profile_kernels(emulated: bool) -> Iterator[Row]:
    """Yield what ncu counts in one launch of each kernel; on the emulator the launches alone."""
    program = [sys.executable, "-m", f"{__package__}.small", "emulated" if emulated else "cuda", "--one-large"]
    if emulated:
        subprocess.run(program, cwd=_ROOT, check=True)
        yield {"kernel": "all, on the emulator"}
        return
    tool = find_tool("ncu")
    if tool is None:
        raise RuntimeError("ncu is not there")
    for metrics in (list(_METRICS), list(_METRICS)[:_EVERYWHERE]):
        options = ["--clock-control", "none", "--csv", "--page", "raw", "--metrics", ",".join(metrics)]
        done = subprocess.run([tool, *options, *program], cwd=_ROOT, capture_output=True, text=True, check=False)
        print(done.stdout, done.stderr)
        if rows := list(rows_of(done.stdout)):
            yield from rows
            return
    raise RuntimeError(f"ncu profiled nothing (exit status {done.returncode})")


def rows_of(printed: str) -> Iterator[Row]:
    """Read ncu's CSV: a line of names, one of units, then one for each launch; the program may print before it."""
    table = csv.reader(line for line in printed.splitlines() if line.startswith('"'))
    names, units = next(table, []), next(table, [])
    for values in table:
        launch = dict(zip(names, zip(values, units, strict=False), strict=False))
        row: Row = {"kernel": launch["Kernel Name"][0]}
        for metric, column in _METRICS.items():
            value, unit = launch.get(metric, ("", ""))
            row[column] = f"{value} {unit}".strip()
        yield row

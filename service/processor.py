"""The names of what computes: this machine's processor, or its GPU."""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path

from numbaflash.cuda.driver import find_usable_gpu


def device_name(backend: str) -> str:
    """Return the name of what a backend computes on."""
    if backend == "cpu":
        return processor_name()
    if backend == "emulated":
        return "emulator"
    gpu, _ = find_usable_gpu()
    return backend if gpu is None else gpu.name


@cache
def processor_name() -> str:
    """Return the name, or the architecture where the system gives none."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())

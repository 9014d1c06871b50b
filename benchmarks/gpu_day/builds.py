"""Builds the kernels that later parts time, several at once, and says how long each took."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed

from numbaflash.cuda.build import Buildable, build
from numbaflash.cuda.device import EmulatedDevice
from numbaflash.cuda.driver import find_usable_gpu
from numbaflash.cuda.flash_v1 import FlashV1
from numbaflash.cuda.flash_v2 import FlashV2
from numbaflash.cuda.scoring import Scoring
from numbaflash.cuda.standard import StandardScores, StandardSoftmax, StandardValues
from numbaflash.cuda.variant import Variant
from numbaflash.user_cache import cache_directory

from .parts import Row


def build_kernels(emulated: bool) -> Iterator[Row]:
    """Yield a row for each kernel; one that another run left in the cache takes no time."""
    gpu, _ = find_usable_gpu()
    cc = EmulatedDevice().compute_capability if emulated or gpu is None else gpu.compute_capability
    kernels = list(_kernels(emulated, cc))
    with ProcessPoolExecutor(min(len(kernels), os.cpu_count() or 1)) as pool:
        waiting = {pool.submit(_timed_build, kernel, cc): kernel for kernel in kernels}
        for done in as_completed(waiting):
            yield {"kernel": _name(waiting[done]), "target": f"sm_{cc[0]}{cc[1]}", **done.result()}


def _kernels(emulated: bool, cc: tuple[int, int]) -> Iterator[Buildable]:
    for head_dim in (64,) if emulated else (64, 128):
        for dtype in ("float16",) if emulated else ("float16", "bfloat16"):
            for causal in (False, True):
                yield FlashV2.of(Variant(head_dim, head_dim, dtype, Scoring(right=causal)), cc)
        if not emulated:
            plain = Variant(head_dim, head_dim, "float16")
            yield FlashV1.of(plain)
            yield from (kernel.of(plain) for kernel in (StandardScores, StandardSoftmax, StandardValues))


def _name(kernel: Buildable) -> str:
    variant = getattr(kernel, "variant", None)
    if variant is None:
        return type(kernel).__name__
    causal = ", causal" if variant.scoring.right else ""
    return f"{type(kernel).__name__}, head_dim {variant.head_dim}, {variant.dtype}{causal}"


def _timed_build(kernel: Buildable, cc: tuple[int, int]) -> Row:
    before = set(cache_directory().glob("*"))
    start = time.perf_counter()
    built = build(kernel, cc)
    seconds = time.perf_counter() - start
    return {
        "seconds": seconds,
        "cold": set(cache_directory().glob("*")) != before,
        "registers": built.usage.registers,
        "spill_bytes": built.usage.spill_bytes,
    }

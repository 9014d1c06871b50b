"""Builds the kernels of the parts that have no time for it, several at once, and says how long each took."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from multiprocessing import get_context
from typing import Any

from numbaflash.cuda.build import Buildable, build
from numbaflash.cuda.decode_variant import DecodeVariant
from numbaflash.cuda.device import EmulatedDevice
from numbaflash.cuda.driver import find_usable_gpu
from numbaflash.cuda.finish_step import FinishStep
from numbaflash.cuda.flash_v1 import FlashV1
from numbaflash.cuda.flash_v2 import FlashV2
from numbaflash.cuda.scoring import Scoring
from numbaflash.cuda.standard import StandardScores, StandardSoftmax, StandardValues
from numbaflash.cuda.tensor_decode import TensorDecode
from numbaflash.cuda.variant import Variant
from numbaflash.cuda.vector_decode import VectorDecode
from numbaflash.problem import describe

from .parts import Row
from .small import problems


def build_kernels(emulated: bool) -> Iterator[Row]:
    """Yield a row for each kernel; one that another run left in the cache takes no time."""
    gpu, _ = find_usable_gpu()
    cc = EmulatedDevice().compute_capability if emulated or gpu is None else gpu.compute_capability
    kernels = list(_kernels(emulated, cc))
    # Spawned, for CUDA does not survive a fork.
    with ProcessPoolExecutor(min(len(kernels), os.cpu_count() or 1), get_context("spawn")) as pool:
        waiting = {pool.submit(_timed_build, kernel, cc): kernel for kernel in kernels}
        for done in as_completed(waiting):
            yield {"kernel": _name(waiting[done]), "target": f"sm_{cc[0]}{cc[1]}", **done.result()}


def _kernels(emulated: bool, cc: tuple[int, int]) -> Iterator[Buildable]:
    if emulated:
        yield FlashV2.of(Variant(64, 64, "float16"), cc)
        return
    plain = [Variant(head_dim, head_dim, "float16") for head_dim in (64, 128)]
    for variant in plain:
        for dtype in ("float16", "bfloat16"):
            for causal in (False, True):
                yield FlashV2.of(replace(variant, dtype=dtype, scoring=Scoring(right=causal)), cc)
    small = [Variant.of(describe(*arrays, **options), lse=False) for arrays, options in problems()]
    for variant in dict.fromkeys([*plain, *small]):
        yield from (kernel.of(variant) for kernel in (FlashV1, StandardScores, StandardSoftmax, StandardValues))
    yield from (FlashV2.of(variant, cc) for variant in small if variant not in plain)
    decode = DecodeVariant(128, "float16", "float16")
    yield from (VectorDecode.of(decode, 1), TensorDecode.of(decode, 4), FinishStep(128, "float16", "float16"))


def _name(kernel: Buildable) -> str:
    variant: Any = getattr(kernel, "variant", kernel)
    dims = [f"{name} {getattr(variant, name)}" for name in ("head_dim", "value_dim") if hasattr(variant, name)]
    scoring = getattr(variant, "scoring", Scoring())
    options = "every option" if scoring.softcap else "causal" if scoring.right else "no option"
    return ", ".join([type(kernel).__name__, *dims, variant.dtype, options])


def _timed_build(kernel: Buildable, cc: tuple[int, int]) -> Row:
    start = time.perf_counter()
    built = build(kernel, cc)
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "registers": built.usage.registers, "spill_bytes": built.usage.spill_bytes}

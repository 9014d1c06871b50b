"""What a step of decode over a cache takes: its kernels, and the bytes that they read and write.

Counted on the emulator while it runs a step; no GPU is needed and none is asked.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np

from ..cuda.device import EmulatedDevice
from ..cuda.inspection import KernelFacts, ObservedLaunch, ObservedQueue, check_target, facts_of
from ..problem import check_heads, describe_scoring
from .arguments import choose_quantizer, int_in, ring_layout, storage_dtype
from .device_place import DevicePlace
from .place import CacheShape

__all__ = ["StepFacts", "inspect_step"]

_SECTOR = 32
_PAGE_SIZE = 64


@dataclass(frozen=True)
class StepFacts:
    """One step.

    Attributes:
        kernels: In the order of their launches.
        held_bytes: Of the pages that its queries see, each once.
        read_bytes: Of global memory, in whole sectors, whatever is in a cache.
        written_bytes: Likewise.
    """

    kernels: list[KernelFacts]
    held_bytes: int
    read_bytes: int
    written_bytes: int


def inspect_step(
    *,
    q_heads: int = 32,
    kv_heads: int = 8,
    head_dim: int = 128,
    tokens: int = 512,
    new_tokens: int = 1,
    dtype: str = "float16",
    kv_dtype: str | None = None,
    cc: tuple[int, int] = (8, 0),
    softcap: float = 0.0,
    alibi: bool = False,
    sinks: bool = False,
) -> StepFacts:
    """Build the kernels of a step of one cache, run it on the emulator, and say what it takes.

    Args:
        q_heads: Query heads.
        kv_heads: KV heads.
        head_dim: Of queries, keys and values.
        tokens: In the cache, whole pages of 64; all are seen.
        new_tokens: Of the step.
        dtype: Of the step, "float16", "bfloat16" or "float32".
        kv_dtype: Of the cache, as `RingKVCache` takes it; None: the step's.
        cc: Compute capability, one of `occupancy.TARGETS`.
        softcap: Cap of the scores.
        alibi: Each head has a slope.
        sinks: Each head has a sink logit.

    Raises:
        ValueError: There is no such target, cache or step.
        RuntimeError: The compilers are missing.
    """
    check_target(cc)
    check_heads(q_heads, kv_heads)
    if int_in("tokens", tokens, _PAGE_SIZE) % _PAGE_SIZE:
        raise ValueError(f"tokens must be a multiple of {_PAGE_SIZE}, got {tokens}")
    stored = storage_dtype(dtype if kv_dtype is None else kv_dtype)
    layout = ring_layout(tokens + int_in("new_tokens", new_tokens, 1), 0, _PAGE_SIZE, 0)
    place, launches = DevicePlace(EmulatedDevice(cc)), list[ObservedLaunch]()
    place.new_queue = partial(ObservedQueue, launches=launches)
    _, (layer,) = place.open(CacheShape(1, kv_heads, head_dim, layout, stored, choose_quantizer(stored, None)))
    rng = np.random.default_rng(0)
    k, v = (_random(rng, tokens, kv_heads, head_dim, dtype) for _ in range(2))
    place.append(layer, k, v, {})
    held = layer.nbytes
    launches.clear()
    q, k, v = (_random(rng, new_tokens, heads, head_dim, dtype) for heads in (q_heads, kv_heads, kv_heads))
    scoring = describe_scoring(
        batch=1,
        q_heads=q_heads,
        head_dim=head_dim,
        softcap=softcap,
        alibi_slopes=[0.1] * q_heads if alibi else None,
        sink_logits=[0.0] * q_heads if sinks else None,
    )
    place.step([layer], q, k, v, scoring, {"q": q})
    accesses = [access for launch in launches for access in launch.report.global_]
    written = sum(access.sectors for access in accesses if access.op == "store")
    return StepFacts(
        kernels=[facts_of(cc, launch) for launch in launches],
        held_bytes=held,
        read_bytes=_SECTOR * (sum(access.sectors for access in accesses) - written),
        written_bytes=_SECTOR * written,
    )


def _random(rng: np.random.Generator, tokens: int, heads: int, head_dim: int, dtype: str) -> Any:
    return rng.standard_normal((tokens, heads, head_dim), np.float32).astype(getattr(ml_dtypes, dtype, dtype))

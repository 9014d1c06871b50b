"""Sessions beside the caches in process that they must equal."""

from __future__ import annotations

from typing import Any

import numpy as np

import numbaflash
from numbaflash_service import Client

SHAPE = {"num_layers": 2, "num_kv_heads": 2, "head_dim": 64, "capacity": 700, "dtype": "float16", "rollback": 8}
# Two sessions of this shape fit into it.
KV_MEMORY = 2 << 20


def tokens(count: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Arrays for a step of one layer."""
    rng = np.random.default_rng([seed, count])
    heads = {"q": 4, "k": 2, "v": 2}
    return {name: rng.standard_normal((count, n, 64)).astype(np.float16) for name, n in heads.items()}


class Twin:
    """A session and the cache in process that it must equal."""

    def __init__(self, client: Client, **options: Any) -> None:
        self.session = client.create_session(**SHAPE, **options)
        self.cache = numbaflash.RingKVCache(**SHAPE)

    def step(self, count: int = 1, seed: int = 0) -> None:
        for layer in range(2):
            arrays = tokens(count, seed + layer)
            assert self.session.step(layer, **arrays).tobytes() == self.cache.step(layer, **arrays).tobytes()

"""What must hold of a server on a CUDA driver; `test_congruence.py` runs it on one that has the emulator behind it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings

import numbaflash
from numbaflash_service import Client

from .congruence import DEVICE_STORAGE, RINGS, check_that_a_session_is_a_cache


@pytest.fixture(scope="module")
def gpu_client(start_module_server: Any) -> Iterator[Client]:
    with Client(start_module_server(backend="cuda").target) as client:
        yield client


def test_a_server_takes_the_gpu_where_there_is_one(start_server: Any, driver: Any) -> None:
    with Client(start_server().target) as client:
        info = client.info()
        assert (info.backend, info.device) == ("cuda", "Emulated GPU")
        session = client.create_session(1, 2, 32, capacity=64, dtype="float32")
        driver.calls.clear()
        session.step(0, *(np.ones((20, heads, 32), np.float32) for heads in (4, 2, 2)))
        assert "launch" in [call[0] for call in driver.calls]


@settings(max_examples=5)  # the emulator takes 20 ms and more for a step
@given(**RINGS, storage=DEVICE_STORAGE)
def test_a_session_of_a_gpu_is_a_ring_kv_cache_there(gpu_client: Client, **drawn: Any) -> None:
    check_that_a_session_is_a_cache(gpu_client, "cuda", dtype="float32", **drawn)


def test_sessions_decoded_together_have_the_bits_of_the_emulator(gpu_client: Client, qkv: Any) -> None:
    sessions = [gpu_client.create_session(1, 2, 16, capacity=64, dtype="float32") for _ in range(2)]
    caches = [numbaflash.RingKVCache(1, 2, 16, capacity=64, dtype="float32", backend="emulated") for _ in sessions]
    for tokens in (70, 1, 5):
        for seed, (session, cache) in enumerate(zip(sessions, caches, strict=True)):
            arrays = qkv(tokens + seed, seed=seed)
            np.testing.assert_array_equal(session.step(0, **arrays), cache.step(0, **arrays))


def test_a_session_that_ends_leaves_nothing_on_the_gpu(gpu_client: Client, driver: Any, qkv: Any) -> None:
    before = sum(driver.live.values())
    session = gpu_client.create_session(1, 2, 16, capacity=640, dtype="float32")
    session.step(0, **qkv(600))
    taken = sum(driver.live.values()) - before
    assert 600 * 2 * 2 * 16 * 4 <= taken <= session.max_nbytes
    session.close()
    assert sum(driver.live.values()) == before
    assert not [call for call in driver.calls if call[0] in ("missing", "failed")]

"""Sessions whose caches are quantized: what they give, what they cost, and what they refuse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import numbaflash
from numbaflash import AWQQuantizer
from numbaflash_service import Client
from numbaflash_service.errors import BadTensorError

SHAPE: dict[str, Any] = {"capacity": 40, "sink_tokens": 2, "page_size": 8, "rollback": 4, "dtype": "int4"}


def awq() -> AWQQuantizer:
    scales = np.exp2(np.random.default_rng(0).standard_normal((2, 2, 32))).astype(np.float32)
    return AWQQuantizer(channel_scales=scales)


@pytest.mark.parametrize("quantizer", [None, "hqq:symmetric", awq()], ids=["default", "hqq", "awq"])
def test_a_session_gives_what_a_quantized_cache_gives(client: Client, quantizer: Any) -> None:
    cache = numbaflash.RingKVCache(2, 2, 32, quantizer=quantizer, **SHAPE)
    rng = np.random.default_rng(1)
    with client.create_session(2, 2, 32, quantizer=quantizer, **SHAPE) as session:
        assert cache.max_nbytes <= session.max_nbytes
        for tokens in (30, 1, 1, 20, 1):
            for layer in range(2):
                q, k, v = (rng.standard_normal((tokens, heads, 32)).astype(np.float32) for heads in (4, 2, 2))
                np.testing.assert_array_equal(session.step(layer, q, k, v), cache.step(layer, q, k, v))


def test_a_snapshot_of_a_quantized_session_goes_on(start_server: Any, tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    q, k, v = (rng.standard_normal((30, heads, 32)).astype(np.float32) for heads in (4, 2, 2))
    with Client(start_server(snapshot_dir=tmp_path).target) as client:
        session = client.create_session(2, 2, 32, quantizer=awq(), **SHAPE)
        session.step(0, q, k, v)
        session.snapshot("quantized")
        with client.restore("quantized") as restored:
            np.testing.assert_array_equal(restored.step(0, q, k, v), session.step(0, q, k, v))


@pytest.mark.parametrize(("backend", "dtype"), [("cpu", "int4"), ("emulated", "int8")])
def test_a_session_of_any_kind_comes_back_from_disk_to_the_bit(
    start_server: Any, tmp_path: Path, backend: str, dtype: str
) -> None:
    shape = {**SHAPE, "dtype": dtype, "capacity": 500}
    folder = {"spill_dir": tmp_path, "spill_after": 0.0, "kv_high_water": 1.0}
    server = start_server(backend=backend, kv_memory="1MiB", **folder)  # of two sessions at most
    with Client(server.target) as client:
        sessions = [client.create_session(2, 4, 64, **shape) for _ in range(3)]
        caches = [numbaflash.RingKVCache(2, 4, 64, **shape, backend=backend) for _ in sessions]
        rng = np.random.default_rng(5)
        for tokens in (20, 3):  # turn by turn, so that each is on disk when its turn comes
            for session, cache in zip(sessions, caches, strict=True):
                q, k, v = (rng.standard_normal((tokens, 4, 64)).astype(np.float32) for _ in range(3))
                np.testing.assert_array_equal(session.step(0, q, k, v), cache.step(0, q, k, v))
        metrics = server.server._servicer.metrics
        assert metrics.spills >= metrics.unspills >= len(sessions)


def test_a_step_that_is_not_finite_is_refused_and_the_session_keeps_what_it_held(client: Client) -> None:
    q, k, v = (np.ones((3, heads, 32), np.float32) for heads in (4, 2, 2))
    with client.create_session(2, 2, 32, **SHAPE) as session:
        session.step(0, q, k, v)
        k[1, 1, 7] = np.nan
        with pytest.raises(BadTensorError, match="k must be finite in float16 to be quantized"):
            session.step(0, q, k, v)
        assert session.length(0) == 3
        session.step(0, q, np.ones_like(k), v)
        assert session.length(0) == 6


def test_channel_scales_of_another_model_are_refused_by_field(client: Client) -> None:
    with pytest.raises(BadTensorError) as refused:
        client.create_session(3, 2, 32, quantizer=awq(), **SHAPE)
    assert refused.value.field == "tensors[0].shape"

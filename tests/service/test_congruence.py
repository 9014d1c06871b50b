"""The same calls on `RingKVCache` and on a session give the same bits, whatever the calls, on every backend."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from driver_process import check_on_a_driver
from hypothesis import given, settings
from hypothesis import strategies as st

import numbaflash
from numbaflash_service import Client, wire

from .congruence import DEVICE_STORAGE, RINGS, check_that_a_session_is_a_cache


@settings(max_examples=60)
@given(
    **RINGS,
    storage=st.sampled_from([*sorted(wire.DTYPES), "int8", "int4"]),
    dtype=st.sampled_from(sorted(wire.DTYPES)),
)
def test_a_session_is_a_ring_kv_cache(shared_client: Client, **drawn: Any) -> None:
    check_that_a_session_is_a_cache(shared_client, "cpu", **drawn)


@settings(max_examples=8)  # the emulator takes 20 ms and more for a step
@given(**RINGS, storage=DEVICE_STORAGE)
def test_a_session_of_a_device_is_a_ring_kv_cache_there(emulated_client: Client, **drawn: Any) -> None:
    check_that_a_session_is_a_cache(emulated_client, "emulated", dtype="float32", **drawn)


@pytest.mark.slow  # a process of its own that imports everything anew
def test_a_server_on_a_cuda_driver_does_all_of_that_too(tmp_path: Path) -> None:
    check_on_a_driver(Path(__file__).with_name("on_a_driver.py"), tmp_path)


@pytest.fixture(scope="module")
def shared_client(server: Any) -> Any:
    with Client(server.target) as client:
        yield client


@pytest.fixture(scope="module")
def emulated_client(start_module_server: Any) -> Any:
    with Client(start_module_server(backend="emulated").target) as client:
        yield client


@pytest.mark.parametrize("bad", ["rank", "dtype", "head_dim", "heads", "layer", "tokens", "options"])
def test_both_forms_refuse_the_same_arguments_alike(client: Client, qkv: Any, bad: str) -> None:
    session = client.create_session(2, 2, 16, capacity=64, dtype="float32")
    cache = numbaflash.RingKVCache(2, 2, 16, capacity=64, dtype="float32")
    arrays, layer, options = qkv(3), 0, {}
    if bad == "rank":
        arrays["q"] = arrays["q"][0]
    elif bad == "dtype":
        arrays["k"] = arrays["k"].astype(np.float64)
    elif bad == "head_dim":
        arrays = qkv(3, head_dim=8)
    elif bad == "heads":
        arrays = qkv(3, q_heads=3)
    elif bad == "layer":
        layer = 2
    elif bad == "tokens":
        arrays["v"] = arrays["v"][:2]
    else:
        options = {"softcap": -1.0}
    errors = []
    for form in (session, cache):
        with pytest.raises((ValueError, TypeError)) as caught:
            form.step(layer, **arrays, **options)
        errors.append(TypeError if isinstance(caught.value, TypeError) else ValueError)
        assert form.length(0) == 0
    assert errors[0] is errors[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_torch_in_torch_out(client: Client, dtype: torch.dtype) -> None:
    session = client.create_session(1, 2, 16, capacity=64)
    cache = numbaflash.RingKVCache(1, 2, 16, capacity=64)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(20, heads, 16, generator=generator).to(dtype) for heads in (4, 2, 2))
    over_wire, in_process = session.step(0, q, k, v), cache.step(0, q, k, v)
    assert isinstance(over_wire, torch.Tensor)
    assert over_wire.dtype == dtype
    assert torch.equal(over_wire, in_process)


def test_arrays_that_are_not_contiguous_are_sent_as_they_read(client: Client, qkv: Any) -> None:
    arrays = qkv(20)
    strided = {name: np.asfortranarray(array)[::2] for name, array in arrays.items()}
    session = client.create_session(1, 2, 16, capacity=64, dtype="float32")
    plain = client.create_session(1, 2, 16, capacity=64, dtype="float32")
    expected = plain.step(0, **{name: array[::2].copy() for name, array in arrays.items()})
    np.testing.assert_array_equal(session.step(0, **strided), expected)


def test_a_step_gives_the_same_bits_wherever_its_payload_lies(stock: Any, qkv: Any, step_request: Any) -> None:
    cache = numbaflash.RingKVCache(1, 2, 16, capacity=64, dtype="float32")
    session_id = stock.new_session()
    for position in range(8):
        arrays = qkv(1, seed=position)
        # An id that is a byte longer moves the payload by one.
        request = step_request(session_id, arrays, position=position, request_id="r" * (position + 1))
        assert stock.Decode(request).payload == cache.step(0, **arrays).tobytes()


def test_the_client_lays_payloads_where_their_elements_are_aligned(server: Any, client: Client, qkv: Any) -> None:
    session = client.create_session(300, 2, 16, capacity=64, dtype="float32")
    for layer in (0, 1, 299):  # of 0, 1 and 2 bytes in the message
        for _ in range(2):
            session.step(layer, **qkv(1))
            payload = np.frombuffer(server.submitted.pop().payload, np.uint8)
            assert payload.view(np.float32).flags.aligned

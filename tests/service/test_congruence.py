"""The same calls on `RingKVCache` and on a session give the same bits, whatever the calls, on every backend."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import numbaflash
from numbaflash_service import Client, wire

CALLS = st.lists(
    st.fixed_dictionaries(
        {
            "layer": st.integers(0, 1),
            "tokens": st.one_of(st.just(1), st.integers(0, 12), st.integers(13, 90)),
            "method": st.sampled_from(
                ["step", "step", "prefill", "decode", "append", "append and attend", "truncate", "fork"]
            ),
            "options": st.fixed_dictionaries(
                {},
                optional={
                    "scale": st.sampled_from([0.125, 0.3]),
                    "softcap": st.sampled_from([0.0, 4.0]),
                    "alibi_slopes": st.just(np.array([0.5, 0.25, 0.125, 0.0625], np.float32)),
                    "sink_logits": st.just(np.array([0.0, 1.0, -1.0, -np.inf], np.float32)),
                },
            ),
        }
    ),
    min_size=1,
    max_size=6,
)


RINGS = {
    "calls": CALLS,
    "capacity": st.sampled_from([5, 33, 64]),
    "sink_tokens": st.integers(0, 4),
    "page_size": st.sampled_from([8, 64]),
    "stream": st.booleans(),
}


@settings(max_examples=60, deadline=None)
@given(
    **RINGS,
    storage=st.sampled_from([*sorted(wire.DTYPES), "int8", "int4"]),
    dtype=st.sampled_from(sorted(wire.DTYPES)),
)
def test_a_session_is_a_ring_kv_cache(shared_client: Client, **drawn: Any) -> None:
    check_that_a_session_is_a_cache(shared_client, "cpu", **drawn)


@settings(max_examples=8, deadline=None)  # the emulator takes 20 ms and more for a step
@given(**RINGS, storage=st.sampled_from(["float32", "int8"]))
def test_a_session_of_a_device_is_a_ring_kv_cache_there(emulated_client: Client, **drawn: Any) -> None:
    check_that_a_session_is_a_cache(emulated_client, "emulated", dtype="float32", **drawn)


def check_that_a_session_is_a_cache(
    client: Client,
    backend: str,
    calls: list[dict[str, Any]],
    capacity: int,
    sink_tokens: int,
    page_size: int,
    storage: str,
    dtype: str,
    stream: bool,
) -> None:
    shape = {"capacity": capacity, "sink_tokens": sink_tokens, "dtype": storage, "page_size": page_size}
    cache = numbaflash.RingKVCache(2, 2, 32, **shape, backend=backend)
    rng = np.random.default_rng(0)
    with contextlib.ExitStack() as forks:
        session = forks.enter_context(client.create_session(2, 2, 32, **shape, stream=stream))
        for call in calls:
            layer, tokens, options = call["layer"], call["tokens"], call["options"]
            q, k, v = (rng.standard_normal((tokens, heads, 32)).astype(wire.DTYPES[dtype]) for heads in (4, 2, 2))
            if call["method"] == "truncate":
                length = max(0, max(cache.length(0), cache.length(1)) - tokens)
                outcomes = [truncation(form, length) for form in (session, cache)]
                assert outcomes[0] == outcomes[1]
            elif call["method"] == "fork":
                session, cache = forks.enter_context(session.fork()), cache.fork()
            elif call["method"] == "append":
                assert session.append(layer, k, v) is cache.append(layer, k, v) is None
            elif call["method"] == "append and attend":
                last = min(tokens, 20)
                for form in (session, cache):
                    form.append(layer, k, v)
                compare(session, cache, layer, lambda f: f.attend(layer, q[:last], **options))  # noqa: B023 - at once
            else:
                over_wire = getattr(session, call["method"])(layer, q, k, v, **options)
                in_process = cache.step(layer, q, k, v, **options)
                assert over_wire.dtype == in_process.dtype
                assert over_wire.tobytes() == in_process.tobytes()
            assert [session.length(i) for i in range(2)] == [cache.length(i) for i in range(2)]
            assert [session.first(i) for i in range(2)] == [cache.first(i) for i in range(2)]


def truncation(form: Any, length: int) -> bool:
    """Say whether a form can be truncated; it is, then."""
    try:
        form.truncate(length)
    except ValueError:
        return False
    return True


def compare(session: Any, cache: Any, layer: int, call: Any) -> None:
    assert call(session).tobytes() == call(cache).tobytes()
    assert session.length(layer) == cache.length(layer)


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

"""Prompts above the server's message limit: cut by the client, the same bits as in process and in one piece."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grpc
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import numbaflash
from numbaflash_service import Client, credentials
from numbaflash_service.client_session import cut

SMALL = 64 << 10  # the least limit that can be configured


@pytest.fixture(scope="module")
def small_server(start_module_server: Any) -> Any:
    return start_module_server(max_message_bytes=SMALL)


@given(tokens=st.integers(1, 10_000), token_bytes=st.integers(1, 5000), room=st.integers(5000, 100_000))
def test_pieces_are_few_fit_and_are_of_equal_size(tokens: int, token_bytes: int, room: int) -> None:
    pieces = cut(tokens, token_bytes, room)
    sizes = [piece.stop - piece.start for piece in pieces]
    assert [piece.start for piece in pieces[1:]] == [piece.stop for piece in pieces[:-1]]
    assert sum(sizes) == tokens
    assert max(sizes) * token_bytes <= room
    assert max(sizes) - min(sizes) <= 1
    assert (len(pieces) - 1) * (room // token_bytes) < tokens  # not one piece more than it takes


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("capacity", [4096, 300])
def test_a_prompt_in_pieces_gives_the_bits_of_one_step_in_process(
    small_server: Any, qkv: Callable[..., dict[str, np.ndarray]], stream: bool, capacity: int
) -> None:
    shape = {"capacity": capacity, "sink_tokens": 4, "dtype": "float16"}
    cache = numbaflash.RingKVCache(1, 2, 64, **shape)
    prompt, token = qkv(1500, head_dim=64, dtype="float16"), qkv(1, head_dim=64, dtype="float16")
    assert sum(array.nbytes for array in prompt.values()) > 20 * SMALL
    with Client(small_server.target) as client:
        session = client.create_session(1, 2, 64, **shape, stream=stream)
        np.testing.assert_array_equal(session.prefill(0, **prompt), cache.step(0, **prompt))
        np.testing.assert_array_equal(session.decode(0, **token), cache.step(0, **token))
        listed = next(listed for listed in client.list_sessions() if listed.session_id == session.id)
        assert listed.steps > 20
        assert listed.max_length == session.length(0) == 1501


def test_a_prompt_can_be_appended_in_pieces(small_server: Any, qkv: Callable[..., dict[str, np.ndarray]]) -> None:
    cache = numbaflash.RingKVCache(1, 2, 64, capacity=4096)
    prompt = qkv(1000, head_dim=64)
    with Client(small_server.target) as client:
        session = client.create_session(1, 2, 64, capacity=4096)
        for form in (session, cache):
            form.append(0, prompt["k"], prompt["v"])
        np.testing.assert_array_equal(session.attend(0, prompt["q"][-30:]), cache.attend(0, prompt["q"][-30:]))
        with pytest.raises(ValueError, match="must fit a message"):
            session.attend(0, prompt["q"])


def test_a_prompt_is_cut_where_its_answer_would_be_too_large_for_the_client(
    server: Any, qkv: Callable[..., dict[str, np.ndarray]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(credentials, "_MAX_ANSWER_BYTES", SMALL)
    cache, prompt = numbaflash.RingKVCache(1, 2, 64, capacity=4096), qkv(500, head_dim=64)
    with Client(server.target) as client:
        assert client.info().limits.max_message_bytes > sum(array.nbytes for array in prompt.values())
        session = client.create_session(1, 2, 64, capacity=4096)
        np.testing.assert_array_equal(session.prefill(0, **prompt), cache.step(0, **prompt))
        assert session.length(0) == 500


def test_a_token_that_fits_no_message_is_refused_by_the_client(small_server: Any) -> None:
    with Client(small_server.target) as client:
        session = client.create_session(1, 64, 256, capacity=64)
        wide = np.zeros((1, 64, 256), np.float32)
        with pytest.raises(ValueError, match="a token has 196608 bytes"):
            session.step(0, wide, wide, wide)
        assert session.length(0) == 0


def test_a_message_above_the_limit_is_refused_and_the_server_goes_on(
    small_server: Any, connect_stock: Any, qkv: Callable[..., dict[str, np.ndarray]], step_request: Any
) -> None:
    stock = connect_stock(small_server)
    session_id = stock.new_session(head_dim=64)
    with pytest.raises(grpc.RpcError) as caught:
        stock.Prefill(step_request(session_id, qkv(500, head_dim=64)))
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert stock.Prefill(step_request(session_id, qkv(2, head_dim=64))).position == 2


def test_a_chunk_of_four_mebibytes_passes_the_default_limit(client: Client) -> None:
    session = client.create_session(1, 8, 128, capacity=4096)
    q, k, v = (np.ones((512, 8, 128), np.float32) for _ in range(3))
    assert q.nbytes + k.nbytes == 4 << 20
    session.append(0, k, v)
    listed = next(listed for listed in client.list_sessions() if listed.session_id == session.id)
    assert listed.steps == 1


def test_the_pieces_before_a_failed_one_are_in_the_cache_and_counted(
    small_server: Any, qkv: Callable[..., dict[str, np.ndarray]], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = qkv(1000, head_dim=64)
    with Client(small_server.target) as client:
        session = client.create_session(1, 2, 64, capacity=4096)
        launch, launched = small_server.engine._launch, []

        def fail_third(steps: Any) -> Any:
            launched.append(steps)
            if len(launched) == 3:
                raise ValueError("the third piece")
            return launch(steps)

        monkeypatch.setattr(small_server.engine, "_launch", fail_third)
        with pytest.raises(ValueError, match="the third piece"):
            session.prefill(0, **prompt)
        listed = next(listed for listed in client.list_sessions() if listed.session_id == session.id)
        assert 0 < session.length(0) == listed.max_length < 1000
        rest = {name: array[session.length(0) :] for name, array in prompt.items()}
        session.prefill(0, **rest)
        assert session.length(0) == 1000

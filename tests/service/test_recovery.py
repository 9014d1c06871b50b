"""The client on bad days: connections that break anywhere, and servers that have lost the session."""

from __future__ import annotations

import contextlib
import random
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

import numbaflash
from numbaflash_service import Client, RetryPolicy, Session
from numbaflash_service.calls import is_passing
from numbaflash_service.errors import (
    BadTensorError,
    BusyError,
    DrainingError,
    ExhaustedError,
    KVBudgetError,
    PositionMismatchError,
    QueueFullError,
    QuotaError,
    ServiceError,
    SessionEvictedError,
    SessionUnknownError,
    UnauthenticatedError,
)
from numbaflash_service.v1 import attention_pb2 as pb

STUBBORN = RetryPolicy(attempts=200, first_delay=0.005, max_delay=0.05)


@pytest.mark.parametrize(
    ("error", "passing"),
    [
        (BusyError("x"), True),
        (DrainingError("x"), True),
        *((cls("x", retry_after=0.1), True) for cls in (KVBudgetError, QueueFullError, QuotaError, ExhaustedError)),
        *((cls("x"), False) for cls in (KVBudgetError, QueueFullError, QuotaError, ExhaustedError)),
        (ServiceError("x", code=grpc.StatusCode.UNAVAILABLE), True),
        (ServiceError("x", code=grpc.StatusCode.ABORTED), False),
        (ServiceError("x", code=grpc.StatusCode.INTERNAL, retry_after=1.0), False),
        (ServiceError("x", code=grpc.StatusCode.DEADLINE_EXCEEDED), False),
        (PositionMismatchError("x", position=1, retry_after=1.0), False),
        (SessionEvictedError("x"), False),
        (BadTensorError("x", "y"), False),
        (UnauthenticatedError("x"), False),
    ],
)
def test_only_what_may_pass_is_tried_again(error: ServiceError, passing: bool) -> None:
    assert is_passing(error) is passing


class BreakingProxy:
    """Passes TCP connections on to a server, and resets each of them after so many bytes."""

    def __init__(self, target: str, budgets: Callable[[], int]) -> None:
        host, port = target.rsplit(":", 1)
        self._upstream = (host, int(port))
        self._budgets = budgets
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.target = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.broken = 0
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join(timeout=20)

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.create_connection(self._upstream)
            left = [self._budgets()]
            for source, sink in ((client, server), (server, client)):
                self._threads.append(threading.Thread(target=self._pass_on, args=(source, sink, left)))
                self._threads[-1].start()

    def _pass_on(self, source: socket.socket, sink: socket.socket, left: list[int]) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                sink.sendall(data[: max(0, left[0])])
                left[0] -= len(data)
                if left[0] <= 0:
                    self.broken += 1
                    break
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                end.shutdown(socket.SHUT_RDWR)
        source.close()


@pytest.fixture
def break_connections(server: Any) -> Iterator[Callable[..., BreakingProxy]]:
    proxies: list[BreakingProxy] = []

    def start(budgets: Callable[[], int]) -> BreakingProxy:
        proxies.append(BreakingProxy(server.target, budgets))
        return proxies[-1]

    yield start
    for proxy in proxies:
        proxy.close()


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_connections_that_break_anywhere_lose_and_double_no_token(
    break_connections: Any, qkv: Any, stock: Any, stream: bool, seed: int
) -> None:
    rng = random.Random(seed)
    proxy = break_connections(lambda: rng.choice([100, 1_000, 5_000, 10_000, 20_000]) + rng.randrange(5_000))
    caches = [numbaflash.RingKVCache(2, 2, 16, capacity=64, dtype="float32") for _ in range(2)]
    with Client(proxy.target, retry=STUBBORN, timeout=60.0) as client:
        sessions = [client.create_session(2, 2, 16, capacity=64, dtype="float32", stream=stream) for _ in caches]
        for number in range(20):
            for layer in range(2):
                for session, cache in zip(sessions, caches, strict=True):
                    arrays = qkv(rng.choice([1, 1, 3]), seed=number)
                    np.testing.assert_array_equal(session.step(layer, **arrays), cache.step(layer, **arrays))
        assert proxy.broken >= 5
        listed = {one.session_id: one for one in stock.ListSessions(pb.ListSessionsRequest()).sessions}
        for session, cache in zip(sessions, caches, strict=True):
            lengths = [cache.length(layer) for layer in range(2)]
            assert [session.length(layer) for layer in range(2)] == lengths
            assert (listed[session.id].min_length, listed[session.id].max_length) == (min(lengths), max(lengths))
            assert listed[session.id].steps == 40


def test_a_server_that_is_slow_to_take_up_a_connection_is_waited_for(break_connections: Any) -> None:
    proxy = break_connections(lambda: time.sleep(0.5) or 1 << 30)  # busy, or far away; and it breaks nothing
    with Client(proxy.target, retry=RetryPolicy(attempts=1)) as client:
        assert client.info().backend == "cpu"


# -- sessions that are lost ------------------------------------------------------------------------------------------


class History:
    """All keys and values of a session so far, and how to bring them back."""

    def __init__(self, layers: int) -> None:
        self.kv: list[list[tuple[np.ndarray, np.ndarray]]] = [[] for _ in range(layers)]
        self.replays: list[tuple[int, ...]] = []

    def step(self, session: Session, layer: int, arrays: dict[str, np.ndarray]) -> np.ndarray:
        out = session.step(layer, **arrays)
        self.kv[layer].append((arrays["k"], arrays["v"]))
        return out

    def replay(self, session: Session, lengths: tuple[int, ...]) -> None:
        self.replays.append(lengths)
        for layer, length in enumerate(lengths):
            if length:
                k, v = (np.concatenate(parts)[:length] for parts in zip(*self.kv[layer], strict=True))
                session.append(layer, k, v)


def lose(stock: Any, session: Session) -> None:
    stock.CloseSession(pb.CloseSessionRequest(session_id=session.id))


@pytest.mark.parametrize("stream", [True, False])
def test_a_lost_session_is_replayed_and_goes_on_to_the_bit(client: Client, stock: Any, qkv: Any, stream: bool) -> None:
    cache, history = numbaflash.RingKVCache(2, 2, 16, capacity=32, sink_tokens=4, dtype="float32"), History(2)
    session = client.create_session(
        2, 2, 16, capacity=32, sink_tokens=4, dtype="float32", stream=stream, replay=history.replay
    )
    for number, tokens in enumerate((20, 1, 1, 30, 1)):
        for layer in range(2):
            if number in (1, 4) and layer == 1:  # in the middle of a token: one layer is ahead of the other
                lose(stock, session)
            arrays = qkv(tokens, seed=number)
            np.testing.assert_array_equal(history.step(session, layer, arrays), cache.step(layer, **arrays))
            assert (session.length(layer), session.first(layer)) == (cache.length(layer), cache.first(layer))
    assert history.replays == [(21, 20), (53, 52)]


def test_what_a_lost_session_was_asked_for_is_done_after_its_replay(client: Client, stock: Any, qkv: Any) -> None:
    history = History(1)
    session = client.create_session(1, 2, 16, capacity=32, dtype="float32", replay=history.replay)
    history.step(session, 0, qkv(9))
    lose(stock, session)
    session.truncate(5)
    assert session.length(0) == 5
    history.kv[0] = [(k[:5], v[:5]) for k, v in history.kv[0]]
    lose(stock, session)
    child = session.fork()
    assert child.length(0) == 5
    lose(stock, child)
    with pytest.raises(SessionUnknownError):  # a fork has no replay
        child.step(0, **qkv(1))
    assert history.replays == [(9,), (5,)]


def test_a_prompt_in_pieces_that_is_lost_in_the_middle_is_taken_whole(
    start_server: Any, connect_stock: Any, qkv: Any
) -> None:
    server = start_server(max_message_bytes=64 << 10)
    stock, history = connect_stock(server), History(1)
    cache = numbaflash.RingKVCache(1, 2, 16, capacity=2048, dtype="float32")
    with Client(server.target, retry=STUBBORN) as client:
        session = client.create_session(1, 2, 16, capacity=2048, dtype="float32", replay=history.replay)
        exchange, pieces = session._exchange, []

        def losing(*arguments: Any) -> Any:
            pieces.append(arguments)
            if len(pieces) == 3:
                lose(stock, session)
            return exchange(*arguments)

        history.step(session, 0, qkv(10))
        cache.step(0, **qkv(10))
        session._exchange = losing  # type: ignore[method-assign]
        np.testing.assert_array_equal(history.step(session, 0, qkv(600)), cache.step(0, **qkv(600)))
    assert history.replays == [(10,)]
    assert session.length(0) == 610


def test_a_server_that_was_restarted_is_given_the_session_again(start_server: Any, qkv: Any, tmp_path: Path) -> None:
    listen = [f"unix:{tmp_path}/socket"]
    first, history = start_server(listen=listen), History(1)
    cache = numbaflash.RingKVCache(1, 2, 16, capacity=64, dtype="float32")
    with Client(listen[0], retry=STUBBORN) as client:
        session = client.create_session(1, 2, 16, capacity=64, dtype="float32", replay=history.replay)
        np.testing.assert_array_equal(history.step(session, 0, qkv(5)), cache.step(0, **qkv(5)))
        first.stop()
        start_server(listen=listen)
        np.testing.assert_array_equal(history.step(session, 0, qkv(1)), cache.step(0, **qkv(1)))


def test_a_replay_that_falls_short_is_an_error_leaves_nothing_and_may_be_mended(
    client: Client, stock: Any, qkv: Any
) -> None:
    history, failing = History(1), [True]

    def replay(session: Session, lengths: tuple[int, ...]) -> None:
        history.replay(session, (lengths[0] - 1,) if failing else lengths)

    session = client.create_session(1, 2, 16, capacity=64, replay=replay)
    history.step(session, 0, qkv(5))
    lose(stock, session)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"replay must bring the layers to \(5,\) tokens, got \(4,\)"):
            session.step(0, **qkv(1))
        assert session.length(0) == 5
    assert session.id not in {one.session_id for one in stock.ListSessions(pb.ListSessionsRequest()).sessions}
    failing.clear()
    session.step(0, **qkv(1))
    assert session.length(0) == 6

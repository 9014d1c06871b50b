"""One step of a batch is at fault: it alone fails, with its own error, and no page leaks, in memory or on a device."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import numpy as np
import pytest

import numbaflash
from numbaflash.cache import device_pages, pages
from numbaflash.cache.device_ring import DeviceRing
from numbaflash.cache.token_ring import TokenRing
from numbaflash_service.errors import from_call
from numbaflash_service.v1 import attention_pb2 as pb

SHAPE = {"num_layers": 1, "num_kv_heads": 2, "head_dim": 16, "capacity": 64, "page_size": 8, "dtype": "float32"}
# Of four sessions: the next token of the third begins a page.
LENGTHS = (3, 12, 16, 70)
AT_FAULT = 2


class Four:
    """Four sessions of different lengths beside the caches in process that they must equal."""

    def __init__(self, server: Any, stock: Any, qkv: Callable[..., Any], step_request: Any) -> None:
        self.server, self.stock, self._qkv, self._request = server, stock, qkv, step_request
        self.ids = [stock.new_session(**SHAPE) for _ in LENGTHS]
        backend = server.server._servicer._backend
        self.caches = [numbaflash.RingKVCache(**SHAPE, backend=backend) for _ in LENGTHS]
        sessions = {session.id: session for session in server.server._servicer.sessions()}
        self.pools = [sessions[id_].cache.pools[0] for id_ in self.ids]
        for i, length in enumerate(LENGTHS):
            stock.Prefill(self.request(i, length))
            self.caches[i].step(0, **qkv(length, seed=i))

    def ring(self, i: int) -> Any:
        """The only layer's ring of a session."""
        (session,) = [one for one in self.server.server._servicer.sessions() if one.id == self.ids[i]]
        return session.cache._layers[0].ring

    def request(self, i: int, tokens: int = 1) -> pb.StepRequest:
        return self._request(self.ids[i], self._qkv(tokens, seed=i), position=self.caches[i].length(0))

    def decode(self, **timeouts: float) -> list[Any]:
        """Send a step of each session, and return the calls when all of them wait together."""
        calls = []
        for i in range(len(LENGTHS)):
            calls.append(self.stock.Decode.future(self.request(i), timeout=timeouts.get(f"of_{i}")))
            self.server.wait_for_queue(i + 1)
        return calls

    def check(self, calls: list[Any], *, but: int | None = None, gone: bool = False) -> None:
        """See that all steps succeed but one, that each page has its place, and that all sessions go on."""
        self.server.wait_for_queue(0)
        for i, call in enumerate(calls):
            if i != but:
                self._compare(i, call.result(timeout=60))
        self.check_pages(gone=but if gone else None)
        for i in range(len(LENGTHS)):
            if not (gone and i == but):
                self._compare(i, self.stock.Decode(self.request(i)))
        self.check_pages(gone=but if gone else None)

    def _compare(self, i: int, answer: pb.StepResponse) -> None:
        expected = self.caches[i].step(0, **self._qkv(1, seed=i))
        got = np.frombuffer(answer.payload, np.float32).reshape(expected.shape)
        np.testing.assert_array_equal(got, expected)
        assert answer.position == self.caches[i].length(0)

    def check_pages(self, gone: int | None = None) -> None:
        """Each page with an owner is one of a living session's, as many as the same cache in process has."""
        gc.collect()
        used = [pool.nbytes for pool in self.pools]
        assert used == [0 if i == gone else cache.pools[0].nbytes for i, cache in enumerate(self.caches)]
        assert self.server.engine.steps == self.server.engine.nbytes == 0


@pytest.fixture(params=["cpu", "emulated"], scope="module")
def a_server(request: pytest.FixtureRequest, start_module_server: Any) -> Any:
    return start_module_server(backend=request.param)


@pytest.fixture
def four(a_server: Any, connect_stock: Any, qkv: Callable[..., Any], step_request: Any) -> Iterator[Four]:
    stock = connect_stock(a_server)
    made = Four(a_server, stock, qkv, step_request)
    yield made
    for session_id in made.ids:
        stock.CloseSession(pb.CloseSessionRequest(session_id=session_id))


def test_where_there_is_no_page_left_the_step_that_needs_one_fails(four: Four, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Any:
        raise MemoryError("no page is left")

    with four.server.engine_held():
        calls = four.decode()
        monkeypatch.setattr(pages.PagePool, "acquire", refuse)
        monkeypatch.setattr(device_pages.DevicePagePool, "acquire", refuse)
    errors = [call.exception(timeout=60) for call in calls]
    assert [error is None for error in errors] == [i != AT_FAULT for i in range(len(LENGTHS))]
    monkeypatch.undo()
    four.check(calls, but=AT_FAULT)
    error = from_call(errors[AT_FAULT])
    assert error.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert error.retry_after


def test_a_session_that_is_closed_while_its_step_waits_takes_nobody_along(four: Four) -> None:
    with four.server.engine_held():
        calls = four.decode()
        closing = four.stock.CloseSession.future(pb.CloseSessionRequest(session_id=four.ids[AT_FAULT]))
        sessions = four.server.server._servicer.sessions
        four.server.wait_until(lambda: four.ids[AT_FAULT] not in {session.id for session in sessions()})
    closing.result(timeout=60)
    four.check(calls, but=AT_FAULT, gone=True)
    assert from_call(calls[AT_FAULT].exception()).reason == "SESSION_UNKNOWN"


def test_a_deadline_that_passes_in_the_queue_is_one_steps_own(four: Four) -> None:
    with four.server.engine_held():
        # Long enough for the steps to come that wait with it.
        calls = four.decode(**{f"of_{AT_FAULT}": 3.0})
        assert calls[AT_FAULT].exception(timeout=60).code() is grpc.StatusCode.DEADLINE_EXCEEDED
        step = four.server.submitted[AT_FAULT - len(LENGTHS)]
        four.server.wait_until(lambda: step.taken_back)  # the client may know it first
    four.check(calls, but=AT_FAULT)


def test_a_client_that_goes_away_mid_stream_takes_its_own_steps_along(four: Four) -> None:
    request = four.request(AT_FAULT)
    with four.server.engine_held():
        calls = [four.stock.Decode.future(four.request(i)) for i in range(len(LENGTHS)) if i != AT_FAULT]
        stream = four.stock.Attend(iter([request, four.request(AT_FAULT)]))
        four.server.wait_for_queue(len(LENGTHS) + 1)
        stream.cancel()
        streams = four.server.server._servicer._streams
        four.server.wait_until(lambda: not streams)
    assert stream.code() is grpc.StatusCode.CANCELLED
    calls.insert(AT_FAULT, stream)
    four.check(calls, but=AT_FAULT)


def test_an_exception_in_a_batch_is_answered_to_the_session_that_it_is_of(
    four: Four, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("this ring is broken")

    ring = four.ring(AT_FAULT)
    with four.server.engine_held():
        calls = four.decode()
        monkeypatch.setattr(ring, "reserve" if isinstance(ring, TokenRing) else "prepare", broken)
    errors = [call.exception(timeout=60) for call in calls]
    assert [error is None for error in errors] == [i != AT_FAULT for i in range(len(LENGTHS))]
    monkeypatch.undo()
    four.check(calls, but=AT_FAULT)
    error = errors[AT_FAULT]
    assert (error.code(), error.details()) == (grpc.StatusCode.INTERNAL, "the step failed")


def test_a_launch_that_fails_is_made_again_for_each_step(four: Four, monkeypatch: pytest.MonkeyPatch) -> None:
    place = type(four.caches[0]._place)
    step, failures = place.step, []

    def fail_once(self: Any, layers: Any, q: Any, k: Any, v: Any, *rest: Any) -> Any:
        rings = [layer.ring for layer in layers]
        if failures:
            return step(self, layers, q, k, v, *rest)
        failures.append(len(rings))
        with monkeypatch.context() as patch:  # the pages are taken, and then it fails
            if isinstance(rings[0], DeviceRing):
                patch.setattr("numbaflash.cuda.paged.step", _fail)
            else:
                patch.setattr("numbaflash.cache.float_steps.attend_runs", _fail)
            return step(self, layers, q, k, v, *rest)

    with four.server.engine_held():
        calls = four.decode()
        monkeypatch.setattr(place, "step", fail_once)
    four.check(calls)
    assert failures == [len(LENGTHS)]


def _fail(*_: Any, **__: Any) -> Any:
    raise RuntimeError("the launch failed")

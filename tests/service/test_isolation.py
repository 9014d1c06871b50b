"""Two callers of one server: for each, the other's sessions do not exist, and nothing of them is left in memory."""

from __future__ import annotations

import hashlib
import queue
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from numbaflash.cache.pages import PagePool
from numbaflash_service.errors import ServiceError, from_status
from numbaflash_service.v1 import attention_pb2 as pb

from .plain_calls import refusal

METHODS = pb.DESCRIPTOR.services_by_name["Attention"].methods_by_name
OF_A_SESSION = [name for name, method in METHODS.items() if "session_id" in method.input_type.fields_by_name]


@pytest.fixture(scope="module")
def shared_server(start_module_server: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder: Path = tmp_path_factory.mktemp("shared")
    file = folder / "tokens"
    lines = (f"{name} sha256:{hashlib.sha256(name.encode()).hexdigest()}\n" for name in ("alice", "bob"))
    file.write_text("".join(lines))
    return start_module_server(auth_tokens=file, snapshot_dir=folder / "snapshots")


@pytest.fixture
def alice(shared_server: Any, connect_stock: Callable[..., Any]) -> Any:
    return connect_stock(shared_server, token="alice")


@pytest.fixture
def bob(shared_server: Any, connect_stock: Callable[..., Any]) -> Any:
    return connect_stock(shared_server, token="bob")


def refusal_of(stock: Any, name: str, request: Any) -> ServiceError:
    if METHODS[name].client_streaming:
        (answer,) = stock.Attend(iter([request]))
        return from_status(answer.error)
    return refusal(getattr(stock, name), request)


def request_for(name: str, session_id: str, step: pb.StepRequest) -> Any:
    if METHODS[name].input_type is pb.StepRequest.DESCRIPTOR:
        return step
    more = {"name": "name"} if name == "Snapshot" else {}
    return getattr(pb, METHODS[name].input_type.name)(session_id=session_id, **more)


@pytest.mark.parametrize("name", OF_A_SESSION)
def test_another_callers_session_is_refused_in_the_words_of_one_that_never_was(
    alice: Any, bob: Any, qkv: Any, step_request: Any, name: str
) -> None:
    session_id = alice.new_session()
    alice.Prefill(step_request(session_id, qkv(5), request_id="first"))
    for position, request_id in ((0, "first"), (5, "next")):  # the answer again, and the step that would be taken
        errors = []
        for target in (session_id, "0" * 32):
            step = step_request(target, qkv(5), position=position, request_id=request_id)
            errors.append(refusal_of(bob, name, request_for(name, target, step)))
        mine, nobodys = errors
        assert (mine.reason, mine.code) == ("SESSION_UNKNOWN", grpc.StatusCode.NOT_FOUND)
        assert (type(mine), mine.args, mine.retry_after) == (type(nobodys), nobodys.args, nobodys.retry_after)
    assert alice.Decode(step_request(session_id, qkv(1), position=5)).position == 6


@pytest.mark.parametrize("name", OF_A_SESSION)
def test_another_callers_lost_session_never_was_either(
    alice: Any, bob: Any, qkv: Any, step_request: Any, name: str
) -> None:
    session_id = alice.new_session()
    alice.CloseSession(pb.CloseSessionRequest(session_id=session_id))
    step = step_request(session_id, qkv(1))
    assert "was closed" in refusal_of(alice, "Decode", step).message
    error = refusal_of(bob, name, request_for(name, session_id, step))
    assert (error.reason, error.message) == ("SESSION_UNKNOWN", "there is no such session")


def test_a_session_that_is_busy_looks_no_different_to_others(
    shared_server: Any, alice: Any, bob: Any, qkv: Any, step_request: Any
) -> None:
    session_id = alice.new_session()
    with shared_server.engine_held():
        waiting = alice.Decode.future(step_request(session_id, qkv(1)))
        shared_server.wait_for_queue(1)
        assert refusal_of(bob, "Decode", step_request(session_id, qkv(1))).reason == "SESSION_UNKNOWN"
    assert waiting.result(timeout=20).position == 1


def test_everybody_lists_their_own(alice: Any, bob: Any) -> None:
    def ids(stock: Any) -> set[str]:
        return {session.session_id for session in stock.ListSessions(pb.ListSessionsRequest()).sessions}

    before = ids(alice), ids(bob)
    made = alice.new_session(), bob.new_session()
    assert ids(alice) == before[0] | {made[0]}
    assert ids(bob) == before[1] | {made[1]}


def test_snapshots_are_their_callers_own(alice: Any, bob: Any, qkv: Any, step_request: Any) -> None:
    lengths = {}
    for stock, tokens in ((alice, 5), (bob, 3)):  # one name, and nobody overwrites another's
        session_id = stock.new_session(num_layers=1)
        stock.Prefill(step_request(session_id, qkv(tokens)))
        stock.Snapshot(pb.SnapshotRequest(session_id=session_id, name="one-name"))
    for stock in (alice, bob):
        lengths[stock] = stock.Restore(pb.RestoreRequest(name="one-name")).usable_tokens
    assert lengths == {alice: 5, bob: 3}
    alice.Snapshot(pb.SnapshotRequest(session_id=alice.new_session(), name="alices"))
    of_alice, nobodys = (refusal_of(bob, "Restore", pb.RestoreRequest(name=name)) for name in ("alices", "nobodys"))
    assert of_alice.code is grpc.StatusCode.NOT_FOUND
    assert (type(of_alice), of_alice.args) == (type(nobodys), nobodys.args)


def test_one_stream_serves_its_caller_alone(alice: Any, bob: Any, qkv: Any, step_request: Any) -> None:
    of_alice, of_bob = alice.new_session(), bob.new_session()
    requests: queue.SimpleQueue = queue.SimpleQueue()
    stream = bob.Attend(iter(requests.get, None))
    for request_id, session_id in enumerate((of_bob, of_alice, of_bob)):
        requests.put(step_request(session_id, qkv(1), request_id=f"{request_id}"))
    requests.put(None)
    reasons = [from_status(answer.error).reason if answer.HasField("error") else None for answer in stream]
    assert sorted(reasons, key=str) == [None, "POSITION_MISMATCH", "SESSION_UNKNOWN"]


def test_pages_that_are_handed_on_are_zero(
    alice: Any, bob: Any, qkv: Any, step_request: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[np.ndarray] = []
    acquire = PagePool.acquire

    def watch(pool: PagePool) -> int:
        page = acquire(pool)
        seen.append(pool.content(page).copy())
        return page

    monkeypatch.setattr(PagePool, "acquire", watch)
    secret = {name: np.full_like(array, 7.25) for name, array in qkv(64).items()}
    for stock in (alice, bob) * 10:  # small pages: malloc hands the same memory on at once
        session_id = stock.new_session(page_size=8)
        stock.Prefill(step_request(session_id, secret))
        stock.CloseSession(pb.CloseSessionRequest(session_id=session_id))
    assert len(seen) >= 20 * 8
    assert not any(page.any() for page in seen)

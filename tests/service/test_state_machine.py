"""Sessions under every call and every fault, against caches in process: no wrong answer, no token lost or doubled.

Hypothesis drives a server over a socket with plain protobuf: answers get lost, requests come twice, late or are
cancelled, sessions are spilled, evicted, forked, truncated, snapshotted and restored, and the server is stopped or
crashes. `pytest --hypothesis-profile=thorough` on this file looks for longer.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

import numbaflash
from numbaflash_service.errors import (
    BusyError,
    KVBudgetError,
    PositionMismatchError,
    ServiceError,
    SessionEvictedError,
    SessionUnknownError,
    SnapshotUnknownError,
    from_call,
)
from numbaflash_service.v1 import attention_pb2 as pb

# Two sessions fit into the least memory that a server takes.
KV_MEMORY = 1 << 20
LAYERS, HEADS, HEAD_DIM, ROLLBACK = 2, 2, 64, 30
SHAPE = {"capacity": 100, "sink_tokens": 2, "page_size": 64, "dtype": "float32", "rollback": ROLLBACK}

WHICH, LAYER, COUNT = st.integers(0, 10**6), st.integers(0, LAYERS - 1), st.sampled_from([1, 1, 2, 7, 40, 150])
CANCEL = st.sampled_from([None, None, 0.0, 0.0005, 0.002])
KIND = st.sampled_from(["step", "step", "append"])


@dataclass(eq=False)
class Taken:
    """A step that was taken: what was sent, and what came back."""

    request: pb.StepRequest
    after: int
    payload: bytes


@dataclass(eq=False)
class Twin:
    """A session, and the cache in process that holds what it must hold."""

    id: str
    cache: numbaflash.RingKVCache
    epoch: int = 0
    taken: list[Taken] = field(default_factory=list)
    truncations: list[pb.TruncateRequest] = field(default_factory=list)


class Sessions(RuleBasedStateMachine):
    def __init__(self, start_server: Any, connect_stock: Any, request: Callable[..., Any], folder: Path, spill: bool):
        super().__init__()
        self._start, self._connect, self._request, self._spill = start_server, connect_stock, request, spill
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        self._folder = folder
        self._config = {
            "listen": [f"unix:{folder}/socket"],
            "kv_memory": KV_MEMORY,
            "spill_after": 0.0,
            "evict_after": 0.0,
            "snapshot_dir": folder / "snapshots",
            **({"spill_dir": folder / "spill"} if spill else {}),
        }
        self._serve()
        self._live: list[Twin] = []
        self._dead: list[Twin] = []
        self._snapshots: dict[str, numbaflash.RingKVCache] = {}
        self._seed = 0

    def _serve(self) -> None:
        self._server = self._start(**self._config)
        self._stock = self._connect(self._server)

    def _stop(self) -> None:
        self._stock.channel.close()
        self._server.stop()

    def teardown(self) -> None:
        self._stop()

    # -- sending -----------------------------------------------------------------------------------------------------

    def _send(self, method: str, request: Any) -> Any:
        """Call until it is neither busy nor out of memory; other errors are raised as the service's."""
        until = time.monotonic() + 20
        while True:
            try:
                return getattr(self._stock, method)(request, timeout=20)
            except grpc.RpcError as error:
                failed = from_call(error)
                if not isinstance(failed, (BusyError, KVBudgetError)) or time.monotonic() > until:
                    raise failed from None
                time.sleep(0.002)

    def _cancel(self, method: str, request: Any, delay: float | None) -> None:
        """Make a call and cancel it after a while; what becomes of it is the server's to decide."""
        if delay is not None:
            call = getattr(self._stock, method).future(request, timeout=20)
            time.sleep(delay)
            call.cancel()

    def _pick(self, which: int) -> Twin:
        return self._live[which % len(self._live)]

    def _bury(self, twin: Twin, error: ServiceError) -> None:
        """A session may be evicted where there is no folder for it, and nowhere else."""
        assert isinstance(error, SessionEvictedError)
        assert not self._spill
        self._live.remove(twin)
        self._dead.append(twin)

    def _ask(self, twin: Twin, method: str, request: Any) -> Any:
        """Send a request of a session's; None where that has been evicted."""
        try:
            return self._send(method, request)
        except ServiceError as error:
            self._bury(twin, error)
            return None

    def _new_step(self, twin: Twin, layer: int, count: int, kind: str) -> pb.StepRequest:
        self._seed += 1
        rng = np.random.default_rng(self._seed)
        arrays = {
            name: rng.standard_normal((count, heads, HEAD_DIM)).astype(np.float32)
            for name, heads in (("q", 2 * HEADS), ("k", HEADS), ("v", HEADS))
        }
        if kind == "append":
            del arrays["q"]
        position = twin.cache.length(layer)
        made = self._request(twin.id, arrays, layer=layer, position=position, request_id=str(self._seed))
        made.options.epoch = twin.epoch
        return made

    def _expect(self, twin: Twin, request: pb.StepRequest, answer: pb.StepResponse) -> None:
        """The step has been taken, once: the cache takes it, too, and gives the same."""
        views = {
            tensor.name: np.frombuffer(request.payload, np.float32, tensor.nbytes // 4, tensor.offset).reshape(
                tensor.shape
            )
            for tensor in request.tensors
        }
        take = twin.cache.step if "q" in views else twin.cache.append
        out = take(request.layer, **views)
        assert answer.position == twin.cache.length(request.layer)
        assert answer.first == twin.cache.first(request.layer)
        if out is None:
            assert not answer.payload
        else:
            np.testing.assert_allclose(
                np.frombuffer(answer.payload, np.float32).reshape(out.shape), out, rtol=1e-4, atol=1e-5
            )
        twin.taken.append(Taken(request, answer.position, answer.payload))

    # -- steps -------------------------------------------------------------------------------------------------------

    has_sessions = precondition(lambda self: self._live)

    @has_sessions
    @rule(which=WHICH, layer=LAYER, count=COUNT, kind=KIND, losses=st.sampled_from([0, 0, 1, 2]), stop=st.booleans())
    def step(self, which: int, layer: int, count: int, kind: str, losses: int, stop: bool) -> None:
        """Take a step; its answer is lost some times, and the server stopped and started in between."""
        twin = self._pick(which)
        request = self._new_step(twin, layer, count, kind)
        answers = []
        try:
            for _ in range(losses + 1):
                if answers and stop and self._spill:
                    self.restart()
                answers.append(self._send("Prefill", request))
        except ServiceError as error:
            self._bury(twin, error)
            return
        assert [answer.replayed for answer in answers] == [False] + [True] * losses
        assert len({answer.payload for answer in answers}) == 1
        self._expect(twin, request, answers[-1])

    @has_sessions
    @rule(which=WHICH, layer=LAYER, count=COUNT, kind=KIND)
    def step_twice_at_once(self, which: int, layer: int, count: int, kind: str) -> None:
        twin = self._pick(which)
        request = self._new_step(twin, layer, count, kind)
        answers = []
        for call in [self._stock.Decode.future(request, timeout=20) for _ in range(2)]:
            try:
                answers.append(call.result())
            except grpc.RpcError as error:
                failed = from_call(error)
                if isinstance(failed, SessionEvictedError):
                    assert not answers
                    self._bury(twin, failed)
                    return
                assert isinstance(failed, (BusyError, KVBudgetError))
        if not answers:
            answers.append(self._send("Decode", request))
        assert sum(not answer.replayed for answer in answers) == 1
        assert len({answer.payload for answer in answers}) == 1
        self._expect(twin, request, answers[0])

    @has_sessions
    @rule(which=WHICH, layer=LAYER, count=COUNT, kind=KIND, delay=st.sampled_from([0.0, 0.0005, 0.002]))
    def cancel_a_step_and_send_it_again(self, which: int, layer: int, count: int, kind: str, delay: float) -> None:
        twin = self._pick(which)
        request = self._new_step(twin, layer, count, kind)
        self._cancel("Decode", request, delay)
        if answer := self._ask(twin, "Decode", request):
            self._expect(twin, request, answer)

    @has_sessions
    @rule(picks=st.lists(st.tuples(WHICH, LAYER, COUNT, KIND), min_size=1, max_size=6))
    def stream(self, picks: list[tuple[int, int, int, str]]) -> None:
        """Send steps of several sessions on one stream, all of them in flight."""
        requests, owners = [], []
        for which, layer, count, kind in picks:
            twin = self._pick(which)
            # Each layer once: where the next step stands is known when this one is answered.
            if all((twin, layer) != (owner, request.layer) for owner, request in zip(owners, requests, strict=True)):
                requests.append(self._new_step(twin, layer, count, kind))
                owners.append(twin)
        answers = {answer.request_id: answer for answer in self._stock.Attend(iter(requests), timeout=20)}
        assert answers.keys() == {request.request_id for request in requests}
        for twin, request in zip(owners, requests, strict=True):
            answer = answers[request.request_id]
            if answer.HasField("error"):  # pushed back, evicted
                if twin in self._live and (answer := self._ask(twin, "Prefill", request)):
                    self._expect(twin, request, answer)
            else:
                self._expect(twin, request, answer)

    @has_sessions
    @rule(which=WHICH, layer=LAYER, count=st.integers(1, ROLLBACK + 1))
    def attend(self, which: int, layer: int, count: int) -> None:
        """Only attend, with the queries of the last tokens."""
        twin = self._pick(which)
        length = twin.cache.length(layer)
        if not length:
            return
        self._seed += 1
        q = np.random.default_rng(self._seed).standard_normal((min(count, length), 2 * HEADS, HEAD_DIM), np.float32)
        request = self._request(twin.id, {"q": q}, layer=layer, position=length)
        request.options.epoch = twin.epoch
        try:
            out = twin.cache.attend(layer, q)
        except ValueError:
            return  # the windows of the oldest of them are overwritten, after a truncation
        if answer := self._ask(twin, "Decode", request):
            np.testing.assert_allclose(np.frombuffer(answer.payload, np.float32), out.ravel(), rtol=1e-4, atol=1e-5)

    @has_sessions
    @rule(which=WHICH, step=WHICH)
    def a_step_arrives_late(self, which: int, step: int) -> None:
        """Send a step that was taken before: answered as it was if it is the layer's last, else refused."""
        twin = self._pick(which)
        if not twin.taken:
            return
        # Above all those that would fit again, after a truncation.
        fitting = [t for t in twin.taken if t.request.position == twin.cache.length(t.request.layer)]
        taken = (fitting or twin.taken)[step % len(fitting or twin.taken)]
        last = [t for t in twin.taken if t.request.layer == taken.request.layer][-1]
        is_last = taken is last and taken.request.options.epoch == twin.epoch
        try:
            answer = self._send("Decode", taken.request)
        except ServiceError as error:
            if is_last or getattr(error, "position", None) != twin.cache.length(taken.request.layer):
                self._bury(twin, error)
        else:
            assert is_last
            assert (answer.replayed, answer.position, answer.payload) == (True, taken.after, taken.payload)

    # -- life --------------------------------------------------------------------------------------------------------

    few_sessions = precondition(lambda self: len(self._live) < 5)

    @few_sessions
    @rule()
    def create(self) -> None:
        shape = pb.SessionShape(num_layers=LAYERS, num_kv_heads=HEADS, head_dim=HEAD_DIM, **SHAPE)
        made = self._send("CreateSession", pb.CreateSessionRequest(shape=shape))
        self._live.append(Twin(made.session_id, numbaflash.RingKVCache(LAYERS, HEADS, HEAD_DIM, **SHAPE)))

    @has_sessions
    @rule(
        which=WHICH,
        back=st.integers(0, ROLLBACK + 20),
        before=st.none() | WHICH,
        losses=st.sampled_from([0, 1]),
        cancel=CANCEL,
    )
    def truncate(self, which: int, back: int, before: int | None, losses: int, cancel: float | None) -> None:
        """Take a session back by some tokens, or to where one of its steps began."""
        twin = self._pick(which)
        length = max(0, min(twin.cache.length(layer) for layer in range(LAYERS)) - back)
        if before is not None and twin.taken:
            length = twin.taken[-1 - before % min(4, len(twin.taken))].request.position
        request = pb.TruncateRequest(session_id=twin.id, length=length, epoch=twin.epoch)
        self._cancel("Truncate", request, cancel)
        try:
            answers = [self._send("Truncate", request) for _ in range(losses + 1)]
        except ServiceError as error:
            if getattr(error, "field", None) != "length":
                self._bury(twin, error)
                return
            with pytest.raises(ValueError, match="length"):
                twin.cache.truncate(length)
            return
        twin.cache.truncate(length)
        replayed = [answer.replayed for answer in answers]
        assert replayed[1:] == [True] * losses
        assert not replayed[0] or cancel is not None
        assert {answer.epoch for answer in answers} == {twin.epoch + 1}
        assert {answer.first for answer in answers} == {twin.cache.first(0)}
        twin.epoch += 1
        twin.truncations.append(request)

    @has_sessions
    @rule(which=WHICH, truncation=WHICH)
    def a_truncation_arrives_late(self, which: int, truncation: int) -> None:
        """Send a truncation that was done before: answered again if it was the last, else refused."""
        twin = self._pick(which)
        if not twin.truncations:
            return
        request = twin.truncations[truncation % len(twin.truncations)]
        try:
            answer = self._send("Truncate", request)
        except PositionMismatchError:
            assert request is not twin.truncations[-1]
        except ServiceError as error:
            self._bury(twin, error)
        else:
            assert request is twin.truncations[-1]
            assert (answer.replayed, answer.epoch) == (True, twin.epoch)

    @has_sessions
    @few_sessions
    @rule(which=WHICH)
    def fork(self, which: int) -> None:
        twin = self._pick(which)
        if answer := self._ask(twin, "Fork", pb.ForkRequest(session_id=twin.id)):
            self._live.append(Twin(answer.session_id, twin.cache.fork()))
            self._same(answer.state, twin.cache)

    @has_sessions
    @rule(which=WHICH, name=st.sampled_from("ab"), cancel=CANCEL)
    def snapshot(self, which: int, name: str, cancel: float | None) -> None:
        twin = self._pick(which)
        request = pb.SnapshotRequest(session_id=twin.id, name=name)
        self._cancel("Snapshot", request, cancel)
        if answer := self._ask(twin, "Snapshot", request):
            self._snapshots[name] = twin.cache.fork()
            assert answer.usable_tokens == min(twin.cache.length(layer) for layer in range(LAYERS))

    @few_sessions
    @rule(name=st.sampled_from("ab"))
    def restore(self, name: str) -> None:
        try:
            answer = self._send("Restore", pb.RestoreRequest(name=name))
        except SnapshotUnknownError:
            assert name not in self._snapshots
            return
        cache = self._snapshots[name].fork()
        self._live.append(Twin(answer.session_id, cache))
        self._same(answer.state, cache)
        assert answer.usable_tokens == min(answer.state.lengths)

    def _same(self, state: pb.SessionState, cache: numbaflash.RingKVCache) -> None:
        layers = range(LAYERS)
        assert list(state.lengths) == [cache.length(layer) for layer in layers]
        assert list(state.firsts) == [cache.first(layer) for layer in layers]
        assert state.epoch == 0

    @has_sessions
    @rule(which=WHICH, times=st.integers(1, 2))
    def close(self, which: int, times: int) -> None:
        twin = self._pick(which)
        try:
            for _ in range(times):
                self._send("CloseSession", pb.CloseSessionRequest(session_id=twin.id))
        except SessionEvictedError as error:
            self._bury(twin, error)
            return
        self._live.remove(twin)
        self._dead.append(twin)

    @precondition(lambda self: self._dead)
    @rule(which=WHICH, method=st.sampled_from(["Decode", "Truncate", "Fork", "Snapshot"]))
    def what_is_gone_stays_gone(self, which: int, method: str) -> None:
        twin = self._dead[which % len(self._dead)]
        request: Any = getattr(pb, f"{method}Request")(session_id=twin.id) if method != "Decode" else None
        if method == "Snapshot":
            request.name = "a"
        with pytest.raises((SessionUnknownError, SessionEvictedError)):
            self._send(method, request or self._new_step(twin, 0, 1, "step"))

    # -- the server --------------------------------------------------------------------------------------------------

    @rule()
    def restart(self) -> None:
        """Stop and start the server: what is idle is spilled, and there again."""
        self._stop()
        self._serve()
        if not self._spill:
            self._dead += self._live
            self._live = []

    @rule()
    def crash(self) -> None:
        """Start a server on the files as they lie there now: only what is on disk is there again."""
        kept = self._folder / "kept"
        shutil.copytree(self._folder, kept, ignore=shutil.ignore_patterns("socket", "kept"))
        on_disk = {s.session_id for s in self._stock.ListSessions(pb.ListSessionsRequest()).sessions if s.spilled}
        self._stop()
        for name in ("spill", "snapshots"):
            shutil.rmtree(self._folder / name, ignore_errors=True)
            if (kept / name).exists():
                (kept / name).replace(self._folder / name)
        shutil.rmtree(kept)
        self._serve()
        self._dead += [twin for twin in self._live if twin.id not in on_disk]
        self._live = [twin for twin in self._live if twin.id in on_disk]

    async def _used_bytes(self) -> int:
        """Bytes of the pages that the sessions really hold."""
        used: int = self._server.server._servicer.gauges().kv_used_bytes
        return used

    @invariant()
    def the_server_says_what_it_holds(self) -> None:
        usage = self._stock.GetInfo(pb.GetInfoRequest()).usage
        assert self._server.on_loop(self._used_bytes()) <= KV_MEMORY
        assert usage.kv_reserved_bytes <= KV_MEMORY
        assert usage.queued_steps == usage.queued_bytes == 0
        assert usage.spilled_bytes <= usage.spill_memory_bytes
        listed = {
            session.session_id: session for session in self._stock.ListSessions(pb.ListSessionsRequest()).sessions
        }
        assert listed.keys() <= {twin.id for twin in self._live}
        assert not self._spill or len(listed) == len(self._live)
        for twin in self._live:
            if session := listed.get(twin.id):
                lengths = [twin.cache.length(layer) for layer in range(LAYERS)]
                assert (session.min_length, session.max_length) == (min(lengths), max(lengths))


@pytest.mark.parametrize("spill", [True, False], ids=["spilled", "evicted"])
def test_no_token_is_lost_doubled_or_wrong(
    start_server: Any, connect_stock: Any, step_request: Any, tmp_path: Path, spill: bool
) -> None:
    run_state_machine_as_test(
        partial(Sessions, start_server, connect_stock, step_request, tmp_path / "server", spill),
        settings=settings(
            settings.default,
            max_examples=settings.default.max_examples // 8,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
        ),
    )

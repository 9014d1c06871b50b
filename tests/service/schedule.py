"""One schedule: clients that use sessions while they come and go, and the caches in process that these must equal.

Clients are careful: what got no answer is sent again as it was, before anything else. Several work at a time, each with
a session of its own, forks and restored sessions among them, in a memory that holds two.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

import numbaflash
from numbaflash_service.config import load
from numbaflash_service.errors import (
    BusyError,
    DrainingError,
    ExhaustedError,
    ServiceError,
    SessionEvictedError,
    SessionExpiredError,
    SessionLostError,
    SnapshotUnknownError,
    StorageError,
    from_status,
)
from numbaflash_service.servicer import AttentionServicer
from numbaflash_service.sessions import Shape
from numbaflash_service.v1 import attention_pb2 as pb

from .in_process import METHODS
from .simulated_service import GONE, Network, Server, Stream
from .simulation import EPOCH, Lane, Loop

LAYERS, HEADS, HEAD_DIM, ROLLBACK, TTL = 2, 1, 8, 6, 30.0
RING = {"capacity": 20, "sink_tokens": 2, "page_size": 8, "dtype": "float32", "rollback": ROLLBACK}
SHAPE = {"num_layers": LAYERS, "num_kv_heads": HEADS, "head_dim": HEAD_DIM, **RING}
KV_BYTES = Shape(**SHAPE, num_q_heads=0).kv_bytes
FILE_BYTES = 80_000  # more than the file of a session is counted as
MOVES = {"step": 6, "burst": 3, "attend": 1, "truncate": 4, "fork": 2, "snapshot": 1, "restore": 1, "idle": 1}
TOLD = {"session_id", "layer", "position", "request_id", "length", "name"}  # of a request, where a schedule fails


class Twin:
    """A session, and the caches in process that may be what it holds: more than one where a snapshot may be of any."""

    def __init__(
        self, session_id: str, caches: list[numbaflash.RingKVCache], ttl: float, used_at: float, server: int
    ) -> None:
        self.id = session_id
        self.caches = caches
        self.ttl = ttl
        self.epoch = 0
        self.closed = False  # somebody may have asked for it
        self.used_at = used_at
        self.server = server  # the number of the one that was last asked for it
        self.snapshots: set[str] = set()  # names whose files may still be written

    def length(self, layer: int) -> int:
        return self.caches[0].length(layer)


class Schedule:
    """What clients do with the server, and what they know."""

    def __init__(self, loop: Loop, folder: Path) -> None:
        self.loop, self.rng, self.folder = loop, loop.random, folder
        self.arrays = np.random.default_rng(self.rng.getrandbits(32))
        self.network = Network(loop)
        self.twins: list[Twin] = []
        self.snapshots: dict[str, list[tuple[list[int], numbaflash.RingKVCache]]] = {}
        self.said: list[str] = []
        self.losses = self.rng.choice([0.0, 0.2, 0.5])
        self.spill = self.rng.choice(["roomy", "roomy", "roomy", "tight", "none"])
        self.stops = self.rng.choice([0, 0, 1, 2])
        self.servers = 0
        self.losers: list[int] = []  # servers that were stopped such that sessions may be gone
        self.numbers = 0
        config = load(
            kv_memory="1MiB",
            spill_after=0.0,
            evict_after=0.0,
            default_ttl=TTL,
            snapshot_dir=folder / "snapshots",
            **({"spill_dir": folder / "spill", "spill_memory": "1MiB"} if self.spill != "none" else {}),
        )
        # Less than the command line takes: small caches are quick.
        few = {"kv_memory": KV_BYTES * 5 // 2, "kv_high_water": self.rng.choice([0.3, 0.9])}
        if self.spill == "tight":
            few["spill_memory"] = 2 * FILE_BYTES
        self.config = config.model_copy(update=few)

    def say(self, *words: object) -> None:
        self.said.append(f"{self.loop.turns:6} {self.loop.time():9.3f} " + " ".join(map(str, words)))

    def serve(self) -> None:
        self.servers += 1
        self.network.server = Server(self.loop, self.config)

    @property
    def servicer(self) -> AttentionServicer:
        assert self.network.server
        return self.network.server.servicer

    # -- calls -------------------------------------------------------------------------------------------------------

    async def ask(self, name: str, request: Any, twin: Twin | None = None) -> Any:
        """Make a call until it is answered: as a careful client, the same again after a loss."""
        data, number = request.SerializeToString(), self.numbers
        self.numbers += 1
        about = " ".join(f"{field.name}={value}" for field, value in request.ListFields() if field.name in TOLD)
        for attempt in range(1000):
            self.say(f"#{number}.{attempt}", name, about)
            sent_at, sent_to = self.loop.time(), self.servers
            reply = await self.network.call(name, data, losses=self.losses)
            if isinstance(reply, bytes):
                self.say(f"#{number}.{attempt}", "OK")
                answer = getattr(pb, METHODS[name].output_type.name).FromString(reply)
                if twin:
                    twin.used_at, twin.server = sent_at, sent_to
                    if name == "Truncate":  # one that had been done before does not prolong a session's life
                        twin.used_at = answer.expires_at.ToNanoseconds() / 1e9 - EPOCH - twin.ttl
                return answer
            self.say(f"#{number}.{attempt}", reply)
            if not self.passes(reply):
                if isinstance(reply, SessionLostError) and twin:
                    self.check_loss(twin, reply)
                raise reply
            if attempt > 2 or self.rng.random() < 0.5:
                await asyncio.sleep(self.rng.choice([0.001, 0.01, 1.0]))
        raise AssertionError(f"{name} does not come to an end: {reply}")

    def passes(self, error: ServiceError) -> bool:
        """Whether a careful client makes the call again."""
        if error is GONE or isinstance(error, (BusyError, DrainingError)):
            return True
        if isinstance(error, ExhaustedError):
            assert not isinstance(error, StorageError) or self.spill == "tight"
            return True
        assert error.reason or error.code is grpc.StatusCode.DEADLINE_EXCEEDED, error
        return error.reason is None

    def check_loss(self, twin: Twin, error: SessionLostError) -> None:
        """A session ends for a reason, and for no other."""
        expired = self.loop.time() >= twin.used_at + twin.ttl - 1e-3  # wall clocks round
        if isinstance(error, SessionExpiredError):
            assert expired, error
        elif isinstance(error, SessionEvictedError):
            assert self.spill != "roomy", error
        else:
            # The next server knows nothing of sessions that ended.
            forgotten = expired and self.servers > twin.server
            assert twin.closed or forgotten or any(server >= twin.server for server in self.losers), error
        if twin in self.twins:
            self.twins.remove(twin)

    # -- clients -----------------------------------------------------------------------------------------------------

    async def client(self, moves: int) -> None:
        """Make a session and use it, one call after the other."""
        ttl = self.rng.choice([2.0, TTL, TTL])
        request = pb.CreateSessionRequest(shape=pb.SessionShape(**SHAPE))
        request.ttl.FromMilliseconds(int(ttl * 1000))
        server, made = self.servers, await self.ask("CreateSession", request)
        cache = numbaflash.RingKVCache(LAYERS, HEADS, HEAD_DIM, **RING)
        await self.use(self.enter(made, [cache], ttl, server), moves)

    def enter(self, made: Any, caches: list[numbaflash.RingKVCache], ttl: float, server: int) -> Twin:
        twin = Twin(made.session_id, caches, ttl, made.expires_at.ToNanoseconds() / 1e9 - EPOCH - ttl, server)
        self.twins.append(twin)
        return twin

    async def use(self, twin: Twin, moves: int) -> None:
        try:
            for _ in range(moves):
                (move,) = self.rng.choices(list(MOVES), list(MOVES.values()))
                await getattr(self, move)(twin)
            if self.rng.random() < 0.3:
                twin.closed = True
                await self.ask("CloseSession", pb.CloseSessionRequest(session_id=twin.id), twin)
                await self.ask("Decode", self.new_step(twin, 0, 1), twin)
                raise AssertionError("a session that is closed takes steps")
        except SessionLostError as error:
            self.say(twin.id[-3:], "is lost:", error)

    def new_step(self, twin: Twin, layer: int, count: int, names: str = "qkv") -> pb.StepRequest:
        self.numbers += 1
        request = pb.StepRequest(
            session_id=twin.id, layer=layer, position=twin.length(layer), request_id=f"r{self.numbers}"
        )
        request.options.epoch = twin.epoch
        for name in names:
            array = self.arrays.standard_normal((count, HEADS, HEAD_DIM), np.float32)
            request.payload += bytes(-len(request.payload) % 64)
            request.tensors.add(
                name=name, dtype="float32", shape=array.shape, offset=len(request.payload), nbytes=array.nbytes
            )
            request.payload += array.tobytes()
        return request

    def any_step(self, twin: Twin, layer: int) -> pb.StepRequest:
        return self.new_step(twin, layer, self.rng.choice([1, 1, 1, 2, 12, 40]), self.rng.choice(["qkv", "qkv", "kv"]))

    def take(self, twin: Twin, request: pb.StepRequest, answer: pb.StepResponse) -> None:
        """The step has been taken, once: a cache that takes it gives the same, to the bit."""
        views = {
            tensor.name: np.frombuffer(request.payload, np.float32, tensor.nbytes // 4, tensor.offset).reshape(
                tensor.shape
            )
            for tensor in request.tensors
        }
        right = []
        for cache in twin.caches:
            out = (cache.step if "q" in views else cache.append)(request.layer, **views)
            at = cache.length(request.layer), cache.first(request.layer)
            if at == (answer.position, answer.first) and (out is None or out.tobytes() == answer.payload):
                right.append(cache)
        assert right, f"{twin.id} answers with other than its tokens"
        twin.caches = right
        self.changed(twin)

    def changed(self, twin: Twin) -> None:
        for name in twin.snapshots:  # a call that was given up may write it yet
            self.remember(name, twin)

    def remember(self, name: str, twin: Twin) -> None:
        lengths = [twin.length(layer) for layer in range(LAYERS)]
        self.snapshots.setdefault(name, []).extend((lengths, cache.fork()) for cache in twin.caches)

    async def step(self, twin: Twin) -> None:
        request = self.any_step(twin, self.rng.randrange(LAYERS))
        self.take(twin, request, await self.ask(self.rng.choice(["Prefill", "Decode"]), request, twin))

    async def burst(self, twin: Twin) -> None:
        """Send a step of each layer on a stream, both in flight; what got no answer is sent again by itself."""
        stream = Stream(self.network)
        requests = [self.any_step(twin, layer) for layer in range(LAYERS)]
        self.say("stream", [request.request_id for request in requests], twin.id[-3:])
        for request in requests:
            stream.send(request.SerializeToString())
        if self.rng.random() < self.losses:
            Lane(self.loop, "impatience").put(stream.cancel)
        waiting = {request.request_id: request for request in requests}
        while waiting and (answer := await stream.answer()):
            request = waiting[answer.request_id]
            if answer.HasField("error"):
                error = from_status(answer.error)
                self.say("stream", answer.request_id, error)
                if not self.passes(error):
                    if isinstance(error, SessionLostError):
                        self.check_loss(twin, error)
                    stream.end()
                    raise error
                break
            self.say("stream", answer.request_id, "OK")
            assert not answer.replayed
            del waiting[answer.request_id]
            self.take(twin, request, answer)
        stream.end()
        for request in waiting.values():
            self.take(twin, request, await self.ask("Decode", request, twin))

    async def attend(self, twin: Twin) -> None:
        layer = self.rng.randrange(LAYERS)
        if not twin.length(layer):
            return
        request = self.new_step(twin, layer, 1, "q")
        answer = await self.ask("Decode", request, twin)
        q = np.frombuffer(request.payload, np.float32).reshape(1, HEADS, HEAD_DIM)
        twin.caches = [cache for cache in twin.caches if cache.attend(layer, q).tobytes() == answer.payload]
        assert twin.caches

    async def truncate(self, twin: Twin) -> None:
        back = self.rng.choice([0, 1, 2, ROLLBACK, ROLLBACK + 15])
        length = max(0, min(twin.length(layer) for layer in range(LAYERS)) - back)
        request = pb.TruncateRequest(session_id=twin.id, length=length, epoch=twin.epoch)
        try:
            answer = await self.ask("Truncate", request, twin)
        except ServiceError as error:
            if getattr(error, "field", None) != "length":
                raise
            for cache in twin.caches:
                with pytest.raises(ValueError, match="length"):
                    cache.truncate(length)
            return
        for cache in twin.caches:
            cache.truncate(length)
        twin.epoch += 1
        assert (answer.epoch, answer.first) == (twin.epoch, twin.caches[0].first(0))
        self.changed(twin)

    async def fork(self, twin: Twin) -> None:
        if len(self.twins) < 5:
            made = await self.ask("Fork", pb.ForkRequest(session_id=twin.id), twin)
            assert list(made.state.lengths) == [twin.length(layer) for layer in range(LAYERS)]
            child = self.enter(made, [cache.fork() for cache in twin.caches], twin.ttl, twin.server)
            self.clients.append(self.loop.create_task(self.use(child, self.rng.randrange(4))))

    async def snapshot(self, twin: Twin) -> None:
        name = self.rng.choice("ab")
        twin.snapshots.add(name)
        self.remember(name, twin)
        answer = await self.ask("Snapshot", pb.SnapshotRequest(session_id=twin.id, name=name), twin)
        assert answer.usable_tokens == min(twin.length(layer) for layer in range(LAYERS))

    async def restore(self, _: Twin) -> None:
        name = self.rng.choice("ab")
        try:
            request = pb.RestoreRequest(name=name, ttl={"seconds": 2})
            server, made = self.servers, await self.ask("Restore", request)
        except SnapshotUnknownError:
            return
        caches = [cache.fork() for lengths, cache in self.snapshots[name] if lengths == list(made.state.lengths)]
        assert caches
        twin = self.enter(made, caches, 2.0, server)
        self.clients.append(self.loop.create_task(self.use(twin, self.rng.randrange(4))))

    async def idle(self, _: Twin) -> None:
        await asyncio.sleep(self.rng.choice([0.1, 1.5, 3.0]))

    # -- the server --------------------------------------------------------------------------------------------------

    async def operator(self) -> None:
        """Stop the server and start it again, on the same folders."""
        for _ in range(self.stops):
            await asyncio.sleep(self.rng.choice([0.0, 0.5, 2.0]))
            lane, due = Lane(self.loop, "operator"), self.loop.create_future()
            lane.put(due.set_result, None)
            await due
            await self.restart(self.rng.choice([0.0, 0.02, 10.0, 10.0]))

    async def restart(self, grace: float) -> None:
        server = self.network.server
        assert server
        self.say("stop", grace)
        began = self.loop.time()
        await server.stop(grace)
        if self.spill != "roomy" or self.loop.time() - began >= grace:
            self.losers.append(self.servers)
        self.say("stopped")
        self.serve()

    # -- all of it ---------------------------------------------------------------------------------------------------

    async def run(self, clients: int, moves: int) -> None:
        self.serve()
        self.clients = [self.loop.create_task(self.client(moves)) for _ in range(clients)]
        operator = self.loop.create_task(self.operator())
        while running := [task for task in [operator, *self.clients] if not task.done()]:
            await asyncio.wait(running, return_when=asyncio.FIRST_EXCEPTION)
            for task in [operator, *self.clients]:
                if task.done():
                    task.result()
        self.losses = 0.0
        self.say("the end")
        await self.everything_comes_back()
        await self.end()

    async def everything_comes_back(self) -> None:
        """Sessions that nobody ended are there, and as they were; half of them are closed."""
        if self.rng.random() < 0.5:
            await self.restart(100.0)
        for twin in list(self.twins):
            try:
                await self.attend(twin)
                if self.rng.random() < 0.5:
                    twin.closed = True
                    await self.ask("CloseSession", pb.CloseSessionRequest(session_id=twin.id), twin)
            except SessionLostError as error:
                self.say(twin.id[-3:], "is lost:", error)

    def left(self) -> dict[str, int]:
        servicer = self.servicer
        left = {
            "sessions": len(servicer._table),
            "reserved": servicer._table.kv_reserved,
            "steps": servicer._engine.steps,
            "queued bytes": servicer._engine.nbytes,
            "errands": servicer._engine._calls,
            "answers": servicer._answers.nbytes,
            "holds": servicer._memory.holds,
            "parked": len(servicer._memory._parked),
            "calls": servicer._door.calls.used,
            "streams": len(servicer._streams),
            "tasks": len(servicer._background),
            "snapshots": servicer._snapshots.nbytes,
            "a caller's": sum(p.sessions + p.kv_bytes for p in servicer._door._principals._by_name.values()),
            "spilled": servicer._spill.nbytes if servicer._spill else 0,
            "files": len(list(servicer._spill.path.glob("*.safetensors"))) if servicer._spill else 0,
        }
        return {what: count for what, count in left.items() if count}

    async def end(self) -> None:
        """When all sessions have had their time, nothing is left of them."""
        until = self.loop.time() + TTL + 30.0
        while (left := self.left()) and self.loop.time() < until:
            await asyncio.sleep(1.0)
        assert not left, left
        assert self.network.server
        await self.network.server.stop(10.0)
        partial = list(self.folder.rglob(".*safetensors*"))
        assert not partial

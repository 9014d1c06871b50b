"""Requests with faults in them, by the hundred thousand: no crash, no hang, no growth, every reply typed."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import random
import resource
from collections import Counter
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

import numbaflash_service
from numbaflash_service.auth import Authenticator
from numbaflash_service.config import load
from numbaflash_service.errors import ServiceError, from_call, from_status
from numbaflash_service.servicer import SERVICE, AttentionServicer
from numbaflash_service.v1 import attention_pb2 as pb

from .in_process import METHODS, Context, Methods
from .mutate import mutate, parses

# What is wrong with a request, and what is only so now. Above all not INTERNAL or UNKNOWN.
EXPECTED = {
    *("INVALID_ARGUMENT", "NOT_FOUND", "FAILED_PRECONDITION", "ABORTED", "RESOURCE_EXHAUSTED", "DATA_LOSS"),
}
# Snapshots go to disk and through its cache: some are enough.
WEIGHTS = {"Prefill": 30, "Decode": 60, "Attend": 60, "CreateSession": 15, "Fork": 10, "Truncate": 15, "Restore": 4}
SHAPES: list[dict[str, Any]] = [
    {"num_layers": 2, "num_kv_heads": 2, "head_dim": 16, "capacity": 64, "dtype": "float32"},
    {"num_layers": 1, "num_kv_heads": 1, "head_dim": 8, "capacity": 32, "sink_tokens": 4, "dtype": "float16"},
    {"num_layers": 1, "num_kv_heads": 2, "head_dim": 32, "capacity": 16, "page_size": 8, "dtype": "bfloat16"},
]


class Requests:
    """Requests that would be good, and what may come of those that are not."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.arrays = np.random.default_rng(seed)
        self.outcomes: Counter[str] = Counter()

    def request(self, name: str, session: pb.SessionInfo) -> Any:
        """A request that would be good, of a session as it was a moment ago."""
        rng = self.rng
        cls = getattr(pb, METHODS[name].input_type.name)
        if cls is pb.StepRequest:
            return self.step(session)
        if name == "CreateSession":
            return cls(shape=pb.SessionShape(**rng.choice(SHAPES)), ttl={"seconds": 60})
        if name == "Truncate":
            return cls(session_id=session.session_id, length=session.min_length)
        if name in ("Snapshot", "Restore"):
            more = {"session_id": session.session_id} if name == "Snapshot" else {}
            return cls(name=rng.choice(["one", "two"]), **more)
        return cls(session_id=session.session_id) if "session_id" in cls.DESCRIPTOR.fields_by_name else cls()

    def step(self, session: pb.SessionInfo) -> pb.StepRequest:
        rng, shape = self.rng, session.shape
        tokens = rng.choice([1, 1, 1, 2, 5, 20])
        step = pb.StepRequest(
            session_id=session.session_id,
            layer=rng.randrange(shape.num_layers),
            position=rng.choice([session.max_length, session.min_length]),
            request_id=rng.choice(["a", "b", ""]),
        )
        heads = {"q": 2 * shape.num_kv_heads, "k": shape.num_kv_heads, "v": shape.num_kv_heads}
        dtype = rng.choice(["float32", "float16"])
        for tensor in rng.choice([("q", "k", "v"), ("q", "k", "v"), ("k", "v"), ("q",)]):
            array = self.arrays.standard_normal((tokens, heads[tensor], shape.head_dim)).astype(dtype)
            step.payload += bytes(-len(step.payload) % 64)
            step.tensors.add(name=tensor, dtype=dtype, shape=array.shape, offset=len(step.payload), nbytes=array.nbytes)
            step.payload += array.tobytes()
        if rng.random() < 0.2:
            step.options.scale = 0.5
        return step

    def judge(self, name: str, request: bytes, reply: bytes | ServiceError | BaseException) -> None:
        if isinstance(reply, bytes):
            assert parses(getattr(pb, METHODS[name].output_type.name), reply)
            self.outcomes["OK"] += 1
            return
        assert isinstance(reply, ServiceError), (name, request, reply)
        assert reply.code.name in EXPECTED, (name, request, reply)
        assert reply.reason, (name, request, reply)
        assert len(reply.message) < 1000
        for secret in ("Traceback", ".py", str(Path(numbaflash_service.__file__).parent), "snapshots/"):
            assert secret not in reply.message, (name, request, reply)
        self.outcomes[reply.reason] += 1


class Fuzz(Requests):
    """A servicer without sockets, and sessions whose requests are mutated."""

    def __init__(self, seed: int, folder: Path) -> None:
        super().__init__(seed)
        config = load(
            kv_memory="48MiB", max_sessions=40, replay_memory="16MiB", snapshot_dir=folder, snapshot_memory="1GiB"
        )
        self.servicer = AttentionServicer(config, Authenticator(), None)
        self.methods = Methods(self.servicer)
        self.names = list(METHODS)
        self.weights = [WEIGHTS.get(name, 3) for name in self.names]

    async def call(self, name: str, request: bytes) -> bytes | ServiceError:
        context = Context([request])
        if not METHODS[name].client_streaming:
            return await self.methods.unary(name, request, context)
        failed = await self.methods.attend(context)
        if failed:
            return failed
        (answer,) = context.answers
        response = pb.StepResponse.FromString(answer)
        return from_status(response.error) if response.HasField("error") else answer

    async def send(self, name: str, **fields: Any) -> bytes:
        """Make a call that succeeds."""
        reply = await self.call(name, getattr(pb, METHODS[name].input_type.name)(**fields).SerializeToString())
        assert isinstance(reply, bytes), reply
        return reply

    async def sessions(self) -> list[pb.SessionInfo]:
        return list(pb.ListSessionsResponse.FromString(await self.send("ListSessions")).sessions)

    async def tend(self) -> list[pb.SessionInfo]:
        """Keep some sessions there: mutants make and end them."""
        sessions = await self.sessions()
        for session in self.rng.sample(sessions, max(0, len(sessions) - 12)):
            await self.send("CloseSession", session_id=session.session_id)
        for shape in SHAPES * 2:
            if len(sessions) < 6:
                await self.send("CreateSession", shape=pb.SessionShape(**shape))
        return await self.sessions()

    def next(self, sessions: list[pb.SessionInfo]) -> tuple[str, bytes]:
        (name,) = self.rng.choices(self.names, self.weights)
        request = self.request(name, self.rng.choice(sessions))
        good = self.rng.random() < 0.1  # so that there is something in the sessions
        return name, request.SerializeToString() if good else mutate(self.rng, request)

    async def run(self, count: int) -> None:
        """Send so many requests, eight at a time, and hold every reply to what it may be."""
        await self.servicer.warm_up()
        sizes = []
        for start in range(0, count, 400):
            sessions = await self.tend()
            for _ in range(50):
                chosen = [self.next(sessions) for _ in range(8)]
                async with asyncio.timeout(60):
                    replies = await asyncio.gather(*(self.call(*one) for one in chosen), return_exceptions=True)
                for (name, request), reply in zip(chosen, replies, strict=True):
                    self.judge(name, request, reply)
            if start % (count // 20) == 0:
                sizes.append(used_bytes())
        self.sizes = sizes
        async with asyncio.timeout(60):
            for session in await self.sessions():
                await self.send("CloseSession", session_id=session.session_id)
        await asyncio.sleep(0)
        assert self.servicer._table.kv_reserved == 0
        assert self.servicer._engine.steps == self.servicer._engine.nbytes == 0
        assert self.servicer._door.calls.used == 0
        await self.servicer.stop()


def used_bytes() -> int:
    """What this process has of the machine's memory, less what the collector and malloc would give back."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def growth(sizes: list[int]) -> int:
    """How far the least of the last quarter lies above the least of the second.

    Any one size says too little: sessions of up to 48 MiB are there at one moment and gone at the next.
    """
    quarter = len(sizes) // 4
    return min(sizes[-quarter:]) - min(sizes[quarter : 2 * quarter])


def run(seed: int, count: int, folder: Path) -> Fuzz:
    async def fuzz() -> Fuzz:
        made = Fuzz(seed, folder)
        await made.run(count)
        return made

    return asyncio.run(fuzz())


@pytest.mark.parametrize(
    "count",
    [
        4_000,
        pytest.param(200_000, marks=pytest.mark.slow),  # so many requests: 45 s
    ],
)
def test_requests_with_faults_get_typed_replies_and_leave_nothing_behind(tmp_path: Path, count: int) -> None:
    fuzz = run(count, count, tmp_path)
    assert sum(fuzz.outcomes.values()) == count
    # All doors were tried: what is taken, and every kind of refusal.
    assert {"OK", "BAD_TENSOR", "SESSION_UNKNOWN", "POSITION_MISMATCH", "BUSY"} <= fuzz.outcomes.keys()
    assert growth(fuzz.sizes) < 16 << 20


def test_requests_with_faults_over_a_socket(start_server: Any, connect_stock: Any) -> None:
    stock = connect_stock(start_server(kv_memory="48MiB"))
    fuzz = Requests(2)
    for count in range(1500):
        if count % 100 == 0:
            for shape in SHAPES:
                stock.new_session(**shape)
            sessions = stock.ListSessions(pb.ListSessionsRequest()).sessions
        name = fuzz.rng.choice(["Prefill", "Decode", "Attend", "CreateSession", "Truncate", "Fork", "CloseSession"])
        streaming = METHODS[name].client_streaming
        request = mutate(fuzz.rng, fuzz.request(name, fuzz.rng.choice(sessions)))
        call = (stock.channel.stream_unary if streaming else stock.channel.unary_unary)(f"/{SERVICE}/{name}")
        try:
            reply = call(iter([request]) if streaming else request, timeout=30)
        except grpc.RpcError as error:
            fuzz.judge(name, request, from_call(error))
        else:
            fuzz.judge(name, request, reply)
    stock.GetInfo(pb.GetInfoRequest())

"""A session's life between its making and its end: Fork, Truncate, Snapshot and Restore.

Each of them is, for the session, what a step is: it waits for nobody else's steps (BUSY), takes place whole or not at
all, and starts the time to live anew. A caller that goes away does not stop what has begun.
"""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import asdict
from functools import partial
from typing import Any, TypeAlias

import grpc

from numbaflash import RingKVCache

from . import validation, wire
from .door import Call
from .engine import Engine
from .errors import BadTensorError, ServiceError
from .memory import Memory
from .principals import Principal
from .records import Record
from .replay import Answers
from .sessions import Session, SessionTable, Shape
from .snapshots import Snapshots, read
from .to_the_end import to_the_end
from .v1 import attention_pb2 as pb

Fill: TypeAlias = Callable[[], Awaitable[RingKVCache]]
_Made: TypeAlias = tuple[Session, pb.SessionState]
Enter: TypeAlias = Callable[[Principal, Shape, float, Fill], Coroutine[Any, Any, Session]]


class LifeMethods:
    """The RPCs; bytes in and out, as everything that the servicer serves.

    Args:
        table: The sessions.
        engine: The thread that their caches belong to.
        answers: What their last steps gave.
        memory: Keeps them in memory while something is done with them.
        snapshots: None where there is no place for them.
        max_ttl: The longest time to live.
        backend: Of the caches.
        enter: Makes a session with a cache.
        leave: Ends one that nobody got to know of.
    """

    def __init__(
        self,
        table: SessionTable,
        engine: Engine,
        answers: Answers,
        memory: Memory,
        snapshots: Snapshots | None,
        *,
        max_ttl: float,
        backend: str,
        enter: Enter,
        leave: Callable[[Session], object],
    ) -> None:
        self._table = table
        self._engine = engine
        self._answers = answers
        self._memory = memory
        self._snapshots = snapshots
        self._max_ttl = max_ttl
        self._backend = backend
        self._enter = enter
        self._leave = leave

    async def fork(self, wire_request: bytes, call: Call) -> bytes:
        """Make a child that shares all pages."""
        request = wire.decode(pb.ForkRequest, wire_request)
        session = self._table.get(request.session_id, call.principal)

        async def run() -> _Made:
            async with self._memory.hold(session, call) as cache:
                child = await self._enter(
                    call.principal, session.shape, session.ttl, lambda: self._engine.call(cache.fork, call.principal)
                )
                return child, describe_state(child)

        child, state = await self._made(run())
        response = pb.ForkResponse(session_id=child.id, state=state)
        response.expires_at.FromNanoseconds(int(child.expires_at * 1e9))
        return response.SerializeToString()

    async def truncate(self, wire_request: bytes, call: Call) -> bytes:
        """Take a session back to a length, or say that this very call has done so before."""
        request = wire.decode(pb.TruncateRequest, wire_request)
        session = self._table.get(request.session_id, call.principal)

        def is_due() -> bool:
            if request.epoch + 1 == session.epoch and request.length == session.truncated_to:
                return False
            session.check_epoch(request.epoch)
            return True

        async def run() -> bool:
            async with self._memory.hold(session, call) as cache:
                if not is_due():  # the same call, whose caller has gone, has come to its end meanwhile
                    return False

                def truncate() -> None:
                    cache.truncate(request.length)
                    self._answers.forget_session(session.id, session.shape.num_layers)

                try:
                    await self._engine.call(truncate, call.principal)
                except ValueError as error:
                    raise BadTensorError("length", str(error)) from None
                session.epoch += 1
                session.truncated_to = request.length
                return True

        done = is_due() and await to_the_end(run())
        return _truncated(session, replayed=not done)

    async def snapshot(self, wire_request: bytes, call: Call) -> bytes:
        """Write a session to a file of the server's."""
        request = wire.decode(pb.SnapshotRequest, wire_request)
        snapshots = self._place()
        name = validation.snapshot_name(request.name)
        session = self._table.get(request.session_id, call.principal)

        async def run() -> int:
            async with self._memory.hold(session, call) as cache:
                record = Record.of(session)
                await snapshots.write(call.principal, name, record, cache)
                return min(record.lengths)

        return pb.SnapshotResponse(usable_tokens=await to_the_end(run())).SerializeToString()

    async def restore(self, wire_request: bytes, call: Call) -> bytes:
        """Make a session from a snapshot."""
        request = wire.decode(pb.RestoreRequest, wire_request)
        snapshots = self._place()
        name = validation.snapshot_name(request.name)
        asked = validation.time_to_live(request.ttl, self._max_ttl) if request.HasField("ttl") else None

        async def run() -> _Made:
            with contextlib.closing(await snapshots.open(call.principal, name)) as file:
                record = file.record
                ttl = min(record.ttl, self._max_ttl) if asked is None else asked
                session = await self._enter(call.principal, record.shape, ttl, partial(read, file, self._backend))
                return session, describe_state(session)

        session, state = await self._made(run())
        response = pb.RestoreResponse(session_id=session.id, usable_tokens=min(state.lengths), state=state)
        response.expires_at.FromNanoseconds(int(session.expires_at * 1e9))
        return response.SerializeToString()

    def _place(self) -> Snapshots:
        if self._snapshots is None:
            raise ServiceError("this server has no folder for snapshots", code=grpc.StatusCode.UNIMPLEMENTED)
        return self._snapshots

    async def _made(self, operation: Coroutine[Any, Any, _Made]) -> _Made:
        """Return the session that an operation makes; where the caller goes away meanwhile, it is ended."""
        return await to_the_end(operation, undo=lambda made: self._leave(made[0]))


def describe_state(session: Session) -> pb.SessionState:
    """Say what a session in memory holds."""
    cache = session.cache
    assert cache is not None
    layers = range(session.shape.num_layers)
    return pb.SessionState(
        shape=pb.SessionShape(**asdict(session.shape)),
        lengths=[cache.length(layer) for layer in layers],
        firsts=[cache.first(layer) for layer in layers],
        epoch=session.epoch,
        kv_bytes=session.kv_bytes,
    )


def _truncated(session: Session, *, replayed: bool) -> bytes:
    length = session.truncated_to
    assert length is not None
    response = pb.TruncateResponse(epoch=session.epoch, first=session.shape.first_visible(length), replayed=replayed)
    response.expires_at.FromNanoseconds(int(session.expires_at * 1e9))
    return response.SerializeToString()

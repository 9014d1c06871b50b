"""A session's life between its making and its end: Fork and Truncate.

Each of them is, for the session, what a step is: it waits for nobody else's steps (BUSY), takes place whole or not at
all, and starts the time to live anew. A caller that goes away does not stop what has begun.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import asdict
from typing import Any, TypeAlias, TypeVar

from numbaflash import RingKVCache

from . import wire
from .door import Call
from .engine import Engine
from .errors import BadTensorError
from .principals import Principal
from .replay import Answers
from .sessions import Session, SessionTable, Shape
from .v1 import attention_pb2 as pb

T = TypeVar("T")
Fill: TypeAlias = Callable[[], Awaitable[RingKVCache]]
Enter: TypeAlias = Callable[[Principal, Shape, float, Fill], Coroutine[Any, Any, Session]]


class LifeMethods:
    """The RPCs; bytes in and out, as everything that the servicer serves.

    Args:
        table: The sessions.
        engine: The thread that their caches belong to.
        answers: What their last steps gave.
        enter: Makes a session with a cache.
        leave: Ends one that nobody got to know of.
    """

    def __init__(
        self,
        table: SessionTable,
        engine: Engine,
        answers: Answers,
        enter: Enter,
        leave: Callable[[Session], object],
    ) -> None:
        self._table = table
        self._engine = engine
        self._answers = answers
        self._enter = enter
        self._leave = leave

    async def fork(self, wire_request: bytes, call: Call) -> bytes:
        """Make a child that shares all pages."""
        request = wire.decode(pb.ForkRequest, wire_request)
        session = self._table.get(request.session_id, call.principal)

        async def run() -> Session:
            async with self._hold(session, call) as cache:
                return await self._enter(
                    call.principal, session.shape, session.ttl, lambda: self._engine.call(cache.fork)
                )

        child = await self._made(run())
        response = pb.ForkResponse(session_id=child.id, state=describe_state(child))
        response.expires_at.FromNanoseconds(int(child.expires_at * 1e9))
        return response.SerializeToString()

    async def truncate(self, wire_request: bytes, call: Call) -> bytes:
        """Take a session back to a length, or say that this very call has done so before."""
        request = wire.decode(pb.TruncateRequest, wire_request)
        session = self._table.get(request.session_id, call.principal)
        if request.epoch + 1 == session.epoch and request.length == session.truncated_to:
            return _truncated(session, replayed=True)
        session.check_epoch(request.epoch)

        async def run() -> None:
            async with self._hold(session, call) as cache:
                session.check_epoch(request.epoch)

                def truncate() -> None:
                    cache.truncate(request.length)
                    self._answers.forget_session(session.id, session.shape.num_layers)

                try:
                    await self._engine.call(truncate)
                except ValueError as error:
                    raise BadTensorError("length", str(error)) from None
                session.epoch += 1
                session.truncated_to = request.length

        await _to_the_end(run())
        return _truncated(session, replayed=False)

    async def _made(self, operation: Coroutine[Any, Any, Session]) -> Session:
        """Return the session that an operation makes; where the caller goes away meanwhile, it is ended."""
        task = asyncio.ensure_future(operation)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            task.add_done_callback(lambda done: done.exception() or self._leave(done.result()))
            raise

    @asynccontextmanager
    async def _hold(self, session: Session, call: Call) -> AsyncIterator[RingKVCache]:
        """Keep everybody else's steps from a session, and its cache from being let go of, while the block runs."""
        session.begin_step(call)
        session.work = asyncio.current_task()
        try:
            assert session.cache is not None
            yield session.cache
        finally:
            session.work = None
            session.end_step()


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


async def _to_the_end(operation: Coroutine[Any, Any, T]) -> T:
    """Run an operation whole, also when whoever waits for it is cancelled."""
    return await asyncio.shield(asyncio.ensure_future(operation))

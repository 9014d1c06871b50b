"""One Attend stream: many steps in flight, answered in order per session."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import grpc

from . import wire
from .door import Call
from .errors import ServiceError
from .replies import encode_answer, encode_error
from .steps import Done, Outcome, Step
from .v1 import attention_pb2 as pb

Submit: TypeAlias = Callable[[wire.Parts[pb.StepRequest], Call, Callable[[Outcome], None]], Step]


@dataclass(eq=False, slots=True)
class _InFlight:
    request: pb.StepRequest
    step: Step | None = None
    outcome: Outcome = None


class AttendStream:
    """Reads steps, hands them on, and writes what comes of them.

    Args:
        call: The Attend call.
        submit: Queues a step, as `AttentionServicer.submit`.
        count: Gets every error that a step is answered with.
        max_in_flight: Steps that may wait for their computation or for their answer to be written; beyond that nothing
            is read, and HTTP/2 holds the client back.

    Attributes:
        call: The Attend call.
    """

    def __init__(self, call: Call, submit: Submit, count: Callable[[ServiceError], None], max_in_flight: int) -> None:
        self.call = call
        self._context = call.context
        self._submit = submit
        self._count = count
        self._room = asyncio.Semaphore(max_in_flight)
        self._pending: dict[str, deque[_InFlight]] = {}  # by session, in the order of arrival
        self._ready: asyncio.Queue[_InFlight | None] = asyncio.Queue()
        self._reader: asyncio.Task[None] | None = None
        self._reader_ended = False
        self._stopped = False

    async def run(self) -> None:
        """Serve the stream until the client ends it or `stop_reading` is called, and all steps are answered."""
        self._reader = asyncio.create_task(self._read())
        try:
            await self._write()
            if not self._stopped:
                await self._reader
        finally:
            self._reader.cancel()
            for waiting in self._pending.values():
                for entry in waiting:
                    if entry.step:
                        entry.step.taken_back = True

    def stop_reading(self) -> None:
        """Take no more steps."""
        self._stopped = True
        if self._reader:
            self._reader.cancel()

    async def _read(self) -> None:
        try:
            while True:
                await self._room.acquire()
                received = await self._context.read()
                if received is grpc.aio.EOF:
                    return
                self._begin(received)
                del received  # its memory takes the next one: fresh pages would cost more than the copy into them
                if not self._ready.empty():
                    await asyncio.sleep(0)  # the answer goes out before the next read is prepared
        finally:
            self._reader_ended = True
            self._end_when_answered()

    async def _write(self) -> None:
        while (entry := await self._ready.get()) is not None:
            if isinstance(entry.outcome, Done):
                answer = encode_answer(entry.request, entry.outcome)
            else:
                assert entry.outcome is not None
                self._count(entry.outcome)
                answer = encode_error(entry.request, entry.outcome)
            await self._context.write(answer)
            self._room.release()

    def _begin(self, received: bytes) -> None:
        entry = _InFlight(pb.StepRequest())
        try:
            parts = wire.decode_step(pb.StepRequest, received)
            entry.request = parts.head
            step = self._submit(parts, self.call, partial(self._settle, entry))
            if entry.outcome is None:
                entry.step = step
        except ServiceError as error:
            entry.outcome = error
        self._pending.setdefault(entry.request.session_id, deque()).append(entry)
        if entry.outcome:
            self._pass_on(entry.request.session_id)

    def _settle(self, entry: _InFlight, outcome: Outcome) -> None:
        entry.outcome = outcome
        # The step knows the entry: both, and the payload, would stay until the garbage collector comes for the cycle.
        entry.step = None
        self._pass_on(entry.request.session_id)

    def _pass_on(self, session_id: str) -> None:
        """Pass on what is done of a session, up to the first step that is not."""
        entries = self._pending.get(session_id)
        while entries and entries[0].outcome:
            self._ready.put_nowait(entries.popleft())
        if not entries:
            self._pending.pop(session_id, None)
        self._end_when_answered()

    def _end_when_answered(self) -> None:
        if self._reader_ended and not self._pending:
            self._ready.put_nowait(None)

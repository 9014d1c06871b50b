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

    Two tasks do that in turns: while one writes, the other reads. The one that has read a step which was computed at
    once writes its answer too, for to wake the other would take some 20 us.

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
        self._ready: deque[_InFlight] = deque()  # to be answered
        self._reading: asyncio.Task[None] | None = None  # the task that does
        self._writing = False
        self._ended = False  # nothing more is read
        self._stopped = False
        self._news = asyncio.Event()  # wakes a task that has nothing to do

    async def run(self) -> None:
        """Serve the stream until the client ends it or `stop_reading` is called, and all steps are answered."""
        tasks = [asyncio.create_task(self._serve()) for _ in range(2)]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            for waiting in self._pending.values():
                for entry in waiting:
                    if entry.step:
                        entry.step.taken_back = True

    def stop_reading(self) -> None:
        """Take no more steps."""
        if self._stopped:
            return  # a second cancellation would end more than the reading
        self._stopped = self._ended = True
        if self._reading:
            self._reading.cancel()
        self._news.set()

    async def _serve(self) -> None:
        """Read and write, whichever the other task does not do, until neither is left to do."""
        while not self._ended or self._pending or self._ready:
            if self._ready and not self._writing:
                self._writing = True
                await self._write()
                self._writing = False
            elif not self._ended and not self._reading:
                self._reading = asyncio.current_task()
                await self._read()
                self._reading = None
            else:
                self._news.clear()
                await self._news.wait()
        self._news.set()

    async def _read(self) -> None:
        try:
            await self._room.acquire()
            received = await self._context.read()
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if self._stopped and task and not task.uncancel():
                return
            raise
        if received is grpc.aio.EOF:
            self._ended = True
        else:
            self._begin(received)

    async def _write(self) -> None:
        while self._ready:
            entry = self._ready.popleft()
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
            self._ready.append(entries.popleft())
        if not entries:
            self._pending.pop(session_id, None)
        self._news.set()

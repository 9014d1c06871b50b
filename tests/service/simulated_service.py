"""A server and its network on a simulated loop: calls and streams arrive, are answered, lost and cancelled."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any

import grpc

from numbaflash_service.auth import Authenticator
from numbaflash_service.errors import ServiceError
from numbaflash_service.servicer import AttentionServicer
from numbaflash_service.v1 import attention_pb2 as pb

from .in_process import Context, Methods
from .simulation import Lane, Loop, Process

GONE = ServiceError("the answer was lost", code=grpc.StatusCode.UNAVAILABLE)


class Server(Process):
    """A process that serves: a servicer, and around it what `server.Server` does."""

    def __init__(self, loop: Loop, config: Any) -> None:
        super().__init__()
        self._loop = loop
        self.servicer = self.context.run(AttentionServicer, config, Authenticator(), None)
        self._methods = Methods(self.servicer)
        self._calls: set[asyncio.Task[Any]] = set()
        self._listening = True
        self._housekeeping = self._task(self.servicer.keep_house())

    def _task(self, coroutine: Any) -> asyncio.Task[Any]:
        return self._loop.create_task(coroutine, context=self.context.copy())

    def begin(self, name: str, request: bytes, time_remaining: float | None) -> asyncio.Task[Any] | None:
        """Begin a unary call; None: nobody listens any more."""
        return self._call(lambda: self._methods.unary(name, request, Context(time_remaining=time_remaining)))

    def attend(self, context: Any) -> asyncio.Task[Any] | None:
        return self._call(lambda: self._methods.attend(context))

    def _call(self, make: Any) -> asyncio.Task[Any] | None:
        if not self._listening:
            return None
        task = self._task(make())
        self._calls.add(task)
        task.add_done_callback(self._calls.discard)
        return task

    async def stop(self, grace: float) -> None:
        await self._task(self._stop(grace))
        # As `asyncio.run` does at its end.
        left = list(self.tasks)
        for task in left:
            task.cancel()
        if left:
            await asyncio.wait(left)
        while not all(thread.ended for thread in self.threads):
            await asyncio.sleep(0.01)

    async def _stop(self, grace: float) -> None:
        until = self._loop.time() + grace
        self.servicer.drain()
        while self.servicer.busy and self._loop.time() < until:
            await asyncio.sleep(0.01)
        self._listening = False
        if self._calls:
            await asyncio.wait(self._calls, timeout=min(1.0, max(0.0, until - self._loop.time())))
        for call in self._calls:
            call.cancel()
        self._housekeeping.cancel()
        await self.servicer.stop()


class Network:
    """Between clients and the server: calls arrive, and are answered or given up, at any time."""

    def __init__(self, loop: Loop) -> None:
        self.loop = loop
        self.server: Server | None = None

    async def call(self, name: str, request: bytes, *, losses: float) -> bytes | ServiceError:
        """Make a call; `GONE` where its caller has given it up, or its server is not there."""
        loop, rng = self.loop, self.loop.random
        reply = loop.create_future()
        there, back = Lane(loop, "request"), Lane(loop, "answer")
        task: asyncio.Task[Any] | None = None
        deadline = rng.choice([0.001, 0.1]) if rng.random() < losses / 4 else None

        def arrive() -> None:
            nonlocal task
            task = self.server.begin(name, request, deadline) if self.server else None
            if task:
                task.add_done_callback(lambda task: back.put(answer, GONE if task.cancelled() else task.result()))
            else:
                back.put(answer, GONE)

        def cancel() -> None:
            if task:
                task.cancel()

        def answer(what: bytes | ServiceError) -> None:
            if not reply.done():
                reply.set_result(what)

        def give_up(also_there: bool) -> None:
            answer(GONE)
            if also_there:
                there.put(cancel)

        there.put(arrive)
        if deadline is not None:
            loop.call_later(deadline, give_up, True)
        elif rng.random() < losses:
            Lane(loop, "impatience").put(give_up, rng.random() < 0.7)
        result: bytes | ServiceError = await reply
        return result


class Stream:
    """An Attend call, on both sides."""

    def __init__(self, network: Network) -> None:
        self._loop = loop = network.loop
        self._there, self._back = Lane(loop, "request"), Lane(loop, "answer")
        self._requests: deque[bytes] = deque()
        self._reader: asyncio.Future[None] | None = None
        self._answers: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._task: asyncio.Task[Any] | None = None
        self._there.put(self._arrive, network)

    def _arrive(self, network: Network) -> None:
        self._task = network.server.attend(self) if network.server else None
        if self._task:
            self._task.add_done_callback(lambda _: self._back.put(self._answers.put_nowait, None))
        else:
            self._back.put(self._answers.put_nowait, None)

    # -- the client's side -------------------------------------------------------------------------------------------

    def send(self, request: bytes) -> None:
        self._there.put(self._receive, request)

    def end(self) -> None:
        self._there.put(self._receive, grpc.aio.EOF)

    def cancel(self) -> None:
        self._there.put(lambda: self._task and self._task.cancel())

    async def answer(self) -> pb.StepResponse | None:
        """The next one; None: the stream has ended."""
        answer = await self._answers.get()
        if answer is None:
            self._answers.put_nowait(None)
            return None
        return pb.StepResponse.FromString(answer)

    # -- the server's side: what the service uses of grpc.aio's context ----------------------------------------------

    def _receive(self, request: bytes) -> None:
        self._requests.append(request)
        if self._reader and not self._reader.done():
            self._reader.set_result(None)

    async def read(self) -> Any:
        while not self._requests:
            self._reader = self._loop.create_future()
            await self._reader
        return self._requests.popleft()

    async def write(self, answer: bytes) -> None:
        self._back.put(self._answers.put_nowait, answer)
        written = self._loop.create_future()
        Lane(self._loop, "written").put(lambda: written.done() or written.set_result(None))
        await written

    invocation_metadata = Context.invocation_metadata
    abort = Context.abort

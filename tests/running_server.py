"""A server in this process, on a loop and a thread of its own."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

from numbaflash_service.config import load
from numbaflash_service.server import Server


class RunningServer:
    def __init__(self, **config: Any) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self.server = self.on_loop(self._make({"listen": ["127.0.0.1:0"], "grace": 2.0, **config}))
        self.target = self.server.addresses[0]
        self.submitted: list[Any] = []  # every step that was queued
        self.stopping: concurrent.futures.Future[None] | None = None
        submit = self.engine.submit

        def record(step: Any, writer: object) -> None:
            submit(step, writer)
            self.submitted.append(step)

        self.engine.submit = record

    async def _make(self, config: dict[str, Any]) -> Server:
        server = Server(load(**config))
        await server.start()
        return server

    def on_loop(self, coroutine: Any) -> Any:
        # Long enough to compile the kernels, on the first start ever.
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(timeout=300)

    @property
    def engine(self) -> Any:
        return self.server._servicer._engine

    @property
    def answers(self) -> Any:
        return self.server._servicer._answers

    @contextlib.contextmanager
    def engine_held(self) -> Iterator[None]:
        """Keep the engine's thread from taking anything while the block runs."""
        holding, release = threading.Event(), threading.Event()

        def hold() -> None:
            holding.set()
            release.wait(timeout=30)

        held = asyncio.run_coroutine_threadsafe(self.engine.call(hold), self._loop)
        assert holding.wait(timeout=30)
        try:
            yield
        finally:
            release.set()
            held.result(timeout=30)

    def wait_until(self, condition: Callable[[], bool]) -> None:
        async def wait() -> None:
            while not condition():
                await asyncio.sleep(0.001)

        self.on_loop(asyncio.wait_for(wait(), 20))

    def wait_for_queue(self, steps: int) -> None:
        """Return when so many steps wait or run."""
        self.wait_until(lambda: self.engine.steps == steps)

    def begin_stop(self) -> concurrent.futures.Future[None]:
        self.stopping = asyncio.run_coroutine_threadsafe(self.server.stop(), self._loop)
        return self.stopping

    def stop(self) -> None:
        """Stop the server, which may have begun to, and end its thread."""
        if self._thread.is_alive():
            (self.stopping or self.begin_stop()).result(timeout=30)
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

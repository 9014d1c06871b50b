"""`numbaflash serve` in a process of its own, for as long as the demo runs."""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

SERVICE = "numbaflash.v1.Attention"
STOP_SECONDS = 5.0


class ServiceUnavailableError(RuntimeError):
    """There is no service that answers; the message says why in one line."""


class ServiceProcess:
    """A server of our own, on a unix socket in a folder that nobody else can enter.

    SIGTERM raises SystemExit while it runs, so that it is not left behind. To be used on the main thread.

    Args:
        backend: of `numbaflash serve`; None lets it choose.

    Attributes:
        target: its address.
    """

    def __init__(self, backend: str | None = None) -> None:
        self._arguments = [] if backend is None else ["--backend", backend]

    def __enter__(self) -> ServiceProcess:
        self._folder = tempfile.TemporaryDirectory(prefix="numbaflash-")
        self.target = f"unix:{self._folder.name}/socket"
        self._log = Path(self._folder.name, "log")
        arguments = ["serve", "--listen", self.target, "--log-level", "warning", *self._arguments]
        with self._log.open("wb") as log:
            self._process: subprocess.Popen[Any] = subprocess.Popen(
                [sys.executable, "-c", "from numbaflash_service.cli import main; main()", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                # Ctrl-C is for the demo, which then stops its server when it is done with it.
                start_new_session=True,
            )
        self._on_sigterm = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.signal(signal.SIGTERM, self._on_sigterm)
        self._process.terminate()
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._folder.cleanup()

    def check_alive(self) -> None:
        """Raise ServiceUnavailableError, with the server's last words, if the process has ended."""
        if self._process.poll() is not None:
            said = self._log.read_text(errors="replace").strip().splitlines() or ["nothing"]
            raise ServiceUnavailableError(
                f"the service ended with status {self._process.returncode}; its last words: {said[-1]}"
            )


def wait_until_serving(target: str, timeout: float, meanwhile: Callable[[], None] = lambda: None) -> None:
    """Return as soon as the health service of `target` says SERVING.

    Args:
        target: HOST:PORT or unix:PATH.
        timeout: in seconds.
        meanwhile: is called between attempts; may raise.

    Raises:
        ServiceUnavailableError: it did not within `timeout`.
    """
    until = time.monotonic() + timeout
    # Without these a refused connection is tried again after a second only.
    backoff = [(f"grpc.{which}_reconnect_backoff_ms", 100) for which in ("initial", "max")]
    with grpc.insecure_channel(target, options=backoff) as channel:
        check = health_pb2_grpc.HealthStub(channel).Check
        while True:
            try:
                reply = check(health_pb2.HealthCheckRequest(service=SERVICE), timeout=0.5, wait_for_ready=True)
                if reply.status == health_pb2.HealthCheckResponse.SERVING:
                    return
                said = health_pb2.HealthCheckResponse.ServingStatus.Name(reply.status)
            except grpc.RpcError as error:
                said = error.details()
            meanwhile()
            if time.monotonic() > until:
                raise ServiceUnavailableError(f"no service answers at {target} within {timeout:.3g} s: {said}")
            time.sleep(0.02)

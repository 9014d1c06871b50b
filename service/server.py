"""The process: ports, the standard services beside ours, signals, a stop that loses nothing."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import signal
import time
from typing import TYPE_CHECKING

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from . import logs, wire
from .addresses import is_local
from .auth import Authenticator, TokenFile
from .config import ServeConfig
from .placement import share_a_cpu
from .servicer import SERVICE, AttentionServicer
from .status_page import StatusPage
from .tls import ServerCertificate

if TYPE_CHECKING:
    from .tracing import Tracing

log = logging.getLogger(__name__)


class Server:
    """A server, on the running event loop.

    Args:
        config: Where to listen, limits and budgets.

    Attributes:
        addresses: What to give to a client, once started: the addresses of the configuration, with the ports that were
            chosen in the place of port 0.
        status_page: Metrics and the page; None where the configuration has no port for them.
    """

    def __init__(self, config: ServeConfig) -> None:
        self._config = config
        self.addresses: tuple[str, ...] = ()
        self.status_page: StatusPage | None = None

    async def start(self) -> None:
        """Listen, get ready, and say SERVING; calls that come before wait.

        Raises:
            OSError: An address cannot be listened on, or a file cannot be read.
            ValueError: There is no such backend here, a file holds nothing like a certificate or tokens, or an extra is
                not installed.
        """
        config = self._config
        self._credentials = None
        if config.tls_cert and config.tls_key:
            certificate = ServerCertificate(config.tls_cert, config.tls_key, config.tls_client_ca)
            self._credentials = certificate.credentials()
        tokens = TokenFile(config.auth_tokens) if config.auth_tokens else None
        self._tracing = _tracing(config.otlp_endpoint)
        authenticator = Authenticator(tokens, certificates=config.tls_client_ca is not None)
        self._servicer = AttentionServicer(config, authenticator, self._tracing)
        self._health = health.aio.HealthServicer()
        self._server = grpc.aio.server(
            options=[
                ("grpc.max_receive_message_length", config.max_message_bytes),
                ("grpc.max_send_message_length", config.max_message_bytes),
                ("grpc.http2.max_frame_size", wire.FRAME_BYTES),
                # Calls beyond max_calls are refused with the time to come again; who does not heed that is held back.
                ("grpc.max_concurrent_streams", 2 * config.max_calls),
                # Who vanished without a word is noticed, and his streams end.
                ("grpc.keepalive_time_ms", 60_000),
                ("grpc.keepalive_timeout_ms", 20_000),
                # Without this, a second server on the same port would start, and take half of the first one's calls.
                ("grpc.so_reuseport", 0),
            ]
        )
        self._server.add_generic_rpc_handlers((self._servicer.handler(),))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        if config.reflection:
            names = (SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME)
            reflection.enable_server_reflection(names, self._server)
        await self._say(health_pb2.HealthCheckResponse.NOT_SERVING)
        try:
            self.addresses = tuple(self._listen(address) for address in config.listen)
            if config.metrics_port is not None:
                self.status_page = StatusPage(self._servicer, config.metrics_host, config.metrics_port)
                self.status_page.start()
            await self._server.start()
            log.info("listening; compiling the kernels, where this is their first start here")
            await self._servicer.warm_up()
        except BaseException:
            await self._server.stop(grace=None)
            await self._servicer.stop()
            if self.status_page:
                await self.status_page.stop()
            raise
        self._housekeeping = asyncio.create_task(self._servicer.keep_house())
        await self._say(health_pb2.HealthCheckResponse.SERVING)
        if self.status_page:
            self.status_page.state = "serving"

    async def stop(self) -> None:
        """Say NOT_SERVING, refuse what is new, let what runs finish within the configured grace, and stop."""
        began = time.monotonic()
        until = began + self._config.grace
        log.info("stopping", extra=self._servicer.load())
        if self.status_page:
            self.status_page.state = "stopping"
        await self._health.enter_graceful_shutdown()
        self._servicer.drain()
        while self._servicer.busy and time.monotonic() < until:
            await asyncio.sleep(0.01)
        unfinished = self._servicer.load()["steps"]
        # Calls of the standard services, such as a health watch, would never end by themselves.
        await self._server.stop(grace=min(1.0, max(0.0, until - time.monotonic())))
        self._housekeeping.cancel()
        await self._servicer.stop()
        if self._tracing:
            await asyncio.to_thread(self._tracing.close)
        if self.status_page:
            await self.status_page.stop()
        log.info("stopped", extra={"seconds": round(time.monotonic() - began, 3), "unfinished_steps": unfinished})

    async def _say(self, status: health_pb2.HealthCheckResponse.ServingStatus) -> None:
        for service in ("", SERVICE):
            await self._health.set(service, status)

    def _listen(self, address: str) -> str:
        try:
            if self._credentials is None or address.startswith("unix:"):
                port = self._server.add_insecure_port(address)
            else:
                port = self._server.add_secure_port(address, self._credentials)
        except RuntimeError as error:
            raise OSError(f"cannot listen on {address}: {error}") from None
        return address if address.startswith("unix:") else f"{address.rpartition(':')[0]}:{port}"


def _tracing(endpoint: str | None) -> Tracing | None:
    if endpoint is None:
        return None
    try:
        from .tracing import Tracing
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{error.name} is not installed; otlp_endpoint needs: pip install 'numbaflash[tracing]'"
        ) from None
    return Tracing(endpoint)


def serve(config: ServeConfig) -> None:
    """Serve until SIGTERM or SIGINT; a second one stops at once.

    Prints one line, `numbaflash serves on ADDRESS[, ADDRESS ...]`, to standard output when it is ready.

    Raises:
        OSError: An address cannot be listened on.
        ValueError: There is no such backend here.
    """
    logs.configure(config.log_level, config.log_format)
    if config.insecure and not config.local_only:
        log.warning("insecure: other machines can connect")
    if config.metrics_port is not None and not is_local(f"{config.metrics_host}:0"):
        log.warning("other machines can read the metrics and the status page")
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_serve(config))


async def _serve(config: ServeConfig) -> None:
    server = Server(config)
    await server.start()
    loop, stopping = asyncio.get_running_loop(), asyncio.Event()

    def stop() -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)
        stopping.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    # What is imported stays: a full collection that walks it would stop all steps for 0.1 s.
    gc.collect()
    gc.freeze()
    if config.pin_event_loop:
        share_a_cpu()
    print(f"numbaflash serves on {', '.join(server.addresses)}", flush=True)
    if server.status_page:
        print(f"status page at {server.status_page.url}, metrics at {server.status_page.url}metrics", flush=True)
    await stopping.wait()
    await server.stop()

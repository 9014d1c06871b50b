"""A small HTTP server that answers GET and HEAD, each request on a thread of its own."""

from __future__ import annotations

import socket
import socketserver
import threading
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from typing import Any, Final
from urllib.parse import urlsplit

from .addresses import is_local

# A client that sends or reads nothing for so long is dropped.
_PATIENCE_SECONDS: Final = 10.0


@dataclass(frozen=True)
class Reply:
    """What a GET is answered with."""

    content_type: str
    body: bytes
    status: HTTPStatus = HTTPStatus.OK
    headers: tuple[tuple[str, str], ...] = ()


class WebServer(socketserver.ThreadingTCPServer):
    """Listens from the start; `run` serves until `close`.

    On a loopback address only requests to a loopback name are answered: a page of the internet whose own name was made
    to point here (DNS rebinding) could read what it is told otherwise.

    Args:
        host: Address to listen on.
        port: Port to listen on; 0: any free one.
        answer: Gets the path and the Accept header of a request; None: there is nothing there.

    Raises:
        OSError: The address cannot be listened on.
    """

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, host: str, port: int, answer: Callable[[str, str], Reply | None]) -> None:
        self.answer = answer
        self.local_only = is_local(f"{host}:0")
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), _Handler)
        name = f"[{host}]" if ":" in host else host
        self.url = f"http://{name}:{self.server_address[1]}/"

    def run(self) -> None:
        """Serve on a thread of its own."""
        threading.Thread(target=self.serve_forever, name="numbaflash-web", daemon=True).start()

    def close(self) -> None:
        """Stop serving and listening; not to be called before `run`."""
        self.shutdown()
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of clients that went away: there is nobody to be told."""


class _Handler(BaseHTTPRequestHandler):
    server: WebServer
    timeout = _PATIENCE_SECONDS
    server_version = "numbaflash"
    sys_version = ""

    def do_GET(self) -> None:
        """Answer, or say why not."""
        host = urlsplit(f"//{self.headers.get('Host', 'localhost')}").hostname or ""
        if self.server.local_only and not is_local(f"{host}:0"):
            self._send(_plain(HTTPStatus.MISDIRECTED_REQUEST, "this server answers to names of this machine alone"))
            return
        try:
            reply = self.server.answer(urlsplit(self.path).path, self.headers.get("Accept", ""))
        except TimeoutError:
            reply = _plain(HTTPStatus.SERVICE_UNAVAILABLE, "the server is too busy to answer")
        self._send(reply or _plain(HTTPStatus.NOT_FOUND, "there is nothing here"))

    do_HEAD = do_GET  # noqa: N815 - BaseHTTPRequestHandler's name

    def _send(self, reply: Reply) -> None:
        self.send_response(reply.status)
        for name, value in (
            ("Content-Type", reply.content_type),
            ("Content-Length", str(len(reply.body))),
            ("Cache-Control", "no-store"),
            ("X-Content-Type-Options", "nosniff"),
            *reply.headers,
        ):
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(reply.body)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: Prometheus comes every few seconds."""


def _plain(status: HTTPStatus, sentence: str) -> Reply:
    return Reply("text/plain; charset=utf-8", f"{sentence}\n".encode(), status)

"""How a client checks the server, and what it shows of itself."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import grpc

from .addresses import is_local
from .wire import FRAME_BYTES

_MAX_ANSWER_BYTES: Final = 64 << 20


@dataclass(frozen=True)
class TLS:
    """An encrypted connection to a server that shows a certificate. Files are PEM, read when the client is made.

    Attributes:
        ca: File of the roots that the server's certificate has to come from; None: those that gRPC comes with.
        cert: File of this client's certificate, where the server asks for one.
        key: File of its key.
        server_name: The name in the server's certificate, where that is not the target's.
    """

    ca: str | Path | None = None
    cert: str | Path | None = None
    key: str | Path | None = None
    server_name: str | None = None

    def __post_init__(self) -> None:
        if (self.cert is None) != (self.key is None):
            raise ValueError("cert and key go together")

    def channel_credentials(self) -> grpc.ChannelCredentials:
        """Read the files.

        Raises:
            OSError: One cannot be read.
        """
        return grpc.ssl_channel_credentials(*map(_content, (self.ca, self.key, self.cert)))


def open_channel(target: str, tls: TLS | None) -> grpc.Channel:
    """Make a channel for the project's own client."""
    options: list[tuple[str, Any]] = [
        ("grpc.max_receive_message_length", _MAX_ANSWER_BYTES),
        ("grpc.max_send_message_length", -1),
        ("grpc.http2.max_frame_size", FRAME_BYTES),
        ("grpc.enable_retries", 0),  # RetryPolicy does that, and knows what may be sent again
        # A server that was just started, or started again, is found soon. The third of these options, min, is how long
        # a connection may take to be made: it stays at 20 s, for a server may be far away, or busy.
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 1000),
    ]
    if tls is None:
        return grpc.insecure_channel(target, options)
    if tls.server_name is not None:
        options.append(("grpc.ssl_target_name_override", tls.server_name))
    return grpc.secure_channel(target, tls.channel_credentials(), options)


def largest_message(accepted: int) -> int:
    """Return the bytes of a step that fits both ways: the server accepts so many, and its answer is no larger."""
    return min(accepted, _MAX_ANSWER_BYTES)


def metadata(target: str, tls: TLS | None, token: str | None) -> tuple[tuple[str, str], ...]:
    """Make the metadata that goes with every call.

    Raises:
        ValueError: The token would leave this machine unencrypted, or is none.
    """
    if token is None:
        return ()
    if not (token.isascii() and token.isprintable() and token.strip() == token != ""):
        raise ValueError("token takes printable ASCII characters, without spaces around them")
    if tls is None and not is_local(target):
        raise ValueError(f"token would go to {target} unencrypted; takes tls as well")
    return (("authorization", f"Bearer {token}"),)


def _content(file: str | Path | None) -> bytes | None:
    return None if file is None else Path(file).read_bytes()

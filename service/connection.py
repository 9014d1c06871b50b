"""What a client and its sessions share: calls to a server, when they are tried again, and who is closed at the end."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any, Final, Protocol, Self

from numpy.typing import NDArray

from . import wire
from .calls import Calls, RetryPolicy
from .credentials import TLS, metadata, open_channel
from .errors import ServiceError
from .v1 import attention_pb2 as pb

_SERVICE: Final = pb.DESCRIPTOR.services_by_name["Attention"].full_name
_CLOSE_SECONDS: Final = 2.0


class _Open(Protocol):
    """A session, as far as a connection ends it."""

    def close(self, timeout: float | None = None) -> None: ...

    def _let_go(self) -> None: ...


class Connection:
    """The part of `Client` that its sessions use as well; the arguments are described there.

    Attributes:
        timeout: Seconds for a call, all attempts together, where the call itself is given none.
        retry: When and how often a failed call is made again.
    """

    def __init__(
        self,
        target: str,
        *,
        tls: TLS | None = None,
        token: str | None = None,
        timeout: float = 60.0,
        retry: RetryPolicy | None = None,
    ) -> None:
        self.timeout = timeout
        self.retry = retry or RetryPolicy()
        shown = metadata(target, tls, token)
        self._calls = Calls(open_channel(target, tls), _SERVICE, shown)
        self._sessions: set[_Open] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the sessions that were made here, as far as the server can be reached, and the connection."""
        sessions = list(self._sessions)
        try:
            for session in sessions:
                session.close(timeout=_CLOSE_SECONDS)
        except ServiceError:  # nobody there: do not wait for that again, the server ends sessions by itself
            for session in sessions:
                session._let_go()
        self._calls.close()

    def _call(
        self, name: str, request: Any, timeout: float | None = None, tensors: Mapping[str, NDArray[Any]] | None = None
    ) -> bytes:
        message = wire.encode_step(request, tensors or {})
        return self.retry.run(lambda seconds: self._calls(name, message, seconds), timeout or self.timeout)

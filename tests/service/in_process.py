"""The service's methods called without a socket, by the bytes that a socket would bring."""

from __future__ import annotations

from typing import Any

import grpc
from google.rpc import status_pb2

from numbaflash_service.errors import STATUS_TRAILER, ServiceError, from_status
from numbaflash_service.servicer import SERVICE, AttentionServicer
from numbaflash_service.v1 import attention_pb2 as pb

METHODS = pb.DESCRIPTOR.services_by_name["Attention"].methods_by_name


class AbortedError(Exception):
    def __init__(self, code: grpc.StatusCode, details: str, trailer: Any) -> None:
        self.code, self.details, self.trailer = code, details, trailer

    def status(self) -> status_pb2.Status:
        """The status in the trailer, which says what the call's own status says."""
        ((key, value),) = self.trailer
        assert key == STATUS_TRAILER
        status = status_pb2.Status.FromString(value)
        assert (status.code, status.message) == (self.code.value[0], self.details)
        return status


class Context:
    """What the service uses of grpc.aio's context."""

    def __init__(self, requests: list[bytes] | None = None, time_remaining: float | None = 10.0) -> None:
        self.requests = requests or []
        self.answers: list[bytes] = []
        self._time_remaining = time_remaining

    def invocation_metadata(self) -> tuple[()]:
        return ()

    def time_remaining(self) -> float | None:
        return self._time_remaining

    async def read(self) -> Any:
        return self.requests.pop(0) if self.requests else grpc.aio.EOF

    async def write(self, answer: bytes) -> None:
        self.answers.append(answer)

    async def abort(self, code: grpc.StatusCode, details: str, trailer: Any) -> None:
        raise AbortedError(code, details, trailer)


class Methods:
    """The methods of a servicer, as its handler gives them to gRPC."""

    def __init__(self, servicer: AttentionServicer) -> None:
        self._handler = servicer.handler()

    async def unary(self, name: str, request: bytes, context: Context) -> bytes | ServiceError:
        """Call a method; the error that it fails with is returned."""
        try:
            return bytes(await self._find(name).unary_unary(request, context))
        except AbortedError as aborted:
            status = aborted.status()
        return from_status(status)

    async def attend(self, context: Any) -> ServiceError | None:
        """Serve an Attend stream, which the context reads and writes; the error that it ends with is returned."""
        try:
            await self._find("Attend").stream_stream(None, context)
        except AbortedError as aborted:
            status = aborted.status()
        else:
            return None
        return from_status(status)

    def _find(self, name: str) -> Any:
        return self._handler.service(_Details(f"/{SERVICE}/{name}"))


class _Details:
    def __init__(self, method: str) -> None:
        self.method = method

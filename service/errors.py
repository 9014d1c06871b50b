"""What can go wrong, and how it travels.

The same exceptions on both sides: the server raises them and `to_status` turns them into `google.rpc.Status`; the
client gets that and `from_status` turns it back. `reason` is the contract's word for what happened; an error that has
none (a broken connection, a deadline) is a plain `ServiceError` with its gRPC code.
"""

from __future__ import annotations

import contextlib
from typing import ClassVar, Final, Protocol

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

DOMAIN: Final = "numbaflash"
STATUS_TRAILER: Final = "grpc-status-details-bin"

_CODES: Final[dict[int, grpc.StatusCode]] = {code.value[0]: code for code in grpc.StatusCode}


class ServiceError(Exception):
    """A call that failed.

    Attributes:
        code: the gRPC status code.
        reason: the contract's name for what happened, or None.
        retry_after: seconds after which the server suggests to try again, or None.
    """

    code: grpc.StatusCode = grpc.StatusCode.UNKNOWN
    reason: ClassVar[str | None] = None

    def __init__(self, message: str, *, code: grpc.StatusCode | None = None, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.code = code or type(self).code
        self.retry_after = retry_after

    @property
    def message(self) -> str:
        """What happened, in words."""
        return str(self.args[0])

    def __str__(self) -> str:
        return f"{self.reason or self.code.name}: {self.message}"


class SessionLostError(ServiceError):
    """The session is not there (any more)."""

    code = grpc.StatusCode.NOT_FOUND


class SessionUnknownError(SessionLostError):
    """There is no such session, or it was closed."""

    reason = "SESSION_UNKNOWN"


class SessionClosedError(SessionUnknownError):
    """The session was closed (the server's own distinction: on the wire it is unknown)."""


class SessionExpiredError(SessionLostError):
    """The session was idle for longer than its time to live."""

    reason = "SESSION_EXPIRED"


class SessionEvictedError(SessionLostError):
    """The server needed the session's memory."""

    reason = "SESSION_EVICTED"


class PositionMismatchError(ServiceError):
    """The layer does not hold as many tokens as the client believes, or the session has been truncated since.

    Attributes:
        position: tokens that the server's layer holds.
    """

    code = grpc.StatusCode.FAILED_PRECONDITION
    reason = "POSITION_MISMATCH"

    def __init__(self, message: str, *, position: int, retry_after: float | None = None) -> None:
        super().__init__(message, retry_after=retry_after)
        self.position = position


class BusyError(ServiceError):
    """Another call has a step of this session in flight."""

    code = grpc.StatusCode.ABORTED
    reason = "BUSY"


class ExhaustedError(ServiceError):
    """The server has no room for this now."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED


class KVBudgetError(ExhaustedError):
    """The server's cache memory is taken."""

    reason = "KV_BUDGET"


class QueueFullError(ExhaustedError):
    """Too many steps, or too many bytes of them, are waiting."""

    reason = "QUEUE_FULL"


class QuotaError(ExhaustedError):
    """This caller has its share."""

    reason = "QUOTA"


class StorageError(ExhaustedError):
    """The server could not write or read its files."""

    reason = "STORAGE"


class SnapshotUnknownError(ServiceError):
    """The caller has no snapshot of that name."""

    code = grpc.StatusCode.NOT_FOUND
    reason = "SNAPSHOT_UNKNOWN"


class SnapshotDamagedError(ServiceError):
    """A snapshot's file does not match its checksums."""

    code = grpc.StatusCode.DATA_LOSS
    reason = "SNAPSHOT_DAMAGED"


class DrainingError(ServiceError):
    """The server is about to stop."""

    code = grpc.StatusCode.UNAVAILABLE
    reason = "DRAINING"


class UnauthenticatedError(ServiceError):
    """The server asks who calls, and was not told, or not to its satisfaction."""

    code = grpc.StatusCode.UNAUTHENTICATED


class BadTensorError(ServiceError, ValueError):
    """A field of the request, tensors and their bytes included, is not acceptable.

    Attributes:
        field: its name, as in the proto.
    """

    code = grpc.StatusCode.INVALID_ARGUMENT
    reason = "BAD_TENSOR"

    def __init__(self, field: str, description: str, *, retry_after: float | None = None) -> None:
        super().__init__(f"{field}: {description}", retry_after=retry_after)
        self.field = field
        self.description = description


_WITH_REASON: Final[tuple[type[ServiceError], ...]] = (
    *(SessionUnknownError, SessionExpiredError, SessionEvictedError, PositionMismatchError, BusyError),
    *(KVBudgetError, QueueFullError, QuotaError, StorageError, SnapshotUnknownError, SnapshotDamagedError),
    *(DrainingError, BadTensorError),
)
_BY_REASON: Final[dict[str | None, type[ServiceError]]] = {cls.reason: cls for cls in _WITH_REASON}


def to_status(error: ServiceError) -> status_pb2.Status:
    """The `google.rpc.Status` of an error, with the details that the proto promises."""
    status = status_pb2.Status(code=error.code.value[0], message=error.message)
    if error.reason:
        info = error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN)
        if isinstance(error, PositionMismatchError):
            info.metadata["position"] = str(error.position)
        status.details.add().Pack(info)
    if error.retry_after is not None:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromNanoseconds(int(error.retry_after * 1e9))
        status.details.add().Pack(retry)
    if isinstance(error, BadTensorError):
        request = error_details_pb2.BadRequest()
        request.field_violations.add(field=error.field, description=error.description)
        status.details.add().Pack(request)
    return status


def from_status(status: status_pb2.Status) -> ServiceError:
    """The exception for a `google.rpc.Status`; details that are not understood are left out."""
    info, retry, request = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo(), error_details_pb2.BadRequest()
    for detail in status.details:
        for message in (info, retry, request):
            with contextlib.suppress(DecodeError):
                detail.Unpack(message)
    retry_after = retry.retry_delay.ToNanoseconds() / 1e9 if retry.HasField("retry_delay") else None
    cls = _BY_REASON.get(info.reason) if info.domain == DOMAIN else None
    if cls is PositionMismatchError and info.metadata.get("position", "").isdecimal():
        return PositionMismatchError(status.message, position=int(info.metadata["position"]), retry_after=retry_after)
    if cls is BadTensorError and request.field_violations:
        violation = request.field_violations[0]
        return BadTensorError(violation.field, violation.description, retry_after=retry_after)
    code = code_of(status.code)
    if code is grpc.StatusCode.UNAUTHENTICATED:
        return UnauthenticatedError(status.message)
    if cls is None or cls in (PositionMismatchError, BadTensorError):
        return ServiceError(status.message, code=code, retry_after=retry_after)
    return cls(status.message, retry_after=retry_after)


def code_of(number: int) -> grpc.StatusCode:
    """The status code of a number; UNKNOWN where it is nobody's."""
    return _CODES.get(number, grpc.StatusCode.UNKNOWN)


class FailedCall(Protocol):
    """What is read of the `grpc.RpcError` that a channel raises."""

    def code(self) -> grpc.StatusCode:
        """The status code."""

    def details(self) -> str | None:
        """The message."""

    def trailing_metadata(self) -> tuple[tuple[str, str | bytes], ...] | None:
        """The metadata that came with the status."""


def from_call(error: FailedCall) -> ServiceError:
    """The exception for a call that ended with an error."""
    for key, value in error.trailing_metadata() or ():
        if key == STATUS_TRAILER and isinstance(value, bytes):
            try:
                return from_status(status_pb2.Status.FromString(value))
            except DecodeError:
                break
    return from_status(status_pb2.Status(code=error.code().value[0], message=error.details() or error.code().name))

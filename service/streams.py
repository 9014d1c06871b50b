"""A call of requests and answers in turns, bytes to bytes, as the client makes it over a channel.

gRPC for Python takes two threads of its own for such a call: one sends what an iterator gives, one takes what comes in.
Waking them, and waiting for each other, took 0.2 of the 0.65 ms of a step of 32 KiB on two cores. For single calls gRPC
lets the caller's thread do all this, by an interface that serves streams as well. It is private to gRPC: so it is used
with the versions that it was seen in, and others go the public way.
"""

from __future__ import annotations

import queue
import threading
from functools import partial
from typing import Any, Final, Protocol, TypeAlias

import grpc
from grpc._cython import cygrpc

from .ctrl_c import before_ctrl_c
from .errors import code_of

Metadata: TypeAlias = tuple[tuple[str, str], ...]

_SEEN_FROM: Final = 1, 75
_SEEN_TO: Final = 1, 85
_NO_FLAGS: Final = 0


class Stream(Protocol):
    """A call under way; `exchange` is one thread's at a time, the others may come from any."""

    def exchange(self, request: bytes) -> bytes | None:
        """Send a request and wait for its answer.

        Returns:
            The answer; None: the server has ended the call without an error.

        Raises:
            grpc.RpcError: The call has ended with an error; it is an `errors.FailedCall`.
        """

    def cancel(self) -> None:
        """Break the call off: whoever waits for an answer gets an error."""

    def close(self) -> None:
        """Break the call off, and give up what it holds."""


def open_stream(channel: grpc.Channel, method: str, metadata: Metadata) -> Stream:
    """Begin a call of a method, which is given by its full path."""
    version = tuple(map(int, grpc.__version__.split(".")[:2]))
    is_known = _SEEN_FROM <= version <= _SEEN_TO
    # A channel with interceptors, which OpenTelemetry's instrumentation puts in the place of every channel, has none.
    is_bare = hasattr(getattr(channel, "_channel", None), "segregated_call")
    return (CallersThread if is_known and is_bare else OwnThreads)(channel, method, metadata)


class OwnThreads:
    """A `Stream` by gRPC's public interface."""

    def __init__(self, channel: grpc.Channel, method: str, metadata: Metadata) -> None:
        self._requests: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._call = channel.stream_stream(method)(iter(self._requests.get, None), metadata=metadata)

    def exchange(self, request: bytes) -> bytes | None:
        """As `Stream` says."""
        self._requests.put(request)
        return next(self._call, None)

    def cancel(self) -> None:
        """As `Stream` says."""
        self._call.cancel()

    def close(self) -> None:
        """As `Stream` says."""
        self._requests.put(None)
        self._call.cancel()


class CallersThread:
    """A `Stream` whose events are taken by the thread that waits for the answer.

    gRPC frees a call with its last event, and whoever waits for one more would wait on freed memory: so those that are
    due are counted.
    """

    def __init__(self, channel: Any, method: str, metadata: Metadata) -> None:
        first = (
            cygrpc.SendInitialMetadataOperation(metadata, _NO_FLAGS),
            cygrpc.ReceiveInitialMetadataOperation(_NO_FLAGS),
            cygrpc.ReceiveStatusOnClientOperation(_NO_FLAGS),
        )
        self._call = channel._channel.segregated_call(
            cygrpc.PropagationConstants.GRPC_PROPAGATE_DEFAULTS,
            method.encode(),
            None,  # no other host
            None,  # no deadline
            metadata,
            None,  # no credentials beside the channel's
            tuple(((operation,), None) for operation in first),
        )
        self._due = len(first)
        self._end: _End | None = None
        self._taking = threading.Lock()

    def exchange(self, request: bytes) -> bytes | None:
        """As `Stream` says."""
        answer: bytes | None = self._take_events(request)
        if answer is None and self._end and self._end.code() is not grpc.StatusCode.OK:
            raise self._end
        return answer

    def cancel(self) -> None:
        """As `Stream` says."""
        self._call.cancel(cygrpc.StatusCode.cancelled, "the client broke the call off")

    def close(self) -> None:
        """As `Stream` says."""
        self.cancel()
        self._take_events()

    def _take_events(self, request: bytes | None = None) -> Any:
        """Send a request, if any, and take events until one brings an answer, or none is due."""
        with self._taking:
            if request is not None:
                # gRPC sends under a lock of the channel's, which an exception on the way out would leave locked.
                before_ctrl_c(partial(self._send, request))
            try:
                answer = None
                while self._due and answer is None:
                    event = self._call.next_event()
                    self._due -= 1
                    answer = self._read(event.batch_operations)
                return answer
            except BaseException:  # Ctrl-C leaves the count in doubt
                self._due = 0
                raise

    def _send(self, request: bytes) -> None:
        batch = cygrpc.SendMessageOperation(request, _NO_FLAGS), cygrpc.ReceiveMessageOperation(_NO_FLAGS)
        self._due += self._call.operate(batch, None)  # False where the call has ended

    def _read(self, operations: Any) -> Any:
        """Return the answer that an event brings, if any, and note the status that it brings."""
        last = operations[-1]
        if last.type() == cygrpc.OperationType.receive_message:
            return last.message()
        if last.type() == cygrpc.OperationType.receive_status_on_client:
            self._end = _End(code_of(last.code()), last.details(), last.trailing_metadata())
        return None


class _End(grpc.RpcError):  # type: ignore[misc]  # grpc is untyped
    """An `errors.FailedCall`."""

    def __init__(self, code: grpc.StatusCode, details: str, trailing_metadata: Any) -> None:
        super().__init__()
        self._code = code
        self._details = details
        self._trailing_metadata = trailing_metadata

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str:
        return self._details

    def trailing_metadata(self) -> Any:
        return self._trailing_metadata

"""How the client reaches the server: single calls, a persistent Attend stream, and what is tried again.

Everything here takes and returns wire bytes or heads; `client` knows what they mean.
"""

from __future__ import annotations

import math
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Final, TypeVar

import grpc
import numpy as np

from .errors import BusyError, DrainingError, ServiceError, from_call
from .streams import Metadata, Stream, open_stream

T = TypeVar("T")

_WATCHDOG_SECONDS: Final = 0.05
_CHANNEL_CLOSE_SECONDS: Final = 2.0
_FREED_BYTES: Final = 16 << 20


@dataclass(frozen=True)
class RetryPolicy:
    """When and how often a failed call is made again.

    Calls are made again where the server cannot be reached, drains or is busy with the same session, and where it has
    no room and says when to come again. Anything else is final. Steps carry a request id, so none is taken twice.

    Attributes:
        attempts: Calls made at most, the first one included.
        first_delay: Seconds before the second attempt, on average half of it: delays are drawn from 0 to this.
        max_delay: The delay doubles from attempt to attempt up to this. What the server asks for comes on top.
    """

    attempts: int = 8
    first_delay: float = 0.02
    max_delay: float = 2.0

    def run(self, attempt: Callable[[float], T], timeout: float) -> T:
        """Call until it succeeds, fails for good, or neither attempts nor time are left.

        Args:
            attempt: Makes the call, within the seconds that it is given.
            timeout: Seconds for all attempts together.

        Raises:
            ServiceError: The last attempt's.
        """
        until = time.monotonic() + timeout
        for number in range(1, self.attempts + 1):
            try:
                return attempt(max(0.0, until - time.monotonic()))
            except ServiceError as error:
                delay = random.uniform(0, min(self.max_delay, self.first_delay * 2 ** (number - 1)))
                delay += error.retry_after or 0.0
                if not is_passing(error) or number == self.attempts or time.monotonic() + delay >= until:
                    raise
            time.sleep(delay)
        raise AssertionError("attempts is at least 1")


def is_passing(error: ServiceError) -> bool:
    """Say whether the same call may succeed a little later."""
    if error.code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        return error.retry_after is not None
    if error.reason is None:
        return error.code is grpc.StatusCode.UNAVAILABLE  # the connection's word, not the server's
    return isinstance(error, (BusyError, DrainingError))


class Calls:
    """A channel's methods of one service, bytes to bytes.

    Args:
        channel: Closed by `close`.
        service: Its full name.
        metadata: Goes with every call.
    """

    def __init__(self, channel: grpc.Channel, service: str, metadata: Metadata) -> None:
        self._channel = channel
        self._service = service
        self._metadata = metadata
        self._methods: dict[str, Callable[..., bytes]] = {}
        keep_freed_memory()

    def __call__(self, name: str, request: bytes, timeout: float) -> bytes:
        """Call a method.

        Raises:
            ServiceError: It failed.
        """
        method = self._methods.get(name)
        if method is None:
            method = self._methods[name] = self._channel.unary_unary(f"/{self._service}/{name}")
        try:
            return method(request, timeout=timeout, metadata=self._metadata)
        except grpc.RpcError as error:
            raise from_call(error) from None

    def stream(self) -> StepStream:
        """Open an Attend stream."""
        return StepStream(partial(open_stream, self._channel, f"/{self._service}/Attend", self._metadata))

    def close(self) -> None:
        """Close the channel, and all calls with it.

        gRPC waits there for calls to end, and forever for one that the exception of a signal (Ctrl-C) broke off while
        it was being made: so no longer than `_CHANNEL_CLOSE_SECONDS`.
        """
        closing = threading.Thread(target=self._channel.close, name="numbaflash-close", daemon=True)
        closing.start()
        closing.join(_CHANNEL_CLOSE_SECONDS)


def keep_freed_memory() -> None:
    """Let malloc keep what a message leaves, for the next one.

    glibc gives the system back what is free at the end of its heap, beyond twice the largest block that it has seen
    freed (mallopt(3), M_TRIM_THRESHOLD). A request of 4 MiB, its copy inside gRPC and its answer are more than that:
    each chunk of a prompt met 2,000 fresh pages, which took 4 ms of 9.
    """
    np.empty(_FREED_BYTES, np.uint8)


class StepStream:
    """An Attend stream that takes one step at a time, and opens anew after it broke."""

    def __init__(self, open_stream: Callable[[], Stream]) -> None:
        self._open = open_stream
        self._stream: Stream | None = None
        self._deadline = math.inf
        self._overdue = False

    def exchange(self, request: bytes, timeout: float) -> bytes:
        """Send a step and wait for its answer.

        Raises:
            ServiceError: The stream broke, or the time was over.
        """
        if self._stream is None:
            self._stream = self._open()
            _watchdog.watch(self)
        self._overdue = False
        self._deadline = time.monotonic() + timeout
        try:
            answer = self._stream.exchange(request)
        except grpc.RpcError as error:
            self.close()
            if self._overdue:
                message = f"no answer within {timeout:.3g} s"
                raise ServiceError(message, code=grpc.StatusCode.DEADLINE_EXCEEDED) from None
            if error.code() is grpc.StatusCode.CANCELLED:  # not by this side: the server cut it off
                raise ServiceError("the stream was cut off", code=grpc.StatusCode.UNAVAILABLE) from None
            raise from_call(error) from None
        except BaseException:  # Ctrl-C: the answer that is under way must not be taken for the next step's
            self.close()
            raise
        finally:
            self._deadline = math.inf
        if answer is None:
            self.close()
            raise ServiceError("the server ended the stream", code=grpc.StatusCode.UNAVAILABLE)
        return answer

    def cancel_when_overdue(self) -> None:
        """Break off the step whose time is over; called by the watchdog."""
        stream = self._stream
        if stream is not None and time.monotonic() >= self._deadline:
            self._overdue = True
            stream.cancel()

    def close(self) -> None:
        """End the stream."""
        stream, self._stream = self._stream, None
        if stream is not None:
            _watchdog.forget(self)
            stream.close()


class _Watchdog:
    """Keeps time for streams, whose reads know no timeout: a thread that lives while there are any."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._streams: set[StepStream] = set()

    def watch(self, stream: StepStream) -> None:
        with self._lock:
            self._streams.add(stream)
            if len(self._streams) == 1:
                threading.Thread(target=self._run, name="numbaflash-watchdog", daemon=True).start()

    def forget(self, stream: StepStream) -> None:
        with self._lock:
            self._streams.discard(stream)

    def _run(self) -> None:
        while True:
            time.sleep(_WATCHDOG_SECONDS)
            with self._lock:
                if not self._streams:
                    return
                streams = list(self._streams)
            for stream in streams:
                stream.cancel_when_overdue()


_watchdog = _Watchdog()

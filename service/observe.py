"""What is told of each call beside its answer: a line of the log, and a span where spans are configured."""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, Final, TypeVar

import structlog

from .door import Call
from .errors import ServiceError
from .logs import request_id
from .steps import Outcome
from .v1 import attention_pb2 as pb

if TYPE_CHECKING:  # without an endpoint, nothing of OpenTelemetry is imported
    from .tracing import Tracing

T = TypeVar("T")
Settle = Callable[[Outcome], None]

# They are too many for a line each, unless somebody looks for something.
_STEPS: Final = frozenset({"Prefill", "Decode", "Attend"})

log = logging.getLogger(__name__)


class Observer:
    """Watches calls.

    Args:
        service: The service's full name.
        tracing: Where spans go; None: nowhere.
        steps: Log calls of steps too, and not only those of a session's life.
    """

    def __init__(self, service: str, tracing: Tracing | None, *, steps: bool) -> None:
        self._service = service
        self._tracing = tracing
        self._steps = steps

    def watch(self, name: str, method: Callable[[Any, Call], Awaitable[T]]) -> Callable[[Any, Call], Awaitable[T]]:
        """Make a method that is watched; where nothing is told of it, it stays as it is."""
        tracing, told = self._tracing, self._steps or name not in _STEPS
        if not told and tracing is None:
            return method

        async def watched(request: Any, call: Call) -> T:
            metadata = call.context.invocation_metadata()
            name_of_request = request_id(metadata)
            # Each call runs in a task, and so in a context, of its own: what is bound ends with it.
            structlog.contextvars.bind_contextvars(request_id=name_of_request, method=name, caller=call.principal.name)
            started = time.perf_counter()
            failed: ServiceError | None = None
            try:
                if tracing is None:
                    return await method(request, call)
                with tracing.call(self._service, name, metadata, name_of_request):
                    return await method(request, call)
            except ServiceError as error:
                failed = error
                raise
            finally:
                if told:
                    outcome = {"code": failed.code.name, "reason": failed.reason} if failed else {"code": "OK"}
                    log.info("call", extra={**outcome, "ms": round((time.perf_counter() - started) * 1e3, 3)})

        return watched

    def settle(self, request: pb.StepRequest, tokens: int, settle: Settle) -> Settle:
        """Return what is to get a step's outcome: `settle`, or something that tells of it before."""
        return settle if self._tracing is None else self._tracing.step(request, tokens, settle)

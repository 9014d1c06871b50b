"""What every call passes on its way in and out: who makes it, whether there is room for it, how its errors leave."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Final

import grpc

from .auth import Authenticator
from .errors import STATUS_TRAILER, ServiceError, UnauthenticatedError, to_status
from .limits import Limit
from .metrics import Metrics
from .principals import Principal, Principals

log = logging.getLogger(__name__)

# Calls are short, streams are long: what a caller should wait for a place among them is anybody's guess.
_RETRY_SECONDS: Final = 0.25


@dataclass(eq=False, slots=True)
class Call:
    """One RPC.

    Attributes:
        context: grpc.aio's context of it.
        principal: Who makes it.
    """

    context: Any
    principal: Principal


class Door:
    """The way into the service's methods.

    Args:
        authenticator: Says who makes a call.
        principals: The callers, and what each may have.
        max_calls: Calls at a time, streams included.
        metrics: Where calls that fail are counted.
    """

    def __init__(self, authenticator: Authenticator, principals: Principals, max_calls: int, metrics: Metrics) -> None:
        self.calls = Limit(max_calls, "calls under way", shared=authenticator.asks)
        self._authenticator = authenticator
        self._principals = principals
        self._metrics = metrics

    def refresh(self) -> None:
        """Take note of tokens that have been added and taken away."""
        self._authenticator.refresh()

    def readmit(self, call: Call) -> None:
        """Ask again who makes a call that lasts.

        Raises:
            UnauthenticatedError: It would not be let in any more.
        """
        if self._authenticator.name(call.context) != call.principal.name:
            raise UnauthenticatedError("the token belongs to another caller now")

    def guard(self, method: Callable[[Any, Call], Awaitable[Any]]) -> Callable[[Any, Any], Awaitable[Any]]:
        """Make a handler of a method: its errors leave as `google.rpc.Status`, and nothing else leaves at all."""

        async def handle(request: Any, context: Any) -> Any:
            try:
                principal = self._principals.get(self._authenticator.name(context))
                self.calls.check(principal, 1, _RETRY_SECONDS)
                self.calls.take(principal, 1)
                try:
                    return await method(request, Call(context, principal))
                finally:
                    self.calls.give_back(principal, 1)
            except ServiceError as error:
                return await self._abort(error, context)
            except Exception:
                log.exception("a call failed")
                return await self._abort(ServiceError("the call failed", code=grpc.StatusCode.INTERNAL), context)

        return handle

    async def _abort(self, error: ServiceError, context: Any) -> Any:
        self._metrics.count_error(error)
        trailer = ((STATUS_TRAILER, to_status(error).SerializeToString()),)
        return await context.abort(error.code, error.message, trailer)

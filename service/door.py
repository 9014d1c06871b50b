"""What every call passes on its way in and out: who makes it, and how its errors leave."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc

from .errors import STATUS_TRAILER, ServiceError, to_status
from .principals import ANONYMOUS, Principal, Principals

log = logging.getLogger(__name__)

T = TypeVar("T")


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
        principals: The callers that are known.
    """

    def __init__(self, principals: Principals) -> None:
        self._principals = principals

    def guard(self, method: Callable[[Any, Call], Awaitable[T]]) -> Callable[[Any, Any], Awaitable[T]]:
        """Make a handler of a method: its errors leave as `google.rpc.Status`, and nothing else leaves at all."""

        async def handle(request: Any, context: Any) -> T:
            try:
                return await method(request, Call(context, self._principals.get(ANONYMOUS)))
            except ServiceError as error:
                status = to_status(error)
                trailer = ((STATUS_TRAILER, status.SerializeToString()),)
                return await context.abort(error.code, error.message, trailer)  # type: ignore[no-any-return]
            except grpc.aio.AbortError:
                raise
            except Exception:
                log.exception("a call failed")
                return await context.abort(grpc.StatusCode.INTERNAL, "the call failed")  # type: ignore[no-any-return]

        return handle

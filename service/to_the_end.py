"""Operations that come to their end, also where nobody waits for them any more."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, TypeVar

from .errors import ServiceError

log = logging.getLogger(__name__)

T = TypeVar("T")


async def to_the_end(operation: Awaitable[T], undo: Callable[[T], object] | None = None) -> T:
    """Wait for an operation that goes on where whoever waits is cancelled; `undo` gets then what it has made."""
    task = asyncio.ensure_future(operation)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        task.add_done_callback(partial(_settle_unheard, undo))
        raise


def _settle_unheard(undo: Callable[[T], object] | None, task: asyncio.Future[T]) -> None:
    """Take note of what came of a task, or asyncio reports a refusal that had no reader as a fault."""
    if task.cancelled():
        return
    error: Any = task.exception()
    if error is None:
        if undo is not None:
            undo(task.result())
    elif not isinstance(error, ServiceError):
        log.error("what a caller has gone from failed", exc_info=error)

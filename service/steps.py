"""A step on its way through the server: what is to be computed, and what comes of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

from numbaflash import RingKVCache

from .errors import ServiceError
from .replay import Answer
from .sessions import Session
from .validation import StepForm


class Done(NamedTuple):
    """A step that was taken: its answer, whether that is one of an earlier time, and how it was computed."""

    answer: Answer
    replayed: bool = False
    queue_ns: int = 0
    kernel_ns: int = 0
    batch_size: int = 0


Outcome: TypeAlias = Done | ServiceError | None


@dataclass(eq=False, slots=True)
class Step:
    """One layer's new tokens, checked against the session's shape.

    Attributes:
        session: Whose cache.
        layer: Which layer of it.
        position: Tokens that the client believes the layer holds.
        request_id: The client's name for the step; may be empty.
        form: Its tensors' shapes and its options.
        payload: Its tensors' bytes.
        deadline: On the clock of `time.monotonic`; None: whenever.
        settle: Gets what comes of the step, on the event loop: `Done`, or the error, or None where it was taken back.
        taken_back: Nobody wants the step any more; it is left out if it has not started.
    """

    session: Session
    layer: int
    position: int
    request_id: str
    form: StepForm
    payload: memoryview
    deadline: float | None
    settle: Callable[[Outcome], None]
    taken_back: bool = False
    arrived_ns: int = field(default_factory=time.perf_counter_ns)

    @property
    def cache(self) -> RingKVCache:
        """The session's cache."""
        assert self.session.cache is not None
        return self.session.cache

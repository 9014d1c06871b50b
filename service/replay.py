"""The answers of the last steps, kept so that a step whose answer was lost can be sent again.

Used by the engine's thread alone.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

from numpy.typing import NDArray

from .errors import KVBudgetError

# Longer than clients wait before they send a step again.
KEPT_FOR_SECONDS: Final = 60.0


@dataclass(frozen=True, eq=False, slots=True)
class Answer:
    """What a step gave.

    Attributes:
        request_id: The client's name for the step.
        before: Tokens that the layer held before the step.
        position: Tokens that it held after it.
        first: The oldest token visible after it, sinks apart.
        out: (T, Hq, D); None where there were no queries.
    """

    request_id: str
    before: int
    position: int
    first: int
    out: NDArray[Any] | None
    _made: float = field(default_factory=time.monotonic)

    @property
    def nbytes(self) -> int:
        """Bytes of the output."""
        return 0 if self.out is None else self.out.nbytes

    @property
    def age(self) -> float:
        """Seconds since the step."""
        return time.monotonic() - self._made


class Answers:
    """The last answer of every layer of every session, within a number of bytes.

    Where the bytes run out, the oldest answers go; but none that is younger than `KEPT_FOR_SECONDS`: new steps wait
    instead.

    Args:
        limit: Bytes.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._nbytes = 0
        self._promised = 0
        self._answers: OrderedDict[tuple[str, int], Answer] = OrderedDict()  # oldest first

    @property
    def nbytes(self) -> int:
        """Bytes of all answers."""
        return self._nbytes

    def get(self, session_id: str, layer: int) -> Answer | None:
        """Return the answer of the layer's last step, where it is still kept."""
        return self._answers.get((session_id, layer))

    def make_room(self, nbytes: int) -> None:
        """Drop old answers until one of `nbytes` fits.

        Raises:
            KVBudgetError: The answers that could be dropped are not enough; none is.
        """
        excess = self._nbytes + self._promised + nbytes - self._limit
        if excess <= 0:
            return
        drop = []
        for key, answer in self._answers.items():
            if excess <= 0 or answer.age < KEPT_FOR_SECONDS:
                break
            drop.append(key)
            excess -= answer.nbytes
        if excess > 0:
            raise KVBudgetError(
                f"an answer of {nbytes} bytes does not fit the {self._limit} bytes of answers kept for replay, which"
                f" {len(self._answers)} recent ones fill",
                retry_after=1.0,
            )
        for key in drop:
            self.forget(*key)

    @contextmanager
    def promise(self, nbytes: int) -> Iterator[None]:
        """Hold the room that was made for an answer while others are kept."""
        self._promised += nbytes
        try:
            yield
        finally:
            self._promised -= nbytes

    def keep(self, session_id: str, layer: int, answer: Answer) -> None:
        """Put the answer of a layer's newest step in the place of the one before."""
        self.forget(session_id, layer)
        self._answers[session_id, layer] = answer
        self._nbytes += answer.nbytes

    def of_session(self, session_id: str, num_layers: int) -> dict[int, Answer]:
        """Return the answers that are kept of a session, by layer."""
        answers = {layer: self.get(session_id, layer) for layer in range(num_layers)}
        return {layer: answer for layer, answer in answers.items() if answer}

    def forget_session(self, session_id: str, num_layers: int) -> None:
        """Drop all answers of a session."""
        for layer in range(num_layers):
            self.forget(session_id, layer)

    def forget(self, session_id: str, layer: int) -> None:
        """Drop the answer of a layer's last step, where there is one."""
        if old := self._answers.pop((session_id, layer), None):
            self._nbytes -= old.nbytes

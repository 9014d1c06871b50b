"""Bounds on what may be under way at a time, shared fairly by all callers."""

from __future__ import annotations

from collections import defaultdict

from .errors import QueueFullError
from .principals import Principal


class Limit:
    """A bound on something that calls take and give back; belongs to the event loop.

    Where there can be several callers, none may take more than it leaves to the others: alone it comes to half, two
    come to a third each, and so on, so that room is left for whoever comes next (the dynamic threshold of Choudhury and
    Hahne, IEEE/ACM Transactions on Networking 6(2), 1998, with factor 1).

    Args:
        most: How much of it there is.
        what: Its name, for messages.
        shared: Whether there can be several callers.
    """

    def __init__(self, most: int, what: str, *, shared: bool) -> None:
        self.used = 0
        self._most = most
        self._what = what
        self._of: defaultdict[Principal, int] | None = defaultdict(int) if shared else None

    def check(self, principal: Principal, amount: int, retry_after: float) -> None:
        """Say whether there is room for so much more. One that is larger than all there is passes where it is alone.

        Args:
            principal: Who wants it.
            amount: How much.
            retry_after: What to tell a caller that has to come again, in seconds.

        Raises:
            QueueFullError: There is not.
        """
        room = self._most - self.used
        if self.used and amount > room:
            raise QueueFullError(f"{self.used} {self._what}, of {self._most} that may be", retry_after=retry_after)
        if self._of is not None and (own := self._of.get(principal, 0)) and own + amount > room:
            raise QueueFullError(
                f"{own} {self._what} by this caller; the {room} left of {self._most} are for others",
                retry_after=retry_after,
            )

    def take(self, principal: Principal, amount: int) -> None:
        """Take what has been checked."""
        self.used += amount
        if self._of is not None:
            self._of[principal] += amount

    def give_back(self, principal: Principal, amount: int) -> None:
        """Give back what was taken."""
        self.used -= amount
        if self._of is not None:
            self._of[principal] -= amount
            if not self._of[principal]:
                del self._of[principal]

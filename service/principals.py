"""Who calls: what a server knows and counts of each caller, and the share that it may have."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Final

from .errors import QuotaError

# The one caller of a server that asks nobody for a name.
ANONYMOUS: Final = "anonymous"

# An idle caller saves up tokens for so long.
_BURST_SECONDS: Final = 1.0


@dataclass(frozen=True)
class Quota:
    """What one caller may have; None: as much as there is.

    Attributes:
        sessions: Sessions at a time.
        kv_bytes: Bytes reserved for their keys and values.
        tokens_per_second: Tokens, in the long run. One that goes through all layers of a model counts once.
    """

    sessions: int | None = None
    kv_bytes: int | None = None
    tokens_per_second: float | None = None


class TokenBucket:
    """Tokens that flow in at a rate and are taken out by steps that were computed.

    Steps of any size are let in while nothing is owed, and may leave a debt: the rate holds in the long run, and no
    step is too large ever to be taken.

    Args:
        rate: Tokens a second.
    """

    def __init__(self, rate: float) -> None:
        self._rate = rate
        self._level = self._most = rate * _BURST_SECONDS
        self._at = time.monotonic()

    def check(self) -> None:
        """Say whether a step may be taken now.

        Raises:
            QuotaError: Not yet; it says when.
        """
        now = time.monotonic()
        self._level = min(self._most, self._level + (now - self._at) * self._rate)
        self._at = now
        if self._level < 0:
            raise QuotaError(
                f"this caller has had its share of {self._rate:g} tokens a second",
                retry_after=-self._level / self._rate,
            )

    def take(self, tokens: float) -> None:
        """Take a step's tokens out."""
        self._level -= tokens


class Principal:
    """A caller; belongs to the event loop.

    Args:
        name: From its token or its certificate.
        quota: What it may have.

    Attributes:
        name: As above.
        sessions: How many it has.
        kv_bytes: What is reserved for them.
        bucket: Holds back its steps; None: nothing does.
    """

    __slots__ = ("_quota", "bucket", "kv_bytes", "name", "sessions")

    def __init__(self, name: str, quota: Quota | None = None) -> None:
        self._quota = quota or Quota()
        self.name = name
        self.sessions = 0
        self.kv_bytes = 0
        rate = self._quota.tokens_per_second
        self.bucket = None if rate is None else TokenBucket(rate)

    def check_session(self, kv_bytes: int, retry_after: float) -> None:
        """Say whether it may have one session more.

        Args:
            kv_bytes: What that would reserve.
            retry_after: When one of its sessions may have gone, in seconds.

        Raises:
            QuotaError: It may not.
        """
        quota = self._quota
        if quota.sessions is not None and self.sessions >= quota.sessions:
            raise QuotaError(f"this caller has {self.sessions} sessions, the most it may", retry_after=retry_after)
        if quota.kv_bytes is not None and self.kv_bytes + kv_bytes > quota.kv_bytes:
            raise QuotaError(
                f"the session needs {kv_bytes} bytes; this caller has {self.kv_bytes} of the {quota.kv_bytes} it may",
                # No waiting helps where the whole share is too small.
                retry_after=retry_after if kv_bytes <= quota.kv_bytes else None,
            )

    def enter_session(self, kv_bytes: int) -> None:
        """Count a session in."""
        self.sessions += 1
        self.kv_bytes += kv_bytes

    def leave_session(self, kv_bytes: int) -> None:
        """Count a session out."""
        self.sessions -= 1
        self.kv_bytes -= kv_bytes


class Principals:
    """One `Principal` for each name.

    Args:
        quota: What each may have.
    """

    def __init__(self, quota: Quota | None = None) -> None:
        self._quota = quota
        self._by_name: dict[str, Principal] = {}

    def get(self, name: str) -> Principal:
        """Return the caller of that name."""
        principal = self._by_name.get(name)
        if principal is None:
            principal = self._by_name[name] = Principal(name, self._quota)
        return principal

"""The sessions that a server holds: who exists, who writes, until when, and within how many bytes.

The table belongs to the event loop. What is inside a session, its cache, belongs to the engine's thread; only lengths
are read here.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from numbaflash import RingKVCache
from numbaflash.cache.layout import RingLayout
from numbaflash.cache.place import Pool
from numbaflash.cache.quantizers import quantizer_of
from numbaflash.cache.size import layer_nbytes

from .errors import (
    BusyError,
    KVBudgetError,
    PositionMismatchError,
    QuotaError,
    SessionExpiredError,
    SessionLostError,
    SessionUnknownError,
)
from .principals import Principal

# What a page costs beside its tokens: its place in the page table, two dictionary entries, an ndarray, malloc's own.
_PAGE_OVERHEAD: Final = 512
# And a session, however small: its entry here, its pool, a ring for each of a few layers.
_SESSION_OVERHEAD: Final = 4096
_MAX_TOMBSTONES: Final = 65536
# What a caller that has its share is told to wait, at least and at most, in seconds.
_SHORTEST_RETRY: Final = 0.1
_LONGEST_RETRY: Final = 10.0


@dataclass(frozen=True)
class Shape:
    """What a session's cache is made for, every value checked.

    Attributes:
        num_layers: Layers of the model.
        num_kv_heads: Heads of keys and values.
        head_dim: Elements of a query, a key and a value.
        num_q_heads: Heads of queries; 0: taken from each step.
        capacity: Tokens that stay visible, sink tokens included.
        sink_tokens: First tokens that never fall out.
        dtype: Storage dtype by name.
        page_size: Tokens of a page.
        rollback: Newest tokens that can always be truncated.
        quantizer: Its text, where dtype is of codes; else empty.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    num_q_heads: int
    capacity: int
    sink_tokens: int
    dtype: str
    page_size: int
    rollback: int
    quantizer: str = ""

    @property
    def kv_bytes(self) -> int:
        """Bytes that the cache can come to, its bookkeeping included; exact however large (Python's integers).

        Pages of floats on a device have rows of whole 16 bytes.
        """
        stored = self.head_dim if self.quantizer else -(-self.head_dim // 8) * 8
        one = layer_nbytes(self.num_kv_heads, stored, self._layout, self.dtype, self.quantizer or None)
        return self.num_layers * (one.total + (one.pages + one.raw_pages) * _PAGE_OVERHEAD) + _SESSION_OVERHEAD

    def first_visible(self, length: int) -> int:
        """Return the oldest visible position of a layer with `length` tokens, sinks apart; `length` while none is."""
        return min(length, self._layout.first_visible(length - 1))

    @property
    def _layout(self) -> RingLayout:
        return RingLayout(
            capacity=self.capacity, sink_tokens=self.sink_tokens, page_size=self.page_size, rollback=self.rollback
        )

    def new_cache(self, backend: str, channel_scales: NDArray[np.float32] | None = None) -> RingKVCache:
        """Make the empty cache of a server with that backend; `channel_scales` are of quantizer awq."""
        return RingKVCache(
            self.num_layers,
            self.num_kv_heads,
            self.head_dim,
            capacity=self.capacity,
            sink_tokens=self.sink_tokens,
            dtype=self.dtype,
            quantizer=quantizer_of(self.quantizer, channel_scales) if self.quantizer else None,
            page_size=self.page_size,
            rollback=self.rollback,
            backend=backend,
        )


@dataclass(frozen=True)
class Spilled:
    """A session on disk: bytes of its file, tokens that each layer holds."""

    nbytes: int
    lengths: tuple[int, ...]


@dataclass(eq=False, slots=True)
class Session:
    """One sequence.

    Attributes:
        id: 128 random bits in hex.
        owner: Who made it; for others it does not exist.
        shape: What its cache is made for.
        kv_bytes: Bytes reserved for the cache.
        ttl: Seconds without a step after which the session ends.
        created_at: Seconds since the epoch.
        expires: When it ends if no step comes, on the clock of `time.monotonic`.
        in_flight: Steps waiting or running.
        writer: Whose steps those are.
        lost: Makes the error that every call gets from now on; None while the session lives.
        cache: Keys and values; None before the engine has made it and after it has let go of it.
        steps: Steps taken; counted by the engine.
        epoch: How many times it was truncated.
        truncated_to: The length that the last of those took it back to.
        spilled: Where it is while it is on disk; its cache is None then, and no bytes are reserved for it.
        work: What is under way on its cache beside steps; the cache stays until that is done.
    """

    id: str
    owner: Principal
    shape: Shape
    kv_bytes: int
    ttl: float
    created_at: float
    expires: float
    in_flight: int = 0
    writer: object = None
    lost: Callable[[], SessionLostError] | None = None
    cache: RingKVCache | None = None
    steps: int = 0
    epoch: int = 0
    truncated_to: int | None = None
    spilled: Spilled | None = None
    work: asyncio.Task[Any] | None = None

    @property
    def expires_at(self) -> float:
        """When the session ends if no step comes, in seconds since the epoch."""
        return time.time() + self.expires - time.monotonic()

    def lengths(self) -> list[int]:
        """Tokens that each layer holds."""
        if self.cache:
            return [self.cache.length(layer) for layer in range(self.shape.num_layers)]
        return list(self.spilled.lengths) if self.spilled else [0] * self.shape.num_layers

    @property
    def idle_seconds(self) -> float:
        """Seconds since the last step, or since it was made."""
        return 0.0 if self.in_flight else time.monotonic() - (self.expires - self.ttl)

    def check_epoch(self, epoch: int, layer: int = 0) -> None:
        """See that a call knows of the last truncation.

        Raises:
            PositionMismatchError: It does not.
        """
        if epoch != self.epoch:
            raise PositionMismatchError(
                f"epoch is {epoch} and the session, truncated {self.epoch} times, has {self.epoch}",
                position=self.lengths()[layer],
            )

    def begin_step(self, writer: object) -> None:
        """Count a step in, for a call or a stream.

        Raises:
            BusyError: Steps of another one are in flight.
        """
        if self.in_flight and self.writer is not writer:
            raise BusyError(f"another call has {self.in_flight} steps of this session in flight", retry_after=0.005)
        self.writer = writer
        self.in_flight += 1

    def end_step(self) -> None:
        """Count a step out, and let the session live on for its time to live."""
        self.in_flight -= 1
        if not self.in_flight:
            self.writer = None
        self.expires = time.monotonic() + self.ttl


class SessionTable:
    """All sessions, within a number of them and a number of bytes.

    Args:
        kv_memory: Bytes that all sessions together may reserve.
        max_sessions: Sessions at a time.
    """

    def __init__(self, kv_memory: int, max_sessions: int) -> None:
        self.kv_memory = kv_memory
        self._holding: dict[str, Session] = {}  # all that have bytes reserved, those on their way out as well
        self._max_sessions = max_sessions
        self._sessions: dict[str, Session] = {}
        self._tombstones: OrderedDict[str, tuple[Principal, Callable[[], SessionLostError]]] = (
            OrderedDict()
        )  # oldest first

    def __len__(self) -> int:
        return len(self._sessions)

    def __iter__(self) -> Iterator[Session]:
        return iter(list(self._sessions.values()))

    def owned_by(self, owner: Principal) -> list[Session]:
        """Return the sessions that a caller may see."""
        return [session for session in self._sessions.values() if session.owner is owner]

    def check(self, owner: Principal, shape: Shape) -> None:
        """See that a caller may have one session more, memory apart.

        Raises:
            QuotaError: There are as many sessions as may be, or the caller has its share.
        """
        if len(self._sessions) >= self._max_sessions:
            raise QuotaError(f"there are {self._max_sessions} sessions, the most that may be", retry_after=1.0)
        owner.check_session(shape.kv_bytes, self._soonest_end(owner))

    def create(self, owner: Principal, shape: Shape, ttl: float) -> Session:
        """Enter a new session of a caller's and reserve its bytes; the engine makes its cache.

        Raises:
            KVBudgetError: There are not so many bytes left.
            QuotaError: As `check`.
        """
        self.check(owner, shape)
        session = Session(
            id=secrets.token_hex(16),
            owner=owner,
            shape=shape,
            kv_bytes=shape.kv_bytes,
            ttl=ttl,
            created_at=time.time(),
            expires=time.monotonic() + ttl,
        )
        self.reserve(session)
        self.adopt(session)
        return session

    def adopt(self, session: Session) -> None:
        """Enter a session, such as one that an earlier process has left on disk."""
        session.owner.enter_session(session.kv_bytes)
        self._sessions[session.id] = session

    def reserve(self, session: Session) -> None:
        """Take the bytes of a session.

        Raises:
            KVBudgetError: There are not so many left.
        """
        if session.kv_bytes > self.kv_left:
            raise KVBudgetError(
                f"the session needs {session.kv_bytes} bytes; {self.kv_left} of {self.kv_memory} are left",
                # No waiting helps where the whole memory is too small.
                retry_after=1.0 if session.kv_bytes <= self.kv_memory else None,
            )
        self._holding[session.id] = session

    @property
    def kv_reserved(self) -> int:
        """Bytes that sessions have reserved, and that pools hold beyond.

        On a device the pages of a session and its forks lie in slabs, which are given back when the last of them has
        ended: what one that ended before has left there is nobody else's to take.
        """
        reserved: defaultdict[tuple[Pool, ...], int] = defaultdict(int)
        for session in self._holding.values():
            cache = session.cache  # read once: of those on their way out, the engine may let go at any moment
            reserved[cache.pools if cache else ()] += session.kv_bytes
        return sum(max(nbytes, sum(pool.taken_nbytes for pool in pools)) for pools, nbytes in reserved.items())

    @property
    def kv_left(self) -> int:
        """Bytes that nobody has reserved."""
        return self.kv_memory - self.kv_reserved

    def get(self, session_id: str, owner: Principal) -> Session:
        """Return a session of a caller's that lives.

        Raises:
            SessionLostError: It does not, and the error says why; or it is another caller's, and the error says only
                that there is no such session.
        """
        session = self._sessions.get(session_id)
        if session is None:
            buried_for, why = self._tombstones.get(session_id, (owner, _never_was))
            raise (why if buried_for is owner else _never_was)()
        if session.owner is not owner:
            raise _never_was()
        return session

    def end(self, session: Session, why: Callable[[], SessionLostError]) -> None:
        """Take a session out of the table; its bytes stay reserved until `release`."""
        session.lost = why
        session.owner.leave_session(session.kv_bytes)
        del self._sessions[session.id]
        self._tombstones[session.id] = session.owner, why
        if len(self._tombstones) > _MAX_TOMBSTONES:
            self._tombstones.popitem(last=False)

    def release(self, session: Session) -> None:
        """Give back the bytes of a session whose cache is gone, where it has any."""
        self._holding.pop(session.id, None)

    def end_idle(self) -> list[Session]:
        """End the sessions whose time is over and that nothing is under way for, and return them."""
        now = time.monotonic()
        idle = [
            session
            for session in self._sessions.values()
            if session.expires <= now and not session.in_flight and not session.work
        ]
        for session in idle:
            why = f"the session was idle for its time to live, {session.ttl:g} s; it ended at {now_text()}"
            self.end(session, partial(SessionExpiredError, why))
        return idle

    def _soonest_end(self, owner: Principal) -> float:
        """Return in how many seconds one of a caller's sessions may have ended; it may close one before, too."""
        ends = (session.expires for session in self.owned_by(owner))
        return min(_LONGEST_RETRY, max(_SHORTEST_RETRY, min(ends, default=0.0) - time.monotonic()))


def now_text() -> str:
    """Say what time it is, for people."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _never_was() -> SessionLostError:
    return SessionUnknownError("there is no such session")

"""Which sessions are in memory, which on disk, and which have to go.

All cache memory is reserved before it is taken. Where a session needs bytes that are not there, the least recently used
one that is idle makes room: it is written to the spill folder, or ended, with a notice, where there is none. One that
is on disk comes back when something is asked of it; its steps wait for that. A session that a step is in flight for
never goes. Everything here belongs to the event loop; files are written and read on threads of their own.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import grpc

from numbaflash import RingKVCache
from numbaflash.cache.files import DamagedError

from . import records
from .door import Call
from .engine import Engine
from .errors import (
    ExhaustedError,
    KVBudgetError,
    ServiceError,
    SessionEvictedError,
    SessionUnknownError,
    StorageError,
)
from .folder import SUFFIX, Folder, storage_error
from .metrics import Metrics
from .principals import Principals
from .replay import Answer, Answers
from .sessions import Session, SessionTable, Spilled, now_text
from .steps import Step
from .to_the_end import to_the_end

log = logging.getLogger(__name__)

# After a failed write, sessions are not spilled for so long: a full disk is not asked for each of them.
_PAUSE_SECONDS: Final = 10.0


@dataclass(frozen=True)
class Thresholds:
    """When sessions go.

    Attributes:
        high_water: Share of the memory above which idle sessions are spilled before anybody needs their bytes.
        spill_after: Seconds without a step after which a session may be spilled.
        evict_after: Seconds without a step after which one may be ended where it cannot be spilled.
    """

    high_water: float
    spill_after: float
    evict_after: float


class Memory:
    """The memory of all sessions' caches, and the folder that they are spilled to.

    Args:
        table: The sessions.
        engine: The thread that their caches belong to.
        answers: What their last steps gave.
        spill: Where to; None: nowhere.
        thresholds: When.
        metrics: Where moves are counted.
        backend: Of the caches.
        free: Lets go of what an ended session holds.
    """

    def __init__(
        self,
        table: SessionTable,
        engine: Engine,
        answers: Answers,
        spill: Folder | None,
        thresholds: Thresholds,
        metrics: Metrics,
        *,
        backend: str,
        free: Callable[[Session], asyncio.Task[None]],
    ) -> None:
        self._table = table
        self._engine = engine
        self._answers = answers
        self._spill = spill
        self._thresholds = thresholds
        self._metrics = metrics
        self._backend = backend
        self._free = free
        self._turn = asyncio.Lock()  # of those that need room, so that nobody takes what another one made
        self._paused_until = 0.0
        self.holds = 0  # sessions that something else than a step is done with
        self._parked: dict[str, list[Step]] = {}  # steps of sessions that are on disk or on their way

    def find_spilled(self, principals: Principals) -> None:
        """Enter the sessions that an earlier process has left in the spill folder; their pages are checked later."""
        if self._spill is None:
            return
        self._spill.nbytes = self._spill.measure()
        for path in sorted(self._spill.files()):
            try:
                file = records.RecordFile(path)
                file.close()
                record = file.record
                if record.id + SUFFIX != path.name:
                    raise DamagedError(path, f"it has the session {record.id}")
            except (ValueError, OSError) as error:
                log.error("a spilled session is lost: %s", error)
                continue
            spilled = Spilled(nbytes=path.stat().st_size, lengths=record.lengths)
            self._table.adopt(
                Session(
                    id=record.id,
                    owner=principals.get(record.owner),
                    shape=record.shape,
                    kv_bytes=record.kv_bytes,
                    ttl=record.ttl,
                    created_at=record.created_at,
                    expires=time.monotonic() + record.expires_at - time.time(),
                    steps=record.steps,
                    epoch=record.epoch,
                    truncated_to=record.truncated_to,
                    spilled=spilled,
                )
            )

    # -- room --------------------------------------------------------------------------------------------------------

    async def make_room(self, nbytes: int) -> None:
        """See that so many bytes can be reserved, at once: there must be no `await` between this and that.

        Raises:
            KVBudgetError: They cannot, since the sessions that have them are in use; or there are never so many.
        """
        if nbytes > self._table.kv_memory or (nbytes <= self._table.kv_left and not self._turn.locked()):
            return  # the table says what there is to say
        async with self._turn:
            while nbytes > self._table.kv_left:
                await self._put_one_away(nbytes)

    async def relieve(self) -> None:
        """Spill idle sessions, or end them where there is no folder, until less is reserved than the high-water mark.

        While the folder cannot be written nobody is ended in advance: only where somebody needs the bytes.
        """
        mark = self._thresholds.high_water * self._table.kv_memory
        async with self._turn:
            with contextlib.suppress(KVBudgetError):
                while self._table.kv_reserved > mark and (self._can_spill or self._spill is None):
                    await self._put_one_away(0)

    async def put_all_away(self) -> None:
        """Spill every idle session, however short it has been idle: the server stops."""
        for session in self._table:
            if session.work:  # it is on its way to disk already, where nobody waits for it any more
                await asyncio.wait([session.work])
            if self._spill and session.cache and not session.in_flight and not session.work:
                try:
                    await self._move(session, self._write_out(session))
                except StorageError as error:
                    log.error("a session of %d bytes is lost: %s", session.kv_bytes, error.message)

    @property
    def _can_spill(self) -> bool:
        return self._spill is not None and time.monotonic() >= self._paused_until

    async def _put_one_away(self, nbytes: int) -> None:
        """Spill or end the least recently used session that may go.

        Raises:
            KVBudgetError: None may, yet.
        """
        thresholds = self._thresholds
        patience = thresholds.spill_after if self._can_spill else thresholds.evict_after
        idle = [session for session in self._table if session.cache and not session.in_flight and not session.work]
        oldest = max(idle, key=lambda session: session.idle_seconds, default=None)
        if oldest is None or oldest.idle_seconds < patience:
            soonest = 1.0 if oldest is None else patience - oldest.idle_seconds
            raise KVBudgetError(
                f"{nbytes} bytes are needed; {self._table.kv_left} of {self._table.kv_memory} are left, and no session"
                " has been idle for long enough to make room",
                retry_after=min(1.0, max(0.01, soonest)),
            )
        if not self._can_spill:
            reason = "it made room for another session's bytes" if nbytes else "the memory was nearly full"
            await self._evict(oldest, f"idle for {oldest.idle_seconds:.0f} s, {reason}")
            return
        try:
            await self._move(oldest, self._write_out(oldest))
        except StorageError as error:
            log.error("sessions are not spilled for %g s: %s", _PAUSE_SECONDS, error.message)
            self._paused_until = time.monotonic() + _PAUSE_SECONDS

    async def _evict(self, session: Session, why: str) -> None:
        log.info("session of %d bytes evicted", session.kv_bytes)
        self._table.end(session, partial(SessionEvictedError, f"the session was ended at {now_text()}: {why}"))
        await asyncio.shield(self._free(session))  # who needs the room may go away, and the session goes all the same

    async def _move(self, session: Session, move: Any) -> Any:
        """Run a move to its end, whoever waits for it."""
        task = session.work = asyncio.ensure_future(move)
        return await to_the_end(task)

    # -- to disk -----------------------------------------------------------------------------------------------------

    async def _write_out(self, session: Session) -> None:
        """Spill a session, unless somebody wants it meanwhile.

        Raises:
            StorageError: It cannot be written; it is in memory as before.
        """
        folder, cache = self._spill, session.cache
        assert folder
        assert cache
        path = self._path(session)
        try:
            answers = await self._engine.call(partial(self._answers.of_session, session.id, session.shape.num_layers))
            most = records.most_bytes(cache, answers)
            await self._make_room_on_disk(most)
            folder.reserve(most)
            size = 0
            try:
                size = await asyncio.to_thread(records.write, path, records.Record.of(session), cache, answers)
            except OSError as error:
                raise storage_error(error, "a session cannot be spilled") from None
            except MemoryError:
                raise StorageError("a session cannot be spilled: the machine has no memory left") from None
            finally:
                folder.release(most - size)
            if session.in_flight or session.lost:
                await self._remove(session, size)
                return
            session.spilled = Spilled(size, tuple(session.lengths()))
            session.cache = None
            del cache
            self._table.release(session)
            self._metrics.spills += 1
        finally:
            session.work = None
            self._wake(session)

    async def _make_room_on_disk(self, nbytes: int) -> None:
        """End sessions on disk that have been idle for long, where their bytes are needed there."""
        folder = self._spill
        assert folder
        while folder.nbytes + nbytes > folder.budget:
            idle = [
                session for session in self._table if session.spilled and not session.in_flight and not session.work
            ]
            oldest = max(idle, key=lambda session: session.idle_seconds, default=None)
            if oldest is None or oldest.idle_seconds < self._thresholds.evict_after:
                return  # `reserve` says so
            why = f"idle for {oldest.idle_seconds:.0f} s, it made room on disk for another one"
            await self._evict(oldest, why)

    def _path(self, session: Session) -> Path:
        assert self._spill
        return self._spill.path / (session.id + SUFFIX)

    async def _remove(self, session: Session, size: int) -> None:
        """Remove a session's file. One that stays is no danger: epoch and positions tell what it holds."""
        assert self._spill
        try:
            await asyncio.to_thread(self._path(session).unlink, missing_ok=True)
        except OSError as error:
            log.warning("a file stays in the spill folder: %s", error)
        else:
            self._spill.release(size)

    async def forget(self, session: Session) -> None:
        """Remove the file of an ended session, where it has one."""
        if session.spilled:
            await self._remove(session, session.spilled.nbytes)
            session.spilled = None

    # -- and back ----------------------------------------------------------------------------------------------------

    def submit(self, step: Step, call: Call) -> None:
        """Queue a step, at once or when its session is in memory.

        Raises:
            ServiceError: It is refused; see `Engine.submit`.
        """
        session = step.session
        if session.cache is not None and session.work is None:
            self._engine.submit(step, call)
            return
        if session.cache is None and session.spilled is None:
            raise SessionUnknownError("the session is not made yet")
        self._engine.admit(step, call)
        self._parked.setdefault(session.id, []).append(step)
        if session.work is None:
            self._wake(session)

    @asynccontextmanager
    async def hold(self, session: Session, call: Call) -> AsyncIterator[RingKVCache]:
        """Keep a session in memory, and everybody's steps from it, while the block runs.

        Raises:
            BusyError: Steps of another call are in flight.
            SessionLostError: It has ended since the call came.
            ServiceError: It cannot be brought back.
        """
        session.begin_step(call)
        self.holds += 1
        try:
            while session.lost or session.work or session.cache is None:
                if session.lost:
                    raise session.lost()
                if session.work:
                    await asyncio.wait([session.work])
                elif error := await self._move(session, self._read_in(session)):
                    raise error
            session.work = asyncio.current_task()
            try:
                yield session.cache
            finally:
                session.work = None
        finally:
            self.holds -= 1
            session.end_step()

    def _wake(self, session: Session) -> None:
        """Go on with the steps that wait for a session, now that nothing moves it."""
        if session.id not in self._parked:
            return
        if session.lost:
            self._refuse(session, session.lost())
        elif session.cache is None:
            session.work = asyncio.ensure_future(self._read_in(session))
        else:
            for step in self._parked.pop(session.id):
                self._engine.start(step)

    def _refuse(self, session: Session, error: ServiceError) -> None:
        for step in self._parked.pop(session.id, []):
            self._engine.refuse(step, error)

    async def _read_in(self, session: Session) -> ServiceError | None:
        """Bring a session back from disk; what stands in the way is returned."""
        error = None
        try:
            await self._fetch(session)
        except ServiceError as failed:
            error = failed
        except OSError as failed:
            error = storage_error(failed, "the session cannot be read back from disk")
        except MemoryError:
            error = ExhaustedError("the machine has no memory left", retry_after=1.0)
        except ValueError as failed:
            log.error("a spilled session is lost: %s", failed)
            what = failed.what if isinstance(failed, DamagedError) else "this release cannot read it"
            why = f"the session was on disk, and at {now_text()} its file was found damaged: {what}"
            error = SessionEvictedError(why)
            if not session.lost:
                self._table.end(session, partial(SessionEvictedError, why))
                self._free(session)
        except Exception:  # whatever it is, the steps that wait for the session get an answer
            log.exception("a session cannot be read back from disk")
            error = ServiceError("the session cannot be read back from disk", code=grpc.StatusCode.INTERNAL)
        session.work = None
        if error:
            self._refuse(session, error)
        self._wake(session)
        return error

    async def _fetch(self, session: Session) -> None:
        spilled = session.spilled
        assert spilled
        await self.make_room(session.kv_bytes)
        if session.lost:
            raise session.lost()
        self._table.reserve(session)
        try:
            cache, answers = await asyncio.to_thread(_read, self._path(session), self._backend)
        except BaseException:
            self._table.release(session)
            raise
        await self._engine.call(partial(self._remember, session, answers))
        session.cache, session.spilled = cache, None
        self._metrics.unspills += 1
        await self._remove(session, spilled.nbytes)

    def _remember(self, session: Session, answers: dict[int, Answer]) -> None:
        """Keep the answers that came with a session, where memory is left for them."""
        for layer, answer in answers.items():
            if self._answers.get(session.id, layer) is None:
                with contextlib.suppress(KVBudgetError):
                    self._answers.make_room(answer.nbytes)
                    self._answers.keep(session.id, layer, answer)


def _read(path: Path, backend: str) -> tuple[RingKVCache, dict[int, Answer]]:
    file = records.RecordFile(path)
    try:
        return file.read(backend)
    finally:
        file.close()

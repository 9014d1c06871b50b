"""The RPCs: bytes in, checked arguments, sessions and engine, bytes out."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Final

import grpc
import numpy as np

from numbaflash import RingKVCache
from numbaflash.backends import choose_backend
from numbaflash.cache.page_format import BITS
from numbaflash.cpu import SPLIT_KV_MAX_TOKENS

from . import validation, wire
from .attend import AttendStream
from .auth import Authenticator
from .config import ServeConfig
from .door import Call, Door
from .engine import Engine, resolve
from .errors import (
    BadTensorError,
    DrainingError,
    ExhaustedError,
    SessionClosedError,
    SessionUnknownError,
    UnauthenticatedError,
)
from .folder import folders
from .life import Fill, LifeMethods
from .memory import Memory, Thresholds
from .metrics import Gauges, Metrics
from .observe import Observer
from .principals import Principal, Principals, Quota, TokenBucket
from .processor import device_name
from .replay import Answers
from .replies import encode_answer
from .sessions import Session, SessionTable, Shape
from .snapshots import Snapshots
from .steps import Done, Outcome, Step
from .v1 import attention_pb2 as pb

if TYPE_CHECKING:
    from .tracing import Tracing

log = logging.getLogger(__name__)

SERVICE = pb.DESCRIPTOR.services_by_name["Attention"].full_name
Method = Callable[[bytes, Call], Awaitable[bytes]]

# Below it, steps are computed by a kernel for few queries, and several at once.
MIN_PREFILL_TOKENS: Final = SPLIT_KV_MAX_TOKENS + 1


class AttentionServicer:
    """`numbaflash.v1.Attention`. To be made and used on the event loop.

    Args:
        config: Limits and budgets.
        authenticator: Says who makes a call.
        tracing: Where spans go; None: nowhere.
    """

    def __init__(self, config: ServeConfig, authenticator: Authenticator, tracing: Tracing | None) -> None:
        self._config = config
        self._observer = Observer(SERVICE, tracing, steps=config.log_level == "debug")
        self._backend = choose_backend(config.backend)
        self.metrics = Metrics(small=MIN_PREFILL_TOKENS)
        self._spill, self._snapshots = folders(config)
        self._table = SessionTable(config.kv_memory, config.max_sessions)
        self._answers = Answers(config.replay_memory)
        self._engine = Engine(
            self._answers,
            max_steps=config.max_queued_steps,
            max_bytes=config.max_queued_bytes,
            max_batch=config.max_batch,
            batch_wait=config.batch_wait,
            small=MIN_PREFILL_TOKENS,
            max_wait=config.max_queue_time,
            shared=authenticator.asks,
            metrics=self.metrics,
        )
        principals = Principals(
            Quota(
                sessions=config.quota_sessions,
                kv_bytes=config.quota_kv_memory,
                tokens_per_second=config.quota_tokens_per_second,
            )
        )
        self._door = Door(authenticator, principals, config.max_calls, self.metrics)
        self._memory = Memory(
            self._table,
            self._engine,
            self._answers,
            self._spill,
            Thresholds(config.kv_high_water, config.spill_after, config.evict_after),
            self.metrics,
            backend=self._backend,
            free=self._free,
        )
        self._memory.find_spilled(principals)
        self._life = LifeMethods(
            self._table,
            self._engine,
            self._answers,
            self._memory,
            Snapshots(self._snapshots) if self._snapshots else None,
            max_ttl=config.max_ttl,
            backend=self._backend,
            enter=self._enter,
            leave=self._leave,
        )
        self._draining = False
        self._streams: set[AttendStream] = set()
        self._background: set[asyncio.Task[None]] = set()

    def handler(self) -> grpc.GenericRpcHandler:
        """Return the service's methods for `grpc.aio.Server.add_generic_rpc_handlers`; they take and return bytes."""
        unary: dict[str, Method] = {
            "GetInfo": self._get_info,
            "CreateSession": self._create_session,
            "Prefill": self._step,
            "Decode": self._step,
            "Fork": self._unless_draining(self._life.fork),
            "Truncate": self._unless_draining(self._life.truncate),
            "Snapshot": self._unless_draining(self._life.snapshot),
            "Restore": self._unless_draining(self._life.restore),
            "CloseSession": self._close_session,
            "ListSessions": self._list_sessions,
        }
        guard, watch = self._door.guard, self._observer.watch
        methods = {
            name: grpc.unary_unary_rpc_method_handler(guard(watch(name, method))) for name, method in unary.items()
        }
        methods["Attend"] = grpc.stream_stream_rpc_method_handler(guard(watch("Attend", self._attend)))
        return grpc.method_handlers_generic_handler(SERVICE, methods)

    async def warm_up(self) -> None:
        """Take a first prefill and a first decode: on a machine's first start, that compiles the kernels."""

        def step() -> None:
            cache = RingKVCache(1, 1, 8, capacity=64, backend=self._backend)
            for tokens in (MIN_PREFILL_TOKENS, 1):
                zeros = np.zeros((tokens, 1, 8), np.float16)
                cache.step(0, zeros, zeros, zeros)

        await self._engine.call(step)

    async def keep_house(self) -> None:
        """See to what is due each second, until cancelled.

        Sessions whose time is over end, and so do streams of callers that are let in no more; what is above the
        high-water mark is spilled.
        """
        while True:
            await asyncio.sleep(1.0)
            try:
                await self._see_to_what_is_due()
            except Exception:
                log.exception("something that is due each second failed, and is tried again")

    async def _see_to_what_is_due(self) -> None:
        self._door.refresh()
        for stream in self._streams:
            try:
                self._door.readmit(stream.call)
            except UnauthenticatedError:
                stream.stop_reading()
        for session in self._table.end_idle():
            log.info("session of %d bytes expired", session.kv_bytes)
            self._free(session)
        await self._memory.relieve()

    def drain(self) -> None:
        """Take no more steps and sessions; what is in flight goes on, and streams end when theirs is answered."""
        self._draining = True
        for stream in self._streams:
            stream.stop_reading()

    @property
    def busy(self) -> bool:
        """Whether steps or streams are in flight, or something else is done with a session."""
        return self._engine.steps > 0 or bool(self._streams) or self._memory.holds > 0

    def load(self) -> dict[str, int]:
        """Say how much is under way."""
        return {"steps": self._engine.steps, "streams": len(self._streams), "sessions": len(self._table)}

    def identity(self) -> dict[str, str]:
        """Say what serves."""
        return {"version": version("numbaflash"), "backend": self._backend, "device": device_name(self._backend)}

    def sessions(self) -> Iterator[Session]:
        """Return the sessions that live, of all callers."""
        return iter(self._table)

    def gauges(self) -> Gauges:
        """Say what is held at this moment."""
        table, engine = self._table, self._engine
        caches = [session.cache for session in table if session.cache]
        # Forks share the pages of one pool.
        pools = {id(pool): pool for cache in caches for pool in cache.pools}.values()
        return Gauges(
            draining=self._draining,
            sessions=len(table),
            kv_memory_bytes=table.kv_memory,
            kv_reserved_bytes=table.kv_reserved,
            kv_used_bytes=sum(pool.nbytes for pool in pools),
            kv_pages=sum(pool.nbytes // pool.page_nbytes for pool in pools),
            spilled_sessions=sum(session.spilled is not None for session in table),
            spilled_bytes=self._spill.nbytes if self._spill else 0,
            spill_memory_bytes=self._spill.budget if self._spill else 0,
            replay_memory_bytes=self._config.replay_memory,
            replay_bytes=self._answers.nbytes,
            queued_steps=engine.steps,
            queued_bytes=engine.nbytes,
            streams=len(self._streams),
        )

    async def stop(self) -> None:
        """Finish what runs, spill the sessions, and end the engine."""
        while self.busy:
            await asyncio.sleep(0.01)
        await self._memory.put_all_away()
        await self._engine.stop()
        for folder in (self._spill, self._snapshots):
            if folder:
                folder.close()

    # -- unary RPCs --------------------------------------------------------------------------------------------------

    async def _get_info(self, request: bytes, _: Call) -> bytes:
        wire.decode(pb.GetInfoRequest, request)
        config = self._config
        info = pb.GetInfoResponse(
            **self.identity(),
            dtypes=[*wire.DTYPES, *BITS],
            limits=pb.Limits(
                max_message_bytes=config.max_message_bytes,
                max_sessions=config.max_sessions,
                max_layers=validation.MAX_LAYERS,
                max_heads=validation.MAX_HEADS,
                max_head_dim=validation.MAX_HEAD_DIM,
                max_capacity=validation.MAX_CAPACITY,
                max_in_flight=config.max_in_flight,
                min_prefill_tokens=MIN_PREFILL_TOKENS,
            ),
            usage=pb.Usage(
                kv_memory_bytes=self._table.kv_memory,
                kv_reserved_bytes=self._table.kv_reserved,
                replay_memory_bytes=config.replay_memory,
                replay_bytes=self._answers.nbytes,
                sessions=len(self._table),
                queued_steps=self._engine.steps,
                queued_bytes=self._engine.nbytes,
                spill_memory_bytes=self._spill.budget if self._spill else 0,
                spilled_bytes=self._spill.nbytes if self._spill else 0,
                spilled_sessions=sum(session.spilled is not None for session in self._table),
            ),
        )
        info.limits.default_ttl.FromNanoseconds(int(config.default_ttl * 1e9))
        info.limits.max_ttl.FromNanoseconds(int(config.max_ttl * 1e9))
        return info.SerializeToString()

    async def _create_session(self, wire_request: bytes, call: Call) -> bytes:
        request = wire.decode(pb.CreateSessionRequest, wire_request)
        shape = validation.session_shape(request.shape)
        ttl = self._config.default_ttl
        if request.HasField("ttl"):
            ttl = validation.time_to_live(request.ttl, self._config.max_ttl)
        scales = validation.channel_scales(request, shape)
        session = await self._enter(
            call.principal,
            shape,
            ttl,
            lambda: self._engine.call(partial(shape.new_cache, self._backend, scales), call.principal),
        )
        response = pb.CreateSessionResponse(session_id=session.id, kv_bytes=session.kv_bytes)
        response.expires_at.FromNanoseconds(int(session.expires_at * 1e9))
        return response.SerializeToString()

    async def _enter(self, owner: Principal, shape: Shape, ttl: float, fill: Fill) -> Session:
        """Make a session: its bytes are reserved before `fill` makes its cache."""
        self._refuse_when_draining()
        self._table.check(owner, shape)  # before anybody has to make room
        await self._memory.make_room(shape.kv_bytes)
        session = self._table.create(owner, shape, ttl)
        session.work = asyncio.current_task()
        try:
            session.cache = await fill()
        except BaseException as error:  # the caller may have gone, too
            session.work = None
            if leaving := self._leave(session):
                await asyncio.shield(leaving)  # whoever hears of the error finds its bytes given back
            if isinstance(error, MemoryError):
                raise ExhaustedError("the machine has no memory left", retry_after=1.0) from error
            if isinstance(error, ValueError):
                raise BadTensorError("shape", str(error)) from error
            raise
        session.work = None
        session.expires = time.monotonic() + ttl
        self.metrics.created += 1
        return session

    def _leave(self, session: Session) -> asyncio.Task[None] | None:
        """End a session that nobody got to know of, unless it has ended already."""
        if session.lost:
            return None
        self._table.end(session, partial(SessionUnknownError, "the session was not made"))
        return self._free(session)

    async def _step(self, wire_request: bytes, call: Call) -> bytes:
        parts = wire.decode_step(pb.StepRequest, wire_request)
        remaining = call.context.time_remaining()
        deadline = None if remaining is None else time.monotonic() + remaining
        done: asyncio.Future[Done] = asyncio.get_running_loop().create_future()
        step = self.submit(parts, call, partial(resolve, done), deadline)
        try:
            return encode_answer(parts.head, await done)
        finally:
            step.taken_back = True  # where the caller has gone; else it makes no difference any more

    async def _close_session(self, wire_request: bytes, call: Call) -> bytes:
        session_id = wire.decode(pb.CloseSessionRequest, wire_request).session_id
        try:
            session = self._table.get(session_id, call.principal)
        except SessionUnknownError as error:
            if not isinstance(error, SessionClosedError):  # closing twice is fine: the first answer may have been lost
                raise
        else:
            self._table.end(session, partial(SessionClosedError, "the session was closed"))
            await asyncio.shield(self._free(session))
        return pb.CloseSessionResponse().SerializeToString()

    async def _list_sessions(self, wire_request: bytes, call: Call) -> bytes:
        wire.decode(pb.ListSessionsRequest, wire_request)
        return pb.ListSessionsResponse(
            sessions=map(_describe, self._table.owned_by(call.principal))
        ).SerializeToString()

    def _unless_draining(self, method: Method) -> Method:
        async def call(wire_request: bytes, call: Call) -> bytes:
            self._refuse_when_draining()
            return await method(wire_request, call)

        return call

    # -- steps -------------------------------------------------------------------------------------------------------

    def submit(
        self,
        parts: wire.Parts[pb.StepRequest],
        call: Call,
        settle: Callable[[Outcome], None],
        deadline: float | None = None,
    ) -> Step:
        """Check a step of a unary call or a stream and queue it.

        Args:
            parts: The step.
            call: Which brought it.
            settle: Gets what comes of the step.
            deadline: On the clock of `time.monotonic`; None: whenever.

        Raises:
            ServiceError: It is refused.
        """
        self._refuse_when_draining()
        request = parts.head
        session = self._table.get(request.session_id, call.principal)
        validation.step_head(request, session.shape)
        form = validation.step_form(parts.form, len(parts.payload), session.shape)
        session.check_epoch(form.epoch, request.layer)
        if (bucket := call.principal.bucket) is not None:
            bucket.check()
            settle = partial(_pay, bucket, form.tokens / session.shape.num_layers, settle)
        step = Step(
            session=session,
            layer=request.layer,
            position=request.position,
            request_id=request.request_id,
            form=form,
            payload=parts.payload,
            deadline=deadline,
            settle=self._observer.settle(request, form.tokens, settle),
        )
        self._memory.submit(step, call)
        return step

    async def _attend(self, _: Any, call: Call) -> None:
        stream = AttendStream(call, self.submit, self.metrics.count_error, self._config.max_in_flight)
        self._streams.add(stream)
        try:
            if self._draining:
                stream.stop_reading()
            await stream.run()
            self._refuse_when_draining()
            self._door.readmit(call)
        finally:
            self._streams.discard(stream)

    # -- sessions ----------------------------------------------------------------------------------------------------

    def _refuse_when_draining(self) -> None:
        if self._draining:
            raise DrainingError("the server is about to stop", retry_after=1.0)

    def _free(self, session: Session) -> asyncio.Task[None]:
        """Let go of what an ended session holds, and give its bytes back then."""

        def let_go() -> None:
            session.cache = None
            self._answers.forget_session(session.id, session.shape.num_layers)

        assert session.lost is not None
        self.metrics.count_end(session.lost())

        async def free() -> None:
            while session.work:
                await asyncio.wait([session.work])
            await self._engine.call(let_go, session.owner)
            self._table.release(session)
            await self._memory.forget(session)

        task = asyncio.create_task(free())
        self._background.add(task)  # the loop itself holds tasks only weakly
        task.add_done_callback(self._background.discard)
        return task


def _pay(bucket: TokenBucket, tokens: float, settle: Callable[[Outcome], None], outcome: Outcome) -> None:
    """Take a step's tokens out of a caller's bucket, where it was computed, and settle it."""
    if isinstance(outcome, Done) and not outcome.replayed:
        bucket.take(tokens)
    settle(outcome)


def _describe(session: Session) -> pb.SessionInfo:
    shape, lengths = session.shape, session.lengths()
    info = pb.SessionInfo(
        session_id=session.id,
        shape=pb.SessionShape(**asdict(shape)),
        min_length=min(lengths),
        max_length=max(lengths),
        kv_bytes=session.kv_bytes,
        steps=session.steps,
        busy=session.in_flight > 0,
        spilled=session.spilled is not None,
    )
    info.created_at.FromNanoseconds(int(session.created_at * 1e9))
    info.expires_at.FromNanoseconds(int(session.expires_at * 1e9))
    return info

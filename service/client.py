"""The Python client: sessions on a server that are used like `numbaflash.RingKVCache`."""

from __future__ import annotations

from typing import Final

from numbaflash.cache.quantizers import AWQQuantizer, Quantizer

from . import wire
from .calls import RetryPolicy
from .client_session import Replay, Session
from .connection import Connection
from .credentials import TLS, largest_message
from .info import ServerInfo, SessionInfo
from .v1 import attention_pb2 as pb

__all__ = ["TLS", "Client", "RetryPolicy", "Session"]

# Of a StepRequest without its payload: ids, options and five descriptors come to some 400 bytes.
_MAX_HEAD_BYTES: Final = 2048


class Client(Connection):
    """A connection to a server; may be shared by threads.

    Args:
        target: HOST:PORT or unix:PATH.
        tls: How the connection is encrypted; None: not at all.
        token: Says who calls, where the server asks for tokens.
        timeout: Seconds for a call, all attempts together, where the call itself is given none.
        retry: When and how often a failed call is made again.

    Raises:
        ValueError: The token would go to another machine unencrypted.
        OSError: A file of `tls` cannot be read.

    Example:
        with Client("127.0.0.1:50051") as client:
            session = client.create_session(num_layers=2, num_kv_heads=2, head_dim=64, capacity=4096)
            out = session.prefill(0, q, k, v)
    """

    def info(self) -> ServerInfo:
        """Ask the server what it is, what it accepts and what it has left.

        Raises:
            ServiceError: The call failed.
        """
        answer = self._call("GetInfo", pb.GetInfoRequest())
        return ServerInfo.from_message(wire.decode(pb.GetInfoResponse, answer))

    def list_sessions(self) -> list[SessionInfo]:
        """Ask for the sessions that the server holds.

        Raises:
            ServiceError: The call failed.
        """
        answer = wire.decode(pb.ListSessionsResponse, self._call("ListSessions", pb.ListSessionsRequest()))
        return [SessionInfo.from_message(session) for session in answer.sessions]

    def create_session(
        self,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        capacity: int,
        sink_tokens: int = 0,
        dtype: str = "float16",
        quantizer: Quantizer | str | None = None,
        page_size: int = 64,
        rollback: int = 64,
        num_q_heads: int | None = None,
        ttl: float | None = None,
        stream: bool = True,
        replay: Replay | None = None,
    ) -> Session:
        """Make an empty session. The arguments are `RingKVCache`'s, and some more.

        Args:
            num_layers: Layers of the model.
            num_kv_heads: Heads of keys and values.
            head_dim: Elements of a query, a key and a value.
            capacity: Tokens that stay visible, sink tokens included.
            sink_tokens: First tokens that are never overwritten.
            dtype: Storage dtype, "float32", "float16", "bfloat16", "int8" or "int4".
            quantizer: Of int8 and int4, as for `RingKVCache`.
            page_size: Tokens of a page.
            rollback: Newest tokens that can always be truncated.
            num_q_heads: Heads of queries that every step must have; None: any multiple of `num_kv_heads`.
            ttl: Seconds without a step after which the server ends the session; None: the server's default.
            stream: Send steps over one persistent Attend stream instead of a call each, which takes about three fifths
                of the time beside the kernel (benchmarks/service.py).
            replay: Called with the session and a length for each layer when the server has lost the session (it was
                restarted, it needed the memory, time ran out). The session has been made anew then and is empty; by
                `append` or otherwise it is to be brought to those lengths, with the tokens of all calls that have
                succeeded so far. The call that found it lost is then made again. None: losses are raised. Forks have
                none.

        Raises:
            BadTensorError: An argument is not acceptable (a ValueError too); `field` names it.
            KVBudgetError: The server has not that much memory left.
            ServiceError: The call failed otherwise.
        """
        limits = self.info().limits
        shape = pb.SessionShape(
            num_layers=num_layers,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            num_q_heads=num_q_heads or 0,
            capacity=capacity,
            sink_tokens=sink_tokens,
            dtype=dtype,
            quantizer=quantizer.text if isinstance(quantizer, Quantizer) else quantizer or "",
            page_size=page_size,
            rollback=rollback,
        )
        request = pb.CreateSessionRequest(shape=shape)
        if ttl is not None:
            request.ttl.FromNanoseconds(round(ttl * 1e9))
        scales = {"channel_scales": quantizer.channel_scales} if isinstance(quantizer, AWQQuantizer) else {}
        none = [0] * num_layers

        def create() -> tuple[str, pb.SessionState]:
            answer = wire.decode(pb.CreateSessionResponse, self._call("CreateSession", request, tensors=scales))
            return answer.session_id, pb.SessionState(shape=shape, lengths=none, firsts=none, kv_bytes=answer.kv_bytes)

        max_payload = largest_message(limits.max_message_bytes) - _MAX_HEAD_BYTES
        return Session(self, *create(), stream=stream, max_payload=max_payload, create=create, replay=replay)

    def restore(self, name: str, *, ttl: float | None = None, stream: bool = True) -> Session:
        """Make a session from a snapshot that `Session.snapshot` wrote, as `RingKVCache.load`.

        Its layers hold what they held then: `length` says how much.

        Args:
            name: The snapshot's.
            ttl: Seconds without a step after which the server ends the session; None: as for the one in the snapshot.
            stream: As in `create_session`.

        Raises:
            SnapshotUnknownError: There is none of that name.
            SnapshotDamagedError: Its file does not match its checksums.
            KVBudgetError: The server has not that much memory left.
            ServiceError: The call failed otherwise.
        """
        limits = self.info().limits
        request = pb.RestoreRequest(name=name)
        if ttl is not None:
            request.ttl.FromNanoseconds(round(ttl * 1e9))
        answer = wire.decode(pb.RestoreResponse, self._call("Restore", request))
        max_payload = largest_message(limits.max_message_bytes) - _MAX_HEAD_BYTES
        return Session(self, answer.session_id, answer.state, stream=stream, max_payload=max_payload)

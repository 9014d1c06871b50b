"""What a server says of itself and of its sessions."""

from __future__ import annotations

from dataclasses import dataclass

from .v1 import attention_pb2 as pb


@dataclass(frozen=True)
class Limits:
    """What a server accepts; the fields of the proto's `Limits`, times in seconds."""

    max_message_bytes: int
    max_sessions: int
    max_layers: int
    max_heads: int
    max_head_dim: int
    max_capacity: int
    max_in_flight: int
    default_ttl: float
    max_ttl: float
    min_prefill_tokens: int


@dataclass(frozen=True)
class Usage:
    """What a server has given out; the fields of the proto's `Usage`."""

    kv_memory_bytes: int
    kv_reserved_bytes: int
    replay_memory_bytes: int
    replay_bytes: int
    sessions: int
    queued_steps: int
    queued_bytes: int
    spill_memory_bytes: int
    spilled_bytes: int
    spilled_sessions: int


@dataclass(frozen=True)
class ServerInfo:
    """A server: what it is, what it accepts and what it has left."""

    version: str
    backend: str
    device: str
    dtypes: tuple[str, ...]
    limits: Limits
    usage: Usage

    @classmethod
    def from_message(cls, message: pb.GetInfoResponse) -> ServerInfo:
        """Read the message."""
        limits, usage = message.limits, message.usage
        return cls(
            version=message.version,
            backend=message.backend,
            device=message.device,
            dtypes=tuple(message.dtypes),
            limits=Limits(
                max_message_bytes=limits.max_message_bytes,
                max_sessions=limits.max_sessions,
                max_layers=limits.max_layers,
                max_heads=limits.max_heads,
                max_head_dim=limits.max_head_dim,
                max_capacity=limits.max_capacity,
                max_in_flight=limits.max_in_flight,
                default_ttl=limits.default_ttl.ToNanoseconds() / 1e9,
                max_ttl=limits.max_ttl.ToNanoseconds() / 1e9,
                min_prefill_tokens=limits.min_prefill_tokens,
            ),
            usage=Usage(
                kv_memory_bytes=usage.kv_memory_bytes,
                kv_reserved_bytes=usage.kv_reserved_bytes,
                replay_memory_bytes=usage.replay_memory_bytes,
                replay_bytes=usage.replay_bytes,
                sessions=usage.sessions,
                queued_steps=usage.queued_steps,
                queued_bytes=usage.queued_bytes,
                spill_memory_bytes=usage.spill_memory_bytes,
                spilled_bytes=usage.spilled_bytes,
                spilled_sessions=usage.spilled_sessions,
            ),
        )


@dataclass(frozen=True)
class SessionInfo:
    """A session: its shape, how far it is and how long it lives; times in seconds since the epoch."""

    session_id: str
    num_layers: int
    num_kv_heads: int
    head_dim: int
    capacity: int
    sink_tokens: int
    dtype: str
    min_length: int
    max_length: int
    kv_bytes: int
    created_at: float
    expires_at: float
    steps: int
    busy: bool
    spilled: bool

    @classmethod
    def from_message(cls, message: pb.SessionInfo) -> SessionInfo:
        """Read the message."""
        return cls(
            session_id=message.session_id,
            num_layers=message.shape.num_layers,
            num_kv_heads=message.shape.num_kv_heads,
            head_dim=message.shape.head_dim,
            capacity=message.shape.capacity,
            sink_tokens=message.shape.sink_tokens,
            dtype=message.shape.dtype,
            min_length=message.min_length,
            max_length=message.max_length,
            kv_bytes=message.kv_bytes,
            created_at=message.created_at.ToNanoseconds() / 1e9,
            expires_at=message.expires_at.ToNanoseconds() / 1e9,
            steps=message.steps,
            busy=message.busy,
            spilled=message.spilled,
        )

"""Generated from protos/numbaflash/v1/attention.proto by scripts/generate_protos; do not edit."""
import datetime

from google.protobuf import any_pb2 as _any_pb2
from google.protobuf import duration_pb2 as _duration_pb2
from google.protobuf import timestamp_pb2 as _timestamp_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class TensorDesc(_message.Message):
    __slots__ = ("name", "dtype", "shape", "offset", "nbytes")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    NBYTES_FIELD_NUMBER: _ClassVar[int]
    name: str
    dtype: str
    shape: _containers.RepeatedScalarFieldContainer[int]
    offset: int
    nbytes: int
    def __init__(self, name: _Optional[str] = ..., dtype: _Optional[str] = ..., shape: _Optional[_Iterable[int]] = ..., offset: _Optional[int] = ..., nbytes: _Optional[int] = ...) -> None: ...

class StepRequest(_message.Message):
    __slots__ = ("session_id", "layer", "position", "request_id", "options", "tensors", "payload")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    layer: int
    position: int
    request_id: str
    options: StepOptions
    tensors: _containers.RepeatedCompositeFieldContainer[TensorDesc]
    payload: bytes
    def __init__(self, session_id: _Optional[str] = ..., layer: _Optional[int] = ..., position: _Optional[int] = ..., request_id: _Optional[str] = ..., options: _Optional[_Union[StepOptions, _Mapping]] = ..., tensors: _Optional[_Iterable[_Union[TensorDesc, _Mapping]]] = ..., payload: _Optional[bytes] = ...) -> None: ...

class StepOptions(_message.Message):
    __slots__ = ("scale", "softcap", "epoch")
    SCALE_FIELD_NUMBER: _ClassVar[int]
    SOFTCAP_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    scale: float
    softcap: float
    epoch: int
    def __init__(self, scale: _Optional[float] = ..., softcap: _Optional[float] = ..., epoch: _Optional[int] = ...) -> None: ...

class StepResponse(_message.Message):
    __slots__ = ("session_id", "layer", "position", "request_id", "first", "replayed", "error", "queue_ns", "kernel_ns", "batch_size", "tensors", "payload")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    FIRST_FIELD_NUMBER: _ClassVar[int]
    REPLAYED_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    QUEUE_NS_FIELD_NUMBER: _ClassVar[int]
    KERNEL_NS_FIELD_NUMBER: _ClassVar[int]
    BATCH_SIZE_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    layer: int
    position: int
    request_id: str
    first: int
    replayed: bool
    error: Status
    queue_ns: int
    kernel_ns: int
    batch_size: int
    tensors: _containers.RepeatedCompositeFieldContainer[TensorDesc]
    payload: bytes
    def __init__(self, session_id: _Optional[str] = ..., layer: _Optional[int] = ..., position: _Optional[int] = ..., request_id: _Optional[str] = ..., first: _Optional[int] = ..., replayed: _Optional[bool] = ..., error: _Optional[_Union[Status, _Mapping]] = ..., queue_ns: _Optional[int] = ..., kernel_ns: _Optional[int] = ..., batch_size: _Optional[int] = ..., tensors: _Optional[_Iterable[_Union[TensorDesc, _Mapping]]] = ..., payload: _Optional[bytes] = ...) -> None: ...

class Status(_message.Message):
    __slots__ = ("code", "message", "details")
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    DETAILS_FIELD_NUMBER: _ClassVar[int]
    code: int
    message: str
    details: _containers.RepeatedCompositeFieldContainer[_any_pb2.Any]
    def __init__(self, code: _Optional[int] = ..., message: _Optional[str] = ..., details: _Optional[_Iterable[_Union[_any_pb2.Any, _Mapping]]] = ...) -> None: ...

class SessionShape(_message.Message):
    __slots__ = ("num_layers", "num_kv_heads", "head_dim", "num_q_heads", "capacity", "sink_tokens", "dtype", "quantizer", "page_size", "rollback")
    NUM_LAYERS_FIELD_NUMBER: _ClassVar[int]
    NUM_KV_HEADS_FIELD_NUMBER: _ClassVar[int]
    HEAD_DIM_FIELD_NUMBER: _ClassVar[int]
    NUM_Q_HEADS_FIELD_NUMBER: _ClassVar[int]
    CAPACITY_FIELD_NUMBER: _ClassVar[int]
    SINK_TOKENS_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    QUANTIZER_FIELD_NUMBER: _ClassVar[int]
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    ROLLBACK_FIELD_NUMBER: _ClassVar[int]
    num_layers: int
    num_kv_heads: int
    head_dim: int
    num_q_heads: int
    capacity: int
    sink_tokens: int
    dtype: str
    quantizer: str
    page_size: int
    rollback: int
    def __init__(self, num_layers: _Optional[int] = ..., num_kv_heads: _Optional[int] = ..., head_dim: _Optional[int] = ..., num_q_heads: _Optional[int] = ..., capacity: _Optional[int] = ..., sink_tokens: _Optional[int] = ..., dtype: _Optional[str] = ..., quantizer: _Optional[str] = ..., page_size: _Optional[int] = ..., rollback: _Optional[int] = ...) -> None: ...

class CreateSessionRequest(_message.Message):
    __slots__ = ("shape", "ttl", "tensors", "payload")
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    TTL_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    shape: SessionShape
    ttl: _duration_pb2.Duration
    tensors: _containers.RepeatedCompositeFieldContainer[TensorDesc]
    payload: bytes
    def __init__(self, shape: _Optional[_Union[SessionShape, _Mapping]] = ..., ttl: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., tensors: _Optional[_Iterable[_Union[TensorDesc, _Mapping]]] = ..., payload: _Optional[bytes] = ...) -> None: ...

class CreateSessionResponse(_message.Message):
    __slots__ = ("session_id", "expires_at", "kv_bytes")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_AT_FIELD_NUMBER: _ClassVar[int]
    KV_BYTES_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    expires_at: _timestamp_pb2.Timestamp
    kv_bytes: int
    def __init__(self, session_id: _Optional[str] = ..., expires_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., kv_bytes: _Optional[int] = ...) -> None: ...

class CloseSessionRequest(_message.Message):
    __slots__ = ("session_id",)
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    def __init__(self, session_id: _Optional[str] = ...) -> None: ...

class CloseSessionResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListSessionsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListSessionsResponse(_message.Message):
    __slots__ = ("sessions",)
    SESSIONS_FIELD_NUMBER: _ClassVar[int]
    sessions: _containers.RepeatedCompositeFieldContainer[SessionInfo]
    def __init__(self, sessions: _Optional[_Iterable[_Union[SessionInfo, _Mapping]]] = ...) -> None: ...

class SessionInfo(_message.Message):
    __slots__ = ("session_id", "shape", "min_length", "max_length", "kv_bytes", "created_at", "expires_at", "steps", "busy", "spilled")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    MIN_LENGTH_FIELD_NUMBER: _ClassVar[int]
    MAX_LENGTH_FIELD_NUMBER: _ClassVar[int]
    KV_BYTES_FIELD_NUMBER: _ClassVar[int]
    CREATED_AT_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_AT_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    BUSY_FIELD_NUMBER: _ClassVar[int]
    SPILLED_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    shape: SessionShape
    min_length: int
    max_length: int
    kv_bytes: int
    created_at: _timestamp_pb2.Timestamp
    expires_at: _timestamp_pb2.Timestamp
    steps: int
    busy: bool
    spilled: bool
    def __init__(self, session_id: _Optional[str] = ..., shape: _Optional[_Union[SessionShape, _Mapping]] = ..., min_length: _Optional[int] = ..., max_length: _Optional[int] = ..., kv_bytes: _Optional[int] = ..., created_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., expires_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., steps: _Optional[int] = ..., busy: _Optional[bool] = ..., spilled: _Optional[bool] = ...) -> None: ...

class GetInfoRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetInfoResponse(_message.Message):
    __slots__ = ("version", "backend", "device", "dtypes", "limits", "usage")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    BACKEND_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    DTYPES_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    USAGE_FIELD_NUMBER: _ClassVar[int]
    version: str
    backend: str
    device: str
    dtypes: _containers.RepeatedScalarFieldContainer[str]
    limits: Limits
    usage: Usage
    def __init__(self, version: _Optional[str] = ..., backend: _Optional[str] = ..., device: _Optional[str] = ..., dtypes: _Optional[_Iterable[str]] = ..., limits: _Optional[_Union[Limits, _Mapping]] = ..., usage: _Optional[_Union[Usage, _Mapping]] = ...) -> None: ...

class Limits(_message.Message):
    __slots__ = ("max_message_bytes", "max_sessions", "max_layers", "max_heads", "max_head_dim", "max_capacity", "max_in_flight", "default_ttl", "max_ttl", "min_prefill_tokens")
    MAX_MESSAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_SESSIONS_FIELD_NUMBER: _ClassVar[int]
    MAX_LAYERS_FIELD_NUMBER: _ClassVar[int]
    MAX_HEADS_FIELD_NUMBER: _ClassVar[int]
    MAX_HEAD_DIM_FIELD_NUMBER: _ClassVar[int]
    MAX_CAPACITY_FIELD_NUMBER: _ClassVar[int]
    MAX_IN_FLIGHT_FIELD_NUMBER: _ClassVar[int]
    DEFAULT_TTL_FIELD_NUMBER: _ClassVar[int]
    MAX_TTL_FIELD_NUMBER: _ClassVar[int]
    MIN_PREFILL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    max_message_bytes: int
    max_sessions: int
    max_layers: int
    max_heads: int
    max_head_dim: int
    max_capacity: int
    max_in_flight: int
    default_ttl: _duration_pb2.Duration
    max_ttl: _duration_pb2.Duration
    min_prefill_tokens: int
    def __init__(self, max_message_bytes: _Optional[int] = ..., max_sessions: _Optional[int] = ..., max_layers: _Optional[int] = ..., max_heads: _Optional[int] = ..., max_head_dim: _Optional[int] = ..., max_capacity: _Optional[int] = ..., max_in_flight: _Optional[int] = ..., default_ttl: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., max_ttl: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., min_prefill_tokens: _Optional[int] = ...) -> None: ...

class Usage(_message.Message):
    __slots__ = ("kv_memory_bytes", "kv_reserved_bytes", "replay_memory_bytes", "replay_bytes", "sessions", "queued_steps", "queued_bytes", "spill_memory_bytes", "spilled_bytes", "spilled_sessions")
    KV_MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    KV_RESERVED_BYTES_FIELD_NUMBER: _ClassVar[int]
    REPLAY_MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    REPLAY_BYTES_FIELD_NUMBER: _ClassVar[int]
    SESSIONS_FIELD_NUMBER: _ClassVar[int]
    QUEUED_STEPS_FIELD_NUMBER: _ClassVar[int]
    QUEUED_BYTES_FIELD_NUMBER: _ClassVar[int]
    SPILL_MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    SPILLED_BYTES_FIELD_NUMBER: _ClassVar[int]
    SPILLED_SESSIONS_FIELD_NUMBER: _ClassVar[int]
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
    def __init__(self, kv_memory_bytes: _Optional[int] = ..., kv_reserved_bytes: _Optional[int] = ..., replay_memory_bytes: _Optional[int] = ..., replay_bytes: _Optional[int] = ..., sessions: _Optional[int] = ..., queued_steps: _Optional[int] = ..., queued_bytes: _Optional[int] = ..., spill_memory_bytes: _Optional[int] = ..., spilled_bytes: _Optional[int] = ..., spilled_sessions: _Optional[int] = ...) -> None: ...

class SessionState(_message.Message):
    __slots__ = ("shape", "lengths", "firsts", "epoch", "kv_bytes")
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    LENGTHS_FIELD_NUMBER: _ClassVar[int]
    FIRSTS_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    KV_BYTES_FIELD_NUMBER: _ClassVar[int]
    shape: SessionShape
    lengths: _containers.RepeatedScalarFieldContainer[int]
    firsts: _containers.RepeatedScalarFieldContainer[int]
    epoch: int
    kv_bytes: int
    def __init__(self, shape: _Optional[_Union[SessionShape, _Mapping]] = ..., lengths: _Optional[_Iterable[int]] = ..., firsts: _Optional[_Iterable[int]] = ..., epoch: _Optional[int] = ..., kv_bytes: _Optional[int] = ...) -> None: ...

class ForkRequest(_message.Message):
    __slots__ = ("session_id",)
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    def __init__(self, session_id: _Optional[str] = ...) -> None: ...

class ForkResponse(_message.Message):
    __slots__ = ("session_id", "expires_at", "state")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_AT_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    expires_at: _timestamp_pb2.Timestamp
    state: SessionState
    def __init__(self, session_id: _Optional[str] = ..., expires_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., state: _Optional[_Union[SessionState, _Mapping]] = ...) -> None: ...

class TruncateRequest(_message.Message):
    __slots__ = ("session_id", "length", "epoch")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    LENGTH_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    length: int
    epoch: int
    def __init__(self, session_id: _Optional[str] = ..., length: _Optional[int] = ..., epoch: _Optional[int] = ...) -> None: ...

class TruncateResponse(_message.Message):
    __slots__ = ("expires_at", "epoch", "first", "replayed")
    EXPIRES_AT_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    FIRST_FIELD_NUMBER: _ClassVar[int]
    REPLAYED_FIELD_NUMBER: _ClassVar[int]
    expires_at: _timestamp_pb2.Timestamp
    epoch: int
    first: int
    replayed: bool
    def __init__(self, expires_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., epoch: _Optional[int] = ..., first: _Optional[int] = ..., replayed: _Optional[bool] = ...) -> None: ...

class SnapshotRequest(_message.Message):
    __slots__ = ("session_id", "name")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    name: str
    def __init__(self, session_id: _Optional[str] = ..., name: _Optional[str] = ...) -> None: ...

class SnapshotResponse(_message.Message):
    __slots__ = ("usable_tokens",)
    USABLE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    usable_tokens: int
    def __init__(self, usable_tokens: _Optional[int] = ...) -> None: ...

class RestoreRequest(_message.Message):
    __slots__ = ("name", "ttl")
    NAME_FIELD_NUMBER: _ClassVar[int]
    TTL_FIELD_NUMBER: _ClassVar[int]
    name: str
    ttl: _duration_pb2.Duration
    def __init__(self, name: _Optional[str] = ..., ttl: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class RestoreResponse(_message.Message):
    __slots__ = ("session_id", "usable_tokens", "expires_at", "state")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    USABLE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_AT_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    usable_tokens: int
    expires_at: _timestamp_pb2.Timestamp
    state: SessionState
    def __init__(self, session_id: _Optional[str] = ..., usable_tokens: _Optional[int] = ..., expires_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., state: _Optional[_Union[SessionState, _Mapping]] = ...) -> None: ...

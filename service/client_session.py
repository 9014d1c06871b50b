"""The client's sessions: `RingKVCache` over the wire, with positions counted, steps named, and prompts cut."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final, TypeAlias, TypeVar

import grpc
import numpy as np
from google.rpc import status_pb2
from numpy.typing import NDArray

from numbaflash.arrays import as_numpy, like
from numbaflash.cache.arguments import int_in
from numbaflash.problem import check_dtype

from . import wire
from .connection import Connection
from .errors import ServiceError, SessionLostError, from_status
from .v1 import attention_pb2 as pb

T = TypeVar("T")
# Makes a session on the server: its id, and what it holds.
Create: TypeAlias = "Callable[[], tuple[str, pb.SessionState]]"
# Brings a session that was made anew to so many tokens in each layer.
Replay: TypeAlias = "Callable[[Session, tuple[int, ...]], object]"

# A call that finds its session lost so often gives up.
_MAX_LOSSES: Final = 3


class Session:
    """A session on a server: `RingKVCache` over the wire, to be used by one thread at a time.

    What `RingKVCache` returns in process, a session returns, to the bit. Steps are sent again by themselves where that
    is safe; a step is never taken twice. Tokens of a layer are counted here, so `length` and `first` make no call.

    Attributes:
        id: The server's name for the session: who knows it may use the session.
        num_layers: Layers of the model.
        num_kv_heads: Heads of keys and values.
        head_dim: Elements of a query, a key and a value.
        capacity: Tokens that stay visible, sink tokens included.
        sink_tokens: First tokens that are never overwritten.
        dtype: Storage dtype by name.
        max_nbytes: Bytes that the server has reserved for it.
        kernel_seconds: Time that the server has computed for it; the rest of a call's time is the way there and back.
    """

    def __init__(
        self,
        client: Connection,
        session_id: str,
        state: pb.SessionState,
        *,
        stream: bool,
        max_payload: int,
        create: Create | None = None,
        replay: Replay | None = None,
    ) -> None:
        shape = state.shape
        self.num_layers = shape.num_layers
        self.num_kv_heads = shape.num_kv_heads
        self.head_dim = shape.head_dim
        self.capacity = shape.capacity
        self.sink_tokens = shape.sink_tokens
        self.dtype = shape.dtype
        self.kernel_seconds = 0.0
        self._client = client
        self._calls = client._calls
        self._stream = self._calls.stream() if stream else None
        self._max_payload = max_payload
        self._create = create
        self._replay = replay
        self._lost = False
        self._replaying = False
        self._name = secrets.token_hex(6)  # of this object: others may step the same session
        self._numbers = itertools.count()
        self._begin(session_id, state)
        client._sessions.add(self)

    def _begin(self, session_id: str, state: pb.SessionState) -> None:
        self.id = session_id
        self.max_nbytes = state.kv_bytes
        self._lengths = list(state.lengths)
        self._firsts = list(state.firsts)
        self._epoch = state.epoch
        self._unanswered: dict[int, tuple[str, bytes]] = {}  # by layer: a step's request id and digest
        self._unanswered_truncation: int | None = None

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self, timeout: float | None = None) -> None:
        """End the session on the server; one that is gone already is fine.

        Raises:
            ServiceError: The server could not be reached; it ends the session itself after its time to live.
        """
        self._let_go()
        with contextlib.suppress(SessionLostError):
            self._client._call("CloseSession", pb.CloseSessionRequest(session_id=self.id), timeout)

    def _let_go(self) -> None:
        self._client._sessions.discard(self)
        if self._stream:
            self._stream.close()

    # -- the sequence ------------------------------------------------------------------------------------------------

    def step(
        self,
        layer: int,
        q: Any,
        k: Any,
        v: Any,
        *,
        scale: float | None = None,
        softcap: float = 0.0,
        alibi_slopes: Any = None,
        sink_logits: Any = None,
        timeout: float | None = None,
    ) -> Any:
        """Append T tokens and attend with their queries, as `RingKVCache.step`.

        What does not fit into one message of the server's goes in several, of about equal size. Should one of them
        fail, those before it are in the cache: `length` says how many tokens are.

        Args:
            layer: 0 to num_layers - 1.
            q: (T, Hq, D).
            k: (T, Hkv, D).
            v: (T, Hkv, D).
            scale: As in `numbaflash.attention`, like everything that follows.
            softcap: Cap of the scores.
            alibi_slopes: (Hq,).
            sink_logits: (Hq,).
            timeout: Seconds for each message and its answer, all attempts together; None: the client's.

        Returns:
            (T, Hq, D), q's library and dtype.

        Raises:
            TypeError: Wrong dtypes.
            ValueError: Wrong shapes (a `BadTensorError` where the server found them), or no such layer.
            SessionLostError: The session has ended; the error says why.
            PositionMismatchError: Somebody else has stepped the session.
            ServiceError: The call failed otherwise. Calling again with the same arguments is safe.
        """
        tensors = {"q": q, "k": k, "v": v}
        return self._advance(layer, tensors, _Options.of(scale, softcap, alibi_slopes, sink_logits), timeout)

    # What the caller expects of the time a step takes changes nothing about the step.
    prefill = step
    decode = step

    def append(self, layer: int, k: Any, v: Any, *, timeout: float | None = None) -> None:
        """Append T tokens without attending, as `RingKVCache.append`.

        Args:
            layer: 0 to num_layers - 1.
            k: (T, Hkv, D).
            v: (T, Hkv, D).
            timeout: As in `step`.

        Raises:
            Exception: As `step`.
        """
        self._advance(layer, {"k": k, "v": v}, _Options.of(), timeout)

    def attend(
        self,
        layer: int,
        q: Any,
        *,
        scale: float | None = None,
        softcap: float = 0.0,
        alibi_slopes: Any = None,
        sink_logits: Any = None,
        timeout: float | None = None,
    ) -> Any:
        """Attend with the queries of the last T tokens, as `RingKVCache.attend`; T must fit one message.

        Args:
            layer: 0 to num_layers - 1.
            q: (T, Hq, D); T <= rollback + 1 once the ring has wrapped.
            scale: As in `step`, like everything that follows.
            softcap: Cap of the scores.
            alibi_slopes: (Hq,).
            sink_logits: (Hq,).
            timeout: Seconds.

        Returns:
            (T, Hq, D), q's library and dtype.

        Raises:
            Exception: As `step`.
        """
        return self._advance(layer, {"q": q}, _Options.of(scale, softcap, alibi_slopes, sink_logits), timeout)

    def length(self, layer: int) -> int:
        """Return how many tokens the layer has seen."""
        return self._lengths[self._checked(layer)]

    def first(self, layer: int) -> int:
        """Return the position of the layer's oldest visible token that is no sink; its length while there is none."""
        return self._firsts[self._checked(layer)]

    def truncate(self, length: int, *, timeout: float | None = None) -> None:
        """Take every layer back to `length` tokens, as `RingKVCache.truncate`.

        Should the call fail without an answer, it is made again before whatever is called next.

        Args:
            length: Tokens that are left in each layer.
            timeout: Seconds, all attempts together; None: the client's.

        Raises:
            TypeError: `length` is no int.
            ValueError: A layer is shorter, or its window would have holes; nothing has changed.
            SessionLostError: The session has ended; the error says why.
            ServiceError: The call failed otherwise. Calling again is safe.
        """
        length = int_in("length", length, 0)
        self._surviving(lambda: self._truncate(length, timeout))

    def _truncate(self, length: int, timeout: float | None) -> None:
        if self._unanswered_truncation not in (None, length):
            self._settle(timeout)
        request = pb.TruncateRequest(session_id=self.id, length=length, epoch=self._epoch)
        self._unanswered_truncation = length
        try:
            answer = wire.decode(pb.TruncateResponse, self._client._call("Truncate", request, timeout))
        except (ValueError, SessionLostError):
            self._unanswered_truncation = None
            raise
        self._unanswered_truncation = None
        self._unanswered.clear()
        self._epoch = answer.epoch
        self._lengths = [length] * self.num_layers
        self._firsts = [answer.first] * self.num_layers

    def fork(self, *, timeout: float | None = None) -> Session:
        """Return a child that holds the same tokens and goes its own way, as `RingKVCache.fork`.

        The server shares pages between the two until one of them writes; each has its memory reserved in full.

        Args:
            timeout: Seconds, all attempts together; None: the client's.

        Raises:
            KVBudgetError: The server has not that much memory left.
            SessionLostError: The session has ended; the error says why.
            ServiceError: The call failed otherwise.
        """

        def fork() -> pb.ForkResponse:
            self._settle(timeout)
            request = pb.ForkRequest(session_id=self.id)
            return wire.decode(pb.ForkResponse, self._client._call("Fork", request, timeout))

        answer = self._surviving(fork)
        stream = self._stream is not None
        return Session(self._client, answer.session_id, answer.state, stream=stream, max_payload=self._max_payload)

    def snapshot(self, name: str, *, timeout: float | None = None) -> int:
        """Write the session to a file of the server's, as `RingKVCache.save`; `Client.restore` reads it.

        Args:
            name: 1 to 128 letters, digits, '-', '_' and '.'; an earlier snapshot of that name is replaced.
            timeout: Seconds, all attempts together; None: the client's.

        Returns:
            Tokens that every layer holds in the snapshot.

        Raises:
            StorageError: The server cannot write it; an earlier one of that name is there as before.
            SessionLostError: The session has ended; the error says why.
            ServiceError: The call failed otherwise.
        """

        def snapshot() -> int:
            self._settle(timeout)
            request = pb.SnapshotRequest(session_id=self.id, name=name)
            return wire.decode(pb.SnapshotResponse, self._client._call("Snapshot", request, timeout)).usable_tokens

        return self._surviving(snapshot)

    def _settle(self, timeout: float | None) -> None:
        """Make a truncation that got no answer again: until it is known, no position is."""
        if self._unanswered_truncation is not None:
            self._truncate(self._unanswered_truncation, timeout)

    # -- losses ------------------------------------------------------------------------------------------------------

    def _surviving(self, call: Callable[[], T]) -> T:
        """Make a call; where it finds the session lost, make that anew, have it replayed, and make the call again."""
        if self._replay is None or self._replaying:
            return call()
        lengths, truncation = tuple(self._lengths), self._unanswered_truncation
        losses = 0
        while True:
            try:
                if self._lost:
                    self._renew(lengths)
                    self._unanswered_truncation = truncation
                return call()
            except SessionLostError:
                self._lost = True
                self._lengths = list(lengths)
                losses += 1
                if losses == _MAX_LOSSES:
                    raise

    def _renew(self, lengths: tuple[int, ...]) -> None:
        assert self._create
        assert self._replay
        session_id, state = self._create()
        self._replaying = True
        try:
            self._begin(session_id, state)
            self._replay(self, lengths)
            if tuple(self._lengths) != lengths:
                raise ValueError(f"replay must bring the layers to {lengths} tokens, got {tuple(self._lengths)}")
            self._lost = False
        except BaseException:
            self._lengths = list(lengths)
            with contextlib.suppress(ServiceError):
                self._client._call("CloseSession", pb.CloseSessionRequest(session_id=session_id))
            raise
        finally:
            self._replaying = False

    # -- messages ----------------------------------------------------------------------------------------------------

    def _checked(self, layer: int) -> int:
        return int_in("layer", layer, 0, self.num_layers - 1)

    def _advance(self, layer: int, tensors: dict[str, Any], options: _Options, timeout: float | None) -> Any:
        layer = self._checked(layer)
        arrays = {name: as_numpy(tensor, name) for name, tensor in tensors.items()}
        check_dtype(**arrays)
        for name, array in arrays.items():
            if array.ndim != 3:
                raise ValueError(f"{name} must have 3 axes (tokens, heads, head_dim), got shape {array.shape}")
        tokens = {name: array.shape[0] for name, array in arrays.items()}
        if min(tokens.values()) != max(tokens.values()):
            raise ValueError(f"{', '.join(tokens)} must have the same number of tokens, got {tokens}")
        q = arrays.get("q")
        out = None if q is None else np.empty(q.shape, q.dtype)
        pieces = self._pieces(arrays, options)
        if len(pieces) > 1 and len(arrays) == 1:
            raise ValueError(f"q must fit a message of {self._max_payload} bytes, got {arrays['q'].nbytes} bytes")

        def advance() -> None:
            for piece in pieces:
                part = arrays if len(pieces) == 1 else {name: array[piece] for name, array in arrays.items()}
                answer = self._exchange(layer, part, options, timeout)
                if out is not None:
                    out[piece] = answer["out"]

        self._surviving(advance)
        return None if out is None else like(tensors["q"], out)

    def _pieces(self, arrays: dict[str, NDArray[Any]], options: _Options) -> list[slice]:
        tokens = len(next(iter(arrays.values())))
        if not tokens:
            return []
        nbytes, room = sum([array.nbytes for array in arrays.values()]), self._max_payload
        if options.arrays:
            room -= sum([array.nbytes for array in options.arrays.values()])
        if nbytes <= room:
            return [slice(tokens)]
        token_bytes = nbytes // tokens
        if token_bytes > room:
            raise ValueError(f"a token has {token_bytes} bytes; the server takes {room} in one message")
        return cut(tokens, token_bytes, room)

    def _exchange(
        self, layer: int, arrays: dict[str, NDArray[Any]], options: _Options, timeout: float | None
    ) -> dict[str, NDArray[Any]]:
        """Send one message until it is answered; return the tensors of the answer, views of no alignment."""
        self._settle(timeout)
        tensors = {**arrays, **options.arrays}
        head = pb.StepRequest(session_id=self.id, layer=layer, position=self._lengths[layer], options=options.message)
        if self._epoch:
            head.options.epoch = self._epoch
        head.request_id = self._request_id(layer, head, tensors)
        request = wire.encode_request(head, tensors)
        method = "Decode" if len(next(iter(arrays.values()))) == 1 else "Prefill"

        def attempt(seconds: float) -> wire.Parts[pb.StepResponse]:
            stream = self._stream
            answer = stream.exchange(request, seconds) if stream else self._calls(method, request, seconds)
            parts = wire.decode_step(pb.StepResponse, answer)
            if parts.head.HasField("error"):
                raise from_status(status_pb2.Status.FromString(parts.head.error.SerializeToString()))
            if parts.head.request_id != head.request_id:
                raise ServiceError("the server answered another step", code=grpc.StatusCode.INTERNAL)
            return parts

        try:
            parts = self._client.retry.run(attempt, timeout or self._client.timeout)
        except BaseException:  # Ctrl-C among them
            self._unanswered[layer] = head.request_id, _digest(head, tensors)
            raise
        self._lengths[layer] = parts.head.position
        self._firsts[layer] = parts.head.first
        self.kernel_seconds += parts.head.kernel_ns / 1e9
        return wire.answer_layout(parts.form, len(parts.payload)).views(parts.payload)

    def _request_id(self, layer: int, head: pb.StepRequest, tensors: dict[str, NDArray[Any]]) -> str:
        """Name a step: as before where the caller sends the one again that got no answer, else anew."""
        unanswered = self._unanswered.pop(layer, None)
        if unanswered:
            request_id, digest = unanswered
            head.request_id = request_id
            if _digest(head, tensors) == digest:
                return request_id
        return f"{self._name}-{next(self._numbers)}"


def cut(tokens: int, token_bytes: int, room: int) -> list[slice]:
    """Cut tokens into as few pieces as fit a message each.

    The pieces are of equal size within one token: a small remainder would be computed by the kernel for few queries,
    whose last bits differ from a prefill's.

    Args:
        tokens: How many there are, at least 1.
        token_bytes: Bytes of each.
        room: Bytes of a message, at least those of a token.
    """
    pieces = -(-tokens // (room // max(token_bytes, 1)))
    return [slice(tokens * i // pieces, tokens * (i + 1) // pieces) for i in range(pieces)]


@dataclass(frozen=True, eq=False)
class _Options:
    """Options of a step: numbers in the head, arrays among the tensors."""

    message: pb.StepOptions | None
    arrays: dict[str, NDArray[np.float32]]

    @classmethod
    def of(
        cls, scale: float | None = None, softcap: float = 0.0, alibi_slopes: Any = None, sink_logits: Any = None
    ) -> _Options:
        given = {"alibi_slopes": alibi_slopes, "sink_logits": sink_logits}
        return cls(
            pb.StepOptions(scale=scale, softcap=softcap) if scale is not None or softcap else None,
            {name: _float32(name, value) for name, value in given.items() if value is not None},
        )


def _float32(name: str, value: Any) -> NDArray[np.float32]:
    array = np.asarray(value) if isinstance(value, (list, tuple)) else as_numpy(value, name)
    return array.astype(np.float32)


def _digest(head: pb.StepRequest, tensors: dict[str, NDArray[Any]]) -> bytes:
    return hashlib.blake2b(wire.encode_step(head, tensors), digest_size=16).digest()

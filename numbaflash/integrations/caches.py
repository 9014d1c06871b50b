"""Caches for `generate()` that keep keys and values in numbaflash's rings: `RingCache` here, `ServiceCache` remote.

A model hands new keys and values to its cache, and what it gets back to the attention function. These caches give back
a ticket, and the attention function takes the step (append and attend) with it. So the ring changes only when the
attention succeeds, and no model ever gets keys and values that it would attend to in another way.
"""

from __future__ import annotations

import abc
import copy
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Self

import torch
from transformers import Cache

from ..cache.arguments import int_in
from ..cache.batch import attention_batch
from ..cache.ring import RingKVCache

__all__ = ["RingCache", "ServiceCache", "Ticket"]


@dataclass(frozen=True)
class _Shape:
    """Of the rings that a model needs."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: str
    capacity: int


class Ticket(torch.Tensor):
    """Stands for keys (or values) in a ring; everything but numbaflash's attention that touches it raises.

    Attributes:
        cache: The cache that holds the ring.
        layer: Layer of the model.
        new_keys: The step's, (batch, kv heads, tokens, head_dim).
        new_values: Likewise.
        used: Whether attention has taken a step with it.
    """

    cache: StepCache
    layer: int
    used: bool
    new_keys: torch.Tensor
    new_values: torch.Tensor

    @classmethod
    def __torch_function__(
        cls, _func: Any, _types: Sequence[type], _args: Sequence[Any] = (), _kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Raise: some other code takes the ticket for keys or values."""
        raise RuntimeError(
            'a RingCache or ServiceCache needs a model with attn_implementation="numbaflash" '
            "(numbaflash.integrations.transformers.register() makes it known)"
        )


class StepCache(Cache, abc.ABC):
    """A ring for each sequence of the batch, made at the first step, when the model's shape is known.

    All sequences and layers move together, or none does. A call of the model that fails (a step, another module,
    Ctrl-C) has moved none, unless it failed behind its last attention: then all have. `get_seq_length` says which, and
    `crop(before - get_seq_length())` brings the cache to where it was before; then the call can be made again, or
    `generate` be called with all tokens so far. What a failed call has left in lower layers and in other sequences is
    taken back by the next use of the cache. That raises ValueError where so much cannot be taken back, and `reset` is
    all that is left then; likewise where a server has lost a session.
    """

    is_compileable = False
    is_croppable = True

    def __init__(self, capacity: int | None, sink_tokens: int, dtype: str | None, rollback: int) -> None:
        super().__init__(layers=[])
        self._capacity = capacity
        self._sink_tokens = sink_tokens
        self._rollback = rollback
        self._dtype = dtype
        self._forget()

    def _forget(self) -> None:
        self._rings: list[Any] = []
        self._seen: list[int] = []  # tokens of each layer, padding included
        self._room = 0  # tokens of a sequence that are all there still
        self._longest = 0  # the most that a layer has seen: what fell out of the rings then does not come back
        self._padded = 0  # tokens seen up to the last that is padding for some sequence
        self._back: list[int] = []  # lengths that the rings must be taken back to before they are next used

    @abc.abstractmethod
    def _make(self, shape: _Shape, batch: int) -> list[Any]:
        """Make an empty ring for each sequence."""

    @abc.abstractmethod
    def _select(self, indices: list[int]) -> list[Any]:
        """Return the rings at `indices`, in that order, such that each goes its own way from now on."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *_args: Any, **_kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return tickets for the attention function; nothing is stored before it has attended."""
        ticket: Ticket = torch.Tensor._make_subclass(Ticket, key_states.detach())
        ticket.cache, ticket.layer, ticket.new_keys, ticket.new_values = self, layer_idx, key_states, value_states
        ticket.used = False
        return ticket, ticket

    def step(
        self,
        ticket: Ticket,
        query: torch.Tensor,
        valid: torch.Tensor | None,
        config: Any,
        window: int | None,
        **options: Any,
    ) -> torch.Tensor:
        """Append a step's keys and values and attend with its queries.

        Args:
            ticket: From `update`.
            query: (batch, q heads, tokens, head_dim).
            valid: (batch, tokens) bool: the tokens that are no padding; the rings never see the others. None: all.
            config: The model's.
            window: The layer's own sliding window; None for none.
            options: Of `RingKVCache.step`.

        Returns:
            (batch, tokens, q heads, head_dim); zeros for padding.

        Raises:
            ValueError: The step does not fit the cache; or an earlier call of the model failed, and cannot be taken
                back.
            Exception: As `RingKVCache.step` or `Session.step`.
        """
        if ticket.used:
            raise ValueError("a ring is of one layer, and this model's layers share keys: use another cache")
        ticket.used = True
        layer = ticket.layer
        if self._back or (self._seen and self._seen[layer] > self.get_seq_length()):  # it was in the last call already
            self._settle()
        q, k, v = (tensor.detach().transpose(1, 2) for tensor in (query, ticket.new_keys, ticket.new_values))
        capacity = self._rings_capacity(config)
        if window is not None and window < capacity:
            raise ValueError(f"capacity must be at most the model's sliding window {window}, got {capacity}")
        if not self._rings:
            shape = self._shape(k, config)
            self._rings, self._seen = self._make(shape, len(k)), [0] * shape.num_layers
            self._room = shape.capacity + self._rollback
        if len(self._rings) != len(k):
            raise ValueError(f"the cache holds {len(self._rings)} sequences, got a batch of {len(k)}")
        before, seen = [ring.length(layer) for ring in self._rings], self._seen[layer]
        self._longest = max(self._longest, seen + k.shape[1])
        try:
            if valid is None:
                out = self._step_all(layer, q, k, v, options)
            else:
                padded = (~valid.all(dim=0)).nonzero()
                if len(padded):
                    self._padded = max(self._padded, seen + int(padded[-1]) + 1)
                out = torch.zeros_like(q)
                for b, ring in enumerate(self._rings):
                    if valid[b].any():
                        taken = valid[b]
                        out[b, taken] = ring.step(layer, q[b, taken], k[b, taken], v[b, taken], **options)
            self._seen[layer] = seen + k.shape[1]
        except BaseException:
            self._go_back(before, seen)
            raise
        return out

    def _go_back(self, lengths: list[int], seen: int) -> None:
        """Have the rings taken back to those lengths, and all layers to so many tokens with padding.

        The rings not at once but before they are next used: a service that has just failed may fail that as well.
        """
        self._back, self._seen = lengths, [seen] * len(self._seen)
        self._padded = min(self._padded, seen)

    def _go_back_behind_a_failure(self) -> None:
        """Go back to what all layers hold, where a call of the model failed between two of them."""
        if max(self._seen, default=0) > self.get_seq_length():
            layers = range(len(self._seen))
            self._go_back([min(map(ring.length, layers)) for ring in self._rings], self.get_seq_length())

    def _settle(self) -> None:
        """Take the rings back to where they must be; should that fail, the next call does it."""
        self._go_back_behind_a_failure()
        if self._back and not any(self._back):
            self.reset()  # a first prompt may be longer than what can be truncated
        try:
            for ring, length in zip(self._rings, self._back, strict=False):  # of all or of none
                ring.truncate(length)
        except ValueError as error:
            raise ValueError(
                f"a call of the model failed and cannot be taken back: reset() the cache ({error})"
            ) from error
        self._back = []

    def _step_all(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: dict[str, Any]
    ) -> torch.Tensor:
        steps = [ring.step(layer, q[b], k[b], v[b], **options) for b, ring in enumerate(self._rings)]
        return torch.stack(steps)

    def _shape(self, k: torch.Tensor, config: Any) -> _Shape:
        text = config.get_text_config(decoder=True)
        return _Shape(
            num_layers=text.num_hidden_layers,
            num_kv_heads=k.shape[2],
            head_dim=k.shape[3],
            dtype=self._dtype or str(k.dtype).removeprefix("torch."),
            capacity=self._rings_capacity(config),
        )

    def _rings_capacity(self, config: Any) -> int:
        if self._capacity is not None:
            return self._capacity
        return int(config.get_text_config().max_position_embeddings)

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the newest tokens of every sequence, or of none.

        All that can forbid it is looked at first. A service is told before the next step, not here, and again before
        the one after that, should it fail to answer then: no failure leaves some sequences cropped and others not.

        Args:
            tokens_to_remove: 0, or minus the number of tokens.

        Raises:
            TypeError: It is no int.
            ValueError: There are fewer tokens, some but not all of the padding would be taken back, or more than
                `rollback` tokens would leave holes in the window; nothing has changed.
        """
        self._go_back_behind_a_failure()
        seen = self.get_seq_length()
        floor = 0 if tokens_to_remove == -seen else self._padded
        removed = int_in("tokens_to_remove", tokens_to_remove, floor - seen, 0)
        if not removed:
            return
        lengths = self._back or [ring.length(0) for ring in self._rings]
        left = [max(length + removed, 0) for length in lengths]
        before = self._longest - seen  # removed before
        if any(left) and before - removed > self._rollback and max(lengths) + before > self._room:
            raise ValueError(
                f"tokens_to_remove must leave the window whole: at most {self._rollback} tokens (rollback) below the "
                f"{self._longest} that the cache has seen; got {removed} of {seen}"
            )
        self._go_back(left, seen + removed)

    def __deepcopy__(self, _memo: dict[int, Any]) -> Self:
        """Return a cache that goes on from the same tokens on its own, such as those of a prompt that many share."""
        self._settle()
        twin = copy.copy(self)
        twin._rings, twin._seen = [ring.fork() for ring in self._rings], list(self._seen)
        return twin

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Let each beam go on from the one that it came from; pages are shared until they differ."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence."""
        self._settle()
        self._rings = self._select([index for index in range(len(self._rings)) for _ in range(repeats)])

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the sequences at `indices`, in that order."""
        self._settle()
        self._rings = self._select(indices.tolist())

    def get_seq_length(self, layer_idx: int = 0) -> int:  # noqa: ARG002  # transformers asks with it
        """Return the tokens that all layers have seen, whichever is asked for, padding included."""
        return min(self._seen, default=0)

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Return the length and offset of a mask over all tokens seen; the ring bounds what of it counts."""
        return self.get_seq_length(layer_idx) + query_length, 0

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Return the position of the next token."""
        return self.get_seq_length(layer_idx)

    def get_max_length(self, layer_idx: int | None = None) -> int:  # noqa: ARG002  # transformers asks with it
        """Return -1: a sequence may grow without end, the ring forgets."""
        return -1

    def reset(self) -> None:
        """Forget all sequences."""
        self._forget()

    @property
    def is_linear(self) -> list[bool]:
        """Of each layer, False; `generate` asks, and leaves out what it finds in the cache already."""
        return [False] * len(self._seen)

    @property
    def batch_size(self) -> int:
        """Sequences, -1 before the first step."""
        return len(self._rings) or -1

    @property
    def is_initialized(self) -> bool:
        """Whether a step has been taken."""
        return bool(self._rings)


class RingCache(StepCache):
    """A bounded window and sink tokens for `generate(cache=...)`: `RingKVCache` for each sequence of the batch.

    The model must have been loaded with `attn_implementation="numbaflash"`. Generation equals that of the same model
    with a sliding window of `capacity` tokens, beside the sink tokens (StreamingLLM, section 3.2); positions count on.

    Args:
        capacity: Tokens that stay visible, sink tokens included.
        sink_tokens: First tokens that stay visible.
        dtype: Storage, "float32", "float16" or "bfloat16"; None is the model's.
        rollback: Newest tokens that `crop` can take back (speculative decoding).
    """

    def __init__(self, capacity: int, *, sink_tokens: int = 0, dtype: str | None = None, rollback: int = 64) -> None:
        super().__init__(capacity, sink_tokens, dtype, rollback)

    def _make(self, shape: _Shape, batch: int) -> list[Any]:
        return [
            RingKVCache(
                shape.num_layers,
                shape.num_kv_heads,
                shape.head_dim,
                capacity=shape.capacity,
                dtype=shape.dtype,
                sink_tokens=self._sink_tokens,
                rollback=self._rollback,
            )
            for _ in range(batch)
        ]

    def _step_all(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: dict[str, Any]
    ) -> torch.Tensor:
        out: torch.Tensor = attention_batch(self._rings, layer, q, k, v, **options)
        return out

    def _select(self, indices: list[int]) -> list[Any]:
        return [self._rings[index].fork() for index in indices]

    @property
    def nbytes(self) -> int:
        """Bytes of the pages in use."""
        return sum(ring.nbytes for ring in self._rings)


class ServiceCache(StepCache):
    """The same, in a numbaflash service: the model's attention and its KV memory live there, a session a sequence.

    Beams are forks: the server shares their pages, and reserves memory for each of them in full.

    Args:
        client: `numbaflash_service.Client`.
        capacity: Tokens that stay visible, sink tokens included; None is the model's `max_position_embeddings`.
        sink_tokens: First tokens that stay visible.
        dtype: Storage, "float32", "float16" or "bfloat16"; None is the model's.
        rollback: Newest tokens that `crop` can take back (speculative decoding).
    """

    def __init__(
        self,
        client: Any,
        *,
        capacity: int | None = None,
        sink_tokens: int = 0,
        dtype: str | None = None,
        rollback: int = 64,
    ) -> None:
        super().__init__(capacity, sink_tokens, dtype, rollback)
        self._client = client

    def _make(self, shape: _Shape, batch: int) -> list[Any]:
        with ExitStack() as opened:  # what is open when one of them is refused is closed
            sessions = [
                opened.enter_context(
                    self._client.create_session(
                        shape.num_layers,
                        shape.num_kv_heads,
                        shape.head_dim,
                        capacity=shape.capacity,
                        dtype=shape.dtype,
                        sink_tokens=self._sink_tokens,
                        rollback=self._rollback,
                    )
                )
                for _ in range(batch)
            ]
            opened.pop_all()
        return sessions

    def reset(self) -> None:
        """Forget all sequences, and end their sessions."""
        self.close()
        super().reset()

    def close(self) -> None:
        """End the sessions; a client that is closed does so, too."""
        for session in self._rings:
            session.close()
        self._forget()

    def _select(self, indices: list[int]) -> list[Any]:
        # First what is given up, then what is forked: the server reserves memory for each session in full.
        left = [session if index in indices else session.close() for index, session in enumerate(self._rings)]
        self._rings = [session for session in left if session]
        chosen: list[Any] = []
        for index in indices:
            session = left[index]
            chosen.append(session.fork() if session in chosen else session)
            self._rings = chosen + [other for other in left if other and other not in chosen]
        return chosen

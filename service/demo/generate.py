"""From a prompt to new tokens, one at a time, with the time that each part took."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from time import perf_counter

import numpy as np

from .model import Attention, Llama
from .quantized import Array


@dataclass(frozen=True)
class Generation:
    """What came out, and what it cost.

    Attributes:
        new_ids: generated tokens, without the one that ended the text.
        finish_reason: "stop" where the model ended the text, "length" where `max_new_tokens` did.
        prefill_s: seconds from the prompt to the logits after it.
        decode_steps: tokens that went through the model one by one.
        decode_s: seconds of all decode steps.
        decode_attention_s: the part of `decode_s` that was spent waiting for attention.
    """

    new_ids: list[int]
    finish_reason: str
    prefill_s: float
    decode_steps: int
    decode_s: float
    decode_attention_s: float

    @property
    def decode_tokens_per_s(self) -> float | None:
        """Tokens per second of the decode steps; None where there was none."""
        return self.decode_steps / self.decode_s if self.decode_steps else None

    @property
    def attention_share(self) -> float | None:
        """Part of a decode step that attention takes, its round trips included; None where there was none."""
        return self.decode_attention_s / self.decode_s if self.decode_steps else None


def generate(
    model: Llama,
    attention: Attention,
    prompt_ids: list[int],
    *,
    max_new_tokens: int,
    stop_ids: Collection[int],
    temperature: float = 0.0,
    on_token: Callable[[int], None] = lambda _: None,
) -> Generation:
    """Continue a prompt.

    Args:
        model: computes everything but attention.
        attention: an empty KV cache of the model's shape.
        prompt_ids: at least one token.
        max_new_tokens: at least 1.
        stop_ids: tokens that end the text.
        temperature: 0 takes the likeliest token; else tokens are drawn from softmax(logits / temperature).
        on_token: is called with each new token at once.
    """
    clock = _TimedAttention(attention)
    random = np.random.default_rng()
    start = perf_counter()
    logits = model.forward(prompt_ids, 0, clock)
    prefill_s = perf_counter() - start

    new_ids: list[int] = []
    finish_reason = "length"
    clock.seconds = decode_s = 0.0
    decode_steps = 0
    while True:
        token = choose(logits, temperature, random)
        if token in stop_ids:
            finish_reason = "stop"
            break
        new_ids.append(token)
        on_token(token)
        if len(new_ids) == max_new_tokens:
            break
        start = perf_counter()
        logits = model.forward([token], len(prompt_ids) + decode_steps, clock)
        decode_s += perf_counter() - start
        decode_steps += 1
    return Generation(new_ids, finish_reason, prefill_s, decode_steps, decode_s, clock.seconds)


def choose(logits: Array, temperature: float, random: np.random.Generator) -> int:
    """The likeliest token, or one drawn at `temperature`."""
    if temperature == 0:
        return int(logits.argmax())
    # The Gumbel-max trick: the largest of logits / temperature plus Gumbel noise is a draw from their softmax.
    return int((logits / temperature + random.gumbel(size=logits.shape)).argmax())


class _TimedAttention:
    """Another attention, and the seconds spent in it."""

    def __init__(self, inner: Attention) -> None:
        self._inner = inner
        self.seconds = 0.0

    def step(self, layer: int, q: Array, k: Array, v: Array) -> Array:
        start = perf_counter()
        out = self._inner.step(layer, q, k, v)
        self.seconds += perf_counter() - start
        return out

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from numbaflash_service.demo.generate import choose, generate


class Scripted:
    """A model that wants to say given tokens, and remembers what it was fed."""

    def __init__(self, *tokens: int) -> None:
        self._tokens: Iterator[int] = iter(tokens)
        self.fed: list[tuple[list[int], int]] = []

    def forward(self, ids: list[int], position: int, attention: Any) -> Any:
        attention.step(0, None, None, None)
        self.fed.append((ids, position))
        return np.eye(10, dtype=np.float32)[next(self._tokens)]


class NoAttention:
    def step(self, layer: int, q: Any, k: Any, v: Any) -> Any: ...


def run(model: Scripted, count: int, **options: Any) -> Any:
    return generate(model, NoAttention(), [7, 7, 7], max_new_tokens=count, stop_ids={9}, **options)  # type: ignore[arg-type]


def test_ends_at_a_stop_token_and_leaves_it_out() -> None:
    got = run(Scripted(1, 2, 9), 8)
    assert (got.new_ids, got.finish_reason, got.decode_steps) == ([1, 2], "stop", 2)


def test_ends_after_max_new_tokens_without_running_the_last_one() -> None:
    model = Scripted(1, 2, 3)
    got = run(model, 3)
    assert (got.new_ids, got.finish_reason) == ([1, 2, 3], "length")
    assert model.fed == [([7, 7, 7], 0), ([1], 3), ([2], 4)]


def test_a_single_token_has_no_decode_rate() -> None:
    got = run(Scripted(1), 1)
    assert got.decode_tokens_per_s is None
    assert got.attention_share is None


def test_attention_is_a_part_of_the_decode_time() -> None:
    got = run(Scripted(1, 2, 3), 3)
    assert 0 < got.decode_attention_s < got.decode_s
    assert got.attention_share == got.decode_attention_s / got.decode_s


def test_tokens_are_told_as_they_come() -> None:
    told: list[int] = []
    run(Scripted(4, 5, 9), 8, on_token=told.append)
    assert told == [4, 5]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_are_drawn_from_the_softmax_at_the_temperature(temperature: float) -> None:
    logits = np.log(np.array([0.6, 0.3, 0.1], dtype=np.float32))
    random, draws = np.random.default_rng(0), 20_000
    counts = np.bincount([choose(logits, temperature, random) for _ in range(draws)], minlength=3)
    expected = np.exp(logits / temperature) / np.exp(logits / temperature).sum()
    np.testing.assert_allclose(counts / draws, expected, atol=0.015)  # four standard deviations

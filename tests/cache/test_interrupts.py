"""Ctrl-C at any line of a cache's code: the step was taken or was not, and a fork never notices."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
from oracle import random_tokens

import numbaflash

CODE = str(Path(numbaflash.__file__).parent / "cache")


def breaks_off(call: Callable[[], object], line: int, within: tuple[str, ...] = ()) -> bool:
    """Press Ctrl-C at the n-th line of the cache's code that a call comes to; say whether it came so far.

    Args:
        call: Made once.
        line: The n-th.
        within: Functions whose lines count; none: all.
    """
    lines = 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal lines
        if not frame.f_code.co_filename.startswith(CODE) or (within and frame.f_code.co_name not in within):
            return None
        if event == "line":
            lines += 1
            if lines == line:
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False


def lengths_after_ctrl_c(
    fresh: Callable[[], numbaflash.RingKVCache], step: list[Any], next_step: list[Any], within: tuple[str, ...] = ()
) -> list[int]:
    """Break a step off at each of its lines in turn, and see that its cache goes on as with it or as without it.

    Args:
        fresh: Makes a cache for each turn.
        step: q, k and v of the step.
        next_step: Of the one behind it.
        within: As in `breaks_off`.

    Returns:
        The cache's length after each turn.
    """
    taken = fresh()
    before = taken.length(0)
    without = taken.fork().step(0, *next_step)
    taken.step(0, *step)
    with_it = taken.step(0, *next_step)
    lengths: list[int] = []
    while True:
        cache = fresh()
        fork = cache.fork()
        if not breaks_off(partial(cache.step, 0, *step), len(lengths) + 1, within):
            return lengths
        lengths.append(cache.length(0))
        expected = without if lengths[-1] == before else with_it
        np.testing.assert_array_equal(cache.step(0, *next_step), expected)
        np.testing.assert_array_equal(fork.step(0, *next_step), without)


def steps(*tokens: int) -> list[list[Any]]:
    rng = np.random.default_rng(0)
    return [[random_tokens(rng, count, heads, 32) for heads in (4, 2, 2)] for count in tokens]


def cache_holding(tokens: list[Any], dtype: str, backend: str) -> numbaflash.RingKVCache:
    cache = numbaflash.RingKVCache(
        1, 2, 32, capacity=24, page_size=8, rollback=4, dtype=dtype, sink_tokens=3, backend=backend
    )
    cache.step(0, *tokens)
    return cache


@pytest.mark.parametrize("dtype", ["float16", "int4"])
@pytest.mark.parametrize("tokens", [1, 20])
def test_a_step_broken_off_anywhere_was_taken_whole_or_not_at_all(dtype: str, tokens: int) -> None:
    held, step, next_step = steps(42, tokens, 30)  # the 43rd token fills a page, with 3 sink tokens
    lengths = lengths_after_ctrl_c(partial(cache_holding, held, dtype, "cpu"), step, next_step)
    assert len(lengths) >= 100
    assert set(lengths) == {42, 42 + tokens}


@pytest.mark.parametrize("dtype", ["float16", "int4"])
def test_a_step_on_a_device_broken_off_while_it_is_committed_was_taken_whole_or_not_at_all(dtype: str) -> None:
    held, step, next_step = steps(42, 1, 3)
    root = cache_holding(held, dtype, "emulated")
    lengths = lengths_after_ctrl_c(root.fork, step, next_step, ("commit", "release", "__setitem__"))
    assert len(lengths) >= 10
    assert set(lengths) == {42, 43}

"""Ctrl-C at any line of a cache's code: the step was taken or was not, and a fork never notices."""

from __future__ import annotations

import sys
from collections.abc import Callable
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


@pytest.mark.parametrize("dtype", ["float16", "int4"])
@pytest.mark.parametrize("tokens", [1, 20])
def test_a_step_broken_off_anywhere_was_taken_whole_or_not_at_all(dtype: str, tokens: int) -> None:
    rng = np.random.default_rng(0)
    held, step, next_step = (
        [random_tokens(rng, count, heads, 32) for heads in (4, 2, 2)] for count in (42, tokens, 30)
    )  # the 43rd token fills a page, with 3 sink tokens

    def cache_of() -> numbaflash.RingKVCache:
        cache = numbaflash.RingKVCache(
            1, 2, 32, capacity=24, page_size=8, rollback=4, dtype=dtype, sink_tokens=3, backend="cpu"
        )
        cache.step(0, *held)
        return cache

    taken = cache_of()
    without = taken.fork().step(0, *next_step)
    taken.step(0, *step)
    with_it = taken.step(0, *next_step)
    line, lengths = 0, set()
    while True:
        line += 1
        cache = cache_of()
        fork = cache.fork()
        if not breaks_off(lambda: cache.step(0, *step), line):  # noqa: B023  # called at once
            break
        length = cache.length(0)
        lengths.add(length)
        np.testing.assert_array_equal(cache.step(0, *next_step), without if length == 42 else with_it)
        np.testing.assert_array_equal(fork.step(0, *next_step), without)
    assert line > 100
    assert lengths == {42, 42 + tokens}


@pytest.mark.parametrize("dtype", ["float16", "int4"])
def test_a_step_on_a_device_broken_off_while_it_is_committed_was_taken_whole_or_not_at_all(dtype: str) -> None:
    rng = np.random.default_rng(0)
    held, step, next_step = ([random_tokens(rng, count, heads, 32) for heads in (4, 2, 2)] for count in (42, 1, 3))
    root = numbaflash.RingKVCache(
        1, 2, 32, capacity=24, page_size=8, rollback=4, dtype=dtype, sink_tokens=3, backend="emulated"
    )
    root.step(0, *held)
    taken = root.fork()
    without = taken.fork().step(0, *next_step)
    taken.step(0, *step)
    with_it = taken.step(0, *next_step)
    line, lengths = 0, set()
    while True:
        line += 1
        cache = root.fork()
        if not breaks_off(lambda: cache.step(0, *step), line, ("commit", "release", "__setitem__")):  # noqa: B023
            break
        lengths.add(cache.length(0))
        np.testing.assert_array_equal(cache.step(0, *next_step), without if cache.length(0) == 45 else with_it)
        np.testing.assert_array_equal(root.fork().step(0, *next_step), without)
    assert line > 10
    assert lengths == {42, 43}

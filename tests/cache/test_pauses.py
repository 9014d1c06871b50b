"""Steps cut into parts: other caches are stepped between them, and all bits stay what they are in one piece."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from numbaflash import RingKVCache
from numbaflash.cpu import pausing, solve


@pytest.fixture(scope="module", autouse=True)
def short_parts() -> Iterator[None]:
    """Pause after every item, as after the 20 ms of a part in real life."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(solve, "_PART_FMAS", 1)
        yield


def arrays(tokens: int, q_heads: int = 4, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng([seed, tokens])
    return [rng.standard_normal((tokens, heads, 32)).astype(np.float32) for heads in (q_heads, 2, 2)]


@settings(max_examples=40)
@given(
    dtype=st.sampled_from(["float32", "float16", "int8", "int4"]),
    page_size=st.sampled_from([8, 64]),
    sink_tokens=st.integers(0, 20),
    q_heads=st.sampled_from([2, 8]),
    before=st.integers(0, 300),
    tokens=st.integers(9, 300),
    not_finite=st.booleans(),
)
def test_a_step_in_parts_gives_the_bits_of_one_in_one_piece(
    dtype: str, page_size: int, sink_tokens: int, q_heads: int, before: int, tokens: int, *, not_finite: bool
) -> None:
    shape: dict[str, Any] = {"capacity": 150, "sink_tokens": sink_tokens, "dtype": dtype, "page_size": page_size}
    cut, whole, other = (RingKVCache(1, 2, 32, **shape) for _ in range(3))
    for cache in (cut, whole):
        cache.append(0, *arrays(before)[1:])
    q, k, v = arrays(tokens, q_heads, seed=1)
    q[tokens // 2, 0, 0] = np.nan if not_finite else 0
    pauses: list[int] = []

    def pause() -> None:
        assert cut.length(0) == before  # nothing of the step is to be seen
        other.step(0, *arrays(20, seed=2))  # and is not cut itself
        pauses.append(other.length(0))

    with pausing(pause):
        out = cut.step(0, q, k, v, alibi_slopes=np.linspace(0, 1, q_heads, dtype=np.float32))
    expected = whole.step(0, q, k, v, alibi_slopes=np.linspace(0, 1, q_heads, dtype=np.float32))
    assert out.tobytes() == expected.tobytes()
    assert pauses == [20 * (i + 1) for i in range(len(pauses))]
    last = arrays(1, q_heads, seed=3)
    assert cut.step(0, *last).tobytes() == whole.step(0, *last).tobytes()


def test_many_queries_are_cut_and_a_lone_thread_is_asked_after_each_item(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(solve, "thread_count", lambda: 1)
    cache, pauses = RingKVCache(1, 2, 32, capacity=700), []
    with pausing(lambda: pauses.append(1)):
        cache.step(0, *arrays(600))
    assert len(pauses) == 2 * -(-600 * 2 // solve.PANEL_ROWS) - 1  # KV heads, panels of a group's rows


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_what_a_pause_raises_ends_the_step_and_leaves_the_cache_as_it_was(dtype: str) -> None:
    cache, twin = (RingKVCache(1, 2, 32, capacity=150, dtype=dtype) for _ in range(2))
    for one in (cache, twin):
        one.append(0, *arrays(100)[1:])
    used = [pool.nbytes for pool in cache.pools]

    def refuse() -> None:
        raise InterruptedError("enough")

    with pausing(refuse), pytest.raises(InterruptedError):
        cache.step(0, *arrays(200))
    assert [pool.nbytes for pool in cache.pools] == used
    assert cache.step(0, *arrays(200)).tobytes() == twin.step(0, *arrays(200)).tobytes()

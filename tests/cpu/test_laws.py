"""What must not change the bits of a query row, and what must not spread to another row."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from numbaflash import cpu, problem, reference
from numbaflash.cpu import KVRuns, Visibility
from numbaflash.cpu import solve as entry
from numbaflash.problem import Scoring

from .inputs import BFLOAT16, FLOAT16, FLOAT32, assert_close, qkv, solve

LEAST_PREFILL = cpu.SPLIT_KV_MAX_TOKENS + 1


def scoring_for(q: NDArray[Any], **options: Any) -> Scoring:
    return problem.describe_scoring(batch=q.shape[0], q_heads=q.shape[2], head_dim=q.shape[3], **options)


def runs_of(pieces: list[tuple[NDArray[Any], NDArray[Any], int]]) -> KVRuns:
    """One sequence whose runs are (keys (T, H, D), values (T, H, Dv), position)."""
    k, v, _ = pieces[0]
    table = np.array([cpu.contiguous_run(*piece) for piece in pieces])
    return KVRuns(table, np.array([0, len(table)]), k.dtype, k.shape[1], k.shape[2], v.shape[2])


def causal_step(start: int, left: int = cpu.UNBOUNDED, sinks: int = 0) -> Visibility:
    return Visibility(*(np.array([value]) for value in (start, left, 0, sinks)))


def paged(k: NDArray[Any], v: NDArray[Any], size: int, seed: int) -> list[tuple[NDArray[Any], NDArray[Any], int]]:
    """Tokens in pages of (heads, page, head_dim), scattered in memory."""
    pieces = []
    for at in range(0, len(k), size):
        page = [np.ascontiguousarray(x[at : at + size].transpose(1, 0, 2)).transpose(1, 0, 2) for x in (k, v)]
        pieces.append((page[0], page[1], at))
    np.random.default_rng(seed).shuffle(pieces)
    return sorted(pieces, key=lambda piece: piece[2])


@settings(max_examples=60)
@given(data=st.data())
def test_a_row_has_the_same_bits_however_the_sequence_is_cut_into_steps(data: st.DataObject) -> None:
    draw = data.draw
    group, kv_heads = draw(st.integers(1, 4)), draw(st.integers(1, 2))
    steps = draw(st.lists(st.integers(LEAST_PREFILL, 300), min_size=2, max_size=5))
    dtype = draw(st.sampled_from([FLOAT32, FLOAT16, BFLOAT16]))
    q, k, v = qkv(1, sum(steps), sum(steps), (group * kv_heads, kv_heads), (24, 17), dtype)
    left, sinks = draw(st.just(cpu.UNBOUNDED) | st.integers(0, 200)), draw(st.just(0) | st.integers(0, 150))
    scoring = scoring_for(
        q,
        softcap=draw(st.sampled_from([0.0, 3.0])),
        alibi_slopes=draw(st.none() | st.just(np.linspace(0.1, 1, group * kv_heads))),
    )
    assert_same_bits_in_steps(q, k, v, steps, left, sinks, draw(st.sampled_from([8, 16, 64, 100])), scoring)


@pytest.mark.parametrize("left", [50, 100, 127, 128, 300])
def test_a_window_that_moves_on_does_not_move_the_tiles(left: int) -> None:
    q, k, v = qkv(1, 700, 700, (2, 2), (24, 17))
    assert_same_bits_in_steps(q, k, v, [100, 150, 37, 213, 200], left, 0, 16, scoring_for(q))


def assert_same_bits_in_steps(
    q: NDArray[Any],
    k: NDArray[Any],
    v: NDArray[Any],
    steps: list[int],
    left: int,
    sinks: int,
    page_size: int,
    scoring: Scoring,
) -> None:
    whole, whole_lse = cpu.attend_runs(q, runs_of([(k[0], v[0], 0)]), causal_step(0, left, sinks), scoring)
    start = 0
    for step in steps:
        end = start + step
        history = paged(k[0, :start], v[0, :start], page_size, seed=step)
        if left < cpu.UNBOUNDED:  # what nobody will see again is gone
            history = [piece for piece in history if piece[2] + len(piece[0]) > start - left or piece[2] < sinks]
        runs = runs_of([*history, (k[0, start:end], v[0, start:end], start)])
        out, lse = cpu.attend_runs(q[:, start:end], runs, causal_step(start, left, sinks), scoring)
        np.testing.assert_array_equal(out, whole[:, start:end])
        np.testing.assert_array_equal(lse, whole_lse[:, :, start:end])
        start = end


@pytest.mark.parametrize("q_tokens", [3, 40])
def test_a_row_has_the_same_bits_whatever_stands_beside_it(q_tokens: int) -> None:
    q, k, v = qkv(3, q_tokens, 700, (6, 2), (32, 32))
    whole, whole_lse = solve(q, k, v, causal=True, kv_lengths=[700, 512, 40])
    for b, length in enumerate((700, 512, 40)):
        alone, alone_lse = solve(q[b : b + 1], k[b : b + 1, :length], v[b : b + 1, :length], causal=True)
        np.testing.assert_array_equal(whole[b], alone[0])
        np.testing.assert_array_equal(whole_lse[b], alone_lse[0])
    for h in range(6):
        head = np.s_[:, :, h // 3 : h // 3 + 1]
        alone, _ = solve(q[:, :, h : h + 1], k[head], v[head], causal=True, kv_lengths=[700, 512, 40])
        np.testing.assert_array_equal(whole[:, :, h : h + 1], alone)


@pytest.mark.parametrize("q_tokens", [1, 64, 1000])
def test_bits_do_not_depend_on_the_number_of_threads(q_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = qkv(2, q_tokens, 3000, (4, 2), (64, 64))
    results = []
    for threads in (1, 2, 5):
        monkeypatch.setattr(entry, "thread_count", lambda threads=threads: threads)
        results.append(solve(q, k, v, causal=True))
    for out, lse in results[1:]:
        np.testing.assert_array_equal(out, results[0][0])
        np.testing.assert_array_equal(lse, results[0][1])


@pytest.mark.parametrize("heads", [(21, 21), (40, 20)])
@pytest.mark.parametrize("q_tokens", [1, 3])
def test_heads_that_are_read_together_get_what_each_gets_alone(
    heads: tuple[int, int], q_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # With one thread, 16 heads of these go together, or 8, and then the rest.
    monkeypatch.setattr(entry, "thread_count", lambda: 1)
    q, k, v = qkv(2, q_tokens, 1100, heads, (48, 20))
    v[0, 500, 3, 7] = np.nan
    together = solve(q, k, v, causal=True, kv_lengths=[1100, 700])
    apart = (np.ascontiguousarray(x.transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3) for x in (k, v))
    for got, expected in zip(together, solve(q, *apart, causal=True, kv_lengths=[1100, 700]), strict=True):
        np.testing.assert_array_equal(got, expected)
    assert np.isnan(together[0]).any(axis=(0, 1, 3)).sum() == heads[0] // heads[1]


@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT16, BFLOAT16], ids=str)
@pytest.mark.parametrize("tokens", [1, 8, 50])
@pytest.mark.parametrize(("left", "sinks"), [(cpu.UNBOUNDED, 0), (90, 0), (90, 5), (700, 600)])
def test_pages_hold_what_a_contiguous_tensor_holds(left: int, sinks: int, tokens: int, dtype: np.dtype[Any]) -> None:
    q, k, v = qkv(1, tokens, 1500, (6, 2), (64, 64), dtype)
    start = 1500 - tokens
    scoring, seen = scoring_for(q), causal_step(start, left, sinks)
    expected, expected_lse = cpu.attend_runs(q, runs_of([(k[0], v[0], 0)]), seen, scoring)
    pages = paged(k[0], v[0], 64, seed=1)  # runs hold addresses alone
    out, lse = cpu.attend_runs(q, runs_of(pages), seen, scoring)
    np.testing.assert_array_equal(out, expected)
    np.testing.assert_array_equal(lse, expected_lse)
    window = (None if left == cpu.UNBOUNDED else left, None)
    described = problem.describe(q, k, v, causal=True, window=window)
    assert_close(out, lse, *reference.attention(described, q, k, v, sink_tokens=sinks))


@pytest.mark.parametrize("tokens", [1, 8, 9, 60])
def test_positions_between_runs_do_not_exist(tokens: int) -> None:
    q, k, v = qkv(1, tokens, 1000, (4, 2), (32, 16))
    kept = np.r_[0:5, 40:41, 300:310, 700:1000]
    pieces = [(k[0, a:b], v[0, a:b], a) for a, b in ((0, 5), (40, 41), (300, 310), (700, 1000))]
    everything = Visibility(*(np.array([x]) for x in (1000 - tokens, cpu.UNBOUNDED, cpu.UNBOUNDED, 0)))
    out, lse = cpu.attend_runs(q, runs_of(pieces), everything, scoring_for(q))
    k, v = k[:, kept], v[:, kept]
    assert_close(out, lse, *reference.attention(problem.describe(q, k, v), q, k, v))


ALGORITHMS = ("standard", "v1", "v2")


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
@pytest.mark.parametrize("where", ["k", "v"])
@pytest.mark.parametrize("q_tokens", [4, 60])
def test_a_poisoned_key_or_value_reaches_only_rows_that_attend_to_it(
    q_tokens: int, where: str, dtype: np.dtype[Any], algorithm: str, poison: float
) -> None:
    q, k, v = qkv(1, q_tokens, 600, (4, 2), (32, 40), dtype)
    row = q_tokens // 2  # its own key is poisoned, which the rows before it do not see
    options = {"causal": True, "window": (q_tokens // 4, None)}
    described = problem.describe(q, k, v, **options)
    clean, clean_lse = cpu.attention(described, q, k, v, algorithm)
    {"k": k, "v": v}[where][0, 600 - q_tokens + row, 0] = poison
    out, lse = cpu.attention(described, q, k, v, algorithm)
    untouched = np.ones(q_tokens, bool)
    untouched[row : row + q_tokens // 4 + 1] = False
    np.testing.assert_array_equal(out[:, untouched], clean[:, untouched])
    np.testing.assert_array_equal(out[:, :, 2:], clean[:, :, 2:])  # the other KV head's
    np.testing.assert_array_equal(lse[:, :, untouched], clean_lse[:, :, untouched])
    touched = out[:, row, :2].astype(np.float32)
    if where == "v" or np.isnan(poison):
        assert not np.isfinite(touched).any()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("q_tokens", [4, 60])
def test_a_poisoned_query_spoils_its_own_row_alone(q_tokens: int, algorithm: str) -> None:
    q, k, v = qkv(1, q_tokens, 100, (4, 2), (32, 40))
    described = problem.describe(q, k, v)
    clean, clean_lse = cpu.attention(described, q, k, v, algorithm)
    q[0, 1, 2, 5] = np.nan
    out, lse = cpu.attention(described, q, k, v, algorithm)
    assert np.isnan(out[0, 1, 2]).all()
    assert np.isnan(lse[0, 2, 1])
    others = np.ones((1, q_tokens, 4), bool)
    others[0, 1, 2] = False
    np.testing.assert_array_equal(out[others], clean[others])
    np.testing.assert_array_equal(lse.transpose(0, 2, 1)[others], clean_lse.transpose(0, 2, 1)[others])


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("q_tokens", [4, 60])
@pytest.mark.parametrize("mask", ["lengths", "bias", "bool bias"])
def test_what_is_masked_may_hold_nan(mask: str, q_tokens: int, algorithm: str) -> None:
    q, k, v = qkv(2, q_tokens, 150, (4, 2), (32, 40))
    hidden = np.zeros((2, 1, 1, 150), bool)
    if mask == "lengths":
        hidden[0, ..., 97:] = hidden[1, ..., 11:] = True
        options: dict[str, Any] = {"kv_lengths": [97, 11]}
    else:
        hidden[..., 3:9] = hidden[..., 70:140] = True
        options = {"bias": ~hidden if mask == "bool bias" else np.where(hidden, -np.inf, 0).astype(np.float32)}
    described = problem.describe(q, k, v, **options)
    clean, clean_lse = cpu.attention(described, q, k, v, algorithm)
    k[hidden[:, 0, 0]] = v[hidden[:, 0, 0]] = np.nan
    out, lse = cpu.attention(described, q, k, v, algorithm)
    np.testing.assert_array_equal(out, clean)
    np.testing.assert_array_equal(lse, clean_lse)


def test_scores_far_apart_neither_overflow_nor_vanish() -> None:
    q, k, v = qkv(1, 20, 300, (2, 1), (32, 32))
    k *= np.linspace(0, 300, 300, dtype=np.float32)[None, :, None, None]
    for tokens in (20, 4):
        part = q[:, -tokens:]
        out, lse = solve(part, k, v)
        expected, expected_lse = reference.attention(problem.describe(part, k, v), part, k, v)
        np.testing.assert_allclose(out, expected, atol=2e-3)  # scores of 1000s: their own rounding is 1e-4
        np.testing.assert_allclose(lse, expected_lse, rtol=1e-6)


def test_a_sequence_of_many_splits_is_merged() -> None:
    for dtype in (FLOAT32, FLOAT16):
        q, k, v = qkv(1, 2, 5000, (6, 2), (32, 40), dtype)
        k = (k.astype(np.float32) * np.linspace(0.2, 3, 5000, dtype=np.float32)[None, :, None, None]).astype(dtype)
        described = problem.describe(q, k, v, causal=True, window=(4000, None))
        out, lse = cpu.attention(described, q, k, v, "v2")
        assert_close(out, lse, *reference.attention(described, q, k, v))


def test_a_bias_that_is_nan_spoils_its_row() -> None:
    bias = np.zeros((1, 1, 20, 50), np.float32)
    bias[0, 0, 3, 7] = np.nan
    out, _ = solve(*qkv(1, 20, 50, (2, 1), (16, 16)), bias=bias)
    assert np.isnan(out[0, 3]).all()
    assert np.isfinite(np.delete(out, 3, axis=1)).all()

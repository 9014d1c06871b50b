"""Every option of `attention`, in every algorithm and dtype, against the float64 oracle."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from numbaflash import cpu, problem, reference

from .inputs import BFLOAT16, FLOAT16, FLOAT32, assert_close, assert_solves, normal, qkv, solve

ALGORITHMS = ("standard", "v1", "v2")
DTYPES = (FLOAT32, FLOAT16, BFLOAT16)

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True},
    "scaled": {"scale": -0.37},
    "no scale at all": {"scale": 0.0},
    "window to both sides": {"window": (11, 5)},
    "window of one": {"window": (0, 0)},
    "window to the right": {"window": (None, 3)},
    "causal window": {"causal": True, "window": (70, None)},
    "softcap": {"softcap": 2.5, "causal": True},
    "ALiBi by head": {"alibi_slopes": np.linspace(0.05, 0.6, 6), "causal": True},
    "ALiBi by batch and head, both sides": {"alibi_slopes": np.linspace(0.05, 0.6, 12).reshape(2, 6)},
    "bias": {"bias": normal(7, 2, 6, 37, 150)},
    "bias by key": {"bias": normal(7, 150), "causal": True},
    "bias by head and query": {"bias": normal(7, 6, 37, 1), "softcap": 3.0},
    "bias that forbids": {"bias": np.where(normal(8, 1, 1, 37, 150) > 0, 0, -np.inf).astype(np.float32)},
    "bool bias": {"bias": normal(8, 2, 1, 37, 150) > 0.3, "window": (60, 60)},
    "sink logits": {"sink_logits": np.linspace(-2, 9, 6), "causal": True},
    "lengths": {"kv_lengths": [150, 41], "causal": True},
    "lengths of less than the queries": {"kv_lengths": [0, 9], "causal": True, "sink_logits": np.linspace(-2, 9, 6)},
    "everything": {
        "softcap": 4.0,
        "causal": True,
        "window": (80, None),
        "alibi_slopes": np.linspace(0.05, 0.6, 6),
        "bias": normal(7, 2, 1, 1, 150),
        "sink_logits": np.linspace(-2, 3, 6),
        "kv_lengths": [149, 66],
        "scale": 0.2,
    },
}


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_an_option_means_what_the_oracle_says(options: dict[str, Any], algorithm: str) -> None:
    q, k, v = qkv(2, 37, 150, (6, 2), (40, 24))
    assert_solves(problem.describe(q, k, v, **options), q, k, v, algorithm)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_an_option_means_the_same_in_split_kv_decode(options: dict[str, Any]) -> None:
    q, k, v = qkv(2, 3, 1100, (6, 2), (48, 32))
    options = {**options}
    bias = options.get("bias")
    if bias is not None:  # a bias of these shapes
        rows = 3 if bias.ndim > 1 and bias.shape[-2] > 1 else 1
        columns = 1100 if bias.shape[-1] > 1 else 1
        options["bias"] = np.resize(bias, (*bias.shape[:-2], rows, columns))
    if "kv_lengths" in options:
        options["kv_lengths"] = [1100 if n == 150 else n for n in options["kv_lengths"]]
    assert_solves(problem.describe(q, k, v, **options), q, k, v)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("q_tokens", [1, 5, 64])
def test_each_dtype_is_rounded_once(dtype: np.dtype[Any], algorithm: str, q_tokens: int) -> None:
    q, k, v = qkv(1, q_tokens, 600, (4, 1), (64, 64), dtype)
    assert_solves(problem.describe(q, k, v, causal=True), q, k, v, algorithm)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("q_tokens", [2, 20])
@pytest.mark.parametrize("dims", [(1, 1), (3, 7), (15, 17), (33, 16), (80, 112), (127, 129), (255, 256), (256, 31)])
def test_any_head_dim(dims: tuple[int, int], q_tokens: int, dtype: np.dtype[Any]) -> None:
    q, k, v = qkv(1, q_tokens, 90, (2, 1), dims, dtype)
    assert_solves(problem.describe(q, k, v, causal=True), q, k, v)


@pytest.mark.parametrize("q_tokens", [1, 8, 9, 100])
@pytest.mark.parametrize("heads", [(1, 1), (4, 4), (6, 3), (9, 3), (10, 2), (32, 1), (71, 1)])
def test_any_group_of_query_heads(heads: tuple[int, int], q_tokens: int) -> None:
    q, k, v = qkv(1, q_tokens, 70, heads, (16, 16))
    assert_solves(problem.describe(q, k, v, causal=True), q, k, v)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize(
    ("batch", "q_tokens", "kv_tokens"), [(0, 4, 4), (2, 0, 4), (2, 4, 0), (2, 20, 0), (1, 200, 3), (1, 20, 1)]
)
def test_nothing_to_see_gives_zeros(batch: int, q_tokens: int, kv_tokens: int, algorithm: str) -> None:
    q, k, v = qkv(batch, q_tokens, kv_tokens, (4, 2), (16, 8))
    assert_solves(problem.describe(q, k, v, causal=True), q, k, v, algorithm)


@pytest.mark.parametrize("q_tokens", [2, 30])
@pytest.mark.parametrize(
    "lay",
    [
        lambda x: x[::-1].copy()[::-1],
        lambda x: x[:, ::-1].copy()[:, ::-1],
        lambda x: np.repeat(x, 2, axis=1)[:, ::2],
        lambda x: x.transpose(0, 2, 1, 3).copy().transpose(0, 2, 1, 3),
        lambda x: np.concatenate((x, x), axis=3)[..., : x.shape[3]],
        lambda x: x.transpose(0, 1, 3, 2).copy().transpose(0, 1, 3, 2),
        lambda x: np.frombuffer(b"x" + x.tobytes(), x.dtype, offset=1).reshape(x.shape),
    ],
    ids=[
        "batch reversed",
        "tokens reversed",
        "every other",
        "heads first",
        "sliced",
        "last axis strided",
        "misaligned",
    ],
)
def test_any_strides(lay: Any, q_tokens: int) -> None:
    arrays = qkv(2, q_tokens, 150, (4, 2), (32, 32))
    expected = solve(*arrays, causal=True)
    got = solve(*map(lay, arrays), causal=True)
    np.testing.assert_array_equal(got[0], expected[0])
    np.testing.assert_array_equal(got[1], expected[1])


def test_one_key_broadcast_over_all_tokens() -> None:
    q, k, v = qkv(1, 20, 1, (2, 1), (16, 16))
    k, v = np.broadcast_to(k, (1, 50, 1, 16)), np.broadcast_to(v, (1, 50, 1, 16))
    assert_solves(problem.describe(q, k, v), q, k, v)


@pytest.mark.parametrize("q_tokens", [1, 256])
def test_float32_is_as_good_as_float32(q_tokens: int) -> None:
    q, k, v = qkv(1, q_tokens, 4096, (2, 2), (128, 128))
    out, _ = solve(q, k, v)
    expected, _ = reference.attention(problem.describe(q, k, v), q, k, v)
    scores = np.einsum("bihd,bjhd->bhij", q, k) * np.float32(128**-0.5)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    plain = np.einsum("bhij,bjhd->bihd", weights / weights.sum(-1, keepdims=True), v)
    assert np.abs(out - expected).max() <= 1.5 * np.abs(plain - expected).max()


@settings(max_examples=150)
@given(data=st.data())
def test_any_problem(data: st.DataObject) -> None:
    draw = data.draw
    batch, group, kv_heads = draw(st.integers(1, 2)), draw(st.integers(1, 5)), draw(st.integers(1, 2))
    q_tokens, kv_tokens = draw(st.integers(1, 60)), draw(st.integers(1, 300))
    dims = draw(st.integers(1, 48)), draw(st.integers(1, 48))
    q, k, v = qkv(batch, q_tokens, kv_tokens, (group * kv_heads, kv_heads), dims, draw(st.sampled_from(DTYPES)))
    side = st.none() | st.integers(0, 320)
    described = problem.describe(
        q,
        k,
        v,
        causal=draw(st.booleans()),
        window=(draw(side), draw(side)),
        softcap=draw(st.sampled_from([0.0, 3.0])),
        kv_lengths=draw(st.none() | st.lists(st.integers(0, kv_tokens), min_size=batch, max_size=batch)),
        sink_logits=draw(st.none() | st.just(np.linspace(-1, 1, group * kv_heads))),
    )
    assert_solves(described, q, k, v, draw(st.sampled_from(ALGORITHMS)))


def test_queries_of_another_dtype_than_the_keys() -> None:
    for tokens in (2, 30):
        q = normal(1, 1, tokens, 4, 32)
        k, v = normal(2, 1, 80, 2, 32, dtype=BFLOAT16), normal(3, 1, 80, 2, 32, dtype=BFLOAT16)
        runs = cpu.KVRuns(np.array([cpu.contiguous_run(k[0], v[0], 0)]), np.array([0, 1]), BFLOAT16, 2, 32, 32)
        sees_all = cpu.Visibility(*(np.array([x]) for x in (80 - tokens, cpu.UNBOUNDED, cpu.UNBOUNDED, 0)))
        scoring = problem.describe_scoring(batch=1, q_heads=4, head_dim=32)
        out, lse = cpu.attend_runs(q, runs, sees_all, scoring)
        wide = k.astype(np.float32), v.astype(np.float32)
        assert_close(out, lse, *reference.attention(problem.describe(q, *wide), q, *wide))

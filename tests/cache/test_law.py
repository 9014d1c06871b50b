"""The law of the cache: however the tokens are cut into steps, the results are those of the whole sequence."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import strategies as st
from laws import BACKENDS, law
from oracle import assert_close, expected_of_cache, random_tokens

import numbaflash


@st.composite
def rings(draw):
    capacity = draw(st.integers(1, 90))
    return {
        "capacity": capacity,
        "sink_tokens": draw(st.integers(0, min(capacity - 1, 20))),
        "page_size": draw(st.sampled_from([8, 16, 64])),
        "rollback": draw(st.integers(0, 30)),
    }


steps = st.lists(st.one_of(st.integers(0, 4), st.integers(5, 120)), min_size=1, max_size=8)
heads = st.sampled_from([(1, 1), (4, 2), (3, 1)])


def tokens_of(rng, total, q_heads, kv_heads, head_dim=8, dtype=np.float32):
    return (
        random_tokens(rng, total, q_heads, head_dim, dtype=dtype),
        random_tokens(rng, total, kv_heads, head_dim, dtype=dtype),
        random_tokens(rng, total, kv_heads, head_dim, dtype=dtype),
    )


def take_steps(cache, q, k, v, chunks, **options):
    cuts = np.cumsum([0, *chunks])
    parts = [cache.step(0, q[a:b], k[a:b], v[a:b], **options) for a, b in itertools.pairwise(cuts)]
    return np.concatenate(parts)


@law(150, rings(), steps, heads, st.integers(0, 2**32 - 1))
def test_results_do_not_depend_on_how_tokens_are_cut_into_steps(backend, ring, chunks, heads, seed):
    q, k, v = tokens_of(np.random.default_rng(seed), sum(chunks), *heads)
    cache = numbaflash.RingKVCache(1, heads[1], 8, dtype="float32", backend=backend, **ring)

    out = take_steps(cache, q, k, v, chunks)

    assert_close(out, expected_of_cache(q, k, v, capacity=ring["capacity"], sink_tokens=ring["sink_tokens"]))
    assert cache.length(0) == sum(chunks)
    assert cache.nbytes <= cache.max_nbytes


@law(60, rings(), steps, steps, st.data())
def test_a_truncated_cache_goes_on_as_if_the_tokens_had_never_come(backend, ring, before, after, data):
    total = sum(before)
    back = data.draw(st.integers(0, min(ring["rollback"], total)))
    rng = np.random.default_rng(total)
    q, k, v = tokens_of(rng, total + sum(after), 2, 1)
    cache = numbaflash.RingKVCache(1, 1, 8, dtype="float32", backend=backend, **ring)
    take_steps(cache, q[:total], k[:total], v[:total], before)

    cache.truncate(total - back)
    q, k, v = (np.delete(x, range(total - back, total), axis=0) for x in (q, k, v))
    out = take_steps(cache, q[total - back :], k[total - back :], v[total - back :], after)

    want = expected_of_cache(q, k, v, capacity=ring["capacity"], sink_tokens=ring["sink_tokens"])
    assert_close(out, want[total - back :])


@law(60, rings(), steps, steps, steps)
def test_forks_go_their_own_ways_from_the_same_tokens(backend, ring, common, left_steps, right_steps):
    rng = np.random.default_rng(sum(common))
    shared = tokens_of(rng, sum(common), 2, 1)
    parent = numbaflash.RingKVCache(1, 1, 8, dtype="float32", backend=backend, **ring)
    take_steps(parent, *shared, common)
    child = parent.fork()

    for cache, chunks in ((parent, left_steps), (child, right_steps)):
        own = tokens_of(rng, sum(chunks), 2, 1)
        out = take_steps(cache, *own, chunks)
        whole = (np.concatenate(pair) for pair in zip(shared, own, strict=True))
        want = expected_of_cache(*whole, capacity=ring["capacity"], sink_tokens=ring["sink_tokens"])
        assert_close(out, want[sum(common) :])


@law(30, rings(), steps, steps, st.data())
def test_a_fork_keeps_the_tokens_that_the_other_side_takes_back_and_writes_over(backend, ring, common, after, data):
    total = sum(common)
    back = data.draw(st.integers(0, min(ring["rollback"], total)))
    rng = np.random.default_rng(total)
    shared, others, next_one = (tokens_of(rng, count, 2, 1) for count in (total, sum(after), 1))
    parent = numbaflash.RingKVCache(1, 1, 8, dtype="float32", backend=backend, **ring)
    take_steps(parent, *shared, common)
    child = parent.fork()

    parent.truncate(total - back)
    take_steps(parent, *others, after)

    whole = (np.concatenate(pair) for pair in zip(shared, next_one, strict=True))
    want = expected_of_cache(*whole, capacity=ring["capacity"], sink_tokens=ring["sink_tokens"])
    assert_close(child.step(0, *next_one), want[total:])


@law(60, rings(), steps, st.integers(1, 40))
def test_append_and_attend_give_what_step_gives(backend, ring, before, tokens):
    rng = np.random.default_rng(tokens)
    tokens = min(tokens, ring["rollback"] + 1)
    total = sum(before) + tokens
    q, k, v = tokens_of(rng, total, 4, 2)
    cache = numbaflash.RingKVCache(1, 2, 8, dtype="float32", backend=backend, **ring)

    for cut in (slice(0, sum(before)), slice(sum(before), total)):
        cache.append(0, k[cut], v[cut])
    out = cache.attend(0, q[sum(before) :])

    want = expected_of_cache(q, k, v, capacity=ring["capacity"], sink_tokens=ring["sink_tokens"])
    assert_close(out, want[sum(before) :])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("storage", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_keys_and_values_are_rounded_to_the_storage_dtype_however_they_arrive(backend, storage, dtype):
    q, k, v = tokens_of(np.random.default_rng(1), 50, 4, 2, 16, np.dtype(dtype))
    cache = numbaflash.RingKVCache(1, 2, 16, capacity=30, sink_tokens=2, page_size=8, dtype=storage, backend=backend)

    out = take_steps(cache, q, k, v, [20, 1, 1, 28])

    stored = (x.astype(storage).astype(np.float32) for x in (k, v))
    assert out.dtype == np.dtype(dtype)
    assert_close(out, expected_of_cache(q.astype(np.float32), *stored, capacity=30, sink_tokens=2))


@pytest.mark.parametrize(
    "options",
    [
        {"scale": 0.3},
        {"softcap": 1.5},
        {"alibi_slopes": np.float32([0.1, 0.5, 1.0, 2.0])},
        {"sink_logits": np.float32([0.0, 1.0, -1.0, 4.0])},
    ],
    ids=lambda options: next(iter(options)),
)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("chunks", [[40], [1] * 40, [33, 7]])
def test_every_scoring_option_obeys_the_law(backend, options, chunks):
    q, k, v = tokens_of(np.random.default_rng(2), 40, 4, 2)
    cache = numbaflash.RingKVCache(1, 2, 8, capacity=24, sink_tokens=4, page_size=8, dtype="float32", backend=backend)

    out = take_steps(cache, q, k, v, chunks, **options)

    assert_close(out, expected_of_cache(q, k, v, capacity=24, sink_tokens=4, **options))


@law(40, st.lists(rings(), min_size=1, max_size=4), st.integers(0, 20), st.data())
def test_a_batch_of_caches_steps_as_each_would_alone(backend, rings_of_batch, tokens, data):
    rng = np.random.default_rng(tokens)
    caches, histories = [], []
    for ring in rings_of_batch:
        cache = numbaflash.RingKVCache(2, 2, 8, dtype="float32", backend=backend, **ring)
        histories.append(tokens_of(rng, data.draw(st.integers(0, 100)), 4, 2))
        cache.append(1, *histories[-1][1:])
        caches.append(cache)
    news = [tokens_of(rng, tokens, 4, 2) for _ in caches]

    out = numbaflash.attention_batch(caches, 1, *(np.stack(x) for x in zip(*news, strict=True)))

    for ring, cache, history, new, got in zip(rings_of_batch, caches, histories, news, out, strict=True):
        whole = (np.concatenate(pair) for pair in zip(history, new, strict=True))
        want = expected_of_cache(*whole, capacity=ring["capacity"], sink_tokens=ring["sink_tokens"])
        assert_close(got, want[len(history[0]) :])
        assert cache.length(1) == len(history[0]) + tokens
        assert cache.length(0) == 0

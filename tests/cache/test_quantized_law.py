"""The law of the cache for codes: what a query sees depends on its position, not on how tokens were cut into steps."""

from __future__ import annotations

import itertools
import tempfile

import numpy as np
import pytest
from hypothesis import strategies as st
from laws import BACKENDS, law
from oracle import ROUNDING, random_tokens
from quantized_oracle import expected_of_quantized

import numbaflash
from numbaflash import AWQQuantizer, GroupQuantizer, HQQQuantizer

HEAD_DIM = 32


# On a device each format, and each number of rows, is a build of the kernel, of some seconds: these are few.
FORMATS = {
    "cpu": st.tuples(
        st.sampled_from(["int8", "int4"]),
        st.sampled_from([GroupQuantizer, HQQQuantizer, AWQQuantizer]),
        st.booleans(),
        st.sampled_from(["channel", "token"]),
        st.sampled_from([8, 16, 64]),
    ),
    "emulated": st.sampled_from(
        [("int4", HQQQuantizer, False, "channel", 8), ("int8", AWQQuantizer, True, "token", 16)]
    ),
}
HEADS = {"cpu": st.sampled_from([(1, 1), (8, 2), (3, 1)]), "emulated": st.just((4, 2))}


def caches(backend):
    """Arguments of a cache, and the heads of its queries."""

    @st.composite
    def drawn(draw):
        capacity = draw(st.integers(1, 90))
        q_heads, kv_heads = draw(HEADS[backend])
        dtype, kind, symmetric, keys, page_size = draw(FORMATS[backend])
        options = {"symmetric": symmetric}
        if kind is AWQQuantizer:
            normal = np.random.default_rng(draw(st.integers(0, 99))).standard_normal((1, kv_heads, HEAD_DIM))
            options["channel_scales"] = np.exp2(normal).astype(np.float32)
        else:
            options["keys"] = keys
        ring = {
            "capacity": capacity,
            "sink_tokens": draw(st.integers(0, min(capacity - 1, 20))),
            "page_size": page_size,
            "rollback": draw(st.integers(0, 30)),
        }
        return {"num_kv_heads": kv_heads, "dtype": dtype, "quantizer": kind(**options), **ring}, q_heads

    return drawn()


def made(backend, drawn):
    """An empty cache, and the heads of its queries."""
    arguments, q_heads = drawn
    return numbaflash.RingKVCache(1, head_dim=HEAD_DIM, backend=backend, **arguments), q_heads


steps = st.lists(st.one_of(st.integers(0, 4), st.integers(5, 120)), min_size=1, max_size=8)
seeds = st.integers(0, 2**32 - 1)


def assert_close(got, want):
    """Compare with the tolerance of float32 sums in which the products with codes and with offsets cancel."""
    tolerance = ROUNDING[got.dtype.name]
    np.testing.assert_allclose(got.astype(np.float64), want, rtol=2 * tolerance, atol=max(2e-5, tolerance))


def tokens_of(rng, total, cache, q_heads):
    return tuple(random_tokens(rng, total, heads, HEAD_DIM) for heads in (q_heads, *[cache.num_kv_heads] * 2))


def take_steps(cache, q, k, v, chunks, **options):
    cuts = np.cumsum([0, *chunks])
    return np.concatenate([cache.step(0, q[a:b], k[a:b], v[a:b], **options) for a, b in itertools.pairwise(cuts)])


@law(120, caches, steps, seeds)
def test_results_do_not_depend_on_how_tokens_are_cut_into_steps(backend, drawn, chunks, seed):
    cache, q_heads = made(backend, drawn)
    q, k, v = tokens_of(np.random.default_rng(seed), sum(chunks), cache, q_heads)

    out = take_steps(cache, q, k, v, chunks)

    assert_close(out, expected_of_quantized(cache, q, k, v))
    assert cache.length(0) == sum(chunks)
    assert cache.nbytes <= cache.max_nbytes


@law(60, caches, steps, steps, st.data())
def test_a_truncated_cache_goes_on_as_if_the_tokens_had_never_come(backend, drawn, before, after, data):
    cache, q_heads = made(backend, drawn)
    total, layout = sum(before), cache.layout
    length = data.draw(st.integers(max(total - layout.rollback, 0), total))
    if total <= layout.capacity:  # no window has holes: any page boundary will do
        boundaries = [0, *range(layout.sink_tokens, total + 1, layout.page_size)]
        length = data.draw(st.sampled_from([length, *boundaries[: 1 if total < layout.sink_tokens else None]]))
    rng = np.random.default_rng(total)
    q, k, v = tokens_of(rng, total + sum(after), cache, q_heads)
    take_steps(cache, q[:total], k[:total], v[:total], before)

    cache.truncate(length)
    q, k, v = (np.delete(x, range(length, total), axis=0) for x in (q, k, v))
    out = take_steps(cache, q[length:], k[length:], v[length:], after)

    assert_close(out, expected_of_quantized(cache, q, k, v)[length:])


@law(40, caches, steps, steps, steps)
def test_forks_go_their_own_ways_from_the_same_tokens(backend, drawn, common, left_steps, right_steps):
    parent, q_heads = made(backend, drawn)
    rng = np.random.default_rng(sum(common))
    shared = tokens_of(rng, sum(common), parent, q_heads)
    take_steps(parent, *shared, common)
    child = parent.fork()

    for cache, chunks in ((parent, left_steps), (child, right_steps)):
        own = tokens_of(rng, sum(chunks), cache, q_heads)
        out = take_steps(cache, *own, chunks)
        whole = [np.concatenate(pair) for pair in zip(shared, own, strict=True)]
        assert_close(out, expected_of_quantized(cache, *whole)[sum(common) :])


@law(40, caches, steps, st.integers(1, 40))
def test_append_and_attend_give_what_step_gives(backend, drawn, before, tokens):
    cache, q_heads = made(backend, drawn)
    tokens = min(tokens, cache.layout.rollback + 1)
    total = sum(before) + tokens
    q, k, v = tokens_of(np.random.default_rng(tokens), total, cache, q_heads)

    for cut in (slice(0, sum(before)), slice(sum(before), total)):
        cache.append(0, k[cut], v[cut])
    out = cache.attend(0, q[sum(before) :])

    assert_close(out, expected_of_quantized(cache, q, k, v)[sum(before) :])


@law(30, caches, steps, steps)
def test_a_cache_that_was_saved_goes_on_from_its_file(backend, drawn, before, after):
    cache, q_heads = made(backend, drawn)
    total = sum(before)
    q, k, v = tokens_of(np.random.default_rng(total), total + sum(after), cache, q_heads)
    take_steps(cache, q[:total], k[:total], v[:total], before)

    with tempfile.TemporaryDirectory() as folder:
        cache.save(f"{folder}/cache")
        loaded = numbaflash.RingKVCache.load(f"{folder}/cache", backend=backend)
    assert loaded.nbytes <= cache.nbytes
    out = take_steps(loaded, q[total:], k[total:], v[total:], after)

    assert loaded.quantizer.text == cache.quantizer.text
    assert_close(out, expected_of_quantized(cache, q, k, v)[total:])


@law(30, st.data(), st.integers(0, 20), st.integers(1, 3))
def test_a_batch_of_caches_steps_as_each_would_alone(backend, data, tokens, count):
    rng = np.random.default_rng(tokens)
    held, histories = [], []
    for _ in range(count):
        sinks = data.draw(st.integers(0, 10))
        ring = {"capacity": data.draw(st.integers(11, 60)), "sink_tokens": sinks, "page_size": 8, "rollback": 9}
        cache = numbaflash.RingKVCache(2, 2, HEAD_DIM, dtype="int4", quantizer="hqq", backend=backend, **ring)
        histories.append(tokens_of(rng, data.draw(st.integers(0, 100)), cache, 4))
        cache.append(1, *histories[-1][1:])
        held.append(cache)
    news = [tokens_of(rng, tokens, cache, 4) for cache in held]

    slopes = np.float32([0.1, 0.5, 1.0, 2.0])
    batch = (np.stack(x) for x in zip(*news, strict=True))
    out = numbaflash.attention_batch(held, 1, *batch, alibi_slopes=slopes)

    for cache, history, new, got in zip(held, histories, news, out, strict=True):
        whole = [np.concatenate(pair) for pair in zip(history, new, strict=True)]
        assert_close(got, expected_of_quantized(cache, *whole, layer=1, alibi_slopes=slopes)[len(history[0]) :])
        assert cache.length(1) == len(history[0]) + tokens


@pytest.mark.parametrize("head_dim", [32, 64, 96, 128, 256])
@pytest.mark.parametrize("quantizer", ["group", "group:keys=token", "hqq:symmetric", "hqq:group_size=32,keys=token"])
@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_every_format_of_page_is_read_as_it_was_written(head_dim, quantizer, dtype):
    rng = np.random.default_rng(head_dim)
    q, k, v = (random_tokens(rng, 60, heads, head_dim) for heads in (8, 2, 2))
    cache = numbaflash.RingKVCache(
        1, 2, head_dim, capacity=50, sink_tokens=3, dtype=dtype, quantizer=quantizer, page_size=16
    )

    out = take_steps(cache, q, k, v, [40, 1, 1, 3, 15])

    assert_close(out, expected_of_quantized(cache, q, k, v))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_outputs_have_the_dtype_of_the_queries(backend, dtype):
    rng = np.random.default_rng(0)
    q, k, v = (random_tokens(rng, 40, heads, HEAD_DIM, dtype=np.dtype(dtype)) for heads in (4, 2, 2))
    cache = numbaflash.RingKVCache(1, 2, HEAD_DIM, capacity=30, dtype="int4", page_size=8, backend=backend)

    out = take_steps(cache, q, k, v, [20, 1, 19])

    assert out.dtype == np.dtype(dtype)
    assert_close(out, expected_of_quantized(cache, *(x.astype(np.float32) for x in (q, k, v))))

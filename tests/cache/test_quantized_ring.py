"""A quantized cache's life beside its results: what it refuses, what it costs, how far it goes back."""

from __future__ import annotations

import numpy as np
import pytest
from laws import BACKENDS
from oracle import random_tokens

import numbaflash
from numbaflash import AWQQuantizer, GroupQuantizer
from numbaflash.cache.size import layer_nbytes


def cache_of(**options):
    return numbaflash.RingKVCache(
        2, 2, 32, **{"capacity": 100, "page_size": 8, "rollback": 5, "dtype": "int4", "sink_tokens": 3} | options
    )


def tokens(count, heads=2, seed=0):
    return random_tokens(np.random.default_rng(seed), count, heads, 32)


def fill(cache, count, layer=0):
    cache.append(layer, tokens(count), tokens(count))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e5])
@pytest.mark.parametrize("name", ["k", "v"])
def test_what_is_not_finite_in_float16_is_refused_and_nothing_changes(backend, bad, name):
    cache = cache_of(backend=backend)
    fill(cache, 20)
    before = cache.attend(0, tokens(3, 4))
    new = {"q": tokens(7, 4), "k": tokens(7), "v": tokens(7)}
    new[name][2, 1, 5] = bad

    with pytest.raises(ValueError, match=f"{name} must be finite in float16 to be quantized, .* token 2, head 1"):
        cache.step(0, **new)
    with pytest.raises(ValueError, match=f"{name} must be finite"):
        cache.append(0, new["k"], new["v"])

    assert cache.length(0) == 20
    np.testing.assert_array_equal(cache.attend(0, tokens(3, 4)), before)


def test_a_step_that_fails_leaves_the_cache_and_its_pages_as_they_were(monkeypatch):
    cache = cache_of()
    fill(cache, 60)
    before, held = cache.attend(0, tokens(5, 4)), [pool.nbytes for pool in cache.pools]

    def fail(*_args, **_kwargs):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(numbaflash.cache.code_steps, "attend_runs", fail)
        with pytest.raises(MemoryError):
            cache.step(0, tokens(30, 4), tokens(30), tokens(30))

    assert cache.length(0) == 60
    assert [pool.nbytes for pool in cache.pools] == held
    np.testing.assert_array_equal(cache.attend(0, tokens(5, 4)), before)


@pytest.mark.parametrize("pool", [0, 1])
def test_a_page_that_cannot_be_had_leaves_the_cache_and_its_pages_as_they_were(monkeypatch, pool):
    cache = cache_of()
    fill(cache, 2)
    before, held = cache.attend(0, tokens(2, 4)), [one.nbytes for one in cache.pools]
    acquire, calls = cache.pools[pool].acquire, []

    def fail_on_second():
        calls.append(None)
        if len(calls) == 2:
            raise MemoryError
        return acquire()

    for call in (lambda *new: cache.append(0, *new), lambda *new: cache.step(0, tokens(40, 4), *new)):
        calls.clear()
        with monkeypatch.context() as patch:
            patch.setattr(cache.pools[pool], "acquire", fail_on_second)
            with pytest.raises(MemoryError):
                call(tokens(40), tokens(40))
        assert cache.length(0) == 2
        assert [one.nbytes for one in cache.pools] == held
    np.testing.assert_array_equal(cache.attend(0, tokens(2, 4)), before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bytes_are_what_the_shape_says(backend):
    cache = cache_of(backend=backend)
    one = layer_nbytes(2, 32, cache.layout, "int4", "group")
    # Of a head, a token has 16 bytes of key, 16 of value and the value's scale and offset; a page those of its keys'
    # 32 channels.
    assert one.page == 2 * (8 * (16 + 16 + 4) + 32 * 4)
    assert one.token == 104
    fill(cache, 500, 0)
    fill(cache, 500, 1)
    assert cache.nbytes == cache.max_nbytes == 2 * one.total
    assert sum(pool.nbytes for pool in cache.pools) == cache.nbytes
    # The ring of 102 tokens takes 13 pages; in float16 there are the sink tokens, and the pages of 6 tokens.
    assert one.total == 13 * one.page + (1 + 2) * 2 * 2 * 8 * 32 * 2


@pytest.mark.parametrize(("quantizer", "token"), [("group:symmetric", 84), ("group:keys=token", 80), ("awq", 80)])
def test_bytes_of_a_token_follow_from_the_quantizer(quantizer, token):
    assert layer_nbytes(2, 32, cache_of().layout, "int4", quantizer).token == token


@pytest.mark.parametrize("backend", BACKENDS)
def test_truncation_reaches_any_page_boundary_and_into_pages_that_are_there_in_float16(backend):
    cache = cache_of(backend=backend)
    for layer in range(2):
        fill(cache, 60, layer)
    # Pages begin at 3, 11, ... 51, 59; in float16 there are the newest 5 + 8 tokens: whole from 51 on.
    with pytest.raises(ValueError, match=r"length must be 47 or more, or 43 where a page begins: .* got 45"):
        cache.truncate(45)
    cache.truncate(55)
    cache.truncate(43)
    assert cache.length(1) == 43
    cache.truncate(2)
    assert cache.length(0) == 2


@pytest.mark.parametrize("backend", BACKENDS)
def test_attend_refuses_queries_whose_pages_are_there_as_codes_only(backend):
    cache = cache_of(backend=backend)
    fill(cache, 60)
    assert cache.attend(0, tokens(6, 4)).shape == (6, 4, 32)
    with pytest.raises(ValueError, match="q must have tokens whose pages are still there in float16"):
        cache.attend(0, tokens(20, 4))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_fork_shares_pages_of_codes(backend):
    cache = cache_of(backend=backend)
    fill(cache, 50)
    before = cache.pools[1].nbytes
    fork = cache.fork()
    fill(fork, 8)
    assert cache.pools[1].nbytes == before + cache.pools[1].page_nbytes


SCALES = np.ones((2, 2, 32), np.float32)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"quantizer": "nonsense"}, ValueError, "quantizer must be group, hqq, awq, got 'nonsense'"),
        ({"quantizer": "group:size=3"}, ValueError, "quantizer's options must be .* got 'size=3'"),
        ({"quantizer": "group:group_size=48"}, ValueError, "group_size must be 32, 64, 128 or None, got 48"),
        ({"quantizer": "hqq:group_size=64"}, ValueError, "multiple of the quantizer's group of 64, got 32"),
        ({"quantizer": "hqq:keys=page"}, ValueError, "keys must be 'channel' or 'token', got 'page'"),
        ({"quantizer": "awq"}, ValueError, "quantizer 'awq' takes channel_scales"),
        ({"quantizer": 3}, TypeError, "quantizer must be a name, a Quantizer or None, got int"),
        ({"quantizer": "group", "dtype": "float16"}, ValueError, "quantizer must be None for dtype float16"),
        (
            {"quantizer": AWQQuantizer(channel_scales=SCALES[:1])},
            ValueError,
            "channel_scales must have shape",
        ),
    ],
    ids=str,
)
def test_a_bad_quantizer_is_named(options, error, message):
    with pytest.raises(error, match=message):
        cache_of(**options)


def test_head_dims_that_no_group_divides_are_refused():
    with pytest.raises(ValueError, match="head_dim must be a multiple of the quantizer's group of 32, got 80"):
        numbaflash.RingKVCache(1, 1, 80, capacity=10, dtype="int8")


def test_caches_of_a_batch_must_have_pages_of_one_format():
    caches = [cache_of(), cache_of(quantizer=GroupQuantizer(keys="token"))]
    batch = (np.stack([x, x]) for x in (tokens(1, 4), tokens(1), tokens(1)))
    with pytest.raises(ValueError, match="caches must agree in page_size and the quantizer's groups"):
        numbaflash.attention_batch(caches, 0, *batch)

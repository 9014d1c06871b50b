"""A cache's life beside its results: lengths, truncation, forks, sizes, arguments."""

from __future__ import annotations

import copy
import gc
import pickle

import ml_dtypes
import numpy as np
import pytest
from oracle import random_tokens

import numbaflash


def cache_of(**options):
    return numbaflash.RingKVCache(
        2, 2, 8, **{"capacity": 20, "page_size": 8, "rollback": 5, "dtype": "float32"} | options
    )


def tokens(count, heads=2, seed=0, head_dim=8):
    return random_tokens(np.random.default_rng(seed), count, heads, head_dim)


def fill(cache, count, layer=0):
    cache.append(layer, tokens(count), tokens(count))


@pytest.mark.parametrize(
    ("seen", "first"), [(0, 0), (2, 2), (3, 3), (10, 3), (20, 3), (21, 4), (100, 83)], ids=lambda value: str(value)
)
def test_first_is_the_oldest_visible_token_that_is_no_sink(seen, first):
    cache = cache_of(sink_tokens=3)
    fill(cache, seen)
    assert (cache.length(0), cache.first(0)) == (seen, first)


def test_layers_have_lengths_of_their_own():
    cache = cache_of()
    fill(cache, 7, layer=1)
    assert (cache.length(0), cache.length(1)) == (0, 7)


def test_memory_grows_with_the_tokens_and_stops_at_the_ring():
    cache = cache_of()
    page_nbytes = 2 * 2 * 8 * 8 * 4
    assert cache.nbytes == 0
    fill(cache, 1)
    assert cache.nbytes == page_nbytes
    fill(cache, 1000)
    fill(cache, 1000, layer=1)
    assert cache.nbytes == cache.max_nbytes == 2 * 4 * page_nbytes  # 25 tokens of ring in pages of 8, two layers


def test_truncate_reaches_back_as_far_as_rollback_and_no_further():
    cache = cache_of()
    for layer in range(2):
        fill(cache, 100, layer)
    with pytest.raises(ValueError, match="length must be at least 95, or layer 0's window would have holes; got 94"):
        cache.truncate(94)
    cache.truncate(95)
    assert [cache.length(layer) for layer in range(2)] == [95, 95]


def test_a_second_truncation_cannot_reach_what_the_first_has_given_up():
    cache = cache_of()
    fill(cache, 100, 0)
    fill(cache, 100, 1)
    cache.truncate(97)
    cache.truncate(95)
    with pytest.raises(ValueError, match="at least 95"):
        cache.truncate(94)


def test_truncate_beyond_a_layer_changes_nothing():
    cache = cache_of()
    fill(cache, 10, 0)
    fill(cache, 8, 1)
    with pytest.raises(ValueError, match="length must be at most 8, the tokens of layer 1; got 9"):
        cache.truncate(9)
    assert (cache.length(0), cache.length(1)) == (10, 8)


def test_a_cache_that_never_wrapped_truncates_to_nothing():
    cache = cache_of()
    fill(cache, 10, 0)
    fill(cache, 10, 1)
    cache.truncate(0)
    assert (cache.length(0), cache.first(0)) == (0, 0)


def test_attend_refuses_queries_whose_windows_are_overwritten():
    cache = cache_of()
    fill(cache, 100)
    assert cache.attend(0, tokens(6, heads=4)).shape == (6, 4, 8)
    with pytest.raises(ValueError, match="q must have at most 6 tokens"):
        cache.attend(0, tokens(7, heads=4))


def test_attend_refuses_more_queries_than_tokens():
    cache = cache_of()
    fill(cache, 3)
    with pytest.raises(ValueError, match="q must have at most the layer's 3 tokens, got 4"):
        cache.attend(0, tokens(4))


def test_a_fork_shares_every_page_until_one_side_writes():
    cache = cache_of()
    fill(cache, 20)
    before = cache.pools[0].nbytes
    fork = cache.fork()
    assert cache.pools[0].nbytes == before
    fill(fork, 1)
    assert cache.pools[0].nbytes == before + cache.pools[0].page_nbytes


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_a_copy_is_a_fork_that_outlives_its_original(copied):
    cache = cache_of()
    fill(cache, 12)
    (pool,) = cache.pools
    child, used, want = copied(cache), pool.nbytes, cache.attend(0, tokens(1))
    fill(child, 1)
    assert (cache.length(0), child.length(0)) == (12, 13)
    child.truncate(0)
    child = copied(cache)
    del cache
    gc.collect()
    np.testing.assert_array_equal(child.attend(0, tokens(1)), want)
    assert pool.nbytes == used


def test_pickling_says_how_a_cache_travels():
    with pytest.raises(TypeError, match=r"cannot be pickled: save\(path\) writes it, and load\(path\) reads it"):
        pickle.dumps(cache_of())


def test_pages_of_a_dead_fork_are_given_back():
    cache = cache_of()
    fill(cache, 20)
    before = cache.pools[0].nbytes
    fork = cache.fork()
    fill(fork, 20)
    del fork
    gc.collect()
    assert cache.pools[0].nbytes == before


def test_a_step_that_fails_leaves_the_cache_as_it_was(monkeypatch):
    cache = cache_of()
    fill(cache, 60)
    q, k, v = tokens(30, heads=4, seed=1), tokens(30, seed=2), tokens(30, seed=3)
    before = cache.attend(0, q[:5])

    def fail(*_args, **_kwargs):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(numbaflash.cache.float_steps, "attend_runs", fail)
        with pytest.raises(MemoryError):
            cache.step(0, q, k, v)

    assert cache.length(0) == 60
    np.testing.assert_array_equal(cache.attend(0, q[:5]), before)


def test_a_page_that_cannot_be_had_leaves_the_cache_as_it_was(monkeypatch):
    cache = cache_of()
    fill(cache, 4)
    acquire = cache.pools[0].acquire
    calls = []

    def fail_on_third():
        calls.append(None)
        if len(calls) == 3:
            raise MemoryError
        return acquire()

    monkeypatch.setattr(cache.pools[0], "acquire", fail_on_third)
    before = cache.nbytes
    with pytest.raises(MemoryError):
        fill(cache, 25)
    assert (cache.length(0), cache.nbytes, cache.pools[0].nbytes) == (4, before, before)


def test_values_too_large_for_the_storage_dtype_become_infinite_in_their_own_head_only():
    cache = cache_of(dtype="float16")
    k, v = tokens(4), tokens(4)
    v[2, 1, 0] = 1e6
    out = cache.step(0, tokens(4, seed=1), k, v)
    assert np.isfinite(out[:, 0]).all()
    assert np.isfinite(out[:2]).all()
    assert np.isinf(out[2:, 1, 0]).all()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"num_layers": 0}, ValueError, "num_layers must be 1 or more, got 0"),
        ({"num_layers": 1.0}, TypeError, "num_layers must be an int, got float"),
        ({"num_kv_heads": -1}, ValueError, "num_kv_heads must be 1 or more, got -1"),
        ({"head_dim": 257}, ValueError, "head_dim must be 1 to 256, got 257"),
        ({"capacity": 0}, ValueError, "capacity must be 1 or more, got 0"),
        ({"capacity": True}, TypeError, "capacity must be an int, got bool"),
        ({"sink_tokens": 20}, ValueError, "sink_tokens must be 0 to 19, got 20"),
        ({"page_size": 48}, ValueError, "page_size must be a power of two, got 48"),
        ({"page_size": 4}, ValueError, "page_size must be 8 to 256, got 4"),
        ({"rollback": -1}, ValueError, "rollback must be 0 or more, got -1"),
        ({"dtype": "float64"}, ValueError, "dtype must be float32, float16, bfloat16, int8 or int4, got 'float64'"),
        ({"dtype": "nonsense"}, ValueError, "dtype must be float32, float16, bfloat16, int8 or int4, got 'nonsense'"),
        ({"backend": "tpu"}, ValueError, "backend must be .* got 'tpu'"),
    ],
    ids=str,
)
def test_a_bad_argument_is_named(arguments, error, message):
    defaults = {"num_layers": 2, "num_kv_heads": 2, "head_dim": 8, "capacity": 20}
    with pytest.raises(error, match=message):
        numbaflash.RingKVCache(**defaults | arguments)


Q, KV = (3, 4, 8), (3, 2, 8)


@pytest.mark.parametrize(
    ("q", "k", "v", "message"),
    [
        ((3, 4), KV, KV, r"q must have shape \(tokens, q heads, 8\), got \(3, 4\)"),
        ((3, 4, 9), KV, KV, r"q must have shape \(tokens, q heads, 8\), got \(3, 4, 9\)"),
        ((3, 3, 8), KV, KV, "q must have a multiple of k's 2 heads, got 3"),
        (Q, (3, 3, 8), KV, r"k must have shape \(tokens, 2, 8\), got \(3, 3, 8\)"),
        (Q, KV, (3, 2, 7), r"v must have shape \(tokens, 2, 8\), got \(3, 2, 7\)"),
        (Q, KV, (2, 2, 8), r"v must have k's shape \(3, 2, 8\), got \(2, 2, 8\)"),
        (Q, (2, 2, 8), (2, 2, 8), "k must have q's 3 tokens, got 2"),
    ],
    ids=str,
)
def test_a_step_of_the_wrong_shape_is_refused_and_writes_nothing(q, k, v, message):
    cache = cache_of()
    with pytest.raises(ValueError, match=message):
        cache.step(0, *(np.zeros(shape, np.float32) for shape in (q, k, v)))
    assert (cache.length(0), cache.nbytes) == (0, 0)


@pytest.mark.parametrize(
    ("dtypes", "message"),
    [
        (("float64", "float64", "float64"), "q must be float32, float16 or bfloat16, got float64"),
        (("float32", "float16", "float32"), "k must have q's dtype float32, got float16"),
        (("int32", "int32", "int32"), "q must be float32, float16 or bfloat16, got int32"),
        ((">f4", ">f4", ">f4"), "q must be float32, float16 or bfloat16, got >f4"),
    ],
    ids=str,
)
def test_a_step_of_the_wrong_dtype_is_refused_and_writes_nothing(dtypes, message):
    cache = cache_of()
    with pytest.raises(TypeError, match=message):
        cache.step(0, *(np.zeros(shape, dtype) for shape, dtype in zip((Q, KV, KV), dtypes, strict=True)))
    assert cache.length(0) == 0


@pytest.mark.parametrize("layer", [-1, 2])
def test_a_layer_that_does_not_exist_is_refused(layer):
    q, kv = np.zeros(Q, np.float32), np.zeros(KV, np.float32)
    cache = cache_of()
    calls = [
        lambda: cache.step(layer, q, kv, kv),
        lambda: cache.append(layer, kv, kv),
        lambda: cache.attend(layer, q),
        lambda: cache.length(layer),
        lambda: cache.first(layer),
        lambda: numbaflash.attention_batch([cache], layer, q[None], kv[None], kv[None]),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=f"layer must be 0 to 1, got {layer}"):
            call()


def test_a_batch_refuses_caches_that_do_not_go_together():
    q, kv = np.zeros((2, *Q), np.float32), np.zeros((2, *KV), np.float32)
    cache = cache_of()
    for caches, error, message in [
        ([], ValueError, "caches must have at least one cache"),
        ([cache, cache], ValueError, "caches must not hold the same cache twice"),
        (cache, TypeError, "caches must be several RingKVCache objects, got RingKVCache"),
        ([cache, cache_of(dtype="float16")], ValueError, "caches must agree in kv heads, head_dim and dtype"),
        ([cache, None], TypeError, "caches must hold RingKVCache objects, got NoneType"),
        ([cache], ValueError, r"q must have shape \(1, tokens, q heads, 8\)"),
    ]:
        with pytest.raises(error, match=message):
            numbaflash.attention_batch(caches, 0, q, kv, kv)
    assert cache.length(0) == 0


def test_a_batch_with_a_layer_that_one_cache_lacks_changes_none_of_them():
    deep, shallow = cache_of(), numbaflash.RingKVCache(1, 2, 8, capacity=20, dtype="float32")
    with pytest.raises(ValueError, match="layer must be 0 to 0, got 1"):
        numbaflash.attention_batch(
            [deep, shallow], 1, np.zeros((2, *Q), np.float32), *(np.zeros((2, *KV), np.float32) for _ in range(2))
        )
    assert deep.length(1) == 0


def test_a_dtype_may_be_given_by_name_or_as_numpy_has_it():
    for dtype in ("bfloat16", ml_dtypes.bfloat16, np.dtype(ml_dtypes.bfloat16)):
        assert cache_of(dtype=dtype).dtype.name == "bfloat16"

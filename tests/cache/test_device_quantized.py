"""A quantized cache on a device beyond the laws: batches, launches, files, and what faults leave behind."""

from __future__ import annotations

import numpy as np
import pytest
from oracle import random_tokens
from quantized_oracle import expected_of_quantized

import numbaflash
from numbaflash.cuda import device as device_module

SHAPE = {
    "capacity": 30,
    "sink_tokens": 3,
    "page_size": 8,
    "rollback": 5,
    "dtype": "int4",
    "quantizer": "hqq:symmetric,keys=token",
}


def emulated(**changes):
    return numbaflash.RingKVCache(1, 2, 32, **{**SHAPE, "backend": "emulated", **changes})


def tokens_of(rng, count):
    return tuple(random_tokens(rng, count, heads, 32) for heads in (4, 2, 2))


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def assert_as_expected(cache, q, k, v, out):
    np.testing.assert_allclose(out, expected_of_quantized(cache, q, k, v)[-len(out) :], atol=2e-5)


def test_sessions_decoded_together_have_the_bits_of_each_alone(rng):
    together, alone = [], []
    for length in (0, 2, 10, 11, 40, 200):  # the next token fills a page in the third of them
        cache = emulated(capacity=150, rollback=4)
        cache.append(0, *tokens_of(rng, length)[1:])
        together.append(cache)
        alone.append(cache.fork())
    q, k, v = (np.stack(arrays) for arrays in zip(*(tokens_of(rng, 3) for _ in together), strict=True))

    out = numbaflash.attention_batch(together, 0, q, k, v)

    for i, cache in enumerate(alone):
        np.testing.assert_array_equal(out[i], cache.step(0, q[i], k[i], v[i]))


@pytest.mark.parametrize("length", [9, 10], ids=["inside a page", "where a page is filled"])
@pytest.mark.parametrize("sessions", [1, 3])
def test_a_decode_step_is_two_launches_however_many_sessions(launches, rng, sessions, length):
    caches = [emulated() for _ in range(sessions)]
    for cache in caches:
        cache.append(0, *tokens_of(rng, length)[1:])
    launches.clear()
    numbaflash.attention_batch(caches, 0, *(np.stack([x] * sessions) for x in tokens_of(rng, 1)))
    assert [report.kernel for report in launches] == ["code_decode", "finish_step"]


def test_a_prompt_is_two_launches_however_many_pages_it_fills(launches, rng):
    emulated().step(0, *tokens_of(rng, 60))
    assert [report.kernel for report in launches] == ["code_decode", "finish_step"]


@pytest.mark.parametrize(("saved", "loaded"), [("cpu", "emulated"), ("emulated", "cpu")])
def test_codes_are_the_same_to_the_bit_and_a_file_of_one_backend_goes_on_with_another(rng, tmp_path, saved, loaded):
    q, k, v = tokens_of(rng, 60)
    cache, twin = (emulated(backend=backend) for backend in (saved, loaded))
    for one in (cache, twin):
        for start in range(0, 50, 25):
            one.append(0, k[start : start + 25], v[start : start + 25])
    for page in range(3, 5):
        np.testing.assert_array_equal(*(one._layers[0].read_page(page) for one in (cache, twin)))
    cache.save(tmp_path / "cache")

    other = numbaflash.RingKVCache.load(tmp_path / "cache", backend=loaded)

    assert (other.length(0), other.first(0), other.nbytes) == (50, cache.first(0), cache.nbytes)
    assert_as_expected(other, q, k, v, other.step(0, q[50:], k[50:], v[50:]))


def refuse(*_args, **_kwargs):
    raise MemoryError("no more")


def fail_in_allocate(monkeypatch, _cache):
    monkeypatch.setattr(device_module.EmulatedDevice, "allocate", refuse)


def fail_for_want_of_pages(pool):
    return lambda monkeypatch, cache: monkeypatch.setattr(cache.pools[pool], "acquire", refuse)


def fail_in_copy_of_codes(monkeypatch, _cache):
    copy_in = device_module.EmulatedDevice.copy_in

    def fault(device, address, source, stream=None):
        if source.dtype == np.uint8:
            raise MemoryError("a fault")
        copy_in(device, address, source, stream)

    monkeypatch.setattr(device_module.EmulatedDevice, "copy_in", fault)


def fail_in_launch(number):
    def arrange(monkeypatch, _cache):
        launch, launched = device_module._EmulatedKernel.launch, []

        def fault(kernel, *args, **kwargs):
            launched.append(kernel.name)
            if len(launched) == number:
                raise MemoryError("a fault")
            launch(kernel, *args, **kwargs)

        monkeypatch.setattr(device_module._EmulatedKernel, "launch", fault)

    return arrange


FAULTS = {
    "allocate": fail_in_allocate,
    "pages of tokens": fail_for_want_of_pages(0),
    "pages of codes": fail_for_want_of_pages(1),
    "copy of codes": fail_in_copy_of_codes,
    "attention": fail_in_launch(1),
    "append": fail_in_launch(2),
}


@pytest.mark.parametrize("forked", [False, True])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_step_that_fails_leaves_the_cache_and_its_pages_as_they_were(monkeypatch, rng, fault, forked):
    q, k, v = tokens_of(rng, 60)
    cache = emulated()
    cache.append(0, k[:4], v[:4])
    child = cache.fork() if forked else None
    held = cache.nbytes, [pool.nbytes for pool in cache.pools]

    with monkeypatch.context() as patch:
        FAULTS[fault](patch, cache)
        with pytest.raises(MemoryError):
            cache.step(0, q[4:40], k[4:40], v[4:40])

    assert (cache.length(0), cache.nbytes, [pool.nbytes for pool in cache.pools]) == (4, *held)
    assert_as_expected(cache, q, k, v, cache.step(0, q[4:], k[4:], v[4:]))
    del child


def test_a_batch_with_one_bad_token_changes_none(rng):
    caches = [emulated() for _ in range(2)]
    q, k, v = (np.stack([x, x]) for x in tokens_of(rng, 20))
    numbaflash.attention_batch(caches, 0, q, k, v)
    held = [cache.nbytes for cache in caches]
    bad = k.copy()
    bad[1, 4, 1, 7] = np.nan
    with pytest.raises(ValueError, match=r"k must be finite in float16 to be quantized, .* token 4, head 1"):
        numbaflash.attention_batch(caches, 0, q, bad, v)
    assert [cache.length(0) for cache in caches] == [20, 20]
    assert [cache.nbytes for cache in caches] == held

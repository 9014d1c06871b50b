"""A cache on a device beyond the law that all caches obey: batches, forks, files, and what faults leave behind."""

from __future__ import annotations

import numpy as np
import pytest
from oracle import assert_close, expected_of_cache, random_tokens

import numbaflash
from numbaflash.cache.device_pages import DevicePagePool
from numbaflash.cache.device_place import device_place
from numbaflash.cuda import device as device_module
from numbaflash.cuda.paged_sequences import MAX_POSITION
from numbaflash.cuda.solve import Queue

SHAPE = {"capacity": 30, "sink_tokens": 3, "page_size": 8, "rollback": 5, "dtype": "float32"}


def emulated(**changes):
    return numbaflash.RingKVCache(1, 2, 8, **{**SHAPE, "backend": "emulated", **changes})


def tokens_of(rng, count, head_dim=8):
    return tuple(random_tokens(rng, count, heads, head_dim) for heads in (4, 2, 2))


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_fifty_sessions_decoded_together_have_the_bits_of_each_alone(rng):
    lengths = [*range(0, 98, 2), 600]
    together, alone = [], []
    for length in lengths:
        cache = emulated(capacity=700, rollback=4)
        cache.append(0, *tokens_of(rng, length)[1:])
        together.append(cache)
        alone.append(cache.fork())
    q, k, v = (np.stack(arrays) for arrays in zip(*(tokens_of(rng, 1) for _ in lengths), strict=True))

    out = numbaflash.attention_batch(together, 0, q, k, v)

    for i, cache in enumerate(alone):
        np.testing.assert_array_equal(out[i], cache.step(0, q[i], k[i], v[i]))


def test_rings_of_a_batch_may_differ_in_all_but_their_heads(rng):
    shapes = [{"page_size": 8}, {"page_size": 64, "capacity": 100}, {"sink_tokens": 0, "capacity": 7}]
    caches = [emulated(**shape) for shape in shapes]
    q, k, v = tokens_of(rng, 40)
    for cache in caches:
        cache.append(0, k[:37], v[:37])

    out = numbaflash.attention_batch(caches, 0, *(np.stack([x[37:]] * 3) for x in (q, k, v)))

    for cache, got in zip(caches, out, strict=True):
        layout = cache.layout
        want = expected_of_cache(q, k, v, capacity=layout.capacity, sink_tokens=layout.sink_tokens)
        assert_close(got, want[37:])


@pytest.mark.parametrize("first", ["cpu", "emulated"])
def test_caches_of_two_places_are_not_in_one_batch(rng, first):
    second = {"cpu": "emulated", "emulated": "cpu"}[first]
    arrays = (np.stack([x, x]) for x in tokens_of(rng, 1))
    with pytest.raises(ValueError, match=r"^caches must all .* got .*"):
        numbaflash.attention_batch([emulated(backend=first), emulated(backend=second)], 0, *arrays)


@pytest.mark.parametrize(("saved", "loaded"), [("cpu", "emulated"), ("emulated", "cpu"), ("emulated", "emulated")])
def test_a_file_of_one_backend_goes_on_with_another(rng, tmp_path, saved, loaded):
    q, k, v = tokens_of(rng, 60)
    cache = emulated(backend=saved, dtype="float16")
    cache.append(0, k[:50], v[:50])
    cache.save(tmp_path / "cache")

    other = numbaflash.RingKVCache.load(tmp_path / "cache", backend=loaded)

    assert (other.length(0), other.first(0), other.nbytes) == (50, cache.first(0), cache.nbytes)
    assert_close(*(form.step(0, q[50:], k[50:], v[50:]) for form in (other, cache)))


def test_a_fork_copies_a_page_only_when_one_side_writes_to_it(rng):
    cache = emulated()
    cache.append(0, *tokens_of(rng, 20)[1:])
    (pool,) = cache.pools
    before = pool.nbytes
    child = cache.fork()
    assert pool.nbytes == before
    child.append(0, *tokens_of(rng, 1)[1:])
    assert pool.nbytes == before + pool.page_nbytes
    del child
    assert pool.nbytes == before


def test_pages_are_out_of_few_allocations_and_never_more_than_all_rings_take(monkeypatch, rng):
    slabs = []
    grow = DevicePagePool._grow

    def watch(pool, missing, stream):
        slabs.append(missing)
        grow(pool, missing, stream)

    monkeypatch.setattr(DevicePagePool, "_grow", watch)
    cache = numbaflash.RingKVCache(4, 2, 8, **SHAPE, backend="emulated")
    (pool,) = cache.pools
    for count in (1, 20, 50):
        for layer in range(4):
            cache.append(layer, *tokens_of(rng, count)[1:])

    pages = pool.nbytes // pool.page_nbytes
    assert pages == 20
    assert len(slabs) <= 6  # each as large as all before: 1, 1, 2, 4, 8 and the rest
    assert pool.taken_nbytes <= cache.max_nbytes == cache.nbytes == pool.nbytes


def test_pages_that_another_cache_gave_back_are_zeros(rng):
    first = emulated()
    (pool,) = first.pools
    first.append(0, *tokens_of(rng, 30)[1:])
    device = device_place("emulated").device
    pages = pool.acquire(3, device.default_stream)
    for page in pages:
        device.fill(page, pool.page_nbytes, 0xFF)
        pool.release(page)

    again = pool.acquire(3, device.default_stream)

    assert set(again) == set(pages)
    for page in again:
        content = np.empty(pool.page_nbytes, np.uint8)
        device.copy_out(content, page)
        assert not content.any()
        pool.release(page)


def fail_in_allocate(monkeypatch, _cache):
    def refuse(*_args, **_kwargs):
        raise MemoryError("no device memory")

    monkeypatch.setattr(device_module.EmulatedDevice, "allocate", refuse)
    return MemoryError


def fail_in_launch(number):
    def arrange(monkeypatch, _cache):
        launches = []
        launch = device_module._EmulatedKernel.launch

        def fault(kernel, *args, **kwargs):
            launches.append(kernel.name)
            if len(launches) == number:
                raise numbaflash.emulator.EmulatorError("a fault", kind="bounds", place=None)
            launch(kernel, *args, **kwargs)

        monkeypatch.setattr(device_module._EmulatedKernel, "launch", fault)
        return numbaflash.emulator.EmulatorError

    return arrange


@pytest.mark.parametrize("forked", [False, True])
@pytest.mark.parametrize(
    "arrange", [fail_in_allocate, fail_in_launch(1), fail_in_launch(2)], ids=["allocate", "attend", "append"]
)
def test_a_step_that_fails_leaves_the_cache_as_it_was(monkeypatch, rng, arrange, forked):
    q, k, v = tokens_of(rng, 60)
    cache = emulated()
    cache.append(0, k[:20], v[:20])
    (pool,) = cache.pools
    child = cache.fork() if forked else None
    held = cache.nbytes, pool.nbytes

    with monkeypatch.context() as patch:
        error = arrange(patch, cache)
        with pytest.raises(error):
            cache.step(0, q[20:55], k[20:55], v[20:55])

    assert (cache.length(0), cache.nbytes, pool.nbytes) == (20, *held)
    want = expected_of_cache(q, k, v, capacity=30, sink_tokens=3)
    assert_close(cache.step(0, q[20:], k[20:], v[20:]), want[20:])
    del child


@pytest.mark.parametrize(("backend", "dtype"), [("cpu", "float32"), ("cpu", "int8"), ("emulated", "float32")])
def test_a_batch_whose_last_cache_has_no_page_left_changes_none(monkeypatch, rng, backend, dtype):
    shape = {**SHAPE, "sink_tokens": 0, "dtype": dtype, "backend": backend}
    caches = [numbaflash.RingKVCache(1, 2, 32, **shape) for _ in range(3)]
    for cache in caches:
        cache.append(0, *tokens_of(rng, 8, 32)[1:])  # the next token takes a new page
    held = [(cache.nbytes, [pool.nbytes for pool in cache.pools]) for cache in caches]
    news = [tokens_of(rng, 1, 32) for _ in caches]
    q, k, v = (np.stack(arrays) for arrays in zip(*news, strict=True))

    def refuse(*_args):
        raise MemoryError("no page")

    with monkeypatch.context() as patch:
        patch.setattr(caches[-1].pools[0], "acquire", refuse)
        with pytest.raises(MemoryError):
            numbaflash.attention_batch(caches, 0, q, k, v)

    assert [cache.length(0) for cache in caches] == [8, 8, 8]
    assert [(cache.nbytes, [pool.nbytes for pool in cache.pools]) for cache in caches] == held
    numbaflash.attention_batch(caches, 0, q, k, v)
    assert [cache.length(0) for cache in caches] == [9, 9, 9]


def test_a_sequence_longer_than_positions_reach_is_refused(rng):
    cache = emulated()
    cache._layers[0].ring.length = MAX_POSITION
    with pytest.raises(ValueError, match=rf"at most {MAX_POSITION} tokens on a device"):
        cache.step(0, *tokens_of(rng, 1))
    assert cache.length(0) == MAX_POSITION


def interrupt_the_copy_back(monkeypatch, cache, *tokens):
    """Break a step off when its tokens are written and its output is not there yet."""

    def interrupt(*_args):
        raise KeyboardInterrupt

    length = cache.length(0)
    with monkeypatch.context() as patch:
        patch.setattr(Queue, "fetch", interrupt)
        with pytest.raises(KeyboardInterrupt):
            cache.step(0, *tokens)
    assert cache.length(0) == length


def test_a_step_that_fails_after_its_tokens_were_written_costs_as_many_of_the_rollback(monkeypatch, rng):
    q, k, v = tokens_of(rng, 60)
    cache, twin = emulated(), emulated()
    for one in (cache, twin):
        one.append(0, k[:50], v[:50])
    interrupt_the_copy_back(monkeypatch, cache, q[50:52], k[50:52], v[50:52])
    with pytest.raises(ValueError, match="length must be at least 47"):
        cache.truncate(45)  # five are promised; the failed step's two are lost
    cache.truncate(47)
    twin.truncate(47)
    np.testing.assert_array_equal(cache.step(0, q[47:], k[47:], v[47:]), twin.step(0, q[47:], k[47:], v[47:]))


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_a_cache_that_lost_its_window_to_a_failed_step_says_so_and_computes_nothing_wrong(monkeypatch, rng, dtype):
    q, k, v = tokens_of(rng, 100, head_dim=32)
    cache = numbaflash.RingKVCache(1, 2, 32, **{**SHAPE, "dtype": dtype}, backend="emulated")
    other = cache.fork()
    cache.append(0, k[:50], v[:50])
    interrupt_the_copy_back(monkeypatch, cache, q[50:], k[50:], v[50:])
    with pytest.raises(RuntimeError, match="layer 0 has lost tokens of its window"):
        cache.step(0, q[50:51], k[50:51], v[50:51])
    both = (np.stack([one[50:51]] * 2) for one in (q, k, v))
    with pytest.raises(RuntimeError, match="layer 0 has lost tokens"):
        numbaflash.attention_batch([other, cache], 0, *both)
    assert (other.length(0), cache.length(0)) == (0, 50)

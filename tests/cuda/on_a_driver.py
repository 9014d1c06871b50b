"""What must hold on a CUDA driver; `test_gpu.py` runs it on one that has the emulator behind it.

Everything here goes through NVIDIA's own cuda.core and cuda.bindings, and Numba's device arrays.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import types

import cuda.core
import flash
import numpy as np
import pytest
from cuda.core.utils import StridedMemoryView
from numba import cuda as numba_cuda

import numbaflash
from benchmarks.gpu_day.timing import Clock
from numbaflash import device_arrays
from numbaflash.backends import choose_backend
from numbaflash.cache import device_place
from numbaflash.cuda import callers, gpu
from numbaflash.cuda.solve import Queue

LEGACY = 1


@pytest.fixture
def calls(driver):
    """What the driver was asked to do; at the end all memory must have been freed."""
    driver.calls.clear()
    scratch = device_place.device_place("cuda")._scratch
    scratch._buffer = None
    before = len(driver.live)
    yield driver.calls
    scratch._buffer = None  # it is kept for the next call
    assert len(driver.live) == before
    assert not [call for call in driver.calls if call[0] in ("missing", "failed")]


@pytest.fixture
def replays():
    """The graphs of the device: none yet."""
    found = gpu.cuda_device(0).replays
    found._graphs.clear()
    found.count, found.enabled = 0, True
    yield found
    found.enabled = True


def problem(head_dim=64, q_tokens=40):
    rng = np.random.default_rng(0)
    shapes = ((1, q_tokens, 4, head_dim), (1, 150, 2, head_dim), (1, 150, 2, head_dim))
    return tuple(rng.standard_normal(shape).astype(np.float16) for shape in shapes)


def names(calls):
    return [call[0] for call in calls]


OPTIONS = [
    {},
    {"causal": True, "kv_lengths": [77], "bias": np.zeros((40, 150), np.float32), "alibi_slopes": [0.1] * 4},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_host_arrays_give_the_emulators_bits(calls, options):
    q, k, v = problem()
    assert choose_backend(None, array=q) == "cuda"
    out, lse = numbaflash.attention(q, k, v, **options, return_lse=True)
    want, want_lse = numbaflash.attention(q, k, v, **options, return_lse=True, backend="emulated")
    np.testing.assert_array_equal(out, want)
    np.testing.assert_array_equal(lse, want_lse)
    assert calls


def test_shared_memory_is_allowed_once_and_never_lowered(calls):
    q, k, v = problem(head_dim=128)  # 64 KiB
    for _ in range(2):
        numbaflash.attention(q, k, v, backend="cuda")
    assert names(calls).count("allow shared") == 1
    assert names(calls).count("load") == 1
    assert names(calls).count("launch") == 2
    kernel = next(kernel for kernel in gpu.cuda_device(0)._kernels.values() if kernel._max_shared == 65536)
    kernel.allow_shared(50_000)
    assert names(calls).count("allow shared") == 1
    with pytest.raises(ValueError, match="loaded for 65536 bytes"):
        kernel.launch(1, 32, shared=65537)


def test_numbas_device_arrays_are_read_where_they_lie(calls):
    arrays = [numba_cuda.to_device(array) for array in problem()]
    numbaflash.attention(*arrays)
    calls.clear()
    out = numbaflash.attention(*arrays)
    assert names(calls) == ["launch"]
    assert isinstance(out, type(arrays[0]))
    np.testing.assert_array_equal(out.copy_to_host(), numbaflash.attention(*problem(), backend="emulated"))


def test_numbers_on_the_gpu_are_read_in_the_streams_order(calls):
    q, k, v = problem()
    lengths = np.array([100], np.int32)
    out = numbaflash.attention(q, k, v, kv_lengths=numba_cuda.to_device(lengths))
    np.testing.assert_array_equal(out, numbaflash.attention(q, k, v, kv_lengths=lengths, backend="emulated"))
    with pytest.raises(ValueError, match="kv_lengths must lie in 0 to 150"):
        numbaflash.attention(q, k, v, kv_lengths=numba_cuda.to_device(lengths + 100))
    assert calls


class Ours:
    """A CUDA array that `numba_cuda` made, in the clothes of another library."""

    def __init__(self, array, stream=None):
        self.array = array
        self.shape, self.dtype = array.shape, array.dtype
        self.__cuda_array_interface__ = {**array.__cuda_array_interface__, "stream": stream}


def test_work_on_another_stream_is_waited_for(calls):
    q, k, v = map(numba_cuda.to_device, problem())
    queue = Queue(gpu.cuda_device(0), gpu.cuda_device(0).create_stream())
    producer = int(queue.stream.core.handle)
    calls.clear()
    out = numbaflash.attention(q, Ours(k, stream=producer), v)
    recorded = next(call for call in calls if call[0] == "record")
    waited = next(call for call in calls if call[0] == "wait")
    assert recorded == ("record", waited[2], producer)
    assert waited[1] in (0, LEGACY)
    assert calls.index(waited) < names(calls).index("launch")
    np.testing.assert_array_equal(out.copy_to_host(), numbaflash.attention(*problem(), backend="emulated"))


def test_cupys_current_stream_and_its_own_results_are_used(calls, monkeypatch):
    stream = gpu.cuda_device(0).create_stream()
    handle = int(stream.core.handle)

    class Array(Ours):
        device = contextlib.nullcontext()

    Array.__module__ = "cupy"
    cupy = types.ModuleType("cupy")
    cupy.empty = lambda shape, dtype: Array(numba_cuda.device_array(shape, dtype))
    cupy.cuda = types.SimpleNamespace(get_current_stream=lambda: types.SimpleNamespace(ptr=handle))
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    q, k, v = (Array(numba_cuda.to_device(array)) for array in problem())
    calls.clear()
    out, lse = numbaflash.attention(q, k, v, return_lse=True)
    assert isinstance(out, Array)
    assert isinstance(lse, Array)
    assert [call[-1] for call in calls if call[0] == "launch"] == [handle]
    assert "copy in" not in names(calls)
    np.testing.assert_array_equal(out.array.copy_to_host(), numbaflash.attention(*problem(), backend="emulated"))


class Foreign:
    """An array of a library that speaks DLPack alone."""

    def __init__(self, exported):
        self._exported = exported

    def __dlpack__(self, **options):
        return self._exported.__dlpack__(**options)

    def __dlpack_device__(self):
        return self._exported.__dlpack_device__()

    def __array_namespace__(self):
        return types.SimpleNamespace(from_dlpack=Foreign)


def test_any_library_with_dlpack_gets_its_own_arrays_back(calls):
    device = gpu.cuda_device(0)
    queue = Queue(device, device.default_stream)
    with device.current():
        placed = [queue.place(array) for array in problem()]
    arrays = [Foreign(gpu.exported(array)) for array in placed]
    assert device_arrays.is_on_gpu(arrays[0])
    calls.clear()
    out = numbaflash.attention(*arrays)
    assert names(calls)[-2:] == ["launch", "synchronize"]
    assert "copy in" not in names(calls)
    found = StridedMemoryView.from_dlpack(out, stream_ptr=LEGACY)
    host = queue.read(device_arrays.view(out, "out"))
    assert host.shape == tuple(found.shape)
    np.testing.assert_array_equal(host, numbaflash.attention(*problem(), backend="emulated"))


def test_the_tests_of_kernels_and_the_clock_of_benchmarks_use_the_device(calls):
    q, k, v = problem()
    out, lse = flash.solved(q, k, v)
    want, want_lse = numbaflash.attention(q, k, v, return_lse=True, backend="emulated")
    np.testing.assert_array_equal(out, want)
    np.testing.assert_array_equal(lse, want_lse)
    assert "launch" in names(calls)
    calls.clear()

    def fails(_call):
        raise RuntimeError("no such backend")

    clock = Clock(gpu.cuda_device(0), 1 << 12)
    measured = clock.measure({"nothing": lambda _call: None, "fails": fails}, calls=2, rounds=3)
    assert measured["nothing"].device == pytest.approx(2.5e-3 / 2)
    assert str(measured["fails"]) == "no such backend"
    assert "fill" in names(calls)


CACHE = {"capacity": 60, "sink_tokens": 4, "page_size": 16}


def cached(place, backend, *, then=lambda cache: cache, **changes):
    """Return the results of some steps, and of one more by what `then` makes of the cache."""
    q, k, v = (array[0] for array in problem(q_tokens=150))
    cache = numbaflash.RingKVCache(1, 2, 64, **CACHE | changes, backend=backend)
    outs = []
    for start, stop in ((0, 100), (100, 101), (101, 149)):
        outs.append(cache.step(0, *(place(x[start:stop]) for x in (q, k, v))))
    last = then(cache).step(0, *(place(x[149:]) for x in (q, k, v)))
    return [*outs, last]


def test_a_cache_on_the_gpu_gives_the_emulators_bits_and_all_of_its_memory_back(calls):
    got = cached(lambda array: array, "cuda")
    for one, other in zip(got, cached(lambda array: array, "emulated"), strict=True):
        np.testing.assert_array_equal(one, other)
    assert names(calls).count("load") == 3  # tensor cores, for one token and for many; the append


def test_a_cache_reads_and_gives_device_arrays_without_a_copy(calls):
    arrays = [numba_cuda.to_device(array[0, :1]) for array in problem()]
    cache = numbaflash.RingKVCache(1, 2, 64, **CACHE)
    assert cache.backend == "cuda"
    cache.step(0, *arrays)
    calls.clear()
    out = cache.step(0, *arrays)
    assert isinstance(out, type(arrays[0]))
    assert names(calls).count("launch") == 2
    # The records of the launch, and nothing else.
    assert names(calls).count("copy in") == 1
    assert "copy out" not in names(calls)


def test_a_quantized_cache_takes_device_arrays_through_the_host_and_gives_the_emulators_bits(calls):
    got = cached(numba_cuda.to_device, "cuda", dtype="int4")
    assert names(calls).count("copy out") >= 2 * 4  # keys and values of each step
    for one, other in zip(got, cached(lambda array: array, "emulated", dtype="int4"), strict=True):
        np.testing.assert_array_equal(one.copy_to_host(), other)


def test_a_cache_that_changes_streams_waits_for_what_the_last_one_was_given(calls, replays, monkeypatch):
    replays.enabled = False
    cache = numbaflash.RingKVCache(1, 2, 64, **CACHE, backend="cuda")
    arrays = [array[0, :1] for array in problem()]
    cache.step(0, *arrays)
    other = gpu.cuda_device(0).create_stream()
    handle = int(other.core.handle)
    monkeypatch.setattr(device_place, "caller_stream", lambda *_: other)
    calls.clear()
    cache.step(0, *arrays)
    waits = [call for call in calls if call[0] == "wait" and call[1] == handle]
    assert waits
    assert calls.index(waits[0]) < names(calls).index("launch")
    assert {call[-1] for call in calls if call[0] == "launch"} == {handle}


def decoded(backend, *, steps, lengths=(700, 90), dtype="float16", **options):
    """Return the results of so many steps of caches of some lengths, two tokens each; the last ones are lone ones."""
    rng = np.random.default_rng(0)
    shape = {"capacity": 900, "sink_tokens": 4, "dtype": dtype, "backend": backend}
    caches = [numbaflash.RingKVCache(1, 2, 64, **shape) for _ in lengths]
    for cache, length in zip(caches, lengths, strict=True):
        cache.append(0, *(rng.standard_normal((length, 2, 64)).astype(np.float16) for _ in range(2)))
    outs = []
    for _ in range(steps):
        q, k, v = (rng.standard_normal((len(caches), 2, heads, 64)).astype(np.float16) for heads in (4, 2, 2))
        outs.append(numbaflash.attention_batch(caches, 0, q, k, v, **options))
    return outs


def assert_same_bits(outs, others):
    for one, other in zip(outs, others, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("options", [{}, {"alibi_slopes": [0.1] * 4, "sink_logits": [1.0] * 4, "softcap": 3.0}])
def test_steps_that_come_again_are_replayed_with_the_same_bits(calls, replays, options):
    outs = decoded("cuda", steps=8, **options)
    assert names(calls).count("capture") == 1
    # The memory that they share has its size at the second step, whose launches come again at the third.
    assert replays.count == names(calls).count("replay") >= 5
    replayed, replays.enabled = replays.count, False
    assert_same_bits(outs, decoded("cuda", steps=8, **options))
    assert_same_bits(outs, decoded("emulated", steps=8, **options))
    assert replays.count == replayed


@pytest.mark.parametrize(("dtype", "lengths"), [("float16", (700, 500, 300, 900, 640)), ("int8", (70,) * 17)])
def test_a_grid_that_is_filled_up_gives_the_bits_of_one_that_is_not(calls, replays, dtype, lengths):
    shape = {"steps": 4, "lengths": lengths, "dtype": dtype}
    outs = decoded("cuda", **shape)
    assert replays.count
    blocks = max(call[2][0] for call in calls if call[0] == "launch" and call[1].endswith("decode"))
    replays.enabled = False
    assert_same_bits(outs, decoded("emulated", **shape))
    assert blocks > len(lengths)


def test_a_driver_that_takes_no_graphs_is_asked_once(driver, calls, replays):
    driver.refuses_graphs = True
    try:
        outs = decoded("cuda", steps=6)
    finally:
        driver.refuses_graphs = False
    assert not replays.enabled
    assert "replay" not in names(calls)
    assert_same_bits(outs, decoded("emulated", steps=6))


def test_arrays_at_other_addresses_are_not_replayed(calls, replays):
    cache = numbaflash.RingKVCache(1, 2, 64, **CACHE, backend="cuda")
    for _ in range(4):
        fresh = [numba_cuda.to_device(array[0, :1]) for array in problem()]
        cache.step(0, *fresh)
    assert "replay" not in names(calls)
    assert replays.count == 0


def test_device_arrays_at_the_same_addresses_are_replayed(calls, replays, monkeypatch):
    arrays = [numba_cuda.to_device(array[0, :1]) for array in problem()]
    out = numba_cuda.device_array((1, 4, 64), np.float16)
    monkeypatch.setattr(callers, "empty_like", lambda *_: out)
    caches = [numbaflash.RingKVCache(1, 2, 64, **CACHE, backend=backend) for backend in ("cuda", "emulated")]
    for _ in range(30):  # over the end of a page
        caches[0].step(0, *arrays)
        want = caches[1].step(0, *(array.copy_to_host() for array in arrays))
        np.testing.assert_array_equal(out.copy_to_host(), want)
    assert replays.count == names(calls).count("replay") > 25


def test_a_call_while_another_has_the_memory_that_they_share_takes_its_own(calls):
    place = device_place.device_place("cuda")
    with place.device.current(), place._scratch.lent(place.device.default_stream) as lent:
        outs = decoded("cuda", steps=4)
    assert lent.wanted == 0
    assert calls
    assert_same_bits(outs, decoded("emulated", steps=4))


def test_caches_that_are_used_together_are_waited_for_by_one_event(calls):
    caches = [numbaflash.RingKVCache(1, 2, 64, **CACHE, backend="cuda") for _ in range(9)]
    q, k, v = (np.repeat(array[:, :1], 9, axis=0) for array in problem())
    for _ in range(2):
        calls.clear()
        numbaflash.attention_batch(caches, 0, q, k, v)
    # The pages', and that of the memory which calls share.
    assert (names(calls).count("wait"), names(calls).count("record")) == (2, 2)


def test_forks_work_in_threads_that_have_no_context(calls):
    results = []

    def fork_elsewhere(cache):
        thread = threading.Thread(target=lambda: results.append(cache.fork()))
        thread.start()
        thread.join()
        return results.pop()

    got = cached(lambda array: array, "cuda", then=fork_elsewhere)
    np.testing.assert_array_equal(got[-1], cached(lambda array: array, "emulated")[-1])
    assert calls


def test_too_large_an_array_is_a_memory_error_and_leaves_nothing_behind(calls):
    q, k, v = problem()
    wide = np.broadcast_to(q[:, :1], (1, 1 << 21, 4, 64))  # its copy would take 1 GiB
    with pytest.raises(MemoryError, match="bytes of device memory"):
        numbaflash.attention(wide, k, v, backend="cuda")
    assert "launch" not in names(calls)


def test_a_thread_without_a_context_gets_one_and_another_context_comes_back(driver, calls):
    q, k, v = problem()
    results = []
    thread = threading.Thread(target=lambda: results.append(numbaflash.attention(q, k, v, backend="cuda")))
    thread.start()
    thread.join()
    np.testing.assert_array_equal(results[0], numbaflash.attention(q, k, v, backend="emulated"))
    driver.current = 0xABC0
    numbaflash.attention(q, k, v, backend="cuda")
    assert driver.current == 0xABC0
    driver.current = 0
    assert calls


def test_the_device_keeps_the_interface(calls):
    device = gpu.cuda_device(0)
    assert (device.name, device.compute_capability, device.multiprocessors) == ("Emulated GPU", (8, 0), 108)
    with device.current():
        a, b = device.allocate(64), device.allocate(0)
        assert b.nbytes == 0
        stream = device.create_stream()
        device.fill(a.address, 64, 7, stream)
        device.copy(a.address + 32, a.address, 32)
        found = np.zeros(64, np.uint8)
        device.copy_out(found, a.address, stream)
        assert (found == 7).all()
        with pytest.raises(ValueError, match="C-contiguous"):
            device.copy_in(a.address, np.zeros((4, 4))[:, ::2])
        start, end = stream.record(), stream.record()
        device.default_stream.wait(end)
        end.synchronize()
        assert end.seconds_since(start) == pytest.approx(2.5e-3)
        device.synchronize()
        assert device.foreign_stream(0).core is cuda.core.LEGACY_DEFAULT_STREAM
        assert device.foreign_stream(2).core is cuda.core.PER_THREAD_DEFAULT_STREAM
        a.close()
        a.close()
    assert calls

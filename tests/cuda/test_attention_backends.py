"""`numbaflash.attention` by the GPU's host path, on the emulated device: every option, arrays of any library."""

from __future__ import annotations

import ctypes
from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np
import pytest
import torch
from oracle import assert_close, expected, random_tokens

import numbaflash
from numbaflash import backends, device_arrays
from numbaflash.arrays import as_numpy
from numbaflash.cuda import gpu, solve
from numbaflash.cuda.device import EmulatedDevice
from numbaflash.device_arrays import DeviceArray, view
from numbaflash.problem import FLOAT16, describe


def tokens(*, q_tokens=70, kv_tokens=150, batch=2, q_heads=4, kv_heads=2, head_dim=64, value_dim=None, dtype="float16"):
    rng = np.random.default_rng(3)
    value_dim = value_dim or head_dim
    return tuple(
        random_tokens(rng, batch, *shape, dtype=np.dtype(dtype))
        for shape in ((q_tokens, q_heads, head_dim), (kv_tokens, kv_heads, head_dim), (kv_tokens, kv_heads, value_dim))
    )


RNG = np.random.default_rng(4)
BIAS = RNG.standard_normal((4, 70, 150)).astype(np.float32)
SLOPES = np.geomspace(0.5, 0.05, 4).astype(np.float32)
SINKS = np.linspace(-1, 2, 4).astype(np.float32)
OPTIONS = {
    "plain": {},
    "window": {"window": (20, 5)},
    "softcap": {"softcap": 2.0},
    "bias of one row and head": {"bias": BIAS[:1, :1].astype(np.float16)},
    "bool bias": {"bias": np.broadcast_to(RNG.random((2, 1, 70, 150)) < 0.7, (2, 4, 70, 150))},
    "alibi of each batch entry": {"alibi_slopes": np.stack([SLOPES, 2 * SLOPES])},
    "sinks": {"sink_logits": SINKS.tolist()},
    "lengths": {"kv_lengths": [110, 0]},
    "all": {
        "causal": True,
        "window": (60, None),
        "softcap": 3.0,
        "bias": BIAS,
        "alibi_slopes": SLOPES,
        "sink_logits": SINKS,
        "kv_lengths": np.array([150, 77]),
    },
}


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_means_what_it_means_on_the_cpu(name):
    q, k, v = tokens()
    out, lse = numbaflash.attention(q, k, v, **OPTIONS[name], return_lse=True, backend="emulated")
    want, want_lse = expected(q, k, v, **OPTIONS[name])
    assert out.dtype == q.dtype
    assert lse.dtype == np.float32
    assert_close(out, want)
    np.testing.assert_allclose(lse, want_lse, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(("head_dim", "value_dim"), [(50, 50), (1, 3), (64, 129)])
def test_head_dims_that_kernels_have_not_are_padded(head_dim, value_dim):
    q, k, v = tokens(q_tokens=33, kv_tokens=65, head_dim=head_dim, value_dim=value_dim)
    out = numbaflash.attention(q, k, v, causal=True, backend="emulated")
    assert out.shape == (*q.shape[:3], value_dim)
    assert_close(out, expected(q, k, v, causal=True)[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_torch_tensors_of_any_strides_come_back_as_torch_tensors(dtype):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 4, 40, 64, generator=generator).to(dtype).transpose(1, 2) for _ in range(3))
    out, lse = numbaflash.attention(q, k, v, window=(20, 5), return_lse=True, backend="emulated")
    want, want_lse = expected(*(as_numpy(x, "x") for x in (q, k, v)), window=(20, 5))
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    assert_close(as_numpy(out, "out"), want)
    np.testing.assert_allclose(lse, want_lse, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("shape", [{"q_tokens": 0}, {"batch": 0}, {"kv_tokens": 0}])
def test_nothing_to_attend_gives_zeros_or_nothing(shape):
    q, k, v = tokens(**shape)
    out, lse = numbaflash.attention(q, k, v, return_lse=True, backend="emulated")
    assert out.shape == q.shape
    assert not out.any()
    assert np.isneginf(lse).all()


def test_threads_may_call_at_the_same_time():
    problems = [tokens(q_tokens=n, kv_tokens=64, batch=1) for n in (5, 40, 64, 80)]

    def run(arrays):
        return numbaflash.attention(*arrays, backend="emulated")

    with ThreadPoolExecutor(4) as pool:
        for together, arrays in zip(pool.map(run, problems), problems, strict=True):
            np.testing.assert_array_equal(together, run(arrays))


# ---- what is wrong is said before anything runs


@pytest.fixture
def no_device(monkeypatch):
    def touched(*_, **__):
        raise AssertionError("the device was touched")

    monkeypatch.setattr(EmulatedDevice, "load", touched)
    monkeypatch.setattr(EmulatedDevice, "allocate", touched)


BAD = [
    ({"causal": 1}, TypeError, "causal must be a bool"),
    ({"window": (-1, None)}, ValueError, "window's left side"),
    ({"softcap": -1.0}, ValueError, "softcap must be"),
    ({"bias": np.zeros((3, 3), np.float32)}, ValueError, "bias must broadcast"),
    ({"bias": np.zeros(150)}, TypeError, "bias must be float32"),
    ({"alibi_slopes": [1.0]}, ValueError, "alibi_slopes must have shape"),
    ({"sink_logits": np.zeros(3, np.float32)}, ValueError, "sink_logits must have shape"),
    ({"kv_lengths": [151, 3]}, ValueError, "kv_lengths must lie in 0 to 150"),
    ({"algorithm": "v3"}, ValueError, "algorithm must be 'standard', 'v1', 'v2'"),
]


@pytest.mark.usefixtures("no_device")
@pytest.mark.parametrize(("options", "error", "says"), BAD, ids=[next(iter(case[0])) for case in BAD])
def test_bad_options_raise_before_the_device_is_touched(options, error, says):
    with pytest.raises(error, match=says):
        numbaflash.attention(*tokens(), **options, backend="emulated")


@pytest.mark.usefixtures("no_device")
def test_arrays_that_do_not_fit_raise_before_the_device_is_touched():
    q, k, v = tokens()
    for bad, error, says in (
        ((q[0], k, v), ValueError, "q must have 4 axes"),
        ((q, k[:1], v), ValueError, "k must have q's batch size"),
        ((q, k.astype(np.float32), v), TypeError, "k must have q's dtype"),
        ((q[:, :, :3], k, v), ValueError, "q must have a multiple of k's 2 heads"),
        ((q, k, v.tolist()), TypeError, "v must be a NumPy array"),
    ):
        with pytest.raises(error, match=says):
            numbaflash.attention(*bad, backend="emulated")


@pytest.mark.usefixtures("no_device")
@pytest.mark.parametrize("algorithm", solve.ALGORITHMS)
def test_every_algorithm_raises_before_the_device_is_touched(algorithm):
    q, k, v = tokens()
    with pytest.raises(ValueError, match="bias must broadcast"):
        numbaflash.attention(q, k, v, bias=np.zeros(3, np.float32), algorithm=algorithm, backend="emulated")
    with pytest.raises(TypeError, match="k must have q's dtype"):
        numbaflash.attention(q, k.astype(np.float32), v, algorithm=algorithm, backend="emulated")


@pytest.mark.usefixtures("no_device")
def test_what_no_kernel_solves_is_named_with_what_they_take(monkeypatch):
    q, k, v = tokens()
    monkeypatch.setattr(solve, "ALGORITHMS", {"v2": solve.Solver((FLOAT16,), solve.ALGORITHMS["v2"].run)})
    with pytest.raises(ValueError, match="algorithm is 'v1'; the kernels for GPUs take 'v2'"):
        numbaflash.attention(q, k, v, algorithm="v1", backend="emulated")
    with pytest.raises(ValueError, match="q has dtype float32; algorithm 'v2' on a GPU takes float16"):
        numbaflash.attention(*(x.astype(np.float32) for x in (q, k, v)), backend="emulated")
    many = np.zeros((65536, 1, 1, 8), np.float16)
    with pytest.raises(ValueError, match="q has batch size 65536; a GPU takes at most 65535"):
        numbaflash.attention(many, many, many, backend="emulated")


# ---- which backend


def test_a_gpu_is_chosen_where_there_is_one_or_where_q_lives_on_one(monkeypatch):
    host, device = np.zeros(1), OnGpu(0, (1,), None, np.dtype("f2"))
    monkeypatch.setattr(backends, "has_usable_gpu", lambda: False)
    assert backends.choose_backend(None, array=host) == "cpu"
    assert backends.choose_backend(None, array=device) == "cuda"
    monkeypatch.setattr(backends, "has_usable_gpu", lambda: True)
    assert backends.choose_backend(None, array=host) == "cuda"
    assert backends.choose_backend(None, ("cpu",)) == "cpu"


def test_cuda_without_a_driver_says_so(monkeypatch):
    def absent(name):
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", absent)
    gpu.cuda_device.cache_clear()
    with pytest.raises(RuntimeError, match="backend 'cuda' needs GPU number 0: there is no NVIDIA driver"):
        numbaflash.attention(*tokens(), backend="cuda")


def test_an_array_on_a_gpu_is_no_matter_for_the_emulator():
    q, k, v = tokens()
    with pytest.raises(ValueError, match="k must be in host memory for backend 'emulated', got an array on a GPU"):
        numbaflash.attention(q, OnGpu(0, k.shape, None, k.dtype), v, backend="emulated")


# ---- arrays that are in device memory already


class OnGpu:
    """An array of a library that speaks `__cuda_array_interface__`; in these tests its memory is the emulator's."""

    def __init__(self, address, shape, strides, dtype, **more):
        self.__cuda_array_interface__ = {
            "version": 3,
            "data": (address, False),
            "shape": shape,
            "strides": strides,
            "typestr": dtype.str,
            **more,
        }


@pytest.fixture
def queue():
    device = EmulatedDevice()
    return solve.Queue(device, device.default_stream)


@pytest.fixture
def put(queue):
    """Puts an array of any strides into device memory, `offset` bytes behind an aligned address."""
    kept = []

    def put(array, offset=0):
        low, high = np.lib.array_utils.byte_bounds(array)
        raw = np.frombuffer((ctypes.c_ubyte * (high - low)).from_address(low), np.uint8)
        buffer = queue.device.allocate(high - low + offset)
        kept.append(buffer)
        queue.device.copy_in(buffer.address + offset, raw)
        start = buffer.address + offset + array.ctypes.data - low
        return OnGpu(start, array.shape, array.strides, array.dtype)

    return put


def run(queue, q, k, v, **options):
    viewed = {name: view(array, name) for name, array in (("q", q), ("k", k), ("v", v))}
    problem = describe(*viewed.values(), **options)
    out = queue.empty((problem.batch, problem.q_tokens, problem.q_heads, problem.value_dim), problem.dtype)
    solve.solve(queue, problem, *viewed.values(), out, None, "v2")
    return queue.read(out)


def test_arrays_in_device_memory_are_read_where_they_lie(queue, put):
    q, k, v = tokens()
    apart = [np.ascontiguousarray(x.transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3) for x in (q, k, v)]
    placed = [put(x) for x in apart]
    for array in placed:
        viewed = view(array, "x")
        assert queue.readable(queue.place(viewed)) is viewed
    assert_close(run(queue, *placed), expected(q, k, v)[0])


@pytest.mark.parametrize("offset", [0, 2])
def test_rows_that_kernels_cannot_read_are_copied(queue, put, offset):
    q, k, v = tokens(q_tokens=9, kv_tokens=33, head_dim=20)
    reversed_keys = np.ascontiguousarray(k[:, ::-1, :, ::-1])[
        :, ::-1, :, ::-1
    ]  # negative strides, of the last axis too
    assert_close(run(queue, put(q, offset), put(reversed_keys, offset), put(v, offset)), expected(q, k, v)[0])


def test_a_bias_in_device_memory_is_broadcast_and_not_written_out(queue, put):
    q, k, v = tokens()
    bias = view(put(BIAS[:, :1]), "bias")
    out = run(queue, put(q), k, v, bias=bias)
    assert_close(out, expected(q, k, v, bias=BIAS[:, :1])[0])
    assert bias.broadcast_to((2, 4, 70, 150)).strides == (0, BIAS.strides[0], 0, 4)
    with pytest.raises(ValueError, match="bias must broadcast"):
        run(queue, q, k, v, bias=view(put(BIAS[:3]), "bias"))


def test_small_arrays_are_read_to_the_host_whatever_their_strides(queue, put):
    numbers = np.arange(24, dtype=np.int32).reshape(4, 6)
    for array in (numbers, numbers[::-1, 1::2], numbers.T, numbers[:0]):
        placed = put(array) if array.size else OnGpu(0, array.shape, array.strides, array.dtype)
        np.testing.assert_array_equal(queue.read(view(placed, "x")), array)


def test_an_interface_without_strides_is_contiguous_and_one_with_a_mask_is_refused():
    array = view(OnGpu(512, (2, 3, 4), None, np.dtype("f4"), stream=7), "x")
    assert (array.strides, array.stream, array.dtype) == ((48, 16, 4), 7, np.float32)
    assert view(OnGpu(512, (), None, np.dtype("f4")), "x").strides == ()
    with pytest.raises(ValueError, match="x must have no mask"):
        view(OnGpu(512, (2,), None, np.dtype("f4"), mask=object()), "x")


def test_memory_that_is_not_the_hosts_or_a_gpus_is_refused():
    assert not device_arrays.is_on_gpu(torch.zeros(1, device="meta"))
    with pytest.raises(ValueError, match="x must be in host memory"):
        view(torch.zeros(1, device="meta"), "x")
    assert isinstance(view(OnGpu(512, (1,), None, np.dtype("f4")), "x"), DeviceArray)


@pytest.mark.parametrize("algorithm", ["standard", "v1", "v2"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_lowest_finite_bias_forbids_no_key(dtype, algorithm):
    q, k, v = tokens(dtype=dtype, batch=1)
    bias = np.zeros((70, 150), dtype)
    bias[0] = bias[1, 5:] = ml_dtypes.finfo(dtype).min
    out = numbaflash.attention(q, k, v, bias=bias, algorithm=algorithm, backend="emulated")
    assert_close(out, expected(q, k, v, bias=bias)[0])

"""Arrays of any library in, the same library's out."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch

import numbaflash
from numbaflash.arrays import as_numpy, like

TORCH_DTYPES = {torch.float32: np.float32, torch.float16: np.float16, torch.bfloat16: ml_dtypes.bfloat16}


class ForeignArray:
    """An array of a library that numbaflash has never heard of: DLPack and a namespace, nothing else."""

    def __init__(self, array):
        self._array = array

    def __dlpack__(self, **options):
        return self._array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self._array.__dlpack_device__()

    def __array_namespace__(self):
        return ForeignNamespace


class ForeignNamespace:
    @staticmethod
    def from_dlpack(array):
        return ForeignArray(array)


@pytest.mark.parametrize("dtype", TORCH_DTYPES, ids=str)
def test_a_torch_tensor_is_viewed_not_copied(dtype):
    tensor = torch.arange(6).reshape(2, 3).to(dtype)
    array = as_numpy(tensor, "q")
    assert array.dtype == TORCH_DTYPES[dtype]
    assert array.ctypes.data == tensor.data_ptr()
    back = like(tensor, array)
    assert back.dtype == dtype
    assert back.data_ptr() == tensor.data_ptr()
    assert torch.equal(back, tensor)


@pytest.mark.parametrize("dtype", TORCH_DTYPES, ids=str)
def test_attention_of_torch_tensors_is_a_torch_tensor_with_numpys_values(dtype):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 9, 4, 16, generator=generator).to(dtype).transpose(1, 2) for _ in range(3))
    out, lse = numbaflash.attention(q, k, v, causal=True, return_lse=True)
    want, want_lse = numbaflash.attention(*(as_numpy(x, "x") for x in (q, k, v)), causal=True, return_lse=True)
    assert out.dtype == dtype
    assert lse.dtype == torch.float32
    np.testing.assert_array_equal(as_numpy(out, "out"), want)
    np.testing.assert_array_equal(lse.numpy(), want_lse)


def test_a_cache_takes_and_returns_torch_tensors():
    cache = numbaflash.RingKVCache(1, 2, 8, capacity=16)
    q, k, v = torch.randn(5, 4, 8), torch.randn(5, 2, 8), torch.randn(5, 2, 8)
    out = cache.step(0, q, k, v)
    assert isinstance(out, torch.Tensor)
    assert torch.equal(cache.attend(0, q), out)


def test_an_unknown_librarys_array_comes_back_as_its_own():
    q = np.random.default_rng(0).standard_normal((1, 3, 2, 8)).astype(np.float32)
    out = numbaflash.attention(*(ForeignArray(q) for _ in range(3)))
    assert isinstance(out, ForeignArray)
    np.testing.assert_array_equal(np.from_dlpack(out), numbaflash.attention(q, q, q))


def test_a_tensor_that_requires_grad_is_refused_unless_grad_is_off():
    q = torch.zeros(1, 1, 1, 8, requires_grad=True)
    with pytest.raises(ValueError, match=r"q must not require grad .* use q.detach\(\) or no_grad\(\)"):
        numbaflash.attention(q, q, q)
    with torch.no_grad():
        assert numbaflash.attention(q, q, q).shape == q.shape


def test_what_is_no_array_is_refused():
    q = np.zeros((1, 1, 1, 8), np.float32)
    with pytest.raises(TypeError, match=r"k must be a NumPy array or have __dlpack__, got builtins\.list"):
        numbaflash.attention(q, q.tolist(), q)


def test_an_array_on_another_device_is_refused():
    class OnDevice:
        def __dlpack__(self, **_):
            raise AssertionError("must not be called")

        def __dlpack_device__(self):
            return (2, 0)  # kDLCUDA

    class CudaOnly:
        __cuda_array_interface__ = {}  # noqa: RUF012 (the protocol is an attribute)

    q = np.zeros((1, 1, 1, 8), np.float32)
    with pytest.raises(ValueError, match=r"k must be in host memory for backend 'cpu', got device \(2, 0\)"):
        numbaflash.attention(q, OnDevice(), q)
    with pytest.raises(ValueError, match="v must be in host memory for backend 'cpu', got a CUDA array"):
        numbaflash.attention(q, q, CudaOnly())
    with pytest.raises(ValueError, match="q must be in host memory for backend 'cpu', got device meta"):
        numbaflash.attention(torch.zeros(1, 1, 1, 8, device="meta"), q, q)


@pytest.mark.parametrize(
    "odd",
    [
        lambda x: x.to_sparse(),
        lambda x: x.to(torch.complex64).conj(),
        lambda x: torch.view_as_complex(torch.stack((x, x), -1)).conj().imag,
        lambda x: x.to(torch.float8_e4m3fn),
        lambda x: x.bfloat16().to_sparse(),
    ],
    ids=["sparse", "conjugated", "negated", "float8", "sparse bfloat16"],
)
def test_a_tensor_that_is_more_than_its_elements_in_memory_is_refused_by_name(odd):
    q = torch.ones(1, 1, 1, 8)
    with pytest.raises(TypeError, match="k must be a tensor that NumPy can view, got torch"):
        numbaflash.attention(q, odd(q), q)


def test_a_masked_array_is_refused():
    q = np.ones((1, 1, 1, 8), np.float32)
    with pytest.raises(TypeError, match="k must have no mask of its own, got a masked array"):
        numbaflash.attention(q, np.ma.masked_array(q, mask=q > 0), q)


def test_a_library_that_takes_no_dlpack_gets_numpys_array_and_the_step_is_taken_once():
    class Wrapper:
        def __init__(self, array):
            self.__dlpack__, self.__dlpack_device__ = array.__dlpack__, array.__dlpack_device__

    cache = numbaflash.RingKVCache(1, 2, 8, capacity=16)
    q = np.ones((3, 2, 8), np.float32)
    out = cache.step(0, *(Wrapper(q) for _ in range(3)))
    assert isinstance(out, np.ndarray)
    assert cache.length(0) == 3

"""Arrays in the memory of a GPU: where they lie, whoever made them, without a copy; and new ones of the same library.

torch, CuPy and Numba are known by name: they make their own results, on their current stream. Anything else comes in by
`__dlpack__` or `__cuda_array_interface__` (version 3), and gets its results by DLPack.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from .arrays import as_numpy, torch_of

__all__ = ["AnyArray", "DeviceArray", "current_stream", "empty_like", "is_on_gpu", "library_of", "view"]

_DLPACK_CUDA = (2, 13)  # kDLCUDA, kDLCUDAManaged
LEGACY_STREAM = 1
"""CUDA's default stream, by the number that both protocols give it."""


@dataclass(frozen=True, eq=False)
class DeviceArray:
    """Where an array lies in device memory.

    Attributes:
        address: Of its first element.
        shape: Elements along each axis.
        strides: Bytes from one element to the next along each axis.
        dtype: NumPy's, ml_dtypes' for bfloat16.
        owner: What keeps the memory alive.
        device: Number of the GPU, None where only the address tells.
        stream: CUstream whose work so far must be waited for before the array is read, None for none.
    """

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: np.dtype[Any]
    owner: object = None
    device: int | None = None
    stream: int | None = None

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    def broadcast_to(self, shape: tuple[int, ...]) -> DeviceArray:
        """Return a view of another shape, by NumPy's rules.

        Raises:
            ValueError: It does not broadcast to that shape.
        """
        new = len(shape) - self.ndim
        if new < 0 or any(own not in (1, wanted) for own, wanted in zip(self.shape, shape[new:], strict=True)):
            raise ValueError(f"shape {self.shape} does not broadcast to {shape}")
        kept = (0 if own == 1 else step for own, step in zip(self.shape, self.strides, strict=True))
        strides = ((0,) * new) + tuple(kept)
        return DeviceArray(self.address, shape, strides, self.dtype, self.owner, self.device, self.stream)


AnyArray: TypeAlias = NDArray[Any] | DeviceArray
"""An array where it lies, as `view` returns it."""


def contiguous_strides(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """Return the strides in bytes of a C-contiguous array."""
    strides = [itemsize]
    for length in shape[:0:-1]:
        strides.append(strides[-1] * length)
    return tuple(reversed(strides)) if shape else ()


def is_on_gpu(array: Any) -> bool:
    """Say whether an array lives in the memory of a CUDA device."""
    if isinstance(array, np.ndarray):
        return False
    if torch_of(array) is not None:
        return bool(array.is_cuda)
    if hasattr(array, "__cuda_array_interface__"):
        return True
    return hasattr(array, "__dlpack_device__") and array.__dlpack_device__()[0] in _DLPACK_CUDA


def view(array: Any, name: str) -> NDArray[Any] | DeviceArray:
    """View an array of any library where it lies: as NumPy's in host memory, as a `DeviceArray` on a GPU.

    Args:
        array: A NumPy array, or anything with `__cuda_array_interface__` or `__dlpack__`.
        name: The argument's name, for the error.

    Raises:
        TypeError: It is no array.
        ValueError: It lives on a device that is no GPU, has a mask, or is part of an autograd graph.
    """
    if not is_on_gpu(array):
        return as_numpy(array, name)
    if library_of(array) == "torch":
        return _view_of_torch(array, name)
    if library_of(array) in ("cupy", "numba") or not hasattr(array, "__dlpack__"):
        return _view_of_interface(array, name)
    return _view_of_dlpack(array)


def current_stream(array: Any) -> int:
    """Return the CUstream on which its library expects work on the array to be queued."""
    if library_of(array) == "torch":
        import torch

        return int(torch.cuda.current_stream(array.device).cuda_stream)
    if library_of(array) == "cupy":
        return int(sys.modules["cupy"].cuda.get_current_stream().ptr)
    return LEGACY_STREAM


def empty_like(template: Any, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Any | None:
    """Return a new array of the library and on the GPU of `template`, for work on the library's current stream.

    None where the library has no way to make one that is known here.
    """
    library = library_of(template)
    if library == "torch":
        import torch

        return torch.empty(shape, dtype=getattr(torch, dtype.name), device=template.device)
    if library == "cupy":
        with template.device:
            return sys.modules["cupy"].empty(shape, dtype)
    if library == "numba":
        from numba import cuda

        return cuda.device_array(shape, dtype)
    return None


def library_of(array: Any) -> str:
    """Return the name of the package that an array's type comes from; "torch" for subclasses of its tensor as well."""
    if torch_of(array) is not None:
        return "torch"
    return type(array).__module__.partition(".")[0]


def _view_of_torch(tensor: Any, name: str) -> DeviceArray:
    import torch

    if tensor.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name} must not require grad (there is no backward pass): use {name}.detach() or no_grad()")
    dtype = np.dtype(str(tensor.dtype).removeprefix("torch."))
    strides = tuple(step * dtype.itemsize for step in tensor.stride())
    return DeviceArray(tensor.data_ptr(), tuple(tensor.shape), strides, dtype, tensor, tensor.device.index)


def _view_of_interface(array: Any, name: str) -> DeviceArray:
    facts = array.__cuda_array_interface__
    if facts.get("mask") is not None:
        raise ValueError(f"{name} must have no mask; its __cuda_array_interface__ has one")
    # bfloat16 has no typestr of its own ("<V2"): the array's dtype knows better.
    dtype = getattr(array, "dtype", None)
    dtype = dtype if isinstance(dtype, np.dtype) else np.dtype(facts["typestr"])
    shape = tuple(facts["shape"])
    strides = facts.get("strides") or contiguous_strides(shape, dtype.itemsize)
    return DeviceArray(facts["data"][0], shape, tuple(strides), dtype, array, stream=facts.get("stream"))


def _view_of_dlpack(array: Any) -> DeviceArray:
    from cuda.core.utils import StridedMemoryView

    found = StridedMemoryView.from_dlpack(array, stream_ptr=LEGACY_STREAM)
    shape, itemsize = tuple(found.shape), found.dtype.itemsize
    counts = found.strides
    strides = contiguous_strides(shape, itemsize) if counts is None else tuple(step * itemsize for step in counts)
    return DeviceArray(found.ptr, shape, strides, found.dtype, found, found.device_id)

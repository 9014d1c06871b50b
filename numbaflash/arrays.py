"""Arrays of any library in, the same library's arrays out, without a copy wherever the memory allows it.

NumPy has no bfloat16 of its own and DLPack cannot hand NumPy one, so bfloat16 travels as `ml_dtypes.bfloat16`; for
torch through a 16-bit integer view of the same memory.
"""

from __future__ import annotations

import sys
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

__all__ = ["as_numpy", "like", "namespace_of", "torch_of"]

_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def as_numpy(array: Any, name: str) -> NDArray[Any]:
    """View an array of any library as NumPy's, sharing its memory.

    Args:
        array: A NumPy array or anything with `__dlpack__` whose memory is on the CPU.
        name: The argument's name, for the error.

    Raises:
        TypeError: It is no array, or one that is more than its elements in memory.
        ValueError: It lives on another device, or is part of an autograd graph.
    """
    if type(array) is np.ndarray:
        return array  # at once, for steps come here several times
    if isinstance(array, np.ma.MaskedArray):
        raise TypeError(f"{name} must have no mask of its own, got a masked array: pass its data, and a bias")
    if isinstance(array, np.ndarray):
        return array
    if (torch := torch_of(array)) is not None:
        return _torch_as_numpy(torch, array, name)
    if hasattr(array, "__dlpack__"):
        if array.__dlpack_device__()[0] != 1:  # kDLCPU
            raise ValueError(f"{name} must be in host memory for backend 'cpu', got device {array.__dlpack_device__()}")
        try:
            return np.from_dlpack(array)
        except (BufferError, RuntimeError, TypeError):  # a dtype that NumPy's DLPack does not know, such as bfloat16
            return np.asarray(array)
    if hasattr(array, "__cuda_array_interface__"):
        raise ValueError(f"{name} must be in host memory for backend 'cpu', got a CUDA array ({_type_name(array)})")
    raise TypeError(f"{name} must be a NumPy array or have __dlpack__, got {_type_name(array)}")


def like(template: Any, result: NDArray[Any]) -> Any:
    """Hand `result` over as an array of the library that `template` comes from, sharing the memory.

    As NumPy's where that library has no function to take it.
    """
    if isinstance(template, np.ndarray):
        return result
    if (torch := torch_of(template)) is not None:
        if result.dtype == _BFLOAT16:
            return torch.from_numpy(result.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(result)
    take = getattr(namespace_of(template), "asarray" if result.dtype == _BFLOAT16 else "from_dlpack", None)
    return take(result) if take else result


def namespace_of(array: Any) -> Any:
    """Return the module with the functions of an array's library."""
    if hasattr(array, "__array_namespace__"):
        return array.__array_namespace__()
    return sys.modules[type(array).__module__.partition(".")[0]]


def torch_of(array: Any) -> Any:
    """Return the module of PyTorch where the array is a tensor of its own or of a subclass, else None."""
    torch = sys.modules.get("torch")
    return torch if torch is not None and isinstance(array, torch.Tensor) else None


def _torch_as_numpy(torch: Any, tensor: Any, name: str) -> NDArray[Any]:
    if not tensor.is_cpu:
        raise ValueError(f"{name} must be in host memory for backend 'cpu', got device {tensor.device}")
    if tensor.requires_grad:
        if torch.is_grad_enabled():
            raise ValueError(
                f"{name} must not require grad (there is no backward pass): use {name}.detach() or no_grad()"
            )
        tensor = tensor.detach()
    is_bfloat16 = tensor.dtype == torch.bfloat16
    try:
        array: NDArray[Any] = tensor.view(torch.int16).numpy() if is_bfloat16 else tensor.numpy()
    except (RuntimeError, TypeError) as error:  # sparse, conjugated, within vmap, of a dtype that NumPy lacks, ...
        raise TypeError(f"{name} must be a tensor that NumPy can view, got {tensor.dtype}: {error}") from None
    return array.view(_BFLOAT16) if is_bfloat16 else array


def _type_name(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"

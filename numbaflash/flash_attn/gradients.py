"""Tensors that require grad go forward, and a backward pass through the result says that there is none."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

__all__ = ["forward_only"]


def forward_only(compute: Callable[[], Any], *arrays: Any) -> Any:
    """Return `compute()`; where one of the arrays is a torch tensor that takes part in autograd, the result does too.

    Raises:
        NotImplementedError: Not here, but in a backward pass through the result.
    """
    torch = sys.modules.get("torch")
    if torch is None or not torch.is_grad_enabled():
        return compute()
    tensors = [array for array in arrays if isinstance(array, torch.Tensor) and array.requires_grad]
    if not tensors:
        return compute()
    return _forward_only().apply(compute, *tensors)


@functools.cache
def _forward_only() -> Any:
    import torch

    class ForwardOnly(torch.autograd.Function):
        @staticmethod
        def forward(_context: Any, compute: Callable[[], Any], *_tensors: Any) -> Any:
            return compute()

        @staticmethod
        def backward(_context: Any, *_gradients: Any) -> Any:
            raise NotImplementedError(
                "numbaflash has no backward pass: call it under torch.no_grad(), or train with "
                "torch.nn.functional.scaled_dot_product_attention"
            )

    return ForwardOnly

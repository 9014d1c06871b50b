"""What this device can do at most: the products that cuBLAS makes of large matrices, and copies within its memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .parts import Row
from .timing import Clock, Timing, clock

__all__ = ["copy_gbytes", "matrix_tflops", "measure_ceilings", "torch_on"]


def measure_ceilings(emulated: bool) -> Iterator[Row]:
    """Yield the rate of a matrix product in each dtype, and of a copy, bytes read and written."""
    ticking = clock(emulated)
    for dtype in ("float16", "bfloat16", "float32"):
        yield {"what": f"matrix product, {dtype}", "rate": matrix_tflops(ticking, dtype, emulated), "unit": "TFLOP/s"}
    yield {"what": "copy", "rate": copy_gbytes(ticking, emulated), "unit": "GB/s"}


def copy_gbytes(ticking: Clock, emulated: bool) -> float:
    """Measure a copy within the device's memory: bytes read and written a second, 1e9 of them."""
    torch = torch_on(emulated)
    nbytes = 1 << (12 if emulated else 30)
    source, target = (torch.ones(nbytes, dtype=torch.uint8, device=place(emulated)) for _ in range(2))
    return 2e-9 * nbytes / _seconds(ticking.measure({"copy": lambda _: target.copy_(source)})["copy"])


def matrix_tflops(ticking: Clock, dtype: str, emulated: bool) -> float:
    """Measure the product of two square matrices of random numbers."""
    torch = torch_on(emulated)
    size = 32 if emulated else 8192
    a, b = (torch.randn(size, size, device=place(emulated)).to(getattr(torch, dtype)) for _ in range(2))
    return 2e-12 * size**3 / _seconds(ticking.measure({"product": lambda _: a @ b})["product"])


def torch_on(emulated: bool) -> Any:
    """Return torch, which has CUDA.

    Raises:
        RuntimeError: It has not.
    """
    import torch

    if not (emulated or torch.cuda.is_available()):
        raise RuntimeError(f"torch {torch.__version__} has no CUDA device")
    return torch


def place(emulated: bool) -> str:
    """Name torch's device that stands for the one that kernels run on."""
    return "cpu" if emulated else "cuda"


def _seconds(timing: Timing | Exception) -> float:
    if isinstance(timing, Exception):
        raise timing
    return timing.device

"""Machines by what bounds attention on them: arithmetic, memory bandwidth, memory."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from .cpu.stream import read_memory

__all__ = ["GPUS", "THIS_MACHINE", "Hardware", "find_hardware", "measure_this_machine"]

THIS_MACHINE = "this-machine"
_TERA, _GIGA = 1e12, 1e9


@dataclass(frozen=True)
class Hardware:
    """A machine.

    Attributes:
        name: By which it is chosen.
        flops: Most FLOP/s: of a GPU dense products of 16-bit elements, summed in float32.
        bandwidth: Most bytes/s between memory and chip.
        memory: Bytes of memory; a datasheet's GB are 10^9, a few percent less than the card has.
    """

    name: str
    flops: float
    bandwidth: float
    memory: int

    @property
    def ridge(self) -> float:
        """FLOP/byte from which on arithmetic is the bound."""
        return self.flops / self.bandwidth


def _gpu(name: str, teraflops: float, gigabytes_per_second: float, gigabytes: int) -> Hardware:
    return Hardware(name, teraflops * _TERA, gigabytes_per_second * _GIGA, gigabytes * int(_GIGA))


# Where a datasheet gives the tensor cores' rate with sparsity, half of that is dense.
GPUS = (
    # "NVIDIA A100 Tensor Core GPU" datasheets: of the 40 GB cards that of May 2020, of 80 GB that of June 2021.
    _gpu("A100-40GB-SXM", 312, 1555, 40),
    _gpu("A100-40GB-PCIe", 312, 1555, 40),
    _gpu("A100-80GB-SXM", 312, 2039, 80),
    _gpu("A100-80GB-PCIe", 312, 1935, 80),
    # "NVIDIA H100 Tensor Core GPU" datasheet: 1,979 TFLOPS with sparsity, 1,513 as a PCIe card.
    _gpu("H100-SXM", 989.5, 3350, 80),
    _gpu("H100-PCIe", 756.5, 2000, 80),
    # "NVIDIA H200 Tensor Core GPU" datasheet: 1,979 TFLOPS with sparsity.
    _gpu("H200-SXM", 989.5, 4800, 141),
    # "NVIDIA L4 Tensor Core GPU" datasheet: 242 TFLOPS with sparsity.
    _gpu("L4", 121, 300, 24),
    # "NVIDIA Ada GPU Architecture" whitepaper, appendix A: 165.2 TFLOPS summed in float32, without sparsity.
    _gpu("RTX-4090", 165.2, 1008, 24),
)


def find_hardware(name: str, known: Sequence[Hardware] = GPUS) -> Hardware:
    """Return the hardware of that name, in capitals or not.

    Raises:
        ValueError: There is none.
    """
    for hardware in known:
        if hardware.name.lower() == name.lower():
            return hardware
    raise ValueError(f"hardware must be one of {', '.join(hardware.name for hardware in known)}; got {name!r}")


def measure_this_machine() -> Hardware:
    """Measure how fast memory is read, and the float32 matrix product of NumPy's BLAS: about two seconds."""
    stored = np.ones(1 << 26, np.float32)
    square = np.ones((2048, 2048), np.float32)
    product = np.empty_like(square)
    return Hardware(
        THIS_MACHINE,
        flops=2 * len(square) ** 3 / _least_seconds(lambda: np.matmul(square, square, out=product)),
        bandwidth=stored.nbytes / _least_seconds(lambda: read_memory(stored)),
        memory=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
    )


def _least_seconds(function: Callable[[], object], runs: int = 6) -> float:
    seconds = []
    for _ in range(runs):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return min(seconds)

"""The CUDA driver: which GPUs there are, and its calls by way of cuda.bindings.

Nothing of NVIDIA's is imported before it is needed, so that this module is there on any machine.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from .tools import find_tool

__all__ = [
    "LEAST_COMPUTE_CAPABILITY",
    "Gpu",
    "bindings",
    "checked",
    "find_gpus",
    "find_usable_gpu",
    "has_usable_gpu",
    "ordinal_of",
]

LEAST_COMPUTE_CAPABILITY = (8, 0)
"""What the kernels need: `cp.async`, and the MMAs of bfloat16 and TF32."""


@dataclass(frozen=True)
class Gpu:
    """A CUDA device of this machine.

    Attributes:
        ordinal: Its number.
        name: For people.
        compute_capability: (major, minor).
    """

    ordinal: int
    name: str
    compute_capability: tuple[int, int]


def find_gpus() -> tuple[list[Gpu], str]:
    """Return the CUDA devices, and a sentence about the search."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return [], "there is no NVIDIA driver (libcuda.so.1) on this machine"
    try:
        from cuda.core import Device as CoreDevice
    except ImportError:
        return [], "there is an NVIDIA driver, but cuda-core is not installed"
    try:
        devices = CoreDevice.get_all_devices()
    except Exception as error:  # whatever a broken driver raises is what the user wants to read
        return [], f"there is an NVIDIA driver, but it does not answer: {error}"
    gpus = []
    for ordinal, device in enumerate(devices):
        major, minor = device.compute_capability
        gpus.append(Gpu(ordinal, device.name, (major, minor)))
    return gpus, f"found {len(gpus)} by the NVIDIA driver"


def ordinal_of(address: int) -> int | None:
    """Return the number of the GPU that an address of device memory belongs to; None for 0, an empty array's."""
    if not address:
        return None
    driver = bindings()
    attribute = driver.CUpointer_attribute.CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL
    return int(checked(driver.cuPointerGetAttribute(attribute, address)))


def find_usable_gpu() -> tuple[Gpu | None, str]:
    """Return the first GPU where kernels run on it, and a sentence that says why or why not."""
    gpus, note = find_gpus()
    if not gpus:
        return None, f"no GPU was found: {note}"
    gpu = gpus[0]
    if gpu.compute_capability < LEAST_COMPUTE_CAPABILITY:
        return None, "{} has compute capability {}.{}; the kernels need 8.0 or newer".format(
            gpu.name, *gpu.compute_capability
        )
    compilers = {"numba-cuda": find_spec("numba_cuda"), "ptxas": find_tool("ptxas")}  # of the extra `cuda`
    absent = [name for name, found in compilers.items() if not found]
    if absent:
        return None, f"{gpu.name} is there, but {' and '.join(absent)} not: pip install 'numbaflash[cuda]'"
    return gpu, f"there is a GPU for it: {gpu.name}"


@functools.cache
def has_usable_gpu() -> bool:
    """Say whether kernels run on the first GPU; looked for once in a process."""
    return find_usable_gpu()[0] is not None


def bindings() -> Any:
    """Return the module of the driver's calls; each returns a tuple for `checked`."""
    from cuda.bindings import driver

    return driver


def checked(returned: Any) -> Any:
    """Return the result of a driver's call, or raise its error as a RuntimeError."""
    code, *values = returned
    if code:
        raise RuntimeError(f"the CUDA driver returned {code.name}")
    return values[0] if values else None

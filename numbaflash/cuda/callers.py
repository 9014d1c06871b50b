"""The caller's side of a call: the stream on which its arrays are ready, and results as arrays of its library."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from numbaflash.arrays import like, namespace_of
from numbaflash.device_arrays import DeviceArray, current_stream, empty_like, is_on_gpu, view

from .device import Stream
from .driver import ordinal_of
from .gpu import CudaDevice, exported
from .solve import Queue

__all__ = ["Result", "caller_stream", "common_ordinal"]


def caller_stream(gpu: CudaDevice, leader: Any, arrays: Sequence[DeviceArray]) -> Stream:
    """Return the stream to work on, which waits for what the arrays wait for.

    Args:
        gpu: Where the arrays are.
        leader: One of them as the caller gave it, whose library has a current stream; None where all are on the host.
        arrays: All that are on the GPU.
    """
    stream = gpu.default_stream if leader is None else gpu.foreign_stream(current_stream(leader))
    for array in arrays:
        if array.stream is not None:
            stream.wait(gpu.foreign_stream(array.stream).record())
    return stream


class Result:
    """An array that is written on the device and handed over as one of the caller's library, where the caller has it.

    Args:
        queue: Where it is written.
        template: An array of the caller's.
        shape: Of the result.
        dtype: Likewise.

    Attributes:
        array: Where kernels write it: contiguous.
    """

    def __init__(self, queue: Queue, template: Any, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self._queue, self._template = queue, template
        if not is_on_gpu(template):
            self._theirs = None
            self.array: Any = queue.temporary(shape, dtype)
            self._host: NDArray[Any] = np.empty(shape, dtype)  # which must not fail when the work is done
            return
        self._theirs = empty_like(template, shape, dtype)
        self.array = queue.empty(shape, dtype) if self._theirs is None else view(self._theirs, "out")

    def handed_over(self) -> Any:
        """Return it; what is in host memory is complete, what is on a GPU is so in the order of the queue's stream."""
        if self._theirs is not None:
            return self._theirs
        if is_on_gpu(self._template):
            self._queue.stream.synchronize()  # nothing tells that library which stream the work is on
            return namespace_of(self._template).from_dlpack(exported(self.array))
        self._queue.fetch(self.array, self._host)
        return like(self._template, self._host)


def common_ordinal(arrays: dict[str, DeviceArray]) -> int:
    """Return the number of the GPU that all arrays are on; 0 where there are none.

    Raises:
        ValueError: They are on several.
    """
    ordinals = {
        name: ordinal_of(array.address) if array.device is None else array.device for name, array in arrays.items()
    }
    known = {name: ordinal for name, ordinal in ordinals.items() if ordinal is not None}
    first = next(iter(known), None)
    for name, ordinal in known.items():
        if first is not None and ordinal != known[first]:
            raise ValueError(f"{name} must be on {first}'s GPU, number {known[first]}, got number {ordinal}")
    return 0 if first is None else known[first]

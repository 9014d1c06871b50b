"""`attention` on a GPU or on the emulator: arrays of any library in, the same one's out."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from numbaflash.arrays import like, namespace_of
from numbaflash.device_arrays import DeviceArray, current_stream, empty_like, is_on_gpu, view
from numbaflash.problem import FLOAT32, describe

from .device import EmulatedDevice
from .driver import ordinal_of
from .gpu import cuda_device, exported
from .solve import Queue, check_solvable, solve

__all__ = ["attention"]

# A few numbers each: they are checked, and so must be seen, on the host.
_READ_ON_THE_HOST = ("alibi_slopes", "sink_logits", "kv_lengths")


def attention(
    q: Any, k: Any, v: Any, *, backend: str, algorithm: str, return_lse: bool, **options: Any
) -> tuple[Any, Any | None]:
    """Solve the problem that `numbaflash.attention` poses.

    Args:
        q: As there, like all that is not mentioned here.
        k: Its memory may be the host's or the GPU's, whatever q's is; so may that of v and the options.
        v: Likewise.
        backend: "cuda" or "emulated"; the latter takes arrays in host memory alone.
        algorithm: One of `solve.ALGORITHMS`.
        return_lse: Whether the second result is wanted.
        **options: Of `numbaflash.problem.describe`.

    Returns:
        The output and the log-sum-exp, of q's library and where q is; None for the latter without `return_lse`. What is
        on a GPU is complete in the order of the library's current stream.

    Raises:
        TypeError: An argument has the wrong type or dtype; nothing has run.
        ValueError: An argument has the wrong shape or value, or no kernel solves the problem; nothing has run.
        RuntimeError: There is no GPU for "cuda", or it failed.
    """
    given = {"q": q, "k": k, "v": v, **options}
    on_gpu = [name for name, value in given.items() if is_on_gpu(value)]
    if backend == "emulated":
        if on_gpu:
            raise ValueError(f"{on_gpu[0]} must be in host memory for backend 'emulated', got an array on a GPU")
        # A device of its own for each call: calls of several threads have no memory in common.
        device = EmulatedDevice()
        return _attention(Queue(device, device.default_stream), q, given, algorithm, return_lse)
    for name in on_gpu:
        given[name] = view(given[name], name)
    gpu = cuda_device(_common_ordinal({name: given[name] for name in on_gpu}))
    with gpu.current():
        stream = gpu.default_stream
        if on_gpu:
            leader = on_gpu[0]
            stream = gpu.foreign_stream(current_stream({"q": q, "k": k, "v": v, **options}[leader]))
        for name in on_gpu:
            if given[name].stream is not None:
                stream.wait(gpu.foreign_stream(given[name].stream).record())
        return _attention(Queue(gpu, stream), q, given, algorithm, return_lse)


def _attention(
    queue: Queue, template: Any, given: dict[str, Any], algorithm: str, return_lse: bool
) -> tuple[Any, Any | None]:
    for name in _READ_ON_THE_HOST:
        if isinstance(given.get(name), DeviceArray):
            given[name] = queue.read(given[name])
    q, k, v = (
        array if isinstance(array, DeviceArray) else view(array, name)
        for name, array in ((name, given.pop(name)) for name in ("q", "k", "v"))
    )
    problem = describe(q, k, v, **given)
    check_solvable(problem, algorithm)
    rows = (problem.batch, problem.q_tokens, problem.q_heads)
    out = _Result(queue, template, (*rows, problem.value_dim), problem.dtype)
    lse = _Result(queue, template, (rows[0], rows[2], rows[1]), FLOAT32) if return_lse else None
    solve(queue, problem, q, k, v, out.array, lse.array if lse else None, algorithm)
    return out.handed_over(), lse.handed_over() if lse else None


class _Result:
    """An array that is written on the device and handed over as one of the library of `template`."""

    def __init__(self, queue: Queue, template: Any, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self._queue, self._template = queue, template
        self._theirs = empty_like(template, shape, dtype) if is_on_gpu(template) else None
        self.array: Any = queue.empty(shape, dtype) if self._theirs is None else view(self._theirs, "out")

    def handed_over(self) -> Any:
        if self._theirs is not None:
            return self._theirs
        if is_on_gpu(self._template):
            self._queue.stream.synchronize()  # nothing tells that library which stream the work is on
            return namespace_of(self._template).from_dlpack(exported(self.array))
        host: NDArray[Any] = np.empty(self.array.shape, self.array.dtype)
        self._queue.fetch(self.array, host)
        return like(self._template, host)


def _common_ordinal(arrays: dict[str, DeviceArray]) -> int:
    """The number of the GPU that all arrays are on; 0 where there are none."""
    ordinals = {
        name: ordinal_of(array.address) if array.device is None else array.device for name, array in arrays.items()
    }
    known = {name: ordinal for name, ordinal in ordinals.items() if ordinal is not None}
    first = next(iter(known), None)
    for name, ordinal in known.items():
        if first is not None and ordinal != known[first]:
            raise ValueError(f"{name} must be on {first}'s GPU, number {known[first]}, got number {ordinal}")
    return 0 if first is None else known[first]

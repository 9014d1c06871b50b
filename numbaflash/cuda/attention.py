"""`attention` on a GPU or on the emulator: arrays of any library in, the same one's out."""

from __future__ import annotations

from typing import Any

from numbaflash.device_arrays import DeviceArray, is_on_gpu, view
from numbaflash.problem import FLOAT32, describe

from .callers import Result, caller_stream, common_ordinal
from .device import EmulatedDevice
from .gpu import cuda_device
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
    gpu = cuda_device(common_ordinal({name: given[name] for name in on_gpu}))
    with gpu.current():
        leader = {"q": q, "k": k, "v": v, **options}[on_gpu[0]] if on_gpu else None
        stream = caller_stream(gpu, leader, [given[name] for name in on_gpu])
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
    out = Result(queue, template, (*rows, problem.value_dim), problem.dtype)
    lse = Result(queue, template, (rows[0], rows[2], rows[1]), FLOAT32) if return_lse else None
    solve(queue, problem, q, k, v, out.array, lse.array if lse else None, algorithm)
    return out.handed_over(), lse.handed_over() if lse else None

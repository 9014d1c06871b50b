"""Running kernels on PyTorch's own threads, where tensors of PyTorch's come in.

OpenMP's threads stand by on their CPUs for some milliseconds after each of PyTorch's operations. A helper that is woken
up meanwhile takes turns with one of them: a model's prefill of 1,024 tokens attended for 220 ms on helpers, and takes
150 on PyTorch's threads. And `torch.set_num_threads` holds for attention, too.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import types

from ..arrays import torch_of
from .intrinsics import function_at
from .jit import entry_point, kernel
from .record import Record, record_at
from .task import Task

__all__ = ["Team", "team_here", "threads_for"]

_HELPERS: contextlib.AbstractContextManager[None] = contextlib.nullcontext()


def threads_for(array: Any) -> contextlib.AbstractContextManager[None]:
    """Return the context for kernels that attend to an array: on the threads of its library, or else on helpers."""
    if type(array) is np.ndarray or (torch := torch_of(array)) is None:
        return _HELPERS
    return _threads_of(torch)


class Team:
    """The threads of an OpenMP runtime that are the calling thread's; each thread of Python has others.

    As a context manager, which can be entered by any number of threads: kernels run on them within.

    Args:
        library: The runtime's, or one that is linked with it.
        count: Says how many threads the calling one has, itself included.

    Raises:
        AttributeError: The runtime has not the functions of GCC's, as LLVM's has on Linux.
    """

    def __init__(self, library: ctypes.CDLL, count: Callable[[], int]) -> None:
        self._functions = [_address_of(getattr(library, name)) for name in ("GOMP_parallel", "omp_get_thread_num")]
        self.count = count

    def __enter__(self) -> None:
        _here.team = None if _is_forked else self

    def __exit__(self, *_: object) -> None:
        _here.team = None

    def run(self, compute: Any, task: Task, threads: int, scratch: int, scratch_bytes: int) -> None:
        """Run a kernel on so many threads, until it has returned on all of them.

        Args:
            compute: Takes the task's items until there are none.
            task: What to do.
            threads: From 1 to `count()`.
            scratch: Address of `scratch_bytes` for each of them.
            scratch_bytes: A multiple of a cache line.
        """
        region = _Region()
        region.set_from("task", task.address, entry_point(compute), scratch, scratch_bytes)
        region.set_from("fork_join", *self._functions, entry_point(_take_part))
        _run_region(region.address, threads)


def team_here() -> Team | None:
    """Return the team that the calling thread's kernels run on, None where that is helpers."""
    return _here.team


class _Here(threading.local):
    team: Team | None = None


_here = _Here()


class _Region(
    Record,
    integers=("task", "entry", "scratch", "scratch_bytes", "fork_join", "thread_number", "take_part"),
):
    """A parallel region; but for `task` and `scratch`, addresses are those of C functions."""


_region_at = record_at(_Region.dtype)
_call_kernel = function_at(types.void, (types.int64, types.int64))
_call_thread_number = function_at(types.int32, ())
_call_fork_join = function_at(types.void, (types.int64, types.int64, types.uint32, types.uint32))


@kernel
def _take_part(region_address):
    region = _region_at(region_address)
    number = _call_thread_number(region.thread_number)
    _call_kernel(region.entry, region.task, region.scratch + number * region.scratch_bytes)


@kernel
def _run_region(region_address, threads):
    region = _region_at(region_address)
    _call_fork_join(region.fork_join, region.take_part, region_address, types.uint32(threads), types.uint32(0))


@functools.cache
def _threads_of(torch: Any) -> contextlib.AbstractContextManager[None]:
    if not torch.backends.openmp.is_available():
        return _HELPERS
    try:
        return Team(ctypes.CDLL(torch._C.__file__), torch.get_num_threads)
    except AttributeError:
        return _HELPERS


def _address_of(function: Any) -> int:
    return ctypes.cast(function, ctypes.c_void_p).value or 0


_is_forked = False


def _give_up_teams() -> None:
    """A forked child has none of its parent's threads, and GCC's runtime would wait for them."""
    global _is_forked
    _is_forked = True
    _here.team = None


os.register_at_fork(after_in_child=_give_up_teams)

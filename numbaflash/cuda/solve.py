"""An attention problem on a device: its arrays are brought to where kernels read them, and its algorithm is launched.

This path is one for a GPU and for the emulator: it knows a `Device`, never which.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from numbaflash.device_arrays import DeviceArray, contiguous_strides
from numbaflash.problem import DTYPES, FLOAT32, AttentionProblem

from .arguments import Arrays, Strided
from .build import Buildable, build
from .copy_rows import CopyRows
from .device import Device, Dimensions, Kernel, Launch, Stream
from .flash_v1 import FlashV1
from .flash_v2 import FlashV2
from .scratch import Arena
from .standard import Matrices, StandardScores, StandardSoftmax, StandardValues
from .tile import CHUNK
from .variant import Variant

__all__ = ["ALGORITHMS", "Queue", "check_solvable", "solve"]

# Largest grid in its second and third dimension (CUDA C++ Programming Guide, "Technical Specifications").
_MAX_GRID_YZ = 65535


class Launchable(Buildable, Hashable, Protocol):
    """A description of a kernel that also says what a launch needs."""

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a block."""


@dataclass(frozen=True)
class Queue:
    """A device and the stream on which a call's work is queued; memory lives until the work queued by then is done.

    Attributes:
        device: Where.
        stream: In which order.
        arena: Where `temporary` takes memory from first, if anywhere.
    """

    device: Device
    stream: Stream
    arena: Arena | None = None

    def launch(self, kernel: Launchable, grid: Dimensions, arguments: list[np.generic]) -> None:
        """Launch a kernel, built and loaded where that has not been done yet."""
        self._loaded(kernel).launch(grid, kernel.threads, *arguments, shared=kernel.shared_bytes, stream=self.stream)

    def launch_all(self, launches: Sequence[tuple[Launchable, Dimensions, list[np.generic]]]) -> None:
        """Launch kernels one after the other, as one where the device has done the same before."""
        self.device.launch_all(
            [
                Launch(self._loaded(kernel), grid, kernel.threads, tuple(arguments), kernel.shared_bytes)
                for kernel, grid, arguments in launches
            ],
            self.stream,
        )

    def _loaded(self, kernel: Launchable) -> Kernel:
        built = build(kernel, self.device.compute_capability)
        return self.device.load(built.ptx, built.name, kernel.shared_bytes, built.cubin)

    def temporary(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> DeviceArray:
        """Return a new contiguous array for the time of the call; the same calls get the same addresses."""
        address = None if self.arena is None else self.arena.take(int(np.prod(shape)) * dtype.itemsize)
        if address is None:
            return self.empty(shape, dtype)
        return DeviceArray(address, shape, contiguous_strides(shape, dtype.itemsize), dtype, self.arena)

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> DeviceArray:
        """Return a new contiguous array."""
        strides = contiguous_strides(shape, dtype.itemsize)
        buffer = self.device.allocate(int(np.prod(shape)) * dtype.itemsize, self.stream)
        return DeviceArray(buffer.address, shape, strides, dtype, buffer)

    def place(self, array: NDArray[Any] | DeviceArray) -> DeviceArray:
        """Return an array in device memory: itself, or a copy of NumPy's, axes of stride 0 not written out."""
        if isinstance(array, DeviceArray):
            return array
        once = tuple(slice(0, 1) if step == 0 else slice(None) for step in array.strides)
        source = np.ascontiguousarray(array[once])
        placed = self.temporary(source.shape, source.dtype)
        self.device.copy_in(placed.address, source, self.stream)
        return placed.broadcast_to(array.shape)

    def fetch(self, array: DeviceArray, target: NDArray[Any]) -> None:
        """Copy a contiguous array of device memory to NumPy's, and wait for it."""
        self.device.copy_out(target, array.address, self.stream)

    def read(self, array: DeviceArray) -> NDArray[Any]:
        """Return a copy in host memory of an array of any strides, and wait for it."""
        if not np.prod(array.shape):
            return np.empty(array.shape, array.dtype)
        reach = [(length - 1) * step for length, step in zip(array.shape, array.strides, strict=True)]
        before = -sum(min(0, distance) for distance in reach)
        raw = np.empty(sum(map(abs, reach)) + array.dtype.itemsize, np.uint8)
        self.device.copy_out(raw, array.address - before, self.stream)
        return np.ndarray(array.shape, array.dtype, raw, before, array.strides)

    def readable(self, array: DeviceArray) -> DeviceArray:
        """Return the array as the kernels read it: itself, or a copy with padded rows.

        A copy, and not kernels that pad as they load: rows of 50 elements start at multiples of 4 bytes, where cp.async
        moves 4 instead of 16 (48 more instructions in a round of 865 at a head dim of 128), and rows of odd lengths it
        cannot move at all. Kernels would need two more ways to load and to store, for head dims that models do not
        have: theirs are multiples of 8. The copies read and write q, k, v and the output once more, 16 N d bytes a head
        in 16 bits beside 4 N^2 d operations: on an A100 (1.5 TB/s, 200 TFLOP/s) 13 % at 4,096 tokens, 3 % at 16,384.
        """
        padded = -(-array.shape[3] // 8) * 8
        aligned = all(x % CHUNK == 0 for x in (array.address, *array.strides[:3]))
        if padded == array.shape[3] and array.strides[3] == array.dtype.itemsize and aligned:
            return array
        copy = self.temporary((*array.shape[:3], padded), array.dtype)
        self.copy_rows(array, copy)
        return copy

    def copy_rows(self, source: DeviceArray, target: DeviceArray) -> None:
        """Copy a (batch, tokens, heads, dim) array into one of other strides, or longer or shorter rows."""
        copier = CopyRows(source.dtype.itemsize)
        if np.prod(target.shape):
            self.launch(copier, copier.grid(source), copier.arguments(source, target))


@dataclass(frozen=True)
class Task:
    """A problem and its arrays in device memory, as the kernels read and write them.

    Attributes:
        problem: What to solve.
        arrays: Where everything lies; rows of q, k, v and out are padded to multiples of 8 elements.
        lse: The log-sum-exp is wanted.
    """

    problem: AttentionProblem
    arrays: Arrays
    lse: bool


def _standard(queue: Queue, task: Task) -> None:
    problem, variant = task.problem, Variant.of(task.problem, lse=task.lse)
    size = Matrices.of(problem)
    shape = (problem.batch, problem.q_heads, size.rows, size.keys)
    scores, weights = queue.empty(shape, FLOAT32), queue.empty(shape, problem.dtype)
    matrices = Matrices(size.rows, size.keys, scores.address, weights.address)
    for kernel in (StandardScores.of(variant), StandardSoftmax.of(variant), StandardValues.of(variant)):
        queue.launch(kernel, kernel.grid(problem), kernel.arguments(problem, task.arrays, matrices))


def _flash_v1(queue: Queue, task: Task) -> None:
    flash = FlashV1.of(Variant.of(task.problem, lse=task.lse))
    state = queue.empty((flash.state_bytes(task.problem) // FLOAT32.itemsize,), FLOAT32)
    queue.launch(flash, flash.grid(task.problem), flash.arguments(task.problem, task.arrays, state.address))


def _flash_v2(queue: Queue, task: Task) -> None:
    flash = FlashV2.of(Variant.of(task.problem, lse=task.lse), queue.device.compute_capability)
    queue.launch(flash, flash.grid(task.problem), flash.arguments(task.problem, task.arrays))


@dataclass(frozen=True)
class Solver:
    """An algorithm.

    Attributes:
        dtypes: What it takes.
        run: Launches its kernels.
    """

    dtypes: tuple[np.dtype[Any], ...]
    run: Callable[[Queue, Task], None]


ALGORITHMS = {
    "standard": Solver(DTYPES, _standard),
    "v1": Solver(DTYPES, _flash_v1),
    "v2": Solver(DTYPES, _flash_v2),
}


def check_solvable(problem: AttentionProblem, algorithm: str) -> None:
    """Raise ValueError where no kernel solves the problem, before anything has run."""
    solver = ALGORITHMS.get(algorithm)
    if solver is None:
        accepted = " or ".join(map(repr, ALGORITHMS))
        raise ValueError(f"algorithm is {algorithm!r}; the kernels for GPUs take {accepted} (backend 'cpu' takes it)")
    if problem.dtype not in solver.dtypes:
        accepted = " or ".join(dtype.name for dtype in solver.dtypes)
        raise ValueError(
            f"q has dtype {problem.dtype}; algorithm {algorithm!r} on a GPU takes {accepted} (backend 'cpu' takes it)"
        )
    for axis, length in (("batch size", problem.batch), ("heads", problem.q_heads)):
        if length > _MAX_GRID_YZ:
            raise ValueError(f"q has {axis} {length}; a GPU takes at most {_MAX_GRID_YZ}")


def solve(
    queue: Queue,
    problem: AttentionProblem,
    q: NDArray[Any] | DeviceArray,
    k: NDArray[Any] | DeviceArray,
    v: NDArray[Any] | DeviceArray,
    out: DeviceArray,
    lse: DeviceArray | None,
    algorithm: str,
) -> None:
    """Queue all the work that a problem takes.

    Args:
        queue: Where.
        problem: As `check_solvable` accepts it.
        q: (B, Sq, Hq, D), in host or device memory, any strides.
        k: (B, Sk, Hkv, D), likewise.
        v: (B, Sk, Hkv, Dv), likewise.
        out: (B, Sq, Hq, Dv), contiguous, is written.
        lse: (B, Hq, Sq) float32, contiguous, is written; None where it is not wanted.
        algorithm: One of `ALGORITHMS`.
    """
    if not np.prod(out.shape):
        return
    scoring = problem.scoring
    Q, K, V = (queue.readable(queue.place(array)) for array in (q, k, v))
    padded = -(-problem.value_dim // 8) * 8
    O = out if padded == problem.value_dim else queue.empty((*out.shape[:3], padded), out.dtype)
    bias = None if scoring.bias is None else queue.place(scoring.bias)
    ragged = problem.kv_lengths.astype(np.int32) if (problem.kv_lengths != problem.kv_tokens).any() else None
    lengths, slopes, sinks = (
        None if array is None else queue.place(array) for array in (ragged, scoring.alibi_slopes, scoring.sink_logits)
    )
    arrays = Arrays(
        q=_strided(Q),
        k=_strided(K),
        v=_strided(V),
        out=_strided(O),
        bias=_strided(bias),
        lse=_address(lse),
        lengths=_address(lengths),
        slopes=_address(slopes),
        sinks=_address(sinks),
    )
    ALGORITHMS[algorithm].run(queue, Task(problem, arrays, lse=lse is not None))
    if O is not out:
        queue.copy_rows(O, out)


def _strided(array: DeviceArray | None) -> Strided:
    if array is None:
        return Strided()
    batch, row, head, element = array.strides
    return Strided(array.address, (batch, row, head, element))


def _address(array: DeviceArray | None) -> int:
    return 0 if array is None else array.address

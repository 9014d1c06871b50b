"""Devices: memory, copies, launches and events behind one interface, so that the host code above is the same on all.

`Device` and its companions are what a device offers; `gpu.CudaDevice` is a real one. `EmulatedDevice` runs kernels on
the emulator: every call is done when it returns, and launches are checked.
"""

# ruff: noqa: ARG002  an emulated device does its work at once, whatever the stream

from __future__ import annotations

import time
import weakref
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from numbaflash import emulator

Scalar = int | float | np.generic
Dimensions = int | Sequence[int]


class Buffer(ABC):
    """Device memory; it is freed when closed or no longer referenced.

    Attributes:
        address: Of its first byte, aligned to 256 bytes.
        nbytes: Its size.
    """

    address: int
    nbytes: int

    @abstractmethod
    def close(self) -> None:
        """Frees the memory; more calls do nothing."""


class Event(ABC):
    """A point in the work of a stream."""

    @abstractmethod
    def synchronize(self) -> None:
        """Waits until the work before it is done."""

    @abstractmethod
    def seconds_since(self, earlier: Event) -> float:
        """Time between two events that have both been reached."""


class Stream(ABC):
    """Work that is done in order."""

    @abstractmethod
    def record(self) -> Event:
        """Marks the present end of the stream."""

    @abstractmethod
    def wait(self, event: Event) -> None:
        """Lets later work of this stream wait for an event of another."""

    @abstractmethod
    def synchronize(self) -> None:
        """Waits until all of its work is done."""


class Kernel(ABC):
    """A kernel loaded on a device.

    Attributes:
        name: Its name in the PTX text.
    """

    name: str

    @abstractmethod
    def launch(
        self, grid: Dimensions, block: Dimensions, *args: Scalar, shared: int = 0, stream: Stream | None = None
    ) -> None:
        """Runs it.

        Args:
            grid: Blocks, one to three numbers.
            block: Threads of a block, one to three numbers.
            *args: One scalar per parameter of the kernel, of the parameter's own type (`numpy.int64` for an address or
                a stride, `numpy.float32` ...).
            shared: Bytes of dynamic shared memory, at most the `max_shared` that the kernel was loaded with.
            stream: Where; the device's default stream if None.
        """


class Launch(NamedTuple):
    """What `Kernel.launch` takes."""

    kernel: Kernel
    grid: Dimensions
    block: Dimensions
    args: tuple[Scalar, ...]
    shared: int


class Device(ABC):
    """A place where kernels run.

    Attributes:
        name: For people.
        compute_capability: (major, minor); kernels are compiled for it.
        multiprocessors: How many there are, for the choice of grids.
        default_stream: Where work goes that names no stream.
    """

    name: str
    compute_capability: tuple[int, int]
    multiprocessors: int
    default_stream: Stream

    @abstractmethod
    def current(self) -> AbstractContextManager[object]:
        """Within it, the calling thread works on this device: every other method wants that."""

    @abstractmethod
    def allocate(self, nbytes: int, stream: Stream | None = None) -> Buffer:
        """Reserves memory; its contents are undefined.

        Work on `stream` may use it at once. It is freed in that stream's order, after the work queued until then.

        Raises:
            MemoryError: There is not that much.
        """

    @abstractmethod
    def create_stream(self) -> Stream:
        """Another stream."""

    @abstractmethod
    def foreign_stream(self, handle: int) -> Stream:
        """A stream of another library, by its CUstream; it must outlive the work that is queued on it."""

    @abstractmethod
    def load(self, ptx: str, entry: str | None = None, max_shared: int = 0, cubin: bytes = b"") -> Kernel:
        """Loads a kernel.

        Args:
            ptx: PTX text.
            entry: Which kernel, where the text has several.
            max_shared: The most dynamic shared memory that it will be launched with; above 48 KiB a GPU must be told,
                once.
            cubin: The same as machine code for this device, where there is any: a driver that is older than the
                compiler runs it, but not its PTX.
        """

    def launch_all(self, launches: Sequence[Launch], stream: Stream | None = None) -> None:
        """Runs kernels one after the other."""
        for launch in launches:
            launch.kernel.launch(launch.grid, launch.block, *launch.args, shared=launch.shared, stream=stream)

    @abstractmethod
    def copy_in(self, address: int, source: NDArray[Any], stream: Stream | None = None) -> None:
        """Copies a C-contiguous array to device memory; a page-locked one may change when the stream has done it."""

    @abstractmethod
    def copy_out(self, target: NDArray[Any], address: int, stream: Stream | None = None) -> None:
        """Copies device memory to a C-contiguous array; the array is complete when the call returns."""

    @abstractmethod
    def copy(self, target: int, source: int, nbytes: int, stream: Stream | None = None) -> None:
        """Copies within device memory."""

    @abstractmethod
    def fill(self, address: int, nbytes: int, value: int = 0, stream: Stream | None = None) -> None:
        """Sets bytes."""

    @abstractmethod
    def synchronize(self) -> None:
        """Waits until all work of the device is done."""


class _EmulatedBuffer(Buffer):
    def __init__(self, memory: emulator.GlobalMemory, nbytes: int) -> None:
        self.address = memory.allocate(nbytes)
        self.nbytes = nbytes
        self._finalizer = weakref.finalize(self, memory.free, self.address)

    def close(self) -> None:
        self._finalizer()


class _EmulatedEvent(Event):
    def __init__(self) -> None:
        self.time = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def seconds_since(self, earlier: Event) -> float:
        assert isinstance(earlier, _EmulatedEvent)
        return self.time - earlier.time


class _EmulatedStream(Stream):
    def record(self) -> Event:
        return _EmulatedEvent()

    def wait(self, event: Event) -> None:
        pass

    def synchronize(self) -> None:
        pass


class _EmulatedKernel(Kernel):
    def __init__(self, device: EmulatedDevice, kernel: emulator.Kernel, max_shared: int) -> None:
        self.name = kernel.name
        self._device = device
        self._kernel = kernel
        self._max_shared = max(max_shared, 48 << 10)

    def launch(
        self, grid: Dimensions, block: Dimensions, *args: Scalar, shared: int = 0, stream: Stream | None = None
    ) -> None:
        if shared > self._max_shared:
            raise ValueError(
                f"shared is {shared}; {self.name} was loaded for {self._max_shared} bytes of shared memory at most"
            )
        report = self._kernel.run(self._device.memory, grid, block, *args, shared=shared, checks=self._device.checks)
        self._device.last_report = report


class EmulatedDevice(Device):
    """A device whose kernels run on the CPU, with every access checked.

    Attributes:
        memory: Its global memory.
        checks: Which checks its launches make.
        last_report: The counts of the latest launch.
    """

    default_stream: Stream = _EmulatedStream()

    def __init__(
        self,
        compute_capability: tuple[int, int] = (8, 0),
        *,
        multiprocessors: int = 108,
        memory_limit: int = 4 << 30,
        checks: emulator.Checks | None = None,
    ) -> None:
        """Makes an empty device.

        Args:
            compute_capability: What it pretends to be; (8, 0) is an A100.
            multiprocessors: How many it pretends to have; 108 is an A100.
            memory_limit: Bytes that may be allocated in all.
            checks: Which checks launches make; all by default.
        """
        self.name = f"emulator (sm_{compute_capability[0]}{compute_capability[1]})"
        self.compute_capability = compute_capability
        self.multiprocessors = multiprocessors
        self.memory = emulator.GlobalMemory(limit=memory_limit)
        self.checks = checks or emulator.Checks()
        self.last_report: emulator.Report | None = None

    def current(self) -> AbstractContextManager[object]:
        """Any thread may work on it, one at a time."""
        return nullcontext()

    def allocate(self, nbytes: int, stream: Stream | None = None) -> Buffer:
        """Reserves memory, filled with NaN."""
        return _EmulatedBuffer(self.memory, nbytes)

    def create_stream(self) -> Stream:
        """A stream; all of them do their work at once."""
        return _EmulatedStream()

    def foreign_stream(self, handle: int) -> Stream:
        """A stream; there are no others."""
        return _EmulatedStream()

    def load(self, ptx: str, entry: str | None = None, max_shared: int = 0, cubin: bytes = b"") -> Kernel:
        """Loads a kernel; a text is translated once."""
        return _EmulatedKernel(self, emulator.load(ptx, entry), max_shared)

    def copy_in(self, address: int, source: NDArray[Any], stream: Stream | None = None) -> None:
        """Copies a C-contiguous array to device memory."""
        self.memory.view(address, source.nbytes)[:] = _bytes(source, "source")

    def copy_out(self, target: NDArray[Any], address: int, stream: Stream | None = None) -> None:
        """Copies device memory to a C-contiguous array."""
        _bytes(target, "target")[:] = self.memory.view(address, target.nbytes)

    def copy(self, target: int, source: int, nbytes: int, stream: Stream | None = None) -> None:
        """Copies within device memory."""
        self.memory.view(target, nbytes)[:] = self.memory.view(source, nbytes).copy()

    def fill(self, address: int, nbytes: int, value: int = 0, stream: Stream | None = None) -> None:
        """Sets bytes."""
        self.memory.view(address, nbytes)[:] = value

    def synchronize(self) -> None:
        """Nothing is ever under way."""


def _bytes(array: NDArray[Any], name: str) -> NDArray[np.uint8]:
    if not array.flags.c_contiguous:
        raise ValueError(f"{name} has strides {array.strides}; a C-contiguous array is accepted")
    return array.reshape(-1).view(np.uint8)

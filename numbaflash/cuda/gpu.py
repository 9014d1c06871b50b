"""`CudaDevice`: a GPU behind the interface of `device`, by way of cuda.core.

cuda.core and the driver's bindings are imported when a device is made, so that this module is there on any machine.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from numpy.typing import NDArray

from numbaflash.device_arrays import DeviceArray

from .device import Buffer, Device, Dimensions, Event, Kernel, Launch, Scalar, Stream
from .driver import LEAST_COMPUTE_CAPABILITY, Gpu, bindings, checked, find_gpus
from .replays import Replays

__all__ = ["CudaDevice", "cuda_device", "exported"]

# Every kernel may have that much dynamic shared memory without being told.
_SHARED_BY_DEFAULT = 48 << 10


@functools.cache
def cuda_device(ordinal: int) -> CudaDevice:
    """Return the device of that number; the same one each time.

    Raises:
        RuntimeError: There is none, or it is too old.
    """
    gpus, found = find_gpus()
    if ordinal >= len(gpus):
        raise RuntimeError(f"backend 'cuda' needs GPU number {ordinal}: {found}")
    gpu = gpus[ordinal]
    if gpu.compute_capability < LEAST_COMPUTE_CAPABILITY:
        raise RuntimeError(
            "backend 'cuda' needs compute capability 8.0 or newer, got {} with {}.{}".format(
                gpu.name, *gpu.compute_capability
            )
        )
    return CudaDevice(gpu)


class CudaDevice(Device):
    """A GPU.

    All threads may use it at the same time, each within `current`; what they queue on one stream is done in the order
    in which it was queued.

    Attributes:
        replays: Graphs of launches that come again; `replays.enabled = False` launches every kernel by itself.
    """

    def __init__(self, gpu: Gpu) -> None:
        """Makes the GPU's primary context, which torch and the others share."""
        import cuda.core as core

        self.name = gpu.name
        self.compute_capability = gpu.compute_capability
        self.ordinal = gpu.ordinal
        checked(bindings().cuInit(0))
        before = checked(bindings().cuCtxGetCurrent())
        self._core = core.Device(gpu.ordinal)
        self._core.set_current()
        self._context = self._core.context.handle
        if int(before):
            checked(bindings().cuCtxSetCurrent(before))
        with self.current():
            self.multiprocessors = int(self._core.properties.multiprocessor_count)
            self.default_stream: Stream = _CudaStream(self._core.default_stream)
        self._kernels: dict[bytes, _CudaKernel] = {}
        self.replays = Replays(_graph)

    @contextmanager
    def current(self) -> Iterator[object]:
        """Within it, the calling thread's context is this device's; then again the one that was, if there was one."""
        driver = bindings()
        before = int(checked(driver.cuCtxGetCurrent()))
        if before in (0, int(self._context)):
            if not before:
                checked(driver.cuCtxSetCurrent(self._context))
            yield self
            return
        checked(driver.cuCtxPushCurrent(self._context))
        try:
            yield self
        finally:
            checked(driver.cuCtxPopCurrent())

    def allocate(self, nbytes: int, stream: Stream | None = None) -> Buffer:
        """Reserves memory of the GPU's stream-ordered pool."""
        return _CudaBuffer(self._core, nbytes, self._of(stream))

    def create_stream(self) -> Stream:
        """Another stream, that does not wait for the default one."""
        return _CudaStream(self._core.create_stream())

    def foreign_stream(self, handle: int) -> Stream:
        """A stream of another library, by its CUstream: 0 and 1 are CUDA's default stream, 2 the thread's own."""
        import cuda.core as core

        if handle in (0, 1):
            return _CudaStream(core.LEGACY_DEFAULT_STREAM)
        if handle == 2:
            return _CudaStream(core.PER_THREAD_DEFAULT_STREAM)
        return _CudaStream(core.Stream.from_handle(handle))

    def load(self, ptx: str, entry: str | None = None, max_shared: int = 0, cubin: bytes = b"") -> Kernel:
        """Loads a kernel, once; it may have the most shared memory that it was ever loaded for."""
        code = cubin or ptx.encode()
        kernel = self._kernels.get(code)
        if kernel is None:
            kernel = self._kernels.setdefault(code, _CudaKernel(self.ordinal, code, entry, bool(cubin)))
        kernel.allow_shared(max_shared)
        return kernel

    def launch_all(self, launches: Sequence[Launch], stream: Stream | None = None) -> None:
        """Runs kernels one after the other: as a graph, where the same launches have come before."""
        if not self.replays.run(launches, self.default_stream if stream is None else stream):
            super().launch_all(launches, stream)

    def copy_in(self, address: int, source: NDArray[Any], stream: Stream | None = None) -> None:
        """Copies a C-contiguous array to device memory."""
        _check_contiguous(source, "source")
        if source.nbytes:
            checked(bindings().cuMemcpyHtoDAsync(address, source.ctypes.data, source.nbytes, self._of(stream).handle))

    def copy_out(self, target: NDArray[Any], address: int, stream: Stream | None = None) -> None:
        """Copies device memory to a C-contiguous array and waits for it."""
        _check_contiguous(target, "target")
        on = self._of(stream)
        if target.nbytes:
            checked(bindings().cuMemcpyDtoHAsync(target.ctypes.data, address, target.nbytes, on.handle))
        on.sync()

    def copy(self, target: int, source: int, nbytes: int, stream: Stream | None = None) -> None:
        """Copies within device memory."""
        if nbytes:
            checked(bindings().cuMemcpyDtoDAsync(target, source, nbytes, self._of(stream).handle))

    def fill(self, address: int, nbytes: int, value: int = 0, stream: Stream | None = None) -> None:
        """Sets bytes."""
        if nbytes:
            checked(bindings().cuMemsetD8Async(address, value, nbytes, self._of(stream).handle))

    def synchronize(self) -> None:
        """Waits until all work of the device is done."""
        with self.current():
            checked(bindings().cuCtxSynchronize())

    def _of(self, stream: Stream | None) -> Any:
        chosen = self.default_stream if stream is None else stream
        assert isinstance(chosen, _CudaStream)
        return chosen.core


class _CudaBuffer(Buffer):
    def __init__(self, device: Any, nbytes: int, stream: Any) -> None:
        try:
            self.core = device.allocate(max(nbytes, 1), stream=stream)  # the driver has no empty allocations
        except Exception as error:  # cuda.core's error has no public name
            if "CUDA_ERROR_OUT_OF_MEMORY" in str(error):
                raise MemoryError(f"{nbytes} bytes of device memory: {error}") from error
            raise
        self.address = int(self.core.handle)
        self.nbytes = nbytes

    def close(self) -> None:
        self.core.close()


def exported(array: DeviceArray) -> Any:
    """Return a contiguous array of memory that a `CudaDevice` gave as an object with `__dlpack__`.

    Its work must be done already.
    """
    from cuda.core.utils import StridedMemoryView

    assert isinstance(array.owner, _CudaBuffer)
    return StridedMemoryView.from_buffer(array.owner.core, array.shape, dtype=array.dtype)


class _CudaEvent(Event):
    def __init__(self, core: Any) -> None:
        self.core = core

    def synchronize(self) -> None:
        self.core.sync()

    def seconds_since(self, earlier: Event) -> float:
        assert isinstance(earlier, _CudaEvent)
        return float(self.core - earlier.core) / 1e3


class _CudaStream(Stream):
    def __init__(self, core: Any) -> None:
        self.core = core

    def record(self) -> Event:
        import cuda.core as core

        return _CudaEvent(self.core.record(options=core.EventOptions(timing_enabled=True)))

    def wait(self, event: Event) -> None:
        assert isinstance(event, _CudaEvent)
        self.core.wait(event.core)

    def synchronize(self) -> None:
        self.core.sync()


class _CudaKernel(Kernel):
    def __init__(self, ordinal: int, code: bytes, entry: str | None, is_cubin: bool) -> None:
        import cuda.core as core

        if entry is None:
            raise ValueError("entry must name the kernel, got None")
        load = core.ObjectCode.from_cubin if is_cubin else core.ObjectCode.from_ptx
        self.name = entry
        self._ordinal = ordinal
        self.core = load(code).get_kernel(entry)
        self._max_shared = _SHARED_BY_DEFAULT

    def allow_shared(self, nbytes: int) -> None:
        """Raises what a launch may have; never lowers it, for another thread may be about to launch."""
        if nbytes > self._max_shared:
            driver = bindings()
            attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            device = checked(driver.cuDeviceGet(self._ordinal))
            checked(driver.cuKernelSetAttribute(attribute, nbytes, self.core.handle, device))
            self._max_shared = nbytes

    def launch(
        self, grid: Dimensions, block: Dimensions, *args: Scalar, shared: int = 0, stream: Stream | None = None
    ) -> None:
        import cuda.core as core

        if shared > self._max_shared:
            raise ValueError(
                f"shared is {shared}; {self.name} was loaded for {self._max_shared} bytes of shared memory at most"
            )
        assert stream is None or isinstance(stream, _CudaStream)
        on = core.Device(self._ordinal).default_stream if stream is None else stream.core
        core.launch(on, _launch_config(_tuple(grid), _tuple(block), shared), self.core, *args)


def _graph(launches: Sequence[Launch]) -> Callable[[Stream], None]:
    """Make a graph of launches, each behind the one before."""
    from cuda.core.graph import GraphDefinition

    definition = GraphDefinition()
    end: Any = definition
    for kernel, grid, block, args, shared in launches:
        assert isinstance(kernel, _CudaKernel)
        end = end.launch(_launch_config(_tuple(grid), _tuple(block), shared), kernel.core, *args)
    graph = definition.instantiate()

    def run(stream: Stream) -> None:
        assert isinstance(stream, _CudaStream)
        graph.launch(stream.core)

    return run


@functools.lru_cache(maxsize=1024)
def _launch_config(grid: tuple[int, ...], block: tuple[int, ...], shared: int) -> Any:
    import cuda.core as core

    return core.LaunchConfig(grid=grid, block=block, shmem_size=shared)


def _tuple(dimensions: Dimensions) -> tuple[int, ...]:
    return (dimensions,) if isinstance(dimensions, int) else tuple(dimensions)


def _check_contiguous(array: NDArray[Any], name: str) -> None:
    if not array.flags.c_contiguous:
        raise ValueError(f"{name} has strides {array.strides}; a C-contiguous array is accepted")

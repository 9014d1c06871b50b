"""A CUDA driver without a GPU: a libcuda.so.1 whose functions are Python's, with the emulator behind them.

`install` puts it into the process that calls it, for good: cuda.core and cuda.bindings then run as they do on a GPU,
every argument that they pass arrives here, and kernels run on the emulator. Work is done when it is queued; what was
asked for, and on which stream, is in `Driver.calls`.
"""

# ruff: noqa: N802, N815, ARG002  functions have the driver's names and parameters

from __future__ import annotations

import ctypes
import functools
import platform
import struct
from pathlib import Path

import numpy as np

from numbaflash import emulator

DONE, INVALID_VALUE, OUT_OF_MEMORY, NOT_SUPPORTED = 0, 1, 2, 801
CONTEXT, POOL, DEVICE_NAME = 0x1000, 0x2000, b"Emulated GPU"
# CUdevice_attribute, where the answer is not 0.
ATTRIBUTES = {16: 108, 75: 8, 76: 0, 97: 164 << 10, 115: 1, 41: 1}
MAX_DYNAMIC_SHARED = 8  # CUfunction_attribute
MEMORY = 1 << 28

Pointer = ctypes.c_void_p
Function = ctypes.CFUNCTYPE(ctypes.c_int, *[Pointer] * 10)
Resolver = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_char_p, Pointer, ctypes.c_int, ctypes.c_ulonglong, ctypes.POINTER(ctypes.c_int)
)


class Driver:
    """What the driver knows.

    Attributes:
        calls: (function, what mattered of its arguments), in order.
        memory: Device memory.
        current: The calling thread's context; threads share it.
        live: Bytes by address, of the memory pool's allocations.
        refuses_graphs: No graph can be made.
    """

    def __init__(self, builds: Path) -> None:
        self.calls: list[tuple[object, ...]] = []
        self.memory = emulator.GlobalMemory(limit=MEMORY)
        self.current = 0
        self.pushed: list[int] = []
        self.live: dict[int, int] = {}
        self.refuses_graphs = False
        self._builds = builds
        self._handles = 0x10000
        self._kernels: dict[int, emulator.Kernel] = {}
        self._shared: dict[int, int] = {}
        self._functions: dict[str, object] = {}
        self._graphs: dict[int, list[tuple[object, ...]]] = {}

    def resolve(self, symbol, function, _version, _flags, status):
        name = symbol.decode()
        if name not in self._functions:
            self._functions[name] = Function(functools.partial(self._call, name))
        write(function, ctypes.cast(self._functions[name], Pointer).value)
        if status:
            status[0] = 0
        return DONE

    def _call(self, name, *arguments):
        handler = getattr(self, name, None)
        if handler is None:
            self.calls.append(("missing", name))
            return NOT_SUPPORTED
        try:
            wanted = handler.__code__.co_argcount - 1
            return handler(*(argument or 0 for argument in arguments[:wanted])) or DONE
        except MemoryError:
            return OUT_OF_MEMORY
        except Exception as error:
            self.calls.append(("failed", name, repr(error)))
            return INVALID_VALUE

    def _handle(self):
        self._handles += 16
        return self._handles

    # ---- the device and its context

    def cuInit(self): ...

    def cuGetErrorName(self, code, text):
        names = {OUT_OF_MEMORY: b"CUDA_ERROR_OUT_OF_MEMORY", INVALID_VALUE: b"CUDA_ERROR_INVALID_VALUE"}
        self.text = ctypes.c_char_p(names.get(code, b"CUDA_ERROR_NOT_SUPPORTED"))
        write(text, ctypes.cast(self.text, Pointer).value)

    cuGetErrorString = cuGetErrorName

    def cuDriverGetVersion(self, version):
        write(version, 13000, "I")

    def cuDeviceGetCount(self, count):
        write(count, 1, "I")

    def cuDeviceGet(self, device, ordinal):
        write(device, ordinal & 0xFFFFFFFF, "I")

    def cuDeviceGetName(self, name, length):
        ctypes.memmove(name, DEVICE_NAME + b"\0", min(length, len(DEVICE_NAME) + 1))

    def cuDeviceGetUuid(self, uuid):
        ctypes.memset(uuid, 1, 16)

    def cuDeviceGetAttribute(self, value, attribute):
        write(value, ATTRIBUTES.get(attribute & 0xFFFFFFFF, 0), "I")

    def cuDevicePrimaryCtxRetain(self, context):
        write(context, CONTEXT)

    def cuDevicePrimaryCtxRelease(self): ...

    def cuCtxGetCurrent(self, context):
        write(context, self.current)

    def cuCtxSetCurrent(self, context):
        self.current = context

    def cuCtxPushCurrent(self, context):
        self.pushed.append(self.current)
        self.current = context

    def cuCtxPopCurrent(self, context):
        write(context, self.current)
        self.current = self.pushed.pop() if self.pushed else 0

    def cuCtxGetDevice(self, device):
        write(device, 0, "I")

    def cuCtxSynchronize(self): ...

    def cuPointerGetAttribute(self, value, attribute, address):
        self.memory.view(address, 1)
        write(value, 0, "I")

    # ---- memory

    def cuDeviceGetDefaultMemPool(self, pool):
        write(pool, POOL)

    cuDeviceGetMemPool = cuDeviceGetDefaultMemPool

    def cuMemPoolGetAttribute(self, pool, attribute, value):
        write(value, 0)

    def cuMemPoolSetAttribute(self): ...

    def cuMemAllocFromPoolAsync(self, address, nbytes, pool, stream):
        assert pool == POOL
        assert self.current == CONTEXT
        assert nbytes
        placed = self.memory.allocate(nbytes)
        self.live[placed] = nbytes
        self.calls.append(("allocate", nbytes, stream))
        write(address, placed)

    def cuMemAlloc(self, address, nbytes):
        write(address, self.memory.allocate(nbytes))

    def cuMemFree(self, address):
        self.memory.free(address)

    def cuMemGetInfo(self, free, total):
        write(free, MEMORY)
        write(total, MEMORY)

    def cuMemcpyHtoD(self, target, source, nbytes):
        self.cuMemcpyHtoDAsync(target, source, nbytes, 0)

    def cuMemcpyDtoH(self, target, source, nbytes):
        self.cuMemcpyDtoHAsync(target, source, nbytes, 0)

    def cuMemFreeAsync(self, address, stream):
        self.memory.free(address)
        del self.live[address]
        self.calls.append(("free", stream))

    def cuMemcpyHtoDAsync(self, target, source, nbytes, stream):
        self.memory.view(target, nbytes)[:] = np.frombuffer(ctypes.string_at(source, nbytes), np.uint8)
        self.calls.append(("copy in", nbytes, stream))

    def cuMemcpyDtoHAsync(self, target, source, nbytes, stream):
        ctypes.memmove(target, self.memory.view(source, nbytes).tobytes(), nbytes)
        self.calls.append(("copy out", nbytes, stream))

    def cuMemcpyDtoDAsync(self, target, source, nbytes, stream):
        self.memory.view(target, nbytes)[:] = self.memory.view(source, nbytes).copy()
        self.calls.append(("copy", nbytes, stream))

    def cuMemsetD8Async(self, target, value, nbytes, stream):
        self.memory.view(target, nbytes)[:] = value & 0xFF
        self.calls.append(("fill", nbytes, stream))

    # ---- streams and events

    def cuCtxGetStreamPriorityRange(self, least, greatest):
        write(least, 0, "I")
        write(greatest, 0, "I")

    def cuStreamCreateWithPriority(self, stream):
        write(stream, self._handle())

    def cuStreamDestroy(self): ...

    def cuStreamIsCapturing(self, stream, status):
        write(status, 0, "I")

    def cuStreamSynchronize(self, stream):
        self.calls.append(("synchronize", stream))

    def cuStreamWaitEvent(self, stream, event):
        self.calls.append(("wait", stream, event))

    def cuEventCreate(self, event, flags):
        write(event, self._handle())

    def cuEventRecord(self, event, stream):
        self.calls.append(("record", event, stream))

    def cuEventDestroy(self): ...

    def cuEventSynchronize(self): ...

    def cuEventElapsedTime(self, milliseconds):
        write(milliseconds, 2.5, "f")

    def cuStreamGetCtx(self, stream, context):
        write(context, CONTEXT)

    # ---- kernels

    def cuLibraryLoadData(self, library, code):
        for path in self._builds.glob("*/kernel.cubin"):
            cubin = path.read_bytes()
            if ctypes.string_at(code, 64) == cubin[:64] and ctypes.string_at(code, len(cubin)) == cubin:
                handle = self._handle()
                self._kernels[handle] = emulator.load(path.with_name("kernel.ptx").read_text())
                write(library, handle)
                self.calls.append(("load", self._kernels[handle].name))
                return DONE
        return INVALID_VALUE

    def cuLibraryUnload(self): ...

    def cuLibraryGetKernel(self, kernel, library, name):
        if ctypes.string_at(name).decode() != self._kernels[library].name:
            return INVALID_VALUE
        write(kernel, library)
        return DONE

    def cuKernelSetAttribute(self, attribute, value, kernel, device):
        assert (attribute & 0xFFFFFFFF, device & 0xFFFFFFFF) == (MAX_DYNAMIC_SHARED, 0)
        self._shared[kernel] = value & 0xFFFFFFFF
        self.calls.append(("allow shared", self._shared[kernel]))

    def cuLaunchKernelEx(self, config, function, parameters):
        *dimensions, shared, stream, _attributes, count = struct.unpack("7I4xQQI", ctypes.string_at(config, 52))
        assert not count
        if shared > self._shared.get(function, 48 << 10):
            return INVALID_VALUE
        self._run(function, dimensions, shared, self._values(function, parameters))
        self.calls.append(("launch", self._kernels[function].name, tuple(dimensions[:3]), stream))
        return DONE

    def _values(self, function, parameters):
        """The kernel's arguments, as they are now."""
        values = []
        for position, (parameter, _) in enumerate(self._kernels[function].translation.program.params):
            raw = ctypes.string_at(Pointer.from_address(parameters + 8 * position).value, parameter.size)
            values.append(np.frombuffer(raw, f"{'f' if parameter.type[0] == 'f' else 'i'}{parameter.size}")[0])
        return values

    def _run(self, function, dimensions, shared, values):
        assert self.current == CONTEXT
        self._kernels[function].run(self.memory, dimensions[:3], dimensions[3:], *values, shared=shared)

    # ---- graphs

    def cuGraphCreate(self, graph, flags):
        handle = self._handle()
        self._graphs[handle] = []
        write(graph, handle)

    def cuGraphDestroy(self): ...

    def cuGraphExecDestroy(self): ...

    def cuUserObjectCreate(self, made):
        write(made, self._handle())

    def cuUserObjectRelease(self): ...

    def cuGraphRetainUserObject(self): ...

    cuGraphReleaseUserObject = cuGraphRetainUserObject

    def cuGraphAddKernelNode(self, node, graph, dependencies, count, parameters):
        """Add a launch behind the last one; its arguments are taken now, what they point to when it runs."""
        nodes = self._graphs[graph]
        assert count == bool(nodes)
        assert not nodes or Pointer.from_address(dependencies).value == nodes[-1][0]
        *dimensions, shared, arguments, _, function = struct.unpack("8x7I4x3Q", ctypes.string_at(parameters, 64))
        nodes.append((self._handle(), function, dimensions, shared, self._values(function, arguments)))
        write(node, nodes[-1][0])

    def cuGraphInstantiateWithParams(self, executable, graph, parameters):
        if self.refuses_graphs:
            return NOT_SUPPORTED
        handle = self._handle()
        self._graphs[handle] = list(self._graphs[graph])
        write(executable, handle)
        self.calls.append(("capture", len(self._graphs[handle])))
        return DONE

    def cuGraphLaunch(self, executable, stream):
        for _, *launch in self._graphs[executable]:
            self._run(*launch)
        self.calls.append(("replay", stream))


def write(address, value, code="Q"):
    ctypes.memmove(address, struct.pack(code, value), struct.calcsize(code))


def install(directory: Path, builds: Path) -> Driver:
    """Make this process's CUDA driver the one that is returned.

    Args:
        directory: Where the library may be written.
        builds: Where `numbaflash.cuda.build` keeps what it built: the emulator runs a cubin by the PTX beside it.
    """
    path = directory / "libcuda.so.1"
    path.write_bytes(library("libcuda.so.1"))
    loaded = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    driver = Driver(builds)
    driver.entry = Resolver(driver.resolve)
    Pointer.in_dll(loaded, "resolver").value = ctypes.cast(driver.entry, Pointer).value
    return driver


def library(soname: str) -> bytes:
    """Return a shared object with the function `cuGetProcAddress_v2`, which jumps to where `resolver` points.

    It is the one function that NVIDIA's bindings look up by name. (ELF-64: a text page, and a page of data behind it.)
    """
    data_page = 0x10000  # the largest page size that Linux has on these machines
    machine, jump = {
        # A jump to what lies at an address relative to this one.
        "x86_64": (62, lambda at, to: b"\xff\x25" + struct.pack("<i", to - at - 6)),
        # The same: ADR, LDR and BR by register 16.
        "aarch64": (
            183,
            lambda at, to: struct.pack(
                "<III", 0x10000010 | (to - at & 3) << 29 | (to - at >> 2) << 5, 0xF9400210, 0xD61F0200
            ),
        ),
    }[platform.machine()]
    strings = b"\0cuGetProcAddress_v2\0resolver\0" + soname.encode() + b"\0"
    at = {"symbols": 0x200, "strings": 0x280, "hash": 0x300, "code": 0x340}
    resolver = data_page + 0x100
    symbols = struct.pack("<IBBHQQ", 0, 0, 0, 0, 0, 0)
    symbols += struct.pack("<IBBHQQ", 1, 0x12, 0, 1, at["code"], 12)  # a global function
    symbols += struct.pack("<IBBHQQ", strings.index(b"resolver"), 0x11, 0, 1, resolver, 8)  # a global object
    chains = struct.pack("<6I", 1, 3, 1, 0, 2, 0)  # one bucket: symbol 1, then symbol 2
    tags = {14: strings.index(soname.encode()), 4: at["hash"], 6: at["symbols"], 5: at["strings"], 10: len(strings)}
    dynamic = b"".join(struct.pack("<QQ", *tag) for tag in (*tags.items(), (11, 24), (0, 0)))
    header = b"\x7fELF\2\1\1".ljust(16, b"\0") + struct.pack(
        "<HHIQQQIHHHHHH", 3, machine, 1, 0, 64, 0, 0, 64, 56, 3, 64, 0, 0
    )
    segments = [(1, 5, 0, 0x400), (1, 6, data_page, 0x200), (2, 6, data_page, len(dynamic))]
    header += b"".join(
        struct.pack("<IIQQQQQQ", kind, access, start, start, start, size, size, data_page if kind == 1 else 8)
        for kind, access, start, size in segments
    )
    image = bytearray(data_page + 0x200)
    for start, content in (
        (0, header),
        (at["symbols"], symbols),
        (at["strings"], strings),
        (at["hash"], chains),
        (at["code"], jump(at["code"], resolver)),
        (data_page, dynamic),
    ):
        image[start : start + len(content)] = content
    return bytes(image)

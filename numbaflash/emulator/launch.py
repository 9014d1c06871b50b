"""From a kernel to a run: compilation, limits, module variables, and the blocks in chunks."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
from numpy.typing import NDArray

from .arguments import pack
from .counts import Report
from .errors import EmulatorError, Place
from .global_checks import Global
from .grid_order import GridOrder
from .ir import SIZES, Float, Symbol, Variable
from .machine import Machine
from .memory import ALIGNMENT, BASE, GlobalMemory
from .parse import parse
from .program import Program, build, limits, readable
from .schedule import run
from .threads import Checks, Launch, any_strong, granule
from .translate import Translator

Array = NDArray[Any]
_LANES = 8192
"""Lanes that run together: their registers fit the second-level cache."""
_LANES_WAITING = 1 << 18
"""The same where blocks may wait for each other, as at a barrier of the grid: as many as an H100 holds at a time."""
_SHARED_BYTES = 32 << 20
_MOST_LOCAL = 512 << 10
"""Bytes of local memory that a thread may have, on every target."""
_MOST_ORDERED = 8192
"""Blocks between which order is followed: it takes four bytes for each pair of them."""
_MOST_READERS = 1 << 24
"""Readers that are followed, of granules that several blocks read; untouched ones cost nothing."""
_MOST_STATIC = 1 << 30
MAX_STEPS = 10_000_000
"""Basic blocks that may run before a launch counts as hanging."""


@functools.lru_cache(maxsize=256)
def _translation(ptx: str, entry: str | None) -> Translator:
    """The translation of a kernel, made once per PTX text."""
    return Translator(build(parse(ptx), entry))


_COMPILED: weakref.WeakKeyDictionary[Any, dict[Any, str]] = weakref.WeakKeyDictionary()


def ptx_of(kernel: Any, args: Sequence[Any], cc: tuple[int, int]) -> str:
    """The PTX text of a kernel: a text, what `cuda.compile_ptx` returned, or a `@cuda.jit` function for the arguments.

    A jitted function is compiled for the types of the arguments as Numba's own launch would, but without a driver.
    """
    if isinstance(kernel, str):
        return kernel
    if isinstance(kernel, bytes):
        return kernel.decode()
    if isinstance(kernel, tuple) and kernel and isinstance(kernel[0], str):
        return kernel[0]
    function = getattr(kernel, "py_func", None)
    if function is None:
        raise EmulatorError(
            f"kernel is a {type(kernel).__name__}; PTX text, the result of cuda.compile_ptx, or a @cuda.jit function "
            "is accepted",
            kind="argument",
        )
    from numba.cuda.typing.typeof import Purpose, typeof

    try:
        signature = tuple(typeof(x, Purpose.argument) for x in args)
    except (ValueError, TypeError) as error:
        raise EmulatorError(f"argument of a type that Numba does not know: {error}", kind="argument") from error
    versions = _COMPILED.setdefault(kernel, {})
    if (signature, cc) not in versions:
        options = kernel.targetoptions
        kept = {name: options[name] for name in ("lineinfo", "fastmath", "opt") if name in options}
        versions[signature, cc] = _compile(function, signature, cc, debug=bool(options.get("debug")), **kept)
    return versions[signature, cc]


def _compile(function: Any, signature: tuple[Any, ...], cc: tuple[int, int], **options: Any) -> str:
    """Compiles for a device that need not be there: Numba asks the driver which one it is, for device functions."""
    from numba.cuda import dispatcher
    from numba.cuda.compiler import compile_ptx

    with mock.patch.object(dispatcher, "get_current_device", return_value=SimpleNamespace(compute_capability=cc)):
        return str(compile_ptx(function, signature, cc=cc, **options)[0])


def dimensions(value: int | Sequence[int], name: str) -> tuple[int, int, int]:
    """Grid or block as three positive integers."""
    parts = tuple(value) if isinstance(value, Sequence) else (value,)
    if not 1 <= len(parts) <= 3 or not all(isinstance(x, int | np.integer) and x > 0 for x in parts):
        raise EmulatorError(f"{name} is {value!r}; one to three positive integers are accepted", kind="argument")
    x, y, z = (*(int(part) for part in parts), 1, 1)[:3]
    return x, y, z


@dataclass(frozen=True)
class Kernel:
    """A kernel that is translated, to be run on global memory that stays (`emulator.launch` brings its own).

    Attributes:
        translation: Its program and segments.
    """

    translation: Translator

    @property
    def name(self) -> str:
        """Its name in the PTX text."""
        return self.translation.program.name

    def run(
        self,
        memory: GlobalMemory,
        grid: int | Sequence[int],
        block: int | Sequence[int],
        *values: Any,
        shared: int = 0,
        checks: Checks | None = None,
        max_steps: int = MAX_STEPS,
    ) -> Report:
        """Runs it.

        Args:
            memory: Global memory, changed in place.
            grid: Blocks, one to three numbers.
            block: Threads of a block, one to three numbers.
            *values: One scalar per kernel parameter; addresses are those of `memory`.
            shared: Bytes of dynamic shared memory.
            checks: Which checks to make; all by default.
            max_steps: Basic blocks that may run before the launch counts as hanging.

        Returns:
            What the launch would have cost the hardware.

        Raises:
            EmulatorError: The launch is over the limits of the target, an argument does not fit, or a check failed.
        """
        program = self.translation.program
        params = pack(program, values)
        return _run(self.translation, grid, block, params, memory, shared, checks or Checks(), max_steps)


def load(ptx: str, entry: str | None = None) -> Kernel:
    """Translates a kernel of a PTX text, once per text.

    Raises:
        EmulatorError: The text is malformed, has no such kernel, or has something that is not implemented.
    """
    return Kernel(_translation(ptx, entry))


def _run(
    translation: Translator,
    grid: int | Sequence[int],
    block: int | Sequence[int],
    params: Array,
    memory: GlobalMemory,
    shared: int,
    checks: Checks,
    max_steps: int,
) -> Report:
    program = translation.program
    blocks, threads = dimensions(grid, "grid"), dimensions(block, "block")
    _check_limits(program, blocks, threads, shared)
    symbols = _module_variables(program, memory)
    total = int(np.prod(blocks))
    fences = program.names.fences
    waits = fences and any(site.device_wide for site in program.sites)
    races = checks.global_races and not (fences and total > _MOST_ORDERED)
    order = GridOrder(total if fences and races else 0)
    report = Report(readable(program.name))
    launch = Launch(
        translation,
        blocks,
        threads,
        params,
        _shadow(program, memory, order, races),
        symbols,
        shared,
        checks,
        max_steps,
        order,
        report,
    )
    try:
        lanes = -(-int(np.prod(threads)) // 32) * 32
        per_block = max(program.static_shared + shared, 1)
        together = _LANES_WAITING if waits and total * lanes <= _LANES_WAITING else _LANES
        count = max(1, min(together // lanes, _SHARED_BYTES // per_block))
        for first in range(0, total, count):
            run(Machine(launch, first, min(count, total - first)))
    finally:
        for address in symbols.values():
            memory.free(address)
    report.shared = [launch.shared_counts[x] for x in sorted(launch.shared_counts)]
    report.global_ = [launch.global_counts[x] for x in sorted(launch.global_counts)]
    return report


def _shadow(program: Program, memory: GlobalMemory, order: GridOrder, races: bool) -> Global:
    """Global memory as the checks of a launch see it."""
    shift = granule(program.sites, "global")
    granules = (memory.data.size >> shift) + 1
    followed = order.clocks.own.size
    strong = granules if any_strong(program.sites, "global") else 0
    return Global(
        data=memory.data,
        valid=memory.valid,
        writer=np.zeros(granules, np.int32),
        strong_writer=np.zeros(strong, np.int32),
        other_writer=np.zeros(strong, np.int32),
        reader=np.zeros(granules, np.int32),
        strong_reader=np.zeros(strong, np.int32),
        written=np.zeros(granules if followed else 0, np.int32),
        strong_written=np.zeros(strong if followed else 0, np.int32),
        other_written=np.zeros(strong if followed else 0, np.int32),
        read=np.zeros(granules if followed else 0, np.int32),
        strong_read=np.zeros(strong if followed else 0, np.int32),
        row=np.zeros(granules if followed else 0, np.int32),
        readers=np.zeros((_MOST_READERS // followed, followed) if followed else (0, 0), np.int32),
        clocks=order.clocks,
        shift=shift,
        base=BASE,
        races=races,
    )


def _check_limits(program: Program, grid: tuple[int, ...], block: tuple[int, ...], shared: int) -> None:
    target = program.module.target
    allowed = limits(target)
    place = Place(readable(program.name))
    threads = int(np.prod(block))
    most = min(allowed.threads, program.max_threads or allowed.threads)
    if threads > most or block[2] > 64:
        raise EmulatorError(
            f"block {block} has {threads} threads; {target} takes {most} (64 in z)", kind="limit", place=place
        )
    if grid[0] >= 1 << 31 or max(grid[1:]) > 65535:
        raise EmulatorError(f"grid {grid} is over the limits (2^31 - 1, 65535, 65535)", kind="limit", place=place)
    if not isinstance(shared, int | np.integer) or shared < 0:
        raise EmulatorError(f"shared is {shared!r}; a number of bytes is accepted", kind="argument", place=place)
    if program.local_size > _MOST_LOCAL:
        raise EmulatorError(f"{program.local_size} bytes of local memory a thread", kind="limit", place=place)
    used = program.shared_used + shared
    if used > allowed.shared:
        raise EmulatorError(
            f"{used} bytes of shared memory ({shared} of them dynamic); {target} has {allowed.shared} for a block",
            kind="limit",
            place=place,
        )


def _module_variables(program: Program, memory: GlobalMemory) -> dict[str, int]:
    """Places the variables of a module that its kernel names, with their initial values."""
    wanted = {
        name: variable
        for name, variable in program.module.variables.items()
        if variable.space in ("global", "const") and program.symbols_used(name)
    }
    found = {}
    for name, variable in wanted.items():
        if variable.size > _MOST_STATIC:
            raise EmulatorError(f"{name} has {variable.size} bytes", kind="limit")
        found[name] = memory.allocate(variable.size, variable.align if variable.align < ALIGNMENT else 0)
    for name, variable in wanted.items():
        data = b"".join(_initial(variable, value, found) for value in variable.initial)
        data = data[: variable.size].ljust(variable.size, b"\0")
        memory.view(found[name], variable.size)[:] = np.frombuffer(data, np.uint8)
    return found


def _initial(variable: Variable, value: int | Float | Symbol, addresses: dict[str, int]) -> bytes:
    size = SIZES[variable.type]
    if isinstance(value, Float):
        bits = value.bits.to_bytes(value.size, "little")
        if variable.type == "f32" and value.size == 8:  # a decimal literal
            return np.frombuffer(bits, "f8").astype("f4").tobytes()
        if value.size != size:
            raise EmulatorError(f"initial value of {variable.name}: a float for a .{variable.type}", kind="unsupported")
        return bits
    if isinstance(value, Symbol):
        if value.name not in addresses:
            raise EmulatorError(f"initial value {value.name} of {variable.name} is not placed", kind="unsupported")
        value = addresses[value.name] + value.offset
    return (value & (1 << 8 * size) - 1).to_bytes(size, "little")

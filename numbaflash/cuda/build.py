"""Builds kernels for any target, without a GPU, and keeps them on disk.

Numba makes PTX of a kernel, ptxas machine code of the PTX, and says what it takes. A build is found again by all that
it depends on: the kernel's sources, its description, the target and the versions of the tools.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import gc
import hashlib
import inspect
import json
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

from numba import cuda

from numbaflash.user_cache import cache_directory

from .tools import find_tool

__all__ = ["Build", "Buildable", "Usage", "build", "disassemble"]

# At its first level ptxas keeps to the order of loads and MMAs that the kernels are written in, and spills nothing. At
# its third it hoists loads until it must spill: 4 to 36 bytes in 6 of 8 variants of flash_v2, and 0.2 more instructions
# for each MMA.
_PTXAS_OPTIONS = ("-O1", "-v")


class Buildable(Protocol):
    """A description of a kernel; its repr names all that the kernel depends on."""

    @property
    def threads(self) -> int:
        """Threads of a block."""

    @property
    def blocks(self) -> int:
        """Blocks per multiprocessor that registers must suffice for."""

    @property
    def signature(self) -> Any:
        """Numba's signature of the kernel."""

    def kernel(self) -> Callable[..., None]:
        """Return the function to compile."""


@dataclass(frozen=True)
class Usage:
    """What a kernel takes, by ptxas.

    Attributes:
        registers: Per thread.
        spill_bytes: Written to and read from local memory for want of registers, per thread.
        stack_bytes: Local memory, per thread.
    """

    registers: int
    spill_bytes: int
    stack_bytes: int


@dataclass(frozen=True)
class Build:
    """A built kernel.

    Attributes:
        name: Its entry in the PTX and the cubin.
        ptx: PTX text.
        cubin: Machine code, as the driver loads it.
        usage: What it takes.
    """

    name: str
    ptx: str
    cubin: bytes
    usage: Usage


@functools.lru_cache(maxsize=512)
def build(description: Buildable, cc: tuple[int, int]) -> Build:
    """Build a kernel, or find it built.

    Args:
        description: What to build.
        cc: Compute capability, as (8, 0).

    Raises:
        RuntimeError: ptxas is missing or rejects the kernel.
    """
    directory = cache_directory() / _key(description, cc)
    found = _read(directory)
    if found is not None:
        return found
    built = _compile(description, cc)
    _write(directory, built)
    return built


def disassemble(cubin: bytes) -> str:
    """Return the machine code of a cubin as cuobjdump lists it."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return _run(_tool("cuobjdump"), "-sass", file.name).stdout


def _compile(description: Buildable, cc: tuple[int, int]) -> Build:
    kernel = description.kernel()
    bounds = (description.threads, description.blocks)
    with _no_collector():
        ptx, _ = cuda.compile_ptx(kernel, description.signature, cc=cc, launch_bounds=bounds)
    name = kernel.__name__
    ptx = _plain_names(ptx, name)
    with tempfile.TemporaryDirectory() as directory:
        source, cubin = Path(directory, "kernel.ptx"), Path(directory, "kernel.cubin")
        source.write_text(ptx)
        arch = f"-arch=sm_{cc[0]}{cc[1]}"
        said = _run(_tool("ptxas"), *_PTXAS_OPTIONS, arch, str(source), "-o", str(cubin)).stderr
        return Build(name, ptx, cubin.read_bytes(), _usage(said))


@contextlib.contextmanager
def _no_collector() -> Iterator[None]:
    """Keep Python's cycle collector still: it takes a third of a compilation, and finds next to nothing."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _plain_names(ptx: str, name: str) -> str:
    """Name the kernel `name` and nothing by a counter of Numba's, so that one description gives one text."""
    entry = re.search(r"\.visible \.entry (\w+)\(", ptx)
    if entry is None:
        raise RuntimeError("the compiled PTX has no entry")
    ptx = re.sub(r"\.common .* _ZN08NumbaEnv\w+;\n", "", ptx).replace(entry.group(1), name)
    for i, shared in enumerate(dict.fromkeys(re.findall(r"_cudapy_smem_\d+", ptx))):
        ptx = re.sub(rf"\b{shared}\b", f"shared_{i}", ptx)
    return ptx


def _usage(said: str) -> Usage:
    registers = re.search(r"Used (\d+) registers", said)
    memory = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", said)
    if registers is None or memory is None:
        raise RuntimeError(f"ptxas did not say what the kernel takes, but: {said}")
    stack, stores, loads = map(int, memory.groups())
    return Usage(int(registers.group(1)), stores + loads, stack)


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{Path(command[0]).name} failed: {done.stderr.strip()}")
    return done


def _tool(name: str) -> str:
    path = find_tool(name)
    if path is None:
        raise RuntimeError(f"{name} is missing; pip install 'numbaflash[cuda]' brings it")
    return path


# ---- on disk


@functools.cache
def _toolchain() -> str:
    versions = [version(name) for name in ("numba", "numba-cuda", "llvmlite")]
    return repr((versions, _run(_tool("ptxas"), "--version").stdout, _PTXAS_OPTIONS))


@functools.cache
def _sources(start: Path) -> str:
    """Return a digest of a file and of all that it imports from its own package, directly or not."""
    found, waiting = {start}, [start]
    while waiting:
        new = set(_imports(waiting.pop())) - found
        found |= new
        waiting += new
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(found))).hexdigest()


def _imports(path: Path) -> Iterator[Path]:
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            for name in [node.module] if node.module else [alias.name for alias in node.names]:
                yield path.with_name(f"{name}.py")


def _key(description: Buildable, cc: tuple[int, int]) -> str:
    depends_on = (_sources(Path(__file__)), _sources(Path(inspect.getfile(type(description)))), _toolchain())
    return hashlib.sha256(f"{depends_on} {description!r} {cc}".encode()).hexdigest()[:32]


def _read(directory: Path) -> Build | None:
    try:
        facts = json.loads((directory / "facts.json").read_text())
        ptx, cubin = (directory / "kernel.ptx").read_text(), (directory / "kernel.cubin").read_bytes()
        if facts["digest"] != hashlib.sha256(ptx.encode() + cubin).hexdigest():
            return None
        return Build(facts["name"], ptx, cubin, Usage(**facts["usage"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None  # not there, or not whole: it is built anew


def _write(directory: Path, built: Build) -> None:
    """Keep a build; another process may be doing the same, and a disk that is full or read-only is no error."""
    facts = {
        "name": built.name,
        "usage": asdict(built.usage),
        "digest": hashlib.sha256(built.ptx.encode() + built.cubin).hexdigest(),
    }
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory.parent) as temporary:
            whole = Path(temporary, "build")
            whole.mkdir()
            (whole / "kernel.ptx").write_text(built.ptx)
            (whole / "kernel.cubin").write_bytes(built.cubin)
            (whole / "facts.json").write_text(json.dumps(facts, indent=1))
            if directory.exists() and _read(directory) is None:
                shutil.rmtree(directory)
            whole.rename(directory)
    except OSError:
        return

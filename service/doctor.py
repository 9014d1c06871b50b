"""`numbaflash doctor`: what this machine has, which backend that means, and the commands that bring what is missing."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from json import dumps

import llvmlite.binding as llvm
from rich.console import Console
from rich.table import Table

from numbaflash.cpu.pool import thread_count
from numbaflash.cuda.driver import find_gpus, find_usable_gpu

from .demo import weights
from .processor import processor_name

# Extras that users install, and what each is for.
EXTRAS = {
    "service": "numbaflash serve and its client",
    "demo": "numbaflash demo",
    "cuda": "kernels for NVIDIA GPUs",
}
# What the CPU kernels can make use of, by LLVM's names, widest last.
VECTOR_FEATURES = ("neon", "avx", "f16c", "fma", "avx2", "avx512f", "avx512bf16", "avx512fp16")


@dataclass(frozen=True)
class Machine:
    """Processor and memory.

    Attributes:
        cpu: its name.
        cores: logical cores that this process may use.
        threads: threads that Numba will use.
        vector_features: those of `VECTOR_FEATURES` that LLVM finds.
        memory_gib: physical memory.
    """

    cpu: str
    cores: int
    threads: int
    vector_features: list[str]
    memory_gib: float


@dataclass(frozen=True)
class Gpu:
    """A CUDA device."""

    name: str
    compute_capability: str


@dataclass(frozen=True)
class Missing:
    """Something that is not here.

    Attributes:
        what: its name.
        purpose: what needs it.
        command: the command that brings it.
    """

    what: str
    purpose: str
    command: str


@dataclass(frozen=True)
class Package:
    """A package that numbaflash asks for.

    Attributes:
        name: its name.
        requirement: what pip is asked for: name, extras and versions.
        extra: numbaflash's extra that asks for it; None where numbaflash itself does.
    """

    name: str
    requirement: str
    extra: str | None


@dataclass(frozen=True)
class Diagnosis:
    """All that the doctor has to say.

    Attributes:
        versions: of Python and of each package that an extra asks for; None where it is not installed.
        machine: processor and memory.
        gpus: the CUDA devices found.
        gpu_note: how the search for them went.
        backend: the backend of `attention`, of caches and of the service when none is asked for.
        reason: why that one.
        missing: what could be installed.
    """

    versions: dict[str, str | None]
    machine: Machine
    gpus: list[Gpu]
    gpu_note: str
    backend: str
    reason: str
    missing: list[Missing]


def run(*, json: bool = False) -> None:
    """Print the diagnosis: tables, or one JSON object."""
    diagnosis = diagnose()
    if json:
        print(dumps(asdict(diagnosis)))
    else:
        show(diagnosis, Console())


def diagnose() -> Diagnosis:
    """Look at this machine; needs no GPU and none of the extras."""
    gpus, gpu_note = find_gpus()
    gpu, reason = find_usable_gpu()
    return Diagnosis(
        versions={
            "python": platform.python_version(),
            "numbaflash": importlib.metadata.version("numbaflash"),
            **{package.name: installed(package.name) for package in requirements()},
        },
        machine=examine_machine(),
        gpus=[Gpu(gpu.name, "{}.{}".format(*gpu.compute_capability)) for gpu in gpus],
        gpu_note=gpu_note,
        backend="cpu" if gpu is None else "cuda",
        reason=reason,
        missing=find_missing(),
    )


def examine_machine() -> Machine:
    """Processor and memory of this machine."""
    features = llvm.get_host_cpu_features()
    return Machine(
        cpu=processor_name(),
        cores=len(os.sched_getaffinity(0)),
        # numba.get_num_threads() would start Numba's OpenMP threads, which slow PyTorch's down to a sixth.
        threads=thread_count(),
        vector_features=[name for name in VECTOR_FEATURES if features.get(name)],
        memory_gib=round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
    )


def find_missing() -> list[Missing]:
    """The extras that are not complete, and the demo's model where it was not downloaded yet."""
    missing = []
    for extra, purpose in EXTRAS.items():
        absent = [package for package in requirements() if package.extra == extra and installed(package.name) is None]
        if absent:
            command = shlex.join([sys.executable, "-m", "pip", "install", *(package.requirement for package in absent)])
            missing.append(Missing(", ".join(package.name for package in absent), purpose, command))
    if not weights.gguf_path().exists():
        missing.append(Missing(f"{weights.MODEL_NAME} (93 MB)", "numbaflash demo", "numbaflash demo"))
    return missing


def requirements() -> Iterator[Package]:
    """Every package that numbaflash itself or one of `EXTRAS` asks for."""
    for line in importlib.metadata.requires("numbaflash") or ():
        needed, _, marker = (part.strip() for part in line.partition(";"))
        name, extra = re.match(r"[\w.-]+", needed), re.search(r"extra == ['\"](\w+)['\"]", marker)
        if name and name[0] != "numbaflash" and (extra is None or extra[1] in EXTRAS):
            yield Package(name[0], needed, extra[1] if extra else None)


def installed(name: str) -> str | None:
    """Version of an installed package, or None."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def show(diagnosis: Diagnosis, console: Console) -> None:
    """Print the diagnosis as tables."""
    machine = diagnosis.machine
    facts = Table(title="This machine", title_justify="left", show_header=False)
    facts.add_row("Backend", f"[bold]{diagnosis.backend}[/bold]: {diagnosis.reason}")
    facts.add_row("CPU", f"{machine.cpu}, {machine.cores} cores, {machine.threads} threads used")
    facts.add_row("Vector units", " ".join(machine.vector_features) or "none that the kernels know")
    facts.add_row("Memory", f"{machine.memory_gib} GiB")
    named = [f"{gpu.name} (compute capability {gpu.compute_capability})" for gpu in diagnosis.gpus]
    facts.add_row("GPUs", "\n".join(named) or "none found")
    console.print(facts)

    versions = Table(title="Versions", title_justify="left", show_header=False)
    for name, version in diagnosis.versions.items():
        versions.add_row(name, version or "[yellow]not installed[/yellow]")
    console.print(versions)

    if not diagnosis.missing:
        console.print("[green]Nothing is missing.[/green]")
    for missing in diagnosis.missing:
        console.print(
            f"[yellow]Missing[/yellow] {missing.what}, for {missing.purpose}. This brings it:", highlight=False
        )
        # A command is to be copied: it is printed in one piece, however long.
        console.print(f"  {missing.command}", soft_wrap=True, markup=False, highlight=False)

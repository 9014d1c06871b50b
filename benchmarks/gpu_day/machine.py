"""What the run is of: the GPU, its driver, and the versions of what builds and times kernels."""

from __future__ import annotations

import platform
import re
import subprocess
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from numbaflash.cuda.driver import bindings, checked, find_usable_gpu
from numbaflash.cuda.tools import find_tool

from .parts import Row

_PACKAGES = (
    *("numpy", "numba", "numba-cuda", "llvmlite", "cuda-core", "cuda-bindings", "ml-dtypes", "torch"),
    *("flash-attn", "flashinfer-python", "grpcio", "protobuf"),
)
_TOOLS = ("ptxas", "cuobjdump", "compute-sanitizer", "ncu")
_GPU_FACTS = "name,driver_version,memory.total,clocks.max.sm,clocks.max.memory,power.limit,ecc.mode.current"


def describe_machine(emulated: bool) -> Iterator[Row]:
    """Yield facts, the GPU's name first."""
    gpu, note = find_usable_gpu()
    yield {"what": "GPU", "value": "emulated" if emulated else gpu.name if gpu else "none"}
    yield {"what": "found", "value": note}
    if gpu:
        yield {"what": "compute capability", "value": "{}.{}".format(*gpu.compute_capability)}
        known = checked(bindings().cuDriverGetVersion())
        yield {"what": "CUDA of the driver", "value": f"{known // 1000}.{known % 1000 // 10}"}
    if smi := find_tool("nvidia-smi"):
        said = _output(smi, f"--query-gpu={_GPU_FACTS}", "--format=csv,noheader", "--id=0")
        for name, value in zip(_GPU_FACTS.split(","), said.split(", "), strict=False):
            yield {"what": name, "value": value}
    yield {
        "what": "commit",
        "value": _output("git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"),
    }
    yield {"what": "python", "value": platform.python_version()}
    for package in _PACKAGES:
        yield {"what": package, "value": _version(package)}
    for tool in _TOOLS:
        yield {"what": tool, "value": _tool_version(tool)}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not there"


def _tool_version(name: str) -> str:
    path = find_tool(name)
    if path is None:
        return "not there"
    # NVIDIA's tools say a name, a copyright, then a line with the version.
    said = re.findall(r"[Vv]ersion .*|V\d+\.\S+", _output(path, "--version"))
    return said[-1] if said else "there"


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        return f"unknown: {error}"

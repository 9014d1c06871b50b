"""NVIDIA's command-line tools, wherever they are installed: ptxas, cuobjdump, compute-sanitizer, ncu."""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
from pathlib import Path

__all__ = ["find_tool"]

# Where a CUDA toolkit is installed unless it is told otherwise (CUDA Installation Guide for Linux).
_USUAL_TOOLKIT = "/usr/local/cuda"


@functools.cache
def find_tool(name: str) -> str | None:
    """Return the path of a tool, None where it is not installed.

    NVIDIA's wheels come first, for the PTX is made by a library that comes as a wheel too, and an older ptxas of the
    system may not know it. Then the PATH, the toolkit that CUDA_HOME or CUDA_PATH names, and the usual place of one.
    """
    wheels = importlib.util.find_spec("nvidia")
    for root in (wheels and wheels.submodule_search_locations) or ():
        for path in sorted(Path(root).glob(f"cu*/bin/{name}*"), reverse=True):
            if path.stem == name:
                return str(path)
    toolkits = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), _USUAL_TOOLKIT]
    return shutil.which(name) or shutil.which(
        name, path=os.pathsep.join(str(Path(toolkit, "bin")) for toolkit in toolkits if toolkit)
    )

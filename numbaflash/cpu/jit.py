"""Compiling kernels once for a machine: the result is kept on disk, and belongs to this exact source."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from numba import njit, types
from numba.core.caching import FunctionCache

__all__ = ["entry_point", "kernel", "native", "piece"]

# A part of a kernel. Only compiled code calls it: wrappers for Python and C would take a fifth more time to compile.
_PART: dict[str, Any] = {"error_model": "numpy", "no_cpython_wrapper": True, "no_cfunc_wrapper": True}
native: Any = njit(**_PART)

# A large part with one caller, which it becomes a piece of before types are inferred. Numba would compile it by itself,
# and all that it calls once more with its caller.
piece: Any = njit(inline="always", **_PART)


def kernel(function: Callable[..., int | None]) -> Any:
    """Compile a function of integers, addresses most of them, at its first call, to run without the GIL.

    The machine code is kept where Numba keeps it (NUMBA_CACHE_DIR, __pycache__ or the user's cache directory); where
    none of them can be written, each process compiles anew.
    """
    dispatcher: Any = njit(error_model="numpy", nogil=True)(function)
    try:
        dispatcher._cache = _StampedCache(function)
    except RuntimeError:  # Numba found no directory to write to
        return dispatcher
    return dispatcher


@functools.cache
def entry_point(kernel: Any) -> int:
    """The address of a kernel, as C calls it; without the GIL it may be called as with it."""
    arguments = (types.int64,) * kernel.py_func.__code__.co_argcount
    kernel.compile(arguments)
    compiled = kernel.overloads[arguments]
    address: int = compiled.library.get_pointer_to_function(compiled.fndesc.llvm_cfunc_wrapper_name)
    return address


def _digest_of_sources() -> str:
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


_SOURCES = _digest_of_sources()


class _StampedCache(FunctionCache):
    """Numba takes the age of one file for a function's version; a kernel is made of all files of this folder."""

    def _index_key(self, sig: Any, codegen: Any) -> Any:
        return (*super()._index_key(sig, codegen), _SOURCES)

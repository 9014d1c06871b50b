"""Compiling kernels once for a machine: the result is kept on disk, and belongs to this exact source."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

from numba import njit, types
from numba.core.caching import FunctionCache, IndexDataCacheFile
from numba.core.registry import cpu_target

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
    with contextlib.suppress(RuntimeError):  # Numba found no directory to write to
        dispatcher._cache = _Cache(function)
    return dispatcher


@functools.cache
def entry_point(kernel: Any) -> int:
    """The address of a kernel, as C calls it; without the GIL it may be called as with it."""
    arguments = (types.int64,) * kernel.py_func.__code__.co_argcount
    kernel.compile(arguments)
    compiled = kernel.overloads[arguments]
    address: int = compiled.library.get_pointer_to_function(compiled.fndesc.llvm_cfunc_wrapper_name)
    return address


def _made_of() -> str:
    """What all files of this folder say, and the machine that they are compiled for, in 32 letters."""
    digest = hashlib.sha256(repr(cpu_target.target_context.codegen().magic_tuple()).encode())
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:32]


_MADE_OF = _made_of()


class _Cache(FunctionCache):
    """Numba's, for kernels that are made of all files of this folder, and without its errors: a call needs no disk."""

    def __init__(self, function: Any) -> None:
        super().__init__(function)
        # Numba takes the age of one file for a function's version. And two processes that compile the same function
        # for different machines at once would give the same number to both: each kind has names of its own here.
        names = f"{self._impl.filename_base}.{_MADE_OF}"
        self._cache_file = _CheckedFile(self._cache_path, names, self._impl.locator.get_source_stamp())

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        try:
            return super().load_overload(sig, target_context)
        except Exception:  # of any kind: bytes that are damaged were unpickled
            with contextlib.suppress(OSError):
                self.flush()
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        with contextlib.suppress(Exception):  # the disk is full, the folder is gone, the index is damaged for good
            super().save_overload(sig, data)


class _CheckedFile(IndexDataCacheFile):
    """Numba's, with a checksum of the machine code: a disk that was full, or lost power, keeps parts of files."""

    def _save_data(self, name: str, data: Any) -> None:
        content = self._dump(data)
        super()._save_data(name, (hashlib.sha256(content).digest(), content))

    def _load_data(self, name: str) -> Any:
        checksum, content = super()._load_data(name)
        if hashlib.sha256(content).digest() != checksum:
            raise ValueError(f"{name} does not match its checksum")
        return pickle.loads(content)

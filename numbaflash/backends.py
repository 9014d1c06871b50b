"""Which backend solves a problem."""

from __future__ import annotations

from typing import Any

from .cuda.driver import has_usable_gpu
from .device_arrays import is_on_gpu

__all__ = ["BACKENDS", "choose_backend"]

BACKENDS = ("cuda", "cpu", "emulated")
"""What `attention` runs on, and caches live on."""


def choose_backend(backend: str | None, accepted: tuple[str, ...] = BACKENDS, *, array: Any = None) -> str:
    """Return the backend to use; None chooses: "cuda" where the array lives on a GPU or one is there, else "cpu".

    Args:
        backend: What was asked for.
        accepted: What there is to choose from.
        array: One that the work is about.

    Raises:
        ValueError: There is no such backend.
    """
    if backend is None:
        return "cuda" if "cuda" in accepted and (is_on_gpu(array) or has_usable_gpu()) else "cpu"
    if backend not in accepted:
        raise ValueError(f"backend must be {' or '.join(map(repr, accepted))} or None, got {backend!r}")
    return backend

"""Which backend solves a problem."""

from __future__ import annotations

__all__ = ["choose_backend"]

_BACKENDS = ("cpu",)


def choose_backend(backend: str | None) -> str:
    """Return the backend to use; None chooses.

    Raises:
        ValueError: There is no such backend.
    """
    if backend is None:
        return "cpu"
    if backend not in _BACKENDS:
        raise ValueError(f"backend must be {' or '.join(map(repr, _BACKENDS))} or None, got {backend!r}")
    return backend

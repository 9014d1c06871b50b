"""A folder of files that one server owns, within a number of bytes."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from .config import ServeConfig
from .errors import StorageError

SUFFIX: Final = ".safetensors"


class Folder:
    """Made where it does not exist; what a process that was killed left half written is swept away.

    Args:
        path: Of the folder.
        budget: Bytes of all files in it.

    Attributes:
        budget: As given.
        nbytes: Bytes that are reserved.

    Raises:
        OSError: The folder cannot be made, read or written, or another server uses it.
    """

    def __init__(self, path: Path, budget: int) -> None:
        self.path = path
        self.budget = budget
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._lock = os.open(path / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock)
            raise OSError(f"{path} is used by another server") from None
        for partial in path.rglob(f".*{SUFFIX}.*"):
            partial.unlink()
        self.nbytes = 0

    def close(self) -> None:
        """Let others use the folder."""
        os.close(self._lock)

    def files(self) -> Iterator[Path]:
        """Return the files that are whole."""
        return (file for file in self.path.rglob(f"*{SUFFIX}") if not file.name.startswith("."))

    def measure(self) -> int:
        """Return the bytes of the files that are whole."""
        nbytes = 0
        for file in self.files():
            with contextlib.suppress(FileNotFoundError):  # it has been removed meanwhile
                nbytes += file.stat().st_size
        return nbytes

    def reserve(self, nbytes: int) -> None:
        """Count bytes in before they are written.

        Raises:
            StorageError: There would be too many.
        """
        if self.nbytes + nbytes > self.budget:
            raise StorageError(f"{nbytes} bytes do not fit: {self.nbytes} of {self.budget} on disk are taken")
        self.nbytes += nbytes

    def release(self, nbytes: int) -> None:
        """Count bytes out."""
        self.nbytes -= nbytes


def folders(config: ServeConfig) -> tuple[Folder | None, Folder | None]:
    """Open the folders of spilled sessions and of snapshots, where the configuration has them.

    Raises:
        OSError: One cannot be made, read or written, or another server uses it.
    """
    spill = Folder(config.spill_dir / "sessions", config.spill_memory) if config.spill_dir else None
    path = config.snapshot_dir or (config.spill_dir and config.spill_dir / "snapshots")
    try:
        return spill, Folder(path, config.snapshot_memory) if path else None
    except OSError:
        if spill:
            spill.close()
        raise


def storage_error(error: OSError, what: str) -> StorageError:
    """Describe an error of the operating system to a caller: what went wrong, not where."""
    return StorageError(f"{what}: {os.strerror(error.errno) if error.errno else 'an error of the file system'}")

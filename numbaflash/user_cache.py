"""The folder of what can be made again: built kernels, the demo's model, the last benchmark."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["cache_directory"]


def cache_directory() -> Path:
    """Return `$NUMBAFLASH_CACHE_DIR`, else `numbaflash` in `$XDG_CACHE_HOME` or `~/.cache`; it may not exist."""
    if own := os.environ.get("NUMBAFLASH_CACHE_DIR"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "numbaflash"

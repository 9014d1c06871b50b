"""Where things lie that can be made again."""

from __future__ import annotations

from pathlib import Path

import pytest

from numbaflash.user_cache import cache_directory


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("NUMBAFLASH_CACHE_DIR", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_directory() == tmp_path / ".cache" / "numbaflash"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_directory() == tmp_path / "xdg" / "numbaflash"
    monkeypatch.setenv("NUMBAFLASH_CACHE_DIR", str(tmp_path / "own"))
    assert cache_directory() == tmp_path / "own"

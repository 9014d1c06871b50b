"""Kernels on disk: calls do without, whatever became of the files."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numba
import pytest

from numbaflash.cpu import jit


def add(a: int, b: int) -> int:
    return a + b


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    return tmp_path


def in_a_new_process() -> Any:
    """The kernel as a process has it that has not yet called it."""
    return jit.kernel(add)


def files(folder: Path, suffix: str) -> list[Path]:
    return list(folder.rglob(f"*{suffix}"))


def spoil_machine_code(content: bytes) -> bytes:
    middle = content.index(b"\x7fELF") + 100
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


DAMAGE: dict[str, tuple[str, Any]] = {
    "an index that is cut off": (".nbi", lambda content: content[:20]),
    "an empty index": (".nbi", lambda _: b""),
    "machine code that is cut off": (".nbc", lambda content: content[:1000]),
    "no machine code": (".nbc", lambda _: b""),
    "machine code with a bit that is wrong": (".nbc", spoil_machine_code),
    "something else": (".nbc", lambda _: pickle.dumps((b"another", "thing", 3))),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_made_anew(damage: str, folder: Path) -> None:
    suffix, spoil = DAMAGE[damage]
    assert in_a_new_process()(1, 2) == 3
    for path in files(folder, suffix):
        path.write_bytes(spoil(path.read_bytes()))
    assert in_a_new_process()(1, 2) == 3
    third = in_a_new_process()
    assert third(1, 2) == 3
    assert third.stats.cache_hits


def test_what_cannot_be_kept_is_compiled_all_the_same(folder: Path) -> None:
    kernel = in_a_new_process()
    for path in folder.iterdir():
        path.rmdir()
        path.write_bytes(b"in the way of the folder")
    assert kernel(1, 2) == 3
    assert in_a_new_process()(1, 2) == 3


def test_what_is_compiled_for_different_machines_at_once_stays_apart(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_a_new_process()(1, 2)
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(jit, "_MADE_OF", "another machine")
        in_a_new_process()(1, 2)
    assert {path.name.split(".")[-3] for path in files(folder, ".nbc")} == {jit._MADE_OF, "another machine"}

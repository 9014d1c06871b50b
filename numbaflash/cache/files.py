"""Caches on disk: one safetensors file, with its version, its shape and a checksum in the header.

Tensors `layers.N.k` and `layers.N.v` hold (tokens, kv_heads, head_dim): the sink tokens, then everything from the
oldest token that is intact to the newest. Nothing in the file is executed when it is read.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

__all__ = ["RingShape", "SavedLayer", "read", "write"]

_FORMAT = "numbaflash.RingKVCache"
_VERSION = 1


@dataclass(frozen=True)
class RingShape:
    """The arguments that make an empty cache of the same shape."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    capacity: int
    sink_tokens: int
    page_size: int
    rollback: int
    dtype: str


@dataclass(frozen=True, eq=False)
class SavedLayer:
    """One layer: tokens seen, oldest intact position, and what is kept, (tokens, kv_heads, head_dim) each."""

    length: int
    intact: int
    keys: NDArray[Any]
    values: NDArray[Any]


def write(path: str | os.PathLike[str], shape: RingShape, layers: Sequence[SavedLayer]) -> None:
    """Write a cache; a reader sees the old file or the new one, never a part of it.

    Raises:
        OSError: The file cannot be written.
    """
    tensors: dict[str, NDArray[Any]] = {}
    for index, layer in enumerate(layers):
        tensors[f"layers.{index}.k"] = np.ascontiguousarray(layer.keys)
        tensors[f"layers.{index}.v"] = np.ascontiguousarray(layer.values)
    header = {
        "format": _FORMAT,
        "version": str(_VERSION),
        "shape": json.dumps(asdict(shape)),
        "layers": json.dumps([{"length": layer.length, "intact": layer.intact} for layer in layers]),
    }
    header["sha256"] = _digest(header, tensors)
    target = Path(path)
    partial = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    try:
        save_file(tensors, partial, metadata=header)
        partial.replace(target)
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written: {error}") from None
    finally:
        partial.unlink(missing_ok=True)


def read(path: str | os.PathLike[str]) -> tuple[RingShape, list[SavedLayer]]:
    """Read a cache and check all of it.

    Raises:
        OSError: The file cannot be read.
        ValueError: The file is no cache, of another version, or damaged.
    """
    try:
        with safe_open(os.fspath(path), framework="np") as file:
            header = dict(file.metadata() or {})
            if header.get("format") != _FORMAT:
                raise ValueError(f"{path} holds no {_FORMAT} (format {header.get('format')!r})")
            if header.get("version") != str(_VERSION):
                raise ValueError(f"{path} has version {header.get('version')!r}, this release reads {_VERSION}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (a safe_open is no mapping)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    if header.pop("sha256", None) != _digest(header, tensors):
        raise ValueError(f"{path} is damaged: its content does not match its checksum")
    shape = RingShape(**json.loads(header["shape"]))
    layers = [
        SavedLayer(keys=tensors[f"layers.{index}.k"], values=tensors[f"layers.{index}.v"], **state)
        for index, state in enumerate(json.loads(header["layers"]))
    ]
    return shape, layers


def _digest(header: Mapping[str, str], tensors: Mapping[str, NDArray[Any]]) -> str:
    digest = hashlib.sha256(json.dumps(sorted(header.items())).encode())
    for name in sorted(tensors):
        tensor = np.ascontiguousarray(tensors[name])
        digest.update(f"{name}{tensor.dtype.name}{tensor.shape}".encode())
        digest.update(tensor.view(np.uint8).reshape(-1).data if tensor.size else b"")
    return digest.hexdigest()

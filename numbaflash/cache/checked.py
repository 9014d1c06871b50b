"""Safetensors files in pages: written and read one page at a time, and every page has its checksum.

A tensor's page is a number of rows of its first axis. The file is a plain safetensors file; the checksums stand in its
metadata, and so does one of the header itself. Neither side ever holds more than a page beside what it is given.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

__all__ = ["STORED_DTYPES", "CheckedFile", "DamagedError", "PagedTensor", "write"]

STORED_DTYPES: Final = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "int8": "I8", "uint8": "U8"}
"""What tensors may be of, and safetensors' names for it."""
_DTYPES: Final = {code: np.dtype(getattr(ml_dtypes, name, name)) for name, code in STORED_DTYPES.items()}
_DIGEST_BYTES: Final = 16
_DIGEST_DIGITS: Final = 2 * _DIGEST_BYTES
_MAX_HEADER: Final = 100_000_000  # the safetensors library's own limit
_PAGES, _CHECKSUM = "pages", "checksum"  # of the metadata; the other entries are the notes


@dataclass(frozen=True)
class PagedTensor:
    """A tensor of a file: its dtype, its shape, and how many rows of its first axis are a page."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    page_rows: int

    @property
    def row_nbytes(self) -> int:
        """Bytes of a row."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return self.shape[0] * self.row_nbytes

    @property
    def pages(self) -> int:
        """Pages of the tensor; the last one may have fewer rows."""
        return -(-self.shape[0] // self.page_rows)

    def rows_of(self, page: int) -> int:
        """Return how many rows a page has."""
        return min(self.page_rows, self.shape[0] - page * self.page_rows)


def write(
    path: str | os.PathLike[str],
    notes: Mapping[str, str],
    tensors: Mapping[str, PagedTensor],
    content: Iterable[tuple[str, int, NDArray[Any]]],
) -> None:
    """Write a file; whoever reads sees the old file or the new one, never a part, whenever the machine stops.

    Args:
        path: Of the file.
        notes: What its metadata say beside the checksums.
        tensors: What it holds.
        content: Name, page number and rows of every page, each once, in any order.

    Raises:
        OSError: The file cannot be written.
    """
    digests = {name: ["0" * _DIGEST_DIGITS] * tensor.pages for name, tensor in tensors.items()}
    offsets = _offsets(tensors)
    start = len(_encode_header(notes, tensors, digests))  # checksums are of one length, whatever they are
    target = Path(path)
    partial = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    try:
        with partial.open("xb", buffering=0) as file:
            for name, page, rows in content:
                tensor = tensors[name]
                data = np.ascontiguousarray(rows).reshape(-1).view(np.uint8).data
                digests[name][page] = _digest(data)
                _write_at(file, start + offsets[name] + page * tensor.page_rows * tensor.row_nbytes, data)
            _write_at(file, 0, memoryview(_encode_header(notes, tensors, digests)))
            os.fsync(file.fileno())
        partial.replace(target)
        _sync_folder(target.parent)
    finally:
        partial.unlink(missing_ok=True)


class DamagedError(ValueError):
    """A file does not hold what was written.

    Attributes:
        what: Which part of it.
    """

    def __init__(self, path: str | os.PathLike[str], what: str) -> None:
        super().__init__(f"{os.fspath(path)} is damaged: {what}")
        self.what = what


class CheckedFile:
    """A file that `write` wrote, open for reading; its header is checked at once, each page when it is read.

    Args:
        path: Of the file.

    Attributes:
        notes: As they were given.
        tensors: As they were given.

    Raises:
        OSError: The file cannot be read.
        DamagedError: It is no such file, or its header is damaged; a ValueError.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = path
        self._file = Path(path).open("rb", buffering=0)  # noqa: SIM115 - `close` closes it
        try:
            self._read_header()
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            self._file.close()
            raise DamagedError(path, str(error)) from None
        except BaseException:
            self._file.close()
            raise

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def read(self, name: str, page: int) -> NDArray[Any]:
        """Return the rows of a page.

        Raises:
            OSError: The file cannot be read.
            DamagedError: The page is damaged.
        """
        tensor = self.tensors[name]
        rows = np.empty((tensor.rows_of(page), *tensor.shape[1:]), tensor.dtype)
        data = rows.reshape(-1).view(np.uint8).data
        self._file.seek(self._start + self._offsets[name] + page * tensor.page_rows * tensor.row_nbytes)
        whole = _read_into(self._file, data)
        if not whole or _digest(data) != self._digests[name][page]:
            raise DamagedError(self._path, f"page {page} of {name} does not match its checksum")
        return rows

    def _read_header(self) -> None:
        size = os.fstat(self._file.fileno()).st_size
        length = bytearray(8)
        _read_into(self._file, memoryview(length))
        header_nbytes = int.from_bytes(length, "little")
        if size < 8 or header_nbytes > min(size - 8, _MAX_HEADER):
            raise ValueError(f"its header is cut off, or it is no safetensors file ({size} bytes)")
        text = bytearray(header_nbytes)
        _read_into(self._file, memoryview(text))
        directory = json.loads(text)
        self.notes: dict[str, str] = dict(directory.pop("__metadata__", {}))
        checksum = self.notes.pop(_CHECKSUM, None)
        pages = json.loads(self.notes.pop(_PAGES, "{}"))
        if checksum is None:
            self.tensors: dict[str, PagedTensor] = {}  # somebody else's file: whoever reads the notes will say so
            return
        if checksum != _header_digest(self.notes, directory, pages):
            raise ValueError("its header does not match its checksum")
        self.tensors = {
            name: PagedTensor(_DTYPES[entry["dtype"]], tuple(entry["shape"]), pages[name][0])
            for name, entry in directory.items()
        }
        self._digests = {
            name: [digits[at : at + _DIGEST_DIGITS] for at in range(0, len(digits), _DIGEST_DIGITS)]
            for name, (_, digits) in pages.items()
        }
        self._start = 8 + header_nbytes
        self._offsets = {name: entry["data_offsets"][0] for name, entry in directory.items()}
        if size != self._start + sum(tensor.nbytes for tensor in self.tensors.values()):
            raise ValueError(f"it has {size} bytes, and its header speaks of others")


def _encode_header(
    notes: Mapping[str, str], tensors: Mapping[str, PagedTensor], digests: Mapping[str, list[str]]
) -> bytes:
    offsets = _offsets(tensors)
    directory = {
        name: {
            "dtype": STORED_DTYPES[tensor.dtype.name],
            "shape": list(tensor.shape),
            "data_offsets": [offsets[name], offsets[name] + tensor.nbytes],
        }
        for name, tensor in tensors.items()
    }
    pages = {name: [tensor.page_rows, "".join(digests[name])] for name, tensor in tensors.items()}
    metadata = {**notes, _PAGES: json.dumps(pages), _CHECKSUM: _header_digest(notes, directory, pages)}
    text = json.dumps({"__metadata__": metadata, **directory}).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _header_digest(notes: Mapping[str, str], directory: Mapping[str, Any], pages: Mapping[str, Any]) -> str:
    return _digest(json.dumps([notes, directory, pages], sort_keys=True).encode())


def _offsets(tensors: Mapping[str, PagedTensor]) -> dict[str, int]:
    offsets, end = {}, 0
    for name, tensor in tensors.items():
        offsets[name] = end
        end += tensor.nbytes
    return offsets


def _digest(data: bytes | memoryview) -> str:
    return hashlib.blake2b(data, digest_size=_DIGEST_BYTES).hexdigest()


def _write_at(file: BinaryIO, offset: int, data: memoryview) -> None:
    while data:
        written = os.pwrite(file.fileno(), data, offset)
        offset, data = offset + written, data[written:]


def _read_into(file: Any, data: memoryview) -> bool:
    """Fill `data`; say whether the file had so much."""
    while data:
        count = file.readinto(data)
        if not count:
            return False
        data = data[count:]
    return True


def _sync_folder(folder: Path) -> None:
    """Make a new name last."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

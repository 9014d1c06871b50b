"""Snapshots: copies of sessions in files of the server's, by names that each caller has of its own."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Mapping
from pathlib import Path

from numbaflash import RingKVCache
from numbaflash.cache.files import DamagedError

from . import records
from .errors import SnapshotDamagedError, SnapshotUnknownError, StorageError
from .folder import SUFFIX, Folder, storage_error
from .principals import Principal
from .replay import Answer

log = logging.getLogger(__name__)


class Snapshots:
    """Belongs to the event loop; files are written and read on threads of their own.

    Args:
        folder: Where they are; within it, each caller has a folder. Only those that are being written are counted.
    """

    def __init__(self, folder: Folder) -> None:
        self._folder = folder

    async def write(self, owner: Principal, name: str, record: records.Record, cache: RingKVCache) -> None:
        """Write a snapshot, in the place of an earlier one of that name.

        Raises:
            StorageError: It cannot be written, or would be too much; an earlier one is there as before.
        """
        answers: Mapping[int, Answer] = {}  # they belong to the session, not to those that are made from it
        most = records.most_bytes(cache, answers)
        path = self._path(owner, name)
        self._folder.reserve(most)
        reserved = self._folder.nbytes  # as of now: what is written meanwhile may be too late to be measured
        try:
            # Measured each time: the operator may have removed some.
            there = await asyncio.to_thread(self._folder.measure)
            if there + reserved > self._folder.budget:
                raise StorageError(f"{most} bytes do not fit: {there} of {self._folder.budget} for snapshots are taken")
            path.parent.mkdir(mode=0o700, exist_ok=True)
            await asyncio.to_thread(records.write, path, record, cache, answers)
        except OSError as error:
            log.error("a snapshot cannot be written: %s", error)
            raise storage_error(error, "the snapshot cannot be written") from None
        finally:
            self._folder.release(most)

    async def open(self, owner: Principal, name: str) -> records.RecordFile:
        """Open a snapshot; to be closed.

        Raises:
            SnapshotUnknownError: The caller has none of that name.
            SnapshotDamagedError: Its header is damaged.
            StorageError: It cannot be read.
        """
        try:
            file = await asyncio.to_thread(records.RecordFile, self._path(owner, name))
        except FileNotFoundError:
            raise SnapshotUnknownError("there is no snapshot of that name") from None
        except OSError as error:
            raise storage_error(error, "the snapshot cannot be read") from None
        except ValueError as error:
            raise _damaged(error) from None
        if file.record.owner != owner.name:
            file.close()
            raise SnapshotUnknownError("there is no snapshot of that name")
        return file

    def _path(self, owner: Principal, name: str) -> Path:
        # A caller's name may be anything; its digest is a name for a folder.
        folder = hashlib.blake2b(owner.name.encode(), digest_size=16).hexdigest()
        return self._folder.path / folder / (name + SUFFIX)


async def read(file: records.RecordFile, backend: str) -> RingKVCache:
    """Read the cache of an open snapshot.

    Raises:
        SnapshotDamagedError: A page is damaged.
        StorageError: It cannot be read.
    """
    try:
        cache, _ = await asyncio.to_thread(file.read, backend)
    except OSError as error:
        raise storage_error(error, "the snapshot cannot be read") from None
    except ValueError as error:
        raise _damaged(error) from None
    return cache


def _damaged(error: ValueError) -> SnapshotDamagedError | StorageError:
    log.error("a snapshot cannot be used: %s", error)
    if isinstance(error, DamagedError):
        return SnapshotDamagedError(f"the snapshot is damaged: {error.what}")
    return StorageError("the snapshot is of a version that this release does not read")

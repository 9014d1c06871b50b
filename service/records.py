"""A session as a file: its cache, what else it is, and the answers of its last steps.

The file is one of `RingKVCache.save`'s, with a checksum for each page and one for the header. The answers are in it so
that a step which was sent before a restart, and got no answer, gets it after that, and is not taken twice.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from numbaflash import RingKVCache
from numbaflash.cache.files import CacheFile, DamagedError

from .replay import Answer
from .sessions import Session, Shape

_NOTE = "session"


@dataclass(frozen=True)
class Record:
    """What a session is beside its keys and values; see `sessions.Session`.

    Attributes:
        id: Its id.
        owner: Its owner's name.
        shape: What its cache is made for.
        kv_bytes: Bytes that the cache can come to.
        ttl: Seconds without a step after which it ends.
        created_at: Seconds since the epoch.
        expires_at: Seconds since the epoch.
        steps: Steps taken.
        epoch: How many times it was truncated.
        truncated_to: The length that the last of those took it back to.
        lengths: Tokens that each layer holds.
    """

    id: str
    owner: str
    shape: Shape
    kv_bytes: int
    ttl: float
    created_at: float
    expires_at: float
    steps: int
    epoch: int
    truncated_to: int | None
    lengths: tuple[int, ...]

    @classmethod
    def of(cls, session: Session) -> Record:
        """Describe a session in memory."""
        return cls(
            id=session.id,
            owner=session.owner.name,
            shape=session.shape,
            kv_bytes=session.kv_bytes,
            ttl=session.ttl,
            created_at=session.created_at,
            expires_at=session.expires_at,
            steps=session.steps,
            epoch=session.epoch,
            truncated_to=session.truncated_to,
            lengths=tuple(session.lengths()),
        )


def most_bytes(cache: RingKVCache, answers: Mapping[int, Answer]) -> int:
    """Return what the file of a session comes to at most."""
    pages = cache.num_layers * cache.layout.slots
    header = (1 << 16) + cache.num_layers * 1024 + pages * 128
    return cache.nbytes + sum(answer.nbytes for answer in answers.values()) + header


def write(path: Path, record: Record, cache: RingKVCache, answers: Mapping[int, Answer]) -> int:
    """Write a session, whole or not at all, and return the file's size.

    Raises:
        OSError: The file cannot be written.
    """
    kept = {
        str(layer): [answer.request_id, answer.before, answer.position, answer.first]
        for layer, answer in answers.items()
    }
    cache.save(
        path,
        notes={_NOTE: json.dumps({**asdict(record), "answers": kept})},
        attachments={str(layer): answer.out for layer, answer in answers.items() if answer.out is not None},
    )
    return path.stat().st_size


class RecordFile:
    """A session on disk, open for reading: what is written in its place meanwhile is another file.

    Args:
        path: Of the file.

    Attributes:
        record: What the session is.

    Raises:
        OSError: The file cannot be read.
        ValueError: It holds no session, is of another version, or its header is damaged.
    """

    def __init__(self, path: Path) -> None:
        self._file = CacheFile(path)
        try:
            fields: dict[str, Any] = json.loads(self._file.notes[_NOTE])
            self._answers = fields.pop("answers")
            self.record = Record(
                **{**fields, "shape": Shape(**fields["shape"]), "lengths": tuple(fields["lengths"])},
            )
        except (KeyError, TypeError, ValueError) as error:
            self.close()
            raise DamagedError(path, f"it describes no session ({error!r})") from None

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def read(self, backend: str) -> tuple[RingKVCache, dict[int, Answer]]:
        """Read cache and answers, for a server with that backend.

        Raises:
            OSError: The file cannot be read.
            ValueError: A page is damaged.
            MemoryError: There is no room for the cache.
        """
        cache = RingKVCache.load(self._file, backend=backend)
        outs = self._file.attachments()
        answers = {
            int(layer): Answer(request_id, before, position, first, outs.get(layer))
            for layer, (request_id, before, position, first) in self._answers.items()
        }
        return cache, answers

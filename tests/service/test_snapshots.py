"""Snapshots: what is restored is what was there, whole and checked, or an error that says what is wrong."""

from __future__ import annotations

import errno
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import numbaflash
from numbaflash.cache import checked
from numbaflash_service import Client, RetryPolicy, ServiceError, records
from numbaflash_service.auth import Authenticator
from numbaflash_service.errors import (
    BadTensorError,
    KVBudgetError,
    PositionMismatchError,
    SnapshotDamagedError,
    SnapshotUnknownError,
    StorageError,
)
from numbaflash_service.folder import Folder
from numbaflash_service.v1 import attention_pb2 as pb

SHAPE = {"num_layers": 2, "num_kv_heads": 2, "head_dim": 16, "capacity": 64, "dtype": "float32", "sink_tokens": 2}


@pytest.fixture
def keeping(start_server: Any, tmp_path: Path) -> Any:
    def start(**config: Any) -> Any:
        return start_server(**{"snapshot_dir": tmp_path / "snapshots"} | config)

    return start


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")


@pytest.mark.parametrize("count", [0, 1, 30, 200])
def test_a_restored_session_goes_on_as_a_loaded_cache(keeping: Any, qkv: Any, tmp_path: Path, count: int) -> None:
    with Client(keeping().target) as client:
        session, cache = client.create_session(**SHAPE, num_q_heads=4, ttl=5000.0), numbaflash.RingKVCache(**SHAPE)
        for layer in range(2):
            for form in (session, cache):
                if count:
                    form.step(layer, **qkv(count + layer))
        cache.save(tmp_path / "cache")
        assert session.snapshot("a.b-c_1") == count
        session.close()
        restored, loaded = client.restore("a.b-c_1"), numbaflash.RingKVCache.load(tmp_path / "cache")
        assert restored.id != session.id
        assert [restored.length(i) for i in range(2)] == [loaded.length(i) for i in range(2)]
        assert [restored.first(i) for i in range(2)] == [loaded.first(i) for i in range(2)]
        before = time.time()
        for tokens in (1, 20):
            arrays = qkv(tokens, seed=9)
            assert restored.step(0, **arrays).tobytes() == loaded.step(0, **arrays).tobytes()
        (info,) = client.list_sessions()
        assert before < info.expires_at - 5000.0 < time.time()


def test_a_snapshot_stays_as_it_was_and_the_session_goes_on(keeping: Any, qkv: Any) -> None:
    with Client(keeping().target) as client:
        session = client.create_session(**SHAPE)
        session.step(0, **qkv(5))
        assert session.snapshot("a") == 0  # layer 1 has none
        session.step(0, **qkv(3))
        for _ in range(2):
            restored = client.restore("a")
            assert [restored.length(i) for i in range(2)] == [5, 0]
            restored.step(0, **qkv(1))


def test_a_snapshot_of_the_same_name_takes_the_place_of_the_earlier_one(keeping: Any, qkv: Any, tmp_path: Path) -> None:
    with Client(keeping().target) as client:
        session = client.create_session(**SHAPE)
        for length in (5, 10):
            for layer in range(2):
                session.step(layer, **qkv(5))
            assert session.snapshot("a") == length
            assert len(files(tmp_path / "snapshots")) == 1
        assert client.restore("a").length(1) == 10


def test_a_restored_session_counts_its_own_epochs_and_answers(keeping: Any, qkv: Any) -> None:
    with Client(keeping().target) as client:
        session = client.create_session(**SHAPE)
        for layer in range(2):
            session.step(layer, **qkv(8))
        session.truncate(6)
        session.snapshot("a")
        restored = client.restore("a")
        restored.truncate(5)
        restored.step(0, **qkv(1))
        restored._epoch += 1
        with pytest.raises(PositionMismatchError, match="truncated 1 times"):
            restored.step(0, **qkv(1))


@pytest.mark.parametrize("name", ["", ".", "..", "../a", "a/b", ".hidden", "a\0b", "ä", "a b", "x" * 129, "a\n"])
def test_a_name_is_no_path(keeping: Any, tmp_path: Path, name: str) -> None:
    with Client(keeping().target, retry=RetryPolicy(attempts=1)) as client:
        session = client.create_session(**SHAPE)
        for call in (session.snapshot, client.restore):
            with pytest.raises(BadTensorError) as caught:
                call(name)
            assert caught.value.field == "name"
    assert files(tmp_path) == []


def test_callers_have_names_of_their_own(
    keeping: Any, qkv: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    caller = "one"
    monkeypatch.setattr(Authenticator, "name", lambda _, __: caller)
    with Client(keeping().target) as client:
        session = client.create_session(**SHAPE)
        session.step(0, **qkv(5))
        session.snapshot("a")
        caller = "another"
        with pytest.raises(SnapshotUnknownError):
            client.restore("a")
        other = client.create_session(**SHAPE)
        other.snapshot("a")
        assert client.restore("a").length(0) == 0
        caller = "one"
        assert client.restore("a").length(0) == 5
        mine, theirs = sorted(files(tmp_path / "snapshots"), key=lambda file: file.stat().st_size)
        mine.write_bytes(theirs.read_bytes())
        caller = "another"
        with pytest.raises(SnapshotUnknownError):
            client.restore("a")


def test_there_must_be_memory_for_it(keeping: Any) -> None:
    with Client(keeping(kv_memory=1 << 20, evict_after=30.0).target, retry=RetryPolicy(attempts=1)) as client:
        session = client.create_session(1, 2, 64, capacity=1100)
        session.snapshot("a")
        with pytest.raises(KVBudgetError):
            client.restore("a")
        session.close()
        client.restore("a")


@pytest.mark.parametrize("place", [0, 4, 100, -1, -5000])
def test_a_damaged_snapshot_says_so_and_makes_no_session(keeping: Any, qkv: Any, tmp_path: Path, place: int) -> None:
    with Client(keeping().target) as client:
        session = client.create_session(**SHAPE)
        for layer in range(2):
            session.step(layer, **qkv(60))
        session.snapshot("a")
        (file,) = files(tmp_path / "snapshots")
        content = bytearray(file.read_bytes())
        content[place] ^= 1
        file.write_bytes(content)
        before = client.info().usage
        with pytest.raises(SnapshotDamagedError) as caught:
            client.restore("a")
        assert str(tmp_path) not in caught.value.message
        assert client.info().usage == before
        session.step(0, **qkv(1))


def test_a_snapshot_that_the_disk_has_no_room_for_leaves_the_earlier_one(
    keeping: Any, qkv: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = keeping()
    with Client(server.target) as client:
        session = client.create_session(**SHAPE)
        for layer in range(2):
            session.step(layer, **qkv(5))
        session.snapshot("a")
        session.step(0, **qkv(1))
        for number in (errno.ENOSPC, errno.EROFS, errno.EIO):
            with monkeypatch.context() as patch:

                def fail(*_: Any, number: int = number) -> int:
                    raise OSError(number, os.strerror(number), "/secret/path")

                patch.setattr(os, "pwrite", fail)
                with pytest.raises(StorageError) as caught:
                    session.snapshot("a")
            assert os.strerror(number) in caught.value.message
            assert "secret" not in caught.value.message
            assert len(files(tmp_path / "snapshots")) == 1
        assert server.server._servicer._snapshots.nbytes == 0  # nothing is being written
        assert client.restore("a").length(0) == 5
        session.step(0, **qkv(1))


def test_all_snapshots_together_have_a_budget(keeping: Any, qkv: Any, tmp_path: Path) -> None:
    with Client(keeping(snapshot_memory=1 << 20).target) as client:
        session = client.create_session(2, 2, 64, capacity=900)
        for layer in range(2):
            session.step(layer, **qkv(600, head_dim=64))
        session.snapshot("a")
        with pytest.raises(StorageError, match="do not fit"):
            session.snapshot("b")
        with pytest.raises(StorageError, match="do not fit"):
            session.snapshot("a")  # the earlier one is there until the new one is whole
        assert client.restore("a").length(0) == 600
        for file in files(tmp_path / "snapshots"):
            file.unlink()  # as an operator does
        session.snapshot("b")


def test_snapshots_at_the_same_time_keep_to_the_budget_together(
    keeping: Any, qkv: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Client(keeping(snapshot_memory=1 << 20).target) as client:
        big, first, second = (client.create_session(2, 2, 64, capacity=900) for _ in range(3))
        for session, count in ((big, 600), (first, 200), (second, 200)):
            for layer in range(2):
                session.step(layer, **qkv(count, head_dim=64))
        big.snapshot("a")
        measure, write = Folder.measure, records.write
        writing, measured, written = (threading.Event() for _ in range(3))

        def write_when_the_second_has_measured(*arguments: Any) -> int:
            writing.set()
            assert measured.wait(timeout=20)
            return write(*arguments)

        def go_on_when_the_first_is_written(folder: Any) -> int:
            there = measure(folder)
            measured.set()
            assert written.wait(timeout=20)
            return there

        monkeypatch.setattr(records, "write", write_when_the_second_has_measured)
        with ThreadPoolExecutor() as threads:
            snapshot = threads.submit(first.snapshot, "b")
            assert writing.wait(timeout=20)
            monkeypatch.setattr(Folder, "measure", go_on_when_the_first_is_written)
            other = threads.submit(second.snapshot, "c")
            snapshot.result(timeout=20)
            written.set()
            with pytest.raises(StorageError, match="do not fit"):
                other.result(timeout=20)
    assert sum(file.stat().st_size for file in files(tmp_path / "snapshots")) <= 1 << 20


def test_a_step_waits_for_a_snapshot_and_a_snapshot_for_nobody(
    keeping: Any, qkv: Any, connect_stock: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = keeping()
    client = Client(server.target, retry=RetryPolicy(attempts=1))
    session = client.create_session(**SHAPE)
    session.step(0, **qkv(5))
    written = []

    def write(*arguments: Any) -> None:
        with pytest.raises(ServiceError) as caught:
            session.step(0, **qkv(1))
        assert caught.value.reason == "BUSY"
        written.append(arguments)
        original(*arguments)

    original = checked.write
    monkeypatch.setattr("numbaflash.cache.files.write_checked", write)
    with Client(server.target) as other:
        assert connect_stock(server).Snapshot(pb.SnapshotRequest(session_id=session.id, name="a")).usable_tokens == 0
        assert len(written) == 1
        session.step(0, **qkv(1))
        assert other.restore("a").length(0) == 5
    client.close()

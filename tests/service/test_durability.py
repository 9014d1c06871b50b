"""Restarts, kills, full disks, damaged files: the right data or an error with its reason, never wrong data."""

from __future__ import annotations

import asyncio
import errno
import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import numbaflash
from numbaflash_service import Client, RetryPolicy, ServiceError, memory
from numbaflash_service.auth import Authenticator
from numbaflash_service.config import load
from numbaflash_service.errors import (
    KVBudgetError,
    SessionEvictedError,
    SessionExpiredError,
    SessionUnknownError,
    SnapshotUnknownError,
    StorageError,
)
from numbaflash_service.server import Server

from .twins import KV_MEMORY, SHAPE, Twin, tokens

ONCE = RetryPolicy(attempts=1)
# Without a stream, a session can go on over another client's connection.
new_twin = partial(Twin, stream=False)


@pytest.fixture
def config(tmp_path: Path) -> dict[str, Any]:
    return {
        "listen": [f"unix:{tmp_path}/socket"],
        "kv_memory": KV_MEMORY,
        "spill_dir": tmp_path / "spill",
        "spill_after": 0.0,
        "kv_high_water": 1.0,
    }


def spill_files(config: dict[str, Any]) -> list[Path]:
    return sorted((config["spill_dir"] / "sessions").glob("*.safetensors"))


# -- restarts --------------------------------------------------------------------------------------------------------


def test_a_restart_loses_nothing(start_server: Any, config: dict[str, Any]) -> None:
    server = start_server(**config)
    with Client(server.target) as client:
        twins = [new_twin(client) for _ in range(4)]
        for seed, twin in enumerate(twins):
            twin.step(30, seed)
        twins[0].session.truncate(28)
        twins[0].cache.truncate(28)
        twins[1].session.snapshot("kept")
        before = {info.session_id: info for info in client.list_sessions()}
        server.stop()
        server = start_server(**config)
        after = {info.session_id: info for info in client.list_sessions()}
        assert before.keys() == after.keys()
        for key, info in after.items():
            assert info.spilled
            assert (info.min_length, info.max_length, info.steps) == (
                before[key].min_length,
                before[key].max_length,
                before[key].steps,
            )
            assert info.created_at == pytest.approx(before[key].created_at, abs=1e-3)
            assert info.expires_at == pytest.approx(before[key].expires_at, abs=5.0)
        for seed, twin in enumerate(twins):
            twin.step(2, seed)
        assert client.restore("kept").length(0) == 30


def test_a_step_whose_answer_was_lost_before_a_restart_is_answered_after_it(
    start_server: Any, connect_stock: Any, step_request: Any, config: dict[str, Any]
) -> None:
    server = start_server(**config)
    stock = connect_stock(server)
    session_id = stock.new_session(**SHAPE)
    stock.Prefill(step_request(session_id, tokens(5), request_id="a"))
    step = step_request(session_id, tokens(1), position=5, request_id="b")
    first = stock.Decode(step)
    append = step_request(session_id, {name: tokens(3)[name] for name in "kv"}, layer=1, request_id="c")
    stock.Prefill(append)
    server.stop()
    stock = connect_stock(start_server(**config))
    again = stock.Decode(step)
    assert (again.replayed, again.position, again.payload) == (True, 6, first.payload)
    assert stock.Prefill(append).replayed
    assert stock.Decode(step_request(session_id, tokens(1), position=6, request_id="d")).position == 7


def test_time_to_live_goes_on_while_the_server_is_down(
    start_server: Any, config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = start_server(**config)
    with Client(server.target) as client:
        session = client.create_session(**SHAPE, ttl=100.0)
        server.stop()
        later = SimpleNamespace(monotonic=time.monotonic, time=lambda: time.time() + 100.0)
        monkeypatch.setattr(memory, "time", later)
        server = start_server(**config)
        server.wait_until(lambda: not len(server.server._servicer._table))
        with pytest.raises(SessionExpiredError):
            session.step(0, **tokens(1))
        server.wait_until(lambda: not spill_files(config))


def test_sessions_on_disk_have_their_owners_still(
    start_server: Any, config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    caller = "one"
    monkeypatch.setattr(Authenticator, "name", lambda _, __: caller)
    server = start_server(**config)
    with Client(server.target) as client:
        twin = new_twin(client)
        server.stop()
        start_server(**config)
        caller = "another"
        assert client.list_sessions() == []
        with pytest.raises(SessionUnknownError):
            twin.session.step(0, **tokens(1))
        caller = "one"
        twin.step()


def test_a_folder_belongs_to_one_server(start_server: Any, config: dict[str, Any]) -> None:
    start_server(**config)
    second = Server(load(**config | {"listen": ["127.0.0.1:0"]}))
    with pytest.raises(OSError, match="is used by another server"):
        asyncio.run(second.start())


# -- the disk --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EIO])
def test_a_disk_that_cannot_be_written_costs_nobody_a_token(
    start_server: Any, config: dict[str, Any], monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr(memory, "_PAUSE_SECONDS", 0.05)
    with Client(start_server(**config).target, retry=ONCE) as client:
        twins = [new_twin(client), new_twin(client)]
        for seed, twin in enumerate(twins):
            twin.step(50, seed)
        with monkeypatch.context() as patch:

            def fail(*_: Any) -> int:
                raise OSError(number, os.strerror(number))

            patch.setattr(os, "pwrite", fail)
            with pytest.raises(KVBudgetError):
                client.create_session(**SHAPE)
        usage = client.info().usage
        assert (usage.sessions, usage.spilled_bytes, usage.spilled_sessions) == (2, 0, 0)
        assert os.listdir(config["spill_dir"] / "sessions") == [".lock"]
        for twin in twins:
            twin.step()
        time.sleep(0.1)
        twins.append(new_twin(client))
        for twin in twins:
            twin.step(3)


def test_a_folder_that_became_read_only_costs_nobody_a_token(
    start_server: Any, config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with Client(start_server(**config).target, retry=ONCE) as client:
        twins = [new_twin(client), new_twin(client)]
        twins[0].step(50)
        folder = config["spill_dir"] / "sessions"
        folder.chmod(0o500)
        if os.access(folder, os.W_OK):  # the user whom no permissions stop
            real = Path.open

            def refuse(path: Path, mode: str = "r", **options: Any) -> Any:
                if mode == "xb" and path.parent == folder:
                    raise OSError(errno.EROFS, os.strerror(errno.EROFS))
                return real(path, mode, **options)

            monkeypatch.setattr(Path, "open", refuse)
        for call in (lambda: client.create_session(**SHAPE), twins[0].session.fork):
            with pytest.raises(KVBudgetError):
                call()
        for twin in twins:
            twin.step(2)
        folder.chmod(0o700)


@pytest.mark.parametrize("what", ["page", "cut off", "gone", "answer"])
def test_a_session_whose_file_was_damaged_ends_and_says_so(
    start_server: Any, config: dict[str, Any], what: str
) -> None:
    server = start_server(**config)
    with Client(server.target, retry=ONCE) as client:
        twins = [new_twin(client) for _ in range(3)]
        twins[0].step(50)
        for _ in range(2):
            for twin in twins[1:]:
                twin.step()
        (file,) = [path for path in spill_files(config) if path.stem == twins[0].session.id]
        content = bytearray(file.read_bytes())
        if what == "gone":
            file.unlink()
        elif what == "cut off":
            file.write_bytes(content[:-1])
        else:
            place = -1 if what == "answer" else int.from_bytes(content[:8], "little") + 8 + 2000
            content[place] ^= 4
            file.write_bytes(content)
        expected = {
            "page": "page 0 of layers.0.k",
            "cut off": "its header speaks of others",
            "answer": "attached",
        }
        for _ in range(2):
            with pytest.raises(ServiceError) as caught:
                twins[0].session.step(0, **tokens(1))
            assert str(config["spill_dir"]) not in caught.value.message
            if what == "gone":  # perhaps it comes back
                assert isinstance(caught.value, StorageError)
            else:
                assert isinstance(caught.value, SessionEvictedError)
                assert expected[what] in caught.value.message
        for twin in twins[1:]:
            twin.step()
        if what == "gone":
            file.write_bytes(content)
            twins[0].step()


def test_a_server_starts_beside_files_that_it_cannot_use(start_server: Any, config: dict[str, Any]) -> None:
    server = start_server(**config)
    with Client(server.target) as client:
        twins = [new_twin(client), new_twin(client)]
        server.stop()
        damaged, _ = files = spill_files(config)
        content = bytearray(damaged.read_bytes())
        content[100] ^= 1
        damaged.write_bytes(content)
        (damaged.parent / f".{damaged.name}.0123").write_bytes(b"left by a process that was killed")
        start_server(**config)
        assert [path for path in damaged.parent.iterdir() if path.name != ".lock"] in (files, files[::-1])
        for twin in twins:
            if twin.session.id == damaged.stem:
                with pytest.raises(SessionUnknownError):
                    twin.session.step(0, **tokens(1))
            else:
                twin.step()


# -- other processes -------------------------------------------------------------------------------------------------

# Runs the command line, with a file of the service's killing the process at the COUNTth call of os.CALL.
KILLER = """
import os, signal, sys
call, left = "CALL", COUNT
original = getattr(os, call)
def killing(*arguments, **options):
    global left
    path = str(arguments[-1] if call == "replace" else arguments[0])
    if call in ("pwrite", "fsync") or path.endswith(".safetensors"):
        left -= 1
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)
    return original(*arguments, **options)
setattr(os, call, killing)
from numbaflash_service.cli import main
main()
"""


@pytest.fixture
def start_process(serve: Any, config: dict[str, Any]) -> Callable[..., tuple[subprocess.Popen[str], str]]:
    def start(kill_at: tuple[str, int] = ("pwrite", 0), first: str = "") -> tuple[subprocess.Popen[str], str]:
        flags = [f"--{name.replace('_', '-')}={value}" for name, value in config.items() if name != "listen"]
        script = KILLER.replace("CALL", kill_at[0]).replace("COUNT", str(kill_at[1]))
        return serve(*flags, "--listen", config["listen"][0], script=first + script)

    return start


def go_on(client: Client, twin: Twin) -> bool:
    """Say whether a session is there; if so, it must hold what its twin holds."""
    (found,) = [info for info in client.list_sessions() if info.session_id == twin.session.id] or [None]
    if found is None:
        with pytest.raises(SessionUnknownError):
            twin.session.step(0, **tokens(1))
        return False
    twin.step(2, seed=77)
    return True


@pytest.mark.parametrize(
    ("kill_at", "survives"),
    [
        (("pwrite", 1), False),  # its first page
        (("pwrite", 40), False),  # the header, which comes last, or shortly before
        (("replace", 1), False),
        (("fsync", 2), True),  # of the folder, when the file has its name
        (("unlink", 1), True),  # when it came back, before its first step
    ],
)
def test_killed_while_it_spills(
    start_process: Any, start_server: Any, config: dict[str, Any], kill_at: tuple[str, int], survives: bool
) -> None:
    process, target = start_process(kill_at)
    with Client(target, retry=ONCE, timeout=20.0) as client:
        twins = [new_twin(client), new_twin(client)]
        for seed, twin in enumerate(twins):
            twin.step(650, seed)

        def spill_and_come_back() -> None:
            client.create_session(**SHAPE)
            twins[0].session.step(0, **tokens(1))

        with pytest.raises(ServiceError) as caught:
            spill_and_come_back()
        assert caught.value.reason is None
        assert process.wait(timeout=20) == -signal.SIGKILL
    start_server(**config)
    with Client(target) as client:
        for twin in twins:
            twin.session._client, twin.session._calls = client, client._calls
        assert [go_on(client, twin) for twin in twins] == [survives, survives and kill_at[0] == "unlink"]


@pytest.mark.parametrize("kill_at", [("pwrite", 60), ("replace", 2), ("fsync", 4)])
def test_killed_while_it_writes_a_snapshot(
    start_process: Any, start_server: Any, config: dict[str, Any], kill_at: tuple[str, int]
) -> None:
    process, target = start_process(kill_at)
    with Client(target, retry=ONCE, timeout=20.0) as client:
        twin = new_twin(client)
        twin.step(600)
        twin.session.snapshot("a")
        twin.step(50)
        with pytest.raises(ServiceError):
            twin.session.snapshot("a")
        assert process.wait(timeout=20) == -signal.SIGKILL
    start_server(**config)
    with Client(target) as client:
        twin.session = client.restore("a")
        length = twin.session.length(0)
        assert length == (650 if kill_at == ("fsync", 4) else 600)
        twin.cache = numbaflash.RingKVCache(**SHAPE)
        for layer in range(2):
            twin.cache.append(layer, **{name: tokens(600, layer)[name] for name in "kv"})
            if length == 650:
                twin.cache.append(layer, **{name: tokens(50, layer)[name] for name in "kv"})
        twin.step(3)
        with pytest.raises(SnapshotUnknownError):
            client.restore("b")


def test_killed_among_steps(start_process: Any, start_server: Any, config: dict[str, Any]) -> None:
    process, target = start_process()
    with Client(target, retry=ONCE, timeout=20.0) as client:
        twins = [new_twin(client) for _ in range(4)]
        killer = threading.Timer(0.7, process.kill)
        killer.start()

        def step_in_turns() -> None:
            for turn in itertools.count():
                twin, arrays = twins[turn % 4], tokens(1, turn)
                out = [twin.session.step(layer, **arrays).tobytes() for layer in range(2)]
                assert out == [twin.cache.step(layer, **arrays).tobytes() for layer in range(2)]

        with pytest.raises(ServiceError) as caught:
            step_in_turns()
        assert caught.value.reason is None
        killer.join()
        assert process.wait(timeout=20) == -signal.SIGKILL  # its sockets close before its locks go
    start_server(**config)
    with Client(target) as client:
        there = {info.session_id for info in client.list_sessions()}
        for twin in twins:
            twin.session._client, twin.session._calls = client, client._calls
            if [twin.session.length(layer) for layer in range(2)] == [twin.cache.length(layer) for layer in range(2)]:
                assert go_on(client, twin) == (twin.session.id in there)
        assert there


def test_a_disk_that_is_full_for_real(start_process: Any, config: dict[str, Any]) -> None:
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))"
    process, target = start_process(first=limit)  # what a file is above fails with EFBIG
    with Client(target, retry=ONCE) as client:
        small, large = new_twin(client), new_twin(client)
        large.step(600)
        small.step(10)
        with pytest.raises(StorageError, match="File too large"):
            large.session.snapshot("large")
        small.session.snapshot("small")
        with pytest.raises(KVBudgetError):
            client.create_session(**SHAPE)
        for twin in (small, large):
            twin.step()
        assert client.list_sessions()[0].min_length > 0
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == 0
    assert "cannot be spilled" in process.stderr.read()
    assert [path.stem for path in config["spill_dir"].rglob("*.safetensors")] == ["small"]


@pytest.mark.parametrize("name", ["spill-dir", "snapshot-dir"])
def test_a_folder_that_cannot_be_is_an_error_in_one_line(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("")
    command = [sys.executable, "-c", "from numbaflash_service.cli import main; main()", "serve"]
    command += ["--listen", "127.0.0.1:0", f"--{name}", str(tmp_path / "file")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert len(done.stderr.strip().splitlines()) == 1
    assert str(tmp_path / "file") in done.stderr

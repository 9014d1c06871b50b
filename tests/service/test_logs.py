"""The log: JSON lines that say which call they belong to, and never what was computed."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import trustme

from numbaflash_service import Client, RetryPolicy, logs
from numbaflash_service.errors import KVBudgetError
from numbaflash_service.v1 import attention_pb2 as pb


@pytest.fixture
def written(capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[[str], Callable[[], list[dict[str, Any]]]]]:
    """Configures the log as a server does, and gives back the events written so far."""
    root = logging.getLogger()
    before = root.handlers, root.level
    text = []

    def configure(level: str) -> Callable[[], list[dict[str, Any]]]:
        logs.configure(level, "json")
        return events

    def events() -> list[dict[str, Any]]:
        text.append(capsys.readouterr().err)
        return [json.loads(line) for line in "".join(text).splitlines()]

    yield configure
    root.handlers, root.level = before[0], before[1]


def test_a_call_is_a_line_with_its_request_id_caller_code_and_time(written: Any, start_server: Any) -> None:
    events = written("info")
    server = start_server(kv_memory=1 << 20)
    with grpc.insecure_channel(server.target) as channel:
        create = channel.unary_unary("/numbaflash.v1.Attention/CreateSession")
        shape = pb.SessionShape(num_layers=1, num_kv_heads=1, head_dim=8, capacity=8)
        request = pb.CreateSessionRequest(shape=shape).SerializeToString()
        create(request, metadata=(("x-request-id", "order-17"),))
        create(request, metadata=(("x-request-id", "two words"),))
        shape.num_layers = 1000
        with pytest.raises(grpc.RpcError):
            create(pb.CreateSessionRequest(shape=shape).SerializeToString(), metadata=(("x-request-id", "order-18"),))
    server.stop()
    calls = [event for event in events() if event["event"] == "call"]
    assert [(call["method"], call["code"]) for call in calls] == [
        ("CreateSession", "OK"),
        ("CreateSession", "OK"),
        ("CreateSession", "RESOURCE_EXHAUSTED"),
    ]
    assert [call["request_id"] for call in calls][::2] == ["order-17", "order-18"]
    assert len(calls[1]["request_id"]) == 16, "what is no plain word is replaced"
    assert calls[2]["reason"] == KVBudgetError.reason
    assert all(call["level"] == "info" and call["ms"] > 0 and call["timestamp"] for call in calls)


@pytest.mark.parametrize(("level", "told"), [("info", 0), ("debug", 3)])
def test_steps_are_told_only_to_who_debugs_and_payloads_and_ids_to_nobody(
    written: Any, start_server: Any, qkv: Any, level: str, told: int
) -> None:
    events = written(level)
    server = start_server(log_level=level)
    arrays = qkv(3)
    for array in arrays.values():
        array[:] = np.frombuffer(b"SECR", np.float32)[0]
    with Client(server.target, retry=RetryPolicy(attempts=1)) as client:
        session = client.create_session(1, 2, 16, capacity=64, stream=False)
        for _ in range(3):
            session.step(0, **arrays)
    server.stop()
    assert sum(event.get("method") in ("Prefill", "Decode") for event in events()) == told
    text = json.dumps(events())
    assert "SECR" not in text
    assert session.id not in text


def test_what_other_modules_log_comes_out_alike(written: Any) -> None:
    events = written("warning")
    logging.getLogger("elsewhere").info("too low")
    try:
        raise ValueError("boom")
    except ValueError:
        logging.getLogger("elsewhere").exception("failed %d times", 2, extra={"request_id": "r1"})
    (event,) = events()
    assert (event["event"], event["level"], event["logger"]) == ("failed 2 times", "error", "elsewhere")
    assert event["request_id"] == "r1"
    assert "ValueError: boom" in event["exception"]


def test_text_can_be_asked_for() -> None:
    code = "import logging; from numbaflash_service import logs; logs.configure('info', 'text'); logging.info('hello')"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "hello" in ended.stderr
    with pytest.raises(json.JSONDecodeError):
        json.loads(ended.stderr)


def test_every_line_of_a_server_is_json_whatever_grpc_has_to_say(tmp_path: Path) -> None:
    certificate = trustme.CA().issue_cert("localhost")
    certificate.private_key_and_cert_chain_pem.write_to_path(tmp_path / "pem")
    command = [sys.executable, "-c", "from numbaflash_service.cli import main; main()", "serve"]
    command += ["--listen", "127.0.0.1:0", "--tls-cert", tmp_path / "pem", "--tls-key", tmp_path / "pem"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        target = process.stdout.readline().split()[-1]
        with grpc.insecure_channel(target) as channel, pytest.raises(grpc.FutureTimeoutError):
            grpc.channel_ready_future(channel).result(timeout=2)  # no TLS: gRPC tells of each handshake that fails
        process.terminate()
        lines = process.stderr.read().splitlines()
    assert [json.loads(line)["event"] for line in lines][-2:] == ["stopping", "stopped"]

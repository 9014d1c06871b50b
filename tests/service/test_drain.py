"""A stop that loses nothing: what runs is answered, what is new is refused by name, and the process ends well."""

from __future__ import annotations

import json
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from numbaflash_service import Client, RetryPolicy, records
from numbaflash_service.errors import DrainingError
from numbaflash_service.v1 import attention_pb2 as pb

from .plain_calls import refusal


def test_a_stopping_server_answers_what_it_has_and_refuses_what_is_new(
    start_server: Any, connect_stock: Any, qkv: Callable[..., Any], step_request: Any
) -> None:
    server = start_server(grace=20.0)
    stock = connect_stock(server)
    session_id, streamed = stock.new_session(), stock.new_session()
    shape = pb.SessionShape(num_layers=1, num_kv_heads=1, head_dim=8, capacity=8)
    requests: queue.SimpleQueue = queue.SimpleQueue()
    stream = stock.Attend(iter(requests.get, None))
    with server.engine_held():
        call = stock.Decode.future(step_request(session_id, qkv(1)))
        server.wait_for_queue(1)
        requests.put(step_request(streamed, qkv(1)))
        server.wait_for_queue(2)
        stopping = server.begin_stop()
        server.wait_until(lambda: server.server._servicer._draining)
        for refused, request in (
            (stock.Decode, step_request(session_id, qkv(1), position=1)),
            (stock.CreateSession, pb.CreateSessionRequest(shape=shape)),
        ):
            assert isinstance(refusal(refused, request), DrainingError)
        health = health_pb2_grpc.HealthStub(stock.channel)
        assert health.Check(health_pb2.HealthCheckRequest()).status == health_pb2.HealthCheckResponse.NOT_SERVING
    assert call.result(timeout=20).position == 1
    assert next(stream).position == 1
    assert refusal(next, stream).reason == "DRAINING"
    stopping.result(timeout=20)


def test_a_stop_does_not_wait_for_an_idle_stream(
    start_server: Any, connect_stock: Any, qkv: Any, step_request: Any
) -> None:
    server = start_server(grace=60.0)
    stock = connect_stock(server)
    requests: queue.SimpleQueue = queue.SimpleQueue()
    stream = stock.Attend(iter(requests.get, None))
    requests.put(step_request(stock.new_session(), qkv(1)))
    assert next(stream).position == 1
    server.stop()
    assert refusal(next, stream).reason == "DRAINING"


def test_a_stream_that_is_stopped_twice_at_once_ends_well(start_server: Any, connect_stock: Any) -> None:
    server = start_server()
    stock, servicer = connect_stock(server), server.server._servicer
    requests: queue.SimpleQueue = queue.SimpleQueue()
    answers = stock.Attend(iter(requests.get, None), timeout=20)
    server.wait_until(lambda: any(stream._reading for stream in servicer._streams))

    async def stop_twice() -> None:
        (stream,) = servicer._streams
        stream.stop_reading()
        stream.stop_reading()

    server.on_loop(stop_twice())
    assert next(answers, None) is None


def test_a_session_on_its_way_to_disk_gets_there_before_the_server_stops(
    start_server: Any, connect_stock: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = start_server(spill_dir=tmp_path, spill_after=0.0, kv_high_water=0.0)
    stock, servicer = connect_stock(server), server.server._servicer
    write, released = records.write, threading.Event()

    def write_slowly(*arguments: Any) -> int:
        released.wait(timeout=20)
        time.sleep(0.1)  # a stop that does not wait is over by then
        return write(*arguments)

    monkeypatch.setattr(records, "write", write_slowly)
    session_id = stock.new_session()
    server.wait_until(lambda: servicer._table._sessions[session_id].work)  # each second those above the mark go
    stopping = server.begin_stop()
    released.set()
    stopping.result(timeout=20)
    assert (tmp_path / "sessions" / f"{session_id}.safetensors").exists()


def test_a_session_whose_step_runs_when_the_grace_is_over_goes_to_disk_after_it(
    start_server: Any, connect_stock: Any, qkv: Callable[..., Any], step_request: Any, tmp_path: Path
) -> None:
    server = start_server(spill_dir=tmp_path, grace=0.0)
    stock = connect_stock(server)
    session_id, running, goes_on = stock.new_session(), threading.Event(), threading.Event()
    compute = server.engine._compute

    def compute_slowly(steps: Any) -> Any:
        running.set()
        goes_on.wait(timeout=20)
        return compute(steps)

    server.engine._compute = compute_slowly
    call = stock.Prefill.future(step_request(session_id, qkv(20)))
    assert running.wait(timeout=20)
    stopping = server.begin_stop()
    assert call.exception(timeout=20)
    goes_on.set()
    stopping.result(timeout=20)
    assert (tmp_path / "sessions" / f"{session_id}.safetensors").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_process_ends_well_on_a_signal(serve: Any, qkv: Any, number: signal.Signals) -> None:
    process, target = serve("--listen", "127.0.0.1:0")
    client = Client(target, retry=RetryPolicy(attempts=1))
    session = client.create_session(1, 2, 16, capacity=64)
    session.step(0, **qkv(1))
    process.send_signal(number)
    assert process.wait(timeout=20) == 0
    events = [json.loads(line) for line in process.stderr.read().splitlines()]
    assert not any("exception" in event for event in events)
    first, last = (event for event in events if event["event"] in ("stopping", "stopped"))
    assert (first["event"], first["sessions"]) == ("stopping", 1)
    assert (last["event"], last["unfinished_steps"]) == ("stopped", 0)
    client.close()  # which finds nobody, and says nothing


def test_a_port_that_is_taken_is_an_error_in_one_line(serve: Any) -> None:
    _, target = serve("--listen", "127.0.0.1:0")
    command = [sys.executable, "-c", "from numbaflash_service.cli import main; main()", "serve", "--listen", target]
    second = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert second.returncode == 1
    assert f"cannot listen on {target}" in second.stderr
    assert "Traceback" not in second.stderr

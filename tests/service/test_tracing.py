"""Spans, as a collector gets them; and that nothing of them is loaded where there is none."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2

from numbaflash_service import Client, RetryPolicy
from numbaflash_service.errors import PositionMismatchError
from numbaflash_service.v1 import attention_pb2 as pb


class Collector:
    """A collector on a port of this machine."""

    def __init__(self) -> None:
        self.spans: list[Any] = []
        self._server = grpc.server(ThreadPoolExecutor(2))
        handler = grpc.unary_unary_rpc_method_handler(
            self._export,
            trace_service_pb2.ExportTraceServiceRequest.FromString,
            trace_service_pb2.ExportTraceServiceResponse.SerializeToString,
        )
        service = "opentelemetry.proto.collector.trace.v1.TraceService"
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {"Export": handler}),))
        self.url = f"http://127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()

    def _export(self, request: Any, _: object) -> Any:
        self.spans += [
            span for resource in request.resource_spans for scope in resource.scope_spans for span in scope.spans
        ]
        return trace_service_pb2.ExportTraceServiceResponse()

    def named(self, name: str) -> list[Any]:
        return [span for span in self.spans if span.name == name]

    def stop(self) -> None:
        self._server.stop(None).wait()


@pytest.fixture
def collector() -> Iterator[Collector]:
    made = Collector()
    yield made
    made.stop()


def attributes(span: Any) -> dict[str, Any]:
    return {pair.key: getattr(pair.value, pair.value.WhichOneof("value")) for pair in span.attributes}


def test_calls_and_their_steps_are_spans_below_the_callers(
    collector: Collector, start_server: Any, connect_stock: Any, qkv: Any, step_request: Any
) -> None:
    server = start_server(otlp_endpoint=collector.url)
    stock = connect_stock(server)
    trace, parent = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    session_id = stock.new_session()
    stock.Decode(step_request(session_id, qkv(2)), metadata=(("traceparent", f"00-{trace}-{parent}-01"),))
    (answer,) = stock.Attend(iter([step_request(session_id, qkv(1), position=2, request_id="streamed")]))
    assert answer.position == 3
    with Client(server.target, retry=RetryPolicy(attempts=1)) as client:
        session = client.create_session(1, 2, 16, capacity=64, stream=False)
        session._lengths[0] = 5
        with pytest.raises(PositionMismatchError):
            session.step(0, **qkv(1))
    server.stop()  # sends what is left
    decode, refused = collector.named("numbaflash.v1.Attention/Decode")
    assert (decode.trace_id.hex(), decode.parent_span_id.hex()) == (trace, parent)
    steps = {attributes(span)["numbaflash.request_id"]: span for span in collector.named("step")}
    assert steps["r"].parent_span_id == decode.span_id
    (attend,) = collector.named("numbaflash.v1.Attention/Attend")
    assert steps["streamed"].parent_span_id == attend.span_id
    told = attributes(steps["r"])
    assert (told["numbaflash.tokens"], told["numbaflash.layer"], told["numbaflash.batch_size"]) == (2, 0, 1)
    assert told["numbaflash.kernel_ns"] > 0
    assert session_id not in str(collector.spans)
    assert refused.status.message == "POSITION_MISMATCH"
    assert attributes(refused)["rpc.grpc.status_code"] == grpc.StatusCode.FAILED_PRECONDITION.value[0]
    assert len(collector.named("numbaflash.v1.Attention/CreateSession")) == 2


def test_a_server_without_an_endpoint_loads_nothing_of_it() -> None:
    code = (
        "import sys; from numbaflash_service.config import load; from numbaflash_service.server import Server;"
        "server = Server(load(listen=['127.0.0.1:0']));"
        "print(sorted(name for name in sys.modules if 'opentelemetry' in name))"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert ended.stdout == "[]\n"


def test_a_missing_extra_is_named() -> None:
    code = (
        "import sys; sys.modules['opentelemetry.context'] = None; sys.modules['opentelemetry'] = None;"
        "from numbaflash_service.cli import main; main()"
    )
    command = [sys.executable, "-c", code, "serve", "--listen", "127.0.0.1:0", "--otlp-endpoint", "http://127.0.0.1:1"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 1
    assert "pip install 'numbaflash[tracing]'" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_collector_that_is_not_there_costs_no_call(
    start_server: Any, connect_stock: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "0.5")  # seconds that the stop below waits for it
    stock = connect_stock(start_server(otlp_endpoint="http://127.0.0.1:1"))
    assert stock.GetInfo(pb.GetInfoRequest(), timeout=10).backend == "cpu"

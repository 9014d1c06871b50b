"""Servers in this process and beside it, clients of them, and arrays to send."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf.message import Message
from running_server import RunningServer

from numbaflash_service import Client, RetryPolicy, wire
from numbaflash_service.v1 import attention_pb2 as pb

SERVICE = "numbaflash.v1.Attention"
COMMAND_LINE = "from numbaflash_service.cli import main; main()"


class StockClient:
    """Plain protobuf over a plain channel, nothing of the project's own client or codec: an attribute for each RPC."""

    def __init__(
        self, target: str, *, credentials: grpc.ChannelCredentials | None = None, token: str | None = None
    ) -> None:
        self.channel = grpc.secure_channel(target, credentials) if credentials else grpc.insecure_channel(target)
        for name, method in pb.DESCRIPTOR.services_by_name["Attention"].methods_by_name.items():
            make = self.channel.stream_stream if method.client_streaming else self.channel.unary_unary
            response = getattr(pb, method.output_type.name)
            call = make(f"/{SERVICE}/{name}", request_serializer=_serialize, response_deserializer=response.FromString)
            setattr(self, name, _Identified(call, token) if token else call)

    def new_session(self, **shape: Any) -> str:
        shape = {"num_layers": 2, "num_kv_heads": 2, "head_dim": 16, "capacity": 64, "dtype": "float32", **shape}
        return self.CreateSession(pb.CreateSessionRequest(shape=pb.SessionShape(**shape))).session_id


class _Identified:
    """A method that is called with a token."""

    def __init__(self, method: Any, token: str) -> None:
        self._method = method
        self._metadata = (("authorization", f"Bearer {token}"),)

    def __call__(self, request: Any, **options: Any) -> Any:
        return self._method(request, metadata=self._metadata, **options)

    def future(self, request: Any, **options: Any) -> Any:
        return self._method.future(request, metadata=self._metadata, **options)


def _serialize(message: Message) -> bytes:
    return message.SerializeToString()


def _servers() -> Iterator[Callable[..., RunningServer]]:
    started: list[RunningServer] = []

    def start(**config: Any) -> RunningServer:
        started.append(RunningServer(**config))
        return started[-1]

    yield start
    for running in started:
        running.stop()


start_server = pytest.fixture(_servers, name="start_server")
start_module_server = pytest.fixture(_servers, scope="module", name="start_module_server")


@pytest.fixture
def heeds_ctrl_c() -> Iterator[None]:
    """A shell that runs the tests in the background has SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def serve() -> Iterator[Callable[..., tuple[subprocess.Popen[str], str]]]:
    """`numbaflash serve` as a process of its own, when it is ready, and its address."""
    processes = []

    def start(*flags: str, script: str = COMMAND_LINE) -> tuple[subprocess.Popen[str], str]:
        command = [sys.executable, "-c", script, "serve", *flags]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        processes.append(process)
        line = process.stdout.readline()
        ready = re.fullmatch(r"numbaflash serves on (\S+)\n", line)
        assert ready, line + process.stderr.read()
        return process, ready[1]

    yield start
    for process in processes:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def server(start_module_server: Callable[..., RunningServer]) -> RunningServer:
    return start_module_server()


@pytest.fixture(scope="module")
def stock(server: RunningServer) -> Iterator[StockClient]:
    client = StockClient(server.target)
    yield client
    client.channel.close()


@pytest.fixture
def connect_stock() -> Iterator[Callable[..., StockClient]]:
    clients: list[StockClient] = []

    def connect(server: RunningServer, **identity: Any) -> StockClient:
        clients.append(StockClient(server.target, **identity))
        return clients[-1]

    yield connect
    for client in clients:
        client.channel.close()


@pytest.fixture
def client(server: RunningServer) -> Iterator[Client]:
    with Client(server.target, retry=RetryPolicy(attempts=3, first_delay=0.01)) as connected:
        yield connected


@pytest.fixture
def qkv() -> Callable[..., dict[str, np.ndarray]]:
    def make(
        tokens: int = 1, q_heads: int = 4, kv_heads: int = 2, head_dim: int = 16, dtype: str = "float32", seed: int = 0
    ) -> dict[str, np.ndarray]:
        rng = np.random.default_rng([seed, tokens])
        return {
            name: rng.standard_normal((tokens, heads, head_dim)).astype(wire.DTYPES[dtype])
            for name, heads in (("q", q_heads), ("k", kv_heads), ("v", kv_heads))
        }

    return make


@pytest.fixture
def step_request() -> Callable[..., pb.StepRequest]:
    """A StepRequest of arrays, its payload in the message as protobuf has it."""

    def make(
        session_id: str, arrays: dict[str, np.ndarray], *, layer: int = 0, position: int = 0, request_id: str = "r"
    ) -> pb.StepRequest:
        request = pb.StepRequest(session_id=session_id, layer=layer, position=position, request_id=request_id)
        for name, array in arrays.items():
            request.payload += bytes(-len(request.payload) % 64)
            request.tensors.add(
                name=name,
                dtype=array.dtype.name,
                shape=array.shape,
                offset=len(request.payload),
                nbytes=array.nbytes,
            )
            request.payload += array.tobytes()
        return request

    return make

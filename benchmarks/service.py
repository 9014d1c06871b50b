"""What the service costs beside the kernel: `python benchmarks/service.py [--target HOST:PORT] [--json]`.

Starts a server in a process of its own (or takes `--target`) and steps a session over the loopback. A row is one kind
of call; its time is the client's, from arrays to arrays, less the time that the server computed. The peer is an empty
gRPC service in another process that echoes messages of the same sizes over the same kind of call: what gRPC for Python
costs by itself, in the same run. Rows are measured in turns, so that a busy moment of the machine meets them all; the
quietest of the rounds stands beside the median of all. All processes go without gRPC's event engine, as the commands of
numbaflash do (service/README.md).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import queue
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date

os.environ.setdefault("GRPC_EXPERIMENTS", "-event_engine_client,-event_engine_listener")

import grpc
import numpy as np
from rich.console import Console
from rich.table import Table

from numbaflash_service import Client, wire

_ROUNDS = 8
_ECHO = "/numbaflash.benchmark.Echo/"
# The service's own: what it gains by them, the echo gains as well.
_OPTIONS = [
    ("grpc.max_receive_message_length", 16 << 20),
    ("grpc.max_send_message_length", 16 << 20),
    ("grpc.http2.max_frame_size", wire.FRAME_BYTES),
]
_SERVE = "from numbaflash_service.cli import main; main()"


@dataclass
class Row:
    """One kind of call: times in seconds, bytes of request and answer."""

    name: str
    transport: str
    request_bytes: int
    answer_bytes: int
    call: Callable[[], float]
    calls: int
    rounds: list[list[float]] = field(default_factory=list)

    def measure(self) -> None:
        """Call, and keep the times of a round; its first calls only warm up."""
        times = [self.call() for _ in range(self.calls)]
        self.rounds.append(times[self.calls // 5 :])

    def figures(self) -> dict[str, object]:
        """Return what is reported."""
        times = [seconds for round_ in self.rounds for seconds in round_]
        median = statistics.median(times)
        return {
            "name": self.name,
            "transport": self.transport,
            "request_bytes": self.request_bytes,
            "answer_bytes": self.answer_bytes,
            "p50_ms": median * 1e3,
            "p90_ms": float(np.percentile(times, 90)) * 1e3,
            "quietest_round_p50_ms": min(map(statistics.median, self.rounds)) * 1e3,
            "request_gb_per_s": self.request_bytes / median / 1e9,
        }


def step_row(client: Client, name: str, tokens: int, q_heads: int, kv_heads: int, stream: bool, calls: int) -> Row:
    """Step one session of one layer, float32, head_dim 128."""
    session = client.create_session(1, kv_heads, 128, capacity=max(tokens, 64), dtype="float32", stream=stream)
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((tokens, heads, 128), np.float32) for heads in (q_heads, kv_heads, kv_heads))

    def call() -> float:
        computed, started = session.kernel_seconds, time.perf_counter()
        session.step(0, q, k, v)
        return time.perf_counter() - started - (session.kernel_seconds - computed)

    return Row(name, "stream" if stream else "unary", q.nbytes + k.nbytes + v.nbytes, q.nbytes, call, calls)


def echo_row(channel: grpc.Channel, name: str, request_bytes: int, answer_bytes: int, stream: bool, calls: int) -> Row:
    """Send bytes to the empty service; their first four say how many are to come back."""
    message = answer_bytes.to_bytes(4, "little") + bytes(request_bytes - 4)
    if stream:
        requests: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        answers = channel.stream_stream(_ECHO + "Stream")(iter(requests.get, None))
    unary = channel.unary_unary(_ECHO + "Unary")

    def call() -> float:
        started = time.perf_counter()
        if stream:
            requests.put(message)
            next(answers)
        else:
            unary(message)
        return time.perf_counter() - started

    return Row(name, "stream" if stream else "unary", request_bytes, answer_bytes, call, calls)


async def serve_echo() -> None:
    """Be the empty service."""

    async def unary(message: bytes, _: object) -> bytes:
        return message[: int.from_bytes(message[:4], "little")]

    async def stream(requests: object, _: object):
        async for message in requests:
            yield message[: int.from_bytes(message[:4], "little")]

    server = grpc.aio.server(options=_OPTIONS)
    methods = {
        "Unary": grpc.unary_unary_rpc_method_handler(unary),
        "Stream": grpc.stream_stream_rpc_method_handler(stream),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(_ECHO.strip("/"), methods),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(f"echo serves on 127.0.0.1:{port}", flush=True)
    await server.wait_for_termination()


@contextmanager
def process(*arguments: str) -> Iterator[str]:
    """Run a server that prints its address in its first line; yield the address."""
    with subprocess.Popen([sys.executable, *arguments], stdout=subprocess.PIPE, text=True) as running:
        try:
            assert running.stdout
            line = running.stdout.readline()
            if not line:
                raise SystemExit(f"{' '.join(arguments[:1])} did not start")
            yield line.split()[-1]
        finally:
            running.terminate()


def measure(target: str, echo: str) -> list[Row]:
    """Measure all rows, in turns."""
    with Client(target) as client, grpc.insecure_channel(echo, options=_OPTIONS) as channel:
        rows = []
        for name, tokens, q_heads, kv_heads, calls in (("decode", 1, 32, 16, 250), ("prefill chunk", 341, 8, 8, 15)):
            for stream in (True, False):
                row = step_row(client, name, tokens, q_heads, kv_heads, stream, calls)
                rows.append(row)
                rows.append(echo_row(channel, "echo", row.request_bytes, row.answer_bytes, stream, calls))
        for row in rows:
            row.call()  # compiles what is not compiled yet
        for _ in range(_ROUNDS):
            for row in rows:
                row.measure()
    return rows


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", help="a server to measure; by default one is started")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--echo", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.echo:
        asyncio.run(serve_echo())
    with process(__file__, "--echo") as echo:
        if arguments.target:
            rows = measure(arguments.target, echo)
        else:
            with process("-c", _SERVE, "serve", "--listen", "127.0.0.1:0") as target:
                rows = measure(target, echo)
    machine = (
        f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, grpc {grpc.__version__}"
    )
    if arguments.json:
        print(json.dumps({"date": f"{date.today()}", "machine": machine, "rows": [row.figures() for row in rows]}))
        return
    table = Table(
        title="Round trip over the loopback, time of the kernel taken off", caption=f"{machine}, {date.today()}"
    )
    for column in ("call", "over", "request", "answer", "p50 ms", "p90 ms", "quietest round", "GB/s"):
        table.add_column(column, justify="left" if column in ("call", "over") else "right")
    for row in rows:
        figures = row.figures()
        table.add_row(
            row.name,
            row.transport,
            f"{row.request_bytes >> 10} KiB",
            f"{row.answer_bytes >> 10} KiB",
            f"{figures['p50_ms']:.3f}",
            f"{figures['p90_ms']:.3f}",
            f"{figures['quietest_round_p50_ms']:.3f}",
            f"{figures['request_gb_per_s']:.2f}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()

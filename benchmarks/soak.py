"""Load for a long time: `python benchmarks/soak.py [--minutes 20] [--sessions 200] [--clients 16] [--json]`.

Starts a server whose memory holds `--fit` of the sessions, with a spill folder for the others, and lets clients take
turns: a few tokens of a session drawn at random, now and then a new session in the place of an old one, a fork, a
step back. One session of each client process runs in that process too, and its answers must be the same to the bit.
The server's metrics are sampled every second. What must hold is printed beside what was seen; exit status 1 where
something did not.

    load      there were as many sessions as asked for, and a sample nearly every second
    budget    bytes of keys and values, reserved and used, are never above --kv-memory
    latency   p99 of a decode step (one layer, the client's time, retries included) is within 10 times its p50
    memory    the server's resident bytes grow by less than 2 % over the second half
    errors    nothing but typed pushback (budget, queue, quota, busy): no call fails otherwise
    answers   none differs from the same session's in process
    left      when all clients have gone, no byte is reserved and no page, file or step is left
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import date
from functools import partial
from typing import Any, Final

import numpy as np
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from rich.table import Table

from numbaflash import RingKVCache
from numbaflash_service import Client, RetryPolicy, ServiceError

LAYERS, Q_HEADS, KV_HEADS, HEAD_DIM, CAPACITY, PROMPT = 4, 8, 4, 64, 512, 600
SHAPE: Final = {"num_layers": LAYERS, "num_kv_heads": KV_HEADS, "head_dim": HEAD_DIM, "capacity": CAPACITY}
PUSHBACK: Final = frozenset({"KV_BUDGET", "QUEUE_FULL", "QUOTA", "BUSY"})
LEFT: Final = ("sessions", "kv_reserved_bytes", "kv_pages", "spilled_bytes", "queued_steps", "streams")
_PROCESSES: Final = 4
_SERVE: Final = "from numbaflash_service.cli import main; main()"


@dataclass
class Seen:
    """What the clients of one process saw.

    Attributes:
        steps: Seconds of each decode step.
        turns: Turns taken.
        differing: Answers that differ from those in process.
        failed: Calls that failed after all retries, by reason or exception.
    """

    steps: list[float] = field(default_factory=list)
    turns: int = 0
    differing: int = 0
    failed: Counter[str] = field(default_factory=Counter)


class Caller:
    """One client: some sessions, and turns with them.

    Args:
        client: Its connection.
        sessions: How many to hold.
        seed: Of what it draws.
        mirror: Run the first session in process too.
    """

    def __init__(self, client: Client, sessions: int, seed: int, mirror: bool) -> None:
        self.seen = Seen()
        self._client = client
        self._rng = np.random.default_rng(seed)
        self._twin: RingKVCache | None = None
        self._sessions: list[Any] = [self._new() for _ in range(sessions)]
        if mirror:
            self._twin = RingKVCache(**SHAPE)
            self._sessions[0].close()
            self._sessions[0] = self._client.create_session(**SHAPE)

    def run(self, until: float) -> None:
        """Take turns until a time of `time.time`."""
        while time.time() < until:
            index = int(self._rng.integers(len(self._sessions)))
            try:
                self._turn(index)
            except ServiceError as error:
                self.seen.failed[error.reason or error.code.name] += 1
            except Exception as error:  # any of them is a finding: what is no pushback fails the run
                self.seen.failed[type(error).__name__] += 1
            self.seen.turns += 1

    def _turn(self, index: int) -> None:
        session, chance = self._sessions[index], self._rng.random()
        twin = self._twin if index == 0 else None
        if session is None or (twin is None and chance < 0.02):
            if session:
                session.close()
            self._sessions[index] = None  # until a new one is made, which may be refused
            self._sessions[index] = self._new()
        elif twin is None and chance < 0.04:
            with session.fork() as child:
                self._decode(child, 2)
        elif chance < 0.06 and session.length(0) > 8:
            length = session.length(0) - int(self._rng.integers(1, 8))
            session.truncate(length)
            if twin:
                twin.truncate(length)
        else:
            self._decode(session, 8, twin)

    def _new(self) -> Any:
        session = self._client.create_session(**SHAPE)
        try:
            prompt = self._draw(PROMPT)
            for layer in range(LAYERS):
                session.prefill(layer, *prompt)
            self._decode(session, 1)  # so that the server need not keep the prompt's large answers any more
        except ServiceError:
            session.close()
            raise
        return session

    def _decode(self, session: Any, tokens: int, twin: RingKVCache | None = None) -> None:
        for _ in range(tokens):
            token = self._draw(1)
            for layer in range(LAYERS):
                started = time.perf_counter()
                out = session.decode(layer, *token)
                self.seen.steps.append(time.perf_counter() - started)
                if twin is not None:
                    self.seen.differing += not np.array_equal(out, twin.step(layer, *token))

    def _draw(self, tokens: int) -> list[np.ndarray]:
        shapes = [(tokens, heads, HEAD_DIM) for heads in (Q_HEADS, KV_HEADS, KV_HEADS)]
        return [self._rng.standard_normal(shape, np.float32).astype(np.float16) for shape in shapes]


def run_clients(target: str, clients: int, sessions: int, ready: Any, minutes: float, seed: int) -> Seen:
    """Be one process of clients: make the sessions, wait for the other processes, take turns."""
    with ExitStack() as connections:
        callers = []
        try:
            for i in range(clients):
                # Patient: at the start all sessions are new, and none may be spilled in its first second.
                client = connections.enter_context(Client(target, retry=RetryPolicy(attempts=20)))
                callers.append(Caller(client, share(sessions, clients, i), seed * 1000 + i, mirror=i == 0))
        except BaseException:
            ready.abort()
            raise
        ready.wait()
        until = time.time() + minutes * 60
        threads = [threading.Thread(target=caller.run, args=(until,)) for caller in callers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    total = Seen()
    for caller in callers:
        total.steps += caller.seen.steps
        total.turns += caller.seen.turns
        total.differing += caller.seen.differing
        total.failed += caller.seen.failed
    return total


@contextmanager
def server(kv_memory: int, spill_dir: str) -> Iterator[tuple[str, str]]:
    """Run a server; yield its address and that of its metrics. Stop it as an operator would."""
    options = [
        "--listen",
        "127.0.0.1:0",
        "--metrics-port",
        "0",
        "--kv-memory",
        str(kv_memory),
        "--spill-dir",
        spill_dir,
    ]
    command = [sys.executable, "-c", _SERVE, "serve", *options, "--log-level", "warning"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout
        target, metrics = running.stdout.readline().split()[-1], running.stdout.readline().split()[-1]
        try:
            yield target, metrics
        finally:
            running.send_signal(signal.SIGTERM)
            if running.wait(timeout=60):
                raise SystemExit(f"the server ended with status {running.returncode}")


def sample(metrics: str) -> dict[str, float]:
    """Read the server's metrics."""
    with urllib.request.urlopen(metrics, timeout=30) as answer:
        families = text_string_to_metric_families(answer.read().decode())
    return {s.name + "".join(f" {v}" for v in s.labels.values()): s.value for f in families for s in f.samples}


def judge(
    samples: list[dict[str, float]], seen: list[Seen], seconds: float, sessions: int
) -> tuple[dict[str, Any], dict[str, bool]]:
    """Return the figures, and what held.

    Args:
        samples: Of the server's metrics, a second apart; the last one when all clients had gone.
        seen: By the processes of clients.
        seconds: That they ran.
        sessions: That there should have been.
    """
    *samples, last = samples
    steps = np.concatenate([one.steps for one in seen])
    p50, p99 = (float(np.percentile(steps, share)) for share in (50, 99))
    resident = [s["process_resident_memory_bytes"] for s in samples[len(samples) // 2 :]]
    tenth = max(1, len(resident) // 10)
    growth = float(np.mean(resident[-tenth:]) / np.mean(resident[:tenth]) - 1)
    failed = sum((one.failed for one in seen), Counter[str]())
    prefix = "numbaflash_errors_total "
    answered = {name.removeprefix(prefix): int(n) for name, n in last.items() if name.startswith(prefix)}
    figures = {
        "seconds": round(seconds),
        "samples": len(samples),
        "turns": sum(one.turns for one in seen),
        "decode_steps": len(steps),
        "decode_steps_per_second": len(steps) / seconds,
        "p50_ms": p50 * 1e3,
        "p99_ms": p99 * 1e3,
        "p99_over_p50": p99 / p50,
        "max_ms": float(steps.max()) * 1e3,
        "sessions": int(max(s["numbaflash_sessions"] for s in samples)),
        "kv_memory_bytes": int(last["numbaflash_kv_memory_bytes"]),
        "kv_reserved_bytes_most": int(max(s["numbaflash_kv_reserved_bytes"] for s in samples)),
        "kv_used_bytes_most": int(max(s["numbaflash_kv_used_bytes"] for s in samples)),
        "spilled_sessions_most": int(max(s["numbaflash_spilled_sessions"] for s in samples)),
        "spills": int(last["numbaflash_spills_total"]),
        "unspills": int(last["numbaflash_unspills_total"]),
        "resident_bytes_most": int(max(s["process_resident_memory_bytes"] for s in samples)),
        "resident_growth": growth,
        "errors_answered": answered,
        "calls_failed": dict(failed),
        "answers_differing": sum(one.differing for one in seen),
        "left": {name: int(last[f"numbaflash_{name}"]) for name in LEFT if last[f"numbaflash_{name}"]},
    }
    held = {
        "load": figures["sessions"] >= sessions and len(samples) > 0.9 * seconds,
        "budget": max(figures["kv_reserved_bytes_most"], figures["kv_used_bytes_most"]) <= figures["kv_memory_bytes"],
        "latency": p99 <= 10 * p50,
        "memory": growth < 0.02,
        "errors": set(answered) | set(failed) <= PUSHBACK,
        "answers": figures["answers_differing"] == 0,
        "left": not figures["left"],
    }
    return figures, held


def soak(minutes: float, sessions: int, clients: int, fit: float) -> tuple[dict[str, Any], dict[str, bool]]:
    """Run everything."""
    page_bytes = 2 * KV_HEADS * 64 * HEAD_DIM * 2 + 512
    kv_memory = int(fit * sessions * LAYERS * (CAPACITY // 64 + 2) * page_bytes)
    processes = min(_PROCESSES, clients)
    context = multiprocessing.get_context("spawn")
    with (
        tempfile.TemporaryDirectory() as spill_dir,
        server(kv_memory, spill_dir) as (target, metrics),
        context.Manager() as manager,
        ProcessPoolExecutor(processes, mp_context=context) as pool,
    ):
        ready = manager.Barrier(processes + 1)
        run = partial(run_clients, target)
        jobs = [
            pool.submit(run, share(clients, processes, i), share(sessions, processes, i), ready, minutes, i)
            for i in range(processes)
        ]
        with suppress(threading.BrokenBarrierError):  # the jobs say why
            ready.wait()
        samples, started = [], time.monotonic()
        while not all(job.done() for job in jobs):
            samples.append(sample(metrics))
            time.sleep(max(0.0, started + len(samples) - time.monotonic()))
        seconds = time.monotonic() - started
        time.sleep(1.0)  # the server hears of the end of streams a little later
        samples.append(sample(metrics))
        broken = [error for job in jobs if (error := job.exception())]
        if broken:  # the first cause, not those that waited for it
            raise min(broken, key=lambda error: isinstance(error, threading.BrokenBarrierError))
        return judge(samples, [job.result() for job in jobs], seconds, sessions)


def share(total: int, parts: int, index: int) -> int:
    """Return the size of one of `parts` about equal parts."""
    return total // parts + (index < total % parts)


def show(figures: dict[str, Any], held: dict[str, bool], caption: str) -> None:
    """Print a table."""
    mib = {name: f"{figures[name] / 2**20:.1f}" for name in figures if "bytes" in name}
    pushback = ", ".join(f"{reason} {n}" for reason, n in figures["errors_answered"].items()) or "none"
    rows = (
        ("load", "sessions, most of them on disk", f"{figures['sessions']}, {figures['spilled_sessions_most']}"),
        ("", "samples", str(figures["samples"])),
        ("budget", "reserved of the budget, MiB", f"{mib['kv_reserved_bytes_most']} of {mib['kv_memory_bytes']}"),
        ("", "used by pages, MiB", mib["kv_used_bytes_most"]),
        ("", "spilled, brought back", f"{figures['spills']}, {figures['unspills']}"),
        (
            "latency",
            "decode step p50, p99, max, ms",
            " ".join(f"{figures[n]:.2f}" for n in ("p50_ms", "p99_ms", "max_ms")),
        ),
        ("", "p99 / p50, at most 10", f"{figures['p99_over_p50']:.2f}"),
        ("", "decode steps, a second", f"{figures['decode_steps']}, {figures['decode_steps_per_second']:.0f}"),
        ("memory", "resident MiB, most", mib["resident_bytes_most"]),
        ("", "growth over the second half, under 2 %", f"{figures['resident_growth']:.2%}"),
        ("errors", "answered with", pushback),
        ("", "calls that failed after retries", str(figures["calls_failed"] or "none")),
        ("answers", "differing from those in process", str(figures["answers_differing"])),
        ("left", "when all clients had gone", str(figures["left"] or "nothing")),
    )
    table = Table(title=f"Soak, {figures['seconds']} s", caption=caption)
    table.add_column("holds")
    table.add_column("")
    table.add_column("", justify="right")
    for name, what, value in rows:
        verdict = "" if not name else f"[green]{name}" if held[name] else f"[red]{name}: NOT"
        table.add_row(verdict, what, value)
    Console().print(table)


def main() -> None:
    """Run, print, and end with what held."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--sessions", type=int, default=200)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--fit", type=float, default=0.8, help="share of the sessions that memory holds")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    figures, held = soak(arguments.minutes, arguments.sessions, arguments.clients, arguments.fit)
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    if arguments.json:
        print(json.dumps({"date": f"{date.today()}", "machine": machine, "figures": figures, "held": held}))
    else:
        show(figures, held, f"{arguments.clients} clients; {machine}, {date.today()}")
    sys.exit(not all(held.values()))


if __name__ == "__main__":
    main()

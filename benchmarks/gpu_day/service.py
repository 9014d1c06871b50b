"""The service end to end: a client's steps over a socket, and the demo, whose model generates text through it."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from .parts import Row

_ROOT = Path(__file__).parents[2]
_DEMO = [sys.executable, "-c", "from numbaflash_service.cli import main; main()", "demo", "--json"]


def through_the_service(emulated: bool) -> Iterator[Row]:
    """Yield the time of steps through the service, and the demo's tokens a second; the GPU first, then the CPU."""
    with _importable():
        for backend in ("emulated",) if emulated else ("cuda", "cpu"):
            yield from _steps(backend, tokens=16 if emulated else 4096, steps=2 if emulated else 200)
        yield from _demo(emulated)


@contextmanager
def _importable() -> Iterator[None]:
    """Have this checkout under the names by which it is installed, so that nothing need be; in child processes too."""
    path, environment = list(sys.path), dict(os.environ)
    with tempfile.TemporaryDirectory() as directory:
        Path(directory, "numbaflash_service").symlink_to(_ROOT / "service")
        sys.path.insert(0, directory)
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (directory, str(_ROOT), environment.get("PYTHONPATH"))))
        try:
            yield
        finally:
            sys.path[:] = path
            del os.environ["PYTHONPATH"]
            os.environ.update(environment)


def _steps(backend: str, tokens: int, steps: int) -> Iterator[Row]:
    """Decode one session of one layer, 32 query heads and 8 KV heads of 128, float16."""
    from numbaflash_service import Client
    from numbaflash_service.demo.service_process import ServiceProcess, wait_until_serving

    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((tokens, heads, 128), np.float32).astype(np.float16) for heads in (32, 8, 8))
    with ServiceProcess(backend) as process:
        wait_until_serving(process.target, 60, process.check_alive)
        with Client(process.target, timeout=60) as client:
            session = client.create_session(1, 8, 128, capacity=tokens, dtype="float16")
            session.step(0, q, k, v)
            session.step(0, q[:1], k[:1], v[:1])  # builds what is not built
            times, computed = [], session.kernel_seconds
            for _ in range(steps):
                start = time.perf_counter()
                session.step(0, q[:1], k[:1], v[:1])
                times.append(time.perf_counter() - start)
            yield {
                "what": f"decode step at {tokens} tokens",
                "backend": backend,
                "p50_ms": 1e3 * statistics.median(times),
                "of_it_computing_ms": 1e3 * (session.kernel_seconds - computed) / steps,
            }


def _demo(emulated: bool) -> Iterator[Row]:
    """Run the demo where its model lies on this machine; instead of the emulator, which takes seconds, on the CPU."""
    from numbaflash_service.demo.weights import gguf_path

    kept = gguf_path()
    if not (kept.exists() or kept.with_suffix(".safetensors").exists()):
        yield {"what": "demo", "said": f"its model is not on this machine: {kept} (scripts/demo downloads it)"}
        return
    for backend in ("cpu",) if emulated else ("cuda", "cpu"):
        tokens = "1" if emulated else "60"
        command = [
            *_DEMO,
            *(["--raw", "--prompt", "The"] if emulated else []),
            "--max-new-tokens",
            tokens,
            "--backend",
            backend,
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            yield {"what": "demo", "backend": backend, "said": done.stderr.strip()[-200:]}
            continue
        figures = json.loads(done.stdout)
        yield {
            "what": "demo",
            "backend": figures["backend"],
            "tokens_per_s": figures["decode_tokens_per_s"],
            "of_it_attention": figures["attention_share"],
            "prefill_s": figures["prefill_s"],
        }

"""Runs all parts on this machine's GPU: `scripts/gpu_day [--emulated] [--out DIR] [--part NAME ...]`.

Each part runs in a process of its own: what crashes, hangs or poisons the GPU's context there is a row that says so,
and the next part runs. Writes NAME.json and NAME.md into the output directory, after each part anew.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from .parts import PARTS, Part, Row
from .report import markdown

_ROOT = Path(__file__).parents[2]
_NEEDS = """Nothing is downloaded or installed. Needed: numba, numba-cuda, cuda-core 1.0 or newer, ml_dtypes; ptxas and
libnvvm, of a CUDA 13 toolkit or of NVIDIA's wheels; a driver of CUDA 13 (580 or newer); torch with CUDA. Single parts
need pytest and hypothesis (tests), what the extra "demo" asks for (service), compute-sanitizer, ncu, flash-attn,
FlashInfer: without them there is a row that says so."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the parts that were asked for; as a child process, one of them."""
    parser = argparse.ArgumentParser(prog="gpu_day", description=__doc__.partition("\n")[0], epilog=_NEEDS)
    parser.add_argument("--emulated", action="store_true", help="tiny shapes on the emulator: shows that it runs")
    parser.add_argument("--out", type=Path, default=_ROOT / "benchmarks" / "results", help="directory of the results")
    parser.add_argument("--part", action="append", choices=[part.name for part in PARTS], help="only this one")
    parser.add_argument("--seconds", type=float, default=470, help="of the whole run")
    parser.add_argument("--here", action="store_true", help="all in this process, for a debugger")
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)  # a child's: where its rows go
    asked = parser.parse_args(arguments)
    parts = [part for part in PARTS if not asked.part or part.name in asked.part]
    if asked.rows:
        run_here(parts[0], asked.emulated, asked.rows)
        return
    started = time.monotonic()
    result: dict[str, object] = {"date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC", "emulated": asked.emulated}
    tables: dict[str, list[Row]] = {}
    for part in parts:
        left = asked.seconds - (time.monotonic() - started)
        seconds = min(part.seconds, left)
        print(f"{part.name} (at most {max(seconds, 0):.0f} s)", file=sys.stderr, flush=True)
        if asked.here:
            tables[part.name] = list(part.rows(asked.emulated))
        elif seconds > 0:
            tables[part.name] = run_apart(part, asked.emulated, seconds)
        else:
            tables[part.name] = [{"failed": "no time left"}]
        result |= {"seconds": round(time.monotonic() - started), "parts": tables}
        write(asked.out, "emulated" if asked.emulated else file_name(tables), result)
    print(markdown(result))


def run_here(part: Part, emulated: bool, target: Path) -> None:
    """Run a part in this process; each row is written when it is there."""
    with target.open("a") as file:
        try:
            for row in part.rows(emulated):
                print(json.dumps(row), file=file, flush=True)
        except Exception as error:
            print(json.dumps({"failed": f"{type(error).__name__}: {error}"}), file=file, flush=True)
            raise


def run_apart(part: Part, emulated: bool, seconds: float) -> list[Row]:
    """Run a part in a process of its own, and return its rows; what ended it early is the last of them."""
    with tempfile.TemporaryDirectory() as directory:
        rows, log = Path(directory, "rows"), Path(directory, "log")
        command = [sys.executable, "-m", __package__, "--part", part.name, "--rows", str(rows)]
        with log.open("w") as output:
            child = subprocess.Popen(
                command + ["--emulated"] * emulated,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=_ROOT,
                start_new_session=True,
            )
            try:
                status = child.wait(seconds)
                ended = f"exit status {status}" if status else None
            except subprocess.TimeoutExpired:
                os.killpg(child.pid, signal.SIGKILL)  # and whatever it started
                child.wait()
                ended = f"stopped after {seconds:.0f} s"
        found: list[Row] = [json.loads(line) for line in rows.read_text().splitlines()] if rows.exists() else []
        if ended and not (found and "failed" in found[-1]):
            found.append({"failed": ended})
        if ended:
            found[-1]["log"] = log.read_text()[-3000:]
        return found


def file_name(tables: dict[str, list[Row]]) -> str:
    """Name the results by the GPU that they are of."""
    gpus = (str(row["value"]) for row in tables.get("machine", ()) if row.get("what") == "GPU")
    return next(gpus, "unknown GPU").lower().replace(" ", "-")


def write(directory: Path, name: str, result: dict[str, object]) -> None:
    """Write what there is as JSON and as Markdown."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    (directory / f"{name}.md").write_text(markdown(result))


if __name__ == "__main__":
    main()

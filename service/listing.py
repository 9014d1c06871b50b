"""`numbaflash sessions`: what a server holds."""

from __future__ import annotations

import json as jsonlib
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from .client import Client
from .credentials import TLS


def run(
    target: str,
    *,
    ca: Path | None = None,
    cert: Path | None = None,
    key: Path | None = None,
    token_file: Path | None = None,
    json: bool = False,
) -> None:
    """Print the sessions of a server as a table, or as one JSON object.

    The table has what fits 80 columns: of session ids the first characters, enough to find them on the status page, of
    tokens those of the longest layer. JSON has everything.

    Raises:
        ServiceError: The server cannot be reached, or refuses.
        ValueError: The options do not go together.
        OSError: A file cannot be read.
    """
    tls = TLS(ca, cert, key) if ca or cert or key else None
    token = token_file.read_text("utf-8").strip() if token_file else None
    with Client(target, tls=tls, token=token) as client:
        usage, sessions = client.info().usage, client.list_sessions()
    if json:
        print(jsonlib.dumps({"target": target, "usage": asdict(usage), "sessions": [asdict(s) for s in sessions]}))
        return
    title = (
        f"{len(sessions)} {'session' if len(sessions) == 1 else 'sessions'} on {target}:"
        f" {_size(usage.kv_reserved_bytes)} of {_size(usage.kv_memory_bytes)} reserved"
    )
    if usage.spilled_sessions:
        title += f", {usage.spilled_sessions} on disk"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for column in ("session", "layers, kv heads, dim"):
        table.add_column(column, no_wrap=True)
    for column in ("tokens", "window", "memory", "steps", "ends in"):
        table.add_column(column, justify="right", no_wrap=True)
    now = datetime.now(UTC).timestamp()
    for session in sessions:
        table.add_row(
            f"{session.session_id[:8]}…",
            f"{session.num_layers}, {session.num_kv_heads}, {session.head_dim} {session.dtype}",
            str(session.max_length),
            str(session.capacity),
            "on disk" if session.spilled else _size(session.kv_bytes),
            str(session.steps),
            "busy" if session.busy else _time(max(0.0, session.expires_at - now)),
        )
    Console().print(table)


def _size(nbytes: int) -> str:
    value, unit = float(nbytes), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{value:.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"


def _time(seconds: float) -> str:
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"

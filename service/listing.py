"""`numbaflash sessions`: what a server holds."""

from __future__ import annotations

import json as jsonlib
from dataclasses import asdict
from datetime import UTC, datetime

from rich.console import Console
from rich.table import Table

from .client import Client


def run(target: str, *, json: bool) -> None:
    """Print the sessions of a server as a table, or as one JSON object.

    Raises:
        ServiceError: The server cannot be reached, or refuses.
    """
    with Client(target) as client:
        usage, sessions = client.info().usage, client.list_sessions()
    if json:
        print(jsonlib.dumps({"target": target, "usage": asdict(usage), "sessions": [asdict(s) for s in sessions]}))
        return
    table = Table(
        title=f"{len(sessions)} sessions on {target}: {_size(usage.kv_reserved_bytes)} of"
        f" {_size(usage.kv_memory_bytes)} reserved"
    )
    table.add_column("session", no_wrap=True)
    table.add_column("layers, kv heads, dim")
    for column in ("tokens", "window", "memory", "steps", "ends in"):
        table.add_column(column, justify="right")
    now = datetime.now(UTC).timestamp()
    for session in sessions:
        shortest, longest = session.min_length, session.max_length
        table.add_row(
            session.session_id,
            f"{session.num_layers}, {session.num_kv_heads}, {session.head_dim} {session.dtype}",
            f"{shortest}" if shortest == longest else f"{shortest}-{longest}",
            f"{session.capacity}" + (f" ({session.sink_tokens} sinks)" if session.sink_tokens else ""),
            _size(session.kv_bytes),
            str(session.steps),
            "busy" if session.busy else f"{max(0.0, session.expires_at - now):.0f} s" + " (on disk)" * session.spilled,
        )
    Console().print(table)


def _size(nbytes: int) -> str:
    value, unit = float(nbytes), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{value:.4g} {unit}"

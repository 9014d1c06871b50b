"""`numbaflash bench`: attention on this machine beside its peers, as a table or as JSON."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from datetime import date
from importlib.metadata import version
from itertools import chain
from json import dumps
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from numbaflash.benchmark import Row, decode_rows, prefill_rows
from numbaflash.hardware import measure_this_machine
from numbaflash.user_cache import cache_directory

from .doctor import examine_machine


def run(*, json: bool = False, quick: bool = False) -> None:
    """Measure, print the figures, and keep them at `last_result`; that they cannot be kept is no failure.

    Args:
        json: Print one JSON object.
        quick: Smaller problems: seconds instead of minutes.
    """
    rows = chain(prefill_rows(quick), decode_rows(quick))
    machine, today = examine_machine(), date.today().isoformat()
    console = Console()
    measured = list(rows) if json else _shown_as_they_come(rows, console)
    result: dict[str, Any] = {"machine": asdict(machine), "date": today, "hardware": asdict(measure_this_machine())}
    result["rows"] = [asdict(row) | {"name": row.name, "flops": row.flops} for row in measured]
    if json:
        print(dumps(result))
    else:
        console.print(f"{machine.cpu}, {machine.threads} threads; numbaflash {version('numbaflash')}; {today}")
        console.print(_table(measured))
    try:
        last_result().parent.mkdir(parents=True, exist_ok=True)
        last_result().write_text(dumps(result))
    except OSError as error:
        Console(stderr=True).print(
            f"The figures are not kept for 'numbaflash roofline --plot': {error}", soft_wrap=True
        )


def last_result() -> Path:
    """Where the figures of this machine's last benchmark are, as `--json` prints them."""
    return cache_directory() / "bench.json"


def _shown_as_they_come(rows: Iterator[Row], console: Console) -> list[Row]:
    measured = []
    with console.status("measuring") as status:
        for row in rows:
            measured.append(row)
            status.update(f"measured {row.name}: {row.ours:.1f} {row.unit}")
    return measured


def _table(rows: list[Row]) -> Table:
    table = Table()
    table.add_column("", no_wrap=True)
    for heading in ("numbaflash", "peer", "ratio"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        peer = "not installed" if row.peer is None else f"{row.peer:.3g}"
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
        table.add_row(row.name, f"{row.ours:.3g} {row.unit}", f"{row.peer_name} {peer}", ratio)
    return table

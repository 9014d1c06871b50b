"""`numbaflash bench`: attention on this machine beside its peers, as a table or as JSON."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from datetime import date
from importlib.metadata import version
from itertools import chain
from json import dumps

from rich.console import Console
from rich.table import Table

from numbaflash.benchmark import Row, decode_rows, prefill_rows

from .doctor import examine_machine


def run(*, json: bool = False, quick: bool = False) -> None:
    """Measure, and print the figures; with `quick` smaller problems, in some seconds instead of a minute."""
    rows = chain(prefill_rows(quick), decode_rows(quick))
    machine = examine_machine()
    if json:
        measured = [asdict(row) for row in rows]
        print(dumps({"machine": asdict(machine), "date": date.today().isoformat(), "rows": measured}))
        return
    console = Console()
    console.print(f"{machine.cpu}, {machine.threads} threads; numbaflash {version('numbaflash')}; {date.today()}")
    console.print(_table(_shown_as_they_come(rows, console)))


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

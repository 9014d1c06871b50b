"""Results as Markdown: a table for each part."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

__all__ = ["markdown"]


def markdown(result: dict[str, Any]) -> str:
    """Return the report of a run, finished or not."""
    note = " It ran on the emulator: no time in it means anything." if result["emulated"] else ""
    lines = ["# A day with a GPU", "", f"{result['date']}, {result['seconds']} s, by `scripts/gpu_day`.{note}"]
    for name, rows in result["parts"].items():
        lines += ["", f"## {name.capitalize()}", "", *_table([row for row in rows if "failed" not in row])]
        for row in rows:
            if "failed" in row:
                lines += ["", f"**Failed:** {row['failed']}"]
            if row.get("log"):
                lines += ["", "```", row["log"].strip(), "```"]
    return "\n".join(lines) + "\n"


def _table(rows: list[dict[str, Any]]) -> Iterator[str]:
    columns = list(dict.fromkeys(column for row in rows for column in row))
    if not rows:
        return
    yield f"| {' | '.join(column.replace('_', ' ') for column in columns)} |"
    yield f"|{'---|' * len(columns)}"
    for row in rows:
        yield f"| {' | '.join(_text(row.get(column)) for column in columns)} |"


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
    return str(value).replace("|", "\\|").replace("\n", " ")

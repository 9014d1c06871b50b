"""The log: one event a line on standard error, as JSON or, on a terminal, for reading.

What is logged names sessions by the first eight characters of their id, callers by their names, and never holds tokens
of any kind, tensors or payloads. Whatever logs through Python's `logging` comes out the same way.
"""

from __future__ import annotations

import logging
import re
import secrets
import sys
from typing import Any, Final, Literal

import structlog

Format = Literal["json", "text"]
REQUEST_ID: Final = "x-request-id"

_ACCEPTABLE_ID: Final = re.compile(r"[\w.:/+=-]{1,64}")


def configure(level: str, form: Format | None) -> None:
    """Log from `level` on to standard error.

    Args:
        level: "debug", "info", "warning" or "error".
        form: None: text where standard error is a terminal, else JSON.
    """
    text = sys.stderr.isatty() if form is None else form == "text"
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.ExtraAdder(),
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    last: list[Any] = (
        [structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())]
        if text
        else [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared, processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *last]
        )
    )
    logging.getLogger("grpc").setLevel(logging.INFO)  # its debug lines speak of its own insides, at every call
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(level.upper())


def request_id(metadata: Any) -> str:
    """Return the id that a call brought in its metadata, where it is a word of at most 64 characters, or a new one."""
    for key, value in metadata or ():
        if key == REQUEST_ID and isinstance(value, str) and _ACCEPTABLE_ID.fullmatch(value):
            return value
    return secrets.token_hex(8)

"""Sessions under calls that overlap in every order that a seed draws, against caches in process.

Each schedule runs the whole service on a simulated loop (`simulation.py`): clients step, fork, truncate, snapshot,
restore and close sessions in a memory that holds two of them, lose answers, cancel calls and send them again, while
sessions go to disk and come back, end, and the server is stopped and started. Nothing may be lost, doubled or wrong,
and at the end nothing may be left. A schedule that fails says its seed, which brings it back.
`pytest --hypothesis-profile=thorough` on this file looks for longer.
"""

from __future__ import annotations

import gc
import logging
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from numbaflash.cpu import solve

from .schedule import Schedule
from .simulation import simulated

# Lines of a schedule's story that are told where it fails.
TOLD_LINES = 90


class Errors(logging.Handler):
    """What the service logs as an error."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(logging.Formatter().format(record))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Pauses in every step that could have one, and collections that look at what is new alone."""
    monkeypatch.setattr(solve, "_PART_FMAS", 1)
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def run(seed: int, folder: Path, clients: int = 3, moves: int = 6) -> Schedule:
    shutil.rmtree(folder, ignore_errors=True)
    errors, log = Errors(), logging.getLogger("numbaflash_service")
    log.addHandler(errors)
    with simulated(seed) as loop:
        schedule = Schedule(loop, folder)
        try:
            loop.run_until_complete(schedule.run(clients, moves))
            gc.collect()  # asyncio reports what nobody retrieved when it goes
            assert not loop.faults
            assert not errors.lines or schedule.spill == "tight"  # which says what does not fit
        except BaseException as error:
            story = [f"seed {seed}", *schedule.said[-TOLD_LINES:], *loop.faults, *errors.lines]
            error.add_note("\n".join(story))
            raise
        finally:
            log.removeHandler(errors)
    return schedule


def test_whatever_overlaps_nothing_is_lost_doubled_wrong_or_left(tmp_path: Path) -> None:
    first = 0 if settings.default.derandomize else random.randrange(1 << 32)
    for seed in range(first, first + settings.default.max_examples // 2):
        run(seed, tmp_path / "server")


def test_a_seed_brings_its_schedule_back(tmp_path: Path) -> None:
    once, again = (run(7, tmp_path / "server").said for _ in range(2))
    assert once == again

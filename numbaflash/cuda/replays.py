"""Launches that come again are replayed as a CUDA graph: one call of the driver for all of them.

A graph is taken of launches whose kernels, grids and arguments, addresses among them, are exactly those of an earlier
call: so it does what they would do, and what changes from step to step (lengths, positions, work lists) is what a copy
in front of it has put into memory at those addresses. Callers see to it that their launches come again: `Scratch` gives
them the same addresses, and `splits.rounded_up` the same grids.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence

from .device import Launch, Stream

__all__ = ["Replays"]

log = logging.getLogger(__name__)

_MOST = 256
"""Sequences of launches that are remembered: those of the layers of a large model, at a few lengths."""

Graph = Callable[[Stream], None]
"""Runs on a stream."""


class Replays:
    """The graphs of one device, those used last.

    Args:
        capture: Makes a graph of launches. Where it raises, launches stay what they are from then on.

    Attributes:
        enabled: Launches that come again are replayed.
        count: How often that was done.
    """

    def __init__(self, capture: Callable[[Sequence[Launch]], Graph]) -> None:
        self.enabled = True
        self.count = 0
        self._capture = capture
        self._graphs: OrderedDict[tuple[Launch, ...], Graph | None] = OrderedDict()  # None: they have come once
        self._lock = threading.Lock()  # a graph may be launched by one thread at a time

    def run(self, launches: Sequence[Launch], stream: Stream) -> bool:
        """Replay launches, if they have come before; say whether that was done."""
        if not self.enabled:
            return False
        key = tuple(launches)
        with self._lock:
            known = key in self._graphs
            graph = self._graphs.setdefault(key, None)
            self._graphs.move_to_end(key)
            if len(self._graphs) > _MOST:
                self._graphs.popitem(last=False)
            if known and graph is None:
                graph = self._graphs[key] = self._captured(launches)
            if graph is None:
                return False
            graph(stream)
            self.count += 1
            return True

    def _captured(self, launches: Sequence[Launch]) -> Graph | None:
        try:
            return self._capture(launches)
        except Exception as error:  # whatever a driver has against graphs, kernels can be launched without
            # As text: who keeps the record must not keep the error, whose frames hold the step's memory.
            log.warning("launches are no longer replayed as CUDA graphs: %s", repr(error))
            self.enabled = False
            return None

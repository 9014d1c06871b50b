"""Times work on a device by its events.

Before each measurement a large buffer is filled. That throws the inputs out of the L2, and keeps the device busy while
the host queues the calls: what stands between the two events is then work of the device alone, with no gap where it
waits for Python. What a call costs the host is a figure of its own.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

from numbaflash.cuda.device import Device, EmulatedDevice, Stream

__all__ = ["Clock", "Timing", "clock"]


@dataclass(frozen=True)
class Timing:
    """Medians over rounds.

    Attributes:
        device: Seconds of the device for one call.
        host: Seconds until the host had queued it.
    """

    device: float
    host: float


class Clock:
    """Measures contenders in turns, so that what else happens to the device happens to all of them."""

    def __init__(self, device: Device, scratch_bytes: int) -> None:
        """Reserves the buffer; it should be several times the L2."""
        self.device = device
        # The default stream of torch and CUDA alike.
        self.stream: Stream = device.default_stream
        self._scratch = device.allocate(scratch_bytes)
        filling, _ = min(self._round(lambda _: self._fill(), calls=4, fills=1) for _ in range(3))
        self._fill_seconds = max(filling, 1e-5)

    def _fill(self) -> None:
        self.device.fill(self._scratch.address, self._scratch.nbytes, 0, self.stream)

    def measure(
        self, contenders: dict[str, Callable[[int], object]], *, calls: int = 4, rounds: int = 9
    ) -> dict[str, Timing | Exception]:
        """Measure functions that each take the number of a call, by which they may choose among their inputs.

        Args:
            contenders: By name.
            calls: Of each in a round.
            rounds: How many; two more warm up.

        Returns:
            By name the medians, or what a contender raised when it warmed up.
        """
        results: dict[str, Timing | Exception] = {}
        samples: dict[str, list[tuple[float, float]]] = {}
        fills: dict[str, int] = {}
        for name, contender in contenders.items():
            try:
                contender(0)
                self.stream.synchronize()
                warm_up = self._round(contender, calls, fills=1)
            except Exception as error:  # whatever it is, the others go on
                results[name] = error.with_traceback(None)  # whose frames keep arrays alive
                continue
            samples[name] = []
            fills[name] = min(100, math.ceil(1.5 * calls * warm_up[1] / self._fill_seconds))
        for _ in range(rounds):
            for name, taken in samples.items():
                taken.append(self._round(contenders[name], calls, fills[name]))
        for name, taken in samples.items():
            results[name] = Timing(*(statistics.median(values) for values in zip(*taken, strict=True)))
        return results

    def _round(self, contender: Callable[[int], object], calls: int, fills: int) -> tuple[float, float]:
        for _ in range(fills):
            self._fill()
        before = time.perf_counter()
        start = self.stream.record()
        for call in range(calls):
            contender(call)
        end = self.stream.record()
        host = time.perf_counter() - before
        end.synchronize()
        return end.seconds_since(start) / calls, host / calls


def clock(emulated: bool) -> Clock:
    """Return the clock of the first GPU, or one that ticks on the emulator."""
    if emulated:
        return Clock(EmulatedDevice(), 1 << 10)
    from numbaflash.cuda.gpu import cuda_device

    return Clock(cuda_device(0), 1 << 30)

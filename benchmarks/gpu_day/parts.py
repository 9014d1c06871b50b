"""What a run does, part by part, in this order.

A part is a function that yields rows as it finds them; the rows of a part are one table. It runs in a process of its
own and is stopped when its time is over: what it yielded by then stands. To add one, write the function and list it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Any

__all__ = ["PARTS", "Part", "Row"]

Row = dict[str, Any]
"""Column -> text, number or None, of what JSON knows."""


@dataclass(frozen=True)
class Part:
    """A part of a run.

    Attributes:
        name: Its table's title.
        function: "module:function" in this package, (emulated) -> rows. With `emulated` it does the same with tiny
            shapes on the emulator, and its times mean nothing.
        seconds: It is stopped after that long.
    """

    name: str
    function: str
    seconds: int

    def rows(self, emulated: bool) -> Iterator[Row]:
        """Run it."""
        module, _, name = self.function.partition(":")
        function: Callable[[bool], Iterator[Row]] = getattr(import_module(f".{module}", __package__), name)
        return function(emulated)


PARTS = (
    Part("machine", "machine:describe_machine", 30),
    Part("builds", "builds:build_kernels", 60),
    Part("tests", "checks:kernel_tests", 110),
    Part("ceilings", "ceilings:measure_ceilings", 30),
    Part("prefill", "prefill:beside_pytorch", 120),
    Part("decode", "decode:beside_a_copy", 100),
    Part("launches", "launches:host_times", 30),
    Part("service", "service:through_the_service", 60),
    Part("algorithms", "prefill:algorithms", 45),
    Part("sanitizer", "checks:sanitize", 90),
    Part("profile", "profile:profile_kernels", 45),
)
"""Worst come to worst they take more than a run may; then the last ones get what is left."""

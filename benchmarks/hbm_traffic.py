"""Bytes that each algorithm moves between HBM and the chip: `python benchmarks/hbm_traffic.py [--json]`.

One head, float16, no mask, as many keys as queries. Up to `--counted` tokens the emulator runs the kernels and counts
the 32-byte sectors of each access; beyond stands the formula of `numbaflash.cuda.traffic`. No cache is modelled: what a
GPU finds in its L2 is counted as well.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from numbaflash.cuda.device import EmulatedDevice
from numbaflash.cuda.solve import Queue, solve
from numbaflash.cuda.traffic import flash_v1_bytes, flash_v2_bytes, standard_bytes
from numbaflash.problem import FLOAT16, describe

_FORMULAS = {"standard": standard_bytes, "v1": flash_v1_bytes, "v2": flash_v2_bytes}
_SECTOR = 32


@dataclass(frozen=True)
class CountingQueue(Queue):
    """A queue of an emulated device that keeps the bytes of each launch."""

    moved: list[int] = field(default_factory=list)

    def launch(self, *launch: Any) -> None:
        """Launch a kernel and count."""
        super().launch(*launch)
        assert isinstance(self.device, EmulatedDevice)
        assert self.device.last_report is not None
        self.moved.append(_SECTOR * sum(access.sectors for access in self.device.last_report.global_))


def counted_bytes(algorithm: str, tokens: int, head_dim: int) -> int:
    """Return what the emulator counts for one head."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, tokens, 1, head_dim), np.float32).astype(FLOAT16) for _ in range(3))
    device = EmulatedDevice()
    queue = CountingQueue(device, device.default_stream)
    solve(queue, describe(q, k, v), q, k, v, queue.empty(q.shape, FLOAT16), None, algorithm)
    return sum(queue.moved)


def row(tokens: int, head_dim: int, counted: bool) -> dict[str, Any]:
    """Measure one size."""
    by_formula = {name: formula(tokens, head_dim) for name, formula in _FORMULAS.items()}
    moved = {name: counted_bytes(name, tokens, head_dim) for name in _FORMULAS} if counted else by_formula
    return {"tokens": tokens, "head_dim": head_dim, "bytes": moved, "formula": by_formula, "counted": counted}


def main() -> None:
    """Print the table, or its rows as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 1024, 4096, 16384], help="multiples of 256")
    parser.add_argument("--head-dim", type=int, nargs="+", default=[64, 128], help="multiples of 16")
    parser.add_argument("--counted", type=int, default=1024, help="most tokens that the emulator is to run")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    asked = parser.parse_args()
    rows = [row(n, d, n <= asked.counted) for d in asked.head_dim for n in asked.tokens]
    if asked.json:
        print(json.dumps(rows, indent=1))
        return
    table = Table("d", "N", "standard", "V1", "V2", "standard : V2", "V1 : V2", "source", title="MiB of a head")
    for one in rows:
        moved = one["bytes"]
        table.add_row(
            *(str(one[name]) for name in ("head_dim", "tokens")),
            *(f"{moved[name] / 2**20:.2f}" for name in _FORMULAS),
            *(f"{moved[name] / moved['v2']:.2f}" for name in ("standard", "v1")),
            "formula" if not one["counted"] else "counted" if moved == one["formula"] else "counted, not as by formula",
        )
    Console().print(table)


if __name__ == "__main__":
    main()

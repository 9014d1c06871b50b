"""What each door costs beside `numbaflash.attention`: `python benchmarks/doors.py [--json]`.

A door's row is the time of a call through it less that of the same call made directly, for a problem so small that the
call is all there is to it. Direct call and door are measured in turns, and the difference is the median over the
rounds, in CPU time of the calling thread: what else the machine does meanwhile meets neither.

The last rows compare 64 ragged sequences, one behind the other, with the same sequences padded to the longest.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import date
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812  # as everybody calls it
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator
from rich.console import Console
from rich.table import Table

import numbaflash
from numbaflash.cpu.micro import TILE_ROWS
from numbaflash.cpu.panel import PANEL_ROWS
from numbaflash.cpu.vector import LANES
from numbaflash.flash_attn import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache
from numbaflash.integrations import onnx as onnx_door
from numbaflash.integrations import torch as torch_door
from numbaflash.integrations import transformers as transformers_door

_ROUNDS = 60
_CALLS = 50
_BUDGET_US = 30.0


@dataclass(frozen=True)
class Cost:
    """Microseconds of a direct call, and what a door adds to it."""

    door: str
    direct_us: float
    added_us: float


@dataclass(frozen=True)
class Ragged:
    """Seconds of ragged sequences and of the same padded, and the share of it that is no padding.

    Attributes:
        causal: Whether a query sees earlier keys alone.
        ragged_s: Seconds, one behind the other.
        padded_s: Seconds, padded to the longest.
        tokens: Share of the tokens: what must be read and written.
        pairs: Share of the pairs of a query and a key that it sees: what must be multiplied.
        tiles: The same in whole register tiles, at which the kernels compute pairs.
    """

    causal: bool
    ragged_s: float
    padded_s: float
    tokens: float
    pairs: float
    tiles: float


def main() -> None:
    """Measure, and print a table or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--json", action="store_true", help="print figures as JSON")
    with torch.no_grad():
        arguments = parser.parse_args()
        costs = [_cost(*row) for row in _doors()]
        ragged = [_ragged(causal) for causal in (False, True)]
    if arguments.json:
        machine = {"cpu": platform.processor(), "cores": os.cpu_count(), "date": date.today().isoformat()}
        print(json.dumps({**machine, "doors": [asdict(c) for c in costs], "ragged": [asdict(r) for r in ragged]}))
        return
    console = Console()
    table = Table("door", "direct, us", f"added, us (at most {_BUDGET_US:g})")
    for cost in costs:
        table.add_row(cost.door, f"{cost.direct_us:.1f}", f"{cost.added_us:+.1f}")
    console.print(table)
    table = Table("64 ragged sequences", "ragged, ms", "padded, ms", "ragged / padded", "tokens", "pairs", "tiles")
    for row in ragged:
        ratio = row.ragged_s / row.padded_s
        name = "causal" if row.causal else "full"
        shares = (f"{share:.3f}" for share in (ratio, row.tokens, row.pairs, row.tiles))
        table.add_row(name, f"{1e3 * row.ragged_s:.1f}", f"{1e3 * row.padded_s:.1f}", *shares)
    console.print(table)


def _doors() -> Iterator[tuple[str, Callable[[], Any], Callable[[], Any]]]:
    """Name, direct call and the same call through the door."""
    q, k, v = (torch.randn(1, tokens, heads, 64) for tokens, heads in ((4, 4), (16, 2), (16, 2)))
    first = [tensor.transpose(1, 2).contiguous() for tensor in (q, k, v)]
    half = [tensor.half() for tensor in (q, k, v)]
    arrays = [tensor.numpy() for tensor in half]
    ends_q, ends_k = torch.tensor([0, 4], dtype=torch.int32), torch.tensor([0, 16], dtype=torch.int32)
    lengths = torch.tensor([16], dtype=torch.int32)
    attend = numbaflash.attention

    yield "flash_attn_func, torch", lambda: attend(*half), lambda: flash_attn_func(*half)
    yield "flash_attn_func, NumPy", lambda: attend(*arrays), lambda: flash_attn_func(*arrays)
    packed = [tensor[0] for tensor in half]

    def varlen() -> Any:
        return flash_attn_varlen_func(*packed, ends_q, ends_k, 4, 16)

    def with_kvcache() -> Any:
        return flash_attn_with_kvcache(*half, cache_seqlens=lengths)

    # Beside a direct call that is told lengths as they are, and beside the plainest one.
    for name, through in (("flash_attn_varlen_func", varlen), ("flash_attn_with_kvcache", with_kvcache)):
        yield f"{name}, direct with kv_lengths", lambda: attend(*half, kv_lengths=lengths), through
        yield f"{name}, direct without", lambda: attend(*half), through
    yield "torch operator", lambda: attend(q, k, v, causal=True), lambda: torch_door.attention(q, k, v, causal=True)

    def sdpa() -> Any:
        return F.scaled_dot_product_attention(*first, enable_gqa=True)

    def served() -> Any:
        with mode:
            return sdpa()

    mode = torch_door.sdpa()
    heads_first = [tensor.transpose(1, 2) for tensor in first]
    yield "scaled_dot_product_attention", lambda: attend(*heads_first), served
    module = torch.nn.Module()
    module.is_causal = True
    yield (
        "transformers",
        lambda: attend(*heads_first, causal=True),
        lambda: transformers_door._attend(module, *first, None, sliding_window=None),
    )
    node = helper.make_node("Attention", ["q", "k", "v"], ["out"])
    info = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("q", "k", "v", "out")]
    model = helper.make_model(
        helper.make_graph([node], "graph", info[:3], info[3:]), opset_imports=[helper.make_opsetid("", 25)]
    )
    operator = ReferenceEvaluator(model, new_ops=onnx_door.ops()).rt_nodes_[0]
    plain = [tensor.numpy() for tensor in heads_first]
    given = [tensor.numpy() for tensor in first]
    yield "ONNX operator", lambda: attend(*plain), lambda: operator.run(*given)


def _cost(door: str, direct: Callable[[], Any], through: Callable[[], Any]) -> Cost:
    for _ in range(_CALLS):
        direct()
        through()
    rounds = [(_seconds(direct), _seconds(through)) for _ in range(_ROUNDS)]
    return Cost(
        door,
        1e6 * statistics.median(a for a, _ in rounds),
        1e6 * statistics.median(b - a for a, b in rounds),
    )


def _seconds(call: Callable[[], Any]) -> float:
    start = time.thread_time()
    for _ in range(_CALLS):
        call()
    return (time.thread_time() - start) / _CALLS


def _ragged(causal: bool) -> Ragged:
    rng = np.random.default_rng(0)
    lengths = rng.integers(16, 513, 64)
    lengths[0] = 512
    ends = np.cumsum([0, *lengths]).astype(np.int32)
    q, k, v = (rng.standard_normal((ends[-1], heads, 64), np.float32).astype(np.float16) for heads in (8, 2, 2))
    padded = [np.zeros((64, 512, *array.shape[1:]), np.float16) for array in (q, k, v)]
    for b, length in enumerate(lengths):
        for whole, array in zip(padded, (q, k, v), strict=True):
            whole[b, :length] = array[ends[b] : ends[b + 1]]

    def ragged() -> Any:
        return flash_attn_varlen_func(q, k, v, ends, ends, 512, 512, causal=causal)

    def filled() -> Any:
        return flash_attn_func(*padded, causal=causal)

    times = []
    for _ in range(12):
        pair = []
        for call in (ragged, filled):
            start = time.perf_counter()
            call()
            pair.append(time.perf_counter() - start)
        times.append(pair)

    def share(cost: Callable[[int], int]) -> float:
        return sum(cost(int(length)) for length in lengths) / (64 * cost(512))

    return Ragged(
        causal,
        ragged_s=min(a for a, _ in times),
        padded_s=min(b for _, b in times),
        tokens=share(lambda length: length),
        pairs=share(lambda length: length * (length + 1) // 2 if causal else length**2),
        tiles=share(lambda length: _tiles(length, 4, causal)),
    )


def _tiles(length: int, group: int, causal: bool) -> int:
    """Register tiles of one sequence and KV head: vectors of query rows times blocks of keys that any of them sees."""
    total = 0
    for row in range(0, length * group, PANEL_ROWS):
        rows = min(length * group - row, PANEL_ROWS)
        keys = (row + rows - 1) // group + 1 if causal else length
        total += -(-rows // LANES) * -(-keys // TILE_ROWS)
    return total


if __name__ == "__main__":
    main()

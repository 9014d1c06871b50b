"""What the emulator counts between global memory and the chip is what the papers' formulas say, to the byte."""

from __future__ import annotations

import numpy as np
import pytest
from flash import CountingQueue, emulated_device

from numbaflash.cuda.solve import solve
from numbaflash.cuda.traffic import flash_v1_bytes, flash_v2_bytes, standard_bytes
from numbaflash.problem import FLOAT16, describe

FORMULAS = {"standard": standard_bytes, "v1": flash_v1_bytes, "v2": flash_v2_bytes}
SIZES = [(256, 64), (512, 64), (512, 128)]


def counted(algorithm, tokens, head_dim, *, heads=1):
    x = np.zeros((1, tokens, heads, head_dim), FLOAT16)
    queue = CountingQueue(emulated_device(), emulated_device().default_stream)
    solve(queue, describe(x, x, x), x, x, x, queue.empty(x.shape, FLOAT16), None, algorithm)
    return sum(32 * access.sectors for report in queue.reports for access in report.global_)


@pytest.mark.parametrize(("tokens", "head_dim"), SIZES)
@pytest.mark.parametrize("algorithm", FORMULAS)
def test_the_bytes_that_move_are_those_of_the_formula(algorithm, tokens, head_dim):
    assert counted(algorithm, tokens, head_dim) == FORMULAS[algorithm](tokens, head_dim)


@pytest.mark.parametrize("algorithm", FORMULAS)
def test_each_head_moves_as_much(algorithm):
    assert counted(algorithm, 256, 64, heads=3) == 3 * FORMULAS[algorithm](256, 64)


@pytest.mark.parametrize(("head_dim", "factor"), [(64, 1.28), (128, 2.53)])
def test_v1_moves_more_than_v2_by_the_factor_of_their_loops(head_dim, factor):
    # For each pair of a query and a key V1 moves (2 d of Q + 8 d of O + 16 of m and l) / Bc bytes, Bc 256 and 128, and
    # V2 (2 d of K + 2 d of V) / Br, Br 128. What does not grow with both is less than a hundredth of it at 64k.
    keys = {64: 256, 128: 128}[head_dim]
    per_pair = (10 * head_dim + 16) / keys / (4 * head_dim / 128)
    assert per_pair == pytest.approx(factor, abs=0.01)
    assert flash_v1_bytes(1 << 16, head_dim) / flash_v2_bytes(1 << 16, head_dim) == pytest.approx(per_pair, rel=0.01)


def test_twice_the_fast_memory_halves_what_v1_moves_and_nothing_helps_standard_attention():
    # Theorem 2: bytes grow with N^2 d^2 / M for V1, with N^2 for standard attention.
    many = 1 << 17
    assert flash_v1_bytes(2 * many, 64) / flash_v1_bytes(many, 64) == pytest.approx(4, rel=0.01)
    assert flash_v1_bytes(many, 128) / flash_v1_bytes(many, 64) == pytest.approx(4, rel=0.03)
    assert standard_bytes(many, 64) > 16 * many**2

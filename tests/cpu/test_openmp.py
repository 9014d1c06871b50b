"""Kernels on PyTorch's threads: as many as it has, the same bits as on helpers, and none in a forked child."""

from __future__ import annotations

import _ctypes
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch

import numbaflash
from numbaflash.cpu import openmp, pool
from numbaflash.cpu import solve as entry
from numbaflash.flash_attn import flash_attn_varlen_func, flash_attn_with_kvcache
from numbaflash.integrations.torch import sdpa

ANY = torch.empty(0)

# What the code under test makes of it is not asked: where there are such threads, it has to find them.
pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not torch.backends.openmp.is_available(),
    reason="PyTorch has threads of GCC's OpenMP on Linux, where it was built with it",
)


@pytest.fixture(autouse=True)
def three_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(entry, "thread_count", lambda: 3)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many threads of PyTorch's each kernel runs on, in order."""
    counts: list[int] = []
    run = openmp.Team.run

    def count(team: openmp.Team, compute: Any, task: Any, threads: int, *scratch: int) -> None:
        counts.append(threads)
        run(team, compute, task, threads, *scratch)

    monkeypatch.setattr(openmp.Team, "run", count)
    return counts


def tensors(tokens: int, keys: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1, n, 6, 64, generator=generator).to(dtype) for n in (tokens, keys, keys)]


@pytest.mark.parametrize("algorithm", ["v2", "v1", "standard"])
@pytest.mark.parametrize("tokens", [1, 300])
def test_the_bits_are_those_of_helpers(runs: list[int], tokens: int, algorithm: Any) -> None:
    q, k, v = tensors(tokens, 3000)
    out, lse = numbaflash.attention(q, k, v, algorithm=algorithm, return_lse=True)
    assert runs
    assert set(runs) == {3}
    del runs[:]
    on_helpers = numbaflash.attention(*(t.numpy() for t in (q, k, v)), algorithm=algorithm, return_lse=True)
    assert not runs
    np.testing.assert_array_equal(out.numpy(), on_helpers[0])
    np.testing.assert_array_equal(lse.numpy(), on_helpers[1])


def test_each_door_for_tensors_leads_there(runs: list[int]) -> None:
    q, k, v = tensors(300, 3000, dtype=torch.bfloat16)
    lengths = torch.tensor([0, 300], dtype=torch.int32), torch.tensor([0, 3000], dtype=torch.int32)
    cache = numbaflash.RingKVCache(1, 6, 64, capacity=4096, dtype="bfloat16")
    with sdpa():
        torch.nn.functional.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)))
    doors = [
        lambda: torch.ops.numbaflash.attention(q, k, v),
        lambda: flash_attn_varlen_func(q[0], k[0], v[0], *lengths, 300, 3000),
        lambda: flash_attn_with_kvcache(q, k, v),
        lambda: cache.step(0, k[0], k[0], v[0]),
        lambda: cache.attend(0, q[0]),
    ]
    assert len(runs) == 1
    for before, door in enumerate(doors, 1):
        assert len(runs) == before
        door()
    assert len(runs) == 1 + len(doors)


def test_so_many_as_pytorch_is_told_to_use(runs: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = tensors(300, 3000)
    expected = numbaflash.attention(q, k, v)
    torch.set_num_threads(2)
    assert torch.equal(numbaflash.attention(q, k, v), expected)
    monkeypatch.setattr(pool._Helpers, "run", lambda *_: pytest.fail("woke up a helper"))
    torch.set_num_threads(1)
    assert torch.equal(numbaflash.attention(q, k, v), expected)
    assert runs == [3, 2]


def test_threads_of_python_have_teams_of_their_own(runs: list[int]) -> None:
    problems = [tensors(tokens, 2000, seed) for seed, tokens in enumerate((1, 300, 40))]
    expected = [numbaflash.attention(*problem) for problem in problems]

    def call(i: int) -> bool:
        torch.set_num_threads(3)
        together.wait(20)
        return all(torch.equal(numbaflash.attention(*problems[(i + j) % 3]), expected[(i + j) % 3]) for j in range(10))

    together = threading.Barrier(4)
    with ThreadPoolExecutor(4) as callers:
        assert all(callers.map(call, range(4)))
    assert len(runs) == 43


def test_arrays_of_numpy_are_left_to_helpers(runs: list[int]) -> None:
    q, k, v = tensors(300, 3000)
    numbaflash.attention(q, k, v)
    numbaflash.attention(q.numpy(), k.numpy(), v.numpy())
    assert len(runs) == 1


def test_a_forked_child_uses_helpers() -> None:
    code = """
import os, warnings
import torch
import numbaflash
from numbaflash.cpu import openmp, solve
solve.thread_count = lambda: 3
warnings.simplefilter("ignore")  # Python 3.12 warns of any fork with threads
torch.set_num_threads(3)
q = torch.randn(1, 300, 4, 64)
k = torch.randn(1, 2000, 4, 64)
expected = numbaflash.attention(q, k, k)
pid = os.fork()
out = numbaflash.attention(q, k, k)
assert (out.numpy() == expected.numpy()).all()  # PyTorch itself would wait in the child for its parent's threads
if pid:
    assert os.waitpid(pid, 0)[1] == 0
    os.write(1, b"both")
os._exit(0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == "both", done.stderr


@pytest.mark.parametrize(
    ("where", "name", "what"),
    [(torch.backends.openmp, "is_available", lambda: False), (torch._C, "__file__", _ctypes.__file__)],
    ids=["built without it", "linked with another one"],
)
def test_a_pytorch_without_such_threads_has_helpers(
    monkeypatch: pytest.MonkeyPatch, where: Any, name: str, what: Any
) -> None:
    openmp._threads_of.cache_clear()
    monkeypatch.setattr(where, name, what)
    assert not isinstance(openmp.threads_for(ANY), openmp.Team)
    openmp._threads_of.cache_clear()

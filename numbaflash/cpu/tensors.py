"""Dense tensors of keys and values as runs: one for each sequence, compiled for the same reason as `paging.py`."""

from __future__ import annotations

import numpy as np

from ..problem import AttentionProblem
from .jit import kernel
from .paging import store_run
from .record import address_of, address_of_array
from .runs import RUN_FIELDS, UNBOUNDED, KVRuns, Visibility
from .vector import load_int, store_int

__all__ = ["runs_of_tensors"]


def runs_of_tensors(
    problem: AttentionProblem, k_strides: tuple[int, ...], v_strides: tuple[int, ...]
) -> tuple[KVRuns, Visibility]:
    """Return what the queries of a problem see of keys (B, Sk, Hkv, D) and values (B, Sk, Hkv, Dv).

    Addresses count from the tensors' first elements.
    """
    batch = problem.batch
    # Side by side, for NumPy takes its time for each array.
    numbers = np.empty(5 * batch + 1 + batch * RUN_FIELDS, np.int64)
    _list_tensors(
        batch,
        problem.q_tokens,
        UNBOUNDED if problem.window_left is None else problem.window_left,
        UNBOUNDED if problem.window_right is None else problem.window_right,
        address_of_array(problem.kv_lengths),
        *k_strides[:3],
        *v_strides[:3],
        address_of(numbers),
    )
    bounds_at, table_at = 4 * batch, 5 * batch + 1
    table, bounds = numbers[table_at:].reshape(batch, RUN_FIELDS), numbers[bounds_at:table_at]
    runs = KVRuns(table, bounds, problem.dtype, problem.kv_heads, problem.head_dim, problem.value_dim)
    return runs, Visibility.of_rows(numbers[:bounds_at].reshape(4, batch))


@kernel
def _list_tensors(
    sequences, q_tokens, left, right, lengths, k_sequence, k_token, k_head, v_sequence, v_token, v_head, numbers
):
    """Write rows of `Visibility`, then `KVRuns.bounds` and `table`; `lengths` is the address of int64."""
    bounds = numbers + 8 * 4 * sequences
    table = bounds + 8 * (sequences + 1)
    store_int(bounds, 0)
    for n in range(sequences):
        length = load_int(lengths + 8 * n)
        store_int(numbers + 8 * n, length - q_tokens)
        store_int(numbers + 8 * (sequences + n), left)
        store_int(numbers + 8 * (2 * sequences + n), right)
        store_int(numbers + 8 * (3 * sequences + n), 0)
        store_int(bounds + 8 * (n + 1), n + 1)
        row = table + 8 * RUN_FIELDS * n
        store_run(row, n * k_sequence, n * v_sequence, 0, length, k_token, k_head, v_token, v_head)

"""Walking the runs of a sequence, inside a kernel: where each one lies and where it ends."""

from __future__ import annotations

from .jit import native
from .runs import (
    COUNT,
    K_ADDRESS,
    K_HEAD_STRIDE,
    K_TOKEN_STRIDE,
    RUN_FIELDS,
    START,
    V_ADDRESS,
    V_HEAD_STRIDE,
    V_TOKEN_STRIDE,
)
from .vector import load_int

__all__ = ["key_at", "run_end", "run_field", "runs_end", "skip_runs", "value_at"]


@native
def run_field(task, run, field):
    """A column of the run table."""
    return load_int(task.runs + (run * RUN_FIELDS + field) * 8)


@native
def run_end(task, run):
    """The position behind a run's last token."""
    return run_field(task, run, START) + run_field(task, run, COUNT)


@native
def runs_end(task, sequence):
    """The position behind the last token of a sequence, 0 where it has none."""
    first, last = load_int(task.bounds + 8 * sequence), load_int(task.bounds + 8 * sequence + 8)
    return run_end(task, last - 1) if first < last else 0


@native
def skip_runs(task, sequence, run, position):
    """The first run from `run` on that reaches beyond `position`."""
    last = load_int(task.bounds + 8 * sequence + 8)
    while run < last and run_end(task, run) <= position:
        run += 1
    return run


@native
def _token_at(task, run, kv_head, position, base, address, token_stride, head_stride):
    inside = position - run_field(task, run, START)
    at = base + run_field(task, run, address) + kv_head * run_field(task, run, head_stride)
    return at + inside * run_field(task, run, token_stride)


@native
def key_at(task, run, kv_head, position):
    """Address of the key at a position of a run."""
    return _token_at(task, run, kv_head, position, task.k_base, K_ADDRESS, K_TOKEN_STRIDE, K_HEAD_STRIDE)


@native
def value_at(task, run, kv_head, position):
    """Address of the value at a position of a run."""
    return _token_at(task, run, kv_head, position, task.v_base, V_ADDRESS, V_TOKEN_STRIDE, V_HEAD_STRIDE)

"""The CPU backend: Numba kernels with LLVM vector micro-kernels, over keys and values that lie in runs of tokens."""

from .openmp import threads_for
from .pauses import pausing
from .plan import SPLIT_KV_MAX_TOKENS, Plan, plan_tensors
from .runs import RUN_FIELDS, UNBOUNDED, Codes, KVRuns, Visibility, contiguous_run
from .solve import attend_planned, attend_runs, attention, readable

__all__ = [
    "RUN_FIELDS",
    "SPLIT_KV_MAX_TOKENS",
    "UNBOUNDED",
    "Codes",
    "KVRuns",
    "Plan",
    "Visibility",
    "attend_planned",
    "attend_runs",
    "attention",
    "contiguous_run",
    "pausing",
    "plan_tensors",
    "readable",
    "threads_for",
]

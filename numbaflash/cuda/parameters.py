"""Kernels' parameters: NumPy scalars of the types that they are declared with, and scoring as kernels take it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numba import float32, int32, int64

from numbaflash.problem import Scoring

from .softmax import LOG2_E

__all__ = ["numpy_arguments", "score_factors"]

_NUMPY: dict[Any, Any] = {int64: np.int64, int32: np.int32, float32: np.float32}


def numpy_arguments(parameters: Mapping[str, Any], values: Mapping[str, Any]) -> list[np.generic]:
    """Return the values of `parameters` (name -> Numba type), in their order and of their types."""
    return [_NUMPY[kind](values[name]) for name, kind in parameters.items()]


def score_factors(scoring: Scoring) -> tuple[float, float]:
    """Return the factor of q.k and the cap, both as `scoring.score_pairs` says."""
    if scoring.softcap:
        return 2 * LOG2_E * scoring.scale / scoring.softcap, scoring.softcap * LOG2_E
    return scoring.scale * LOG2_E, 0.0

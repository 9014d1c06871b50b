"""Rotary position embedding (RoFormer, section 3.2.2), as flash-attn applies it to new queries and keys."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["rotate"]


def rotate(
    x: NDArray[Any], cos: NDArray[Any], sin: NDArray[Any], positions: NDArray[np.int64], *, interleaved: bool
) -> NDArray[Any]:
    """Rotate the pairs of the first 2 * pairs elements by their position's angles, in float32.

    Args:
        x: (batch, tokens, heads, head_dim).
        cos: (positions, pairs).
        sin: (positions, pairs).
        positions: (batch, tokens).
        interleaved: Pairs are elements 0 and 1, 2 and 3, ...; else i and i + pairs (GPT-NeoX).

    Returns:
        A copy in x's dtype; elements behind the pairs are as they were.
    """
    pairs = cos.shape[1]
    first, second = (
        (slice(0, 2 * pairs, 2), slice(1, 2 * pairs, 2))
        if interleaved
        else (
            slice(0, pairs),
            slice(pairs, 2 * pairs),
        )
    )
    c, s = (table[positions][:, :, None].astype(np.float32) for table in (cos, sin))
    a, b = x[..., first].astype(np.float32), x[..., second].astype(np.float32)
    rotated = x.copy()
    rotated[..., first] = a * c - b * s
    rotated[..., second] = a * s + b * c
    return rotated

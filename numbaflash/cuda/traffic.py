"""Bytes between global memory and the chip, by formula ("FlashAttention", Dao et al., 2022, theorem 2).

With N tokens, head dim d and fast memory for M elements, standard attention moves Theta(N d + N^2) of them, and
FlashAttention Theta(N^2 d^2 / M): it reads Q and O once for each of N / Bc blocks of K/V, and Bc is M / d.
FlashAttention-2 reads K and V once for each of N / Br query tiles, and O not at all. Here stands each with its factors,
for the tiles that the kernels have.
"""

from __future__ import annotations

from .shapes import STANDARD_KEYS, STANDARD_ROWS, tile_shape, v1_tile_shape

__all__ = ["flash_v1_bytes", "flash_v2_bytes", "standard_bytes"]

_HALF, _FLOAT = 2, 4


def standard_bytes(tokens: int, head_dim: int) -> int:
    """Return the bytes that standard attention moves for one head.

    Args:
        tokens: Queries and as many keys; a multiple of all tiles' lengths, like for the others.
        head_dim: Of queries, keys and values, 16 bits an element; a multiple of 16.
    """
    row, pairs = tokens * head_dim * _HALF, tokens * tokens
    queries_and_keys = row * (tokens // STANDARD_KEYS) + row * (tokens // STANDARD_ROWS)
    scores = pairs * _FLOAT * 3  # written; read for the row's maximum and sum; read to be weighed
    weights = pairs * _HALF * 2
    values_and_out = row * (tokens // STANDARD_ROWS) + row
    return queries_and_keys + scores + weights + values_and_out


def flash_v1_bytes(tokens: int, head_dim: int) -> int:
    """Return the bytes that FlashAttention moves for one head, as `standard_bytes` does."""
    row = tokens * head_dim * _HALF
    blocks = tokens // v1_tile_shape(head_dim, head_dim).keys
    state = tokens * (head_dim + 2) * _FLOAT  # O, m and l
    passes = 1 + 2 * blocks + 1  # set to nothing; read and written for each block; read at last
    return 2 * row + row * blocks + state * passes + row


def flash_v2_bytes(tokens: int, head_dim: int) -> int:
    """Return the bytes that FlashAttention-2 moves for one head on 8.0, as `standard_bytes` does."""
    row = tokens * head_dim * _HALF
    tiles = tokens // tile_shape(head_dim, head_dim, (8, 0)).queries
    return row + 2 * row * tiles + row

"""Into how many shares the keys of a sequence are cut, so that its blocks fill the device ("split-KV").

The number depends on the sequence alone, never on what else is in the launch: so a result has the same bits in every
batch.
"""

from __future__ import annotations

import functools

from .device import Device

__all__ = ["BLOCKS_PER_MULTIPROCESSOR", "KEY_TILE", "rounded_up", "split_keys"]

KEY_TILE = 64
"""Shares begin at multiples of it: the keys that a block reads at a time."""
BLOCKS_PER_MULTIPROCESSOR = 2
"""What the wave is reckoned with: FlashAttention-2's heuristic (`num_splits_heuristic`) counts two as well."""
ENOUGH = 0.85
"""Share of the best efficiency that the fewest splits must reach, as there."""
MOST_PARTIAL_BYTES = 0.02
"""Partial results written and read, beside the bytes of the keys and values that they come from."""


def split_keys(
    keys: int, rows: int, head_dim: int, itemsize: float, blocks: int, device: Device, tile: int = KEY_TILE
) -> int:
    """Return the keys of a share, a multiple of `tile`: as few shares as fill the device well.

    Args:
        keys: That the sequence sees.
        rows: Query rows of a KV head.
        head_dim: Elements of a row in the pages.
        itemsize: Bytes of one, its share of scales included.
        blocks: Blocks of the sequence for each share.
        device: What is to be filled.
        tile: What shares are multiples of.
    """
    tiles = -(-keys // tile)
    least = 2 * rows * 4 * (head_dim + 2) / (MOST_PARTIAL_BYTES * 2 * head_dim * itemsize)
    # A share is a whole number of tiles, so not every number of shares exists.
    most = max(1, tiles // max(1, -(-int(least) // tile)))
    return _share(tiles, most, blocks, device.multiprocessors * BLOCKS_PER_MULTIPROCESSOR) * tile


# The same for 64 steps of a sequence; at 64k tokens it is 200 sizes to try.
@functools.lru_cache(maxsize=4096)
def _share(tiles: int, most: int, blocks: int, slots: int) -> int:
    """Return the tiles of a share, of which there are at most so many."""
    if blocks >= slots * ENOUGH:
        return tiles
    sizes = sorted({-(-tiles // splits) for splits in range(1, min(most, slots) + 1)}, reverse=True)
    efficiency = {size: _wave_efficiency(blocks * -(-tiles // size), slots) for size in sizes}
    best = max(efficiency.values())
    return next(size for size in sizes if efficiency[size] >= ENOUGH * best)


def rounded_up(items: int) -> int:
    """Return the items of a grid that serves as many and some fewer: at most an eighth of its blocks find no keys."""
    step = 1 << max(0, items.bit_length() - 4)
    return -(-items // step) * step


def _wave_efficiency(blocks: int, slots: int) -> float:
    """Blocks in flight on average, beside what fits."""
    return blocks / (-(-blocks // slots) * slots)

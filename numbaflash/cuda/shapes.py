"""Tile shapes per head dim and compute capability, each with its reason.

What limits a shape: registers (255 a thread; with 32 query rows a warp, O takes head_dim of them and S takes as many as
the block has keys), shared memory (163 KiB a block on 8.0, 227 on 9.0, 99 on 8.6 and 8.9), and the shared-memory pipe:
16 query rows a warp read each fragment of K and V for half as many MMAs, 9.3 cycles of that pipe per HMMA's 8.

Shares of tensor peak are the issue model's (`issue_model`: 2 warps, float16, sm_80, the loop as it runs when no maximum
is raised), which ranks kernels and is no measurement.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["TileShape", "tile_shape"]


@dataclass(frozen=True)
class TileShape:
    """How a block cuts the problem.

    Attributes:
        queries: Query rows of a block.
        keys: Keys of a K/V block.
        warps: Warps of a block; each owns queries / warps rows, 16 or 32.
        blocks: Blocks per multiprocessor that registers must suffice for.
        k_ahead: Fragments of Q and K that are loaded ahead of the MMAs that use them.
        v_ahead: Fragments of V, likewise.
        copy_after: Fragments of K whose MMAs come before the copy of V.
    """

    queries: int
    keys: int
    warps: int
    blocks: int
    k_ahead: int
    v_ahead: int
    copy_after: int


def tile_shape(
    head_dim: int, value_dim: int, cc: tuple[int, int], *, scored: bool = False, biased: bool = False
) -> TileShape:
    """Return the tile shape for 16-bit elements.

    Args:
        head_dim: Elements of a query and a key.
        value_dim: Elements of a value.
        cc: Compute capability; 8.6 and 8.9 have less shared memory than 8.0 and 9.0.
        scored: A score is more than scale * q.k (`Scoring.in_log2_units`), which takes registers.
        biased: A bias is among it: loads under way take more of them.
    """
    widest = max(head_dim, value_dim)
    little = cc in ((8, 6), (8, 9))
    if widest <= 64:
        # 128 keys: S and O take 192 registers, as at 128. With 64 keys the rescaling, the barriers and the loop weigh
        # twice as much. 48 KiB: two blocks fit everywhere. Model 0.81, causal 0.79; other orders of loads 0.72 to 0.80.
        return TileShape(128, 64 if scored else 128, 4, 2, k_ahead=1, v_ahead=2, copy_after=14)
    if widest <= 128:
        # 64 keys, 64 KiB: two blocks. Model 0.84, causal 0.82; other orders of loads 0.76 to 0.86. On 8.6 and 8.9 that
        # leaves room for one block of 4 warps; with 32 keys, 48 KiB, there are two.
        return TileShape(128, 32 if biased or little else 64, 4, 2, k_ahead=2, v_ahead=3, copy_after=6)
    # O alone would take more than 128 registers of 32 rows a warp: 16 rows, and 8 warps for as many queries. Model 0.70
    # at 192, 0.74 at 256. At 256, 128 KiB with 64 keys; 96 KiB with 32, which is what fits on 8.6 and 8.9.
    return TileShape(128, 32 if little else 64, 8, 1, k_ahead=2, v_ahead=2, copy_after=2)

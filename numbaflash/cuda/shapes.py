"""Tile shapes per head dim and compute capability, each with its reason.

What limits a shape: registers (255 a thread; with 32 query rows a warp, O takes head_dim of them and S takes as many as
the block has keys), shared memory (163 KiB a block on 8.0, 227 on 9.0, 99 on 8.6, 8.9 and 12.0), and the shared-memory
pipe: 16 query rows a warp read each fragment of K and V for half as many MMAs, 9.3 cycles of that pipe per HMMA's 8.

Shares of tensor peak are the issue model's (`issue_model`: the resident warps, float16, the loop as it runs when no
maximum is raised), which ranks kernels and is no measurement. On 9.0 they are of what mma.sync can reach, 0.63 of the
data sheet's. On 8.6 and 8.9 tensor cores take twice as long, so that little of what surrounds them shows.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["STANDARD_KEYS", "STANDARD_ROWS", "TileShape", "tile_shape", "v1_tile_shape"]

# What standard attention pads the matrices of scores and weights to.
STANDARD_ROWS, STANDARD_KEYS = 128, 64


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
    head_dim: int,
    value_dim: int,
    cc: tuple[int, int],
    *,
    float32: bool = False,
    scored: bool = False,
    biased: bool = False,
) -> TileShape:
    """Return FlashAttention-2's tile shape.

    Args:
        head_dim: Elements of a query and a key.
        value_dim: Elements of a value.
        cc: Compute capability; 8.6, 8.9 and 12.x have less shared memory than 8.0 and 9.0.
        float32: Elements are float32, not of 16 bits.
        scored: A score is more than scale * q.k (`Scoring.in_log2_units`), which takes registers.
        biased: A bias is among it: loads under way take more of them.
    """
    widest = max(head_dim, value_dim)
    little, hopper = cc in ((8, 6), (8, 9)) or cc[0] == 12, cc == (9, 0)
    if float32:
        return _float32_shape(widest, little)
    if widest <= 64:
        # 128 keys: S and O take 192 registers, as at 128. With 64 keys the rescaling, the barriers and the loop weigh
        # twice as much. 48 KiB: two blocks fit everywhere. 8.0: 0.81, causal 0.79; other orders of loads 0.72 to 0.80.
        # 8.6 and 8.9: 0.94. 9.0: 0.65, and 0.62 in the order of 8.0.
        keys = 64 if scored else 128
        return TileShape(128, keys, 4, 2, k_ahead=2 if hopper else 1, v_ahead=2, copy_after=14)
    if widest <= 128:
        # 64 keys, 64 KiB: two blocks. 8.0: 0.84, causal 0.82; other orders of loads 0.76 to 0.86. On 8.6 and 8.9 that
        # leaves room for one block of 4 warps; with 32 keys, 48 KiB, there are two: 0.95, as with one block of 8 warps
        # and 64 keys. 9.0: 0.71, and 0.70 in the order of 8.0.
        k_ahead, v_ahead = (3, 4) if hopper else (2, 3)
        return TileShape(128, 32 if biased or little else 64, 4, 2, k_ahead, v_ahead, copy_after=6)
    # O alone would take more than 128 registers of 32 rows a warp: 16 rows, and 8 warps for as many queries. At 256,
    # 128 KiB with 64 keys; 96 KiB with 32, which is what fits on 8.6 and 8.9. 8.0: 0.72 at 192, 0.75 at 256; 8.6 and
    # 8.9: 0.91, 0.92; 9.0: 0.56, 0.57: there the shared-memory pipe is what such fragments keep busy.
    return TileShape(128, 32 if little else 64, 8, 1, k_ahead=2, v_ahead=2, copy_after=2)


def _float32_shape(widest: int, little: bool) -> TileShape:
    """Return the tile shape for float32: twice the bytes, fragments in two parts, and scores in two sums.

    Each fragment of K and V is split anew by every warp (4 instructions an element), so rows a warp count even more
    than for 16 bits. 32 keys: more make longer sums, which tensor cores truncate (`float32_products`).
    """
    if widest <= 64:
        # 32 rows a warp. 48 KiB: two blocks fit everywhere. Model 0.89, every option 0.72; 16 rows 0.70, and 0.79 with
        # 64 keys.
        return TileShape(128, 32, 4, 2, k_ahead=2, v_ahead=2, copy_after=1)
    if widest <= 128 or (widest <= 192 and not little):
        # O leaves registers for 16 rows a warp. 96 KiB at 128, 144 at 192. Model 0.76 at both; two blocks of 64 queries
        # 0.74 at 128.
        return TileShape(128, 32, 8, 1, k_ahead=2, v_ahead=2, copy_after=1)
    if little:
        # Half the queries: 96 KiB at 192, model 0.54; at 256 as much with 16 keys, 0.42.
        return TileShape(64, 32 if widest <= 192 else 16, 4, 1, k_ahead=2, v_ahead=2, copy_after=1)
    # 160 KiB at 256, which 8.0 has just so. Model 0.69; 64 queries with 32 keys 0.54.
    return TileShape(128, 16, 8, 1, k_ahead=2, v_ahead=2, copy_after=1)


def v1_tile_shape(head_dim: int, value_dim: int, *, wide: bool = False, scored: bool = False) -> TileShape:
    """Return FlashAttention-1's Bc (`keys`) and Br (`queries`), line 1 of its algorithm, and how warps share them.

    The paper gives a quarter of fast memory to each of K, V, Q and O: the more keys a block has, the fewer times Q and
    O are read. Here O is in registers. K and V take 64 KiB, Q 8 to 32: two blocks fit on 8.0 and 9.0 up to a head dim
    of 128, one on 8.6 and 8.9 at any. S and O take 128 to 160 registers a thread with 16 rows a warp. With 32 they
    would spill. Where a score is more than scale * q.k (`scored`) there is room for half the keys up to a head dim of
    64, and beyond 192.
    Float32 (`wide`) has fewer keys for as many bytes, and scores in two sums (`float32_products`).
    """
    widest = max(head_dim, value_dim)
    if wide and widest > 128:
        return TileShape(64, 32 if widest <= 192 else 16, 4, 1, k_ahead=2, v_ahead=2, copy_after=0)
    if wide:
        return TileShape(64, 64, 4, 2 if widest <= 64 else 1, k_ahead=2, v_ahead=2, copy_after=0)
    if widest <= 128:
        return TileShape(64, 128 if scored or widest > 64 else 256, 4, 2, k_ahead=2, v_ahead=2, copy_after=0)
    return TileShape(64, 32 if scored and widest > 192 else 64, 4, 1, k_ahead=2, v_ahead=2, copy_after=0)

"""The two matrix products of attention for one warp, S = Q K^T and O += P V, in the order that hides their loads.

Each is emitted whole by one intrinsic: a Python loop at code-generation time, since both the order of fragment loads
among the MMAs and full unrolling matter, and neither survives a compiler left to itself.

Fragments (PTX ISA, "Matrix Fragments for mma.m16n8k16"): with g = lane / 4 and t = lane % 4, a lane holds of a 16x8
tile of results the elements (g, 2t), (g, 2t+1), (g+8, 2t), (g+8, 2t+1). Register arrays are indexed
[row tile][column tile][these four].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

from llvmlite import ir
from numba.cuda import types

from . import ptx
from .ptx import B32, B64, F32, constant, device_intrinsic
from .tile import Registers, RowCopy, SharedTile, step

__all__ = ["WarpTile", "add_weighted_values", "element", "multiply_values", "score_keys"]


@dataclass(frozen=True)
class WarpTile:
    """What one warp computes of a block's tile.

    Attributes:
        row_tiles: Tiles of 16 query rows.
        keys: Keys of a K/V block.
        head_dim: Elements of a query, a multiple of 16.
        value_dim: Elements of a value, a multiple of 16.
        bfloat16: Elements are bfloat16, not float16.
        k_ahead: Fragments of Q and K that are loaded ahead of the MMAs that use them.
        v_ahead: Fragments of V, likewise.
        copy_after: Fragments of K whose MMAs come before the copy of V. It is one burst: spread among the MMAs, each
            piece costs three dummy loads that ptxas puts between LDSM and LDGSTS on sm_80.
    """

    row_tiles: int
    keys: int
    head_dim: int
    value_dim: int
    bfloat16: bool
    k_ahead: int
    v_ahead: int
    copy_after: int

    @property
    def rows(self) -> int:
        """Rows of S and O of which a lane holds elements."""
        return 2 * self.row_tiles

    def score(self, row: int, column: int) -> int:
        """Index of a lane's score: `row` is 2 * row tile + half, `column` is 2 * column tile + (0 or 1)."""
        return element(self.keys // 8, row, column)

    def output(self, row: int, column: int) -> int:
        """Index of a lane's element of O, by row and column as for `score`."""
        return element(self.value_dim // 8, row, column)


def element(column_tiles: int, row: int, column: int) -> int:
    """Index of a lane's element of a warp tile that is `column_tiles` of 8 columns wide; the rest as for `score`."""
    return ((row // 2) * column_tiles + column // 2) * 4 + (row % 2) * 2 + column % 2


PV_COPY_AFTER = 1
"""Fragments of V whose MMAs come before the copy of the next K: it may start at once, V is there for all."""


def _multiply(builder: Any, mma: Any, results: Registers, first: int, a: list[Any], b: list[Any], fresh: bool) -> None:
    """results[first : first + 4] += a b; a fresh tile starts from zero."""
    zero = constant(F32, 0.0)
    c = [zero] * 4 if fresh else [results[first + i] for i in range(4)]
    for i, value in enumerate(mma.emit(builder, *a, *b, *c)):
        results[first + i] = value


def score_keys(
    warp: WarpTile, queries: SharedTile, keys: SharedTile, beside: RowCopy | None, *, find_maxima: bool
) -> Any:
    """Return a device function that computes S = Q K^T for a warp, and starts the copy `beside` on the way.

    Its arguments: the lane's address in the warp's first query rows, its address in K's tile, the scores, the row
    maxima of what the lane holds (written where `find_maxima`: the scores are final as the product leaves them), and
    the arguments of the copy, where there is one.
    """
    mma = ptx.mma_bf16 if warp.bfloat16 else ptx.mma_f16

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, values: Any) -> Any:
        query_address, key_address, score_array, max_array, *copied = values
        scores = Registers(context, builder, signature.args[2], score_array)
        maxima = Registers(context, builder, signature.args[3], max_array)
        q: dict[tuple[int, int], list[Any]] = {}
        k: dict[tuple[int, int], list[Any]] = {}

        def load_queries(depth: int, tile: int) -> None:
            q[depth, tile] = ptx.ldmatrix_x4.emit(builder, *step(builder, queries, query_address, 16 * tile, 2 * depth))

        def load_keys(depth: int, pair: int) -> None:
            k[depth, pair] = ptx.ldmatrix_x4.emit(builder, *step(builder, keys, key_address, 16 * pair, 2 * depth))

        def multiply(depth: int, pair: int) -> None:
            for half in range(2):
                for tile in range(warp.row_tiles):
                    first = warp.score(2 * tile, 2 * (2 * pair + half))
                    b = k[depth, pair][2 * half : 2 * half + 2]
                    _multiply(builder, mma, scores, first, q[depth, tile], b, fresh=depth == 0)

        depths, pairs = warp.head_dim // 16, warp.keys // 16
        loads: list[Callable[[], None]] = []
        uses = []
        for depth in range(depths):
            loads += [partial(load_queries, depth, tile) for tile in range(warp.row_tiles)]
            for pair in range(pairs):
                loads.append(partial(load_keys, depth, pair))
                uses.append((len(loads), depth, pair))
        waiting = iter(loads)
        started = 0
        for index, (needed, depth, pair) in enumerate(uses):
            if beside and index == min(warp.copy_after, len(uses) - 1):
                source = beside.emit(builder, copied)
            for load in islice(waiting, max(0, needed + warp.k_ahead - started)):
                load()
                started += 1
            multiply(depth, pair)
            if find_maxima and depth == depths - 1 and pair:
                update_maxima(builder, warp, scores, maxima, pair - 1)
        if find_maxima:
            update_maxima(builder, warp, scores, maxima, pairs - 1)
        scores.store()
        maxima.store()
        return source if beside else None

    if beside is None:
        return device_intrinsic(emit, [B32.numba, B32.numba, None, None], types.void)
    return device_intrinsic(emit, [B32.numba, B32.numba, None, None, *RowCopy.ARGUMENTS], B64.numba)


def update_maxima(builder: ir.IRBuilder, warp: WarpTile, scores: Registers, maxima: Registers, pair: int) -> None:
    """Emit the row maxima of a lane's scores over 16 keys more; the first 16 start them."""
    for column in range(4 * pair, 4 * pair + 4):
        for row in range(warp.rows):
            score = scores[warp.score(row, column)]
            maxima[row] = ptx.maximum.emit(builder, maxima[row], score) if column else score


def add_weighted_values(warp: WarpTile, values: SharedTile, beside: RowCopy | None) -> Any:
    """Return a device function that computes P = exp2(scale S - m), O += P V and l += row sums of P for a warp.

    P never leaves the registers: as the lanes hold S, rounded and packed in pairs, they hold the A operand of the
    second product. The weights of 16 keys are made while the MMAs of the 16 before are under way, for the tensor cores
    and the exponential's unit work side by side; the copy `beside` is started on the way, where there is one.

    Its arguments: the lane's address in V's tile, the scores, scale * log2(e), the row maxima m in the same units, the
    lane's share of the row sums, O, and the arguments of the copy.
    """
    mma = ptx.mma_bf16 if warp.bfloat16 else ptx.mma_f16
    pack = ptx.pack_bf16 if warp.bfloat16 else ptx.pack_f16

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        value_address, score_array, scale, max_array, sum_array, out_array, *copied = arguments
        kinds = signature.args
        scores = Registers(context, builder, kinds[1], score_array)
        row_max = Registers(context, builder, kinds[3], max_array)
        row_sum = Registers(context, builder, kinds[4], sum_array)
        out = Registers(context, builder, kinds[5], out_array)
        negative_max = [builder.fsub(constant(F32, -0.0), row_max[row]) for row in range(warp.rows)]
        weights: dict[tuple[int, int], list[Any]] = {}
        v: dict[tuple[int, int], list[Any]] = {}

        def weigh(block: int) -> Iterator[None]:
            """Emit the weights of 16 keys, a pair a step."""
            for tile in range(warp.row_tiles):
                fragment = []
                for half in range(2):
                    for row in (2 * tile, 2 * tile + 1):
                        pair = []
                        for column in (0, 1):
                            score = scores[warp.score(row, 2 * (2 * block + half) + column)]
                            weight = ptx.exp2.emit(builder, builder.fma(score, scale, negative_max[row]))
                            row_sum[row] = builder.fadd(row_sum[row], weight)
                            pair.append(weight)
                        fragment.append(pack.emit(builder, *pair))
                        yield
                weights[block, tile] = fragment

        def load_values(block: int, pair: int) -> None:
            address, offset = step(builder, values, value_address, 16 * block, 2 * pair)
            v[block, pair] = ptx.ldmatrix_x4_trans.emit(builder, address, offset)

        blocks, pairs = warp.keys // 16, warp.value_dim // 16
        uses = [(block, pair) for block in range(blocks) for pair in range(pairs)]
        waiting = iter(uses)
        for at in islice(waiting, warp.v_ahead):
            load_values(*at)
        for _ in weigh(0):
            pass
        for block in range(blocks):
            coming = weigh(block + 1) if block + 1 < blocks else iter(())
            for pair in range(pairs):
                if beside and block * pairs + pair == PV_COPY_AFTER:
                    source = beside.emit(builder, copied)
                for at in islice(waiting, 1):
                    load_values(*at)
                for half in range(2):
                    for tile in range(warp.row_tiles):
                        first = warp.output(2 * tile, 2 * (2 * pair + half))
                        b = v[block, pair][2 * half : 2 * half + 2]
                        _multiply(builder, mma, out, first, weights[block, tile], b, fresh=False)
                        next(coming, None)
            for _ in coming:
                pass
        row_sum.store()
        out.store()
        return source if beside else None

    own = [B32.numba, None, F32.numba, None, None, None]
    if beside is None:
        return device_intrinsic(emit, own, types.void)
    return device_intrinsic(emit, [*own, *RowCopy.ARGUMENTS], B64.numba)


def multiply_values(warp: WarpTile, weights: SharedTile, values: SharedTile) -> Any:
    """Return a device function that computes O += P V for a warp, with P in shared memory.

    Its arguments: the lane's address in the warp's first rows of P, its address in V's tile, and O.
    """
    mma = ptx.mma_bf16 if warp.bfloat16 else ptx.mma_f16

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> None:
        weight_address, value_address, out_array = arguments
        out = Registers(context, builder, signature.args[2], out_array)
        v: dict[tuple[int, int], list[Any]] = {}

        def load_values(block: int, pair: int) -> None:
            address, offset = step(builder, values, value_address, 16 * block, 2 * pair)
            v[block, pair] = ptx.ldmatrix_x4_trans.emit(builder, address, offset)

        blocks, pairs = warp.keys // 16, warp.value_dim // 16
        waiting = iter([(block, pair) for block in range(blocks) for pair in range(pairs)])
        for at in islice(waiting, warp.v_ahead):
            load_values(*at)
        for block in range(blocks):
            p = [
                ptx.ldmatrix_x4.emit(builder, *step(builder, weights, weight_address, 16 * tile, 2 * block))
                for tile in range(warp.row_tiles)
            ]
            for pair in range(pairs):
                for at in islice(waiting, 1):
                    load_values(*at)
                for half in range(2):
                    for tile in range(warp.row_tiles):
                        first = warp.output(2 * tile, 2 * (2 * pair + half))
                        _multiply(
                            builder, mma, out, first, p[tile], v[block, pair][2 * half : 2 * half + 2], fresh=False
                        )
        out.store()

    return device_intrinsic(emit, [B32.numba, B32.numba, None], types.void)

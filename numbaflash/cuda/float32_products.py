"""The two matrix products of attention for one warp in float32: what `products` is for 16-bit elements.

Each operand is split in two TF32 numbers, x = big + small, and a b = big big + (big small + small big): "3xTF32", as in
CUTLASS. What is left out is 2^-22 of a product; TF32 alone would leave out 2^-11.

Why not FFMA: an A100 has 19.5 TFLOP/s of it at the very most. A third of its TF32 is 52, of which the issue model sees
0.66 to 0.89 reached (`shapes`): 34 TFLOP/s or more. By the data sheets a third of TF32 is 2.5 times FFMA's peak on an
H100, though mma.sync does not reach all of it there; on 8.6 and 8.9 it is from two thirds (A40) down to a third of it
(GeForce), and FFMA might win. One kernel serves all.

Tensor cores truncate their sums instead of rounding them, and truncation adds up: no sum here is longer than a head
dim or a K/V block, the small terms are summed apart, and what follows is added in float32. In a model of that
truncation a score is off by 4e-7, and by 18e-7 with all terms in one sum.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain, islice
from typing import Any

from llvmlite import ir
from numba.cuda import types

from . import ptx
from .products import WarpTile, update_maxima
from .ptx import B32, B64, F32, constant, device_intrinsic
from .tile import CHUNK, Registers, RowCopy, SharedTile, step

__all__ = ["add_weighted_values", "multiply_values", "score_keys"]

DEPTH = 8
"""Elements that an MMA sums over: two chunks of 16 bytes, so ldmatrix loads Q and K as it does 16-bit elements."""

Split = tuple[list[ir.Value], list[ir.Value]]


class _SplitSum:
    """A 16x8 tile of results, with the small terms apart."""

    def __init__(self) -> None:
        self.big = self.small = [constant(F32, 0.0)] * 4

    def total(self, builder: ir.IRBuilder) -> list[ir.Value]:
        """Emit the four results."""
        return [builder.fadd(big, small) for big, small in zip(self.big, self.small, strict=True)]


def _multiply(builder: ir.IRBuilder, products: list[tuple[_SplitSum, Split, Split]], beside: Iterator[None]) -> None:
    """Emit the three MMAs of each product; those of one sum stand apart, since each waits for the one before.

    A step of what is to be done `beside` follows each.
    """
    for total, (_, a_small), (b_big, _) in products:
        total.small = ptx.mma_tf32.emit(builder, *a_small, *b_big, *total.small)
        next(beside, None)
    for total, (a_big, _), (b_big, _) in products:
        total.big = ptx.mma_tf32.emit(builder, *a_big, *b_big, *total.big)
        next(beside, None)
    for total, (a_big, _), (_, b_small) in products:
        total.small = ptx.mma_tf32.emit(builder, *a_big, *b_small, *total.small)
        next(beside, None)


def _split(builder: ir.IRBuilder, registers: list[ir.Value], into: Split) -> Iterator[None]:
    """Emit x = big + small, appended to `into`, a register a step.

    Both are rounded to nearest by adding half of TF32's last place to the bits. The MMA does not look at the 13 bits
    below it, so only `big`, which is subtracted, is rid of them. (cvt.rna.tf32 is four instructions on sm_80.)
    """
    half = constant(B32, 1 << 12)
    for register in registers:
        big = builder.and_(builder.add(register, half), constant(B32, -1 << 13))
        rest = builder.fsub(builder.bitcast(register, F32.llvm), builder.bitcast(big, F32.llvm))
        into[0].append(big)
        into[1].append(builder.add(builder.bitcast(rest, B32.llvm), half))
        yield


def score_keys(
    warp: WarpTile, queries: SharedTile, keys: SharedTile, beside: RowCopy | None, *, find_maxima: bool
) -> Any:
    """Return a device function as `products.score_keys` does."""

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, values: Any) -> Any:
        query_address, key_address, score_array, max_array, *copied = values
        scores = Registers(context, builder, signature.args[2], score_array)
        maxima = Registers(context, builder, signature.args[3], max_array)
        sums = {(tile, column): _SplitSum() for tile in range(warp.row_tiles) for column in range(warp.keys // 8)}
        loaded: dict[tuple[str, int, int], list[ir.Value]] = {}
        q: dict[tuple[int, int], Split] = {}
        k: dict[tuple[int, int, int], Split] = {}

        def load_queries(depth: int, tile: int) -> None:
            at = step(builder, queries, query_address, 16 * tile, 2 * depth)
            loaded["q", depth, tile] = ptx.ldmatrix_x4.emit(builder, *at)

        def load_keys(depth: int, pair: int) -> None:
            at = step(builder, keys, key_address, 16 * pair, 2 * depth)
            loaded["k", depth, pair] = ptx.ldmatrix_x4.emit(builder, *at)

        def split(depth: int, pair: int) -> Iterator[None]:
            if pair == 0:
                for tile in range(warp.row_tiles):
                    q[depth, tile] = [], []
                    yield from _split(builder, loaded.pop(("q", depth, tile)), q[depth, tile])
            registers = loaded.pop(("k", depth, pair))
            for half in range(2):
                k[depth, pair, half] = [], []
                yield from _split(builder, registers[2 * half : 2 * half + 2], k[depth, pair, half])

        depths, pairs = warp.head_dim // DEPTH, warp.keys // 16
        loads: list[Callable[[], None]] = []
        uses = []
        for depth in range(depths):
            loads += [partial(load_queries, depth, tile) for tile in range(warp.row_tiles)]
            for pair in range(pairs):
                loads.append(partial(load_keys, depth, pair))
                uses.append((len(loads), depth, pair))
        waiting = iter(loads)
        started = 0
        splits = iter([split(depth, pair) for _, depth, pair in uses])
        coming: Iterator[None] = iter(())
        for index, (_, depth, pair) in enumerate(uses):
            needed, _, _ = uses[min(index + 1, len(uses) - 1)]
            if beside and index == min(warp.copy_after, len(uses) - 1):
                source = beside.emit(builder, copied)
            for load in islice(waiting, max(0, needed + warp.k_ahead - started)):
                load()
                started += 1
            if index == 0:
                for _ in next(splits):
                    pass
            coming = next(splits, iter(()))
            products = [
                (sums[tile, 2 * pair + half], q[depth, tile], k[depth, pair, half])
                for half in range(2)
                for tile in range(warp.row_tiles)
            ]
            _multiply(builder, products, coming)
            for _ in coming:
                pass
        for (tile, column), total in sums.items():
            for i, value in enumerate(total.total(builder)):
                scores[warp.score(2 * tile, 2 * column) + i] = value
        if find_maxima:
            for pair in range(pairs):
                update_maxima(builder, warp, scores, maxima, pair)
        scores.store()
        maxima.store()
        return source if beside else None

    if beside is None:
        return device_intrinsic(emit, [B32.numba, B32.numba, None, None], types.void)
    return device_intrinsic(emit, [B32.numba, B32.numba, None, None, *RowCopy.ARGUMENTS], B64.numba)


def add_weighted_values(warp: WarpTile, values: SharedTile, beside: RowCopy) -> Any:
    """Return a device function as `products.add_weighted_values` does, but for the lane's address in V's tile.

    A lane holds of each 8 keys the weights of 2t and 2t + 1; the MMA takes them for its t and t + 4, so that no weight
    changes lanes, and finds V's rows in the same order. ldmatrix transposes no 32-bit elements: with g = lane / 4 and
    t = lane % 4 the address is that of column g of row 2t, and columns are read one by one.
    """

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        even, score_array, scale, max_array, sum_array, out_array, *copied = arguments
        kinds = signature.args
        scores = Registers(context, builder, kinds[1], score_array)
        row_max = Registers(context, builder, kinds[3], max_array)
        row_sum = Registers(context, builder, kinds[4], sum_array)
        out = Registers(context, builder, kinds[5], out_array)
        negative_max = [builder.fsub(constant(F32, -0.0), row_max[row]) for row in range(warp.rows)]
        # One row down, in a tile whose rows are whole groups of 8 chunks, is the neighbouring chunk of the next row.
        odd = builder.add(builder.xor(even, constant(B32, CHUNK)), constant(B32, values.pitch))
        weights: dict[tuple[int, int], Split] = {}
        loaded: dict[tuple[int, int], list[ir.Value]] = {}
        v: dict[tuple[int, int], Split] = {}

        def weigh(block: int) -> Iterator[None]:
            for tile in range(warp.row_tiles):
                fragment = []
                for i in range(2):
                    for row in (2 * tile, 2 * tile + 1):
                        exponent = builder.fma(scores[warp.score(row, 2 * block + i)], scale, negative_max[row])
                        bits = builder.bitcast(ptx.exp2.emit(builder, exponent), B32.llvm)
                        # Without its last bit a weight is big + small and no less, in O and in the row sum alike.
                        bits = builder.and_(bits, constant(B32, -2))
                        row_sum[row] = builder.fadd(row_sum[row], builder.bitcast(bits, F32.llvm))
                        fragment.append(bits)
                        yield
                weights[block, tile] = [], []
                yield from _split(builder, fragment, weights[block, tile])

        def load_values(column: int, block: int) -> None:
            places = (step(builder, values, address, 8 * block, 2 * column) for address in (even, odd))
            loaded[column, block] = [ptx.load_shared_b32.emit(builder, *place) for place in places]

        def split(column: int, block: int) -> Iterator[None]:
            v[column, block] = [], []
            return _split(builder, loaded.pop((column, block)), v[column, block])

        blocks = range(warp.keys // DEPTH)
        uses = [(pair, block) for pair in range(warp.value_dim // 16) for block in blocks]
        waiting = iter(uses)

        def load(steps: int) -> None:
            for pair, block in islice(waiting, steps):
                load_values(2 * pair, block)
                load_values(2 * pair + 1, block)

        load(warp.v_ahead)
        source = beside.emit(builder, copied)
        for _ in chain(weigh(0), split(0, 0), split(1, 0)):
            pass
        for (pair, block), following in zip(uses, [*uses[1:], None], strict=True):
            if block == 0:
                sums = {(tile, half): _SplitSum() for tile in range(warp.row_tiles) for half in range(2)}
            load(1)
            coming: list[Iterator[None]] = []
            if following:
                coming = [split(2 * following[0] + half, following[1]) for half in range(2)]
                if following[0] == 0:
                    coming.append(weigh(following[1]))
            beside_mmas = chain(*coming)
            products = [
                (sums[tile, half], weights[block, tile], v[2 * pair + half, block])
                for half in range(2)
                for tile in range(warp.row_tiles)
            ]
            _multiply(builder, products, beside_mmas)
            for _ in beside_mmas:
                pass
            if block == blocks[-1]:
                for (tile, half), total in sums.items():
                    first = warp.output(2 * tile, 2 * (2 * pair + half))
                    for i, value in enumerate(total.total(builder)):
                        out[first + i] = builder.fadd(out[first + i], value)
        row_sum.store()
        out.store()
        return source

    return device_intrinsic(emit, [B32.numba, None, F32.numba, None, None, None, *RowCopy.ARGUMENTS], B64.numba)


def multiply_values(warp: WarpTile, weights: SharedTile, values: SharedTile) -> Any:
    """Return a device function as `products.multiply_values` does, with V's address as for `add_weighted_values`.

    V's rows are found in the order 0, 2, 4, 6, 1, 3, 5, 7 of each 8, so P's columns must lie in that order.
    """

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> None:
        weight_address, even, out_array = arguments
        out = Registers(context, builder, signature.args[2], out_array)
        odd = builder.add(builder.xor(even, constant(B32, CHUNK)), constant(B32, values.pitch))
        blocks, tiles = range(warp.keys // DEPTH), range(warp.row_tiles)
        p: dict[tuple[int, int], Split] = {}
        for block in blocks:
            for tile in tiles:
                p[block, tile] = [], []
                at = step(builder, weights, weight_address, 16 * tile, 2 * block)
                for _ in _split(builder, ptx.ldmatrix_x4.emit(builder, *at), p[block, tile]):
                    pass
        uses = [(column, block) for column in range(warp.value_dim // 8) for block in blocks]
        waiting = iter(uses)
        loaded: dict[tuple[int, int], list[ir.Value]] = {}

        def load(steps: int) -> None:
            for column, block in islice(waiting, steps):
                places = (step(builder, values, address, 8 * block, 2 * column) for address in (even, odd))
                loaded[column, block] = [ptx.load_shared_b32.emit(builder, *place) for place in places]

        load(warp.v_ahead)
        for column, block in uses:
            if block == 0:
                sums = [_SplitSum() for _ in tiles]
            load(1)
            v: Split = ([], [])
            for _ in _split(builder, loaded.pop((column, block)), v):
                pass
            _multiply(builder, [(sums[tile], p[block, tile], v) for tile in tiles], iter(()))
            if block == blocks[-1]:
                for tile in tiles:
                    for i, value in enumerate(sums[tile].total(builder)):
                        index = warp.output(2 * tile, 2 * column) + i
                        out[index] = builder.fadd(out[index], value)
        out.store()

    return device_intrinsic(emit, [B32.numba, B32.numba, None], types.void)

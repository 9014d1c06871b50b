"""From q.k to the score of a pair: scale, softcap, ALiBi, bias and masks, on a warp's fragments.

Scores that need anything but the scale are brought to log2 units here (s * log2(e)), as the softmax takes them; scores
that need only the scale are left to it, which has a multiply-add to spare.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llvmlite import ir
from numba.cuda import types

from . import ptx
from .products import WarpTile
from .ptx import B32, B64, F32, constant, device_intrinsic
from .tile import Registers, column_offset, row_offset

__all__ = ["Scoring", "mask_scores", "score_pairs"]


@dataclass(frozen=True)
class Scoring:
    """What a score is beside scale * q.k, and which keys a query may see; each part costs nothing where it is off.

    Attributes:
        scaled: The scale is applied to each score, not left to the softmax: for what follows it, and where it is not
            positive (the largest q.k is then not the largest score).
        softcap: s -> softcap * tanh(s / softcap).
        alibi: s -> s - slope * |query position - key position|.
        bias: "float16", "bfloat16" or "float32" to add, "bool" to mask by, or "" for none.
        left: The window is bounded to the left of the query's position.
        right: It is bounded to the right of it (a causal mask is).
    """

    scaled: bool = False
    softcap: bool = False
    alibi: bool = False
    bias: str = ""
    left: bool = False
    right: bool = False

    @property
    def in_log2_units(self) -> bool:
        """Scores pass through `score_pairs`."""
        return self.scaled or self.softcap or self.alibi or bool(self.bias)


def mask_scores(warp: WarpTile, scoring: Scoring) -> Any:
    """Return a device function that sets to -inf the scores of keys that a query may not see.

    Its arguments: the scores, and relative to the lane's first key of the block: the number of keys, the last key that
    its first row sees, and the first one.
    """

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, values: Any) -> None:
        scores = Registers(context, builder, signature.args[0], values[0])
        count, last, first = values[1:]
        hidden = constant(F32, float("-inf"))
        for row in range(warp.rows):
            end = count
            if scoring.right:
                beyond = builder.add(last, constant(B32, row_offset(row) + 1))
                end = builder.select(builder.icmp_signed("<", beyond, count), beyond, count)
            start = builder.add(first, constant(B32, row_offset(row)))
            for column in range(warp.keys // 4):
                key = constant(B32, column_offset(column))
                index = warp.score(row, column)
                scores[index] = builder.select(builder.icmp_signed("<", key, end), scores[index], hidden)
                if scoring.left:
                    scores[index] = builder.select(builder.icmp_signed(">=", key, start), scores[index], hidden)
        scores.store()

    return device_intrinsic(emit, [None, B32.numba, B32.numba, B32.numba], types.void)


def score_pairs(warp: WarpTile, scoring: Scoring, *, masked: bool) -> Any:
    """Return a device function that turns q.k into scores in log2 units.

    Its arguments: the scores; scale * log2(e), or with a softcap 2 * log2(e) * scale / softcap; softcap * log2(e);
    slope * log2(e); the distance from the lane's first key of the block to its first row's position; the address of the
    bias of that row and key; bytes from row to row and from key to key of the bias; and how many rows and keys there
    are from those on. Where `masked`, not all keys of the block exist, and the bias of those that do not is not read.
    """

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, values: Any) -> None:
        scores = Registers(context, builder, signature.args[0], values[0])
        scale, cap, slope, distance, bias, bias_row, bias_key, rows, keys = values[1:]
        last_key = builder.sub(keys, constant(B32, 1))
        minus_slope = builder.fsub(constant(F32, -0.0), slope)
        for row in range(warp.rows):
            if scoring.bias:
                # Rows that do not exist read the first one's bias: nobody reads their scores.
                exists = builder.icmp_signed(">", rows, constant(B32, row_offset(row)))
                down = builder.mul(bias_row, constant(B64, row_offset(row)))
                row_bias = builder.add(bias, builder.select(exists, down, constant(B64, 0)))
            if scoring.alibi:
                position = builder.sitofp(builder.add(distance, constant(B32, row_offset(row))), F32.llvm)
            for column in range(warp.keys // 4):
                index = warp.score(row, column)
                score = scores[index]
                score = _capped(builder, score, scale, cap) if scoring.softcap else builder.fmul(score, scale)
                if scoring.alibi:
                    away = builder.fsub(position, constant(F32, float(column_offset(column))))
                    score = builder.fma(minus_slope, ptx.absolute.emit(builder, away), score)
                if scoring.bias:
                    key = constant(B32, column_offset(column))
                    if masked:
                        # The last key's bias instead of one beyond the end.
                        key = builder.select(builder.icmp_signed("<", key, last_key), key, last_key)
                    # Written as one instruction, or LLVM keeps the products of all columns in registers.
                    score = _biased(
                        builder, scoring.bias, score, ptx.multiply_add_wide.emit(builder, key, bias_key, row_bias)
                    )
                scores[index] = score
        scores.store()

    kinds = [F32] * 3 + [B32] + [B64] * 2 + [B32] * 3
    return device_intrinsic(emit, [None, *(kind.numba for kind in kinds)], types.void)


def _capped(builder: ir.IRBuilder, score: ir.Value, scale: ir.Value, cap: ir.Value) -> ir.Value:
    """Cap * tanh(x) = cap - 2 cap / (exp(2 x) + 1), true to float32; the hardware's own tanh is off by 2^-11."""
    power = ptx.exp2.emit(builder, builder.fmul(score, scale))
    share = ptx.reciprocal.emit(builder, builder.fadd(power, constant(F32, 1.0)))
    return builder.fma(builder.fmul(cap, constant(F32, -2.0)), share, cap)


def _biased(builder: ir.IRBuilder, kind: str, score: ir.Value, address: ir.Value) -> ir.Value:
    if kind == "bool":
        return ptx.keep_where_byte.emit(builder, address, score)
    if kind == "float32":
        bias = ptx.load_global_f32.emit(builder, address)
    else:
        widen = ptx.bf16_to_f32 if kind == "bfloat16" else ptx.f16_to_f32
        bias = widen.emit(builder, ptx.load_global_b16.emit(builder, address))
    return ptx.add_bias.emit(builder, bias, score)

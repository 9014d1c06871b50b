"""What an attention kernel is specialised for: a frozen description, and the key of its build."""

from __future__ import annotations

from dataclasses import dataclass

from numbaflash.problem import AttentionProblem

from .scoring import Scoring

__all__ = ["PLAIN", "Variant"]

PLAIN = Scoring()
"""scale * q.k, every key seen."""


@dataclass(frozen=True)
class Variant:
    """What the kernel is specialised for.

    Attributes:
        head_dim: Elements of a query and a key, a multiple of 8 up to 256.
        value_dim: Elements of a value, likewise.
        dtype: "float16", "bfloat16" or "float32".
        scoring: What a score is, and which keys a query may see.
        sinks: Each head has a sink logit.
        lengths: Each batch entry has its own number of keys.
        lse: The log-sum-exp is written as well.
    """

    head_dim: int
    value_dim: int
    dtype: str
    scoring: Scoring = PLAIN
    sinks: bool = False
    lengths: bool = False
    lse: bool = False

    @classmethod
    def of(cls, problem: AttentionProblem, *, lse: bool) -> Variant:
        """Return the variant that solves a problem whose head dims are padded to multiples of 8."""
        scoring_of = problem.scoring
        return cls(
            head_dim=-(-problem.head_dim // 8) * 8,
            value_dim=-(-problem.value_dim // 8) * 8,
            dtype=problem.dtype.name,
            scoring=Scoring(
                scaled=scoring_of.scale <= 0,
                softcap=scoring_of.softcap > 0,
                alibi=scoring_of.alibi_slopes is not None,
                bias="" if scoring_of.bias is None else scoring_of.bias.dtype.name,
                left=problem.window_left is not None,
                right=problem.window_right is not None,
            ),
            sinks=scoring_of.sink_logits is not None,
            lengths=bool((problem.kv_lengths != problem.kv_tokens).any()),
            lse=lse,
        )

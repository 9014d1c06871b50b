"""What the decode kernels are specialised for, and what they are launched with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import float32, int32, int64

from numbaflash.problem import Scoring

from .codes import CodeFormat

__all__ = ["DECODE_PARAMETERS", "DecodeVariant"]


@dataclass(frozen=True)
class DecodeVariant:
    """What a decode kernel is specialised for.

    Attributes:
        head_dim: Elements of a query, a key and a value, padded to a multiple of 8.
        dtype: Of the pages.
        step_dtype: Of the queries, of the output, and, where pages hold floats, of the step's own keys and values.
        masked: There are several tokens, so that not every row sees every key.
        softcap: s -> softcap * tanh(s / softcap).
        alibi: s -> s - slope * |query position - key position|.
        sinks: Each head has a sink logit.
        scaled: The scale is not positive, so that the largest q.k is not the largest score.
        codes: How pages of codes lie, beside which `dtype` is that of all other tokens; None: there are none.
    """

    head_dim: int
    dtype: str
    step_dtype: str
    masked: bool = False
    softcap: bool = False
    alibi: bool = False
    sinks: bool = False
    scaled: bool = False
    codes: CodeFormat | None = None

    @classmethod
    def of(
        cls,
        head_dim: int,
        dtype: np.dtype[Any],
        step_dtype: np.dtype[Any],
        scoring: Scoring,
        tokens: int,
        codes: CodeFormat | None = None,
    ) -> DecodeVariant:
        """Return the variant for steps of so many tokens; head_dim is padded."""
        return cls(
            head_dim,
            dtype.name,
            step_dtype.name,
            masked=tokens > 1,
            softcap=scoring.softcap > 0,
            alibi=scoring.alibi_slopes is not None,
            sinks=scoring.sink_logits is not None,
            scaled=scoring.scale <= 0,
            codes=codes,
        )


DECODE_PARAMETERS = {
    # Addresses. q and out are (sequence, token, head, dim), k and v likewise with KV heads; strides in bytes.
    **dict.fromkeys(("q", "k", "v", "out", "records", "items", "partials", "partial_sums", "slopes", "sinks"), int64),
    **dict.fromkeys(("q_batch", "q_token", "q_head", "k_batch", "k_token", "k_head"), int64),
    **dict.fromkeys(("v_batch", "v_token", "v_head", "out_batch", "out_token", "out_head"), int64),
    **dict.fromkeys(("tokens", "q_heads", "kv_heads", "group"), int32),
    # As `scoring.score_pairs` takes them.
    **dict.fromkeys(("factor", "cap"), float32),
}
"""Name and type of a decode kernel's parameters, in order. `partials` is (partial, token, head, dim) float32 and
`partial_sums` (partial, token, head, 2): the row maximum in log2 units and the sum of weights."""

"""Many caches at once: a step of each of them in one launch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from ..problem import check_dtype, describe_scoring
from .arguments import check_kv, check_q
from .ring import RingKVCache

__all__ = ["attention_batch"]


def attention_batch(
    caches: Sequence[RingKVCache],
    layer: int,
    q: Any,
    k: Any,
    v: Any,
    *,
    scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    sink_logits: Any = None,
) -> Any:
    """`RingKVCache.step` for N caches of any lengths in one launch.

    Args:
        caches: N different caches with the same heads, head_dim and dtype, and pages of the same format where they are
            quantized; capacities and sink tokens may differ.
        layer: A layer that all of them have.
        q: (N, T, Hq, D).
        k: (N, T, Hkv, D).
        v: (N, T, Hkv, D).
        scale: As in `numbaflash.attention`, like everything that follows.
        softcap: Cap of the scores.
        alibi_slopes: (Hq,) or (N, Hq).
        sink_logits: (Hq,).

    Returns:
        (N, T, Hq, D), q's library and dtype.

    Raises:
        TypeError: Wrong dtypes.
        ValueError: Wrong shapes, caches that differ or come twice, or no such layer; no cache has changed then.
    """
    if not isinstance(caches, Iterable):
        raise TypeError(f"caches must be several RingKVCache objects, got {type(caches).__name__}")
    caches = list(caches)
    if not caches:
        raise ValueError("caches must have at least one cache, got none")
    for cache in caches:
        if not isinstance(cache, RingKVCache):
            raise TypeError(f"caches must hold RingKVCache objects, got {type(cache).__name__}")
    if len({id(cache) for cache in caches}) != len(caches):
        raise ValueError("caches must not hold the same cache twice")
    kinds = {(cache.num_kv_heads, cache.head_dim, cache.dtype) for cache in caches}
    if len(kinds) != 1:
        named = sorted((*sizes, dtype.name) for *sizes, dtype in kinds)
        raise ValueError(f"caches must agree in kv heads, head_dim and dtype, got {named}")
    layers = [cache._layer(layer) for cache in caches]
    if len({one.page_format for one in layers}) != 1:
        raise ValueError("caches must agree in page_size and the quantizer's groups where they are quantized")
    place = caches[0]._place
    place.check_together([cache._place for cache in caches])
    queries, keys, values = place.view(q, "q"), place.view(k, "k"), place.view(v, "v")
    check_dtype(q=queries, k=keys, v=values)
    kv_heads, head_dim, lead = caches[0].num_kv_heads, caches[0].head_dim, (len(caches),)
    check_q(queries, kv_heads, head_dim, lead)
    check_kv(keys, values, kv_heads, head_dim, lead)
    if keys.shape[1] != queries.shape[1]:
        raise ValueError(f"k must have q's {queries.shape[1]} tokens, got {keys.shape[1]}")
    scoring = describe_scoring(
        batch=len(caches),
        q_heads=queries.shape[2],
        head_dim=head_dim,
        scale=scale,
        softcap=softcap,
        alibi_slopes=place.option(alibi_slopes),
        sink_logits=place.option(sink_logits),
    )
    return place.step(layers, queries, keys, values, scoring, {"q": q, "k": k, "v": v})

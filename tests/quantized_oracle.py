"""What a quantized cache must return: quantize, unpack in NumPy, and attend densely to what each query sees."""

from __future__ import annotations

import numpy as np
from oracle import expected_of_cache


def unpack(page, page_format):
    """Keys and values, (page_size, kv_heads, head_dim) float32, of a page's bytes, by the format's description."""
    f, parts, at = page_format, [], 0
    for nbytes, group in ((f.key_nbytes, f.key_group), (f.value_nbytes, f.value_group)):
        heads = page[at : at + f.kv_heads * nbytes].reshape(f.kv_heads, nbytes)
        parts.append(np.stack([_unpack_head(head, f, group) for head in heads], axis=1))
        at += f.kv_heads * nbytes
    assert at == len(page) == f.page_nbytes
    return parts


def _unpack_head(head, f, group):
    stored = head[: f.page_size * f.head_dim * f.bits // 8].reshape(f.page_size, -1)
    codes = np.empty((f.page_size, f.head_dim), np.float32)
    for block in range(f.head_dim // 32):
        if f.bits == 8:
            codes[:, 32 * block : 32 * block + 32] = stored[:, 32 * block : 32 * block + 32]
        else:
            pairs = stored[:, 16 * block : 16 * block + 16]
            codes[:, 32 * block : 32 * block + 16] = pairs % 16
            codes[:, 32 * block + 16 : 32 * block + 32] = pairs // 16
    parameters = head[stored.size :].view(np.float16).astype(np.float32).reshape(1 if f.symmetric else 2, -1)
    scales = parameters[0]
    offsets = -scales * 2 ** (f.bits - 1) if f.symmetric else parameters[1]
    if group:
        scales, offsets = (np.repeat(x.reshape(-1, f.page_size).T, group, axis=1) for x in (scales, offsets))
    return scales * codes + offsets


def expected_of_quantized(cache, q, k, v, *, layer=0, **options):
    """What `step` must return for a whole sequence in a cache like this one, (T, H, D) float32 arrays."""
    layout, quantizer = cache.layout, cache.quantizer
    f = quantizer.page_format(cache.dtype.name, cache.num_kv_heads, layout.page_size, cache.head_dim)
    q = quantizer.fold_queries(layer, q)
    k, v = (x.astype(np.float16) for x in (quantizer.fold_keys(layer, k), v))
    sinks, size = layout.sink_tokens, layout.page_size
    seen_k, seen_v = k.astype(np.float32), v.astype(np.float32)
    out = np.empty(q.shape)
    start = 0
    while start < len(q):
        page = max(start - sinks, 0) // size
        own, stop = sinks + page * size, min(sinks + (page + 1) * size, len(q))
        if page:
            last = slice(own - size, own)
            (content,) = quantizer.pack(f, k[None, last], v[None, last])
            seen_k[last], seen_v[last] = unpack(content, f)
        # The last queries of a sequence stand at its end, so those before them need not be computed again.
        out[start:stop] = expected_of_cache(
            q[start:stop], seen_k[:stop], seen_v[:stop], capacity=layout.capacity, sink_tokens=sinks, **options
        )
        start = stop
    return out

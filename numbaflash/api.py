"""`attention` and `merge`: check the arguments, choose a backend, call it."""

from __future__ import annotations

import importlib
from typing import Any, Literal

import numpy as np

from . import cpu
from .arrays import as_numpy, like
from .backends import choose_backend
from .problem import check_dtype, describe

__all__ = ["attention", "merge"]

Algorithm = Literal["standard", "v1", "v2"]
_ALGORITHMS = ("standard", "v1", "v2")


def attention(
    q: Any,
    k: Any,
    v: Any,
    *,
    scale: float | None = None,
    causal: bool = False,
    window: tuple[int | None, int | None] = (None, None),
    softcap: float = 0.0,
    bias: Any = None,
    alibi_slopes: Any = None,
    sink_logits: Any = None,
    kv_lengths: Any = None,
    algorithm: Algorithm = "v2",
    return_lse: bool = False,
    backend: str | None = None,
) -> Any:
    """Softmax(Q K^T) V, exact, without ever holding all scores ("v2", "v1"), or with all of them ("standard").

    Takes NumPy arrays and anything with `__dlpack__` or `__cuda_array_interface__`; float32, float16 or bfloat16. Sums
    and softmax run in float32. Query head h reads KV head `h // (Hq // Hkv)`. A query that may attend to nothing gives
    zeros.

    Args:
        q: (B, Sq, Hq, D); D is 1 to 256.
        k: (B, Sk, Hkv, D); Hq is a multiple of Hkv.
        v: (B, Sk, Hkv, Dv); Dv is 1 to 256.
        scale: Factor of q.k; None means 1/sqrt(D).
        causal: Query i sees key j where j <= i + Sk - Sq (bottom-right aligned).
        window: (left, right): query i sees i + Sk - Sq - left <= j <= i + Sk - Sq + right; None is unbounded.
        softcap: s -> softcap * tanh(s / softcap), after the scale, before bias and mask; 0 means none.
        bias: Added to the scores (float32 or q's dtype; -inf: may not attend) or bool (True: may attend); broadcast to
            (B, Hq, Sq, Sk), never written out.
        alibi_slopes: (Hq,) or (B, Hq): adds -slope * |i + Sk - Sq - j|.
        sink_logits: (Hq,): logits of a virtual key with no value; they join the softmax's denominator and the LSE.
        kv_lengths: (B,) ints: keys beyond do not exist (they may hold NaN); causal, window and ALiBi take the length
            for Sk.
        algorithm: "v2" (FlashAttention-2, Algorithm 1), "v1" (FlashAttention, Algorithm 1) or "standard" (the same
            paper's Algorithm 0: scores and probabilities written out).
        return_lse: Also return the natural log-sum-exp of each query's scores.
        backend: "cpu"; "cuda", a GPU, whose own arrays are read where they lie, in the order of their library's current
            stream (others are copied there and back); "emulated", the GPU's kernels on the emulator: slow, and checked.
            None: "cuda" where q lives on a GPU or one is there, else "cpu".

    Returns:
        The output (B, Sq, Hq, Dv), q's library and dtype; with `return_lse` also the LSE, float32 (B, Hq, Sq), -inf
        where a query attends to nothing.

    Raises:
        TypeError: An argument has the wrong type or dtype; nothing has run.
        ValueError: An argument has the wrong shape or value; nothing has run.
        RuntimeError: The backend needs a GPU, or packages, that are not there.
    """
    backend = choose_backend(backend, array=q)
    if algorithm not in _ALGORITHMS:
        raise ValueError(f"algorithm must be {', '.join(map(repr, _ALGORITHMS))}, got {algorithm!r}")
    options: dict[str, Any] = {
        "scale": scale,
        "causal": causal,
        "window": window,
        "softcap": softcap,
        "bias": bias,
        "alibi_slopes": alibi_slopes,
        "sink_logits": sink_logits,
        "kv_lengths": kv_lengths,
    }
    if backend == "cpu":
        queries, keys, values = as_numpy(q, "q"), as_numpy(k, "k"), as_numpy(v, "v")
        problem = describe(queries, keys, values, **options)
        with cpu.threads_for(q):
            out, lse = cpu.attention(problem, queries, keys, values, algorithm)
        return (like(q, out), like(q, lse)) if return_lse else like(q, out)
    out, lse = _cuda().attention(q, k, v, backend=backend, algorithm=algorithm, return_lse=return_lse, **options)
    return (out, lse) if return_lse else out


def merge(out_a: Any, lse_a: Any, out_b: Any, lse_b: Any) -> tuple[Any, Any]:
    """Combine attention over two disjoint sets of keys into attention over their union.

    Each output is a mean weighted by exp(score), and its LSE is the log of the weights' sum (FlashAttention-2, section
    2.3.1; FlashDecoding).

    Args:
        out_a: (B, Sq, Hq, Dv), float32, float16 or bfloat16.
        lse_a: (B, Hq, Sq), float32, natural log.
        out_b: As out_a.
        lse_b: As lse_a.

    Returns:
        The output, out_a's library and dtype, and the LSE, float32.

    Raises:
        TypeError: Wrong dtypes.
        ValueError: Wrong shapes.
    """
    a, b = as_numpy(out_a, "out_a"), as_numpy(out_b, "out_b")
    la, lb = as_numpy(lse_a, "lse_a"), as_numpy(lse_b, "lse_b")
    dtype = check_dtype(out_a=a, out_b=b)
    if a.ndim != 4:
        raise ValueError(f"out_a must have 4 axes (batch, tokens, heads, value_dim), got shape {a.shape}")
    if b.shape != a.shape:
        raise ValueError(f"out_b must have out_a's shape {a.shape}, got {b.shape}")
    batch, tokens, heads, _ = a.shape
    for name, lse in (("lse_a", la), ("lse_b", lb)):
        if lse.dtype != np.float32:
            raise TypeError(f"{name} must be float32, got {lse.dtype}")
        if lse.shape != (batch, heads, tokens):
            raise ValueError(f"{name} must have shape {(batch, heads, tokens)}, got {lse.shape}")
    top = np.maximum(la, lb)
    base = np.where(np.isneginf(top), np.float32(0), top)  # two empty sets: exp(-inf - 0) = 0 rather than NaN
    weight_a, weight_b = np.exp(la - base), np.exp(lb - base)
    total = weight_a + weight_b
    share = 1 / np.where(total > 0, total, np.float32(1))
    share_a, share_b = ((weight * share).swapaxes(1, 2)[..., None] for weight in (weight_a, weight_b))
    out = a.astype(np.float32) * share_a + b.astype(np.float32) * share_b
    with np.errstate(divide="ignore"):
        lse = base + np.log(total)
    return like(out_a, out.astype(dtype)), like(out_a, lse)


def _cuda() -> Any:
    """The module of the kernels for GPUs; it needs the compilers that come with an extra."""
    try:
        return importlib.import_module(".cuda.attention", __package__)
    except ImportError as error:
        raise RuntimeError(f"backends 'cuda' and 'emulated' need pip install 'numbaflash[cuda]': {error}") from error

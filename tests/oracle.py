"""What the tests compare with: the float64 reference, and how far a straightforward computation is from it."""

from __future__ import annotations

import numpy as np

from numbaflash import reference
from numbaflash.problem import describe

# Half a unit in the last place of the storage format, relative; float32 allows for sums over some hundred terms.
ROUNDING = {"float32": 2e-6, "float16": 2.0**-11, "bfloat16": 2.0**-8}


def random_tokens(rng, *shape, dtype=np.float32):
    return rng.standard_normal(shape, np.float32).astype(dtype)


def expected(q, k, v, *, sink_tokens=0, **options):
    """Output and LSE in float64 for batched arrays."""
    return reference.attention(describe(q, k, v, **options), q, k, v, sink_tokens)


def expected_of_cache(q, k, v, *, capacity, sink_tokens=0, **options):
    """What `step` must return for a whole sequence, (T, H, D) arrays: the law of the cache."""
    out, _ = expected(
        q[None],
        k[None],
        v[None],
        sink_tokens=sink_tokens,
        causal=True,
        window=(capacity - sink_tokens - 1, 0),
        **options,
    )
    return out[0]


def assert_close(got, want, dtype=None):
    """Compare with the tolerance of a result that was summed in float32 and rounded once to `dtype`."""
    name = np.dtype(dtype or got.dtype).name
    tolerance = ROUNDING[name]
    np.testing.assert_allclose(
        got.astype(np.float64), want, rtol=2 * tolerance, atol=4e-6 if name == "float32" else tolerance
    )

"""FlashAttention-2 on problems that nobody chose: few kernels, many shapes and values, against the reference."""

from __future__ import annotations

import numpy as np
import pytest
from flash import solved
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import assert_close, expected, random_tokens

UNBOUNDED = 10**6
WINDOW_SIDES = st.integers(0, 8) | st.integers(0, 400) | st.just(UNBOUNDED)


@st.composite
def shapes(draw):
    """Batch, q tokens, kv tokens, q heads, kv heads: around the edges of tiles as often as not."""
    tokens = st.integers(0, 40) | st.sampled_from([63, 64, 65, 127, 128, 129, 191, 193, 256, 257])
    kv_heads, group = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    return draw(st.integers(1, 2)), max(1, draw(tokens)), draw(tokens), kv_heads * group, kv_heads


def causal(_draw, _rng, _shape):
    return {"causal": True}


def window(draw, _rng, _shape):
    return {"window": (draw(WINDOW_SIDES), draw(WINDOW_SIDES))}


def every_option(draw, rng, shape):
    batch, q_tokens, kv_tokens, q_heads, _ = shape
    axes = [draw(st.sampled_from([1, length])) for length in (batch, q_heads, q_tokens, kv_tokens)]
    hidden = rng.random(axes) < draw(st.sampled_from([0.0, 0.3, 1.0]))
    lengths = rng.integers(0, kv_tokens + 1, batch)
    lengths[0] = min(lengths[0], max(kv_tokens - 1, 0))  # not all of them whole
    return {
        "causal": True,
        "window": (draw(WINDOW_SIDES), None),
        "softcap": draw(st.sampled_from([0.5, 30.0])),
        "bias": np.where(hidden, -np.inf, rng.standard_normal(axes)).astype(np.float32),
        "alibi_slopes": rng.uniform(-0.5, 0.5, q_heads).astype(np.float32),
        "sink_logits": rng.uniform(-5, 5, q_heads).astype(np.float32),
        "kv_lengths": lengths,
        "scale": draw(st.sampled_from([0.125, 1e-3, 0.5])),
    }


@pytest.mark.parametrize("options", [causal, window, every_option])
@settings(max_examples=20)
@given(data=st.data())
def test_any_problem_is_solved_as_the_reference_solves_it(options, data):
    shape = batch, q_tokens, kv_tokens, q_heads, kv_heads = data.draw(shapes())
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    # Queries that grow or shrink along the sequence, keys likewise: maxima that rise early, late, and not at all.
    steepness = data.draw(st.sampled_from([0.0, 2.0, -2.0]))
    q = random_tokens(rng, batch, q_tokens, q_heads, 64, dtype=np.float16)
    k, v = (random_tokens(rng, batch, kv_tokens, kv_heads, 64, dtype=np.float16) for _ in range(2))
    k = (k * np.exp(steepness * np.linspace(-1, 1, kv_tokens))[:, None, None]).astype(np.float16)
    chosen = options(data.draw, rng, shape)
    out, lse = solved(q, k, v, **chosen)
    want, want_lse = expected(q, k, v, **chosen)
    assert_close(out, want)
    np.testing.assert_allclose(lse, want_lse, rtol=2e-5, atol=2e-5)

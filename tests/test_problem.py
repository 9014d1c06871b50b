"""Arguments of `attention`: what is accepted, and how what is not is named."""

from __future__ import annotations

import numpy as np
import pytest

import numbaflash
from numbaflash.problem import describe

SHAPES = {"q": (2, 5, 4, 8), "k": (2, 7, 2, 8), "v": (2, 7, 2, 6)}


def arrays(**shapes):
    return {name: np.zeros(shape, np.float32) for name, shape in (SHAPES | shapes).items()}


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"q": (5, 4, 8)}, r"q must have 4 axes \(batch, tokens, heads, head_dim\), got shape \(5, 4, 8\)"),
        ({"k": (2, 7, 2, 8, 1)}, r"k must have 4 axes .* got shape \(2, 7, 2, 8, 1\)"),
        ({"v": (14,)}, r"v must have 4 axes .* got shape \(14,\)"),
        ({"k": (3, 7, 2, 8)}, "k must have q's batch size 2, got 3"),
        ({"v": (1, 7, 2, 6)}, "v must have q's batch size 2, got 1"),
        ({"v": (2, 6, 2, 6)}, r"v must have k's tokens and heads \(7, 2\), got \(6, 2\)"),
        ({"v": (2, 7, 1, 6)}, r"v must have k's tokens and heads \(7, 2\), got \(7, 1\)"),
        ({"k": (2, 7, 2, 9)}, "k must have q's head_dim 8, got 9"),
        ({"q": (2, 5, 3, 8)}, "q must have a multiple of k's 2 heads, got 3"),
        ({"q": (2, 5, 0, 8)}, "q must have a multiple of k's 2 heads, got 0"),
        ({"k": (2, 7, 0, 8), "v": (2, 7, 0, 6)}, "k must have at least one head, got 0"),
        ({"q": (2, 5, 4, 0), "k": (2, 7, 2, 0)}, "q must have a head_dim of 1 to 256, got 0"),
        ({"q": (2, 5, 4, 257), "k": (2, 7, 2, 257)}, "q must have a head_dim of 1 to 256, got 257"),
        ({"v": (2, 7, 2, 300)}, "v must have a head_dim of 1 to 256, got 300"),
    ],
    ids=str,
)
def test_a_wrong_shape_is_named(shapes, message):
    with pytest.raises(ValueError, match=message):
        numbaflash.attention(**arrays(**shapes))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"scale": np.nan}, ValueError, "scale must be finite in float32, got nan"),
        ({"scale": -1e300}, ValueError, "scale must be finite in float32, got -1e\\+300"),
        ({"scale": "1"}, TypeError, "scale must be a number, got str"),
        ({"causal": 1}, TypeError, "causal must be a bool, got int"),
        ({"window": 3}, TypeError, r"window must be a pair \(left, right\) of ints or None, got 3"),
        ({"window": (1, 2, 3)}, TypeError, r"window must be a pair .* got \(1, 2, 3\)"),
        ({"window": (-1, 0)}, ValueError, "window's left side must be 0 or more, or None for unbounded, got -1"),
        ({"window": (None, 1.5)}, TypeError, "window's right side must be an int or None, got 1.5"),
        ({"softcap": -1.0}, ValueError, r"softcap must be 0 \(none\) or positive, got -1.0"),
        ({"softcap": np.inf}, ValueError, "softcap must be finite in float32, got inf"),
        (
            {"bias": np.zeros((2, 4, 5, 8), np.float32)},
            ValueError,
            r"bias must broadcast .* \(2, 4, 5, 7\), got .* 8\)",
        ),
        (
            {"bias": np.zeros((5, 7), np.float16)},
            TypeError,
            "bias must be float32, q's dtype float32 or bool, got float16",
        ),
        ({"bias": [[0.0]]}, TypeError, "bias must be a NumPy array or have __dlpack__, got builtins.list"),
        ({"alibi_slopes": np.zeros(3)}, ValueError, r"alibi_slopes must have shape \(4,\) or \(2, 4\), got \(3,\)"),
        ({"alibi_slopes": np.zeros(4, int)}, TypeError, "alibi_slopes must be floating point, got int64"),
        ({"sink_logits": np.zeros((2, 4))}, ValueError, r"sink_logits must have shape \(4,\), got \(2, 4\)"),
        ({"alibi_slopes": [1e300, 1, 1, 1]}, ValueError, r"alibi_slopes must be finite in float32, got \[inf, 1.0"),
        ({"alibi_slopes": [[1], [2, 3]]}, ValueError, "alibi_slopes must be an array or a list of numbers, got"),
        ({"alibi_slopes": [None] * 4}, ValueError, r"alibi_slopes must be finite in float32, got \[nan"),
        ({"sink_logits": np.full(4, np.inf)}, ValueError, "sink_logits must be finite in float32, or -inf for none"),
        ({"sink_logits": np.full(4, np.nan)}, ValueError, "sink_logits must be finite in float32, or -inf for none"),
        ({"kv_lengths": [[7], [7, 7]]}, ValueError, "kv_lengths must be an array or a list of numbers, got"),
        ({"kv_lengths": [7]}, ValueError, r"kv_lengths must have shape \(2,\), got \(1,\)"),
        ({"kv_lengths": [7, 8]}, ValueError, r"kv_lengths must lie in 0 to 7 \(k's tokens\), got \[7, 8\]"),
        ({"kv_lengths": [7, -1]}, ValueError, r"kv_lengths must lie in 0 to 7 .* got \[7, -1\]"),
        ({"kv_lengths": [7.0, 1.0]}, TypeError, "kv_lengths must be integers, got float64"),
        ({"algorithm": "v3"}, ValueError, "algorithm must be 'standard', 'v1', 'v2', got 'v3'"),
        ({"backend": "gpu"}, ValueError, "backend must be .* got 'gpu'"),
    ],
    ids=str,
)
def test_a_wrong_option_is_named(options, error, message):
    with pytest.raises(error, match=message):
        numbaflash.attention(**arrays(), **options)


@pytest.mark.parametrize(
    ("dtypes", "message"),
    [
        ({"q": np.float64}, "q must be float32, float16 or bfloat16, got float64"),
        ({"q": np.dtype(">f4")}, "q must be float32, float16 or bfloat16, got >f4"),
        ({"k": np.float16}, "k must have q's dtype float32, got float16"),
        ({"v": np.int8}, "v must have q's dtype float32, got int8"),
    ],
    ids=str,
)
def test_a_wrong_dtype_is_named(dtypes, message):
    given = arrays()
    with pytest.raises(TypeError, match=message):
        numbaflash.attention(**given | {name: given[name].astype(dtype) for name, dtype in dtypes.items()})


@pytest.mark.parametrize(
    ("accepted", "alike"),
    [
        ({"causal": True}, {"causal": 1}),
        ({"window": (1, None)}, {"window": (True, None)}),
        ({"window": (1, None)}, {"window": (1.0, None)}),
        ({"scale": 1.0}, {"scale": True}),
        ({"softcap": 1.0}, {"softcap": True}),
    ],
)
def test_an_option_is_checked_though_one_that_equals_it_was_accepted_before(accepted, alike):
    numbaflash.attention(**arrays(), **accepted)
    with pytest.raises(TypeError):
        numbaflash.attention(**arrays(), **alike)


def test_problems_that_share_their_shapes_keep_their_options_apart():
    described = [describe(**arrays(), kv_lengths=lengths) for lengths in (None, [3, 4], None)]
    assert [problem.kv_lengths.tolist() for problem in described] == [[7, 7], [3, 4], [7, 7]]
    with pytest.raises(ValueError, match="read-only"):
        described[0].kv_lengths[0] = 1


@pytest.mark.parametrize("axis", ["batch", "q_tokens", "kv_tokens"])
def test_an_axis_of_length_zero_is_no_error(axis):
    batch, q_tokens, kv_tokens = (
        0 if axis == name else size for name, size in (("batch", 2), ("q_tokens", 5), ("kv_tokens", 7))
    )
    given = arrays(q=(batch, q_tokens, 4, 8), k=(batch, kv_tokens, 2, 8), v=(batch, kv_tokens, 2, 6))
    out, lse = numbaflash.attention(**given, kv_lengths=[kv_tokens] * batch, return_lse=True)
    assert out.shape == (batch, q_tokens, 4, 6)
    assert lse.shape == (batch, 4, q_tokens)
    assert not out.any()
    assert axis != "kv_tokens" or np.isneginf(lse).all()


@pytest.mark.parametrize("side", [2**31, 2**62, 2**63 - 1, 2**64], ids=str)
def test_a_window_wider_than_any_sequence_hides_nothing(side):
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal(shape).astype(np.float32) for shape in SHAPES.values())
    out = numbaflash.attention(q, k, v, window=(side, side))
    np.testing.assert_array_equal(out, numbaflash.attention(q, k, v))

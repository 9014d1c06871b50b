"""The quantizers by themselves: how near their codes come, and what they take."""

from __future__ import annotations

import numpy as np
import pytest
from quantized_oracle import unpack

from numbaflash import AWQQuantizer, GroupQuantizer, HQQQuantizer
from numbaflash.cache.quantizers import quantizer_of

PAGE = (4, 16, 2, 64)  # pages, tokens, heads, head_dim


def pages_of(seed, outliers=False):
    x = np.random.default_rng(seed).standard_normal(PAGE, np.float32)
    if outliers:
        x[..., 3] *= 20
    return x.astype(np.float16)


def round_trip(quantizer, k, v, dtype):
    f = quantizer.page_format(dtype, k.shape[2], k.shape[1], k.shape[3])
    parts = [unpack(page, f) for page in quantizer.pack(f, k, v)]
    return [np.stack(x) for x in zip(*parts, strict=True)]


def squared_error(got, want):
    return np.square(got - want.astype(np.float32)).sum()


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("keys", ["channel", "token"])
@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_group_errs_by_half_a_step_of_the_range_at_most(symmetric, keys, dtype):
    k, v = pages_of(0), pages_of(1)
    got = round_trip(GroupQuantizer(64, symmetric, keys), k, v, dtype)
    for seen, given, by_channel in zip(got, (k, v), (keys == "channel", False), strict=True):
        x = given.astype(np.float32)
        axis = 1 if by_channel else 3
        top = 2.0 ** (8 if dtype == "int8" else 4) - 1
        span = 2 * np.abs(x).max(axis, keepdims=True) if symmetric else np.ptp(x, axis=axis, keepdims=True)
        step = span / (top - 1 if symmetric else top)
        # Scales are rounded to float16, which the largest code feels most.
        assert (np.abs(seen - x) <= step * (0.5 + top * 2.0**-11) + 1e-6).all()


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("keys", ["channel", "token"])
@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_hqq_errs_no_more_than_group_in_any_of_it(symmetric, keys, dtype):
    k, v = pages_of(2, outliers=True), pages_of(3)
    options = {"symmetric": symmetric, "keys": keys}
    ours, groups = (round_trip(kind(**options), k, v, dtype) for kind in (HQQQuantizer, GroupQuantizer))
    assert squared_error(ours[1], v) < squared_error(groups[1], v)
    assert squared_error(ours[0], k) <= squared_error(groups[0], k)


@pytest.mark.parametrize("kind", [GroupQuantizer, HQQQuantizer])
@pytest.mark.parametrize("value", [0.0, 3.25, -6e4, 6e-8])
def test_constant_groups_come_back_as_they_were(kind, value):
    x = np.full(PAGE, value, np.float16)
    for seen in round_trip(kind(), x, x, "int4"):
        np.testing.assert_array_equal(seen, x)


def test_pages_do_not_depend_on_what_is_quantized_with_them():
    k, v = pages_of(4), pages_of(5)
    for quantizer in (GroupQuantizer(), HQQQuantizer(keys="token")):
        f = quantizer.page_format("int4", 2, 16, 64)
        together = quantizer.pack(f, k, v)
        alone = [quantizer.pack(f, k[i : i + 1], v[i : i + 1])[0] for i in range(len(k))]
        np.testing.assert_array_equal(together, alone)


def samples(seed, tokens=200):
    rng = np.random.default_rng(seed)
    q = rng.standard_normal((1, tokens, 4, 64), np.float32)
    k = rng.standard_normal((1, tokens, 2, 64), np.float32)
    k[..., 5] *= 30  # a channel that is always large, and that queries hardly look at
    q[..., 5] *= 0.02
    return q, k


def test_awq_protects_attention_where_a_channel_is_large():
    quantizer = AWQQuantizer.search(*samples(0), dtype="int4")
    q, k = samples(1)
    plain = HQQQuantizer(keys="token")

    def score_error(codes_of, keys, queries):
        f = codes_of.page_format("int4", 2, 8, 64)
        pages = keys[0].astype(np.float16).reshape(-1, 8, 2, 64)
        seen = np.concatenate([unpack(page, f)[0] for page in codes_of.pack(f, pages, pages)])
        grouped = queries[0].reshape(200, 2, 2, 64)
        return np.square(np.einsum("qhgd,khd->hgqk", grouped, seen - keys[0])).mean()

    folded = quantizer.fold_keys(0, k), quantizer.fold_queries(0, q)
    assert score_error(quantizer, *folded) < 0.2 * score_error(plain, k, q)


def rotated(x, start, rotary):
    """(T, H, D) at the positions `start` and on, pairs turning more slowly from one to the next."""
    turns = (start + np.arange(len(x)))[:, None, None] * 0.3 ** np.arange(x.shape[2] // 2)
    first, second = (x[..., 0::2], x[..., 1::2]) if rotary == "adjacent" else np.split(x, 2, axis=-1)
    turned = first * np.cos(turns) - second * np.sin(turns), first * np.sin(turns) + second * np.cos(turns)
    return (np.stack(turned, -1).reshape(x.shape) if rotary == "adjacent" else np.concatenate(turned, -1)).astype(
        np.float32
    )


@pytest.mark.parametrize("rotary", ["adjacent", "halves"])
def test_scales_of_rotated_channels_hold_at_positions_beyond_the_samples(rotary):
    rng = np.random.default_rng(7)
    q, k = (rng.standard_normal((2, 300, 1, 64), np.float32) for _ in range(2))
    slow = (
        40 if rotary == "adjacent" else 20
    )  # the first channel of a pair that takes more tokens than there are to turn
    k[..., slow] += 30
    q[..., slow] *= 0.02

    def divergence(quantizer, layer, start):
        queries, keys = (rotated(x[layer], start, rotary)[:, 0] for x in (q, k))
        scales = quantizer.channel_scales[0, 0]
        seen = quantizer.dequantized((keys * scales)[:, None], 4, 64)[:, 0] / scales
        moved = queries @ (seen - keys).T
        return np.var(moved, axis=1).mean()

    at_start = [rotated(x[0], 0, rotary)[None] for x in (q, k)]
    shared, alone = (AWQQuantizer.search(*at_start, rotary=way) for way in (rotary, None))
    pairs = shared.channel_scales.reshape(32, 2).T if rotary == "adjacent" else shared.channel_scales.reshape(2, 32)
    np.testing.assert_array_equal(*pairs)
    far = round(np.pi / 2 / 0.3**20)  # a quarter turn later
    assert divergence(shared, 1, far) < 0.5 * divergence(alone, 1, far)


def test_sink_tokens_have_no_part_in_the_search():
    q, k = samples(4)
    q[..., 7] = 0  # so that no score moves
    wild = k.copy()
    wild[:, :4, :, 7] = 1000
    found = [AWQQuantizer.search(q, keys, sink_tokens=4).channel_scales for keys in (k, wild)]
    np.testing.assert_array_equal(*found)


def test_folding_keeps_scores():
    q, k = samples(2)
    scales = np.exp2(np.random.default_rng(3).standard_normal((1, 2, 64))).astype(np.float32)
    quantizer = AWQQuantizer(channel_scales=scales)
    want = np.einsum("qhgd,khd->hgqk", q[0].reshape(200, 2, 2, 64), k[0])
    q, k = quantizer.fold_queries(0, q[0]), quantizer.fold_keys(0, k[0])
    got = np.einsum("qhgd,khd->hgqk", q.reshape(200, 2, 2, 64), k)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("text", ["group", "hqq:group_size=32", "group:group_size=128,symmetric,keys=token"])
def test_a_quantizer_is_what_its_text_says(text):
    assert quantizer_of(text).text == text


@pytest.mark.parametrize(
    ("q", "k", "message"),
    [
        ((1, 9, 4), (1, 9, 2, 64), r"q must have shape \(num_layers, tokens, heads, head_dim\), got \(1, 9, 4\)"),
        ((1, 9, 4, 64), (1, 0, 2, 64), "k must have shape"),
        ((1, 8, 4, 64), (1, 9, 2, 64), "q must have k's layers, tokens and head_dim"),
        ((1, 9, 3, 64), (1, 9, 2, 64), "q must have a multiple of k's 2 heads, got 3"),
        ((1, 9, 4, 48), (1, 9, 2, 48), "head_dim must be a multiple of the quantizer's group of 32, got 48"),
    ],
    ids=str,
)
def test_samples_of_the_wrong_shape_are_named(q, k, message):
    with pytest.raises(ValueError, match=message):
        AWQQuantizer.search(np.ones(q, np.float32), np.ones(k, np.float32))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rotary": "pairs"}, "rotary must be None, 'adjacent', 'halves', got 'pairs'"),
        ({"sink_tokens": 36, "page_size": 64}, r"k must have more tokens than sinks and a page, 36 \+ 64; got 100"),
    ],
)
def test_options_of_the_search_that_cannot_be_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        AWQQuantizer.search(*samples(0, 100), **options)


def test_samples_that_are_not_finite_are_named():
    q, k = samples(0, 20)
    k[0, 3, 1, 2] = np.nan
    with pytest.raises(ValueError, match="k must be finite, got NaN or infinities"):
        AWQQuantizer.search(q, k)


@pytest.mark.parametrize(
    "scales", [np.zeros((1, 2, 64)), np.full((1, 2, 64), np.nan), np.ones((2, 64)), np.ones((1, 2, 64), int)]
)
def test_channel_scales_that_cannot_be_are_refused(scales):
    with pytest.raises(ValueError, match="channel_scales must be"):
        AWQQuantizer(channel_scales=scales)


def test_a_quantizers_scales_are_its_own():
    given = np.ones((1, 2, 64), np.float32)
    quantizer, twin = AWQQuantizer(channel_scales=given), AWQQuantizer(channel_scales=given)
    assert (quantizer, hash(quantizer)) == (twin, hash(twin))
    given *= 2
    assert quantizer == twin
    assert quantizer != AWQQuantizer(channel_scales=given)
    with pytest.raises(ValueError, match="read-only"):
        quantizer.channel_scales[:] = 3


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"dtype": "float16"}, ValueError, "dtype must be int8 or int4, got 'float16'"),
        ({"q": np.ones((1, 90, 2, 64), int)}, TypeError, "q must be floating point, got int64"),
        ({"k": np.ones((1, 90, 2, 64), complex)}, TypeError, "k must be floating point, got complex128"),
    ],
    ids=["dtype", "q", "k"],
)
def test_a_search_names_what_it_cannot_take(wrong, error, message):
    samples = {name: np.ones((1, 90, 2, 64), np.float32) for name in "qk"}
    with pytest.raises(error, match=message):
        AWQQuantizer.search(**{**samples, **wrong})


def test_a_group_size_is_an_int():
    with pytest.raises(ValueError, match=r"group_size must be 32, 64, 128 or None, got 32\.0"):
        GroupQuantizer(32.0)


@pytest.mark.parametrize("dtype", ["int8", "int4"])
@pytest.mark.parametrize("keys", ["channel", "token"])
def test_the_largest_numbers_of_float16_are_fitted_without_a_warning(dtype, keys):
    largest = np.full(PAGE, 65504, np.float16)
    largest[:, ::2] *= -1
    for seen in round_trip(HQQQuantizer(symmetric=True, keys=keys), largest, largest, dtype):
        assert np.isfinite(seen).all()

"""A long step attends to its own tokens by FlashAttention-2: the law holds, and nothing is seen twice or left out."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import assert_close, expected_of_cache, random_tokens

import numbaflash
from numbaflash.cuda import device as device_module
from numbaflash.cuda import own_keys
from numbaflash.cuda.build import build
from numbaflash.cuda.finish_step import FinishStep
from numbaflash.cuda.flash_v2 import FlashV2
from numbaflash.cuda.own_keys import LEAST_ALONE, LEAST_MERGED, first_own_key
from numbaflash.cuda.scoring import Scoring
from numbaflash.cuda.variant import Variant


@pytest.fixture(scope="module", autouse=True)
def every_step_of_some_tokens_is_a_long_one():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(own_keys, "LEAST_ALONE", 6)
        patch.setattr(own_keys, "LEAST_MERGED", 6)
        yield


@pytest.fixture
def launches(monkeypatch):
    """The names of launched kernels."""
    names = []
    launch = device_module._EmulatedKernel.launch

    def watch(kernel, *args, **kwargs):
        names.append(kernel.name)
        launch(kernel, *args, **kwargs)

    monkeypatch.setattr(device_module._EmulatedKernel, "launch", watch)
    return names


def tokens_of(total, q_heads=4, kv_heads=2, head_dim=8, dtype="float32", seed=0):
    rng = np.random.default_rng(seed)
    return tuple(
        random_tokens(rng, total, heads, head_dim, dtype=np.dtype(dtype)) for heads in (q_heads, kv_heads, kv_heads)
    )


def stepped(q, k, v, chunks, *, dtype="float32", options=None, **ring):
    cache = numbaflash.RingKVCache(
        1, k.shape[1], k.shape[2], **{"page_size": 8, **ring}, dtype=dtype, backend="emulated"
    )
    cuts = np.cumsum([0, *chunks])
    parts = [cache.step(0, q[a:b], k[a:b], v[a:b], **(options or {})) for a, b in itertools.pairwise(cuts)]
    return np.concatenate(parts)


def wanted(q, k, v, *, dtype="float32", options=None, capacity, sink_tokens=0, **_):
    stored = (x.astype(dtype).astype(np.float32) for x in (k, v))
    return expected_of_cache(q.astype(np.float32), *stored, capacity=capacity, sink_tokens=sink_tokens, **options or {})


@st.composite
def rings(draw):
    capacity = draw(st.integers(1, 90))
    sink_tokens = draw(st.integers(0, min(capacity - 1, 20)))
    return {"capacity": capacity, "sink_tokens": sink_tokens, "rollback": draw(st.integers(0, 30))}


long_and_short_steps = st.lists(st.one_of(st.integers(1, 5), st.integers(6, 150)), min_size=1, max_size=5)


@settings(max_examples=16)
@given(rings(), long_and_short_steps, st.sampled_from(["float32", "float16"]), st.integers(0, 1000))
def test_results_do_not_depend_on_how_tokens_are_cut_into_long_steps(ring, chunks, dtype, seed):
    q, k, v = tokens_of(sum(chunks), dtype=dtype, seed=seed)
    assert_close(stepped(q, k, v, chunks, dtype=dtype, **ring), wanted(q, k, v, dtype=dtype, **ring))


SHAPES = {
    "nothing in pages": ([40], {"capacity": 60}, ["flash_v2", "finish_step"]),
    "all in the window": ([5, 40], {"capacity": 60}, ["flash_v2", "vector_decode", "finish_step"]),
    "a window shorter than the step": ([40], {"capacity": 9}, ["flash_v2", "finish_step"]),
    "sinks in pages": ([5, 40], {"capacity": 12, "sink_tokens": 3}, ["flash_v2", "vector_decode", "finish_step"]),
    "sinks in pages and in the step": (
        [2, 40],
        {"capacity": 14, "sink_tokens": 5},
        ["flash_v2", "vector_decode", "finish_step"],
    ),
    "sinks of the step in the window": ([40], {"capacity": 60, "sink_tokens": 5}, ["flash_v2", "finish_step"]),
    "no token but sinks": ([12], {"capacity": 18, "sink_tokens": 15}, ["vector_decode", "finish_step"]),
}


@pytest.mark.parametrize(("chunks", "ring", "kernels"), SHAPES.values(), ids=SHAPES)
def test_every_place_of_sinks_and_window_is_right_by_the_kernels_that_suit_it(launches, chunks, ring, kernels):
    options = {"sink_logits": np.float32([0, 1, -1, 4]), "alibi_slopes": np.float32([0.1, 0.5, 1, 2])}
    q, k, v = tokens_of(sum(chunks))
    got = stepped(q, k, v, chunks, **ring, options=options)
    assert_close(got, wanted(q, k, v, **ring, options=options))
    assert launches[-len(kernels) :] == kernels


@pytest.mark.parametrize("storage", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_long_step_attends_to_its_tokens_as_they_are_stored(launches, dtype, storage):
    q, k, v = tokens_of(60, head_dim=12, dtype=dtype)
    ring = {"capacity": 40, "sink_tokens": 3}
    got = stepped(q, k, v, [20, 40], dtype=storage, **ring)
    assert_close(got, wanted(q, k, v, dtype=storage, **ring))
    narrower = storage not in ("float32", dtype)
    # float16 stored in bfloat16 stays with the decode kernels: its largest number has no neighbour there.
    refused = (dtype, storage) == ("float16", "bfloat16")
    assert ("flash_v2" in launches, "round_rows" in launches) == (not refused, narrower and not refused)


def test_the_largest_float16_is_attended_to_as_bfloat16_has_it():
    q, k, v = tokens_of(40, dtype="float16")
    v[7] = np.float16(65504)
    out = stepped(q * 0, k, v, [40], dtype="bfloat16", capacity=60)
    assert np.isfinite(out).all()
    assert_close(out, wanted(q * 0, k, v, dtype="bfloat16", capacity=60))


@pytest.mark.parametrize("options", [{"softcap": 1.5}, {"scale": -0.3}, {"scale": 0.0}], ids=repr)
def test_every_score_is_merged_as_it_is(options):
    q, k, v = tokens_of(70)
    got = stepped(q, k, v, [20, 50], capacity=50, sink_tokens=2, options=options)
    assert_close(got, wanted(q, k, v, capacity=50, sink_tokens=2, options=options))


def test_a_batch_of_long_steps_has_the_bits_of_each_alone():
    shapes = [(0, 60, 3), (25, 60, 3), (0, 20, 0), (40, 20, 0), (2, 20, 5), (90, 300, 0)]
    caches, alone, news = [], [], []
    for number, (length, capacity, sinks) in enumerate(shapes):
        cache = numbaflash.RingKVCache(
            1, 2, 8, capacity=capacity, sink_tokens=sinks, page_size=8, dtype="float32", backend="emulated"
        )
        cache.append(0, *tokens_of(length, seed=number)[1:])
        caches.append(cache)
        alone.append(cache.fork())
        news.append(tokens_of(30, seed=100 + number))
    slopes = np.random.default_rng(0).uniform(0.1, 1, (len(shapes), 4)).astype(np.float32)

    out = numbaflash.attention_batch(
        caches, 0, *(np.stack(arrays) for arrays in zip(*news, strict=True)), alibi_slopes=slopes
    )

    for cache, new, of_one, got in zip(alone, news, slopes, out, strict=True):
        np.testing.assert_array_equal(got, cache.step(0, *new, alibi_slopes=of_one))


def test_a_long_step_that_fails_leaves_the_cache_as_it_was(monkeypatch):
    q, k, v = tokens_of(60)
    cache = numbaflash.RingKVCache(1, 2, 8, capacity=30, page_size=8, dtype="float32", backend="emulated")
    cache.append(0, k[:20], v[:20])
    held = cache.nbytes

    def refuse(*_args):
        raise RuntimeError("no such kernel")

    with monkeypatch.context() as patch:
        patch.setattr(FlashV2, "arguments", refuse)
        with pytest.raises(RuntimeError, match="no such kernel"):
            cache.step(0, q[20:], k[20:], v[20:])
    assert (cache.length(0), cache.nbytes) == (20, held)
    assert_close(cache.step(0, q[20:], k[20:], v[20:]), wanted(q, k, v, capacity=30)[20:])


@pytest.mark.parametrize("cc", [(8, 0), (9, 0)])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_nothing_spills_for_want_of_registers(cc, dtype, head_dim):
    scoring = Scoring(left=True, right=True)
    kernel = FlashV2.of(Variant(head_dim, head_dim, dtype, scoring, lse=True), cc, wide=True)
    assert build(kernel, cc).usage.spill_bytes == 0
    assert build(FinishStep(head_dim, dtype, dtype, dtype, has_sinks=True, has_owns=True), cc).usage.spill_bytes == 0


def test_a_short_step_stays_with_the_decode_kernels(monkeypatch):
    monkeypatch.setattr(own_keys, "LEAST_ALONE", LEAST_ALONE)
    monkeypatch.setattr(own_keys, "LEAST_MERGED", LEAST_MERGED)
    for least, length, dtype in (
        (LEAST_ALONE, 0, "float16"),
        (LEAST_MERGED, 10, "float16"),
        (LEAST_ALONE, 10, "float32"),
    ):
        for tokens, expected in ((least - 1, None), (least, 0)):
            assert first_own_key(length, tokens, 1 << 20, 0, dtype, dtype) == expected

"""Decode over pages on a device: right for every shape, and no more bytes, registers or launches than it needs."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from oracle import assert_close, expected_of_cache, random_tokens

import numbaflash
from numbaflash.cuda.build import build
from numbaflash.cuda.decode_variant import DecodeVariant
from numbaflash.cuda.device import EmulatedDevice
from numbaflash.cuda.finish_step import FinishStep
from numbaflash.cuda.splits import KEY_TILE, split_keys
from numbaflash.cuda.tensor_decode import TensorDecode
from numbaflash.cuda.vector_decode import MAX_ROWS, VectorDecode

A100 = (8, 0)


def tokens_of(tokens, q_heads, kv_heads, head_dim, dtype=np.float16):
    rng = np.random.default_rng(head_dim)
    return tuple(random_tokens(rng, tokens, heads, head_dim, dtype=dtype) for heads in (q_heads, kv_heads, kv_heads))


def decoded(q, k, v, *, last=1, **shape):
    """Return what the last tokens' step gives over a cache of those before."""
    cache = numbaflash.RingKVCache(1, k.shape[1], k.shape[2], **{"page_size": 16, **shape}, backend="emulated")
    cache.append(0, k[:-last], v[:-last])
    return cache.step(0, q[-last:], k[-last:], v[-last:])


@pytest.mark.parametrize(
    ("q_heads", "kv_heads", "head_dim", "dtype", "last"),
    [
        (1, 1, 1, "float32", 1),
        (3, 3, 5, "float16", 2),
        (7, 1, 40, "bfloat16", 1),
        (4, 1, 96, "float16", 3),
        (16, 1, 64, "float16", 1),
        (8, 2, 200, "bfloat16", 8),
        (6, 3, 256, "float32", 1),
    ],
)
def test_every_shape_of_heads_agrees_with_the_formula(q_heads, kv_heads, head_dim, dtype, last):
    q, k, v = tokens_of(90, q_heads, kv_heads, head_dim, np.dtype(getattr(ml_dtypes, dtype, dtype)))
    got = decoded(q, k, v, last=last, capacity=50, sink_tokens=3, dtype=dtype)
    want = expected_of_cache(*(x.astype(np.float32) for x in (q, k, v)), capacity=50, sink_tokens=3)
    assert_close(got, want[-last:])


@pytest.mark.parametrize("page_size", [8, 32, 256])
def test_every_size_of_a_page_agrees_with_the_formula(page_size):
    q, k, v = tokens_of(600, 2, 1, 64)
    got = decoded(q, k, v, capacity=300, sink_tokens=10, page_size=page_size)
    assert_close(got, expected_of_cache(*(x.astype(np.float32) for x in (q, k, v)), capacity=300, sink_tokens=10)[-1:])


def test_not_a_number_stays_with_the_queries_that_see_it():
    q, k, v = tokens_of(40, 2, 1, 64, np.float32)
    v[36] = np.nan
    out = decoded(q, k, v, last=8, capacity=100, dtype="float32")  # positions 32 to 39
    assert np.isfinite(out[:4]).all()
    assert np.isnan(out[4:]).all()


def wide_reads(report):
    """Accesses of 16 bytes a lane, by all but a few lanes of a warp; copies to shared memory are such."""
    return [
        access for access in report.global_ if access.op in ("load", "copy") and access.nbytes > 256 * access.requests
    ]


def wide_stores(report):
    return [access for access in report.global_ if access.op == "store" and access.nbytes >= 256 * access.requests]


@pytest.mark.parametrize(("q_heads", "kv_heads"), [(2, 2), (8, 1)], ids=["MHA", "GQA 8:1"])
def test_keys_and_values_are_read_once_in_whole_sectors_and_partial_results_are_little_beside_them(
    launches, q_heads, kv_heads
):
    tokens, head_dim = 4096, 128
    q, k, v = tokens_of(tokens, q_heads, kv_heads, head_dim)
    decoded(q, k, v, capacity=tokens, page_size=64)
    attend, finish = launches[-2:]
    held = tokens * kv_heads * 2 * head_dim * 2

    # Beside keys and values, wide loads are of q, by each block, or by each of its warps.
    assert sum(access.sectors for access in wide_reads(attend)) * 32 == pytest.approx(held, rel=0.02)
    assert all(access.efficiency == 1 for access in wide_reads(attend))

    assert wide_stores(attend), "nothing is split: the test is of no use"
    partials = wide_stores(attend) + wide_reads(finish)
    assert sum(access.sectors for access in partials) * 32 < 0.02 * held


def test_appends_write_whole_sectors(launches):
    _, k, v = tokens_of(64, 2, 2, 64)
    numbaflash.RingKVCache(1, 2, 64, capacity=100, backend="emulated").append(0, k, v)
    (report,) = launches
    stores = wide_stores(report)
    assert sum(access.nbytes for access in stores) == k.nbytes + v.nbytes
    assert all(access.efficiency == 1 for access in stores)


@pytest.mark.parametrize("sessions", [1, 5])
def test_a_step_is_two_launches_however_many_sessions(launches, sessions):
    q, k, v = tokens_of(sessions, 4, 2, 64)
    caches = [numbaflash.RingKVCache(1, 2, 64, capacity=100, backend="emulated") for _ in range(sessions)]
    for length, cache in enumerate(caches):
        cache.append(0, k[:length], v[:length])
    launches.clear()
    numbaflash.attention_batch(caches, 0, q[:, None], k[:, None], v[:, None])
    assert [report.kernel for report in launches] == ["tensor_decode", "finish_step"]


@pytest.mark.parametrize("rows", [1, MAX_ROWS])
@pytest.mark.parametrize(("head_dim", "dtype"), [(128, "float16"), (256, "float16"), (256, "float32")])
def test_nothing_spills_on_cuda_cores(head_dim, dtype, rows):
    variant = DecodeVariant(head_dim, dtype, dtype, masked=rows > 1, softcap=True, alibi=True, sinks=True)
    assert build(VectorDecode.of(variant, rows), A100).usage.spill_bytes == 0
    assert build(FinishStep(head_dim, dtype, dtype, dtype, has_sinks=True), A100).usage.spill_bytes == 0


@pytest.mark.parametrize(("head_dim", "rows"), [(64, 16), (128, 16), (128, 64), (256, 32), (256, 64)])
def test_nothing_spills_on_tensor_cores(head_dim, rows):
    variant = DecodeVariant(head_dim, "float16", "float16", masked=True, softcap=True, alibi=True, sinks=True)
    assert build(TensorDecode.of(variant, rows), A100).usage.spill_bytes == 0


@pytest.mark.parametrize("head_dim", [64, 128])
def test_tiles_and_fragments_meet_no_bank_twice(launches, head_dim):
    decoded(*tokens_of(300, 8, 1, head_dim), capacity=300)
    attend = next(report for report in reversed(launches) if report.kernel == "tensor_decode")
    loop = [access for access in attend.shared if access.op in ("ldmatrix", "copy")]
    assert {access.op for access in loop} == {"ldmatrix", "copy"}
    assert sum(access.conflicts for access in loop) == 0


@pytest.mark.parametrize(
    "options", [{"softcap": 5.0}, {"alibi_slopes": [0.1] * 8}, {"sink_logits": [1.0] * 8}, {"scale": -0.2}]
)
@pytest.mark.parametrize("last", [1, 5, 40])
def test_tensor_cores_take_every_option_at_every_number_of_rows(options, last):
    q, k, v = tokens_of(130, 8, 2, 64)
    options = {name: np.float32(value) if isinstance(value, list) else value for name, value in options.items()}
    cache = numbaflash.RingKVCache(1, 2, 64, capacity=60, sink_tokens=4, page_size=16, backend="emulated")
    cache.append(0, k[:-last], v[:-last])
    got = cache.step(0, q[-last:], k[-last:], v[-last:], **options)
    want = expected_of_cache(*(x.astype(np.float32) for x in (q, k, v)), capacity=60, sink_tokens=4, **options)
    assert_close(got, want[-last:])


def test_a_long_sequence_fills_the_device_and_a_short_one_is_not_split():
    device = EmulatedDevice(multiprocessors=108)
    shares = {keys: -(-keys // split_keys(keys, 1, 128, 2, 8, device)) for keys in (1, 64, 200, 4096, 65536)}
    assert shares[1] == shares[64] == 1
    assert shares[200] <= 2
    assert 0.85 <= 8 * shares[65536] / 216 <= 1  # one wave of 2 blocks a multiprocessor
    assert all(split_keys(keys, 1, 128, 2, 8, device) % KEY_TILE == 0 for keys in shares)


def test_heads_that_fill_the_device_are_not_split():
    assert split_keys(4096, 1, 128, 2, 216, EmulatedDevice(multiprocessors=108)) == 4096

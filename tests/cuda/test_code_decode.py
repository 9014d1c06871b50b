"""Decode over pages of codes on a device: right for every format, with no byte, register or conflict too many."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from oracle import ROUNDING, random_tokens
from quantized_oracle import expected_of_quantized

import numbaflash
from numbaflash.cache.quantizers import quantizer_of
from numbaflash.cuda.build import build
from numbaflash.cuda.code_decode import CodeDecode
from numbaflash.cuda.codes import CodeFormat
from numbaflash.cuda.decode_variant import DecodeVariant
from numbaflash.cuda.tensor_decode import TensorDecode

A100 = (8, 0)


def decoded(tokens, q_heads, kv_heads, head_dim, *, last=1, step_dtype=np.float32, options=None, **shape):
    """Return a cache, the last tokens' step over those before, and what it must be."""
    rng = np.random.default_rng(head_dim)
    q, k, v = (random_tokens(rng, tokens, heads, head_dim, dtype=step_dtype) for heads in (q_heads, kv_heads, kv_heads))
    cache = numbaflash.RingKVCache(1, kv_heads, head_dim, **shape, backend="emulated")
    cache.append(0, k[:-last], v[:-last])
    out = cache.step(0, q[-last:], k[-last:], v[-last:], **options or {})
    want = expected_of_quantized(cache, *(x.astype(np.float32) for x in (q, k, v)), **options or {})
    return cache, out, want[-last:]


def assert_close(got, want):
    tolerance = ROUNDING[got.dtype.name]
    np.testing.assert_allclose(got.astype(np.float64), want, rtol=2 * tolerance, atol=max(2e-5, tolerance))


@pytest.mark.parametrize(
    ("dtype", "quantizer", "head_dim", "page_size"),
    [
        ("int8", "group:symmetric", 32, 64),
        ("int4", "group", 96, 16),
        ("int8", "hqq:group_size=128,keys=token", 128, 32),
        ("int4", "group:symmetric", 256, 256),
    ],
)
def test_every_format_of_page_is_read_as_it_was_written(dtype, quantizer, head_dim, page_size):
    ring = {"capacity": 500, "sink_tokens": 3, "page_size": page_size}
    _, out, want = decoded(600, 2, 2, head_dim, dtype=dtype, quantizer=quantizer, **ring)
    assert_close(out, want)


@pytest.mark.parametrize(
    ("dtype", "quantizer", "head_dim"),
    [("int8", "group", 96), ("int4", "group:keys=token", 32), ("int4", "group", 256)],
)
def test_every_format_of_page_is_read_as_it_was_written_for_groups_of_heads(dtype, quantizer, head_dim):
    ring = {"capacity": 200, "sink_tokens": 3, "page_size": 64, "dtype": dtype, "quantizer": quantizer}
    _, out, want = decoded(300, 6, 2, head_dim, step_dtype=np.float16, **ring)
    assert_close(out, want)


@pytest.mark.parametrize(("step_dtype", "page_size", "tokens"), [("bfloat16", 64, 135), ("float16", 16, 119)])
def test_every_option_at_once_for_queries_of_a_group_that_stand_in_two_pages(step_dtype, page_size, tokens):
    options = {
        "scale": -0.2,
        "softcap": 5.0,
        "alibi_slopes": np.float32([0.1, 0.2, 0.3, 0.4, 0.5, 0.6]),
        "sink_logits": np.float32([0, 1, 2, -1, -2, 3]),
    }
    ring = {"capacity": 90, "sink_tokens": 4, "page_size": page_size, "dtype": "int4"}
    dtype = np.dtype(getattr(ml_dtypes, step_dtype, step_dtype))
    # Of the last six tokens, three are behind 4 + 2 * 64, or 4 + 7 * 16.
    _, out, want = decoded(tokens, 6, 2, 64, last=6, step_dtype=dtype, options=options, **ring)
    assert_close(out, want)


def bytes_of(accesses):
    return 32 * sum(access.sectors for access in accesses)


@pytest.mark.parametrize(("q_heads", "kv_heads"), [(2, 2), (8, 1)], ids=["MHA", "GQA 8:1"])
@pytest.mark.parametrize(("dtype", "quantizer"), [("int8", "group:keys=token"), ("int4", "group")])
def test_codes_and_scales_are_read_once_in_whole_sectors_and_nothing_is_expanded_in_memory(
    launches, q_heads, kv_heads, dtype, quantizer
):
    head_dim, page_size, pages = 128, 64, 8
    ring = {"capacity": 1000, "page_size": page_size, "dtype": dtype, "quantizer": quantizer}
    tokens = pages * page_size + 1
    cache, _, _ = decoded(tokens, q_heads, kv_heads, head_dim, step_dtype=np.float16, **ring)
    attend, finish = launches[-2:]
    # Look-ups are a word or two for all lanes of a warp; the token in float16 is copied where there are tensor cores.
    reads = [access for access in attend.global_ if access.op == "load" and access.sectors > access.requests]
    held = pages * cache.pools[1].page_nbytes
    # Beside codes and scales, q, and the token in float16. For a lone row, scales of int8, 6 % of all by token, come in
    # halves of sectors, which are visited twice.
    halved = dtype == "int8" and q_heads == kv_heads
    assert held <= bytes_of(reads) < (1.07 if halved else 1.011) * held
    assert all(access.efficiency == 1 for access in reads if not halved or access.wanted > 32 * access.requests)
    # Written are the output, partial results where there are any, and the new token.
    written = [access for report in (attend, finish) for access in report.global_ if access.op == "store"]
    assert bytes_of(written) < 0.07 * held


@pytest.mark.parametrize(("head_dim", "dtype"), [(64, "int4"), (128, "int4"), (128, "int8")])
def test_tiles_made_of_codes_meet_no_bank_twice(launches, head_dim, dtype):
    decoded(300, 8, 1, head_dim, step_dtype=np.float16, dtype=dtype, capacity=300, page_size=64)
    attend = next(report for report in reversed(launches) if report.kernel == "tensor_decode")
    # Behind the loop's last fragment come the results.
    last = max(access.line for access in attend.shared if access.op == "ldmatrix")
    loop = [access for access in attend.shared if access.line <= last]
    assert {access.op for access in loop} == {"ldmatrix", "copy", "load", "store"}
    assert sum(access.conflicts for access in loop) == 0


def test_lanes_meet_no_bank_twice_where_they_read_queries(launches):
    decoded(600, 2, 2, 128, dtype="int4", capacity=600, page_size=64)
    attend = next(report for report in reversed(launches) if report.kernel == "code_decode")
    # In the loop over pages queries are all that is read; it runs far more often than what comes before and after it.
    most = max(access.wavefronts for access in attend.shared if access.op == "load")
    loop = [access for access in attend.shared if access.op == "load" and access.wavefronts == most]
    assert len(loop) == 16
    assert sum(access.conflicts for access in loop) == 0


EVERY_OPTION = {"masked": True, "softcap": True, "alibi": True, "sinks": True}


def variant_of(dtype, quantizer, head_dim, step_dtype="float16", **options):
    pages = quantizer_of(quantizer).page_format(dtype, 8, 64, head_dim)
    return DecodeVariant(head_dim, "float16", step_dtype, codes=CodeFormat.of(pages), **options)


@pytest.mark.parametrize(
    ("dtype", "quantizer", "head_dim", "rows"),
    [
        ("int8", "group:keys=token", 256, 4),
        ("int4", "group:keys=token", 128, 1),
        ("int8", "group", 128, 2),
        pytest.param("int4", "group", 96, 1, marks=pytest.mark.slow),
        pytest.param("int8", "group", 128, 1, marks=pytest.mark.slow),
        pytest.param("int4", "group", 128, 1, marks=pytest.mark.slow),
        pytest.param("int4", "group", 256, 2, marks=pytest.mark.slow),
    ],
)
def test_nothing_spills_on_cuda_cores(dtype, quantizer, head_dim, rows):
    usage = build(CodeDecode.of(variant_of(dtype, quantizer, head_dim, **EVERY_OPTION), rows), A100).usage
    assert (usage.spill_bytes, usage.stack_bytes) == (0, 0)


@pytest.mark.parametrize(
    ("dtype", "quantizer", "head_dim", "rows"),
    [
        ("int4", "group:keys=token", 128, 64),
        ("int8", "group", 256, 16),
        pytest.param("int4", "group", 64, 64, marks=pytest.mark.slow),
        pytest.param("int8", "group", 128, 64, marks=pytest.mark.slow),
        pytest.param("int4", "group", 192, 16, marks=pytest.mark.slow),
        pytest.param("int8", "group:keys=token", 224, 16, marks=pytest.mark.slow),
    ],
)
def test_nothing_spills_on_tensor_cores(dtype, quantizer, head_dim, rows):
    usage = build(TensorDecode.of(variant_of(dtype, quantizer, head_dim, **EVERY_OPTION), rows), A100).usage
    assert (usage.spill_bytes, usage.stack_bytes) == (0, 0)


# Where there is less to do ptxas holds more at a time: these needed more registers than all options together.
@pytest.mark.parametrize(
    ("dtype", "quantizer", "head_dim", "rows", "step_dtype"),
    [
        ("int8", "group", 128, 64, "float16"),
        ("int8", "group:keys=token", 256, 16, "bfloat16"),
        pytest.param("int4", "group", 128, 64, "bfloat16", marks=pytest.mark.slow),
        pytest.param("int8", "group:keys=token", 128, 64, "float16", marks=pytest.mark.slow),
        pytest.param("int4", "group:keys=token", 192, 16, "float16", marks=pytest.mark.slow),
        pytest.param("int4", "group:keys=token", 224, 16, "bfloat16", marks=pytest.mark.slow),
        pytest.param("int4", "group", 256, 16, "float16", marks=pytest.mark.slow),
    ],
)
def test_nothing_spills_without_options(dtype, quantizer, head_dim, rows, step_dtype):
    usage = build(TensorDecode.of(variant_of(dtype, quantizer, head_dim, step_dtype), rows), A100).usage
    assert (usage.spill_bytes, usage.stack_bytes) == (0, 0)

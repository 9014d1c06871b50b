"""The kernels on the emulated device, from NumPy arrays to NumPy arrays, and what they are measured against."""

from __future__ import annotations

from functools import cache

import numpy as np
from oracle import expected

from numbaflash.cuda.arguments import Arrays, Strided
from numbaflash.cuda.build import build, disassemble
from numbaflash.cuda.device import EmulatedDevice
from numbaflash.cuda.flash_v1 import FlashV1
from numbaflash.cuda.flash_v2 import FlashV2
from numbaflash.cuda.sass import parse
from numbaflash.cuda.shapes import tile_shape
from numbaflash.cuda.variant import Variant
from numbaflash.problem import describe
from numbaflash.reference import visible

AMPERE = (8, 0)


def flash_of(variant, cc=AMPERE):
    shape = tile_shape(
        variant.head_dim, variant.value_dim, cc, scored=variant.scoring.in_log2_units, biased=bool(variant.scoring.bias)
    )
    return FlashV2(variant, shape)


@cache
def machine_code(variant, cc=AMPERE):
    return parse(disassemble(build(flash_of(variant, cc), cc).cubin))


@cache
def device():
    return EmulatedDevice(AMPERE)


@cache
def loaded(description):
    return device().load(build(description, AMPERE).ptx, max_shared=description.shared_bytes)


def launch(description, grid, arguments):
    """Run a kernel and return its counts."""
    loaded(description).launch(grid, description.threads, *arguments, shared=description.shared_bytes)
    return device().last_report


def run_v2(problem, arrays):
    flash = flash_of(Variant.of(problem, lse=True))
    return [launch(flash, flash.grid(problem), flash.arguments(problem, arrays))]


def run_v1(problem, arrays):
    flash = FlashV1.of(Variant.of(problem, lse=True))
    state = device().allocate(flash.state_bytes(problem))
    return [launch(flash, flash.grid(problem), flash.arguments(problem, arrays, state.address))]


ALGORITHMS = {"v1": run_v1, "v2": run_v2}


def attention(q, k, v, *, algorithm="v2", **options):
    """Return the output, the log-sum-exp and the counts of each launch."""
    problem = describe(q, k, v, **options)
    scoring = problem.scoring
    out = np.zeros((*q.shape[:3], v.shape[3]), q.dtype)
    lse = np.zeros((problem.batch, problem.q_heads, problem.q_tokens), np.float32)
    host = {"q": q, "k": k, "v": v, "out": out, "lse": lse, "lengths": problem.kv_lengths.astype(np.int32)}
    host |= {"slopes": scoring.alibi_slopes} if scoring.alibi_slopes is not None else {}
    host |= {"sinks": scoring.sink_logits} if scoring.sink_logits is not None else {}
    host |= {"bias": np.ascontiguousarray(options["bias"])} if scoring.bias is not None else {}
    buffers = {name: device().allocate(array.nbytes) for name, array in host.items()}
    for name, array in host.items():
        device().copy_in(buffers[name].address, np.ascontiguousarray(array))
    strides = {name: np.ascontiguousarray(host[name]).strides for name in ("q", "k", "v", "out")}
    if scoring.bias is not None:
        strides["bias"] = np.broadcast_to(host["bias"], scoring.bias.shape).strides
    arrays = Arrays(
        **{name: Strided(buffers[name].address, steps) for name, steps in strides.items()},
        **{name: buffers[name].address for name in ("lse", "lengths", "slopes", "sinks") if name in buffers},
    )
    counts = ALGORITHMS[algorithm](problem, arrays)
    device().copy_out(out, buffers["out"].address)
    device().copy_out(lse, buffers["lse"].address)
    return out, lse, counts


def straightforward(q, k, v, **options):
    """Return attention as frameworks write it out: each product, sum and softmax rounded to the arrays' dtype."""
    problem = describe(q, k, v, **options)
    scoring, dtype = problem.scoring, q.dtype
    group = problem.q_heads // problem.kv_heads
    out = np.zeros((*q.shape[:3], v.shape[3]), dtype)

    def rounded(x):
        return x.astype(dtype).astype(np.float32)

    with np.errstate(over="ignore"):
        for b in range(problem.batch):
            length = int(problem.kv_lengths[b])
            may_see = visible(problem, b)
            away = np.abs(np.arange(problem.q_tokens)[:, None] + length - problem.q_tokens - np.arange(length))
            for h in range(problem.q_heads):
                keys, values = (x[b, :length, h // group].astype(np.float32) for x in (k, v))
                s = rounded(rounded(q[b, :, h].astype(np.float32) @ keys.T) * np.float32(scoring.scale))
                if scoring.softcap:
                    s = rounded(scoring.softcap * np.tanh(s / np.float32(scoring.softcap)))
                if scoring.alibi_slopes is not None:
                    s = rounded(s - scoring.alibi_slopes[b, h] * away)
                if scoring.bias is not None:
                    bias = scoring.bias[b, h, :, :length]
                    s = np.where(bias, s, -np.inf) if bias.dtype == bool else rounded(s + bias.astype(np.float32))
                s = np.where(may_see, s, -np.inf)
                sink = -np.inf if scoring.sink_logits is None else scoring.sink_logits[h]
                top = np.maximum(s.max(axis=1, initial=-np.inf, keepdims=True), sink)
                top = np.where(np.isneginf(top), 0, top)
                weights = np.exp(s - top)
                total = weights.sum(axis=1, keepdims=True) + np.exp(sink - top)
                weights = rounded(weights / np.where(total == 0, 1, total))
                out[b, :, h] = (weights @ values).astype(dtype)
    return out


def assert_as_good_as_straightforward(q, k, v, *, algorithm="v2", **options):
    """The kernel's largest error is at most twice that of `straightforward`, both against float64."""
    out, lse, _ = attention(q, k, v, algorithm=algorithm, **options)
    want, want_lse = expected(q, k, v, **options)
    plain = straightforward(q, k, v, **options).astype(np.float64)
    error, allowed = (np.abs(x - want).max(initial=0) for x in (out.astype(np.float64), plain))
    assert error <= 2 * allowed, f"error {error}, straightforward {allowed}"
    np.testing.assert_allclose(lse, want_lse, rtol=2e-5, atol=2e-5)

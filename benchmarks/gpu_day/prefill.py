"""Prefill: numbaflash beside each of PyTorch's backends on the same tensors, and its three algorithms side by side.

As many sequences as make 16k tokens, and as many heads as make 2048 elements a token (the shapes of the papers'
benchmarks). FLOPs are 4 * head_dim for each pair of a query and a key, half the pairs under a causal mask.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numbaflash

from .ceilings import matrix_tflops, place, torch_on
from .parts import Row
from .timing import Timing, clock

_BACKENDS = {"flash": "FLASH_ATTENTION", "cudnn": "CUDNN_ATTENTION", "efficient": "EFFICIENT_ATTENTION"}
"""PyTorch's, by our column."""
_SETS_OF_INPUTS = 2  # 192 MiB each: no L2 holds one, let alone both


@dataclass(frozen=True)
class Shape:
    """A problem: batch, tokens, heads, head_dim; dtype and mask."""

    batch: int
    tokens: int
    heads: int
    head_dim: int
    dtype: str
    causal: bool

    @property
    def flops(self) -> float:
        """Operations, as the papers count them."""
        return 4 * self.batch * self.heads * self.tokens**2 * self.head_dim * (0.5 if self.causal else 1)

    def inputs(self, torch: Any, device: str) -> list[list[Any]]:
        """Return sets of random q, k and v, each (batch, tokens, heads, head_dim)."""
        size = (self.batch, self.tokens, self.heads, self.head_dim)
        dtype = getattr(torch, self.dtype)
        return [[torch.randn(size, device=device).to(dtype) for _ in range(3)] for _ in range(_SETS_OF_INPUTS)]

    def row(self) -> Row:
        """Return the columns that name it."""
        return {"head_dim": self.head_dim, "dtype": self.dtype, "causal": self.causal, "tokens": self.tokens}


def _shapes(emulated: bool) -> Iterator[Shape]:
    if emulated:
        yield from (Shape(1, 64, 2, 64, "float16", causal) for causal in (False, True))
        return
    # The longest first of each kind: were time to run out, the small ones would be missing.
    for tokens in (4096, 16384, 8192, 2048, 1024, 512):
        for dtype in ("float16", "bfloat16"):
            for head_dim in (128, 64):
                for causal in (False, True):
                    yield Shape(16384 // tokens, tokens, 2048 // head_dim, head_dim, dtype, causal)


def beside_pytorch(emulated: bool) -> Iterator[Row]:
    """Yield TFLOP/s of numbaflash and of PyTorch's backends, and the largest difference from PyTorch's in float32."""
    torch = torch_on(emulated)
    ticking = clock(emulated)
    peak = {dtype: matrix_tflops(ticking, dtype, emulated) for dtype in ("float16", "bfloat16")}
    for shape in _shapes(emulated):
        inputs = shape.inputs(torch, place(emulated))
        contenders: dict[str, Callable[[int], Any]] = {"numbaflash": _ours(inputs, shape, "v2", emulated)}
        contenders |= {name: _theirs(torch, inputs, shape, backend) for name, backend in _BACKENDS.items()}
        timings = ticking.measure(contenders, **_effort(emulated))
        rates = {name: _rate(shape, timing) for name, timing in timings.items()}
        ours, flash, cudnn, efficient = (rates[name] for name in contenders)
        best = max((rate for rate in (flash, cudnn, efficient) if rate is not None), default=None)
        yield {
            **shape.row(),
            **{name: _said(timings[name], rates[name]) for name in contenders},
            "of_flash": ours / flash if ours and flash else None,
            "of_best_peer": ours / best if ours and best else None,
            "of_peak": ours / peak[shape.dtype] if ours else None,
            "host_us": _host_us(timings["numbaflash"]),
            "flash_host_us": _host_us(timings["flash"]),
            "error": _error(torch, inputs[0], contenders["numbaflash"](0), shape) if ours else None,
        }


def algorithms(emulated: bool) -> Iterator[Row]:
    """Yield TFLOP/s of FlashAttention-2, FlashAttention and standard attention."""
    torch = torch_on(emulated)
    ticking = clock(emulated)
    for head_dim in (64,) if emulated else (128, 64):
        for tokens in (64,) if emulated else (4096, 1024):
            batch, heads = (1, 1) if emulated else (16384 // tokens, 2048 // head_dim)
            shape = Shape(batch, tokens, heads, head_dim, "float16", False)
            inputs = shape.inputs(torch, place(emulated))
            contenders = {name: _ours(inputs, shape, name, emulated) for name in ("v2", "v1", "standard")}
            timings = ticking.measure(contenders, **_effort(emulated))
            yield shape.row() | {name: _said(timings[name], _rate(shape, timings[name])) for name in contenders}


def _effort(emulated: bool) -> dict[str, int]:
    return {"calls": 1, "rounds": 1} if emulated else {"calls": 4, "rounds": 9}


def _ours(inputs: list[list[Any]], shape: Shape, algorithm: str, emulated: bool) -> Callable[[int], Any]:
    attention = partial(
        numbaflash.attention,
        causal=shape.causal,
        algorithm=algorithm,
        backend="emulated" if emulated else "cuda",
    )
    return lambda call: attention(*inputs[call % len(inputs)])


def _theirs(torch: Any, inputs: list[list[Any]], shape: Shape, backend: str) -> Callable[[int], Any]:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    # They take (batch, heads, tokens, head_dim), and these strides as well as any.
    turned = [[tensor.transpose(1, 2) for tensor in tensors] for tensors in inputs]
    solve = torch.nn.functional.scaled_dot_product_attention

    def call(number: int) -> Any:
        with sdpa_kernel(getattr(SDPBackend, backend)):
            return solve(*turned[number % len(turned)], is_causal=shape.causal)

    return call


def _rate(shape: Shape, timing: Timing | Exception) -> float | None:
    return None if isinstance(timing, Exception) else 1e-12 * shape.flops / timing.device


def _said(timing: Timing | Exception, rate: float | None) -> float | str | None:
    """What a cell shows: the rate, or the beginning of why there is none."""
    return f"{timing}"[:40] if isinstance(timing, Exception) else rate


def _host_us(timing: Timing | Exception) -> float | None:
    return None if isinstance(timing, Exception) else 1e6 * timing.host


def _error(torch: Any, inputs: list[Any], out: Any, shape: Shape) -> float:
    """The largest difference from the formula in float32, over one head of one sequence."""
    q, k, v = (tensor[0, :, 0].float() for tensor in inputs)
    scores = q @ k.T * shape.head_dim**-0.5
    if shape.causal:
        scores.masked_fill_(torch.ones_like(scores, dtype=torch.bool).triu_(1), float("-inf"))
    return float((out[0, :, 0].float() - scores.softmax(-1) @ v).abs().max())

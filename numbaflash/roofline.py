"""When attention is bound by memory, and when by arithmetic.

A machine does so many operations a second and reads so many bytes; their ratio is its ridge point. An operator with
more operations for each byte is bound by compute, one with fewer by memory, and it takes at least the longer of both
times (Williams, Waterman and Patterson, "Roofline", 2009). Operations are those of the matrix products, a multiply-add
being two; softmax is left out, as the papers do.

The bytes of standard attention, V1 and V2 are those of `cuda.traffic`: every tile comes from memory. An L2 that holds
the keys and values of the heads under way serves most of V2's; then its row is that of the prefill, which reads each
element once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from .cache.layout import RingLayout
from .cache.size import layer_nbytes
from .cuda.traffic import flash_v1_bytes, flash_v2_bytes, standard_bytes
from .hardware import Hardware
from .problem import MAX_HEAD_DIM

__all__ = ["Bound", "Shape", "Workload", "conclusion", "decode", "prefill", "projection", "scores", "workloads"]

# Storage that decode is reckoned for; bfloat16 has float16's bytes, each quantizer "group"'s.
KV_DTYPES = ("float32", "float16", "int8", "int4")

_HALF = 2  # bytes
_PAGE_SIZE = 64


@dataclass(frozen=True)
class Bound:
    """The least time that a workload takes on some hardware.

    Attributes:
        by: "memory" or "compute".
        seconds: No implementation is faster.
    """

    by: str
    seconds: float


@dataclass(frozen=True)
class Workload:
    """What there is to do.

    Attributes:
        operator: What is computed.
        variant: How, or of what.
        operations: FLOP.
        nbytes: Read from memory and written to it.
    """

    operator: str
    variant: str
    operations: int
    nbytes: int

    @property
    def intensity(self) -> float:
        """FLOP/byte."""
        return self.operations / self.nbytes

    def times(self, count: int) -> Workload:
        """Return as many of it."""
        return replace(self, operations=self.operations * count, nbytes=self.nbytes * count)

    def on(self, hardware: Hardware) -> Bound:
        """Return what bounds it there."""
        compute, memory = self.operations / hardware.flops, self.nbytes / hardware.bandwidth
        return Bound("compute", compute) if compute > memory else Bound("memory", memory)


@dataclass(frozen=True)
class Shape:
    """One layer of a model at work.

    Attributes:
        tokens: Of a prompt, and in the cache: a multiple of 256, so that every algorithm has whole tiles.
        head_dim: A multiple of 32, so that codes have whole groups; at most 256.
        q_heads: Query heads, a multiple of `kv_heads`.
        kv_heads: Heads of keys and values where several queries share one.
        batch: Sequences.

    Raises:
        ValueError: A size is none of these.
    """

    tokens: int = 4096
    head_dim: int = 128
    q_heads: int = 32
    kv_heads: int = 8
    batch: int = 1

    def __post_init__(self) -> None:
        """Check the sizes."""
        if self.tokens < 1 or self.tokens % 256:
            raise ValueError(f"tokens must be a multiple of 256, got {self.tokens}")
        if not 1 <= self.head_dim <= MAX_HEAD_DIM or self.head_dim % 32:
            raise ValueError(f"head_dim must be a multiple of 32, at most {MAX_HEAD_DIM}; got {self.head_dim}")
        for name in ("q_heads", "kv_heads", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.q_heads % self.kv_heads:
            raise ValueError(f"q_heads must be a multiple of kv_heads ({self.kv_heads}), got {self.q_heads}")


def projection(tokens: int, inputs: int, outputs: int, variant: str) -> Workload:
    """Tokens (tokens, inputs) times weights (inputs, outputs) in 16 bits."""
    elements = tokens * inputs + inputs * outputs + tokens * outputs
    return Workload("QKV projection", variant, 2 * tokens * inputs * outputs, elements * _HALF)


def scores(tokens: int, head_dim: int, *, written: bool) -> Workload:
    """Q K^T of one head in 16 bits, its N x N scores written out (unfused attention) or kept on the chip (fused)."""
    elements = 2 * tokens * head_dim + (tokens**2 if written else 0)
    return Workload("QK^T, scores", "written" if written else "kept", 2 * tokens**2 * head_dim, elements * _HALF)


def prefill(
    tokens: int, q_heads: int, kv_heads: int, head_dim: int, *, causal: bool = True, itemsize: int = _HALF
) -> Workload:
    """Fused attention of a whole prompt: q, k and v are read once, the output is written; half the pairs if causal."""
    operations = 4 * tokens**2 * head_dim * q_heads // (2 if causal else 1)
    nbytes = 2 * tokens * head_dim * (q_heads + kv_heads) * itemsize
    return Workload("prefill", f"{q_heads}/{kv_heads}" + (", causal" if causal else ""), operations, nbytes)


def decode(
    tokens: int, q_heads: int, kv_heads: int, head_dim: int, dtype: str, quantizer: str | None = None
) -> Workload:
    """Attention of one new token to a cache of so many: all of it is read, codes with their scales.

    Args:
        tokens: In the cache.
        q_heads: Query heads.
        kv_heads: Heads of keys and values.
        head_dim: Of all of them.
        dtype: Storage dtype of the cache.
        quantizer: Of int8 and int4, as in `RingKVCache`.
    """
    kind = "MHA" if kv_heads == q_heads else "MQA" if kv_heads == 1 else "GQA"
    layout = RingLayout(capacity=tokens, sink_tokens=0, page_size=_PAGE_SIZE, rollback=0)
    cached = layer_nbytes(kv_heads, head_dim, layout, dtype, quantizer).token * tokens
    nbytes = round(cached) + 2 * q_heads * head_dim * _HALF  # with q and the output
    return Workload(f"decode {kind} {q_heads}/{kv_heads}", dtype, 4 * tokens * head_dim * q_heads, nbytes)


def workloads(shape: Shape) -> list[Workload]:
    """Return all that one layer has to do, for all heads of the whole batch."""
    return list(_workloads(shape))


def _workloads(shape: Shape) -> Iterator[Workload]:
    tokens, head_dim, q_heads, batch = shape.tokens, shape.head_dim, shape.q_heads, shape.batch
    inputs, outputs = q_heads * head_dim, (q_heads + 2 * shape.kv_heads) * head_dim
    yield projection(batch * tokens, inputs, outputs, "prompt")
    yield projection(batch, inputs, outputs, "new token")
    heads = batch * q_heads
    yield scores(tokens, head_dim, written=True).times(heads)
    yield scores(tokens, head_dim, written=False).times(heads)
    for algorithm, moved in (("standard", standard_bytes), ("V1", flash_v1_bytes), ("V2", flash_v2_bytes)):
        yield Workload("attention", algorithm, 4 * tokens**2 * head_dim, moved(tokens, head_dim)).times(heads)
    yield prefill(tokens, q_heads, shape.kv_heads, head_dim).times(batch)
    for kv_heads in dict.fromkeys((q_heads, shape.kv_heads, 1)):
        for dtype in KV_DTYPES:
            yield decode(tokens, q_heads, kv_heads, head_dim, dtype).times(batch)


def conclusion(shape: Shape, hardware: Hardware) -> str:
    """Say in one sentence what follows for a layer on some hardware."""
    one = (shape.tokens, shape.q_heads, shape.kv_heads, shape.head_dim)
    prompt, token, small = prefill(*one), decode(*one, "float16"), decode(*one, "int4")
    heads = f"{shape.q_heads}/{shape.kv_heads} heads"
    gain = token.on(hardware).seconds / small.on(hardware).seconds
    waits_for = {"memory": "the cache to be read", "compute": "arithmetic"}
    return (
        f"On {hardware.name} (ridge point {hardware.ridge:.0f} FLOP/byte) prefill with {heads} has "
        f"{prompt.intensity:.0f} FLOP/byte and waits for "
        f"{'arithmetic' if prompt.on(hardware).by == 'compute' else 'memory'}, decode from float16 has "
        f"{token.intensity:.0f} and waits for {waits_for[token.on(hardware).by]}: "
        f"int4 can make it {gain:.1f} times as fast."
    )

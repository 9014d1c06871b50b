"""A Llama-shaped language model in NumPy and Numba whose attention is somebody else's work.

`Llama.forward` computes the embedding, projections, rotary positions and MLPs; for attention it calls
`attention.step(layer, q, k, v)`, which a `numbaflash.RingKVCache` answers in process and a client's `Session`
over the wire. The model keeps no state: the tokens seen so far live in that object alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from .quantized import Array, QuantizedMatrix
from .weights import Checkpoint

MATRICES = (
    "attn_q",
    "attn_k",
    "attn_v",
    "attn_output",
    "ffn_gate",
    "ffn_up",
    "ffn_down",
)  # of a layer, by GGUF's names


class Attention(Protocol):
    """What holds the KV cache."""

    def step(self, layer: int, q: Array, k: Array, v: Array) -> Array:
        """Append k, v (T, Hkv, D) to `layer` and return causal attention of q (T, Hq, D) to all it holds."""
        ...


@dataclass(frozen=True)
class LlamaConfig:
    """Shape of the model, as the GGUF keys `llama.*` give it.

    Attributes:
        num_layers: transformer blocks.
        num_heads: query heads.
        num_kv_heads: key and value heads.
        head_dim: features of a head.
        context_length: positions that the model was trained on.
        rope_base: base of the rotary frequencies.
        norm_epsilon: added to the mean square in RMSNorm.
    """

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    context_length: int
    rope_base: float
    norm_epsilon: float

    @classmethod
    def from_gguf(cls, fields: dict[str, Any]) -> LlamaConfig:
        """Read the shape from a GGUF file's metadata."""
        return cls(
            num_layers=fields["llama.block_count"],
            num_heads=fields["llama.attention.head_count"],
            num_kv_heads=fields["llama.attention.head_count_kv"],
            head_dim=fields["llama.rope.dimension_count"],
            context_length=fields["llama.context_length"],
            rope_base=fields["llama.rope.freq_base"],
            norm_epsilon=fields["llama.attention.layer_norm_rms_epsilon"],
        )


@dataclass(frozen=True)
class Block:
    """Weights of one layer; matrices that read the same input are stacked, to be one product.

    Attributes:
        attention_norm: (E,).
        qkv: ((Hq + 2 Hkv) * D, E).
        attention_out: (E, Hq * D).
        mlp_norm: (E,).
        gate_up: (2 F, E).
        down: (E, F).
    """

    attention_norm: Array
    qkv: QuantizedMatrix
    attention_out: QuantizedMatrix
    mlp_norm: Array
    gate_up: QuantizedMatrix
    down: QuantizedMatrix


class Llama:
    """The model: token ids in, logits out.

    Args:
        checkpoint: weights and metadata of a GGUF file with `general.architecture` "llama".
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.config = LlamaConfig.from_gguf(checkpoint.fields)
        self.embedding = checkpoint.matrices["token_embd.weight"]
        self.final_norm = checkpoint.vectors["output_norm.weight"]
        self.blocks = [_block(checkpoint, f"blk.{layer}") for layer in range(self.config.num_layers)]

    def forward(self, ids: list[int], position: int, attention: Attention) -> Array:
        """Run T new tokens through the model, and return the logits after the last one, float32 (vocabulary,).

        The arguments are those of `hidden`.
        """
        logits: Array = self.logits(self.hidden(ids, position, attention)[-1:])[0]
        return logits

    def hidden(self, ids: list[int], position: int, attention: Attention) -> Array:
        """Run T new tokens through the layers.

        Args:
            ids: the T tokens.
            position: position of the first of them: the number of tokens that `attention` has seen.
            attention: holds the KV cache; every layer takes one `step` in it.

        Returns:
            What comes out of the last layer, (T, E).
        """
        heads, kv_heads, dim = self.config.num_heads, self.config.num_kv_heads, self.config.head_dim
        rotation = rope_rotation(np.arange(position, position + len(ids)), dim, self.config.rope_base)
        x = self.embedding.rows(ids)
        for layer, block in enumerate(self.blocks):
            # Slices, for np.split takes 7 and 15 us where they take 1: 0.6 ms of a token.
            qkv = block.qkv.product(self._norm(x, block.attention_norm)).reshape(len(ids), -1, dim)
            q, k, v = qkv[:, :heads], qkv[:, heads : heads + kv_heads], qkv[:, heads + kv_heads :]
            attended = attention.step(layer, rotate(q, rotation), rotate(k, rotation), v)
            x = x + block.attention_out.product(attended.reshape(len(ids), -1))
            gate_up = block.gate_up.product(self._norm(x, block.mlp_norm))
            width = gate_up.shape[1] // 2
            x = x + block.down.product(silu(gate_up[:, :width]) * gate_up[:, width:])
        return x

    def logits(self, hidden: Array) -> Array:
        """Return the logits after tokens whose `hidden` is given: (T, E) to (T, vocabulary)."""
        # The embedding is tied: it is the output matrix as well.
        return self.embedding.product(self._norm(hidden, self.final_norm))

    def _norm(self, x: Array, weight: Array) -> Array:
        """RMSNorm over the last axis."""
        mean_square = np.vecdot(x, x)[:, None] / np.float32(x.shape[-1])  # np.mean takes 13 us, this 4
        normed: Array = x * (weight / np.sqrt(mean_square + np.float32(self.config.norm_epsilon)))
        return normed


def _block(checkpoint: Checkpoint, name: str) -> Block:
    matrix = {part: checkpoint.matrices[f"{name}.{part}.weight"] for part in MATRICES}
    return Block(
        attention_norm=checkpoint.vectors[f"{name}.attn_norm.weight"],
        qkv=QuantizedMatrix.stack(matrix["attn_q"], matrix["attn_k"], matrix["attn_v"]),
        attention_out=matrix["attn_output"],
        mlp_norm=checkpoint.vectors[f"{name}.ffn_norm.weight"],
        gate_up=QuantizedMatrix.stack(matrix["ffn_gate"], matrix["ffn_up"]),
        down=matrix["ffn_down"],
    )


def rope_rotation(positions: npt.NDArray[np.int64], dim: int, base: float) -> npt.NDArray[np.complex64]:
    """Unit complex numbers exp(i * position * base**(-2j / dim)), (T, 1, dim / 2) (RoFormer, section 3.2.2)."""
    angles: npt.NDArray[np.float64] = positions[:, None, None] * base ** (-np.arange(0, dim, 2) / dim)
    rotation: npt.NDArray[np.complex64] = np.exp(1j * angles).astype(np.complex64)
    return rotation


def rotate(x: Array, rotation: npt.NDArray[np.complex64]) -> Array:
    """Apply rotary positions to x (T, H, D).

    Features 2j and 2j + 1 are one complex number: a GGUF file of architecture "llama" stores the rows of the query
    and key projections in that order (the original checkpoints pair j with j + D / 2).
    """
    return (np.ascontiguousarray(x).view(np.complex64) * rotation).view(np.float32)


def silu(x: Array) -> Array:
    """SiLU, x * sigmoid(x)."""
    y: Array = x / (1 + np.exp(-x))
    return y

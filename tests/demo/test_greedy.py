"""The demo's greedy text against a dense float32 forward of the whole sequence, written for this file alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from numbaflash import RingKVCache
from numbaflash_service.demo.generate import Generation, generate
from numbaflash_service.demo.model import Llama
from numbaflash_service.demo.tokenizer import Tokenizer
from numbaflash_service.demo.weights import Checkpoint

Array = npt.NDArray[Any]

TIE = 1e-3  # of a logit
PROMPTS = [
    "Why is the sky blue?",
    "Write a Python function that adds two numbers.",
    "List three animals that live in the sea.",
]


def dense_logits(field: dict[str, Any], weight: dict[str, Array], ids: list[int], visible: Array) -> Array:
    """Logits after every token: no cache, plain softmax over all keys that `visible` (query, key) allows.

    Queries and keys are put back into the checkpoint's original order, where rotary positions pair feature j with
    j + D / 2.
    """
    heads, kv_heads = field["llama.attention.head_count"], field["llama.attention.head_count_kv"]
    dim, tokens = field["llama.embedding_length"] // heads, len(ids)
    frequencies = field["llama.rope.freq_base"] ** -(np.arange(dim // 2) * 2 / dim)
    angles = np.outer(np.arange(tokens), frequencies)
    cos, sin = np.cos(angles).astype("f4"), np.sin(angles).astype("f4")

    def norm(x: Array, name: str) -> Array:
        rms = np.sqrt((x**2).mean(-1, keepdims=True) + field["llama.attention.layer_norm_rms_epsilon"])
        return (x / rms * weight[name]).astype("f4")

    def rotated(x: Array) -> Array:
        first, second = x[..., 0::2], x[..., 1::2]
        return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)

    x = weight["token_embd.weight"][ids]
    for layer in range(field["llama.block_count"]):
        w = {name: weight[f"blk.{layer}.{name}.weight"] for name in ("attn_q", "attn_k", "attn_v", "attn_output")}
        h = norm(x, f"blk.{layer}.attn_norm.weight")
        q = rotated((h @ w["attn_q"].T).reshape(tokens, heads, dim).transpose(1, 0, 2))
        k = rotated((h @ w["attn_k"].T).reshape(tokens, kv_heads, dim).transpose(1, 0, 2))
        v = (h @ w["attn_v"].T).reshape(tokens, kv_heads, dim).transpose(1, 0, 2)
        k, v = (np.repeat(a, heads // kv_heads, axis=0) for a in (k, v))
        scores = np.where(visible, q @ k.transpose(0, 2, 1) / np.sqrt(np.float32(dim)), -np.inf)
        p = np.exp(scores - scores.max(-1, keepdims=True))
        out = (p / p.sum(-1, keepdims=True)) @ v
        x = x + out.transpose(1, 0, 2).reshape(tokens, -1) @ w["attn_output"].T
        h = norm(x, f"blk.{layer}.ffn_norm.weight")
        gate, up = (h @ weight[f"blk.{layer}.{name}.weight"].T for name in ("ffn_gate", "ffn_up"))
        x = x + (gate / (1 + np.exp(-gate)) * up) @ weight[f"blk.{layer}.ffn_down.weight"].T
    return norm(x, "output_norm.weight") @ weight["token_embd.weight"].T


def greedy(model: Llama, tokenizer: Tokenizer, prompt_ids: list[int], count: int, **ring: int) -> Generation:
    config = model.config
    cache = RingKVCache(config.num_layers, config.num_kv_heads, config.head_dim, dtype="float32", **ring)
    return generate(model, cache, prompt_ids, max_new_tokens=count, stop_ids=tokenizer.stop_ids)


def assert_greedy(logits: Array, prompt_ids: list[int], got: Generation, tokenizer: Tokenizer) -> None:
    """Each new token, and the stop after them, is the likeliest one after everything before it."""
    after = logits[len(prompt_ids) - 1 :]
    for step, token in enumerate(got.new_ids):
        assert after[step].max() - after[step, token] < TIE, f"token {step}"
    if got.finish_reason == "stop":
        last = after[len(got.new_ids)]
        assert last.max() - last[sorted(tokenizer.stop_ids)].max() < TIE


@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_tokens_are_those_of_a_dense_forward(
    prompt: str, checkpoint: Checkpoint, dense_weights: dict[str, Array], model: Llama, tokenizer: Tokenizer
) -> None:
    prompt_ids = tokenizer.encode(tokenizer.chat(prompt))
    got = greedy(model, tokenizer, prompt_ids, 32, capacity=len(prompt_ids) + 32)
    ids = prompt_ids + got.new_ids
    position = np.arange(len(ids))
    logits = dense_logits(checkpoint.fields, dense_weights, ids, position[:, None] >= position)
    assert_greedy(logits, prompt_ids, got, tokenizer)


def test_greedy_tokens_in_a_small_ring_are_those_of_windowed_attention_with_sinks(
    checkpoint: Checkpoint, dense_weights: dict[str, Array], model: Llama, tokenizer: Tokenizer
) -> None:
    prompt_ids = tokenizer.encode(tokenizer.chat(PROMPTS[0]))
    window, sinks = 24, 4  # less than the prompt alone
    assert len(prompt_ids) > window
    got = greedy(model, tokenizer, prompt_ids, 32, capacity=window, sink_tokens=sinks)
    ids = prompt_ids + got.new_ids
    query, key = np.arange(len(ids))[:, None], np.arange(len(ids))
    visible = (key <= query) & ((key > query - (window - sinks)) | (key < sinks))
    assert_greedy(dense_logits(checkpoint.fields, dense_weights, ids, visible), prompt_ids, got, tokenizer)


def test_the_prompt_may_be_cut_into_steps_of_any_size(model: Llama, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(tokenizer.chat(PROMPTS[1]))
    config = model.config

    def logits(*cuts: int) -> Array:
        cache = RingKVCache(config.num_layers, config.num_kv_heads, config.head_dim, capacity=64, dtype="float32")
        for start, stop in zip((0, *cuts), (*cuts, len(ids)), strict=True):
            out = model.forward(ids[start:stop], start, cache)
        return out

    np.testing.assert_allclose(logits(1, 2, 19), logits(), atol=2e-3)

"""What a quantized KV cache costs in quality, on the demo's model: perplexity, and greedy tokens that change.

The text is that of the standard library's `pydoc_data.topics`. For greedy tokens, float16 continues each prompt by 200
tokens; the other caches then see the same tokens, and what counts is how often their likeliest next token is that one.
Each token's logits are computed from the cache as a decode would see it: results do not depend on how tokens are cut.
"""

from __future__ import annotations

import argparse
import json
import pydoc_data.topics
from dataclasses import asdict, dataclass

import numpy as np

from numbaflash import AWQQuantizer, RingKVCache
from numbaflash.cache.quantizers import Quantizer
from numbaflash.cache.size import layer_nbytes
from numbaflash_service.demo import weights
from numbaflash_service.demo.model import Llama
from numbaflash_service.demo.tokenizer import Tokenizer

TOKENS = 4352
SAMPLE_TOKENS = 1024  # for awq, of another part of the text
CHUNK = 1088
GREEDY_TOKENS = 200
SINK_TOKENS = 4
PROMPTS = (
    "What is gravity?",
    "Explain how a hash table works.",
    "Write a short story about a lighthouse keeper.",
    "List three causes of the French Revolution and explain each.",
    "How do I make bread at home?",
)
QUANTIZERS = ("group", "hqq", "group:keys=token", "hqq:keys=token", "awq")


@dataclass(frozen=True)
class Row:
    """One kind of cache; `token_bytes` are of all layers, `ratio` is its perplexity over float16's.

    `error` is the standard error of that ratio: which code a number is rounded to is chance, and so is some of what
    comes of it.
    """

    dtype: str
    quantizer: str
    token_bytes: float
    perplexity: float
    ratio: float
    error: float
    unchanged: float


class Recorder:
    """A cache that remembers the queries and keys of its steps."""

    def __init__(self, cache: RingKVCache) -> None:
        self._cache = cache
        self.queries: list[np.ndarray] = []
        self.keys: list[np.ndarray] = []

    def step(self, layer: int, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
        """Step as the cache does."""
        self.queries.append(q)
        self.keys.append(k)
        return self._cache.step(layer, q, k, v)


def cache_for(model: Llama, tokens: int, dtype: str, quantizer: Quantizer | str | None) -> RingKVCache:
    """An empty cache that keeps so many tokens."""
    shape = model.config.num_layers, model.config.num_kv_heads, model.config.head_dim
    ring = {"capacity": tokens, "sink_tokens": SINK_TOKENS, "rollback": 0}
    return RingKVCache(*shape, **ring, dtype=dtype, quantizer=quantizer, backend="cpu")


def next_token_losses(model: Llama, ids: list[int], cache: RingKVCache) -> tuple[np.ndarray, np.ndarray]:
    """Loss of each next token in nats, and the likeliest next token, (len(ids) - 1,) each."""
    losses, likeliest = [], []
    for start in range(0, len(ids), CHUNK):
        hidden = model.hidden(ids[start : start + CHUNK], start, cache)
        for row in range(0, len(hidden), 128):
            logits = model.logits(hidden[row : row + 128]).astype(np.float64)
            following = ids[start + row + 1 : start + row + 1 + len(logits)]
            logits = logits[: len(following)]
            top = logits.max(axis=1)
            total = top + np.log(np.exp(logits - top[:, None]).sum(axis=1))
            losses.append(total - logits[np.arange(len(following)), following])
            likeliest.append(logits.argmax(axis=1))
    return np.concatenate(losses), np.concatenate(likeliest)


def continue_greedily(model: Llama, prompt: list[int]) -> list[int]:
    """The prompt and its continuation, with float16."""
    cache = cache_for(model, len(prompt) + GREEDY_TOKENS, "float16", None)
    ids = [*prompt, int(model.forward(prompt, 0, cache).argmax())]
    while len(ids) < len(prompt) + GREEDY_TOKENS:
        ids.append(int(model.forward(ids[-1:], len(ids) - 1, cache).argmax()))
    return ids


def record(model: Llama, ids: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Queries and keys of a text, (layers, tokens, heads, head_dim)."""
    recorder = Recorder(cache_for(model, len(ids), "float16", None))
    model.hidden(ids, 0, recorder)
    return np.stack(recorder.queries), np.stack(recorder.keys)


def share_of_means(keys: np.ndarray, page_size: int = 64) -> float:
    """The share of the keys' energy that is their channels' means over a page."""
    behind_sinks = keys[:, SINK_TOKENS:]
    whole = behind_sinks[:, : behind_sinks.shape[1] // page_size * page_size]
    pages = whole.reshape(len(keys), -1, page_size, *keys.shape[2:])
    return float(np.square(pages.mean(axis=2)).sum() * page_size / np.square(pages).sum())


def measure(windows: int) -> list[Row]:
    """Measure every dtype with every quantizer, perplexity over so many stretches of the text."""
    checkpoint = weights.load()
    tokenizer, model = Tokenizer(checkpoint.fields), Llama(checkpoint)
    text = "\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))
    ids, sample = tokenizer.encode(text[: 40_000 * windows]), tokenizer.encode(text[-10_000:])[:SAMPLE_TOKENS]
    stretches = [ids[at : at + TOKENS] for at in range(0, windows * TOKENS, TOKENS)]
    samples = record(model, sample)
    print(f"{share_of_means(samples[1]):.0%} of the keys' energy is their channels' means over a page", flush=True)
    awq_options = {"rotary": "adjacent", "sink_tokens": SINK_TOKENS}
    prompts = [tokenizer.encode(tokenizer.chat(prompt)) for prompt in PROMPTS]
    continued = [continue_greedily(model, prompt) for prompt in prompts]
    rows: list[Row] = []
    of_float16 = np.zeros(0)
    for dtype, name in [("float16", ""), *((dtype, name) for dtype in ("int8", "int4") for name in QUANTIZERS)]:
        quantizer = AWQQuantizer.search(*samples, dtype=dtype, **awq_options) if name == "awq" else name or None
        cache = cache_for(model, TOKENS, dtype, quantizer)
        config = model.config
        one = layer_nbytes(config.num_kv_heads, config.head_dim, cache.layout, dtype, cache.quantizer)
        losses = np.concatenate(
            [next_token_losses(model, part, cache_for(model, TOKENS, dtype, quantizer))[0] for part in stretches]
        )
        of_float16 = of_float16 if rows else losses
        more = losses - of_float16
        error = float(more.std() / np.sqrt(more.size))
        same = []
        for prompt, whole in zip(prompts, continued, strict=True):
            guesses = next_token_losses(model, whole, cache_for(model, len(whole), dtype, quantizer))[1]
            same.append(guesses[len(prompt) - 1 :] == whole[len(prompt) :])
        share, token_bytes = float(np.concatenate(same).mean()), float(one.token) * config.num_layers
        perplexity, ratio = float(np.exp(losses.mean())), float(np.exp(more.mean()))
        rows.append(Row(dtype, name, token_bytes, perplexity, ratio, error, share))
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end")
    parser.add_argument("--windows", type=int, default=1, help=f"stretches of {TOKENS} tokens, one after the other")
    arguments = parser.parse_args()
    rows = measure(arguments.windows)
    if arguments.json:
        print(json.dumps([asdict(row) for row in rows]))
        return
    print("| dtype, quantizer | bytes a token | perplexity | beside float16 | greedy tokens unchanged |")
    print("|---|---|---|---|---|")
    for row in rows:
        name = f"{row.dtype} {row.quantizer}".strip()
        beside = f"{row.ratio - 1:+.2%} ± {row.error:.2%}"
        bits = f"{row.token_bytes:.0f} | {row.perplexity:.3f} | {beside} | {row.unchanged:.1%}"
        print(f"| {name} | {bits} |")


if __name__ == "__main__":
    main()

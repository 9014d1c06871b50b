"""What a model gains by numbaflash's attention: `python benchmarks/model.py [--tokens 128 1024 3072] [--json]`.

A Llama of transformers in SmolLM2-135M's shape (30 layers, 9 heads of 64, 3 KV heads; random weights, bfloat16) reads a
prompt and makes tokens: with PyTorch's scaled_dot_product_attention, with numbaflash in its place over transformers'
own cache, and with numbaflash over a `RingCache`. They take turns; each figure is the median over the rounds. Attention
is what the attention functions and the caches' updates take together, for a ring appends where it attends.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from datetime import date
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, Cache, DynamicCache, LlamaConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from numbaflash.integrations.transformers import RingCache, register

_ROUNDS = 3
_NEW_TOKENS = 24
_SHAPE = {
    "vocab_size": 8192,  # SmolLM2's is 49,152: for attention it is the same
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
}
_WAYS: dict[str, tuple[str, Callable[[], Cache]]] = {
    "PyTorch": ("sdpa", DynamicCache),
    "numbaflash": ("numbaflash", DynamicCache),
    "numbaflash, RingCache": ("numbaflash", lambda: RingCache(_SHAPE["max_position_embeddings"])),
}


@dataclass(frozen=True)
class Figures:
    """Seconds of a prompt and of a token, and of those what attention and the cache take."""

    tokens: int
    way: str
    prompt_s: float
    prompt_attention_s: float
    token_s: float
    token_attention_s: float


class _Watch:
    """Seconds that functions took."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def over(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - start

        return timed


def main() -> None:
    """Measure, and print a table or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--json", action="store_true", help="print figures as JSON")
    parser.add_argument("--tokens", type=int, nargs="+", default=[128, 1024, 3072], help="lengths of the prompts")
    arguments = parser.parse_args()
    register()
    watch = _Watch()
    for name in ("sdpa", "numbaflash"):
        ALL_ATTENTION_FUNCTIONS[name] = watch.over(ALL_ATTENTION_FUNCTIONS[name])
    models = {way: _model(attention) for way, (attention, _) in _WAYS.items()}
    with torch.no_grad():
        for way, model in models.items():  # compiles, or loads what is compiled
            _measure(model, way, 64, watch)
        figures = [row for tokens in arguments.tokens for row in _compare(models, tokens, watch)]
    if arguments.json:
        machine = {"cpu": platform.processor(), "cores": os.cpu_count(), "date": date.today().isoformat()}
        print(json.dumps({**machine, "figures": [asdict(row) for row in figures]}))
        return
    table = Table("prompt", "attention", "prompt, ms", "of that attention", "a token, ms", "of that attention")
    for row in figures:
        seconds = row.prompt_s, row.prompt_attention_s, row.token_s, row.token_attention_s
        table.add_row(str(row.tokens), row.way, *(f"{1e3 * one:.1f}" for one in seconds))
    Console().print(table)


def _model(attention: str) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(**_SHAPE)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.bfloat16).eval()


def _compare(models: dict[str, Any], tokens: int, watch: _Watch) -> list[Figures]:
    """Measure all ways in turns."""
    rounds = [[_measure(model, way, tokens, watch) for way, model in models.items()] for _ in range(_ROUNDS)]
    by_way = zip(*rounds, strict=True)
    return [Figures(tokens, way, *_medians(taken)) for way, taken in zip(models, by_way, strict=True)]


def _medians(rows: Iterable[tuple[float, ...]]) -> list[float]:
    return [statistics.median(column) for column in zip(*rows, strict=True)]


def _measure(model: Any, way: str, tokens: int, watch: _Watch) -> tuple[float, ...]:
    """Seconds of a prompt, of its attention, of a token and of its attention."""
    cache: Any = _WAYS[way][1]()
    cache.update = watch.over(cache.update)
    ids = torch.arange(tokens)[None] % _SHAPE["vocab_size"]

    def call() -> tuple[float, float]:
        nonlocal ids
        watch.seconds, start = 0.0, time.perf_counter()
        ids = model(ids, cache=cache).logits[:, -1:].argmax(-1)
        return time.perf_counter() - start, watch.seconds

    prompt = call()
    steps = [call() for _ in range(_NEW_TOKENS)]
    return *prompt, *_medians(steps)


if __name__ == "__main__":
    main()

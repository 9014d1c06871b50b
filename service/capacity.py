"""`numbaflash capacity`: figures of `numbaflash.capacity` as tables or as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from json import dumps
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from numbaflash.cache.arguments import ring_layout
from numbaflash.capacity import MODELS, STORAGES, CacheSize, Storage, cache_size, find_model, read_gguf
from numbaflash.hardware import GPUS

_WIDTH = 80
_PLAIN = STORAGES[0]


def run(
    *,
    model: str | None,
    gguf: Path | None,
    context: int | None,
    window: int | None,
    sink_tokens: int,
    batch: int,
    dtype: str | None,
    quantizer: str | None,
    page_size: int,
    rollback: int,
    weights_gb: float | None,
    json: bool,
) -> None:
    """Print what a model's cache takes.

    Args:
        model: Name of a preset; None: the first of them.
        gguf: File of a model in the place of a preset.
        context: Tokens of a session; None: the model's.
        window: Tokens that stay visible; None: the whole context.
        sink_tokens: As in `RingKVCache`, like `page_size` and `rollback`.
        batch: Sessions at a time.
        dtype: A storage beside those of `STORAGES`; None: there is none, unless a quantizer is named: int4.
        quantizer: Its quantizer.
        page_size: Tokens of a page.
        rollback: Newest tokens that can be taken back.
        weights_gb: Of the weights, 10^9 bytes each; None: what the model has.
        json: Print one JSON object.

    Raises:
        ModuleNotFoundError: A GGUF file is to be read, and gguf is not installed.
        OSError: It cannot be read.
        ValueError: There is no such model, quantizer or ring, or the file lacks fields.
    """
    if model is not None and gguf is not None:
        raise ValueError("model and gguf must not both be given")
    shape = read_gguf(gguf) if gguf is not None else find_model(model or MODELS[0].name)
    tokens = context or shape.context
    layout = ring_layout(min(tokens, window or tokens), sink_tokens, page_size, rollback)
    weights = shape.weight_nbytes if weights_gb is None else round(weights_gb * 1e9)
    storages = list(STORAGES)
    if dtype or quantizer:
        storages.append(Storage(dtype or "int4", quantizer))
    sizes = {storage: cache_size(shape, storage, layout) for storage in dict.fromkeys(storages)}
    sentence = _conclusion(sizes, weights)
    if json:
        given = {
            "model": asdict(shape),
            "weight_nbytes": weights,
            "context": tokens,
            "ring": asdict(layout),
            "batch": batch,
        }
        rows = [
            asdict(storage)
            | {
                "token_nbytes": float(size.token),
                "tokens_nbytes": float(size.token * layout.capacity),
                "session_nbytes": size.session,
                "batch_nbytes": size.session * batch,
                "saves": _saves(size, sizes),
                "sessions": {gpu.name: size.sessions_on(gpu, weights) for gpu in GPUS},
            }
            for storage, size in sizes.items()
        ]
        print(dumps(given | {"storages": rows, "conclusion": sentence}))
        return
    console = Console(width=_WIDTH)
    console.print(
        f"{shape.name}: {shape.num_layers} layers, {shape.kv_heads} KV heads, head_dim {shape.head_dim}; "
        f"{tokens} tokens of context, {layout.capacity} visible",
        style="bold",
        highlight=False,
    )
    console.print(_size_table(sizes, layout.capacity, batch))
    console.print(_gpu_table(sizes, weights))
    console.print(sentence, highlight=False)


def _size_table(sizes: Mapping[Storage, CacheSize], visible: int, batch: int) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("storage", overflow="fold")
    sessions = ["a session"] + ([f"{batch} sessions"] if batch > 1 else [])
    for heading in ("a token", f"{visible} tokens", *sessions, "saves"):
        table.add_column(heading, justify="right", no_wrap=True)
    for storage, size in sizes.items():
        figures = [size.token, size.token * visible, *(size.session * count for count in dict.fromkeys((1, batch)))]
        saves = "" if storage == _PLAIN else f"{_saves(size, sizes):.0%}"
        table.add_row(storage.name, *(_bytes(float(figure)) for figure in figures), saves)
    return table


def _gpu_table(sizes: Mapping[Storage, CacheSize], weights: int) -> Table:
    title = f"Sessions beside {weights / 1e9:.3g} GB of weights"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("GPU", no_wrap=True)
    table.add_column("GB", justify="right", no_wrap=True)
    for storage in sizes:
        table.add_column(storage.name, justify="right")
    for gpu in GPUS:
        counts = (f"{size.sessions_on(gpu, weights):,}" for size in sizes.values())
        table.add_row(gpu.name, f"{gpu.memory / 1e9:.0f}", *counts)
    return table


def _conclusion(sizes: Mapping[Storage, CacheSize], weights: int) -> str:
    """What follows from the figures, in one sentence."""
    storage, least = min(sizes.items(), key=lambda item: item[1].session)
    saved = f"{storage.name} takes {1 - _saves(least, sizes):.0%} of float16's memory"
    for gpu in GPUS:
        if least.sessions_on(gpu, weights):
            plain = sizes[_PLAIN].sessions_on(gpu, weights)
            return f"{saved}: {gpu.name} holds {least.sessions_on(gpu, weights):,} sessions instead of {plain:,}."
    return f"{saved}, but no GPU of the list has room for a session beside the weights."


def _saves(size: CacheSize, sizes: Mapping[Storage, CacheSize]) -> float:
    """The share of float16's session that this one does without."""
    return 1 - size.session / sizes[_PLAIN].session


def _bytes(count: float) -> str:
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if count >= size:
            return f"{count / size:.4g} {unit}"
    return f"{count:.4g} B"

"""How much memory a cache takes, and how many sessions a GPU holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from numbaflash import RingKVCache
from numbaflash.cache.arguments import ring_layout
from numbaflash.capacity import MODELS, ModelShape, Storage, cache_size, find_model, read_gguf
from numbaflash.hardware import GPUS, Hardware
from numbaflash_service.cli import app


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["capacity", *arguments])


def said(result: Any) -> str:
    return " ".join(result.output.replace("│", " ").split())


def test_llama_2_with_8_kv_heads_takes_128_kib_a_token_and_half_a_gib_at_4096() -> None:
    size = cache_size(find_model("Llama-2-7B-8KV"), Storage("float16"), ring_layout(4096, 0, 64, 0))
    assert size.token == 128 << 10
    assert size.session == 1 << 29


def test_llama_2_as_released_takes_four_times_that() -> None:
    size = cache_size(find_model("llama-2-7b"), Storage("float16"), ring_layout(4096, 0, 64, 0))
    assert (size.token, size.session) == (512 << 10, 2 << 30)


STORAGES = st.sampled_from(
    [
        Storage("float32"),
        Storage("float16"),
        Storage("bfloat16"),
        *(
            Storage(dtype, quantizer)
            for dtype in ("int8", "int4")
            for quantizer in (None, "group", "hqq:symmetric", "group:group_size=32,keys=token")
        ),
    ]
)


@settings(max_examples=40)
@given(
    storage=STORAGES,
    layers=st.integers(1, 3),
    kv_heads=st.integers(1, 3),
    head_dim=st.sampled_from([32, 64, 96]),
    capacity=st.integers(1, 300),
    sinks=st.integers(0, 20),
    page_size=st.sampled_from([8, 16, 64]),
    rollback=st.integers(0, 70),
)
def test_bytes_are_those_that_a_full_cache_takes(
    storage: Storage,
    layers: int,
    kv_heads: int,
    head_dim: int,
    capacity: int,
    sinks: int,
    page_size: int,
    rollback: int,
) -> None:
    sinks = min(sinks, capacity - 1)
    shape = {"capacity": capacity, "sink_tokens": sinks, "page_size": page_size, "rollback": rollback}
    cache = RingKVCache(layers, kv_heads, head_dim, dtype=storage.dtype, quantizer=storage.quantizer, **shape)
    size = cache_size(ModelShape("", layers, kv_heads, head_dim, 1, 1), storage, ring_layout(*shape.values()))
    assert size.session == cache.max_nbytes
    tokens = np.zeros((3 * page_size + 2 * (capacity + rollback), kv_heads, head_dim), np.float16)
    for layer in range(layers):
        cache.append(layer, tokens, tokens)
    assert cache.nbytes == size.session
    own = cache.pools[-1].page_nbytes
    assert size.token * page_size == layers * own


def test_sessions_are_what_fits_beside_the_weights() -> None:
    size = cache_size(MODELS[0], Storage("float16"), ring_layout(4096, 0, 64, 0))
    card = Hardware("card", 1.0, 1.0, 10 << 30)
    assert size.sessions_on(card, 2 << 30) == 16
    assert size.sessions_on(card, (2 << 30) + 1) == 15
    assert size.sessions_on(card, 11 << 30) == 0


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_every_preset_has_a_table(model: ModelShape) -> None:
    result = run("--model", model.name.upper())
    assert result.exit_code == 0
    assert result.output.startswith(model.name)
    assert max(map(len, result.output.splitlines())) <= 80
    assert "…" not in result.output


def test_the_first_table_is_the_standard_example() -> None:
    shown = said(run())
    assert "float16 128 KiB 512 MiB 520 MiB" in shown  # 64 tokens more can be taken back
    assert "int4 group takes 31% of float16's memory: A100-40GB-SXM holds 165 sessions instead of 51." in shown


def test_json_has_the_sessions_of_every_gpu() -> None:
    options = ("--window", "1000", "--sink-tokens", "4", "--batch", "3", "--quantizer", "hqq:symmetric", "--json")
    figures = json.loads(run("--model", "Llama-3-70B", "--weights-gb", "35.5", *options).output)
    assert (figures["weight_nbytes"], figures["context"], figures["ring"]["capacity"]) == (35_500_000_000, 8192, 1000)
    rows = {(row["dtype"], row["quantizer"]): row for row in figures["storages"]}
    assert list(rows) == [("float16", None), ("int8", "group"), ("int4", "group"), ("int4", "hqq:symmetric")]
    for row in rows.values():
        assert row["batch_nbytes"] == 3 * row["session_nbytes"]
        assert row["sessions"] == {
            gpu.name: max(0, gpu.memory - 35_500_000_000) // row["session_nbytes"] for gpu in GPUS
        }
    assert rows["int4", "hqq:symmetric"]["saves"] > rows["int4", "group"]["saves"] > 0.5


def test_a_model_too_large_for_every_gpu_is_said_to_be() -> None:
    assert "no GPU of the list has room for a session beside the weights" in said(
        run("--model", "llama-3-70b", "--weights-gb", "200")
    )


def write_gguf(path: Path, fields: dict[str, Any], architecture: str = "llama") -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in fields.items():
        name = f"{architecture}.{key}"
        if isinstance(value, list):
            writer.add_array(name, value)
        else:
            writer.add_uint32(name, value)
    writer.add_tensor("token_embd.weight", np.zeros((8, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


SHAPE = {
    "block_count": 4,
    "context_length": 512,
    "embedding_length": 256,
    "attention.head_count": 8,
    "attention.head_count_kv": 2,
}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (SHAPE, (4, 2, 32)),
        (SHAPE | {"attention.key_length": 64, "attention.value_length": 64}, (4, 2, 64)),
        ({k: v for k, v in SHAPE.items() if k != "attention.head_count_kv"}, (4, 8, 32)),
        (SHAPE | {"attention.head_count_kv": [2, 2, 2, 2]}, (4, 2, 32)),
    ],
    ids=["plain", "own head_dim", "no grouping", "heads by layer"],
)
def test_a_models_shape_is_read_from_gguf(fields: dict[str, Any], expected: tuple[int, ...], tmp_path: Path) -> None:
    model = read_gguf(write_gguf(tmp_path / "model.gguf", fields, "qwen2"))
    assert (model.num_layers, model.kv_heads, model.head_dim) == expected
    assert (model.context, model.weight_nbytes) == (512, 8 * 32 * 4)


def without(*names: str) -> dict[str, Any]:
    return {key: value for key, value in SHAPE.items() if key not in names}


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        (without("block_count"), "gguf must have the fields llama.block_count"),
        (
            without("context_length", "attention.head_count", "embedding_length"),
            "llama.context_length, llama.attention.head_count, llama.embedding_length",
        ),
        (SHAPE | {"attention.head_count_kv": [2, 0, 2, 2]}, "one llama.attention.head_count_kv for all layers"),
        (
            SHAPE | {"attention.value_length": 64},
            "llama.attention.value_length equal to the length of keys, 32; got 64",
        ),
    ],
    ids=["one field", "three fields", "layers differ", "values differ"],
)
def test_a_gguf_file_without_the_fields_is_bad_usage_that_names_them(
    fields: dict[str, Any], says: str, tmp_path: Path
) -> None:
    result = run("--gguf", str(write_gguf(tmp_path / "model.gguf", fields)))
    assert result.exit_code == 2
    assert says in said(result)


@pytest.mark.parametrize("keep", [0, 3, 40, 150])
def test_what_is_no_gguf_file_is_bad_usage(keep: int, tmp_path: Path) -> None:
    whole = write_gguf(tmp_path / "model.gguf", SHAPE).read_bytes()
    part = tmp_path / "part.gguf"
    part.write_bytes(whole[:keep] or b"nothing of the kind, but long enough to have a header")
    result = run("--gguf", str(part))
    assert result.exit_code == 2, result.output
    assert "gguf must be a GGUF file" in said(result)


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (["--model", "llama-9"], 2, "model must be one of Llama-2-7B-8KV, Llama-2-7B"),
        (["--model", "llama-2-7b", "--gguf", "x"], 2, "model and gguf must not both be given"),
        (["--gguf", "no-such.gguf"], 1, "No such file or directory: 'no-such.gguf'"),
        (["--quantizer", "nf4"], 2, "quantizer must be group, hqq, awq, got 'nf4'"),
        (["--quantizer", "group", "--dtype", "float32"], 2, "quantizer must be None for dtype float32, got 'group'"),
        (
            ["--model", "smollm2-135m", "--quantizer", "hqq:group_size=128"],
            2,
            "multiple of the quantizer's group of 128",
        ),
        (["--window", "4", "--sink-tokens", "4"], 2, "sink_tokens must be 0 to 3, got 4"),
        (["--page-size", "100"], 2, "page_size must be a power of two, got 100"),
        (["--dtype", "int2"], 2, "Invalid value for '--dtype'"),
        (["--context", "0"], 2, "Invalid value for '--context'"),
    ],
)
def test_what_cannot_be_is_named(arguments: list[str], status: int, says: str) -> None:
    result = run(*arguments)
    assert result.exit_code == status
    assert says in said(result)


def test_a_dtype_that_no_cache_has_is_refused():
    with pytest.raises(ValueError, match="dtype must be float32, float16, bfloat16, int8 or int4, got 'float64'"):
        cache_size(find_model("Llama-3-8B"), Storage("float64"), ring_layout(4096, 0, 64, 0))

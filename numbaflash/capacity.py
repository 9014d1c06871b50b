"""How much memory a KV cache takes, how many sessions a GPU holds, and what quantization saves.

Bytes are those of `RingKVCache`, to the byte: `cache.size` reckons them for both.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from .cache.layout import RingLayout
from .cache.page_format import BITS
from .cache.size import layer_nbytes
from .hardware import Hardware

__all__ = ["MODELS", "STORAGES", "CacheSize", "ModelShape", "Storage", "cache_size", "find_model", "read_gguf"]

_HALF = 2  # bytes of a weight


@dataclass(frozen=True)
class ModelShape:
    """What of a model its cache depends on.

    Attributes:
        name: Of the model.
        num_layers: Layers that attend.
        kv_heads: Heads of keys and values.
        head_dim: Elements of a key and of a value.
        context: Tokens that it was trained on.
        weight_nbytes: Bytes of its weights.
    """

    name: str
    num_layers: int
    kv_heads: int
    head_dim: int
    context: int
    weight_nbytes: int


# From config.json and the number of parameters in each model's repository, in 16 bits.
MODELS = (
    # 8 KV heads make LLaMA-2-7B's 32 layers the standard example of 128 KiB a token. There is no such model: its K and
    # V projections have three quarters fewer weights.
    ModelShape("Llama-2-7B-8KV", 32, 8, 128, 4096, _HALF * (6_738_415_616 - 2 * 32 * 4096 * (32 - 8) * 128)),
    ModelShape("Llama-2-7B", 32, 32, 128, 4096, _HALF * 6_738_415_616),
    ModelShape("Llama-3-8B", 32, 8, 128, 8192, _HALF * 8_030_261_248),
    ModelShape("Llama-3-70B", 80, 8, 128, 8192, _HALF * 70_553_706_496),
    ModelShape("Mistral-7B", 32, 8, 128, 32768, _HALF * 7_248_023_552),  # v0.3; v0.1 has a window of 4096
    ModelShape("Qwen2.5-7B", 28, 4, 128, 32768, _HALF * 7_615_616_512),
    ModelShape("SmolLM2-135M", 30, 3, 64, 8192, _HALF * 134_515_008),
)


def find_model(name: str) -> ModelShape:
    """Return the preset of that name, in capitals or not.

    Raises:
        ValueError: There is none.
    """
    for model in MODELS:
        if model.name.lower() == name.lower():
            return model
    raise ValueError(f"model must be one of {', '.join(model.name for model in MODELS)}; got {name!r}")


def read_gguf(path: str | os.PathLike[str]) -> ModelShape:
    """Read a model's shape from a GGUF file; its weights are as large as the file has them.

    Raises:
        ModuleNotFoundError: gguf is not installed.
        OSError: The file cannot be read.
        ValueError: It is no GGUF file, lacks fields, or its layers differ.
    """
    import gguf

    try:
        reader = gguf.GGUFReader(path)
    except (ValueError, IndexError, KeyError) as error:
        raise ValueError(f"gguf must be a GGUF file, {os.fspath(path)} is not: {error}") from None
    fields = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("tokenizer.")}
    return shape_of_fields(fields, sum(int(tensor.n_bytes) for tensor in reader.tensors))


def shape_of_fields(fields: Mapping[str, Any], weight_nbytes: int) -> ModelShape:
    """Return the shape that a GGUF file's metadata gives, by the keys of GGUF's specification.

    Raises:
        ValueError: Fields are missing, or layers differ.
    """
    if "general.architecture" not in fields:
        raise ValueError("gguf must have the field general.architecture")
    kind = fields["general.architecture"]
    heads, kv_heads = f"{kind}.attention.head_count", f"{kind}.attention.head_count_kv"
    key_length, value_length = f"{kind}.attention.key_length", f"{kind}.attention.value_length"
    needed = [f"{kind}.block_count", f"{kind}.context_length", heads]
    if key_length not in fields:
        needed.append(f"{kind}.embedding_length")
    missing = [name for name in needed if name not in fields]
    if missing:
        raise ValueError(f"gguf must have the fields {', '.join(missing)}")
    q_heads = _same_for_all_layers(heads, fields[heads])
    head_dim = int(fields[key_length]) if key_length in fields else int(fields[f"{kind}.embedding_length"]) // q_heads
    if int(fields.get(value_length, head_dim)) != head_dim:
        raise ValueError(
            f"gguf must have {value_length} equal to the length of keys, {head_dim}; got {fields[value_length]}"
        )
    return ModelShape(
        name=str(fields.get("general.name", kind)),
        num_layers=int(fields[f"{kind}.block_count"]),
        kv_heads=_same_for_all_layers(kv_heads, fields.get(kv_heads, q_heads)),
        head_dim=head_dim,
        context=int(fields[f"{kind}.context_length"]),
        weight_nbytes=weight_nbytes,
    )


def _same_for_all_layers(name: str, value: Any) -> int:
    """A number, which newer files may give for each layer."""
    different = set(value) if isinstance(value, list) else {value}
    if len(different) != 1:
        raise ValueError(f"gguf must have one {name} for all layers, got {value}")
    return int(different.pop())


@dataclass(frozen=True)
class Storage:
    """How a cache stores its tokens.

    Attributes:
        dtype: Storage dtype of `RingKVCache`.
        quantizer: Of int8 and int4, by its text; None where dtype is a float.
    """

    dtype: str
    quantizer: str | None = None

    def __post_init__(self) -> None:
        """Check them against each other."""
        if self.dtype not in BITS and self.quantizer is not None:
            raise ValueError(f"quantizer must be None for dtype {self.dtype}, got {self.quantizer!r}")

    @property
    def name(self) -> str:
        """Both."""
        return f"{self.dtype} {self.quantizer or ''}".strip()


# Those that are always shown; hqq takes as much as group.
STORAGES = (Storage("float16"), Storage("int8", "group"), Storage("int4", "group"))


@dataclass(frozen=True)
class CacheSize:
    """Bytes of a session's cache, all layers together.

    Attributes:
        token: Of a token in the storage dtype, its share of the scales included.
        session: Of all pages once the ring is full, which is what a session reserves: `RingKVCache.max_nbytes`.
    """

    token: Fraction
    session: int

    def sessions_on(self, hardware: Hardware, weight_nbytes: int) -> int:
        """Return how many sessions fit beside the weights; nothing is set aside for activations."""
        return max(hardware.memory - weight_nbytes, 0) // self.session


def cache_size(model: ModelShape, storage: Storage, layout: RingLayout) -> CacheSize:
    """Return the bytes of one session.

    Raises:
        ValueError: There is no such quantizer, or its group does not divide the model's head_dim.
    """
    layer = layer_nbytes(model.kv_heads, model.head_dim, layout, storage.dtype, storage.quantizer)
    return CacheSize(model.num_layers * layer.token, model.num_layers * layer.total)

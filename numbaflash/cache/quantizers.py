"""Quantizers: from pages of keys and values in 16 bits to codes of 8 or 4.

All of them give an element as scale * code + offset, and differ in how they choose scale and offset. By channel, each
channel of a page's keys has one of both for all its tokens (KIVI, section 3: some channels of keys are always large);
by token, each group of a token's consecutive elements has its own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ..arrays import as_numpy
from ..cpu.encode import transpose, widen
from ..cpu.fit import half_quadratic, squared_errors
from ..problem import DTYPES
from .channel_scales import ROTARY, Seen, search_channel_scales
from .page_format import BITS, GROUP_SIZES, PageFormat, inverses_of, offsets_of

__all__ = ["AWQQuantizer", "GroupQuantizer", "HQQQuantizer", "Quantizer", "quantizer_of"]

_Floats = NDArray[np.float32]

# Turns of the half-quadratic splitting: after 12 no group's error falls by more than a thousandth.
_ROUNDS = 12


@dataclass(frozen=True)
class Quantizer(ABC):
    """How scales and offsets are chosen.

    Args:
        group_size: Consecutive elements of a token that share a scale: 32, 64 or 128, and a divisor of head_dim. None:
            64, or 32 where that does not divide it.
        symmetric: No offsets: codes lie around 0, half the bytes for scales.
        keys: "channel": one scale for each channel of a page's keys; "token": groups, as values have them.

    Attributes:
        name: By which it is chosen.
    """

    group_size: int | None = None
    symmetric: bool = False
    keys: str = "channel"

    name: ClassVar[str]

    def __post_init__(self) -> None:
        """Check the arguments."""
        if self.group_size is not None and (
            not isinstance(self.group_size, (int, np.integer)) or self.group_size not in GROUP_SIZES
        ):
            raise ValueError(f"group_size must be {', '.join(map(str, GROUP_SIZES))} or None, got {self.group_size!r}")
        if not isinstance(self.symmetric, bool):
            raise TypeError(f"symmetric must be a bool, got {type(self.symmetric).__name__}")
        if self.keys not in ("channel", "token"):
            raise ValueError(f"keys must be 'channel' or 'token', got {self.keys!r}")

    @property
    def text(self) -> str:
        """The quantizer as `quantizer_of` reads it, such as "group:group_size=32,keys=token"."""
        options = [
            f"{option.name}={getattr(self, option.name)}".removesuffix("=True")
            for option in fields(Quantizer)
            if getattr(self, option.name) != option.default
        ]
        return ":".join([self.name, *([",".join(options)] if options else [])])

    def page_format(self, dtype: str, kv_heads: int, page_size: int, head_dim: int) -> PageFormat:
        """Return what a page of such codes looks like.

        Args:
            dtype: "int8" or "int4".
            kv_heads: Heads of keys and values.
            page_size: Tokens of a page.
            head_dim: Elements of a key and of a value.

        Raises:
            ValueError: The group does not divide head_dim.
        """
        size = self.group_size or (32 if head_dim % 64 else 64)
        if head_dim % size:
            raise ValueError(f"head_dim must be a multiple of the quantizer's group of {size}, got {head_dim}")
        return PageFormat(
            bits=BITS[dtype],
            key_group=0 if self.keys == "channel" else size,
            value_group=size,
            symmetric=self.symmetric,
            kv_heads=kv_heads,
            page_size=page_size,
            head_dim=head_dim,
        )

    @property
    def folding(self) -> _Floats | None:
        """Channel scales (num_layers, Hkv, D) that multiply keys and divide queries; None: there are none."""
        return None

    def check_model(self, num_layers: int, kv_heads: int, head_dim: int) -> None:
        """Raise ValueError where the channel scales are of another model."""
        if self.folding is not None and self.folding.shape != (num_layers, kv_heads, head_dim):
            raise ValueError(
                f"channel_scales must have shape (num_layers, Hkv, D) = {(num_layers, kv_heads, head_dim)}, "
                f"got {self.folding.shape}"
            )

    def fold_keys(self, layer: int, keys: NDArray[Any]) -> NDArray[Any]:
        """Return keys (..., Hkv, D) as the cache is to hold them: times channel scales float32, else themselves."""
        return keys if self.folding is None else keys * self.folding[layer]

    def fold_queries(self, layer: int, queries: NDArray[Any]) -> NDArray[Any]:
        """Return queries (..., Hq, D) as they are to meet what `fold_keys` returned."""
        if self.folding is None:
            return queries
        kv_heads, head_dim = self.folding.shape[1:]
        grouped = queries.reshape(*queries.shape[:-2], kv_heads, queries.shape[-2] // kv_heads, head_dim)
        folded: NDArray[Any] = (grouped / self.folding[layer][:, None]).reshape(queries.shape)
        return folded

    def pack(
        self, page_format: PageFormat, keys: NDArray[np.float16], values: NDArray[np.float16]
    ) -> NDArray[np.uint8]:
        """Quantize whole pages, (pages, page_size, Hkv, D) each and finite, to (pages, page_nbytes).

        A page's bytes depend on its own content alone.
        """
        pages = np.empty((len(keys), page_format.page_nbytes), np.uint8)
        groups = page_format.key_group, page_format.value_group
        for part, x, group in zip(page_format.parts(pages), (keys, values), groups, strict=True):
            wide = _widened(x)
            scales, offsets = self._parameters(wide, page_format.bits, group)
            page_format.write_part(part, wide, group, scales, offsets)
        return pages

    @abstractmethod
    def fit(self, x: _Floats, top: int) -> tuple[_Floats, _Floats]:
        """Choose scales and offsets, which will be rounded to float16.

        Args:
            x: (batch, size, groups), finite.
            top: Largest code; the smallest is 0.

        Returns:
            (batch, groups) each. Where the quantizer is symmetric, offsets are not looked at.
        """

    def dequantized(self, x: _Floats, bits: int, group: int) -> _Floats:
        """Return what (tokens, Hkv, D) become once they were quantized by groups of so many elements of a token."""
        scales, offsets = self._parameters(x[None], bits, group)
        zeros = offsets_of(scales, offsets, bits)[..., None]
        steps = (x.reshape(*scales.shape, group) - zeros) * inverses_of(scales)[..., None]
        codes = np.clip(np.rint(steps), 0, 2**bits - 1)
        elements: _Floats = scales.astype(np.float32)[..., None] * codes + zeros
        return elements.reshape(x.shape)

    def _parameters(self, x: _Floats, bits: int, group: int) -> tuple[NDArray[np.float16], NDArray[np.float16] | None]:
        """Scales and offsets of (pages, tokens, Hkv, D), contiguous, as `PageFormat.write_part` takes them."""
        pages, tokens, kv_heads, head_dim = x.shape
        shape: tuple[int, ...] = pages, kv_heads, head_dim
        grouped = x.reshape(pages, tokens, -1)
        if group:
            shape, grouped = (pages, tokens, kv_heads, head_dim // group), _transposed(x.reshape(-1, group))[None]
        scales, offsets = _rounded(self.fit(grouped, 2**bits - 1))
        return scales.reshape(shape), None if self.symmetric else offsets.reshape(shape)


@dataclass(frozen=True)
class GroupQuantizer(Quantizer):
    """The range of each group, from its smallest element to its largest, in equal steps."""

    name: ClassVar[str] = "group"

    def fit(self, x: _Floats, top: int) -> tuple[_Floats, _Floats]:
        """Take the range; where symmetric, that of the magnitudes."""
        low, high = x.min(axis=1), x.max(axis=1)
        if self.symmetric:
            return np.maximum(-low, high) / np.float32(top - _middle(top)), low
        return (high - low) / np.float32(top), low


@dataclass(frozen=True)
class HQQQuantizer(Quantizer):
    """Half-quadratic quantization: from the range on, offsets (scales, if symmetric) that leave most elements nearer.

    Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning Models" (2023); it needs no calibration.
    Beside an offset, the scale stays that of the range: a smaller one lowers the squared error, but cuts off the few
    elements that are far out, and perplexity rises (benchmarks/kv_quality.py: by 1.04 % instead of 0.62 %).
    """

    name: ClassVar[str] = "hqq"

    def fit(self, x: _Floats, top: int) -> tuple[_Floats, _Floats]:
        """Improve on the range of each group; where the squared error has not fallen, keep it."""
        first = GroupQuantizer(symmetric=self.symmetric).fit(x, top)
        scales, offsets = (part.copy() for part in first)
        middle = np.float32(_middle(top) if self.symmetric else 0)
        half_quadratic(x, scales, offsets, np.float32(top), middle, self.symmetric, _ROUNDS)
        fits = [_rounded(fit) for fit in (first, (scales, offsets))]
        errors = [_errors(x, top, s, None if self.symmetric else o) for s, o in fits]
        better = errors[1] < errors[0]
        (old_scales, old_offsets), (new_scales, new_offsets) = fits
        return np.where(better, new_scales, old_scales), np.where(better, new_offsets, old_offsets)


@dataclass(frozen=True, eq=False)
class AWQQuantizer(HQQQuantizer):
    """Activation-aware quantization of keys: channels that queries look at are made large before they are quantized.

    Lin et al., "AWQ: Activation-aware Weight Quantization" (2023), section 3, with a key in the place of a weight. The
    cache holds keys times channel scales, and queries come divided by them, so a kernel has nothing to do. A factor of
    a channel means nothing where each channel has a scale of its own, so keys go by token. Groups are fitted as by hqq.

    Args:
        group_size: As in `Quantizer`.
        symmetric: As in `Quantizer`.
        keys: "token".
        channel_scales: (num_layers, Hkv, D) float32, positive; `search` finds them.
    """

    keys: str = "token"
    channel_scales: _Floats = field(kw_only=True, repr=False)

    name: ClassVar[str] = "awq"

    def __post_init__(self) -> None:
        """Check the arguments."""
        super().__post_init__()
        if self.keys != "token":
            raise ValueError(
                f"keys must be 'token' for awq: a channel's own scale undoes its factor; got {self.keys!r}"
            )
        scales = as_numpy(self.channel_scales, "channel_scales")
        if scales.dtype.kind != "f" or scales.ndim != 3:
            raise ValueError(
                f"channel_scales must be floats of shape (num_layers, Hkv, D), got {scales.dtype} {scales.shape}"
            )
        with np.errstate(over="ignore"):
            own = np.array(scales, np.float32, order="C")  # keys that a cache holds have been multiplied by these
        if not (np.isfinite(own) & (own > 0)).all():
            raise ValueError("channel_scales must be positive and finite in float32")
        own.flags.writeable = False
        object.__setattr__(self, "channel_scales", own)

    def __eq__(self, other: object) -> bool:
        """Whether the other has the same options and scales."""
        return (
            isinstance(other, AWQQuantizer)
            and self.text == other.text
            and np.array_equal(self.channel_scales, other.channel_scales)
        )

    def __hash__(self) -> int:
        """Of the options and scales."""
        return hash((self.text, self.channel_scales.tobytes()))

    @classmethod
    def search(
        cls,
        q: Any,
        k: Any,
        *,
        rotary: str | None = None,
        sink_tokens: int = 0,
        page_size: int = 64,
        dtype: str = "int4",
        group_size: int | None = None,
        symmetric: bool = False,
    ) -> AWQQuantizer:
        """Search the channel scales that change the attention of sample queries least.

        Args:
            q: (num_layers, T, Hq, D) queries of one text, as they would come to `step`.
            k: (num_layers, T, Hkv, D) its keys. 1,000 tokens serve well, a few hundred fit themselves alone.
            rotary: Which channels the model's rotary positions turn together, for they must share a scale:
                "adjacent" (2j and 2j + 1: GGUF's llama), "halves" (j and j + D / 2: transformers), None where none are.
            sink_tokens: Of the cache that the scales are for, like the next two.
            page_size: Tokens of a page.
            dtype: Storage dtype.
            group_size: As in `Quantizer`.
            symmetric: As in `Quantizer`.

        Raises:
            TypeError: No arrays of floats.
            ValueError: Wrong shapes, NaN or infinities, no such `rotary` or `dtype`, too few tokens for any to become
                codes, or the group does not divide D.
        """
        queries, keys = as_numpy(q, "q"), as_numpy(k, "k")
        _check_samples(queries, keys)
        if dtype not in BITS:
            raise ValueError(f"dtype must be {' or '.join(BITS)}, got {dtype!r}")
        if rotary not in ROTARY:
            raise ValueError(f"rotary must be {', '.join(map(repr, ROTARY))}, got {rotary!r}")
        seen = Seen(sink_tokens, page_size)
        fitter = HQQQuantizer(group_size, symmetric, "token")
        page_format = fitter.page_format(dtype, keys.shape[2], page_size, keys.shape[3])
        if keys.shape[1] <= sink_tokens + page_size:
            raise ValueError(
                f"k must have more tokens than sinks and a page, {sink_tokens} + {page_size}; got {keys.shape[1]}"
            )

        def dequantize(x: _Floats) -> _Floats:
            return fitter.dequantized(x, page_format.bits, page_format.key_group)

        scales = [
            search_channel_scales(
                queries[layer].astype(np.float32), keys[layer].astype(np.float32), dequantize, seen, rotary
            )
            for layer in range(len(keys))
        ]
        return cls(group_size, symmetric, channel_scales=np.stack(scales))

    @property
    def folding(self) -> _Floats:
        """The channel scales."""
        return self.channel_scales


_BY_NAME = {kind.name: kind for kind in (GroupQuantizer, HQQQuantizer, AWQQuantizer)}


def quantizer_of(text: str, channel_scales: Any = None) -> Quantizer:
    """Return the quantizer that a text names: "hqq", or with options, "group:group_size=32,symmetric,keys=token".

    Args:
        text: Name and options.
        channel_scales: As in `AWQQuantizer`, for "awq" alone.

    Raises:
        ValueError: There is no such quantizer or option, or what it takes is missing.
    """
    name, _, listed = text.partition(":")
    if name not in _BY_NAME:
        raise ValueError(f"quantizer must be {', '.join(_BY_NAME)}, got {name!r}")
    options: dict[str, Any] = {}
    for option in filter(None, listed.split(",")):
        key, _, value = option.partition("=")
        if key == "group_size" and value.isdecimal():
            options[key] = int(value)
        elif option == "symmetric":
            options[key] = True
        elif key == "keys":
            options[key] = value
        else:
            raise ValueError(f"quantizer's options must be group_size=N, symmetric and keys=..., got {option!r}")
    if name == AWQQuantizer.name:
        if channel_scales is None:
            raise ValueError("quantizer 'awq' takes channel_scales; AWQQuantizer.search(q, k) finds them")
        return AWQQuantizer(**options, channel_scales=channel_scales)
    if channel_scales is not None:
        raise ValueError(f"channel_scales go with quantizer 'awq', got {name!r}")
    return _BY_NAME[name](**options)


def _middle(top: int) -> int:
    """The symmetric code of 0."""
    return (top + 1) // 2


def _rounded(fit: tuple[_Floats, _Floats]) -> tuple[NDArray[np.float16], NDArray[np.float16]]:
    scales, offsets = fit
    with np.errstate(over="ignore"):  # one that is infinite then errs more than that of the range
        return scales.astype(np.float16), offsets.astype(np.float16)


def _errors(x: _Floats, top: int, scales: NDArray[np.float16], offsets: NDArray[np.float16] | None) -> _Floats:
    """Sums of squared errors of (batch, size, groups), for each group."""
    errors = np.empty(scales.shape, np.float32)
    zeros = offsets_of(scales, offsets, top.bit_length())
    squared_errors(x, scales.astype(np.float32), zeros, np.float32(top), errors)
    return errors


def _widened(x: NDArray[np.float16]) -> _Floats:
    """float32, in one piece."""
    source = np.ascontiguousarray(x)
    wide = np.empty(x.shape, np.float32)
    widen(source.ctypes.data, x.size, wide.ctypes.data)
    return wide


def _transposed(x: _Floats) -> _Floats:
    source = np.ascontiguousarray(x)
    rows, columns = x.shape
    turned = np.empty((columns, rows), np.float32)
    transpose(source.ctypes.data, rows, columns, turned.ctypes.data)
    return turned


def _check_samples(q: NDArray[Any], k: NDArray[Any]) -> None:
    for name, samples in (("q", q), ("k", k)):
        if samples.dtype not in (*DTYPES, np.dtype(np.float64)):
            raise TypeError(f"{name} must be floating point, got {samples.dtype}")
        if samples.ndim != 4 or not samples.size:
            raise ValueError(f"{name} must have shape (num_layers, tokens, heads, head_dim), got {samples.shape}")
        if not np.isfinite(np.float32(samples)).all():
            raise ValueError(f"{name} must be finite, got NaN or infinities")
    if q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise ValueError(f"q must have k's layers, tokens and head_dim {k.shape}, got {q.shape}")
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"q must have a multiple of k's {k.shape[2]} heads, got {q.shape[2]}")

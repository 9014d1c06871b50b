"""Hugging Face transformers: `attn_implementation="numbaflash"`, and caches for `generate()`.

`register()` makes both functions known that transformers asks for by that name: one that attends, and one that makes
masks. The second matters: without it transformers makes no mask at all, and padding would be lost in silence.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import causal_mask_function, sdpa_mask
from transformers.utils import generic
from transformers.utils.import_utils import is_tracing

from ..flash_attn.gradients import forward_only
from .caches import RingCache, ServiceCache, Ticket
from .torch import attention_heads_first

__all__ = ["RingCache", "ServiceCache", "register"]

NAME = "numbaflash"
# What a module that says nothing of its sliding window passes, as told from one that says it has none.
_NOT_SAID: Any = object()


def register() -> None:
    """Make `attn_implementation="numbaflash"` known to transformers; calling it again changes nothing."""
    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, _make_mask)
    _tell_from_flash_attn()


@functools.cache
def _tell_from_flash_attn() -> None:
    """Keep transformers from taking us for flash-attn, as it does with every name that has "flash" in it.

    It would look for flash-attn's functions when a model is made, replace us where a model names the versions of
    flash-attn that it works with, and refuse chunked attention. There is no public way to tell it.
    """
    takes_for_flash_attn = generic.is_flash_attention_requested

    @functools.wraps(takes_for_flash_attn)
    def is_flash_attention_requested(
        config: Any = None,
        requested_attention_implementation: str | None = None,
        version: int | list[int] | None = None,
    ) -> bool:
        name = requested_attention_implementation if config is None else config._attn_implementation
        return name != NAME and bool(takes_for_flash_attn(config, requested_attention_implementation, version))

    for module in list(sys.modules.values()):
        names = getattr(module, "__dict__", {})
        if names.get("is_flash_attention_requested") is takes_for_flash_attn:
            names["is_flash_attention_requested"] = is_flash_attention_requested


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = _NOT_SAID,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    is_causal: bool | None = None,
    position_bias: torch.Tensor | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    **_others: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function: tensors are (batch, heads, tokens, head_dim), and the output has tokens before heads.

    A mask of None means what `_make_mask` means by it: causality and the module's window, or everything, say it all.
    """
    if dropout:
        raise ValueError(f'attention dropout must be 0, got {dropout}: call model.eval(), or train with "sdpa"')
    if position_bias is not None:
        raise ValueError('a learned position bias is not supported: load this model with attn_implementation="sdpa"')
    if cu_seq_lens_q is not None:
        raise ValueError(
            "sequences packed by cu_seq_lens_q are not supported: pass position_ids that start anew for each, "
            'or load this model with attn_implementation="sdpa"'
        )
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    window = None if sliding_window is _NOT_SAID else sliding_window
    if isinstance(key, Ticket):
        if not causal:
            raise ValueError(f"a ring of keys is causal, and {type(module).__name__} is not: use another cache")
        valid = None
        if attention_mask is not None:
            valid = _tokens_that_see_themselves(attention_mask, window).expand(len(query), -1)
        query, key.new_keys, key.new_values = _as_autocast_has_them(query, key.new_keys, key.new_values)
        options = {
            "scale": scaling,
            "softcap": softcap or 0.0,
            "sink_logits": None if s_aux is None else s_aux.detach(),
        }
        out = forward_only(
            lambda: key.cache.step(key, query, valid, module.config, window, **options),
            *(query, key.new_keys, key.new_values),
        )
        return out, None

    kv_tokens = key.shape[2]
    bias, window_left, window_right = attention_mask, None, None
    if attention_mask is not None:
        bias = attention_mask[..., :kv_tokens]
        if bias.dtype not in (torch.bool, query.dtype):
            bias = bias.float()
    elif causal:
        window_right = 0
        if window is not None:
            window_left = window - 1
        elif sliding_window is _NOT_SAID and kv_tokens > (getattr(module.config, "sliding_window", None) or kv_tokens):
            raise ValueError(
                f'{type(module).__name__} does not say its sliding window: load it with attn_implementation="sdpa"'
            )
    out = attention_heads_first(
        *_as_autocast_has_them(query, key, value),
        scale=scaling,
        window=(window_left, window_right),
        softcap=softcap or 0.0,
        bias=bias,
        sink_logits=s_aux,
    )
    return out, None


def _as_autocast_has_them(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Cast as autocast does for PyTorch's own attention; rotary positions leave queries and keys in float32."""
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return tensors
    return tuple(tensor.to(torch.get_autocast_dtype(kind)) for tensor in tensors)


def _make_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    **others: Any,
) -> torch.Tensor | None:
    """The mask function: None where the kernels' own causality and window say it all, else bool (batch, 1, q, kv)."""
    if _has_no_padding(attention_mask, kv_offset, kv_length):
        if allow_is_bidirectional_skip and local_size is None:
            return None
        ends_with_the_last_query = (
            not isinstance(q_offset, torch.Tensor) and q_offset + q_length == kv_offset + kv_length
        )
        if allow_is_causal_skip and ends_with_the_last_query and _is_window(mask_function, local_size):
            return None
    mask: torch.Tensor | None = sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,  # type: ignore[arg-type]  # an int by its annotation, a tensor with a StaticCache
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        local_size=local_size,
        allow_is_causal_skip=False,
        allow_is_bidirectional_skip=False,
        **others,
    )
    return mask


def _has_no_padding(attention_mask: torch.Tensor | None, kv_offset: int, kv_length: int) -> bool:
    if attention_mask is None:
        return True
    if is_tracing(attention_mask):  # its values are not to be had
        return False
    seen = attention_mask[:, kv_offset : kv_offset + kv_length]
    return seen.shape[1] == kv_length and bool(seen.all())


def _is_window(mask_function: Callable[..., Any], local_size: int | None) -> bool:
    """Whether a local mask is a sliding window, and no chunks: a query sees `local_size` keys, wherever it stands."""
    if local_size is None:
        return True
    first = torch.zeros(3, dtype=torch.long)
    queries, keys = torch.tensor([0, 0, 1]) + local_size, torch.tensor([0, 1, 1])
    return bool((mask_function(first, first, queries, keys) == torch.tensor([False, True, False])).all())


def _tokens_that_see_themselves(mask: torch.Tensor, window: int | None) -> torch.Tensor:
    """The step's tokens that are no padding, (batch, tokens) bool, from a mask (batch, heads, tokens, all tokens seen).

    Raises:
        ValueError: Such a token does not see just those before it, in the window, that are no padding either; or the
            mask adds something to scores.
    """
    may_see = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    tokens, seen = mask.shape[2:]
    step = may_see[..., seen - tokens :]
    valid = step[:, 0].diagonal(dim1=1, dim2=2)
    token = torch.arange(tokens, device=mask.device)
    before = token[:, None] - token
    ring_shows = (before >= 0) & (before < (window or seen)) & valid[:, None, None]
    adds = mask.dtype != torch.bool and bool(mask[may_see].any())
    if adds or ((step != ring_shows) & valid[:, None, :, None]).any():
        raise ValueError(
            "a ring of keys is causal and hides nothing but padding, attention_mask asks for more: use another cache"
        )
    return valid

"""PyTorch: `numbaflash::attention` as a custom operator, and `sdpa` in the place of scaled_dot_product_attention.

Importing this module registers the operator. `torch.compile(fullgraph=True)` keeps a call of it in one piece.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from .. import api, cpu
from ..arrays import as_numpy
from ..backends import choose_backend
from ..problem import MAX_HEAD_DIM, check_window, describe

__all__ = ["attention", "attention_heads_first", "sdpa"]

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_PLAIN = (torch.Tensor, torch.nn.Parameter)
_THREADS = cpu.threads_for(torch.empty(0, device="cpu"))


# Defined by hand: `torch.library.custom_op` wraps each call in 25 us of checks, this in 15. Torch has no types for it.
_LIBRARY = torch.library.Library("numbaflash", "DEF")  # type: ignore[no-untyped-call]
_LIBRARY.define(  # type: ignore[no-untyped-call]
    "attention(Tensor q, Tensor k, Tensor v, float? scale=None, bool causal=False, int? window_left=None, "
    "int? window_right=None, float softcap=0.0, Tensor? bias=None, Tensor? alibi_slopes=None, "
    'Tensor? sink_logits=None, Tensor? kv_lengths=None, str algorithm="v2") -> (Tensor out, Tensor lse)'
)


@torch.library.impl(_LIBRARY, "attention", "CompositeExplicitAutograd")
def _compute(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float | None = None,
    causal: bool = False,
    window_left: int | None = None,
    window_right: int | None = None,
    softcap: float = 0.0,
    bias: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    sink_logits: torch.Tensor | None = None,
    kv_lengths: torch.Tensor | None = None,
    algorithm: api.Algorithm = "v2",
) -> Any:
    return api.attention(
        q,
        k,
        v,
        scale=scale,
        causal=causal,
        window=(window_left, window_right),
        softcap=softcap,
        bias=bias,
        alibi_slopes=alibi_slopes,
        sink_logits=sink_logits,
        kv_lengths=kv_lengths,
        algorithm=algorithm,
        return_lse=True,
    )


@torch.library.register_fake("numbaflash::attention", lib=_LIBRARY)  # type: ignore[untyped-decorator]  # as above
def _describe_result(
    q: torch.Tensor, _k: torch.Tensor, v: torch.Tensor, *_options: Any, **_named: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, tokens, heads, _ = q.shape
    return q.new_empty(batch, tokens, heads, v.shape[3]), q.new_empty(batch, heads, tokens, dtype=torch.float32)


def _refuse_backward(_context: Any, *_gradients: Any) -> Any:
    raise NotImplementedError(
        "numbaflash has no backward pass: call it under torch.no_grad(), or train with "
        "torch.nn.functional.scaled_dot_product_attention"
    )


torch.library.register_autograd("numbaflash::attention", _refuse_backward, lib=_LIBRARY)
_operator = torch.ops.numbaflash.attention.default


def _differentiates_forward() -> bool:
    """Whether forward-mode differentiation is on; PyTorch has no public word for it."""
    return torch.autograd.forward_ad._current_level >= 0


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float | None = None,
    causal: bool = False,
    window: tuple[int | None, int | None] = (None, None),
    softcap: float = 0.0,
    bias: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    sink_logits: torch.Tensor | None = None,
    kv_lengths: torch.Tensor | None = None,
    algorithm: api.Algorithm = "v2",
    return_lse: bool = False,
) -> Any:
    """`numbaflash.attention` as the operator `torch.ops.numbaflash.attention`, which compilers see as one node.

    Arguments, result and errors are `numbaflash.attention`'s, with options as tensors. The forward pass takes tensors
    that require grad; a backward pass through the result raises NotImplementedError.

    Raises:
        NotImplementedError: Within forward-mode differentiation (torch.func.jvp).
        TypeError: An argument has the wrong type or dtype.
        ValueError: An argument has the wrong shape, value or device.
    """
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
        if tensor.device != q.device:
            raise ValueError(f"{name} must be on q's device {q.device}, got {tensor.device}")
        if tensor.dtype != q.dtype:
            raise TypeError(f"{name} must have q's dtype {q.dtype}, got {tensor.dtype}")
    if _differentiates_forward():
        # PyTorch would take the derivative of an operator that has none for 0.
        raise NotImplementedError(
            "numbaflash has no forward-mode derivative: call it outside of torch.func.jvp and dual_level"
        )
    out, lse = _operator(
        q, k, v, scale, causal, *check_window(window), softcap, bias, alibi_slopes, sink_logits, kv_lengths, algorithm
    )
    return (out, lse) if return_lse else out


class sdpa(TorchFunctionMode):  # noqa: N801  # a context manager, written like torch.no_grad
    """Within `with sdpa():`, numbaflash computes `torch.nn.functional.scaled_dot_product_attention`.

    Only calls of the thread that entered are served, from wherever they are made. What numbaflash cannot serve
    (dropout, gradients, other dtypes and devices, head dims over 256) goes to PyTorch, with a warning the first
    time for each reason.
    """

    def __init__(self) -> None:
        super().__init__()
        self._said: set[str] = set()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        _types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Serve a call of scaled_dot_product_attention, and let all others pass."""
        if func is not torch.nn.functional.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        return self._serve_or_leave(*args, **(kwargs or {}))

    def _serve_or_leave(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        reason = _why_not(query, key, value, attn_mask, dropout_p, is_causal, enable_gqa)
        if reason is not None:
            if reason not in self._said:
                self._said.add(reason)
                warnings.warn(f"numbaflash leaves this attention to PyTorch: {reason}", stacklevel=4)
            return torch.nn.functional.scaled_dot_product_attention(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )
        if query.dim() != 4:
            lead = query.shape[:-3]
            query, key, value = (tensor.reshape(-1, *tensor.shape[-3:]) for tensor in (query, key, value))
            if attn_mask is not None and attn_mask.dim() > 3:
                attn_mask = attn_mask.expand(*lead, *attn_mask.shape[-3:]).reshape(-1, *attn_mask.shape[-3:])
            return _serve(query, key, value, attn_mask, is_causal, scale).reshape(*lead, *query.shape[1:3], -1)
        return _serve(query, key, value, attn_mask, is_causal, scale)


def attention_heads_first(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scale: float | None = None,
    window: tuple[int | None, int | None] = (None, None),
    softcap: float = 0.0,
    bias: torch.Tensor | None = None,
    sink_logits: torch.Tensor | None = None,
) -> torch.Tensor:
    """`attention` of tensors (batch, heads, tokens, head_dim), as PyTorch has them; the output has tokens first.

    It goes through the operator only where somebody must see it: the dispatcher takes 15 us.
    """
    watched = _is_watched(query, key, value, bias, sink_logits)
    if not watched and bias is None and sink_logits is None and choose_backend(None, array=query) == "cpu":
        done = _attend_where_they_lie(query, key, value, scale, window, softcap)
        if done is not None:
            return done
    q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    out: torch.Tensor
    if watched:
        out, _ = _operator(q, k, v, scale, False, *window, softcap, bias, None, sink_logits)
    else:
        out = api.attention(q, k, v, scale=scale, window=window, softcap=softcap, bias=bias, sink_logits=sink_logits)
    return out


def _attend_where_they_lie(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float | None,
    window: tuple[int | None, int | None],
    softcap: float,
) -> torch.Tensor | None:
    """`attention_heads_first` of tensors that nobody watches, in host memory, by their addresses alone.

    A model calls it once for each layer of each token, from cold caches: views of tensors, NumPy's views of those, and
    the description of the problem take 80 us of 130 there.

    Returns:
        The output; None where a tensor is more, or less, than numbers at strides.
    """
    tensors = query, key, value
    for tensor in tensors:
        if tensor.layout != torch.strided or tensor.is_nested or not tensor.is_cpu or tensor.is_neg():
            return None
    plan = _plan(
        *(query.dtype, key.dtype, value.dtype),
        *(query.shape, key.shape, value.shape),
        *(query.stride(), key.stride(), value.stride()),
        *(scale, *window, softcap),
    )
    if plan is None or any(tensor.data_ptr() % query.itemsize for tensor in tensors):
        return None
    out = torch.empty(plan.out_shape, dtype=query.dtype, device="cpu")
    lse = torch.empty(plan.lse_shape, dtype=torch.float32, device="cpu")
    arrays = *tensors, out, lse
    with _THREADS:
        cpu.attend_planned(plan, [array.data_ptr() for array in arrays], arrays)
    return out


@functools.lru_cache(maxsize=256, typed=True)
def _plan(
    q_dtype: torch.dtype,
    k_dtype: torch.dtype,
    v_dtype: torch.dtype,
    q_shape: torch.Size,
    k_shape: torch.Size,
    v_shape: torch.Size,
    q_strides: tuple[int, ...],
    k_strides: tuple[int, ...],
    v_strides: tuple[int, ...],
    scale: float | None,
    window_left: int | None,
    window_right: int | None,
    softcap: float,
) -> cpu.Plan | None:
    """The plan for tensors (batch, heads, tokens, head_dim), None where they must be looked at one by one."""
    shapes, strides = (q_shape, k_shape, v_shape), (q_strides, k_strides, v_strides)
    rows_are_contiguous = all(
        len(shape) == 4 and (shape[3] == 1 or stride[3] == 1) for shape, stride in zip(shapes, strides, strict=True)
    )
    if not rows_are_contiguous or not q_dtype == k_dtype == v_dtype or q_dtype not in _DTYPES:
        return None
    dtype = as_numpy(torch.empty(0, dtype=q_dtype, device="cpu"), "q").dtype
    # Only what they look like matters.
    q, k, v = (np.broadcast_to(np.empty((), dtype), shape).swapaxes(1, 2) for shape in shapes)
    problem = describe(q, k, v, scale=scale, window=(window_left, window_right), softcap=softcap)
    in_bytes = (tuple(dtype.itemsize * stride[axis] for axis in (0, 2, 1, 3)) for stride in strides)
    return cpu.plan_tensors(problem, *in_bytes)


def _is_watched(*tensors: torch.Tensor | None) -> bool:
    """Whether autograd, a compiler, a tracer, vmap or a tensor subclass takes part in a call of these tensors."""
    given = [tensor for tensor in tensors if tensor is not None]
    return (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._len_torch_dispatch_stack() > 0  # fake tensors, make_fx, anybody's TorchDispatchMode
        or torch._C._functorch.peek_interpreter_stack() is not None
        or any(type(tensor) not in _PLAIN for tensor in given)
        or (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given))
    )


def _serve(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None,
    is_causal: bool,
    scale: float | None,
) -> torch.Tensor:
    """scaled_dot_product_attention of tensors (batch, heads, tokens, head_dim)."""
    window_right = None
    if is_causal:
        # PyTorch aligns the causal mask to the top left: query i sees key j <= i.
        tokens = query.shape[2]
        key, value = key[:, :, :tokens], value[:, :, :tokens]
        window_right = tokens - key.shape[2]
    out = attention_heads_first(query, key, value, scale=scale, window=(None, window_right), bias=attn_mask)
    return out.transpose(1, 2)


def _why_not(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None,
    dropout_p: float,
    is_causal: bool,
    enable_gqa: bool,
) -> str | None:
    """Why numbaflash cannot serve a call, or None; calls that PyTorch rejects are left to it, too."""
    if dropout_p:
        return "dropout_p is not 0"
    if _differentiates_forward():
        return "forward-mode differentiation is on, and there is no derivative"
    for tensor in (query, key, value) if attn_mask is None else (query, key, value, attn_mask):
        if tensor.requires_grad and torch.is_grad_enabled():
            return "a tensor requires grad, and there is no backward pass (use torch.no_grad())"
        if tensor.layout != torch.strided or tensor.is_nested:
            return "a tensor is nested or sparse"
        if not tensor.is_cpu:
            return f"a tensor is on {tensor.device}, not on the CPU"
        if tensor.is_neg():
            return "a tensor is negated lazily (see torch.resolve_neg)"
    if query.dtype not in _DTYPES or key.dtype != query.dtype or value.dtype != query.dtype:
        return f"dtypes are {query.dtype}, {key.dtype}, {value.dtype}, not the same of float32, float16, bfloat16"
    if attn_mask is not None and attn_mask.dtype not in (torch.bool, torch.float32, query.dtype):
        return f"attn_mask is {attn_mask.dtype}, not bool, float32 or query's dtype"
    if attn_mask is not None and is_causal:
        return "attn_mask and is_causal are both given"
    if query.dim() < 3 or not query.dim() == key.dim() == value.dim():
        return f"tensors have {query.dim()}, {key.dim()} and {value.dim()} axes, not the same number from 3 on"
    return _why_not_shapes(query.shape, key.shape, value.shape, enable_gqa)


def _why_not_shapes(query: torch.Size, key: torch.Size, value: torch.Size, enable_gqa: bool) -> str | None:
    if query[:-3] != key[:-3] or key[:-1] != value[:-1] or query[-1] != key[-1]:
        return f"shapes {tuple(query)}, {tuple(key)}, {tuple(value)} must be broadcast"
    if query[-3] != key[-3] and not (enable_gqa and key[-3] and query[-3] % key[-3] == 0):
        return f"query has {query[-3]} heads and key {key[-3]}, and enable_gqa is {enable_gqa}"
    if not (0 < query[-1] <= MAX_HEAD_DIM and 0 < value[-1] <= MAX_HEAD_DIM):
        return f"head dims are {query[-1]} and {value[-1]}, not 1 to {MAX_HEAD_DIM}"
    if 0 in query or 0 in key:
        return "a tensor is empty"
    return None

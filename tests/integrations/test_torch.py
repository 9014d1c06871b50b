"""The PyTorch operator, and scaled_dot_product_attention computed by numbaflash."""

from __future__ import annotations

import os
import shutil
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812  # as everybody calls it
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import numbaflash
from numbaflash.cpu import solve
from numbaflash.integrations.torch import attention, attention_heads_first, sdpa


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator).to(dtype)


def qkv(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return normal(2, 5, 4, 16, dtype=dtype), normal(2, 9, 2, 16, dtype=dtype), normal(2, 9, 2, 24, dtype=dtype)


OPTIONS = [
    {},
    {"causal": True, "scale": 0.3},
    {"window": (3, 1), "softcap": 2.0},
    {"bias": normal(2, 1, 5, 9), "alibi_slopes": normal(4).abs(), "sink_logits": normal(4)},
    {"kv_lengths": torch.tensor([4, 9])},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options) or "plain")
def test_the_operator_is_attention(options: dict) -> None:
    q, k, v = qkv()
    out, lse = attention(q, k, v, return_lse=True, **options)
    expected, expected_lse = numbaflash.attention(q, k, v, return_lse=True, **options)
    assert torch.equal(out, expected)
    assert torch.equal(lse, expected_lse)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck_is_green(dtype: torch.dtype, requires_grad: bool) -> None:
    tensors = [tensor.requires_grad_(requires_grad) for tensor in qkv(dtype)]
    options = {"causal": True, "softcap": 2.0, "sink_logits": normal(4), "bias": normal(2, 1, 5, 9)}
    tests = ["test_schema", "test_autograd_registration", "test_faketensor"]
    if not requires_grad:  # with gradients it runs a backward pass, which there is not
        tests.append("test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.numbaflash.attention.default, tensors, options, test_utils=tests)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compile_keeps_it_in_one_piece(backend: str) -> None:
    def block(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return attention(q * 2, k, v, causal=True, window=(4, None)).relu() + 1

    q, k, v = qkv()
    compiled = torch.compile(block, fullgraph=True, backend=backend)
    with torch.no_grad():
        torch.testing.assert_close(compiled(q, k, v), block(q, k, v))
        torch.testing.assert_close(compiled(q[:1], k[:1], v[:1]), block(q[:1], k[:1], v[:1]))


CXX = os.environ.get("CXX") or next(filter(shutil.which, ("g++", "clang++")), None)


@pytest.mark.skipif(CXX is None, reason="Inductor, torch.compile's default backend, wants a C++ compiler: none is here")
@pytest.mark.slow  # Inductor and the compiler take 15 s
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Inductor's own imports
def test_the_default_backend_compiles_what_stands_around_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def block(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return attention(q * 2, k, v, causal=True, window=(4, None)).relu() + 1

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    quickly = {"cpp.simdlen": 1, "cpp_cache_precompile_headers": False}  # no search for vector units, no header cache
    compiled = torch.compile(block, fullgraph=True, options=quickly)
    q, k, v = qkv()
    with torch.no_grad():
        torch.testing.assert_close(compiled(q, k, v), block(q, k, v))
    assert list(tmp_path.rglob("*.cpp"))  # the compiler was at work


def test_a_meta_tensor_gives_shapes_and_dtypes() -> None:
    out, lse = attention(*(tensor.to("meta") for tensor in qkv(torch.bfloat16)), return_lse=True)
    assert (out.shape, out.dtype) == ((2, 5, 4, 24), torch.bfloat16)
    assert (lse.shape, lse.dtype) == ((2, 4, 5), torch.float32)


def test_a_backward_pass_says_that_there_is_none() -> None:
    q, k, v = qkv()
    out = attention(q.requires_grad_(), k, v)
    with pytest.raises(NotImplementedError, match="no backward pass"):
        out.sum().backward()


def test_other_devices_and_dtypes_name_both() -> None:
    q, k, v = qkv()
    with pytest.raises(ValueError, match="k must be on q's device cpu, got meta"):
        attention(q, k.to("meta"), v)
    with pytest.raises(TypeError, match=r"v must have q's dtype torch\.float32, got torch\.float16"):
        attention(q, k, v.half())


def test_what_the_operator_cannot_take_is_named() -> None:
    q, k, v = qkv()
    with pytest.raises(TypeError, match=r"k must be a torch\.Tensor, got ndarray"):
        attention(q, k.numpy(), v)  # type: ignore[arg-type]  # the wrong type is what is tested
    with pytest.raises(TypeError, match=r"window must be a pair \(left, right\) of ints or None, got \(1, 2, 3\)"):
        attention(q, k, v, window=(1, 2, 3))  # type: ignore[arg-type]  # likewise
    assert torch.equal(attention(q, k, v, window=(2**70, None)), attention(q, k, v))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # of PyTorch's own formula
def test_forward_derivatives_are_refused_by_the_operator_and_left_to_pytorch_by_sdpa() -> None:
    q, k, v = qkv()
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        torch.func.jvp(lambda x: attention(x, k, v), (q,), (q,))
    q, k, v = heads_first()

    def served(x: torch.Tensor) -> torch.Tensor:
        with sdpa(), pytest.warns(UserWarning, match="forward-mode differentiation is on"):
            return F.scaled_dot_product_attention(x, k, v)

    out, expected = (
        torch.func.jvp(f, (q,), (q,))[1] for f in (served, lambda x: F.scaled_dot_product_attention(x, k, v))
    )
    torch.testing.assert_close(out, expected)
    assert out.any()


def test_a_lazily_negated_tensor_is_left_to_pytorch() -> None:
    q, k, v = heads_first()
    negated = torch.view_as_complex(torch.stack((q, q), -1)).conj().imag
    with sdpa(), pytest.warns(UserWarning, match="negated lazily"):
        out = F.scaled_dot_product_attention(negated, k, v)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(-q, k, v))


def heads_first(q_tokens: int = 6, kv_tokens: int = 6, heads: tuple[int, int] = (4, 4)) -> list[torch.Tensor]:
    return [normal(2, heads[0], q_tokens, 16), normal(2, heads[1], kv_tokens, 16), normal(2, heads[1], kv_tokens, 24)]


@pytest.mark.parametrize(
    ("lengths", "options"),
    [
        ((6, 6), {}),
        ((6, 6), {"scale": 0.1, "is_causal": True}),
        ((3, 7), {"is_causal": True}),  # top-left aligned, unlike numbaflash's own
        ((7, 3), {"is_causal": True}),
        ((6, 9), {"attn_mask": normal(6, 9) > 0}),
        ((6, 9), {"attn_mask": normal(2, 1, 6, 9)}),
        ((6, 9), {"attn_mask": normal(4, 1, 9)}),
    ],
    ids=str,
)
def test_sdpa_computes_what_pytorch_computes(
    lengths: tuple[int, int], options: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    run = solve.run
    monkeypatch.setattr(solve, "run", lambda *args: calls.append(1) or run(*args))
    tensors = heads_first(*lengths)
    expected = F.scaled_dot_product_attention(*tensors, **options)
    with sdpa():
        out = F.scaled_dot_product_attention(*tensors, **options)
    torch.testing.assert_close(out, expected)
    assert len(calls) == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sdpa_groups_heads(dtype: torch.dtype) -> None:
    tensors = [tensor.to(dtype) for tensor in heads_first(heads=(4, 2))]
    expected = F.scaled_dot_product_attention(*(x.float() for x in tensors), is_causal=True, enable_gqa=True)
    with sdpa():
        out = F.scaled_dot_product_attention(*tensors, is_causal=True, enable_gqa=True)
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), expected, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("axes", [3, 5])
def test_sdpa_takes_any_number_of_batch_axes(axes: int) -> None:
    tensors = [tensor[0] if axes == 3 else tensor.reshape(2, 1, *tensor.shape[1:]) for tensor in heads_first()]
    mask = normal(6, 6) > 0 if axes == 3 else normal(2, 1, 1, 6, 6)
    expected = F.scaled_dot_product_attention(*tensors, attn_mask=mask)
    with sdpa():
        torch.testing.assert_close(F.scaled_dot_product_attention(*tensors, attn_mask=mask), expected)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda tensors: ([x.double() for x in tensors], {}), "dtypes are torch.float64"),
        (lambda tensors: (tensors, {"dropout_p": 0.5}), "dropout_p"),
        (lambda tensors: ([x.requires_grad_() for x in tensors], {}), "requires grad"),
        (lambda tensors: ([x.repeat(1, 1, 1, 20) for x in tensors], {}), "head dims are 320"),
        (lambda tensors: ([tensors[0], tensors[1][:1], tensors[2][:1]], {}), "must be broadcast"),
    ],
)
def test_sdpa_leaves_to_pytorch_what_it_cannot_serve_and_says_so_once(change, reason: str) -> None:
    tensors, options = change(heads_first())
    torch.manual_seed(0)
    expected = F.scaled_dot_product_attention(*tensors, **options)
    torch.manual_seed(0)
    with sdpa(), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        out = F.scaled_dot_product_attention(*tensors, **options)
        F.scaled_dot_product_attention(*tensors, **options)
    assert [reason in str(warning.message) for warning in said] == [True]
    assert torch.equal(out, expected)


def test_sdpa_leaves_pytorchs_own_errors_to_pytorch() -> None:
    q, k, v = heads_first(heads=(4, 3))
    with warnings.catch_warnings(), sdpa():
        warnings.simplefilter("ignore")
        with pytest.raises(RuntimeError):
            F.scaled_dot_product_attention(q, k, v)


def test_sdpa_serves_its_own_thread_until_it_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    run = solve.run
    monkeypatch.setattr(solve, "run", lambda *args: calls.append(1) or run(*args))
    tensors = heads_first()
    with sdpa():
        other = threading.Thread(target=lambda: F.scaled_dot_product_attention(*tensors))
        other.start()
        other.join()
    F.scaled_dot_product_attention(*tensors)
    assert calls == []


def bytes_of(x: torch.Tensor) -> bytes:
    return x.contiguous().view(torch.uint8).numpy().tobytes()


LAYOUTS = {
    "tokens first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "every other token": lambda x: x.repeat_interleave(2, dim=2)[:, :, ::2],
    "one head for all": lambda x: x[:, :1].expand(x.shape),
    "rows not contiguous": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "misaligned": lambda x: torch.frombuffer(bytearray(b"x" + bytes_of(x)), dtype=x.dtype, offset=1).view(x.shape),
}


@pytest.mark.parametrize("tokens", [(1, 70), (30, 70)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LAYOUTS)
def test_tensors_of_one_shape_may_lie_in_any_way(name: str, dtype: torch.dtype, tokens: tuple[int, int]) -> None:
    lay = LAYOUTS[name]
    q, k, v = (x.to(dtype) for x in heads_first(*tokens))
    for arrays in ((q, k, v), (lay(q), lay(k), lay(v)), (q, lay(k), v), (q, k, v)):
        expected = F.scaled_dot_product_attention(*(x.float() for x in arrays), enable_gqa=True)
        got = attention_heads_first(*arrays).transpose(1, 2)
        torch.testing.assert_close(got, expected.to(dtype), rtol=1.1 * torch.finfo(dtype).eps, atol=4e-6)


def test_the_default_device_has_no_say() -> None:
    tensors = heads_first(1, 41)
    expected = F.scaled_dot_product_attention(*tensors, enable_gqa=True)
    with torch.device("meta"):
        out = attention_heads_first(*tensors)
    torch.testing.assert_close(out.transpose(1, 2), expected)


def test_a_tensor_that_is_negated_lazily_is_refused() -> None:
    q, k, v = heads_first()
    with pytest.raises(TypeError, match="negative bit"):
        attention_heads_first(torch.complex(k, q).conj().imag, k, v)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"scale": True}, TypeError),
        ({"softcap": -1.0}, ValueError),
        ({"window": (1.0, None)}, TypeError),
        ({"window": (-1, None)}, ValueError),
    ],
)
def test_a_wrong_option_is_refused_though_one_that_equals_it_was_taken(
    change: dict[str, Any], error: type[Exception]
) -> None:
    tensors = heads_first()
    attention_heads_first(*tensors, scale=1.0, softcap=1.0, window=(1, None))
    with pytest.raises(error, match=next(iter(change))):
        attention_heads_first(*tensors, **{"scale": 1.0, "softcap": 1.0, "window": (1, None)} | change)


@pytest.mark.parametrize("shapes", [((2, 4, 6, 16), (2, 3, 6, 16)), ((2, 4, 6, 16), (2, 4, 6, 8)), ((4, 6, 16),) * 2])
def test_wrong_shapes_are_named(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    with pytest.raises(ValueError, match="must have"):
        attention_heads_first(normal(*shapes[0]), normal(*shapes[1]), normal(*shapes[1]))


# Whoever calls, they are seen to: a call that went past them would read memory that is not there, or be a constant.
HEADS_FIRST = [
    pytest.param(lambda q, k, v: attention_heads_first(q, k, v).transpose(-3, -2), id="attention_heads_first"),
    pytest.param(F.scaled_dot_product_attention, id="sdpa"),
]


@pytest.mark.parametrize("call", HEADS_FIRST)
@pytest.mark.filterwarnings("ignore:There is a performance drop")  # vmap takes the batches one by one
def test_vmap_maps_over_it(call: Callable[..., torch.Tensor]) -> None:
    tensors = [torch.stack((x, x + 1, x - 1)) for x in heads_first()]
    expected = F.scaled_dot_product_attention(*tensors)
    with sdpa():
        torch.testing.assert_close(torch.vmap(lambda q, k, v: call(q, k, v))(*tensors), expected)


@pytest.mark.parametrize("call", HEADS_FIRST)
def test_fake_tensors_give_shapes(call: Callable[..., torch.Tensor]) -> None:
    with FakeTensorMode() as mode, sdpa():
        out = call(*(mode.from_tensor(x) for x in heads_first()))
    assert isinstance(out, FakeTensor)
    assert out.shape == (2, 4, 6, 24)


@pytest.mark.parametrize("call", HEADS_FIRST)
def test_a_trace_records_the_operator(call: Callable[..., torch.Tensor]) -> None:
    q, k, v = heads_first()
    with sdpa():
        traced = make_fx(lambda q, k, v: call(q, k, v))(q, k, v)
    assert torch.ops.numbaflash.attention.default in [node.target for node in traced.graph.nodes]
    torch.testing.assert_close(traced(k, q, v), F.scaled_dot_product_attention(k, q, v))


def test_sdpa_serves_a_module_that_knows_nothing_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = torch.nn.TransformerDecoderLayer(32, 4, 64, batch_first=True).train(False)
    x, memory = normal(2, 6, 32), normal(2, 9, 32)
    # Outside of inference the layer calls scaled_dot_product_attention; its fused kernels know no mode.
    monkeypatch.setattr(torch.backends.mha, "get_fastpath_enabled", lambda: False)
    with torch.no_grad():
        expected = layer(x, memory)
        with sdpa():
            torch.testing.assert_close(layer(x, memory), expected)

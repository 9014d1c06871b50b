"""ONNX's Attention and TensorScatter: ONNX's own node tests, and what they leave out."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from onnx.backend.test.runner import Runner
from onnx.reference import ReferenceEvaluator

from numbaflash.integrations.onnx import Attention, TensorScatter, ops

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # some of them overflow on purpose
    from onnx.backend.test.case.node import _NodeTestCases, attention, tensorscatter  # noqa: F401  # they fill the list


def node_tests(op: str) -> list[Any]:
    # What is "expanded" has the operator's parts in its place, which are none of ours.
    return [
        pytest.param(case, id=case.name)
        for case in _NodeTestCases
        if [made.op_type for made in case.model.graph.node] == [op]
    ]


def test_onnxs_own_tests_are_found() -> None:
    assert len(node_tests("Attention")) > 80
    assert {"linear", "circular"} <= {
        attribute.s.decode()
        for parameters in node_tests("TensorScatter")
        for attribute in parameters.values[0].model.graph.node[0].attribute
        if attribute.name == "mode"
    }


def check(case: Any, ours: type, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    run = ours._run
    monkeypatch.setattr(ours, "_run", lambda *args, **named: calls.append(1) or run(*args, **named))
    session = ReferenceEvaluator(case.model, new_ops=ops())
    for inputs, outputs in case.data_sets:
        got = session.run(None, dict(zip(session.input_names, inputs, strict=True)))
        Runner.assert_similar_outputs(outputs, got, rtol=case.rtol, atol=case.atol)
    assert calls


@pytest.mark.parametrize("case", node_tests("Attention"))
def test_onnxs_own_tests_of_attention_pass(case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    check(case, Attention, monkeypatch)


@pytest.mark.parametrize("case", node_tests("TensorScatter"))
def test_onnxs_own_tests_of_tensor_scatter_pass(case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    check(case, TensorScatter, monkeypatch)


def evaluate(op: str, inputs: dict[str, Any], outputs: int = 1, **attributes: Any) -> list[Any]:
    names = [f"out{i}" for i in range(outputs)]
    made = helper.make_node(
        op, [name if value is not None else "" for name, value in inputs.items()], names, **attributes
    )
    graph = helper.make_graph(
        [made],
        "graph",
        [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)
            for name, value in inputs.items()
            if value is not None
        ],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 25)])
    given = {name: value for name, value in inputs.items() if value is not None}
    ours = ReferenceEvaluator(model, new_ops=ops()).run(None, given)
    theirs = ReferenceEvaluator(model).run(None, given)
    for mine, expected in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(mine, expected, rtol=1e-4, atol=1e-5)
    return ours


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape, np.float32)


@pytest.mark.parametrize("opset", [23, 24, 25])
def test_every_opset_is_served(opset: int) -> None:
    assert onnx.defs.get_schema("Attention", opset).since_version == opset
    made = helper.make_node("Attention", ["q", "k", "v"], ["out"], is_causal=1)
    info = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 2, 4, 8]) for name in ("q", "k", "v", "out")]
    model = helper.make_model(
        helper.make_graph([made], "graph", info[:3], info[3:]), opset_imports=[helper.make_opsetid("", opset)]
    )
    session = ReferenceEvaluator(model, new_ops=ops())
    assert type(session.rt_nodes_[0]) is Attention
    assert session.run(None, {name: normal(1, 2, 4, 8) for name in ("q", "k", "v")})[0].shape == (1, 2, 4, 8)


@pytest.mark.parametrize("lengths", [(5, 9), (9, 5), (300, 300)])
@pytest.mark.parametrize("window", [{}, {"left_window_size": 2}, {"left_window_size": 3, "right_window_size": 1}])
@pytest.mark.parametrize("is_causal", [0, 1])
def test_causality_and_windows_start_at_the_first_key(
    lengths: tuple[int, int], window: dict[str, int], is_causal: int
) -> None:
    q, k, v = normal(2, 4, lengths[0], 16), normal(2, 2, lengths[1], 16), normal(2, 2, lengths[1], 8)
    evaluate("Attention", {"q": q, "k": k, "v": v}, is_causal=is_causal, **window)


@pytest.mark.parametrize("mode", range(4))
def test_all_scores_can_be_had_with_all_options(mode: int) -> None:
    inputs = {
        "q": normal(2, 3, 32),
        "k": normal(2, 3, 16),
        "v": normal(2, 3, 16),
        "mask": np.random.default_rng(0).random((2, 1, 3, 7)) < 0.7,
        "past_key": normal(2, 2, 4, 8),
        "past_value": normal(2, 2, 4, 8) + 1,
    }
    options = {"q_num_heads": 4, "kv_num_heads": 2, "scale": 0.4, "is_causal": 1}
    if mode:  # of mode 0, "raw QK", onnx 1.23 returns what mode 1 does
        options["softcap"] = 2.0
    assert len(evaluate("Attention", inputs, 4, qk_matmul_output_mode=mode, **options)) == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"past_key": normal(1, 2, 3, 8)}, "past_key and past_value must be given together"),
        ({"k": normal(1, 2, 4, 6)}, "K must have shape"),
        ({"q": normal(1, 4, 8)}, "Q must have 4 axes, or 3 and a multiple of its number of heads"),
        ({"mask": normal(3, 3)}, "attn_mask must broadcast to"),
    ],
)
def test_a_wrong_input_of_attention_is_named(change: dict[str, Any], message: str) -> None:
    inputs: dict[str, Any] = {"q": normal(1, 2, 4, 8), "k": normal(1, 2, 4, 8), "v": normal(1, 2, 4, 8), "mask": None}
    with pytest.raises(ValueError, match=message):
        evaluate("Attention", {**inputs, **change})


@pytest.mark.parametrize(
    ("indices", "mode", "message"),
    [
        ([0, 7], "linear", "write_indices must leave room for 2 tokens in 8"),
        ([-1, 0], "linear", "write_indices must leave room"),
        ([0], "circular", "write_indices must have shape"),
        ([0, 0], "zigzag", "mode must be 'linear' or 'circular'"),
    ],
)
def test_a_wrong_write_is_named(indices: list[int], mode: str, message: str) -> None:
    inputs = {"cache": normal(2, 2, 8, 4), "update": normal(2, 2, 2, 4), "indices": np.int64(indices)}
    with pytest.raises(ValueError, match=message):
        evaluate("TensorScatter", inputs, mode=mode)


def test_a_scatter_feeds_attention() -> None:
    cache, update, at = normal(2, 2, 8, 4), normal(2, 2, 1, 4), np.int64([3, 5])
    (present,) = evaluate("TensorScatter", {"cache": cache, "update": update, "at": at}, mode="circular")
    evaluate(
        "Attention",
        {"q": normal(2, 2, 1, 4), "k": present, "v": present, "mask": None, "pk": None, "pv": None, "length": at + 1},
        is_causal=1,
    )


def test_a_window_wider_than_any_sequence_hides_nothing() -> None:
    inputs = {"q": normal(1, 2, 5, 8), "k": normal(1, 2, 5, 8), "v": normal(1, 2, 5, 8)}
    wide, unbounded = (evaluate("Attention", inputs, right_window_size=size) for size in (2**63 - 1, -1))
    np.testing.assert_array_equal(*wide, *unbounded)

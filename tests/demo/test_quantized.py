from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from numbaflash_service.demo.quantized import BLOCK, QuantizedMatrix
from numbaflash_service.demo.weights import Checkpoint

Array = npt.NDArray[Any]


def random_matrix(seed: int, outputs: int, blocks: int) -> QuantizedMatrix:
    random = np.random.default_rng(seed)
    return QuantizedMatrix(
        random.integers(-128, 128, (outputs, blocks * BLOCK), np.int8),
        random.normal(size=(outputs, blocks)).astype(np.float32),
        random.normal(size=(outputs, blocks)).astype(np.float32),
    )


def dense(matrix: QuantizedMatrix) -> Array:
    scale, minimum = (np.repeat(part.astype(np.float64), BLOCK, axis=1) for part in (matrix.scale, matrix.minimum))
    return matrix.codes * scale + minimum


shapes = st.tuples(st.integers(0, 99), st.integers(1, 9), st.integers(1, 5))


@given(shapes, st.integers(1, 4))
def test_a_product_is_that_of_the_float_weights(shape: tuple[int, int, int], tokens: int) -> None:
    matrix = random_matrix(*shape)
    x = np.random.default_rng(shape).normal(size=(tokens, matrix.codes.shape[1])).astype(np.float32)
    largest = np.abs(x) @ np.abs(dense(matrix)).T
    got = matrix.product(x)
    assert got.dtype == np.float32
    assert (np.abs(got - x @ dense(matrix).T) <= 1e-6 * largest).all()


def test_rows_are_dequantized_by_their_own_scales() -> None:
    matrix = random_matrix(0, 8, 3)
    np.testing.assert_allclose(matrix.rows([5, 0, 5]), dense(matrix)[[5, 0, 5]], rtol=1e-5, atol=1e-6)


def test_a_stack_gives_the_outputs_one_after_the_other() -> None:
    first, second = random_matrix(1, 3, 2), random_matrix(2, 5, 2)
    x = np.random.default_rng(3).normal(size=(1, 2 * BLOCK)).astype(np.float32)
    both = QuantizedMatrix.stack(first, second).product(x)
    np.testing.assert_array_equal(both, np.concatenate([first.product(x), second.product(x)], axis=1))


@pytest.mark.parametrize("name", ["token_embd", "blk.0.attn_q", "blk.29.ffn_down"])
def test_unpacked_weights_are_those_that_gguf_dequantizes(
    name: str, checkpoint: Checkpoint, dense_weights: dict[str, Array]
) -> None:
    expected = dense_weights[f"{name}.weight"]
    largest = np.abs(expected).max()
    np.testing.assert_allclose(checkpoint.matrices[f"{name}.weight"].rows(), expected, rtol=0, atol=1e-7 * largest)
